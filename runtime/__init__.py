"""Running a bundle, imported as `mla_deploy.runtime`.

    engine = load("bundle")
    print(engine.generate("Once upon a time", GenerationOptions(max_tokens=64)).text)

The engine is the one of C and C++ programs: `csrc/core/`, compiled into `_runtime` with the
bindings in `csrc/python/`. What is here is its Python face: `engine.py` is the model in memory,
`session.py` a sequence in it, both in C++ (`core_engine.py`) or with TensorRT (`tensorrt.py`),
`generation.py` turns its tokens into text with `writing.py`,
`conversation.py` takes turns with a user, and `serve/` answers many of them.

Of the rest of mla-deploy the runtime may import only what needs no torch (the bundle, errors, the
tokenizer), because a bundle is run where neither torch nor transformers is installed.
"""

from mla_deploy.runtime.cancellation import Cancellation
from mla_deploy.runtime.conversation import Answer, Conversation
from mla_deploy.runtime.engine import Engine
from mla_deploy.runtime.generation import Generation, GenerationResult
from mla_deploy.runtime.loading import load
from mla_deploy.runtime.ops import Kernels, ops_library
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.sampling import Sampler
from mla_deploy.runtime.session import Session
from mla_deploy.runtime.statistics import Statistics
from mla_deploy.runtime.writing import Event, FinishReason

__all__ = [
    "Answer",
    "Cancellation",
    "Conversation",
    "Engine",
    "Event",
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "GenerationResult",
    "Kernels",
    "Sampler",
    "Session",
    "Statistics",
    "load",
    "ops_library",
]

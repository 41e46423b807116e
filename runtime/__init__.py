"""Running a bundle, imported as `mla_deploy.runtime`.

    engine = load("bundle")
    print(engine.generate("Once upon a time", GenerationOptions(max_tokens=64)).text)

`engine.py` is the model in memory, `session.py` a sequence in it, `generation.py` the loop that
makes text with `sampling.py`, `stopping.py` and `statistics.py`; `graph.py` and `arena.py` are the
graph in onnxruntime and the memory of the cache.

The C++ core in `csrc/` and `include/` will take the place of the Python engine behind these names.
Of the rest of mla-deploy the runtime may import only what needs no torch (the bundle, errors, the
tokenizer), because a bundle is run where neither torch nor transformers is installed.
"""

from mla_deploy.runtime.engine import Engine, load
from mla_deploy.runtime.generation import Event, FinishReason, Generation, GenerationResult
from mla_deploy.runtime.ops import Kernels, ops_library
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.session import Session
from mla_deploy.runtime.statistics import Statistics

__all__ = [
    "Engine",
    "Event",
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "GenerationResult",
    "Kernels",
    "Session",
    "Statistics",
    "load",
    "ops_library",
]

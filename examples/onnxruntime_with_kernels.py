"""A bundle in onnxruntime itself, without mla-deploy's engine: what another program has to do.

    mla-deploy export examples/models/tiny-mla -o bundle
    python examples/onnxruntime_with_kernels.py bundle --tokens 64

Decodes greedily with onnxruntime's own operators and with our operator library, and prints both
speeds. Only `ops_library()` is mla-deploy's; the rest is onnxruntime, numpy and a block table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mla_deploy.runtime import ops_library

PAGE_TOKENS = 64
TYPES = {"float": "float32"}


def open_session(bundle: Path, native: bool) -> ort.InferenceSession:
    """A session; with the library, LatentAttention is a kernel and not a function."""
    options = ort.SessionOptions()
    if native:
        options.register_custom_ops_library(str(ops_library()))
    return ort.InferenceSession(
        str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def decode(
    session: ort.InferenceSession, prompt: list[int], tokens: int
) -> tuple[list[int], float]:
    """The tokens after the prompt, and seconds a token."""
    pages = -(-(len(prompt) + tokens) // PAGE_TOKENS)
    binding = session.io_binding()
    caches = []  # bound values point into these arrays
    for node in session.get_inputs():
        if not node.name.startswith("cache."):
            continue
        kind = node.type.removeprefix("tensor(").removesuffix(")")
        # Page 0 is scratch; the sequence has the others.
        array = np.zeros([pages + 1, *node.shape[1:]], dtype=TYPES.get(kind, kind))
        value = ort.OrtValue.ortvalue_from_numpy(array)
        caches.append(array)
        # One value as input and as output: tokens are appended in place, nothing is copied.
        binding.bind_ortvalue_input(node.name, value)
        binding.bind_ortvalue_output(node.name.replace("cache", "present", 1), value)
    binding.bind_output("logits")
    binding.bind_cpu_input("block_table", np.arange(1, pages + 1).reshape(1, -1))

    def step(ids: list[int], past: int) -> int:
        binding.bind_cpu_input("input_ids", np.array([ids]))
        binding.bind_cpu_input("past_lengths", np.array([past]))
        binding.bind_cpu_input("new_lengths", np.array([len(ids)]))
        binding.bind_cpu_input("logit_index", np.array([[len(ids) - 1]]))
        session.run_with_iobinding(binding)
        return int(binding.get_outputs()[-1].numpy().argmax())

    found = [step(prompt, 0)]
    start = time.perf_counter()
    while len(found) < tokens:
        found.append(step([found[-1]], len(prompt) + len(found) - 1))
    return found, (time.perf_counter() - start) / (tokens - 1)


def main() -> None:
    """Decode twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512, help="its length; the ids are random")
    arguments = parser.parse_args()
    prompt = np.random.default_rng(0).integers(2, 1000, arguments.prompt).tolist()
    found = {}
    for name, native in (("onnxruntime alone", False), ("with the kernels", True)):
        session = open_session(arguments.bundle, native)
        found[name], seconds = decode(session, prompt, arguments.tokens)
        print(f"{name:18} {1 / seconds:8.1f} tokens/s")
    first, second = (np.array(tokens) for tokens in found.values())
    same = int(np.argmax(np.append(first != second, True)))
    print(f"the first {same} of {len(first)} tokens are the same")


if __name__ == "__main__":
    main()

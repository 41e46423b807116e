"""The decoder graph in onnxruntime, with the cache bound to it in place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from mla_deploy.bundle import Bundle
from mla_deploy.errors import BundleError, UsageError
from mla_deploy.runtime.arena import Array
from mla_deploy.runtime.ops import Kernels, choose

FEEDS = ("input_ids", "past_lengths", "new_lengths", "block_table", "logit_index")

Integers = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class DecoderGraph:
    """A bundle's graph, ready to run.

    The arrays of the cache are bound once, as input and as output: the graph writes new tokens
    into the memory it reads, and nothing of the cache is copied from step to step.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int | None, spin: bool, kernels: str = "auto"
    ) -> None:
        """Load the graph.

        Args:
            threads: that compute; None leaves the choice to onnxruntime (one a physical core).
            spin: waiting threads poll for a moment before they sleep: faster, and costs power.
            kernels: "native": those of the operator library; "stock": onnxruntime's own; "auto":
                native where it can be had. The attribute `kernels` says what it became.

        Raises:
            UsageError: onnxruntime is not installed, or has no kernels of that kind.
            BundleError: onnxruntime cannot load the graph, or it is not the manifest's.
        """
        self._ort = _onnxruntime()
        path = bundle.file(bundle.manifest.graph.path)
        self.kernels = choose(kernels)
        try:
            self._session = self._open(path, threads, spin)
        except BundleError as error:  # such as a cache format that the library does not know
            if kernels != "auto" or self.kernels.library is None:
                raise
            self.kernels = Kernels(None, error.found or error.what)
            self._session = self._open(path, threads, spin)
        self._vocab_size = bundle.manifest.model.vocab_size
        _check_signature(bundle, self._session)
        self._binding = self._session.io_binding()

    def _open(self, path: Path, threads: int | None, spin: bool) -> Any:
        options = self._session_options(threads, spin)
        try:
            if self.kernels.library is not None:
                options.register_custom_ops_library(str(self.kernels.library))
            return self._ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has one exception class a status, all of Exception
            raise BundleError(
                f"onnxruntime {self._ort.__version__} cannot load {path}",
                found=str(error).splitlines()[0],
                hint="export the model again, or use a newer onnxruntime",
            ) from None

    def _session_options(self, threads: int | None, spin: bool) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors; the rest is about the graph's making
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        return options

    def bind_cache(self, arrays: Mapping[str, Array]) -> None:
        """Let the graph read and write these arrays. They must outlive the graph's last run.

        Shapes: `cache.{layer}.{part}` [pages, *page_shape].
        """
        for name, array in arrays.items():
            value = self._ort.OrtValue.ortvalue_from_numpy(array)  # the array's memory, no copy
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(_output_of(name), value)

    def run(self, feeds: Mapping[str, Integers]) -> Logits:
        """One step.

        Args:
            feeds: the arrays of `FEEDS`; shapes: `mla_deploy.bundle`.

        Returns:
            logits [B, L, vocab_size], a new array.
        """
        for name in FEEDS:
            self._binding.bind_cpu_input(name, feeds[name])
        logits = np.empty((*feeds["logit_index"].shape, self._vocab_size), dtype=np.float32)
        self._binding.bind_ortvalue_output("logits", self._ort.OrtValue.ortvalue_from_numpy(logits))
        self._session.run_with_iobinding(self._binding)
        return logits


def _output_of(cache_name: str) -> str:
    return "present." + cache_name.removeprefix("cache.")


def _check_signature(bundle: Bundle, session: Any) -> None:
    """Whether inputs and outputs are those of `mla_deploy.bundle` and of the manifest."""
    batch = {
        "input_ids": 2,
        "past_lengths": 1,
        "new_lengths": 1,
        "block_table": 2,
        "logit_index": 2,
    }
    inputs: dict[str, tuple[str, list[int | None]]] = {
        name: ("int64", [None] * rank) for name, rank in batch.items()
    }
    outputs: dict[str, tuple[str, list[int | None]]] = {
        "logits": ("float32", [None, None, bundle.manifest.model.vocab_size])
    }
    for layer, cache in enumerate(bundle.manifest.cache.layers):
        for part in cache.parts:
            expected = (part.dtype, [None, *part.page_shape])
            inputs[f"cache.{layer}.{part.name}"] = expected
            outputs[f"present.{layer}.{part.name}"] = expected
    path = bundle.file(bundle.manifest.graph.path)
    for kind, wanted, nodes in (
        ("input", inputs, session.get_inputs()),
        ("output", outputs, session.get_outputs()),
    ):
        found = {node.name: node for node in nodes}
        for name in sorted(wanted.keys() ^ found.keys()):
            problem = "lacks the" if name in wanted else "has an unknown"
            raise BundleError(
                f"{path} {problem} {kind} {name}",
                found=", ".join(found),
                allowed=", ".join(wanted),
                hint="export the model again",
            )
        for name, (dtype, shape) in wanted.items():
            node = found[name]
            if _dtype_of(node.type) != dtype or not _shapes_agree(node.shape, shape):
                raise BundleError(
                    f"{path} has an {kind} {name} that is not the manifest's",
                    found=f"{node.type} {node.shape}",
                    allowed=f"{dtype} {shape}",
                    hint="export the model again",
                )


def _dtype_of(ort_type: str) -> str:
    """`tensor(float16)` to `float16`; onnxruntime says `float` for float32."""
    match = re.fullmatch(r"tensor\((\w+)\)", ort_type)
    name = match[1] if match else ort_type
    return "float32" if name == "float" else name


def _shapes_agree(found: list[Any], wanted: list[int | None]) -> bool:
    """A dimension with a name, or none, agrees with anything."""
    if not found:  # onnxruntime gives no shape where the file has none
        return True
    return len(found) == len(wanted) and all(
        not isinstance(a, int) or b is None or a == b for a, b in zip(found, wanted, strict=True)
    )


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(
            "onnxruntime is not installed",
            hint="pip install 'mla-deploy[cpu]', or 'mla-deploy[gpu]'",
        ) from None
    module: ModuleType = onnxruntime
    return module

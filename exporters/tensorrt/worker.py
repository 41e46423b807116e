"""Builds one engine in a process of its own, `python worker.py`.

A request comes as JSON on standard input; progress, and then the result or an error, go as a line
of JSON each to standard output. So a build can be stopped, its memory is given back whatever
happens, and a crash of the compiler does not take the caller with it. Imports nothing of ours.
"""

from __future__ import annotations

import importlib
import json
import re
import resource
import sys
import time
from typing import Any


def main() -> None:
    """Serve one request."""
    request = json.loads(sys.stdin.read())
    try:
        _say({"result": _build(request)})
    except _BuildError as error:
        _say({"error": str(error)})


class _BuildError(Exception):
    pass


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _build(request: dict[str, Any]) -> dict[str, Any]:
    """
    Args:
        request: `module`, `onnx`, `engine` (file to write), `compute_capability` (as `SM89`; None:
            what TensorRT does by itself), `profiles` (for each the least, usual and most shape of
            every input), `plugin` (library to load, or None), `log` (file to write, or None).
    """
    start = time.monotonic()
    trt = importlib.import_module(request["module"])
    logger = _logger(trt)
    builder = trt.Builder(logger)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if request["plugin"] and trt.get_plugin_registry().load_library(request["plugin"]) is None:
        raise _BuildError(f"TensorRT cannot load {request['plugin']}")
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        raise _BuildError(f"the parser refuses it: {parser.get_error(0).desc()}")
    engine = builder.build_serialized_network(network, _configured(trt, builder, request))
    if request["log"]:
        with open(request["log"], "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in logger.lines)
    if engine is None:
        raise _BuildError(logger.last_error or "no reason given")
    with open(request["engine"], "wb") as out:
        out.write(engine)
    return {
        "version": trt.__version__,
        "seconds": time.monotonic() - start,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "scratch_bytes": _figures(logger.lines, r"Max Scratch Memory: (\d+) bytes"),
        "weights_bytes": _figures(logger.lines, r"Total Weights Memory: (\d+) bytes"),
    }


def _configured(trt: Any, builder: Any, request: dict[str, Any]) -> Any:
    """The settings of a build."""
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32: routers depend on it
    config.max_aux_streams = 0  # each stream would have scratch memory of its own
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt)
    if request["plugin"]:  # the cache is written in place
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if request["compute_capability"]:
        config.num_compute_capabilities = 1
        kind = getattr(trt.ComputeCapability, request["compute_capability"])
        config.set_compute_capability(kind, 0)
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    return config


def _figures(lines: list[str], pattern: str) -> list[int]:
    return [int(match[1]) for line in lines if (match := re.search(pattern, line))]


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what is said; the last error is the reason of a failure."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last_error = message

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells the steps of the phases that have no parent."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.steps:
                _say({"progress": [step + 1, self.steps[name], name]})
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()


if __name__ == "__main__":
    main()

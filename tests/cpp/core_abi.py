"""libmla_deploy.so through ctypes, and where tests get it from.

Only what the ABI says: structs as in runtime.h, statuses, texts. The library is built from the
checkout once a session, in build/tests-cpp, and installed there too; MLA_DEPLOY_LIBRARY names
another one, such as one with sanitizers.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
    sizeof,
)
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "tests-cpp"
PREFIX = BUILD / "prefix"
FAST = ("-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -g1")
"""How the tests build: what takes seconds here takes minutes with -O3, file by file."""

STATUS = (
    "OK", "INVALID_ARGUMENT", "INVALID_HANDLE", "BAD_BUNDLE", "BAD_RUNTIME", "CACHE_FULL",
    "CONTEXT_FULL", "BAD_SESSION_FILE", "FILE_ERROR", "OUT_OF_MEMORY", "BUSY", "CANCELLED",
    "MODEL_FAILED", "INTERNAL", "BAD_TOKENIZER", "UNSUPPORTED", "BUFFER_TOO_SMALL", "NOT_FOUND",
    "TOO_COMPLEX",
    "BAD_GRAPH",
    "BAD_KERNELS",
)  # fmt: skip
FINISH = ("none", "eos", "stop", "length", "context", "callback", "cancelled")
CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_int32)


class EngineOptions(Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("bundle", c_char_p), ("onnxruntime_library", c_char_p),
        ("ops_library", c_char_p), ("max_tokens", c_uint64), ("prefill_chunk", c_uint32),
        ("threads", c_uint32), ("spin", c_uint32), ("verify", c_uint32),
        ("device", c_char_p), ("cuda_library", c_char_p),
    ]  # fmt: skip


class EngineInfo(Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("capacity_tokens", c_uint64), ("free_tokens", c_uint64),
        ("bytes_per_token", c_uint64), ("parameters", c_uint64), ("vocab_size", c_uint32),
        ("hidden_size", c_uint32), ("num_hidden_layers", c_uint32),
        ("num_attention_heads", c_uint32), ("q_lora_rank", c_uint32), ("kv_lora_rank", c_uint32),
        ("qk_nope_head_dim", c_uint32), ("qk_rope_head_dim", c_uint32), ("v_head_dim", c_uint32),
        ("max_position_embeddings", c_uint32), ("bos_token_id", c_int32),
        ("prefill_chunk", c_uint32), ("model_type", c_char * 64), ("onnxruntime", c_char * 32),
    ]  # fmt: skip


class SessionInfo(Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("length", c_uint64), ("room", c_uint64),
        ("cache_bytes", c_uint64),
    ]  # fmt: skip


class Request(Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("session", c_void_p), ("tokens", c_void_p),
        ("token_count", c_size_t), ("positions", c_void_p), ("position_count", c_size_t),
        ("logits", c_void_p), ("logits_capacity", c_size_t),
    ]  # fmt: skip


class SamplingOptions(Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("temperature", c_double), ("top_p", c_double),
        ("min_p", c_double), ("repetition_penalty", c_double), ("top_k", c_uint32),
        ("seeded", c_uint32), ("seed", c_uint64),
    ]  # fmt: skip


class GenerateOptions(Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("sampling", POINTER(SamplingOptions)),
        ("stop_tokens", c_void_p), ("stop_token_count", c_size_t), ("callback", CALLBACK),
        ("user_data", c_void_p), ("cancellation", c_void_p), ("max_tokens", c_uint32),
        ("ignore_eos", c_uint32),
    ]  # fmt: skip


class GenerationStruct(Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("tokens", c_void_p), ("capacity", c_size_t),
        ("token_count", c_size_t), ("prompt_tokens", c_uint64), ("reused_tokens", c_uint64),
        ("prefill_ms", c_double), ("decode_ms", c_double), ("cache_bytes", c_uint64),
        ("finish_reason", c_int),
    ]  # fmt: skip


class AbiError(Exception):
    """A call that did not return MLA_OK."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text


Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


def ids_of(tokens: Sequence[int]) -> Tokens:
    return np.ascontiguousarray(tokens, dtype=np.int32)


def sampling(**changes: Any) -> SamplingOptions:
    """MLA_SAMPLING_OPTIONS_INIT, changed."""
    seed = changes.pop("seed", None)
    values = {"top_p": 1.0, "repetition_penalty": 1.0} | changes
    return SamplingOptions(
        sizeof(SamplingOptions), **values, seeded=seed is not None, seed=seed or 0
    )


class Api:
    """The library. Every function raises AbiError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = ctypes.CDLL(str(path))
        self.raw.mla_last_error.restype = c_char_p
        self.raw.mla_version.restype = c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.raw, name)(*arguments)
        if status:
            raise AbiError(STATUS[status], self.raw.mla_last_error().decode())

    def make(self, name: str, *arguments: Any) -> c_void_p:
        """A function whose last argument is where a handle goes."""
        handle = c_void_p(0xBAD)
        self.call(name, *arguments, byref(handle))
        return handle

    def engine(self, bundle: Path | str, **options: Any) -> EngineHandle:
        paths = {"onnxruntime_library": onnxruntime_library(), "bundle": bundle} | options
        encoded = {
            name: os.fsencode(value) if isinstance(value, (str, Path)) else value
            for name, value in ({"threads": 1} | paths).items()
        }
        given = EngineOptions(sizeof(EngineOptions), **encoded)
        return EngineHandle(self, self.make("mla_engine_open", byref(given)))

    def sampler(self, options: SamplingOptions | None, vocab_size: int) -> SamplerHandle:
        given = None if options is None else byref(options)
        return SamplerHandle(self, self.make("mla_sampler_create", given, vocab_size), vocab_size)


class EngineHandle:
    def __init__(self, api: Api, handle: c_void_p) -> None:
        self.api, self.handle = api, handle
        self.vocab_size = int(self.info.vocab_size)

    @property
    def info(self) -> EngineInfo:
        info = EngineInfo(sizeof(EngineInfo))
        self.api.call("mla_engine_get_info", self.handle, byref(info))
        return info

    def close(self) -> None:
        self.api.call("mla_engine_close", self.handle)

    def session(self) -> SessionHandle:
        return SessionHandle(self, self.api.make("mla_session_create", self.handle))

    def load(self, path: Path) -> SessionHandle:
        made = self.api.make("mla_session_load", self.handle, os.fsencode(path))
        return SessionHandle(self, made)

    def step(
        self,
        requests: Sequence[tuple[SessionHandle, Sequence[int]]],
        positions: Sequence[Sequence[int]] | None = None,
        cancellation: c_void_p | None = None,
    ) -> list[Logits]:
        structs = (Request * len(requests))()
        kept: list[Any] = []
        results = []
        for index, (session, tokens) in enumerate(requests):
            ids = ids_of(tokens)
            at = None if positions is None else np.array(positions[index], dtype=np.uintp)
            rows = 1 if at is None else len(at)
            logits = np.full((rows, self.vocab_size), np.nan, dtype=np.float32)
            kept += [ids, at]
            results.append(logits)
            structs[index] = Request(
                sizeof(Request), session.handle, ids.ctypes.data, len(ids),
                None if at is None else at.ctypes.data, 0 if at is None else len(at),
                logits.ctypes.data, logits.size,
            )  # fmt: skip
        self.api.call("mla_step", self.handle, structs, c_size_t(len(requests)), cancellation)
        return [logits[0] if positions is None else logits for logits in results]


class SessionHandle:
    def __init__(self, engine: EngineHandle, handle: c_void_p) -> None:
        self.engine, self.api, self.handle = engine, engine.api, handle

    @property
    def info(self) -> SessionInfo:
        info = SessionInfo(sizeof(SessionInfo))
        self.api.call("mla_session_get_info", self.handle, byref(info))
        return info

    @property
    def length(self) -> int:
        return int(self.info.length)

    @property
    def tokens(self) -> list[int]:
        count = c_size_t()
        self.api.call("mla_session_tokens", self.handle, None, c_size_t(0), byref(count))
        ids = np.full(count.value, -1, dtype=np.int32)
        place = c_void_p(ids.ctypes.data)
        self.api.call("mla_session_tokens", self.handle, place, c_size_t(len(ids)), byref(count))
        return ids.tolist()

    def prefill(self, tokens: Sequence[int]) -> Logits:
        ids = ids_of(tokens)
        logits = np.full(self.engine.vocab_size, np.nan, dtype=np.float32)
        self.api.call(
            "mla_session_prefill", self.handle, c_void_p(ids.ctypes.data), c_size_t(len(ids)),
            c_void_p(logits.ctypes.data), c_size_t(logits.size),
        )  # fmt: skip
        return logits

    def decode(self, token: int) -> Logits:
        logits = np.full(self.engine.vocab_size, np.nan, dtype=np.float32)
        place = c_void_p(logits.ctypes.data)
        self.api.call("mla_session_decode", self.handle, token, place, c_size_t(logits.size))
        return logits

    def rewind(self, length: int) -> None:
        self.api.call("mla_session_rewind", self.handle, c_size_t(length))

    def fork(self) -> SessionHandle:
        return SessionHandle(self.engine, self.api.make("mla_session_fork", self.handle))

    def save(self, path: Path) -> None:
        self.api.call("mla_session_save", self.handle, os.fsencode(path))

    def destroy(self) -> None:
        self.api.call("mla_session_destroy", self.handle)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 256,
        stop_tokens: Sequence[int] = (),
        callback: Callable[[int], bool] | None = None,
        **choices: Any,
    ) -> Generated:
        """`choices`: of the sampling, and cancellation, ignore_eos. The callback: True to stop."""
        rest = {
            name: choices.pop(name) for name in ("cancellation", "ignore_eos") if name in choices
        }
        options = sampling(**choices)
        stops, ids = ids_of(stop_tokens), ids_of(prompt)
        given = GenerateOptions(
            sizeof(GenerateOptions), sampling=ctypes.pointer(options), max_tokens=max_tokens,
            stop_tokens=stops.ctypes.data, stop_token_count=len(stops), **rest,
        )  # fmt: skip
        if callback is not None:
            given.callback = CALLBACK(lambda _, token: int(bool(callback(token))))
        made = np.full(max_tokens, -1, dtype=np.int32)
        result = GenerationStruct(sizeof(GenerationStruct), made.ctypes.data, len(made))
        try:
            self.api.call(
                "mla_generate", self.handle, c_void_p(ids.ctypes.data), c_size_t(len(ids)),
                byref(given), byref(result),
            )  # fmt: skip
        except AbiError as error:
            error.generated = Generated(made, result)  # type: ignore[attr-defined]
            raise
        return Generated(made, result)


class Generated:
    """What mla_generate filled."""

    def __init__(self, tokens: Tokens, result: GenerationStruct) -> None:
        self.tokens: list[int] = tokens[: result.token_count].tolist()
        self.finish_reason = FINISH[result.finish_reason]
        self.statistics = result


class SamplerHandle:
    def __init__(self, api: Api, handle: c_void_p, vocab_size: int) -> None:
        self.api, self.handle, self.vocab_size = api, handle, vocab_size

    def observe(self, tokens: Sequence[int]) -> None:
        ids = ids_of(tokens)
        place = c_void_p(ids.ctypes.data)
        self.api.call("mla_sampler_observe", self.handle, place, c_size_t(len(ids)))

    def pick(self, logits: Logits) -> int:
        token = c_int32(-1)
        place = logits.ctypes.data_as(POINTER(c_float))
        self.api.call("mla_sampler_pick", self.handle, place, c_size_t(len(logits)), byref(token))
        return token.value

    def distribution(self, logits: Logits) -> tuple[Tokens, npt.NDArray[np.float64]]:
        ids = np.full(self.vocab_size, -1, dtype=np.int32)
        probabilities = np.full(self.vocab_size, np.nan)
        count = c_size_t()
        self.api.call(
            "mla_sampler_distribution", self.handle, c_void_p(logits.ctypes.data),
            c_size_t(len(logits)), c_void_p(ids.ctypes.data), c_void_p(probabilities.ctypes.data),
            c_size_t(len(ids)), byref(count),
        )  # fmt: skip
        return ids[: count.value], probabilities[: count.value]

    def destroy(self) -> None:
        self.api.call("mla_sampler_destroy", self.handle)


def onnxruntime_library() -> Path:
    """The shared library in the Python package, found without loading the package."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        pytest.skip("onnxruntime is not installed")
    files = sorted((Path(found.origin).parent / "capi").glob("libonnxruntime.so.*"))
    if not files:
        pytest.skip("onnxruntime's Python package has no shared library")
    return files[-1]


@functools.cache
def installed_prefix() -> Path | str:
    """Where the library was built and installed to; a text: why it cannot be."""
    tools = {
        "cmake": shutil.which("cmake"),
        "a C++ compiler": shutil.which(os.environ.get("CXX", "c++")),
    }
    missing = [name for name, path in tools.items() if path is None]
    if missing:
        return f"there is no {' and no '.join(missing)}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several pytest processes
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(ROOT / "runtime"), "-B", str(BUILD), *generator]
        # The operator library was built with the Python package, and its kernels take long.
        configure += [*FAST, "-DMLA_PYTHON=OFF", "-DMLA_OPS=OFF", "-DMLA_ENGINE=AUTO"]
        configure.append(f"-DPython_EXECUTABLE={sys.executable}")
        output = run(configure)
        if "libmla_deploy.so is left out" in output:
            return "headers of onnxruntime or nlohmann/json are not to be had"
        run(["cmake", "--build", str(BUILD)])
        run(["cmake", "--install", str(BUILD), "--component", "cpp", "--prefix", str(PREFIX)])
    return PREFIX


def run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@functools.cache
def load_api() -> Api:
    """The library, or the test is skipped."""
    given = os.environ.get("MLA_DEPLOY_LIBRARY")
    if given is not None:
        return Api(Path(given))
    prefix = installed_prefix()
    if isinstance(prefix, str):
        pytest.skip(f"libmla_deploy.so cannot be built: {prefix}")
    return Api(next(prefix.glob("lib*/**/libmla_deploy.so")))


def error_of(call: Any, *arguments: Any, **named: Any) -> AbiError:
    """The error of a call that must fail; its text must have the form of all errors."""
    with pytest.raises(AbiError) as caught:
        call(*arguments, **named)
    # one sentence, and after it only labelled lines
    first, *rest = caught.value.text.splitlines()
    assert first
    for line in rest:
        assert line[:11] in ("  found:   ", "  allowed: ", "  next:    "), caught.value.text
    return caught.value


def status_of(call: Any, *arguments: Any, **named: Any) -> str:
    """The status of a call that must fail."""
    return error_of(call, *arguments, **named).status

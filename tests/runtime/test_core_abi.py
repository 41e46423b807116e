"""The rules of the C ABI: handles, struct sizes, options, texts of errors."""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_size_t, c_void_p, sizeof
from typing import Any

import numpy as np
import pytest
from cpp.core_abi import (
    ROOT,
    Api,
    EngineInfo,
    EngineOptions,
    GenerateOptions,
    GenerationStruct,
    Request,
    SessionInfo,
    load_api,
    onnxruntime_library,
    sampling,
    status_of,
)

import mla_deploy
from mla_deploy.bundle import Bundle


@pytest.fixture(scope="module")
def api() -> Api:
    return load_api()


@pytest.fixture(scope="module")
def engine(api: Api, toy: Any) -> Any:
    return api.engine(toy.path)


def test_versions(api: Api) -> None:
    header = (ROOT / "runtime" / "include" / "mla_deploy" / "runtime.h").read_text()
    assert f"#define MLA_ABI_VERSION {api.raw.mla_abi_version()}\n" in header
    assert api.raw.mla_version().decode() == mla_deploy.__version__


def test_the_structs_here_are_those_of_the_header(api: Api, engine: Any) -> None:
    """The library takes exactly its own size; one byte less is refused."""
    info = EngineInfo(sizeof(EngineInfo) - 1)
    assert status_of(api.call, "mla_engine_get_info", engine.handle, byref(info)) == (
        "INVALID_ARGUMENT"
    )
    assert engine.info.struct_size == sizeof(EngineInfo)


def test_the_engine_tells_what_it_holds(toy: Any, api: Api) -> None:
    bundle = Bundle.open(toy.path)
    engine = api.engine(toy.path, max_tokens=100, prefill_chunk=7)
    info = engine.info
    assert info.capacity_tokens == info.free_tokens == 128
    assert info.bytes_per_token == bundle.kv_bytes_per_token
    assert info.prefill_chunk == 7
    assert info.model_type == b"toy"
    assert info.onnxruntime.decode() in onnxruntime_library().name
    for name in ("vocab_size", "num_hidden_layers", "kv_lora_rank", "max_position_embeddings"):
        assert getattr(info, name) == getattr(bundle.manifest.model, name)
    assert (info.q_lora_rank, info.bos_token_id) == (0, 256)
    count = c_size_t()
    ids = np.zeros(4, dtype=np.int32)
    place = c_void_p(ids.ctypes.data)
    api.call("mla_engine_eos_tokens", engine.handle, place, c_size_t(4), byref(count))
    assert ids[: count.value].tolist() == [257]
    assert api.engine(toy.path).info.capacity_tokens == 1024  # the context, in whole pages
    with engine_session(engine) as session:
        session.prefill([1] * 65)
        assert engine.info.free_tokens == 0


class engine_session:  # noqa: N801
    def __init__(self, engine: Any) -> None:
        self.session = engine.session()

    def __enter__(self) -> Any:
        return self.session

    def __exit__(self, *_: object) -> None:
        self.session.destroy()


# ---- handles


def calls_on(api: Api, kind: str, handle: Any) -> dict[str, tuple[Any, ...]]:
    """Every function that takes a handle of the kind first, with good arguments otherwise."""
    out, size, one = c_void_p(), c_size_t(), np.ones(1, dtype=np.int32)
    ids = c_void_p(one.ctypes.data)
    logits = np.zeros(263, dtype=np.float32)
    place = c_void_p(logits.ctypes.data)
    return {
        "engine": {
            "mla_engine_get_info": (handle, byref(EngineInfo(sizeof(EngineInfo)))),
            "mla_engine_eos_tokens": (handle, None, c_size_t(0), byref(size)),
            "mla_session_create": (handle, byref(out)),
            "mla_session_load": (handle, b"/tmp/nowhere", byref(out)),
            "mla_step": (handle, None, c_size_t(0), None),
            "mla_engine_close": (handle,),
        },
        "session": {
            "mla_session_get_info": (handle, byref(SessionInfo(sizeof(SessionInfo)))),
            "mla_session_tokens": (handle, None, c_size_t(0), byref(size)),
            "mla_session_prefill": (handle, ids, c_size_t(1), place, c_size_t(263)),
            "mla_session_decode": (handle, 1, place, c_size_t(263)),
            "mla_session_rewind": (handle, c_size_t(0)),
            "mla_session_fork": (handle, byref(out)),
            "mla_session_save": (handle, b"/tmp/never-written"),
            "mla_generate": (
                handle, ids, c_size_t(1), None, byref(GenerationStruct(sizeof(GenerationStruct))),
            ),
            "mla_session_destroy": (handle,),
        },
        "sampler": {
            "mla_sampler_observe": (handle, ids, c_size_t(1)),
            "mla_sampler_pick": (handle, place, c_size_t(263), byref(ctypes.c_int32())),
            "mla_sampler_distribution": (
                handle, place, c_size_t(263), None, None, c_size_t(0), byref(size),
            ),
            "mla_sampler_destroy": (handle,),
        },
        "cancellation": {
            "mla_cancellation_request": (handle,),
            "mla_cancellation_destroy": (handle,),
        },
    }[kind]  # fmt: skip


KINDS = ("engine", "session", "sampler", "cancellation")


def test_the_lists_above_hold_every_function(api: Api) -> None:
    header = (ROOT / "runtime" / "include" / "mla_deploy" / "runtime.h").read_text()
    declared = {
        line.split("(")[0].split()[-1]
        for line in header.splitlines()
        if line.startswith("MLA_API mla_status")
    }
    makers = {"mla_engine_open", "mla_sampler_create", "mla_cancellation_create"}
    assert declared == makers.union(*(calls_on(api, kind, None) for kind in KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_null_freed_and_foreign_handles_are_errors(api: Api, toy: Any, kind: str) -> None:
    engine = api.engine(toy.path, max_tokens=64)
    handles = {
        "engine": engine.handle,
        "session": engine.session().handle,
        "sampler": api.sampler(None, 263).handle,
        "cancellation": api.make("mla_cancellation_create"),
    }
    of_others = [handle for name, handle in handles.items() if name != kind]
    *_, (end, arguments) = calls_on(api, kind, handles[kind]).items()
    api.call(end, *arguments)
    never = [c_void_p(0xDEADBEEF), c_void_p(1), c_void_p(ctypes.addressof(ctypes.c_int(7)))]
    for bad in (None, handles[kind], *of_others, *never):
        for name, arguments in calls_on(api, kind, bad).items():
            assert status_of(api.call, name, *arguments) == "INVALID_HANDLE", (name, bad)


def test_a_handle_is_never_given_twice(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path, max_tokens=64)
    met = set()
    for _ in range(200):
        session = engine.session()
        assert session.handle.value not in met
        met.add(session.handle.value)
        session.destroy()


def test_sessions_outlive_their_engine_s_handle(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path, max_tokens=128)
    session = engine.session()
    session.prefill([1, 2])
    engine.close()
    np.testing.assert_array_equal(session.decode(3), toy.logits([1, 2, 3]))
    fork = session.fork()
    session.destroy()
    np.testing.assert_array_equal(fork.decode(4), toy.logits([1, 2, 3, 4]))
    fork.destroy()


def test_errors_are_of_the_thread_that_made_them(api: Api) -> None:
    assert status_of(api.call, "mla_session_rewind", None, c_size_t(0)) == "INVALID_HANDLE"
    before = api.raw.mla_last_error()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(api.raw.mla_last_error()))
    thread.start()
    thread.join()
    assert seen == [b"there was no error in this thread"]
    assert api.raw.mla_last_error() == before


# ---- structs


def struct_calls(api: Api, engine: Any, session: Any) -> dict[str, tuple[Any, Any]]:
    """A good struct of each kind, and a call that reads it."""
    ids = np.ones(1, dtype=np.int32)
    request = Request(sizeof(Request), session.handle, ids.ctypes.data, 1)
    options = EngineOptions(sizeof(EngineOptions), b"/nowhere", str(onnxruntime_library()).encode())
    generation = GenerationStruct(sizeof(GenerationStruct))
    generate = GenerateOptions(sizeof(GenerateOptions), max_tokens=1)

    def run(given: Any, result: Any) -> None:
        place = c_void_p(ids.ctypes.data)
        api.call("mla_generate", session.handle, place, c_size_t(1), given, result)

    return {
        "engine": (options, lambda s: api.make("mla_engine_open", s)),
        "engine info": (
            EngineInfo(sizeof(EngineInfo)),
            lambda s: api.call("mla_engine_get_info", engine.handle, s),
        ),
        "session info": (
            SessionInfo(sizeof(SessionInfo)),
            lambda s: api.call("mla_session_get_info", session.handle, s),
        ),
        "request": (request, lambda s: api.call("mla_step", engine.handle, s, c_size_t(1), None)),
        "sampling": (sampling(), lambda s: api.make("mla_sampler_create", s, 5)),
        "generate": (generate, lambda s: run(s, byref(generation))),
        "generation": (generation, lambda s: run(byref(generate), s)),
    }


@pytest.mark.parametrize(
    "name",
    ["engine", "engine info", "session info", "request", "sampling", "generate", "generation"],
)
def test_a_struct_says_its_size(api: Api, engine: Any, name: str) -> None:
    with engine_session(engine) as session:
        struct, call = struct_calls(api, engine, session)[name]
        for size in (0, 8, sizeof(struct) - 8, sizeof(struct) - 1, 1 << 20, 2**64 - 1):
            struct.struct_size = size
            assert status_of(call, byref(struct)) == "INVALID_ARGUMENT", size
        assert session.length == 0
        # a program with newer headers: more bytes, zero if it does not use them
        extra = 24
        struct.struct_size = sizeof(struct) + extra
        longer = ctypes.create_string_buffer(bytes(struct) + bytes(extra), sizeof(struct) + extra)
        longer[-1] = 1
        assert status_of(call, longer) == "INVALID_ARGUMENT"
        longer[-1] = 0
        if name == "engine":
            assert status_of(call, longer) == "BAD_BUNDLE"  # it got as far as to look for it
        else:
            call(longer)
            assert int.from_bytes(longer[:8], "little") == sizeof(struct) + extra


def test_requests_of_one_call_have_one_size(api: Api, engine: Any) -> None:
    ids = np.ones(1, dtype=np.int32)
    with engine_session(engine) as a, engine_session(engine) as b:
        both = (Request * 2)(*(
            Request(sizeof(Request), s.handle, ids.ctypes.data, 1) for s in (a, b)
        ))  # fmt: skip
        extended = [bytes(one) + bytes(16) for one in both]
        joined = ctypes.create_string_buffer(b"".join(extended), 2 * (sizeof(Request) + 16))
        for index in (0, 1):
            ctypes.c_size_t.from_buffer(joined, index * (sizeof(Request) + 16)).value += 16
        api.call("mla_step", engine.handle, joined, c_size_t(2), None)
        assert a.length == b.length == 1


# ---- arguments


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"bundle": None}, "INVALID_ARGUMENT"),
        ({"onnxruntime_library": None}, "INVALID_ARGUMENT"),
        ({"bundle": "/nowhere"}, "BAD_BUNDLE"),
        ({"bundle": ""}, "BAD_BUNDLE"),
        ({"onnxruntime_library": "/nowhere/libonnxruntime.so"}, "BAD_RUNTIME"),
        ({"onnxruntime_library": "libm.so.6"}, "BAD_RUNTIME"),
        ({"ops_library": "/nowhere/libmla_deploy_ops.so"}, "BAD_KERNELS"),
        ({"ops_library": "libm.so.6"}, "BAD_KERNELS"),
        ({"threads": 1 << 20}, "INVALID_ARGUMENT"),
        ({"prefill_chunk": 1 << 30}, "INVALID_ARGUMENT"),
        ({"max_tokens": 2**63}, "OUT_OF_MEMORY"),
        ({"max_tokens": 2**64 - 1}, "OUT_OF_MEMORY"),
        ({"max_tokens": 2**46}, "OUT_OF_MEMORY"),
    ],
)
def test_an_engine_that_cannot_be_opened_says_why(
    api: Api, toy: Any, change: dict[str, Any], status: str
) -> None:
    assert status_of(api.engine, **({"bundle": toy.path} | change)) == status


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1},
        {"repetition_penalty": 0.0}, {"repetition_penalty": float("nan")},
    ],
)  # fmt: skip
def test_choices_outside_their_range_are_errors(api: Api, engine: Any, bad: Any) -> None:
    assert status_of(api.sampler, sampling(**bad), 5) == "INVALID_ARGUMENT"
    with engine_session(engine) as session:
        assert status_of(session.generate, [1], **bad) == "INVALID_ARGUMENT"
        assert session.length == 0


def test_tokens_and_places_are_checked(api: Api, engine: Any) -> None:
    with engine_session(engine) as session:
        for ids in ([], [-1], [263], [1, 2**31 - 1]):
            assert status_of(session.prefill, ids) == "INVALID_ARGUMENT"
            assert status_of(session.generate, ids) == "INVALID_ARGUMENT"
        assert status_of(session.generate, [1], max_tokens=0) == "INVALID_ARGUMENT"
        assert status_of(session.rewind, 1) == "INVALID_ARGUMENT"
        ids = c_void_p(np.ones(1, dtype=np.int32).ctypes.data)
        small = c_void_p(np.zeros(262, dtype=np.float32).ctypes.data)
        for tokens, size in ((None, 1), (ids, 2**62)):
            arguments = (session.handle, tokens, c_size_t(size), small, c_size_t(262))
            assert status_of(api.call, "mla_session_prefill", *arguments) == "INVALID_ARGUMENT"
        assert status_of(engine.step, [(session, [1]), (session, [2])]) == "INVALID_ARGUMENT"
        assert status_of(engine.step, [(session, [1])], positions=[[1]]) == "INVALID_ARGUMENT"
        assert status_of(api.call, "mla_session_create", engine.handle, None) == "INVALID_ARGUMENT"
        assert session.length == 0
        assert engine.step([]) == []


def test_a_session_of_another_engine_is_refused(api: Api, engine: Any, toy: Any) -> None:
    other = api.engine(toy.path, max_tokens=64)
    with engine_session(other) as session:
        assert status_of(engine.step, [(session, [1])]) == "INVALID_ARGUMENT"

"""What goes wrong in the engine reaches Python as an MlaError, with all its fields."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mla_deploy.errors import BundleError, GraphError, OutputError, SessionError, UsageError
from mla_deploy.runtime import Cancellation, GenerationOptions, _runtime, load, native

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy


def ids(count: int, seed: int = 0) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(0, 256, count).tolist()
    return drawn


# ---- bundles ------------------------------------------------------------------------------------


def test_a_damaged_file_is_named(own_toy: Toy) -> None:
    path = own_toy.path / "model.onnx"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx is damaged") as caught:
        own_toy.load()
    assert caught.value.hint == "copy the bundle again, or export again"
    path.write_bytes(content[:-1])
    with pytest.raises(BundleError, match="not of the size") as caught:
        own_toy.load()
    assert (caught.value.found, caught.value.allowed) == (
        f"{len(content) - 1} bytes",
        f"{len(content)} bytes",
    )
    path.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        own_toy.load()


def test_a_large_file_is_hashed_on_demand(own_toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 64 MiB only the size is checked, unless `verify` is given."""
    large = own_toy.path / "large"
    with large.open("wb") as file:
        file.truncate((64 << 20) + 1)
    own_toy.seal()
    with large.open("r+b") as file:
        file.write(b"x")
    load(own_toy.path)
    with pytest.raises(BundleError, match="large is damaged"):
        load(own_toy.path, verify=True)


def test_a_bundle_of_another_version_is_refused(own_toy: Toy) -> None:
    path = own_toy.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(BundleError, match="another version") as caught:
        own_toy.load()
    assert (caught.value.found, caught.value.allowed) == ("2", "1")


def test_a_folder_whose_name_is_no_text_is_named_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"b\xff")
    with pytest.raises(BundleError, match="is not a bundle"):
        load(folder)


def test_a_graph_that_onnxruntime_cannot_load_names_the_version_it_is_for(own_toy: Toy) -> None:
    (own_toy.path / "model.onnx").write_bytes(b"no graph")
    own_toy.seal()
    for kernels in ("auto", "stock"):
        with pytest.raises(GraphError, match=r"onnxruntime .* cannot load") as caught:
            load(own_toy.path, kernels=kernels)
        assert "operators are those of test" in str(caught.value.hint)


def test_only_a_graph_that_does_not_load_is_tried_without_our_kernels(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []

    def refuse(error: Exception) -> Callable[..., None]:
        def engine(*, ops_library: bytes | None, **_: object) -> None:
            tried.append(ops_library)
            raise error

        return engine

    monkeypatch.setattr(_runtime, "Engine", refuse(BundleError("damaged")))
    with pytest.raises(BundleError, match="damaged"):
        load(toy.path)
    assert len(tried) == 1
    monkeypatch.setattr(_runtime, "Engine", refuse(GraphError("no such record")))
    with pytest.raises(GraphError, match="no such record"):
        load(toy.path)
    assert tried[1] is not None
    assert tried[2] is None


# ---- the installation ---------------------------------------------------------------------------


def test_an_installation_without_the_engine_says_so(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(_runtime, "Engine")
    for call in (lambda: load(toy.path), GenerationOptions, Cancellation):
        with pytest.raises(UsageError, match="cannot run bundles") as caught:
            call()
        assert "MLA_ENGINE" in str(caught.value)


def test_without_onnxruntime_load_says_what_to_install(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").touch()
    find = native.importlib.util.find_spec
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="onnxruntime is not installed") as caught:
        load(toy.path)
    assert "pip install onnxruntime" in str(caught.value.hint)
    monkeypatch.setattr(native.importlib.util, "find_spec", find)
    monkeypatch.setattr(
        "sys.modules", {k: v for k, v in os.sys.modules.items() if k != "onnxruntime"}
    )  # type: ignore[attr-defined]
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="has no shared library"):
        load(toy.path)
    library = package / "capi" / "libonnxruntime.so.1.99.0"
    library.parent.mkdir()
    library.write_bytes(b"no library")
    with pytest.raises(UsageError, match="cannot be used as onnxruntime"):
        load(toy.path)


@pytest.mark.parametrize("name", ["neon", "avx1024"])
@pytest.mark.parametrize("kernels", ["auto", "native"])
def test_an_instruction_set_that_is_not_to_be_had_is_an_error(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, name: str, kernels: str
) -> None:
    """Also for `auto`, which may choose its kernels, but not against what was asked for."""
    if name in _runtime.cpu_isas():
        pytest.skip(f"this CPU has {name}")
    monkeypatch.setenv("MLA_CPU_ISA", name)
    with pytest.raises(UsageError, match="MLA_CPU_ISA") as caught:
        load(toy.path, kernels=kernels)
    assert caught.value.found == name
    assert "portable" in str(caught.value.allowed)
    assert load(toy.path, kernels="stock").kernels.name == "stock"
    monkeypatch.setenv("MLA_CPU_ISA", "portable")
    load(toy.path, kernels=kernels)


# ---- sessions -----------------------------------------------------------------------------------


def test_a_full_cache_says_how_many_tokens_fit(toy: Toy) -> None:
    engine = toy.load(max_tokens=128)
    with engine.session() as session:
        session.prefill(ids(100))
        with pytest.raises(SessionError, match="the cache is full") as caught:
            engine.generate([*ids(100), *[1] * 40], session=session)
        assert caught.value.found == "40 new tokens"
        assert caught.value.allowed == "28 for this session"
        assert "max_tokens above 128" in str(caught.value.hint)
        np.testing.assert_array_equal(session.decode(1), toy.logits([*ids(100), 1]))


def test_a_saved_session_goes_on_as_it_would_have(toy: Toy, tmp_path: Path) -> None:
    prompt = ids(150)
    engine = toy.load()
    with engine.session() as session:
        session.prefill(prompt)
        session.save(tmp_path / "session")
        expected = [session.decode(token) for token in (1, 2, 3)]
    again = toy.load()  # as after the end of the process
    with again.load_session(str(tmp_path / "session")) as session:
        assert session.tokens == tuple(prompt)
        assert session.engine is again
        for token, logits in zip((1, 2, 3), expected, strict=True):
            np.testing.assert_array_equal(session.decode(token), logits)
        np.testing.assert_array_equal(expected[-1], toy.logits([*prompt, 1, 2, 3]))


def saved(toy: Toy, path: Path, count: int = 100) -> bytes:
    with toy.load().session() as session:
        session.prefill(ids(count))
        session.save(path)
    return path.read_bytes()


def test_a_session_file_that_is_not_what_it_should_be(
    toy: Toy, own_toy: Toy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("session") / "session"
    content = saved(toy, path)
    engine = toy.load()
    damaged = bytearray(content)
    damaged[200] ^= 1
    for changed, message in (
        (b"", "too short"),
        (b"x" * 100, "not a session file"),
        (content[:8] + b"\x02" + content[9:], "another version"),
        (content[:-1], "damaged"),
        (content + b"x", "damaged"),
        (bytes(damaged), "damaged"),
    ):
        path.write_bytes(changed)
        with pytest.raises(SessionError, match=message):
            engine.load_session(path)
        assert engine.free_tokens == engine.capacity_tokens
    path.write_bytes(content)
    (own_toy.path / "tokenizer_config.json").write_text("{}")
    own_toy.seal()
    with pytest.raises(SessionError, match="another model") as caught:
        own_toy.load().load_session(path)
    assert caught.value.hint == "load it into the bundle that it was saved from"
    with pytest.raises(SessionError, match="full") as caught:
        toy.load(max_tokens=64).load_session(path)
    assert caught.value.allowed == "64 for this session"


def test_a_session_file_that_cannot_be_read_or_written(toy: Toy, tmp_path: Path) -> None:
    engine = toy.load()
    with pytest.raises(SessionError, match="cannot be read") as caught:
        engine.load_session(tmp_path / "nothing")
    assert caught.value.found == "No such file or directory"
    with pytest.raises(UsageError, match="zero byte"):
        engine.load_session("a\0b")
    with engine.session() as session:
        session.prefill([1])
        with pytest.raises(OutputError, match="cannot be written"):
            session.save(tmp_path / "no" / "folder")
        session.save(tmp_path / os.fsdecode(b"s\xff"))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_session_is_busy_while_another_thread_generates_on_it(toy: Toy) -> None:
    engine = toy.load(prefill_chunk=1)
    cancellation = Cancellation()
    with engine.session() as session:
        thread = threading.Thread(
            target=lambda: engine.generate([3] * 990, session=session, cancellation=cancellation)
        )
        thread.start()
        while session.length == 0:
            pass
        fork = session.fork()
        with pytest.raises(SessionError, match="under way"):
            session.rewind(0)
        cancellation.request()
        thread.join()
        held = session.tokens
        np.testing.assert_array_equal(session.decode(1), toy.logits([*held, 1]))
        held = fork.tokens
        np.testing.assert_array_equal(fork.decode(1), toy.logits([*held, 1]))
        fork.close()


def test_copies_of_pages_need_a_whole_page_and_room(toy: Toy) -> None:
    engine = toy.load(max_tokens=256)
    with engine.session() as session:
        session.prefill(ids(63))
        with pytest.raises(SessionError, match="no whole page"):
            session.fill_by_copies(100)
        session.decode(7)
        with pytest.raises(SessionError, match="full") as caught:
            session.fill_by_copies(257)
        assert caught.value.allowed == "192 for this session"
        with pytest.raises(SessionError, match="context"):
            session.fill_by_copies(1001)
        assert session.length == 64
        session.fill_by_copies(200)
        held = [*ids(63), 7]
        assert session.tokens == (*held, *held, *held, *held[:8])
        session.fill_by_copies(100)  # it is longer already
        assert session.length == 200

"""Session files: what was saved goes on bit for bit, and nothing else is taken for it."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp.core_abi import AbiError, Api, load_api
from cpp.cuda_double import CudaApi

HEADER = 64


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def api(request: pytest.FixtureRequest) -> Api:
    """With the cache in memory of the host, and on the GPU of `cuda_double`."""
    api = load_api()
    return api if request.param == "cpu" else CudaApi(api.path)


@pytest.fixture(scope="module")
def engine(api: Api, toy: Any) -> Any:
    return api.engine(toy.path, max_tokens=64 * 8)


def random_ids(count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(2).integers(0, 256, count).tolist()
    return ids


def saved(engine: Any, path: Path, ids: list[int]) -> bytes:
    session = engine.session()
    if ids:
        session.prefill(ids)
    session.save(path)
    session.destroy()
    return path.read_bytes()


def resealed(content: bytes) -> bytes:
    """With the checksum that fits: what a forger would write."""
    return content[:-32] + hashlib.sha256(content[:-32]).digest()


def expect(engine: Any, path: Path, content: bytes, status: str) -> str:
    path.write_bytes(content)
    free = engine.info.free_tokens
    with pytest.raises(AbiError) as caught:
        engine.load(path)
    assert caught.value.status == status, caught.value
    assert engine.info.free_tokens == free
    return caught.value.text


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_a_loaded_session_goes_on_as_the_saved_one(
    api: Api, toy: Any, engine: Any, tmp_path: Path, length: int
) -> None:
    ids = random_ids(length)
    content = saved(engine, tmp_path / "session", ids)
    pages = -(-length // 64)
    page_bytes = 64 * engine.info.bytes_per_token
    assert len(content) == HEADER + 4 * length + pages * page_bytes + 32
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]
    for other in (engine, api.engine(toy.path)):  # another engine, and so another process
        session = other.load(tmp_path / "session")
        assert session.tokens == ids
        np.testing.assert_array_equal(session.decode(9), toy.logits([*ids, 9]))
        session.destroy()
    assert [path.name for path in tmp_path.iterdir()] == ["session"]
    assert stat.S_IMODE((tmp_path / "session").stat().st_mode) == 0o600


def test_every_truncation_is_refused(engine: Any, tmp_path: Path) -> None:
    content = saved(engine, tmp_path / "session", random_ids(70))
    for size in [*range(200), *range(200, len(content), 97), len(content) - 1]:
        expect(engine, tmp_path / "cut", content[:size], "BAD_SESSION_FILE")
    expect(engine, tmp_path / "cut", content + b"\0", "BAD_SESSION_FILE")


def test_every_flipped_bit_is_found(engine: Any, tmp_path: Path) -> None:
    content = saved(engine, tmp_path / "session", random_ids(70))
    spread = np.random.default_rng(3).integers(0, 8 * len(content), 300).tolist()
    for bit in [*range(8 * HEADER), *spread, 8 * len(content) - 1]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        expect(engine, tmp_path / "flipped", bytes(flipped), "BAD_SESSION_FILE")


def test_random_bytes_are_refused(engine: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    for size in (0, 1, 63, 64, 96, 5000):
        expect(engine, tmp_path / "noise", random.bytes(size), "BAD_SESSION_FILE")
    content = saved(engine, tmp_path / "session", random_ids(3))
    for size in (32, 64, 5000):  # behind a good header
        expect(engine, tmp_path / "noise", content[:64] + random.bytes(size), "BAD_SESSION_FILE")


@pytest.mark.parametrize("count", [0, 71, 128, 2**31, 2**58, 2**62, 2**64 - 1])
def test_a_forged_length_allocates_nothing(engine: Any, tmp_path: Path, count: int) -> None:
    content = saved(engine, tmp_path / "session", random_ids(70))
    forged = content[:56] + count.to_bytes(8, "little") + content[64:]
    expect(engine, tmp_path / "forged", resealed(forged), "BAD_SESSION_FILE")


def test_forged_tokens_are_no_tokens(engine: Any, tmp_path: Path) -> None:
    content = saved(engine, tmp_path / "session", random_ids(70))
    for token in (263, -1):
        forged = content[:64] + token.to_bytes(4, "little", signed=True) + content[68:]
        expect(engine, tmp_path / "forged", resealed(forged), "BAD_SESSION_FILE")


def test_another_version_says_so(engine: Any, tmp_path: Path) -> None:
    content = saved(engine, tmp_path / "session", [1])
    forged = content[:8] + (2).to_bytes(4, "little") + content[12:]
    text = expect(engine, tmp_path / "forged", resealed(forged), "BAD_SESSION_FILE")
    assert "another version" in text


def test_a_session_of_another_model_is_refused(
    api: Api, engine: Any, own_toy: Any, tmp_path: Path
) -> None:
    """Another file of the same sizes is another model."""
    saved(engine, tmp_path / "session", [1, 2])
    graph = own_toy.path / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content.replace(b"flat_rows", b"rows_flat"))
    assert graph.read_bytes() != content
    own_toy.seal()
    other = api.engine(own_toy.path)
    text = expect(other, tmp_path / "copy", (tmp_path / "session").read_bytes(), "BAD_SESSION_FILE")
    assert "another model" in text


def test_a_file_too_large_for_the_cache_says_so(
    api: Api, toy: Any, engine: Any, tmp_path: Path
) -> None:
    content = saved(engine, tmp_path / "session", random_ids(200))
    small = api.engine(toy.path, max_tokens=128)
    text = expect(small, tmp_path / "session", content, "CACHE_FULL")
    assert "200 new tokens" in text
    assert "128 for this session" in text


def test_a_page_of_a_refused_file_reaches_nobody(
    api: Api, toy: Any, engine: Any, tmp_path: Path
) -> None:
    content = bytearray(saved(engine, tmp_path / "session", random_ids(64)))
    content[HEADER + 4 * 64 : -32] = b"\x7f" * len(content[HEADER + 4 * 64 : -32])
    one_page = api.engine(toy.path, max_tokens=64)
    expect(one_page, tmp_path / "session", bytes(content), "BAD_SESSION_FILE")
    session = one_page.session()
    np.testing.assert_array_equal(session.prefill([1, 2]), toy.logits([1, 2]))
    session.save(tmp_path / "after")
    assert b"\x7f" * 8 not in (tmp_path / "after").read_bytes()


def test_files_that_cannot_be_read_or_written(engine: Any, tmp_path: Path) -> None:
    session = engine.session()
    session.prefill([1, 2])
    for path in (tmp_path / "missing", tmp_path, Path("/dev/null")):
        with pytest.raises(AbiError, match="FILE_ERROR"):
            engine.load(path)
    for path in (tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(AbiError, match="FILE_ERROR"):
            session.save(path)
    assert not os.listdir(tmp_path)
    assert session.tokens == [1, 2]
    session.destroy()


def test_a_failed_save_keeps_the_file_that_was_there(engine: Any, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    content = saved(engine, tmp_path / "session", [1, 2])
    session = engine.session()
    session.prefill(random_ids(200))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content), before[1]))  # a full disk
    try:
        with pytest.raises(AbiError, match="FILE_ERROR"):
            session.save(tmp_path / "session")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "session").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["session"]
    session.destroy()

"""The engine, its sessions and its cache, held against the toy model of conftest.py."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from mla_deploy.errors import BundleError, MlaError, SessionError, TokenizerError, UsageError
from mla_deploy.runtime import Cancellation, Engine, GenerationOptions, Session, load

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy


def random_ids(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 256, count).tolist()
    return ids


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 300])
def test_prefill_gives_the_logits_after_every_token(
    toy: Toy, toy_engine: Engine, length: int
) -> None:
    ids = random_ids(length)
    with toy_engine.session() as session:
        logits = session.prefill(ids, all_logits=True)
        assert session.length == length
        assert session.tokens == tuple(ids)
    assert logits.shape == (length, 263)
    for at, row in enumerate(logits):
        np.testing.assert_array_equal(row, toy.logits(ids[: at + 1]), f"after token {at}")


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 512])
def test_a_prompt_gives_the_same_however_it_is_cut(toy: Toy, chunk: int) -> None:
    ids = random_ids(200)
    with toy.load(prefill_chunk=chunk).session() as session:
        logits = session.prefill(ids, all_logits=True)
    for at, row in enumerate(logits):
        np.testing.assert_array_equal(row, toy.logits(ids[: at + 1]), f"after token {at}")


def test_no_more_tokens_than_a_chunk_go_through_the_graph_at_once(own_toy: Toy) -> None:
    own_toy.fail_above(100, "Size (input_ids)")
    ids = [random_ids(n) for n in (150, 90, 10)]
    engine = own_toy.load(prefill_chunk=100)
    logits = engine.step([(engine.session(), row) for row in ids])
    for row, found in zip(ids, logits, strict=True):
        np.testing.assert_array_equal(found, own_toy.logits(row))
    engine = own_toy.load(prefill_chunk=101)
    with pytest.raises(SessionError, match="cannot run the graph"):
        engine.session().prefill(ids[0])


def test_decoding_continues_over_page_edges(toy: Toy, toy_engine: Engine) -> None:
    ids = random_ids(50)
    with toy_engine.session() as session:
        session.prefill(ids)
        for token in random_ids(150, seed=1):
            ids.append(token)
            np.testing.assert_array_equal(session.decode(token), toy.logits(ids))


def test_sessions_of_different_lengths_share_a_step(toy: Toy, toy_engine: Engine) -> None:
    pasts, news = (0, 64, 100, 3, 191), (5, 1, 64, 130, 1)
    sessions = [toy_engine.session() for _ in pasts]
    held = [random_ids(past, seed=index) for index, past in enumerate(pasts)]
    for session, ids in zip(sessions, held, strict=True):
        if ids:
            session.prefill(ids)
    added = [random_ids(new, seed=100 + index) for index, new in enumerate(news)]
    requests = list(zip(sessions, added, strict=True))
    for old, new, logits in zip(held, added, toy_engine.step(requests), strict=True):
        np.testing.assert_array_equal(logits, toy.logits(old + new))
    # and again, so that what the padded tokens wrote would show
    for old, new, logits in zip(
        held, added, toy_engine.step([(s, [7]) for s in sessions]), strict=True
    ):
        np.testing.assert_array_equal(logits, toy.logits([*old, *new, 7]))
    for session in sessions:
        session.close()


def test_logits_come_for_the_positions_asked_for(toy: Toy) -> None:
    engine = toy.load(prefill_chunk=16)
    ids = [random_ids(40), random_ids(9, seed=1), random_ids(3, seed=2)]
    wanted = [[0, 39, 17], [], [2, 2]]
    with engine.session() as a, engine.session() as b, engine.session() as c:
        results = engine.step(list(zip((a, b, c), ids, strict=True)), positions=wanted)
    for row, at, logits in zip(ids, wanted, results, strict=True):
        assert logits.shape == (len(at), 263)
        for position, line in zip(at, logits, strict=True):
            np.testing.assert_array_equal(line, toy.logits(row[: position + 1]))


def test_a_rewound_session_goes_on_as_if_the_rest_had_not_been(
    toy: Toy, toy_engine: Engine
) -> None:
    ids = random_ids(150)
    with toy_engine.session() as session:
        for keep in (149, 128, 100, 64, 1, 0):
            session.prefill(ids[session.length :] or [0])
            session.rewind(keep)
            assert session.tokens == tuple(ids[:keep])
            logits = session.decode(9)
            np.testing.assert_array_equal(logits, toy.logits([*ids[:keep], 9]))
            session.rewind(keep)


def test_a_fork_shares_the_past_and_nothing_after(toy: Toy) -> None:
    engine = toy.load(max_tokens=64 * 10)
    ids = random_ids(100)
    with engine.session() as session:
        session.prefill(ids)
        forks = [session.fork() for _ in range(5)]
        assert engine.free_tokens == 64 * 8, "forks take no page by themselves"
        sessions = [session, *forks]
        for index, logits in enumerate(engine.step([(s, [i]) for i, s in enumerate(sessions)])):
            np.testing.assert_array_equal(logits, toy.logits([*ids, index]))
        assert engine.free_tokens == 64 * 3, "the full page is still shared"
        for index, one in enumerate(sessions):
            np.testing.assert_array_equal(one.decode(5), toy.logits([*ids, index, 5]))
        for one in forks:
            one.close()
        np.testing.assert_array_equal(session.decode(6), toy.logits([*ids, 0, 5, 6]))
    assert engine.free_tokens == engine.capacity_tokens


def last_page(session: Session, path: Path) -> tuple[list[float], list[list[int]]]:
    """The parts of the session's last page: `token` and `code` of conftest.py."""
    session.save(path)
    page = path.read_bytes()[-32 - 64 * 6 : -32]
    return (
        np.frombuffer(page[: 64 * 4], np.float32).tolist(),
        np.frombuffer(page[64 * 4 :], np.uint8).reshape(2, 64).tolist(),
    )


def test_the_graph_writes_into_the_arrays_it_reads(toy: Toy, tmp_path: Path) -> None:
    engine = toy.load()
    with engine.session() as session:
        session.prefill([11, 12, 13])
        token, code = last_page(session, tmp_path / "session")
        assert token == [11, 12, 13] + [0] * 61
        assert code == [[11, 12, 13] + [0] * 61, [0, 1, 2] + [0] * 61]
    content = bytearray((tmp_path / "session").read_bytes())
    first = 64 + 4 * 3  # after the header and the tokens
    content[first : first + 4] = np.float32(12).tobytes()  # and reads what stands there
    content[-32:] = hashlib.sha256(content[:-32]).digest()
    (tmp_path / "session").write_bytes(content)
    with engine.load_session(tmp_path / "session") as session:
        h, g = 12 + 2 * 12 + 3 * 13 + 4 * 1, 11 + 12 + 13 + 1
        v = np.arange(263)
        np.testing.assert_array_equal(session.decode(1), -((v - h) % 263) / 4 - ((v - g) % 263) / 8)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_no_step_copies_the_cache(toy: Toy) -> None:
    """A copy would read all of a 400 MB arena that is not backed by memory yet."""
    engine = toy.load(max_tokens=64 << 20)
    assert engine.capacity_tokens * engine.kv_bytes_per_token > 380 << 20
    with engine.session() as session:
        session.prefill(random_ids(600))
        before = resident_bytes()
        for _ in range(70):
            session.decode(1)
        assert resident_bytes() - before < 8 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_bytes_per_token_are_those_of_the_arrays(toy_engine: Engine) -> None:
    assert toy_engine.kv_bytes_per_token == 4 + 2
    assert toy_engine.kv_bytes_per_token == toy_engine.bundle.kv_bytes_per_token
    with toy_engine.session() as session:
        assert session.cache_bytes == 0
        session.prefill(random_ids(65))
        assert session.cache_bytes == 2 * 64 * 6


def test_a_full_cache_says_what_fits_and_changes_nothing(toy: Toy) -> None:
    engine = toy.load(max_tokens=256)
    ids = random_ids(100)
    with engine.session() as other, engine.session() as session:
        other.prefill(random_ids(60))
        session.prefill(ids)
        assert session.room == 92
        with pytest.raises(SessionError, match="full") as caught:
            session.prefill(random_ids(93))
        assert caught.value.allowed == "92 for this session"
        assert session.tokens == tuple(ids)
        assert session.room == 92
        with pytest.raises(SessionError, match="full"):
            engine.step([(other, random_ids(30)), (session, random_ids(80))])
        assert (other.length, session.length, session.room) == (60, 100, 92)
        more = random_ids(92, seed=1)
        np.testing.assert_array_equal(session.prefill(more), toy.logits(ids + more))
        assert session.room == 0


def test_a_fork_that_cannot_be_copied_is_full(toy: Toy) -> None:
    engine = toy.load(max_tokens=64)
    with engine.session() as session:
        session.prefill([1, 2, 3])
        fork = session.fork()
        assert session.room == 0
        with pytest.raises(SessionError, match="full"):
            session.decode(4)
        fork.close()
        assert session.room == 61
        np.testing.assert_array_equal(session.decode(4), toy.logits([1, 2, 3, 4]))


def test_room_leaves_a_page_for_the_copy_of_a_shared_one(toy: Toy) -> None:
    engine = toy.load(max_tokens=128)
    with engine.session() as session:
        session.prefill([1, 2, 3])
        fork = session.fork()
        assert session.room == 61
        with pytest.raises(SessionError, match="full"):
            session.prefill([1] * 62)
        session.prefill([1] * 61)
        fork.close()


def test_a_refused_step_leaves_shared_pages_shared(toy: Toy) -> None:
    engine = toy.load(max_tokens=64 * 3)
    with engine.session() as session, engine.session() as other:
        session.prefill([1, 2, 3])
        fork = session.fork()
        assert engine.free_tokens == 64 * 2
        with pytest.raises(SessionError, match="full"):  # one page for the copy, one and one more
            engine.step([(fork, [4] * 62), (other, [5])])
        with pytest.raises(SessionError, match="full"):
            fork.prefill([4] * (61 + 64 + 1))
        assert engine.free_tokens == 64 * 2
        engine.step([(fork, [4]), (session, [5])])  # two users of a page need one copy
        assert engine.free_tokens == 64
        engine.step([(other, [5])])
        np.testing.assert_array_equal(session.decode(6), toy.logits([1, 2, 3, 5, 6]))
        np.testing.assert_array_equal(fork.decode(6), toy.logits([1, 2, 3, 4, 6]))
        fork.close()


def test_the_models_context_is_a_limit(toy: Toy) -> None:
    engine = toy.load(max_tokens=5000)
    with engine.session() as session:
        ids = random_ids(1000)
        with pytest.raises(SessionError, match="context") as caught:
            session.prefill([*ids, 1])
        assert caught.value.allowed == "1000 together"
        np.testing.assert_array_equal(session.prefill(ids), toy.logits(ids))
        with pytest.raises(SessionError, match="context"):
            session.decode(1)
        assert session.room == 0
        session.rewind(999)
        np.testing.assert_array_equal(session.decode(1), toy.logits([*ids[:999], 1]))


@pytest.mark.parametrize(
    "ids", [[], [-1], [263], [1, 2, 10**30], [0.5], [[1, 2]], [[1], [2, 3]], ["a"], "abc", [None]]
)
def test_what_is_no_token_is_refused(toy: Toy, toy_engine: Engine, ids: Sequence[int]) -> None:
    with toy_engine.session() as session:
        session.prefill([1, 2])
        with pytest.raises(UsageError, match="token"):
            session.prefill(ids)
        np.testing.assert_array_equal(session.decode(3), toy.logits([1, 2, 3]))


def test_misuse_of_a_step_is_refused(toy: Toy, toy_engine: Engine) -> None:
    with toy_engine.session() as session, toy.load().session() as stranger:
        with pytest.raises(UsageError, match="once"):
            toy_engine.step([(session, [1]), (session, [2])])
        with pytest.raises(UsageError, match="engine"):
            toy_engine.step([(stranger, [1])])
        with pytest.raises(UsageError, match="position"):
            toy_engine.step([(session, [1, 2])], positions=[[2]])
        with pytest.raises(UsageError, match="positions"):
            toy_engine.step([(session, [1, 2])], positions=[])
        with pytest.raises(UsageError, match="exclude"):
            toy_engine.step([(session, [1, 2])], positions=[[0]], all_logits=True)
        with pytest.raises(SessionError, match="rewound"):
            session.rewind(1)
        with pytest.raises(SessionError, match="rewound"):
            session.rewind(-1)
        assert session.length == 0
        assert toy_engine.step([]) == []


def test_a_closed_session_is_refused(toy_engine: Engine) -> None:
    session = toy_engine.session()
    session.prefill([1])
    session.close()
    session.close()
    for call in (
        lambda: session.decode(1),
        lambda: session.rewind(0),
        session.fork,
        lambda: toy_engine.stream([1], session=session),
    ):
        with pytest.raises(SessionError, match="closed"):
            call()


def test_a_step_that_fails_half_way_leaves_the_sessions_as_they_were(own_toy: Toy) -> None:
    own_toy.fail_above(150, "ReduceMax <keepdims = 0> (past_lengths)")
    engine = own_toy.load(prefill_chunk=64)
    ids = random_ids(30)
    with engine.session() as session, engine.session() as other:
        session.prefill(ids)
        room, free = session.room, engine.free_tokens
        with pytest.raises(SessionError, match="cannot run the graph"):
            session.prefill(random_ids(300, seed=1))  # in the third chunk
        with pytest.raises(SessionError, match="cannot run the graph"):
            engine.step([(other, [1, 2]), (session, random_ids(300, seed=1))])
        assert session.tokens == tuple(ids)
        assert (session.room, other.length, engine.free_tokens) == (room, 0, free)
        np.testing.assert_array_equal(session.decode(3), own_toy.logits([*ids, 3]))
        np.testing.assert_array_equal(other.decode(3), own_toy.logits([3]))


@pytest.mark.parametrize("generating", [False, True])
def test_ctrl_c_ends_a_long_prompt(toy: Toy, generating: bool) -> None:
    engine = toy.load(prefill_chunk=1)

    def work() -> None:
        for _ in range(100):  # one takes tenths of a second
            if generating:
                engine.generate([5] * 999, GenerationOptions(max_tokens=1), session=session)
            else:
                session.prefill([5] * 998)
            session.rewind(1)

    # Where tests run in the background, a shell may have had the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with engine.session() as session:
        session.prefill([5])
        interrupt = threading.Timer(0.03, signal.raise_signal, (signal.SIGINT,))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            work()
        interrupt.join()
        signal.signal(signal.SIGINT, before)
        session.rewind(1)
        np.testing.assert_array_equal(session.decode(3), toy.logits([5, 3]))


def test_another_thread_cancels_a_step(toy: Toy) -> None:
    engine = toy.load(prefill_chunk=1)
    with engine.session() as session:
        session.prefill([5])
        cancellation = Cancellation()
        assert not cancellation.requested
        threading.Timer(0.01, cancellation.request).start()
        with pytest.raises(SessionError, match="cancelled"):
            session.prefill([5] * 999, cancellation=cancellation)
        assert cancellation.requested
        assert session.tokens == (5,)
        with pytest.raises(SessionError, match="cancelled"):  # it stays requested
            engine.step([(session, [1])], cancellation=cancellation)
        np.testing.assert_array_equal(session.decode(3), toy.logits([5, 3]))


def test_pages_of_a_forgotten_session_come_back(toy: Toy) -> None:
    engine = toy.load(max_tokens=128)
    session = engine.session()
    session.prefill(random_ids(128))
    fork = session.fork()
    del session
    gc.collect()
    assert engine.free_tokens == 0, "the fork still uses them"
    del fork
    gc.collect()
    assert engine.free_tokens == 128


def test_what_a_session_leaves_does_not_reach_the_next(toy: Toy, tmp_path: Path) -> None:
    engine = toy.load(max_tokens=64)
    with engine.session() as session:
        session.prefill([7] * 64)
    with engine.session() as session:
        session.prefill([1])
        assert last_page(session, tmp_path / "session")[0] == [1.0] + [0.0] * 63


def test_sessions_work_from_several_threads(toy: Toy) -> None:
    engine = toy.load(max_tokens=64 * 40)
    failures: list[str] = []

    def work(seed: int) -> None:
        ids = random_ids(70, seed)
        with engine.session() as session:
            logits = session.prefill(ids)
            for _ in range(60):
                if not np.array_equal(logits, toy.logits(ids)):
                    failures.append(f"seed {seed} after {len(ids)} tokens")
                ids.append(int(logits.argmax()))
                fork = session.fork()
                logits = session.decode(ids[-1])
                fork.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert engine.free_tokens == engine.capacity_tokens


@pytest.mark.parametrize(
    ("option", "value"),
    [("threads", 0), ("max_tokens", 0), ("max_tokens", -5), ("prefill_chunk", 0), ("threads", "2")],
)
def test_bad_load_options_are_refused(toy: Toy, option: str, value: int) -> None:
    with pytest.raises(UsageError, match=option):
        toy.load(**{option: value})


@pytest.mark.parametrize("tokens", [1 << 50, 1 << 62, 1 << 80])
def test_a_cache_larger_than_memory_is_refused(toy: Toy, tokens: int) -> None:
    with pytest.raises(UsageError, match="memory"):
        toy.load(max_tokens=tokens)


def test_a_graph_that_is_not_the_manifests_is_refused(own_toy: Toy) -> None:
    model = onnx.load(own_toy.path / "model.onnx")
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    renamed.graph.input[5].name = "cache.0.other"
    for node in renamed.graph.node:
        node.input[:] = ["cache.0.other" if n == "cache.0.token" else n for n in node.input]
    onnx.save(renamed, own_toy.path / "model.onnx")
    own_toy.seal()
    with pytest.raises(BundleError, match="input cache"):
        own_toy.load()

    onnx.save(model, own_toy.path / "model.onnx")
    own_toy.seal()
    text = (own_toy.path / "manifest.json").read_text()
    for old, new, message in (
        ('"vocab_size": 263', '"vocab_size": 264', "logits"),
        ('"dtype": "float32"', '"dtype": "float16"', "cache.0.token"),
        ('"name": "code"', '"name": "codes"', "code"),
    ):
        assert old in text
        (own_toy.path / "manifest.json").write_text(text.replace(old, new))
        with pytest.raises(BundleError, match=message):
            own_toy.load()


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x0a" * 1000])
def test_a_broken_graph_is_refused(own_toy: Toy, content: bytes) -> None:
    (own_toy.path / "model.onnx").write_bytes(content)
    own_toy.seal()
    with pytest.raises(BundleError, match=r"cannot load .*model\.onnx"):
        own_toy.load()


def move_outside(toy: Toy, location: str) -> None:
    """Let the graph read its constant 7 from a file."""
    model = onnx.load(toy.path / "model.onnx", load_external_data=False)
    seven = next(item for item in model.graph.initializer if item.name == "seven")
    seven.ClearField("int64_data")
    seven.ClearField("raw_data")
    seven.ClearField("external_data")
    seven.data_location = onnx.TensorProto.EXTERNAL
    seven.external_data.add(key="location", value=location)
    seven.external_data.add(key="length", value="8")
    (toy.path / "model.onnx").write_bytes(model.SerializeToString())
    toy.seal()


def test_external_data_outside_the_bundle_is_refused(
    own_toy: Toy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = (7).to_bytes(8, "little")
    (own_toy.path / "model.onnx.data").write_bytes(content)
    move_outside(own_toy, "model.onnx.data")
    assert own_toy.load().generate([1]).tokens[0] == own_toy.greedy([1], 1)[0]

    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret"
    elsewhere.write_bytes(content)
    relative = os.path.relpath(elsewhere, own_toy.path)
    for location in (str(elsewhere), relative):
        move_outside(own_toy, location)
        with pytest.raises(BundleError, match="cannot load"):
            own_toy.load()

    move_outside(own_toy, "link")  # the manifest does not know the link
    (own_toy.path / "link").symlink_to(elsewhere)
    with pytest.raises(BundleError, match="cannot load"):
        own_toy.load()


def test_a_bundle_without_tokenizer_takes_ids(own_toy: Toy) -> None:
    (own_toy.path / "tokenizer.json").unlink()
    own_toy.seal()
    engine = own_toy.load()
    result = engine.generate([1, 2, 3])
    assert result.tokens == tuple(own_toy.greedy([1, 2, 3], len(result.tokens)))
    assert result.text == ""
    with pytest.raises(TokenizerError, match="no tokenizer"):
        engine.generate("text")


def test_errors_are_for_users(tmp_path: Path) -> None:
    with pytest.raises(MlaError, match="is not a bundle"):
        load(tmp_path / "nothing")


def test_the_runtime_needs_neither_torch_nor_onnx(toy: Toy) -> None:
    program = (
        "import sys\n"
        "from mla_deploy.runtime import load\n"
        "load(sys.argv[1]).generate('Hello')\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(toy.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

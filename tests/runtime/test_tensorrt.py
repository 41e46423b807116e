"""The TensorRT runner on a stand-in for the GPU: buffers, chunks, sessions, text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.gpu import engine_target
from support.host_engine import HostDevice, HostExecution, host_graph

from mla_deploy.bundle import Bundle
from mla_deploy.errors import BundleError, SessionError, UsageError
from mla_deploy.exporters.tensorrt.export import TensorRtOptions, export_tensorrt
from mla_deploy.gpu import gpu_target
from mla_deploy.model import load_model
from mla_deploy.runtime import Cancellation, GenerationOptions, load
from mla_deploy.runtime.tensorrt import TensorRtEngine
from mla_deploy.runtime.tensorrt_rows import RowCache

PROMPT = "The lighthouse keeper"


@pytest.fixture(scope="module")
def bundle(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, in float32."""
    out = tmp_path_factory.mktemp("tensorrt") / "bundle"
    options = TensorRtOptions(onnx_only=True, dtype="fp32", max_tokens=256, prefill_chunk=32)
    return export_tensorrt(tiny_mla, out, options).bundle


@pytest.fixture
def engine(bundle: Path) -> TensorRtEngine:
    return TensorRtEngine(Bundle.open(bundle), host_graph(bundle))


def host(engine: TensorRtEngine) -> tuple[HostDevice, HostExecution]:
    graph = engine._graph
    assert isinstance(graph._device, HostDevice)
    assert isinstance(graph._execution, HostExecution)
    return graph._device, graph._execution


@torch.no_grad()
def greedy(source: Path, ids: list[int], count: int) -> list[int]:
    """The reference's likeliest tokens."""
    from mla_deploy.checkpoint import Checkpoint
    from mla_deploy.model import forward_window

    model, config = load_model(source), Checkpoint(source).config
    made = list(ids)
    for _ in range(count):
        made.append(int(forward_window(model, config, torch.tensor([made]))[0, -1].argmax()))
    return made[len(ids) :]


def test_text_is_what_the_reference_says(engine: TensorRtEngine, tiny_mla: Path) -> None:
    made = engine.generate(PROMPT, GenerationOptions(max_tokens=12))
    assert list(made.tokens) == greedy(tiny_mla, engine.tokenizer.encode(PROMPT), 12)
    assert made.finish_reason == "length"
    assert made.text
    assert made.statistics.generated_tokens == 12


def test_logits_do_not_depend_on_chunks(engine: TensorRtEngine) -> None:
    ids = torch.randint(4096, (90,)).tolist()
    with engine.session() as session:
        whole = session.prefill(ids, all_logits=True)
        assert whole.shape == (90, 4096)
        session.rewind(10)
        again = session.prefill(ids[10:11])
        np.testing.assert_allclose(again, whole[10], atol=1e-3)
        (some,) = engine.step([(session, ids[11:])], positions=[[0, 78, 40]])
        np.testing.assert_allclose(some, whole[[11, 89, 51]], atol=1e-3)
    _, execution = host(engine)
    steps = [shapes["input_ids"][1] for shapes in execution.log]
    assert max(steps) <= 32
    assert 1 in steps
    rows = {shapes["cache.0.c_kv"][1] for shapes in execution.log}
    assert rows == {64, 128}  # whole pages, no more than are needed


def test_a_step_copies_new_rows_once_a_part(engine: TensorRtEngine) -> None:
    device, _ = host(engine)
    with engine.session() as session:
        session.prefill([5, 6, 7])
        before = device.copies
        session.decode(8)
    assert device.copies - before == 2  # c_kv and k_pe, of all layers together


def test_what_lies_behind_the_tokens_is_not_seen(engine: TensorRtEngine) -> None:
    """Rows of a rewound session stay in memory."""
    with engine.session() as session:
        session.prefill(list(range(100, 160)))
        session.rewind(0)
        dirty = session.prefill([5, 6, 7])
    fresh = TensorRtEngine(engine.bundle, host_graph(engine.bundle.path))
    with fresh.session() as session:
        np.testing.assert_array_equal(dirty, session.prefill([5, 6, 7]))


def test_sessions_and_their_limits(engine: TensorRtEngine) -> None:
    session = engine.session()
    with pytest.raises(SessionError, match="one session at a time"):
        engine.session()
    assert session.room == engine.capacity_tokens == 256
    session.prefill([5, 6, 7])
    assert session.cache_bytes == 3 * engine.kv_bytes_per_token == 3 * 2560
    assert session.rewind_to_prefix([5, 6, 9]) == 2
    session.fill_by_copies(200)
    assert session.tokens[:4] == (5, 6, 5, 6)
    assert session.length == 200
    with pytest.raises(SessionError, match="full"):
        session.prefill([1] * 57)
    assert session.length == 200
    for wrong, message in (
        ([], "no tokens"),
        ([[1]], "flat list"),
        ([4096], "vocabulary"),
        ([-1], "vocabulary"),
    ):
        with pytest.raises(UsageError, match=message):
            session.prefill(wrong)
    with pytest.raises(UsageError, match="twice"):
        engine.step([(session, [1]), (session, [1])])
    with pytest.raises(SessionError, match="with --plugin"):
        session.fork()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.decode(1)
    engine.session().close()


def test_what_is_cancelled_has_changed_nothing(engine: TensorRtEngine) -> None:
    _, execution = host(engine)
    with engine.session() as session:
        session.prefill([5, 6, 7])
        expected = session.decode(8)
        session.rewind(3)
        cancellation = Cancellation()
        run = execution.run

        def cancel_after_one() -> None:
            run()
            cancellation.request()

        execution.run = cancel_after_one  # type: ignore[method-assign]
        with pytest.raises(SessionError, match="cancelled"):
            session.prefill(list(range(100, 180)), cancellation=cancellation)
        del execution.run
        assert session.tokens == (5, 6, 7)
        np.testing.assert_array_equal(session.decode(8), expected)
    made = engine.generate(PROMPT, GenerationOptions(max_tokens=8), cancellation=cancellation)
    assert (made.tokens, made.finish_reason) == ((), "cancelled")


def test_what_an_engine_says_of_itself(engine: TensorRtEngine, tmp_path: Path) -> None:
    assert not engine.batches
    assert engine.free_tokens == engine.capacity_tokens
    with engine.session() as session:
        assert engine.free_tokens == 0
        session.prefill([5, 6, 7])
        for wanted, same in (([5, 6], 2), ([5, 6, 7, 8], 3), ([6], 0), ([], 0)):
            assert session.common_prefix(wanted) == same
        for use in (session.save, engine.load_session):
            with pytest.raises(SessionError, match="not kept in files"):
                use(tmp_path / "talk.session")
        other = TensorRtEngine(engine.bundle, host_graph(engine.bundle.path)).session()
        with pytest.raises(UsageError, match="of another engine"):
            engine.step([(other, [1])])
    assert list(tmp_path.iterdir()) == []


def test_the_context_ends_a_text(bundle: Path) -> None:
    engine = TensorRtEngine(Bundle.open(bundle), host_graph(bundle, max_tokens=64))
    made = engine.generate([9] * 60, GenerationOptions(max_tokens=30))
    assert made.finish_reason in ("context", "eos")
    assert len(made.tokens) <= 5


def test_areas_are_aligned_and_apart(bundle: Path) -> None:
    device = HostDevice()
    cache = RowCache(device, Bundle.open(bundle).manifest.cache, capacity=192, chunk=5)
    addresses = cache.addresses()
    assert len(addresses) == 2 * 2 * 4
    assert all(address % 256 == 0 for address in addresses.values())
    assert len(set(addresses.values())) == len(addresses)


def test_loading_without_a_gpu_says_what_is_missing(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no engine yet"):
        load(bundle)
    with pytest.raises(UsageError, match="run on ONNX Runtime"):
        load(bundle, threads=2)
    with pytest.raises(UsageError, match="fixed when they are built"):
        load(bundle, prefill_chunk=64)


@pytest.mark.gpu
@pytest.mark.skipif(gpu_target() is None, reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("own", [True, False])
def test_an_engine_says_what_the_stand_in_says(bundle: Path, tmp_path: Path, own: bool) -> None:
    target = engine_target(own=own)
    options = TensorRtOptions(targets=(target,), dtype="fp32", max_tokens=256, prefill_chunk=32)
    built = export_tensorrt(bundle, tmp_path / "bundle", options).bundle
    on_host = TensorRtEngine(Bundle.open(bundle), host_graph(bundle))
    wanted = GenerationOptions(max_tokens=32)
    expected = on_host.generate(PROMPT, wanted)
    engine = load(built)
    found = engine.generate(PROMPT, wanted)
    ids = engine.tokenizer.encode(PROMPT) + list(expected.tokens)
    with engine.session() as session, on_host.session() as other:
        ours, theirs = (one.prefill(ids, all_logits=True) for one in (session, other))
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()
    assert found.tokens == expected.tokens

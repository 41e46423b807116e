"""The engine on tiny-mla: the bits of a plain onnxruntime session, through either of its faces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpp.core_abi import Api, load_api
from support.graph_runner import GraphRunner

from mla_deploy.bundle import Bundle
from mla_deploy.errors import UsageError
from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.runtime import Engine, GenerationOptions, load, ops_library

PROMPTS = [list(range(100, 130)), [5], [7, 300, 2000] * 50]


@pytest.fixture(scope="module")
def api() -> Api:
    return load_api()


@pytest.fixture(scope="module", params=["fp32", "int4"])
def bundle(
    request: pytest.FixtureRequest, tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    source = shutil.copytree(tiny_mla, root / "source")
    raw = json.loads((source / "config.json").read_text())
    raw["mla_deploy"] = {"version": 1, "cache_format": request.param}
    (source / "config.json").write_text(json.dumps(raw))
    return export_onnx(source, root / "bundle").bundle


@pytest.fixture(scope="module", params=["stock", "native"])
def library(request: pytest.FixtureRequest) -> Path | None:
    """The operator library, or none for onnxruntime's kernels."""
    if request.param == "stock":
        return None
    try:
        return ops_library()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engines(api: Api, bundle: Path, library: Path | None) -> tuple[Any, Engine]:
    """The C ABI and Python, with one thread each."""
    python = load(bundle, threads=1, kernels="stock" if library is None else "native")
    return api.engine(bundle, threads=1, ops_library=library), python


def test_the_logits_are_those_of_onnxruntime(
    engines: tuple[Any, Engine], bundle: Path, library: Path | None
) -> None:
    """Prefill and decode steps of a ragged batch, bound by hand."""
    c_abi, python = engines
    # As many pages as the engine binds, and its padding: onnxruntime's last bits depend on both.
    runner = GraphRunner(Bundle.open(bundle), 3, 192, ops_library=library, padding=0)
    mine = [c_abi.session() for _ in PROMPTS]
    with python.session() as a, python.session() as b, python.session() as c:
        for ids in (PROMPTS, [[9], [400, 3], [1]], [[2], [2], [2]]):
            expected = [one.numpy() for one in runner.append([torch.tensor(row) for row in ids])]
            at = [list(range(len(row))) for row in ids]
            for found in (
                python.step(list(zip((a, b, c), ids, strict=True)), all_logits=True),
                c_abi.step(list(zip(mine, ids, strict=True)), at),
            ):
                for rows, wanted in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(rows, wanted)
    assert c_abi.info.bytes_per_token == python.kv_bytes_per_token
    for session in mine:
        session.destroy()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "choices", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 11}, {"repetition_penalty": 1.2}]
)
def test_the_tokens_are_the_same_through_either_face(
    engines: tuple[Any, Engine], prompt: list[int], choices: dict[str, Any]
) -> None:
    c_abi, python = engines
    session = c_abi.session()
    made = session.generate(prompt, max_tokens=70, **choices)
    expected = python.generate(prompt, GenerationOptions(max_tokens=70, **choices))
    assert made.tokens == list(expected.tokens)
    assert made.finish_reason == expected.finish_reason
    assert made.statistics.cache_bytes == expected.statistics.cache_bytes
    session.destroy()


def test_a_session_in_chunks_is_the_one_of_a_single_pass_up_to_rounding(
    bundle: Path, library: Path | None
) -> None:
    ids = np.random.default_rng(7).integers(2, 4000, 200).tolist()
    found = []
    for chunk in (512, 64, 1):
        kernels = "stock" if library is None else "native"
        engine = load(bundle, threads=1, spin=False, kernels=kernels, prefill_chunk=chunk)
        with engine.session() as session:
            session.prefill(ids[:-1])
            found.append(session.decode(ids[-1]))
    # Sums in another order; and with int4 codes that fall otherwise, and our kernels' two ways.
    bound = 2e-5 if bundle.parent.name.startswith("fp32") else 1e-1
    for logits in found[1:]:
        assert abs(logits - found[0]).max() < bound * abs(found[0]).max()


def test_a_ragged_batch_decodes_what_each_session_decodes_alone(engines: tuple[Any, Any]) -> None:
    ours = engines[0]
    batch, alone = ([ours.session() for _ in PROMPTS] for _ in range(2))
    for sessions in (batch, alone):
        for session, prompt in zip(sessions, PROMPTS, strict=True):
            session.prefill(prompt)
    for token in (9, 400, 1):
        together = ours.step([(session, [token]) for session in batch])
        for session, logits in zip(alone, together, strict=True):
            single = session.decode(token)
            assert logits.argmax() == single.argmax()
            # products of several rows are summed in another order, and a code may fall otherwise
            assert abs(logits - single).max() < 2e-2 * abs(single).max()
    for session in (*batch, *alone):
        session.destroy()


def test_fork_rewind_save_and_load_go_on_bit_for_bit(
    engines: tuple[Any, Any], api: Api, bundle: Path, tmp_path: Path
) -> None:
    ours = engines[0]
    prompt, continuation = PROMPTS[2], [8, 9, 500, 3]
    session = ours.session()
    session.prefill(prompt)
    fork, rewound = session.fork(), session.fork()
    rewound.prefill([17, 18, 19] * 30)
    rewound.rewind(len(prompt))
    session.save(tmp_path / "session")
    loaded = ours.load(tmp_path / "session")
    for token in continuation:
        expected = session.decode(token)
        for other in (fork, rewound, loaded):
            np.testing.assert_array_equal(other.decode(token), expected)
    fork.save(tmp_path / "fork")
    loaded.save(tmp_path / "loaded")
    assert (tmp_path / "fork").read_bytes() == (tmp_path / "loaded").read_bytes()
    for one in (session, fork, rewound, loaded):
        one.destroy()
    assert ours.info.free_tokens == ours.info.capacity_tokens

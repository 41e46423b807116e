"""quantize, export, run, eval, bench: from the shipped checkpoint to figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from mla_deploy.runtime import load

TEXT = str(Path(__file__).parents[2] / "examples" / "text" / "three-essays.txt")

Invoke = Callable[..., Result]
ValuesOf = Callable[..., dict[str, Any]]

PROMPT = "My dear fellow"
BYTES = 168 + 3 * 108
"""Of a token in tiny-mla's default cache: int8 in the first layer, int4 in three others."""


def test_quantize_reports_what_it_wrote(
    tiny_mla: Path, tmp_path: Path, values_of: ValuesOf, invoke: Invoke
) -> None:
    out = tmp_path / "out"
    found = values_of(
        "quantize", tiny_mla, "-o", out, "--kv", "int8", "--weights", "int8", "--group", 32,
        "--experts", "int4", "--lm-head", "none", "--embedding", "int8", "--no-rotate",
    )  # fmt: skip
    recipe = found["recipe"]
    assert recipe == json.loads((out / "config.json").read_text())["mla_deploy"]
    assert recipe["cache_format"] == "int8"
    assert recipe["linear"] == {"bits": 8, "group": 32, "zeros": "integer"}
    assert recipe["experts"] == {"bits": 4, "group": 32, "zeros": "integer"}
    assert recipe["embedding"] == {"bits": 8, "group": 32, "zeros": "integer"}
    assert (recipe["lm_head"], recipe["latent_rotation"]) == (None, None)
    assert found["output_bytes"] < found["source_bytes"]

    again = invoke("quantize", tiny_mla, "-o", out)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    forced = invoke("quantize", tiny_mla, "-o", out, "--force", "--weights", "none")
    assert forced.exit_code == 0, forced.stderr
    assert "routed experts" in forced.stdout
    assert json.loads((out / "config.json").read_text())["mla_deploy"]["cache_format"] == "int4"
    shown = {" ".join(line.split()) for line in forced.stdout.splitlines()}
    assert "cache int4 (first layer int8)" in shown
    assert "rotation balanced axes, then Hadamard blocks of 64" in shown


def test_the_first_layer_can_be_chosen(tiny_mla: Path, tmp_path: Path, values_of: ValuesOf) -> None:
    options = ("--weights", "none", "--kv-first", "int4")
    recipe = values_of("quantize", tiny_mla, "-o", tmp_path / "out", *options)["recipe"]
    assert (recipe["cache_format"], recipe["layers"]) == ("int4", [])


def test_rotation_can_be_asked_for(tiny_mla: Path, tmp_path: Path, values_of: ValuesOf) -> None:
    found = values_of(
        "quantize",
        tiny_mla,
        "-o",
        tmp_path / "out",
        "--kv",
        "fp16",
        "--weights",
        "none",
        "--rotate",
    )
    assert found["recipe"]["latent_rotation"] == 64


def test_export_reports_the_bundle(
    quantized: Path, tmp_path: Path, values_of: ValuesOf, invoke: Invoke
) -> None:
    out = tmp_path / "bundle"
    found = values_of("export", quantized, "-o", out, "--to", "onnx")
    assert found["kv_bytes_per_token"] == BYTES
    assert found["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert invoke("export", quantized, "-o", out).exit_code == 2
    forced = invoke("export", quantized, "-o", out, "--force")
    assert forced.exit_code == 0
    assert f"{BYTES} bytes a token" in forced.stdout


def test_a_bundle_for_a_gpu_says_what_is_missing_where_there_is_none(
    quantized: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never falls back to the CPU."""
    monkeypatch.setattr("mla_deploy.runtime.cuda.LIBRARY", "nowhere.so")
    made = invoke("export", quantized, "-o", tmp_path / "bundle", "--target", "cuda")
    assert made.exit_code == 0, made.output
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["cuda"] == {"dtype": "float16"}
    for options, message in (
        ([], "no CUDA kernels"),
        (["--device", "cuda"], "no CUDA kernels"),
        (["--device", "cpu"], "--to onnx --target cpu"),
    ):
        result = invoke("run", tmp_path / "bundle", PROMPT, *options)
        assert result.exit_code == 2
        assert message in result.stderr


def test_run_streams_the_text_and_nothing_else_on_standard_output(
    bundle: Path, values_of: ValuesOf, invoke: Invoke
) -> None:
    found = values_of("run", bundle, PROMPT, "-n", 12, "--temperature", 0)
    assert found["text"]
    assert len(found["tokens"]) == found["generated_tokens"] == 12
    assert found["finish_reason"] == "length"
    assert found["decode_tokens_per_s"] > 0
    assert found["kv_bytes_per_token"] == BYTES

    plain = invoke("run", bundle, PROMPT, "-n", 12)
    assert plain.exit_code == 0
    assert plain.stdout == found["text"] + "\n"
    assert "12 generated" in plain.stderr
    assert "tokens/s" in plain.stderr


def test_run_with_json_prints_one_object_as_a_process(bundle: Path) -> None:
    command = [sys.executable, "-c", "from mla_deploy.cli import main; main()", "run", bundle]
    found = subprocess.run(
        [*map(str, command), PROMPT, "-n", "4", "--json", "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert len(json.loads(found.stdout)["tokens"]) == 4
    assert "4 generated" in found.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("run", "{}", "one", "-n", "1"), ("inspect", "{}", "--verify"),
        ("bench", "{}", "--depth", "0", "--prompt-tokens", "8", "-r", "1", "-n", "2"),
        ("eval", "{}", "--text", TEXT, "--max-tokens", "40"),
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_bundle_needs_what_runs_it_and_no_more(bundle: Path, command: tuple[str, ...]) -> None:
    words = [word.format(bundle) for word in command]
    code = (
        "import sys\nsys.modules.update(dict.fromkeys("
        "('torch', 'onnx', 'onnx_ir', 'safetensors', 'transformers')))\n"
        f"from mla_deploy.cli import main\nmain({words!r})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_what_a_bundle_does_not_need_is_named_where_it_is_needed(
    tiny_mla: Path, tmp_path: Path
) -> None:
    words = ["quantize", str(tiny_mla), "-o", str(tmp_path / "out")]
    code = (
        f"import sys\nsys.modules['torch'] = None\nfrom mla_deploy.cli import main\nmain({words!r})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2
    assert "this command needs torch, which is not installed" in found.stderr
    assert "pip install torch" in found.stderr


def test_run_obeys_its_sampling_options(bundle: Path, values_of: ValuesOf) -> None:
    def tokens(*options: object) -> list[int]:
        return values_of("run", bundle, PROMPT, "-n", 16, *options)["tokens"]

    greedy = tokens()
    drawn = tokens("--temperature", 1.5, "--seed", 1)
    assert drawn != greedy
    assert tokens("--temperature", 1.5, "--seed", 1) == drawn
    assert tokens("--temperature", 1.5, "--seed", 2) != drawn
    assert tokens("--temperature", 1.5, "--seed", 1, "--top-k", 1) == greedy
    assert tokens("--temperature", 1.5, "--seed", 1, "--top-p", 1e-6) == greedy
    assert tokens("--temperature", 1.5, "--seed", 1, "--min-p", 1.0) == greedy


def test_run_stops_before_a_stop_string(bundle: Path, values_of: ValuesOf) -> None:
    text = values_of("run", bundle, PROMPT, "-n", 12)["text"]
    stop = text[4:8]
    found = values_of("run", bundle, PROMPT, "-n", 12, "--stop", "never there", "--stop", stop)
    assert found["text"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"


def test_run_reads_the_prompt_from_standard_input(bundle: Path, values_of: ValuesOf) -> None:
    given = values_of("run", bundle, "café", "-n", 3)
    assert (
        values_of("run", bundle, "-", "-n", 3, input="café".encode())["tokens"] == given["tokens"]
    )


def test_eval_measures_the_bytes_that_ship(
    bundle: Path, quantized: Path, tiny_mla: Path, short_text: Path, values_of: ValuesOf
) -> None:
    options = ("--text", short_text, "--window", 128, "--threads", 1)
    shipped = values_of("eval", bundle, "--reference", tiny_mla, *options)
    torch = values_of("eval", quantized, "--reference", tiny_mla, *options)
    assert shipped["tokens"] == torch["tokens"] > 100
    assert shipped["reference_perplexity"] == torch["reference_perplexity"]
    # Not the reference itself, near it, and near the torch reference of the same recipe.
    assert 1e-4 < shipped["kl_mean"] < 0.05
    assert shipped["kl_mean"] <= shipped["kl_p99"] <= shipped["kl_max"]
    assert 0.8 < shipped["top1_agreement"] < 1
    assert shipped["perplexity"] == pytest.approx(torch["perplexity"], rel=0.02)
    assert shipped["perplexity"] != torch["perplexity"]


def test_eval_obeys_window_stride_and_length(
    tiny_mla: Path, short_text: Path, values_of: ValuesOf, invoke: Invoke
) -> None:
    options = ("--text", short_text, "--threads", 1)
    short = values_of("eval", tiny_mla, *options, "--window", 8, "--stride", 8)
    overlapping = values_of("eval", tiny_mla, *options, "--window", 64, "--stride", 32)
    assert (overlapping["window"], overlapping["stride"]) == (64, 32)
    assert short["perplexity"] > overlapping["perplexity"]
    assert values_of("eval", tiny_mla, "--text", short_text, "-n", 50)["tokens"] == 49
    text = invoke("eval", tiny_mla, "--text", short_text, "-n", 50).stdout
    assert "perplexity" in text
    assert "bits per byte" in text


def test_bench_measures_each_depth(bundle: Path, values_of: ValuesOf, invoke: Invoke) -> None:
    options = ("--depth", "128,0", "-n", 2, "-r", 1, "--prompt-tokens", 16, "--threads", 1)
    found = values_of("bench", bundle, *options)
    assert [one["depth"] for one in found["results"]] == [0, 128]
    for one in found["results"]:
        assert one["kv_bytes_per_token"] == BYTES
        assert one["prefill_tokens_per_s"] > 0
        assert one["decode_tokens_per_s"] > 0
        assert one["peak_rss_bytes"] > 10 << 20
    assert "decode tokens/s" in invoke("bench", bundle, *options).stdout


def test_a_depth_holds_copies_of_a_real_prefix(bundle: Path, tmp_path: Path) -> None:
    engine = load(bundle, max_tokens=512)
    session = engine.session()
    prefix = np.random.default_rng(0).integers(0, 4096, 130).tolist()
    session.prefill(prefix)
    session.fill_by_copies(333)
    tokens = session.tokens
    assert len(tokens) == 333
    assert tokens == (*prefix[:128], *prefix[:128], *prefix[:77])
    assert engine.free_tokens == 512 - 6 * 64, "copies have pages of their own"
    session.save(tmp_path / "session")
    content = (tmp_path / "session").read_bytes()[64 + 4 * 333 : -32]
    pages = np.frombuffer(content, np.uint8).reshape(6, -1)
    assert pages[0].any()
    assert np.array_equal(pages[2], pages[0])
    assert np.array_equal(pages[5], pages[1])
    assert np.isfinite(session.prefill([1])).all()


def test_a_prefix_shorter_than_a_page_is_kept(bundle: Path) -> None:
    session = load(bundle, max_tokens=256).session()
    session.prefill([1, 2, 3])
    session.fill_by_copies(3)
    assert session.tokens == (1, 2, 3)


@pytest.mark.parametrize("command", ["run", "bench", "eval"])
def test_kernels_can_be_chosen(
    command: str, bundle: Path, short_text: Path, values_of: ValuesOf, invoke: Invoke
) -> None:
    small: dict[str, tuple[object, ...]] = {
        "run": ("one", "-n", 1),
        "bench": ("--depth", 0, "-n", 1, "-r", 1, "--prompt-tokens", 2),
        "eval": ("--text", short_text, "-n", 8),
    }
    found = values_of(command, bundle, *small[command], "--kernels", "stock")
    assert command == "eval" or found["kernels"] == "stock"
    wrong = invoke(command, bundle, *small[command], "--kernels", "magic")
    assert wrong.exit_code == 2
    assert "auto, native, stock" in wrong.stderr


def test_a_checkpoint_has_no_kernels_to_choose(
    tiny_mla: Path, short_text: Path, invoke: Invoke
) -> None:
    result = invoke("eval", tiny_mla, "--text", short_text, "--kernels", "stock")
    assert result.exit_code == 2
    assert "--kernels is for bundles" in result.stderr

"""The example that runs a bundle with nothing of ours installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from mla_deploy.exporters.onnx import export_onnx

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "stock_onnxruntime.py"
PROMPT = "The old man said that"
BLOCK_OURS = """
import runpy, sys
sys.modules["mla_deploy"] = sys.modules["torch"] = None  # importing them now fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_writes_what_transformers_writes(tiny_mla: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bundle = export_onnx(tiny_mla, tmp_path / "bundle").bundle
    command = [sys.executable, "-c", BLOCK_OURS, EXAMPLE, bundle, PROMPT, "40"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr

    tokenizer = AutoTokenizer.from_pretrained(tiny_mla)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_mla, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    expected = theirs.generate(ids, max_new_tokens=40, do_sample=False)[0]
    assert run.stdout.rstrip("\n") == tokenizer.decode(expected).rstrip("\n")

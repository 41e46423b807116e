"""Build TensorRT engines with no GPU, and print what they take.

    python benchmarks/tensorrt_build.py [--model tiny|v2-lite] [--targets sm89,...] [--dtypes fp16]
                                        [--plugin LIBRARY]

`v2-lite` has two layers of the size of DeepSeek-V2-Lite (one dense, one with 64 experts) and random
4-bit weights; `tiny` is the model that ships here, quantised. For each GPU and type: seconds, peak
memory of the build against the weights, the engine, the weights as TensorRT counts them (beside the
graph's: equal means that 4 bits stayed 4 bits, once for both profiles), and scratch memory for one
token and for a chunk. The engine gives the rows of new tokens only, so the cache is never copied.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from make_synthetic import TOKENIZER, TOKENIZER_FILES, config_json

from mla_deploy.bundle import Bundle
from mla_deploy.exporters.tensorrt.build import build_engine
from mla_deploy.exporters.tensorrt.capability import capability
from mla_deploy.exporters.tensorrt.export import TensorRtOptions, export_tensorrt
from mla_deploy.families import load_config
from mla_deploy.model import build
from mla_deploy.modules.base import parameter_sources
from mla_deploy.quant.options import QuantizeOptions, recipe_for
from mla_deploy.quant.quantize import quantize_checkpoint
from mla_deploy.shards import ShardWriter

OPTIONS = QuantizeOptions(kv_first="int4")
"""One record in all layers: a few layers stand for many."""


def v2_lite(folder: Path, vocab: int) -> Path:
    """Two layers of DeepSeek-V2-Lite's size with random codes: no solver, so made in seconds."""
    folder.mkdir()
    arguments = argparse.Namespace(
        vocab=vocab, hidden=2048, ffn=10944, layers=2, heads=16, rank=512, context=32768, experts=64
    )
    raw = config_json(arguments)
    path = folder / "config.json"
    path.write_text(json.dumps(raw))
    recipe = recipe_for(load_config(folder), OPTIONS)
    path.write_text(json.dumps(raw | {"mla_deploy": recipe.to_json()}))
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    writer, done = ShardWriter(folder), set()
    for name, parameter, source in parameter_sources(build(load_config(folder))):
        for tensor_name, shape in source.tensors().items():
            if tensor_name not in done:
                done.add(tensor_name)
                writer.add(tensor_name, random_values(name, shape, parameter.dtype))
    writer.finish()
    return folder


def random_values(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Codes, scales, zeros and float matrices of a plausible size."""
    if name.endswith("codes"):
        return torch.randint(256, shape, dtype=torch.uint8)
    if name.endswith("zeros"):
        return torch.full(shape, 128 if "lm_head" in name else 8, dtype=torch.uint8)
    if name.endswith("scales"):
        return torch.full(shape, 0.005, dtype=torch.float16)
    return torch.ones(shape) if len(shape) == 1 else (torch.randn(shape) * 0.02).to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("tiny", "v2-lite"), default="v2-lite")
    parser.add_argument("--targets", default="sm80,sm86,sm89,sm120")
    parser.add_argument("--dtypes", default="fp16,bf16")
    parser.add_argument("--vocab", type=int, default=102400, help="of v2-lite")
    parser.add_argument("--plugin", type=Path, help="library, for graphs with LatentAttention")
    parser.add_argument("--log", type=Path, help="file for what TensorRT says")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.model == "tiny":
            source = folder / "source"
            quantize_checkpoint(TOKENIZER, source, OPTIONS)
        else:
            source = v2_lite(folder / "source", args.vocab)
        for dtype in args.dtypes.split(","):
            measure(source, folder / dtype, dtype, args.targets.split(","), args.plugin, args.log)


def measure(
    source: Path,
    out: Path,
    dtype: str,
    targets: list[str],
    plugin: Path | None,
    log: Path | None,
) -> None:
    """Export once, build for each GPU, print a line each."""
    start = time.monotonic()
    options = TensorRtOptions(onnx_only=True, dtype=dtype, plugin=plugin is not None)
    bundle = Bundle.open(export_tensorrt(source, out, options).bundle)
    info = bundle.manifest.tensorrt
    assert info is not None
    weights = bundle.file("model.onnx.data").stat().st_size
    print(f"{dtype}: graph in {time.monotonic() - start:.1f} s, weights {weights / 1e6:.1f} MB")
    print("gpu     seconds  peak MB (x weights)  engine MB  weights MB  scratch MB: 1 token, chunk")
    for target in targets:
        made = build_engine(
            bundle.file("model.onnx"),
            out / "engine",
            capability(bundle.manifest.graph.lowering),
            target,
            info.inputs,
            info.profiles,
            plugin=plugin,
            log=log,
        )
        several, one = (size / 1e6 for size in made.scratch_bytes)
        print(
            f"{target:7} {made.seconds:7.1f} {made.peak_bytes / 1e6:8.0f} "
            f"({made.peak_bytes / weights:5.2f})     {made.bytes / 1e6:10.1f} "
            f"{made.weights_bytes / 1e6:11.1f} {one:12.1f}, {several:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

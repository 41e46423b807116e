"""Times prompts on this machine's GPU: latent attention in its two modes, absorbed and expanded.

    python benchmarks/cuda_prompts.py [--heads 16] [--past 0 8192 32768] [--new 256 512 2048]

One sequence, int4 cache, the whole operator: append, projections, attention. `auto` says which mode
the kernels choose by themselves. TFLOP/s are those of the expanded mode, of the products that
attention of these lengths needs at least (causal), keys and values included; `of matmul` compares
with a product of two large float16 matrices in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from cuda_attention import NOPE, ROPE, VALUE, Operator, milliseconds

from mla_deploy.runtime.cuda import CudaKernels, cuda_library


def matmul_tflops() -> float:
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.float16, device="cuda") for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b) / 1e9


def products(heads: int, rank: int, past: int, new: int) -> int:
    """Multiply-adds: keys and values of all tokens once, and each pair that a query sees."""
    pairs = new * past + new * (new + 1) // 2
    return heads * ((past + new) * rank * (NOPE + VALUE) + pairs * (NOPE + ROPE + VALUE))


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--heads", type=int, nargs="+", default=(16, 128))
    parser.add_argument("--past", type=int, nargs="+", default=(0, 8192, 32768))
    parser.add_argument("--new", type=int, nargs="+", default=(128, 256, 512, 2048))
    parser.add_argument("--rank", type=int, default=512, choices=(256, 512))
    parser.add_argument("--library", type=Path, help="another libmla_deploy_cuda.so")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    kernels = CudaKernels(options.library or cuda_library())
    kernels.check_device()
    torch.manual_seed(0)
    peak = matmul_tflops()
    print(
        f"{torch.cuda.get_device_name()}; float16 matmul {peak:.0f} TFLOP/s; rank {options.rank}\n"
    )
    print("| heads | past | new | absorbed ms | expanded ms | x | auto | TFLOP/s | of matmul |")
    print("|---" * 9 + "|")
    rows = []
    for heads in options.heads:
        for past in options.past:
            for new in options.new:
                times = {}
                for mode in ("absorbed", "expanded"):
                    operator = Operator(
                        kernels, heads, options.rank, past, 1, "int4", steps=new, mode=mode
                    )
                    layer = operator.layers[0]
                    times[mode] = milliseconds(lambda o=operator, at=layer: o.call(at))
                needed = {
                    mode: kernels.workspace_bytes(dataclasses.replace(operator.sizes, mode=mode))
                    for mode in ("auto", "expanded")
                }
                chosen = "expanded" if needed["auto"] == needed["expanded"] else "absorbed"
                rate = 2 * products(heads, options.rank, past, new) / times["expanded"] / 1e9
                print(
                    f"| {heads} | {past} | {new} | {times['absorbed']:.3f} "
                    f"| {times['expanded']:.3f} | {times['absorbed'] / times['expanded']:.2f} "
                    f"| {chosen} | {rate:.0f} | {rate / peak:.0%} |",
                    flush=True,
                )
                rows.append(
                    {"heads": heads, "past": past, "new": new, "ms": times, "auto": chosen,
                     "tflops": rate}
                )  # fmt: skip
    if options.json:
        report = {"device": torch.cuda.get_device_name(), "matmul_tflops": peak, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

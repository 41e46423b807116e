"""Times the CUDA kernels of latent attention on this machine's GPU.

    python benchmarks/cuda_attention.py [--quick] [--heads 16 32] [--contexts 32768] [--json FILE]

Each row is one token for each of B sequences, int4 cache, random codes, shuffled block table. Calls
are captured into a CUDA graph that goes over several caches in turn, together at least four times
the L2, and the median of the replays is given. `call` is the whole operator: append, projections,
attention, merge. `attention` is `call` less the same call on a cache of one token, that is without
launches and projections. Its bytes are those of the cache; `of copy` compares with a copy on the
device in the same run, reads and writes counted.

Peers, in the same run on the same lengths: our kernel on a 16-bit cache; attention written with
torch.matmul on a bfloat16 cache; torch's scaled_dot_product_attention on the same; FlashMLA where
it is installed. `x` is the peer's time over ours: `attention` for peers without projections.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mla_deploy.cache import cache_record
from mla_deploy.manifest import PAGE_TOKENS
from mla_deploy.runtime.cuda import AttentionSizes, CudaKernels, Tensor, cuda_library

NOPE, ROPE, VALUE = 128, 64, 128
HEADS = (16, 20, 32, 40, 64, 128)
CONTEXTS = (1024, 8192, 32768, 131072)
BATCHES = (1, 8, 32)
REPLAYS = 20
MOST_BYTES = 8 << 30  # of one cache


def milliseconds(run: Callable[[], object]) -> float:
    """Median of the times between events around a call."""
    for _ in range(3):
        run()
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def graph_milliseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Milliseconds a call, the calls replayed in turn as one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return milliseconds(graph.replay) / len(calls)


def copy_gbs() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


@dataclass
class Layer:
    """One layer's cache, with its own pages, and what a call needs beside it."""

    parts: list[torch.Tensor]
    table: torch.Tensor


class Operator:
    """Our kernel at one size."""

    def __init__(
        self,
        kernels: CudaKernels,
        heads: int,
        rank: int,
        context: int,
        batch: int,
        record: str,
        steps: int = 1,
        mode: str = "auto",
    ) -> None:
        self.kernels = kernels
        pages = -(-(context + steps) // PAGE_TOKENS)
        self.sizes = AttentionSizes(
            batch, steps, pages, heads, NOPE, rank, ROPE, VALUE, cache_format=record, mode=mode
        )
        definition = cache_record(record)
        self.bytes = definition.bytes_per_token(rank, ROPE) * context * batch
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        count = max(1, min(64, -(-4 * l2 // self.bytes))) if steps == 1 else 1
        self.layers = []
        for _ in range(count):
            parts = []
            for part in definition.parts(rank, ROPE):
                arena = part.empty(batch * pages + 1).cuda()
                if arena.dtype.is_floating_point:
                    arena.normal_(0, 1 if record == "fp16" else 0.1)
                else:
                    arena.random_(0, 256) if arena.dtype == torch.uint8 else arena.random_(
                        -127, 128
                    )
                parts.append(arena)
            order = torch.randperm(batch * pages, device="cuda") + 1
            self.layers.append(Layer(parts, order.reshape(batch, pages)))
        half = {"dtype": torch.float16, "device": "cuda"}
        self.tensors = {
            "q": torch.randn(batch, steps, heads * (NOPE + ROPE), **half),
            "kv": torch.randn(batch, steps, rank + ROPE, **half),
            "output": torch.empty(batch, steps, heads * VALUE, **half),
            "cos": torch.ones(batch, steps, ROPE // 2, device="cuda"),
            "sin": torch.zeros(batch, steps, ROPE // 2, device="cuda"),
            "w_uk": torch.randn(heads, NOPE, rank, **half) * rank**-0.5,
            "w_uv": torch.randn(heads, rank, VALUE, **half) * rank**-0.5,
            "past_lengths": torch.full((batch,), context, device="cuda"),
            "new_lengths": torch.full((batch,), steps, device="cuda"),
        }
        size = kernels.workspace_bytes(self.sizes)
        self.workspace = torch.empty(size + 256, dtype=torch.uint8, device="cuda")

    def call(self, layer: Layer) -> None:
        tensors = {
            name: Tensor(value.data_ptr(), str(value.dtype).removeprefix("torch."))
            for name, value in (*self.tensors.items(), ("block_table", layer.table))
        }
        start = -(-self.workspace.data_ptr() // 256) * 256
        self.kernels.latent_attention(
            self.sizes,
            tensors,
            [part.data_ptr() for part in layer.parts],
            layer.parts[0].shape[0],
            softmax_scale=(NOPE + ROPE) ** -0.5,
            latent_norm_epsilon=1e-6,
            workspace=start,
            workspace_bytes=self.workspace.numel() - 256,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    def milliseconds(self) -> tuple[float, float]:
        """(call, attention)."""

        def calls() -> list[Callable[[], object]]:
            return [lambda layer=layer: self.call(layer) for layer in self.layers]

        whole = graph_milliseconds(calls())
        past = self.tensors["past_lengths"]
        context = past.clone()
        past.zero_()
        empty = graph_milliseconds(calls())
        past.copy_(context)
        return whole, whole - empty


def bf16_peers(heads: int, rank: int, context: int, batch: int) -> dict[str, float | str]:
    """Milliseconds of other ways to attend to a bfloat16 cache of the same length."""
    width = rank + ROPE
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    count = max(
        1,
        min(8, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // (2 * width * context))),
    )
    caches = [torch.randn(batch, context, width, **bf16) for _ in range(count)]
    query = torch.randn(batch, heads, width, **bf16)

    def matmul(cache: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(query @ cache.transpose(1, 2), -1, dtype=torch.float32)
        return p.to(torch.bfloat16) @ cache[..., :rank]

    def sdpa(cache: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(1), cache.unsqueeze(1), cache.unsqueeze(1)
        )

    peers: dict[str, float | str] = {}
    for name, peer in (("matmul", matmul), ("sdpa", sdpa)):
        try:
            peers[name] = graph_milliseconds(
                [lambda cache=cache, peer=peer: peer(cache) for cache in caches]
            )
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            peers[name] = str(error).splitlines()[0]
    peers["flash_mla"] = flash_mla(query, caches, rank, context)
    return peers


def flash_mla(
    query: torch.Tensor, caches: Sequence[torch.Tensor], rank: int, context: int
) -> float | str:
    """FlashMLA on the same caches (github.com/deepseek-ai/FlashMLA, dense decoding), or why not."""
    try:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata
    except ImportError:
        return "not installed"
    batch, heads, width = query.shape
    if context % 64 or width != 576:
        return "wants pages of 64 tokens and 576 channels"
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    table = torch.arange(batch * context // 64, dtype=torch.int32, device="cuda").reshape(batch, -1)
    try:
        metadata, splits = get_mla_metadata(lengths, heads, 1)
        return graph_milliseconds(
            [
                lambda cache=cache: flash_mla_with_kvcache(
                    query.unsqueeze(1), cache.reshape(-1, 64, 1, width), table, lengths, rank,
                    metadata, splits, causal=False,
                )
                for cache in caches
            ]
        )  # fmt: skip
    except (RuntimeError, TypeError) as error:
        return str(error).splitlines()[0]


def ratio(peer: float | str, ours: float) -> str:
    return f"{peer / ours:.1f}" if isinstance(peer, float) else "-"


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--heads", type=int, nargs="+", default=HEADS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rank", type=int, default=512, choices=(256, 512))
    parser.add_argument("--quick", action="store_true", help="16 and 32 heads, 32k and 128k tokens")
    parser.add_argument("--library", type=Path, help="another libmla_deploy_cuda.so")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    if options.quick:
        options.heads, options.contexts, options.batches = (16, 32), (32768, 131072), (1, 8)
    kernels = CudaKernels(options.library or cuda_library())
    kernels.check_device()
    torch.manual_seed(0)
    copy = copy_gbs()
    name = torch.cuda.get_device_name()
    print(f"{name}; copy {copy:.0f} GB/s; kernels for {kernels.targets}; rank {options.rank}\n")
    head = ("heads", "context", "batch", "call us", "attention us", "GB/s", "of copy")
    print("| " + " | ".join((*head, "fp16 cache x", "matmul x", "sdpa x", "FlashMLA x")) + " |")
    print("|---" * 11 + "|")
    rows: list[dict[str, Any]] = []
    for heads in options.heads:
        for context in options.contexts:
            for batch in options.batches:
                if batch * context * 2 * (options.rank + ROPE) > MOST_BYTES:
                    continue
                sizes = (heads, options.rank, context, batch)
                ours = Operator(kernels, *sizes, "int4")
                call, attention = ours.milliseconds()
                gbs = ours.bytes / attention / 1e6
                del ours
                fp16 = Operator(kernels, *sizes, "fp16").milliseconds()[1]
                peers = bf16_peers(*sizes)
                torch.cuda.empty_cache()
                print(
                    f"| {heads} | {context} | {batch} | {1e3 * call:.1f} | {1e3 * attention:.1f} "
                    f"| {gbs:.0f} | {gbs / copy:.0%} | {ratio(fp16, attention)} "
                    f"| {ratio(peers['matmul'], attention)} | {ratio(peers['sdpa'], attention)} "
                    f"| {ratio(peers['flash_mla'], attention)} |",
                    flush=True,
                )
                rows.append(
                    {
                        "heads": heads, "context": context, "batch": batch, "rank": options.rank,
                        "call_ms": call, "attention_ms": attention, "cache_gbs": gbs,
                        "of_copy": gbs / copy, "fp16_cache_ms": fp16, "peers_ms": peers,
                    }
                )  # fmt: skip
    if options.json:
        report = {"device": name, "copy_gbs": copy, "targets": kernels.targets, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    reasons = {
        f"{k}: {v}" for row in rows for k, v in row["peers_ms"].items() if isinstance(v, str)
    }
    for reason in sorted(reasons):
        print(reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())

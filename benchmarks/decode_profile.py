"""Where the time of a decode step goes, by operator and by the place of the product in the model.

    python benchmarks/decode_profile.py BUNDLE [--depth 0,8192] [--threads 2]

onnxruntime's own profiler over the graph as it ships, with our operator library. Times are wall
clock, a step, medians over the steps; `between` is what a step takes beyond its operators. GB/s is
what the weights of a group come to (initializers it reads, each once a step), to be held against
the machine's reading speed, which `cpu_attention.py` measures.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from mla_deploy.bundle import Bundle
from mla_deploy.runtime import ops_library

PAGE_TOKENS = 64
WARM_UP = 4


def group_of(node: str, operator: str) -> str:
    """`MatMulNBits o_proj` out of `/model/layers.3/self_attn/o_proj/MatMulNBits`."""
    if operator not in ("MatMulNBits", "MatMul", "QMoE"):
        return operator
    place = re.sub(r"^/model(/layers\.\d+)?/", "", node).rsplit("/", 1)[0]
    return f"{operator} {place.rsplit('/', 1)[-1]}"


def bytes_read(path: Path) -> dict[str, int]:
    """Bytes of the initializers of each node of products, by its name."""
    graph = onnx.load(path, load_external_data=False).graph
    sizes = {}
    for tensor in graph.initializer:
        outside = {entry.key: entry.value for entry in tensor.external_data}
        sizes[tensor.name] = int(outside.get("length", len(tensor.raw_data)))
    return {
        node.name: sum(sizes.get(name, 0) for name in node.input)
        for node in graph.node
        if "Gather" not in node.op_type
    }


def profile(bundle: Path, depth: int, threads: int, steps: int) -> None:
    manifest = Bundle.open(bundle).manifest
    path = bundle / manifest.graph.path
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.register_custom_ops_library(str(ops_library()))
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        pages = -(-(depth + steps + 1) // PAGE_TOKENS)
        arrays = []  # the bound values point into them
        for index, layer in enumerate(manifest.cache.layers):
            for part in layer.parts:
                array = np.ones((pages + 1, *part.page_shape), dtype=part.dtype)
                value = ort.OrtValue.ortvalue_from_numpy(array)
                arrays.append(array)
                binding.bind_ortvalue_input(f"cache.{index}.{part.name}", value)
                binding.bind_ortvalue_output(f"present.{index}.{part.name}", value)
        binding.bind_output("logits")
        binding.bind_cpu_input("block_table", np.arange(1, pages + 1).reshape(1, -1))
        binding.bind_cpu_input("new_lengths", np.array([1]))
        binding.bind_cpu_input("logit_index", np.array([[0]]))
        walls = []
        for step in range(steps):
            binding.bind_cpu_input("input_ids", np.array([[step + 2]]))
            binding.bind_cpu_input("past_lengths", np.array([depth + step]))
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            walls.append(time.perf_counter() - start)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = defaultdict(list)  # of a group, by step
    weights: dict[str, int] = defaultdict(int)
    read = bytes_read(path)
    seen: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        node = event["name"].removesuffix("_kernel_time")
        group = group_of(node, event["args"]["op_name"])
        step = seen[node]
        seen[node] += 1
        rows = times[group]
        rows.extend([0.0] * (step + 1 - len(rows)))
        rows[step] += event["dur"] / 1e3
        if not step:
            weights[group] += read.get(node, 0)
    wall = statistics.median(walls[WARM_UP:]) * 1e3
    medians = {name: statistics.median(rows[WARM_UP:]) for name, rows in times.items()}
    print(f"\ndepth {depth:,}, {threads} threads: {wall:.1f} ms a step")
    print("| operator | ms | share | MB of weights | GB/s |\n|---|---:|---:|---:|---:|")
    small = sum(ms for ms in medians.values() if ms < 0.01 * wall)
    for name, ms in sorted(medians.items(), key=lambda item: -item[1]):
        if ms >= 0.01 * wall:
            megabytes = weights[name] / 1e6
            print(
                f"| {name} | {ms:.2f} | {ms / wall:.0%} | {megabytes:.0f} "
                f"| {megabytes / ms if megabytes > 1 else 0:.1f} |"
            )
    print(f"| others, each below 1% | {small:.2f} | {small / wall:.0%} | | |")
    between = wall - sum(medians.values())
    print(f"| between | {between:.2f} | {between / wall:.0%} | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--depth", default="0,8192")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    for depth in args.depth.split(","):
        profile(args.bundle, int(depth), args.threads, args.steps)


if __name__ == "__main__":
    main()

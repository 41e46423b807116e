"""Time and peak memory of `quantize`.

    python benchmarks/make_synthetic.py build/bench/synthetic
    python benchmarks/quantize_cost.py build/bench/synthetic [--zeros exact] [--weights int8]

Seconds are wall time, beside the processor seconds of all threads: on a busy machine only the
latter say something. Peak memory is that of this process, the pages of the source's mapped files
that it touched included.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--zeros", default="integer")
    parser.add_argument("--group", type=int)
    args = parser.parse_args()

    options = QuantizeOptions(weights=args.weights, zeros=args.zeros, group=args.group)
    before = peak_megabytes()
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
        report = quantize_checkpoint(args.model, Path(folder) / "out", options)
    parameters = sum(kind.parameters for kind in report.kinds.values())
    print(
        f"{parameters / 1e9:.3f} B parameters, {torch.get_num_threads()} threads: "
        f"{report.seconds:.1f} s ({time.process_time() - began:.1f} s of processor time), "
        f"{report.source_bytes / 1e6:,.0f} MB to {report.output_bytes / 1e6:,.0f} MB, "
        f"peak memory {peak_megabytes():,.0f} MB ({before:,.0f} MB before)"
    )


def peak_megabytes() -> float:
    """The most memory this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()

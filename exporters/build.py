"""`build_bundle`: the whole way from a checkpoint to a bundle.

    convert  ->  quantize  ->  export

A step that a model does not need is left out. The checkpoints in between are in `OUT.partial`, a
folder beside the output, and each goes when the next one is whole.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mla_deploy.bundle import MANIFEST
from mla_deploy.exporters.build_plan import BuildOptions, BuildPlan, plan_build
from mla_deploy.exporters.onnx.export import (
    TARGETS,
    ExportReport,
    export_onnx,
)
from mla_deploy.exporters.tensorrt.build import check_memory
from mla_deploy.exporters.tensorrt.export import TensorRtOptions, TensorRtReport, export_tensorrt
from mla_deploy.job import job_of
from mla_deploy.output import check_output, check_space
from mla_deploy.progress import Progress
from mla_deploy.quant.compress.convert import convert_checkpoint
from mla_deploy.quant.compress.options import calibration_paths
from mla_deploy.quant.compress.report import ConversionReport
from mla_deploy.quant.compress.source import Source
from mla_deploy.quant.hqq_source import open_source, options_of_source
from mla_deploy.quant.options import recipe_for
from mla_deploy.quant.plan import make_plan
from mla_deploy.quant.quantize import QuantizeReport, quantize_checkpoint
from mla_deploy.workspace import claimed, holds_work

StepState = Literal["done", "done before", "not needed"]
"""`done before`: by an earlier run, which was stopped."""


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        bytes: of the bundle.
        kv_bytes_per_token: of cache, in all layers.
        steps: what became of each step, in order.
        conversion, quantization: reports of the steps that this run did.
    """

    bundle: Path
    target: str
    bytes: int
    kv_bytes_per_token: int
    seconds: float
    steps: dict[str, StepState]
    conversion: ConversionReport | None
    quantization: QuantizeReport | None
    export: ExportReport | TensorRtReport

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        reports = {"convert": self.conversion, "quantize": self.quantization}
        steps: dict[str, dict[str, Any]] = {}
        for name, state in self.steps.items():
            report = reports.get(name)
            steps[name] = {"state": state, **({} if report is None else report.to_json())}
        steps["export"] |= {"nodes": self.export.nodes, "seconds": self.export.seconds}
        if isinstance(self.export, TensorRtReport):
            steps["export"]["engines"] = [vars(one) for one in self.export.engines]
        return {
            "bundle": str(self.bundle),
            "target": self.target,
            "bytes": self.bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "seconds": self.seconds,
            "steps": steps,
        }


def build_bundle(
    source: Path | str,
    out: Path | str,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
    *,
    say: Callable[[str], None] | None = None,
    force: bool = False,
) -> BuildReport:
    """Convert a checkpoint where its attention is not latent yet, quantise and export it.

    One that is quantised already is only exported. A build that was killed or interrupted goes on
    where it stopped when it is repeated: what is finished is kept in `OUT.partial`, also after an
    error. At the end, and after an error before anything was finished, that folder is gone.

    Args:
        source: folder of a Hugging Face checkpoint, or of one of ours.
        out: the bundle to make.
        progress: told how far the step under way is, and its name.
        say: told what the person at the terminal should know before the end.
        force: replace an earlier bundle. It stays until the new one is whole.

    Raises:
        UsageError: options that do not fit the model, or lack what a conversion needs.
        ConfigError, CheckpointError, TokenizerError: the source is not whole or not supported.
        OutputError: the output exists, the disk is full, or `OUT.partial` is of another job.
        BuildError: an engine cannot be built.
    """
    started = time.monotonic()
    source, out = Path(source), Path(out)
    options = options or BuildOptions()
    say = say or (lambda text: None)
    plan = plan_build(source, options)
    output = check_output(source, out, lambda old: (old / MANIFEST).is_file(), force=force)
    if plan.quantize is None:
        say(f"{source} is quantised already: it is only exported")
        run = _Run(source, out.parent, plan, options, progress)
        return run.report(run.export(source, out, force), out, started)
    with claimed(out, _job(source, options), say=say) as work:
        run = _Run(source, work, plan, options, progress)
        run.check_room()
        say(
            f"goes on from what is in {work}"
            if holds_work(work)
            else f"works in {work}: if this is stopped, the same command goes on from there"
        )
        bundle = work / "bundle"
        made = run.export(run.quantized(), bundle, True)
        output.publish(bundle)
        shutil.rmtree(work)
    return run.report(made, out, started)


class _Run:
    """Carries the steps out, from where an earlier run of them stopped."""

    def __init__(
        self,
        source: Path,
        work: Path,
        plan: BuildPlan,
        options: BuildOptions,
        progress: Progress | None,
    ) -> None:
        self.source, self.plan, self.options, self.progress = source, plan, options, progress
        self.work = work
        self.converted, self.quantized_folder = work / "converted", work / "quantized"
        is_quantized, is_converted = self.quantized_folder.is_dir(), self.converted.is_dir()
        self.steps: dict[str, StepState] = {
            "convert": _state(plan.convert is not None, is_converted or is_quantized),
            "quantize": _state(plan.quantize is not None, is_quantized),
            "export": "done",
        }
        self.conversion: ConversionReport | None = None
        self.quantization: QuantizeReport | None = None

    def check_room(self) -> None:
        """Raise an error now where the next steps would find too little disk or memory."""
        if self.steps["convert"] == "done":
            self._check_space(Source(self.source).plain_bytes)
        elif self.steps["quantize"] == "done":
            self._check_room_of(self.source if self.plan.convert is None else self.converted)

    def _check_room_of(self, source: Path) -> None:
        """For the quantised checkpoint, and its bundle of about the same size."""
        size = self._quantized_bytes(source)
        self._check_space(2 * size)
        if self.options.target not in TARGETS:
            check_memory(size)

    def _check_space(self, needed: int) -> None:
        held = sum(file.stat().st_size for file in self.work.glob("*.partial/*"))
        check_space(self.work, needed - held)

    def _quantized_bytes(self, source: Path) -> int:
        assert self.plan.quantize is not None
        checkpoint = open_source(source)
        options = options_of_source(checkpoint, self.plan.quantize)
        recipe = recipe_for(checkpoint.config, options)
        return make_plan(checkpoint, replace(checkpoint.config, recipe=recipe)).output_bytes

    def quantized(self) -> Path:
        """The quantised checkpoint, made now if it is not there yet."""
        if self.steps["quantize"] == "done":
            assert self.plan.quantize is not None
            source = self._convert() if self.plan.convert is not None else self.source
            self.quantization = quantize_checkpoint(
                source, self.quantized_folder, self.plan.quantize, self._progress("quantize")
            )
        shutil.rmtree(self.converted, ignore_errors=True)
        return self.quantized_folder

    def _convert(self) -> Path:
        if self.steps["convert"] == "done":
            assert self.plan.convert is not None
            self.conversion = convert_checkpoint(
                self.source, self.converted, self.plan.convert, self._progress("convert")
            )
            self._check_room_of(self.converted)
        return self.converted

    def export(self, source: Path, out: Path, force: bool) -> ExportReport | TensorRtReport:
        """The bundle."""
        target, progress = self.options.target, self._progress("export")
        if target in TARGETS:
            return export_onnx(source, out, target=target, force=force, progress=progress)
        engines = TensorRtOptions(targets=(target,))
        return export_tensorrt(source, out, engines, force=force, progress=progress)

    def report(self, made: ExportReport | TensorRtReport, out: Path, started: float) -> BuildReport:
        """What this run did."""
        return BuildReport(
            bundle=out,
            target=self.options.target,
            bytes=made.bytes,
            kv_bytes_per_token=made.kv_bytes_per_token,
            seconds=time.monotonic() - started,
            steps=self.steps,
            conversion=self.conversion,
            quantization=self.quantization,
            export=made,
        )

    def _progress(self, step: str) -> Progress | None:
        progress = self.progress
        if progress is None:
            return None
        return lambda done, total, what: progress(done, total, f"{step}: {what}")


def _state(is_needed: bool, is_there: bool) -> StepState:
    if not is_needed:
        return "not needed"
    return "done before" if is_there else "done"


def _job(source: Path, options: BuildOptions) -> dict[str, Any]:
    """What must be equal for a repeated run to go on with the work of another. The target may
    change: only the export knows it."""
    given = {**options.quantized_by(), "target_ratio": options.target_ratio}
    given["calibration"] = calibration_paths(options.calibration)
    return job_of("build", [source], given, map(Path, options.texts))

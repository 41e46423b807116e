"""`convert_checkpoint`: from ordinary attention to MLA, one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mla_deploy
from mla_deploy.config_reader import PROVENANCE_KEY, read_json_object
from mla_deploy.errors import CheckpointError, ConfigError, UsageError
from mla_deploy.job import job_of
from mla_deploy.output import check_output, check_space, writing
from mla_deploy.progress import Progress
from mla_deploy.quant.compress.calibration import Windows, windows_from_model, windows_from_text
from mla_deploy.quant.compress.geometry import Geometry, candidates
from mla_deploy.quant.compress.heal import Curve, HealPlan, Student, distil, match_layer
from mla_deploy.quant.compress.layer import LatentWeights, Weights, load_layer
from mla_deploy.quant.compress.layout import (
    attention_tensors,
    config_json,
    latent_rank,
    unchanged_names,
)
from mla_deploy.quant.compress.methods import LayerTask, Steps, convert_layer
from mla_deploy.quant.compress.options import DEFAULT_TOKENS, SELF, ConvertOptions
from mla_deploy.quant.compress.partial import SCRATCH, Partial
from mla_deploy.quant.compress.report import ConversionReport, LayerReport, write_json
from mla_deploy.quant.compress.report_page import write_page
from mla_deploy.quant.compress.source import Source
from mla_deploy.quant.compress.streams import SourceLayer, Streams, advance, carry, score
from mla_deploy.shards import ShardWriter
from mla_deploy.tokenizer_files import check_tokenizer_if_any, copy_to_checkpoint
from mla_deploy.workspace import workspace

DEFAULT_WINDOW = 512
DEFAULT_HEAL_TOKENS = 1 << 20
MIN_WINDOW = 16
_PILOT_TOKENS = 4096
_PILOT = Steps(gammas=(1.0,))
"""Sizes are compared without trials of the weight between keys and values."""


def convert_checkpoint(
    source: Path | str,
    out: Path | str,
    options: ConvertOptions,
    progress: Progress | None = None,
    *,
    say: Callable[[str], None] | None = None,
    force: bool = False,
) -> ConversionReport:
    """Convert a checkpoint into a new folder.

    A run that was killed, or that failed with something finished, leaves `OUT.partial`, from which
    the same call goes on with the next layer.

    Args:
        source: folder of a Hugging Face checkpoint, of a type in `families.CONVERTIBLE`.
        out: folder to make.
        say: told what the person at the terminal should know when it fails.
        force: replace an earlier result. It stays until the new one is whole.

    Raises:
        ConfigError, CheckpointError, TokenizerError: the source is broken or not supported.
        UsageError: options that do not fit the model, or too little calibration text.
        OutputError: the output exists, the disk is full, or an unfinished other job is in the way.
    """
    started = time.monotonic()
    opened, out = Source(source), Path(out)
    sizes = candidates(opened.config, options)
    check_tokenizer_if_any(opened.path)
    output = check_output(opened.path, out, _is_ours, force=force)
    windows = calibration_windows(opened, options)
    healing = _heal_plan(opened, options)
    texts = (*options.texts, *map(Path, options.heal))
    job = job_of("convert", [opened.path], options.by_name(), texts)
    with workspace(output, job, scratch=SCRATCH, say=say) as folder:
        run = _Run(opened, options, sizes, windows, healing, folder, progress)
        report = dataclasses.replace(run.all(), seconds=time.monotonic() - started)
        write_json(report, folder)
        write_page(report, folder)
    return report


def calibration_windows(source: Source, options: ConvertOptions) -> Windows | None:
    """The windows that the options ask for; None without calibration.

    Raises:
        UsageError: too little text, or a window that does not fit.
    """
    length = _window(source, options)
    if options.no_calibration:
        return None
    tokens = options.tokens or DEFAULT_TOKENS
    if options.calibration == (SELF,):
        return windows_from_model(source, length, tokens, options.seed)
    return windows_from_text(source, options.texts, length, tokens, options.seed)


def _window(source: Source, options: ConvertOptions) -> int:
    context = source.config.max_position_embeddings
    length = options.window or min(DEFAULT_WINDOW, context)
    if not MIN_WINDOW <= length <= context:
        raise UsageError(
            "the window is out of range",
            found=length,
            allowed=f"{MIN_WINDOW} to {context}, the context",
        )
    return length


def _heal_plan(source: Source, options: ConvertOptions) -> HealPlan | None:
    """How to heal, if that is asked for.

    Raises:
        UsageError: too little text, or a device that is not there.
    """
    if not options.heal:
        return None
    device = options.device or "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"the device {device} cannot be used",
            found=str(error).splitlines()[0],
            allowed="cpu, or cuda where torch finds a GPU",
        ) from None
    texts = [Path(name) for name in options.heal]
    tokens = options.heal_tokens or DEFAULT_HEAL_TOKENS
    windows = windows_from_text(source, texts, _window(source, options), tokens, options.seed)
    return HealPlan(
        windows=windows.fitted,
        match_tokens=tokens,
        distil_tokens=tokens,
        seed=options.seed,
        device=device,
        precision=options.precision or "fp32",
    )


class _Run:
    """Carries a conversion out, from where an earlier run of it stopped."""

    def __init__(
        self,
        source: Source,
        options: ConvertOptions,
        sizes: list[Geometry],
        windows: Windows | None,
        healing: HealPlan | None,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self.source, self.config, self.options = source, source.config, options
        self.windows, self.folder, self.progress = windows, folder, progress
        self.sizes = sizes
        self.geometry = sizes[0]
        self.dtype = source.dtype
        self.layers = self.config.num_hidden_layers
        self.healing = healing
        self.partial = Partial(folder)
        self.writer = ShardWriter(folder)
        is_piloted = len(sizes) > 1 and windows is not None
        rounds = 1 + is_piloted + (healing is not None)
        self.total_steps = self.layers * rounds + 2
        self.done_steps = 0

    def all(self) -> ConversionReport:
        """Choose the size, convert the layers, heal, and compare."""
        self.geometry = self._choose_geometry()
        check_space(self.folder, self.source.plain_bytes - self.writer.done_bytes)
        self._copy(_outer_names(self.source))
        self.writer.flush()
        self._step(1, "embedding")
        streams, first = self._start()
        self._step(first, "layers done before")
        for index in range(first, self.layers):
            self._layer(index, streams)
            self._step(1, f"layer {index}")
        curve = None if self.healing is None else self._distil(streams)
        self.writer.finish()
        held_out = None
        if streams is not None and self.windows is not None:
            ids = self.windows.held_out
            held_out = score(self.source, streams.held_out, streams.converted, ids)
        self._step(1, "comparison")
        reports = self.partial.reports()
        self._write_config(reports)
        return ConversionReport(
            options=self.options,
            source=self.config,
            geometry=self.geometry,
            layers=tuple(reports),
            held_out=held_out,
            distillation=curve,
            calibration_tokens=0 if self.windows is None else self.windows.fitted.numel(),
            resumed_layers=first,
            seconds=0.0,
        )

    def _layer(self, index: int, streams: Streams | None) -> None:
        """Convert one layer; when this returns, all that is known of it is on the disk."""
        layer = SourceLayer(self.config, index, load_layer(self.source, index))
        inputs = None
        if streams is not None and self.healing is not None:
            inputs = streams.fitted.clone()
        task = self._task(layer, None if streams is None else streams.fitted)
        conversion = convert_layer(task(self.geometry), self.options.method)
        latent, curve = conversion.weights, None
        if inputs is not None and self.healing is not None:
            latent, curve = match_layer(layer, inputs, latent, self.healing)
        error = math.nan if streams is None else advance(layer, streams, latent)
        self.partial.keep_report(
            LayerReport(
                layer=index,
                rope_loss=conversion.rope_loss,
                rank_loss=conversion.rank_loss,
                output_error=error,
                choices=conversion.choices,
                inv_freq=tuple(latent.inv_freq.tolist()),
                latent_power=conversion.latent_power,
                match=curve,
            )
        )
        if self.healing is None:
            self._write_attention(index, layer.weights, latent, conversion.latent_power)
        else:
            self.partial.keep_student(index, Student(latent, {}))
        self._copy(unchanged_names(index))
        self.writer.flush()
        if streams is not None:
            self.partial.keep_streams(streams, index + 1)

    def _distil(self, streams: Streams | None) -> Curve:
        """Heal the whole model, write its attention, and take the held-out windows through it."""
        assert self.healing is not None
        plan = self.healing
        before = self.done_steps

        def progress(done: int, total: int) -> None:
            share = self.layers * done // total
            self._step(before + share - self.done_steps, f"distillation, step {done} of {total}")

        latents = [self.partial.student(index).latent for index in range(self.layers)]
        students, curve = distil(self.source, latents, plan, self.partial.distillation, progress)
        if streams is not None and self.windows is not None:
            streams.converted = Streams.start(self.source, self.windows).held_out
        reports = self.partial.reports()
        for index, student in enumerate(students):
            weights = {**load_layer(self.source, index), **student.projections}
            if streams is not None:
                carry(SourceLayer(self.config, index, weights), streams.converted, student.latent)
            self._write_attention(index, weights, student.latent, reports[index].latent_power)
            self.writer.flush()
        return curve

    def _write_attention(
        self, index: int, weights: Weights, latent: LatentWeights, latent_power: float
    ) -> None:
        prefix = f"model.layers.{index}."
        if self.writer.is_done(f"{prefix}self_attn.o_proj.weight"):
            return
        tensors = attention_tensors(
            self.config, self.geometry, weights, latent, self.options.layout, latent_power
        )
        stored = {prefix + name: x.to(self.dtype) for name, x in tensors.items()}
        for name, x in stored.items():
            if not bool(torch.isfinite(x).all()):
                largest = float(tensors[name.removeprefix(prefix)].abs().max())
                raise CheckpointError(
                    f"the converted tensor {name} does not fit the source's type",
                    found=f"values up to {largest:.3g}",
                    allowed=f"up to {torch.finfo(self.dtype).max:.3g} in {self.dtype}",
                    hint="save the source in bfloat16 or float32 first",
                )
        self.writer.add_all(stored)

    def _task(
        self, layer: SourceLayer, fitted: torch.Tensor | None
    ) -> Callable[[Geometry], LayerTask]:
        """The task of a layer at a size; the layer is run over `fitted`, in place."""
        white = layer.measure_white()
        moments, distances, error = white, None, None
        if fitted is not None:
            moments, distances, sample = layer.measure(fitted)
            error = sample.error
        is_stock = self.options.layout == "deepseek_v3"
        window = DEFAULT_WINDOW if fitted is None else fitted.shape[1]

        def at(geometry: Geometry) -> LayerTask:
            return LayerTask(
                config=self.config,
                weights=layer.weights,
                inv_freq=layer.inv_freq,
                moments=moments,
                white=white,
                distances=distances,
                window=window,
                rank=latent_rank(geometry, self.options.layout),
                rope=geometry.qk_rope_head_dim,
                stock_frequencies=is_stock,
                error=error,
            )

        return at

    def _choose_geometry(self) -> Geometry:
        """The size with the least loss on a few windows; the middle one where nothing is measured.

        The choice is kept beside the layers, so that a resumed run makes the same.
        """
        if self.windows is None or len(self.sizes) == 1:
            return self.sizes[len(self.sizes) // 2]
        if (before := self.partial.geometry()) is not None:
            self._step(self.layers, "size chosen before")
            return before
        ids = self.windows.fitted[: max(1, _PILOT_TOKENS // self.windows.fitted.shape[1])]
        fitted = self.source.read("model.embed_tokens.weight")[ids].float()
        converted = [fitted.clone() for _ in self.sizes]
        for index in range(self.layers):
            layer = SourceLayer(self.config, index, load_layer(self.source, index))
            task = self._task(layer, fitted)
            for size, h in zip(self.sizes, converted, strict=True):
                conversion = convert_layer(task(size), self.options.method, _PILOT)
                carry(layer, h, conversion.weights)
            self._step(1, f"sizes tried, layer {index}")
        losses = [score(self.source, fitted, h, ids).converted_loss for h in converted]
        chosen = self.sizes[min(range(len(losses)), key=losses.__getitem__)]
        self.partial.keep_geometry(chosen)
        return chosen

    def _start(self) -> tuple[Streams | None, int]:
        """The streams in front of the first layer to do, and that layer's number."""
        if self.windows is None:
            names = (unchanged_names(layer)[-1] for layer in range(self.layers))
            return None, sum(self.writer.is_done(name) for name in names)
        return self.partial.streams(self.layers) or (Streams.start(self.source, self.windows), 0)

    def _copy(self, names: list[str]) -> None:
        for name in names:
            if not self.writer.is_done(name):
                self.writer.add(name, self.source.plain(name))

    def _write_config(self, reports: list[LayerReport]) -> None:
        provenance = {
            "version": mla_deploy.__version__,
            "source_model_type": self.config.model_type,
            "method": self.options.method,
            "ratio": self.geometry.ratio(self.config),
        }
        config = config_json(
            self.config,
            self.geometry,
            self.options.layout,
            [list(one.inv_freq) for one in reports],
            str(self.dtype).removeprefix("torch."),
            provenance,
        )
        with writing(self.folder):
            copy_to_checkpoint(self.source.path, self.folder)
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (self.folder / "config.json").write_text(text, encoding="utf-8")

    def _step(self, count: int, what: str) -> None:
        self.done_steps += count
        if self.progress is not None:
            self.progress(self.done_steps, self.total_steps, what)


def _outer_names(source: Source) -> list[str]:
    """Tensors outside the layers."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    return names if source.config.tie_word_embeddings else [*names, "lm_head.weight"]


def _is_ours(out: Path) -> bool:
    try:
        return PROVENANCE_KEY in read_json_object(out / "config.json")
    except ConfigError:
        return False

"""`convert_checkpoint`: from ordinary attention to MLA, one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mla_deploy
from mla_deploy.checkpoint import ShardWriter
from mla_deploy.config import read_json_object
from mla_deploy.errors import ConfigError, UsageError
from mla_deploy.families.converted import PROVENANCE_KEY
from mla_deploy.output import check_output, check_space, writing
from mla_deploy.quant.compress.calibration import Windows, windows_from_model, windows_from_text
from mla_deploy.quant.compress.geometry import Geometry, candidates
from mla_deploy.quant.compress.layer import load_layer
from mla_deploy.quant.compress.layout import (
    attention_tensors,
    config_json,
    latent_rank,
    unchanged_names,
)
from mla_deploy.quant.compress.methods import LayerTask, Steps, convert_layer
from mla_deploy.quant.compress.options import SELF, ConvertOptions
from mla_deploy.quant.compress.report import ConversionReport, LayerReport, write_report
from mla_deploy.quant.compress.source import Source
from mla_deploy.quant.compress.streams import SourceLayer, Streams, advance, carry, score
from mla_deploy.quant.quantize import COMPANIONS
from mla_deploy.quant.workspace import workspace

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is being done."""

DEFAULT_WINDOW = 512
_LAYERS_FILE = "layers.jsonl"
_GEOMETRY_FILE = "geometry.json"
_PILOT_TOKENS = 4096
_PILOT = Steps(folds=(1,), gammas=(1.0,))
"""Sizes are compared by the first candidate of each layer."""
_DTYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def convert_checkpoint(
    source: Path | str,
    out: Path | str,
    options: ConvertOptions,
    progress: Progress | None = None,
    *,
    force: bool = False,
) -> ConversionReport:
    """Convert a checkpoint into a new folder.

    A killed run leaves `OUT.partial`, from which the same call goes on with the next layer; a
    failed one nothing.

    Args:
        source: folder of a Hugging Face checkpoint of a family in `source.FAMILIES`.
        out: folder to make.
        force: replace an earlier result. It stays until the new one is whole.

    Raises:
        ConfigError, CheckpointError, TokenizerError: the source is broken or not supported.
        UsageError: options that do not fit the model, or too little calibration text.
        OutputError: the output exists, the disk is full, or an unfinished other job is in the way.
    """
    started = time.monotonic()
    opened, out = Source(source), Path(out)
    sizes = candidates(opened.config, options)
    check_output(opened.path, out, _is_ours, force=force)
    windows = calibration_windows(opened, options)
    with workspace(out, _job(opened, options)) as folder:
        run = _Run(opened, options, sizes, windows, folder, progress)
        report = dataclasses.replace(run.all(), seconds=time.monotonic() - started)
        write_report(report, folder)
    return report


def calibration_windows(source: Source, options: ConvertOptions) -> Windows | None:
    """The windows that the options ask for; None without calibration.

    Raises:
        UsageError: too little text, or a window that does not fit.
    """
    if options.no_calibration:
        return None
    context = source.config.max_position_embeddings
    length = options.window or min(DEFAULT_WINDOW, context)
    if not 16 <= length <= context:
        raise UsageError(
            "the window is out of range", found=length, allowed=f"16 to {context}, the context"
        )
    if options.calibration == (SELF,):
        return windows_from_model(source, length, options.tokens, options.seed)
    return windows_from_text(source, options.texts, length, options.tokens, options.seed)


class _Run:
    """Carries a conversion out, from where an earlier run of it stopped."""

    def __init__(
        self,
        source: Source,
        options: ConvertOptions,
        sizes: list[Geometry],
        windows: Windows | None,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self.source, self.config, self.options = source, source.config, options
        self.windows, self.folder, self.progress = windows, folder, progress
        self.sizes = sizes
        self.geometry = sizes[0]
        self.dtype = _DTYPES[source.info("model.embed_tokens.weight").dtype]
        self.is_piloted = len(sizes) > 1 and windows is not None
        layers = self.config.num_hidden_layers
        self.total_steps = layers * (2 if self.is_piloted else 1) + 2
        self.done_steps = 0

    def all(self) -> ConversionReport:
        """Choose the size, convert the layers, and compare."""
        self.geometry = self._choose_geometry()
        writer = ShardWriter(self.folder)
        check_space(self.folder, sum(info.bytes for info in self.source.tensors.values()))
        self._copy(writer, _outer_names(self.source))
        self._step(1, "embedding")
        streams, first = self._resume(writer)
        reports = self._layer_reports()[:first]
        self._step(first, "layers done before")
        for index in range(first, self.config.num_hidden_layers):
            reports.append(self._layer(index, writer, streams))
            self._step(1, f"layer {index}")
        writer.finish()
        held_out = None
        if streams is not None and self.windows is not None:
            held_out = score(
                self.source, streams.held_out, streams.converted, self.windows.held_out
            )
        self._step(1, "comparison")
        self._write_config(reports)
        for name in (_LAYERS_FILE, _GEOMETRY_FILE, self._state(len(reports)).name):
            (self.folder / name).unlink(missing_ok=True)
        return ConversionReport(
            options=self.options,
            source=self.config,
            geometry=self.geometry,
            layers=tuple(reports),
            held_out=held_out,
            calibration_tokens=0 if self.windows is None else self.windows.fitted.numel(),
            resumed_layers=first,
            seconds=0.0,
        )

    def _layer(self, index: int, writer: ShardWriter, streams: Streams | None) -> LayerReport:
        """Convert one layer; its shard, its report and the streams are then on the disk."""
        layer = SourceLayer(self.config, index, load_layer(self.source, index))
        task = self._task(layer, None if streams is None else streams.fitted)
        conversion = convert_layer(task(self.geometry), self.options.method)
        error = math.nan if streams is None else advance(layer, streams, conversion.weights)
        report = LayerReport(
            layer=index,
            rope_loss=conversion.rope_loss,
            rank_loss=conversion.rank_loss,
            output_error=error,
            choices=conversion.choices,
            inv_freq=tuple(conversion.weights.inv_freq.tolist()),
        )
        with writing(self.folder), (self.folder / _LAYERS_FILE).open("a") as handle:
            # A new line first: a kill may have cut off the last one.
            handle.write("\n" + json.dumps(dataclasses.asdict(report)))
        attention = attention_tensors(
            self.config,
            self.geometry,
            layer.weights,
            conversion.weights,
            self.options.layout,
            conversion.latent_power,
        )
        prefix = f"model.layers.{index}."
        if not writer.is_done(f"{prefix}self_attn.o_proj.weight"):
            tensors = {prefix + name: x.to(self.dtype) for name, x in attention.items()}
            tensors |= {name: self.source.read(name).clone() for name in unchanged_names(index)}
            writer.add_all(tensors)
            writer.flush()
        if streams is not None:
            streams.save(self._state(index + 1))
            self._state(index).unlink(missing_ok=True)
        return report

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
        if len(self.sizes) == 1:
            return self.sizes[0]
        if self.windows is None:
            return self.sizes[len(self.sizes) // 2]
        layers = self.config.num_hidden_layers
        file = self.folder / _GEOMETRY_FILE
        if file.exists():
            self._step(layers, "size chosen before")
            return Geometry(**read_json_object(file))
        ids = self.windows.fitted[: max(1, _PILOT_TOKENS // self.windows.fitted.shape[1])]
        fitted = self.source.read("model.embed_tokens.weight")[ids].float()
        converted = [fitted.clone() for _ in self.sizes]
        for index in range(layers):
            layer = SourceLayer(self.config, index, load_layer(self.source, index))
            task = self._task(layer, fitted)
            for size, h in zip(self.sizes, converted, strict=True):
                conversion = convert_layer(task(size), self.options.method, _PILOT)
                carry(layer, h, conversion.weights)
            self._step(1, f"sizes tried, layer {index}")
        losses = [score(self.source, fitted, h, ids).converted_loss for h in converted]
        chosen = self.sizes[min(range(len(losses)), key=losses.__getitem__)]
        with writing(self.folder):
            temporary = self.folder / f".{_GEOMETRY_FILE}.tmp"
            temporary.write_text(json.dumps(dataclasses.asdict(chosen)))
            temporary.rename(file)
        return chosen

    def _resume(self, writer: ShardWriter) -> tuple[Streams | None, int]:
        """The streams in front of the first layer to do, and that layer's number."""
        layers = self.config.num_hidden_layers
        if self.windows is None:
            done = [writer.is_done(unchanged_names(layer)[0]) for layer in range(layers)]
            return None, sum(done)
        for first in range(layers, 0, -1):
            if self._state(first).exists():
                return Streams.load(self._state(first)), first
        return Streams.start(self.source, self.windows), 0

    def _state(self, first: int) -> Path:
        return self.folder / f"streams-{first:05d}.safetensors"

    def _layer_reports(self) -> list[LayerReport]:
        """Of the layers that an earlier run converted, in order, the last word on each."""
        file = self.folder / _LAYERS_FILE
        found: dict[int, LayerReport] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                raw = json.loads(line)
            except ValueError:
                continue
            raw["inv_freq"] = tuple(raw["inv_freq"])
            found[raw["layer"]] = LayerReport(**raw)
        return [found[layer] for layer in sorted(found)]

    def _copy(self, writer: ShardWriter, names: list[str]) -> None:
        for name in names:
            if not writer.is_done(name):
                writer.add(name, self.source.read(name).clone())
        writer.flush()

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
            for name in COMPANIONS:
                if (self.source.path / name).is_file():
                    shutil.copyfile(self.source.path / name, self.folder / name)
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


def _job(source: Source, options: ConvertOptions) -> dict[str, Any]:
    """What must be equal for a repeated run to go on with the work of another."""
    files = sorted({info.file for info in source.tensors.values()} | set(options.texts))
    seen = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    text = json.dumps([seen, source.raw_config], sort_keys=True)
    return {
        "version": mla_deploy.__version__,
        "source": str(source.path.resolve()),
        "source_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "options": json.loads(json.dumps(dataclasses.asdict(options))),
    }

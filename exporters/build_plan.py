"""What to build, and the steps that it takes: everything that is checked before the first one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_deploy.bundle import MANIFEST
from mla_deploy.cache import cache_record, formats_of_layers
from mla_deploy.config_reader import read_json_object
from mla_deploy.errors import UsageError
from mla_deploy.exporters.onnx.export import TARGETS
from mla_deploy.exporters.tensorrt.build import check_backend
from mla_deploy.exporters.tensorrt.capability import DEFAULT, capability
from mla_deploy.families import CONVERTIBLE
from mla_deploy.quant.calibrate import AUTO
from mla_deploy.quant.compress.geometry import candidates
from mla_deploy.quant.compress.options import SELF, ConvertOptions
from mla_deploy.quant.compress.source import Source
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.recipe import RECIPE_KEY
from mla_deploy.tokenizer_files import checked_tokenizer


@dataclass(frozen=True)
class BuildOptions:
    """How to build; None stands for a default. The single steps have more to choose."""

    target: str = "cpu"
    """What the bundle is to run on: cpu, cuda, or a GPU to build a TensorRT engine for."""
    kv: str | None = None
    """The cache record, as of `QuantizeOptions`. Default: int4."""
    weights: str | None = None
    """The format of matrices, as of `QuantizeOptions`. Default: int4."""
    calibration: tuple[str, ...] = ()
    """Text files that conversion and quantisation measure on, or, to convert, `self`."""
    target_ratio: float | None = None
    """The cache of a converted model against the source's, as of `ConvertOptions`."""

    def quantized_by(self) -> dict[str, Any]:
        """What is not left to the default, of the options of quantisation."""
        texts = tuple(str(Path(text).resolve()) for text in self.texts)
        given = {"kv": self.kv, "weights": self.weights, "calibration": texts or None}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def texts(self) -> tuple[str, ...]:
        """The calibration texts that are files."""
        return tuple(text for text in self.calibration if text != SELF)


@dataclass(frozen=True)
class BuildPlan:
    """The steps that a model needs; None: this one not."""

    convert: ConvertOptions | None
    quantize: QuantizeOptions | None


def plan_build(source: Path, options: BuildOptions) -> BuildPlan:
    """The steps, after checking all that is known before the first."""
    _check_target(options.target)
    if (source / MANIFEST).is_file():
        raise UsageError(
            f"{source} is a bundle already", hint=f'run it: mla-deploy run {source} "..."'
        )
    raw = read_json_object(source / "config.json")
    checked_tokenizer(source)
    if raw.get(RECIPE_KEY) is not None:
        _refuse_any(
            {**options.quantized_by(), "target_ratio": options.target_ratio},
            f"{source} is quantised already, and only exported",
            "leave it out, or build from the checkpoint that this one was made from",
        )
        return BuildPlan(None, None)
    convert = None
    if raw.get("model_type") in CONVERTIBLE:
        convert = _conversion(source, options)
    else:
        _refuse_any(
            {"target_ratio": options.target_ratio},
            f"the attention of {source} is latent already, and not converted",
            "leave it out; --kv chooses the format of the cache",
        )
        if SELF in options.calibration:
            raise UsageError(
                "only a conversion can measure on text of the model's own",
                found=f"--calibration {SELF}, and {source} is not converted",
                hint="give a text file, or leave --calibration out",
            )
    if AUTO in (options.kv, options.weights):
        raise UsageError(
            "formats are chosen for each layer under a budget, for which `build` has no option",
            found=AUTO,
            hint="quantize by itself: mla-deploy quantize --help; then build from its result",
        )
    quantize = QuantizeOptions(**options.quantized_by())
    if convert is not None:
        _check_cache(source, convert, quantize)
    return BuildPlan(convert, quantize)


def _check_target(target: str) -> None:
    engines = capability(DEFAULT)
    if target in engines.targets:
        check_backend(engines, [target])
    elif target not in TARGETS:
        raise UsageError(
            "bundles are not built for this target",
            found=target,
            allowed=", ".join((*TARGETS, *engines.targets)),
            hint="engines for other GPUs, Jetsons among them, are built on the device: "
            "quantize, then export --to tensorrt (docs/tensorrt.md)",
        )


def _refuse_any(given: dict[str, Any], what: str, hint: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(what, found="--" + name.replace("_", "-"), hint=hint)


def _conversion(source: Path, options: BuildOptions) -> ConvertOptions:
    """Both of its options are asked for, because a conversion loses something for good."""
    needed = {"--target-ratio": options.target_ratio, "--calibration": options.calibration or None}
    if missing := [name for name, value in needed.items() if value is None]:
        raise UsageError(
            f"the attention of {source} is not latent yet, and to convert it needs a size and a "
            "text to measure on",
            found=f"no {' and no '.join(missing)}",
            allowed=f"a ratio up to 1; text files, or {SELF}: the model writes the text",
            hint="for instance: --target-ratio 0.3125 --calibration TEXT (docs/conversion.md)",
        )
    return ConvertOptions(target_ratio=options.target_ratio, calibration=options.calibration)


def _check_cache(source: Path, convert: ConvertOptions, quantize: QuantizeOptions) -> None:
    """Raise a ConfigError now where the cache of the converted model cannot be of that format."""
    config = Source(source).config
    formats = formats_of_layers(config.num_hidden_layers, quantize.kv, quantize.kv_first)
    for size in candidates(config, convert):
        for name in dict.fromkeys(formats):
            cache_record(name).parts(size.kv_lora_rank, size.qk_rope_head_dim)

"""`quantize_checkpoint`: from a Hugging Face checkpoint to a smaller one that says how it was made.

The source is read and the output written tensor by tensor, so that memory does not grow with the
model: about one shard (128 MiB) and one matrix are held.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.config_reader import read_json_object
from mla_deploy.errors import CheckpointError, ConfigError, UsageError
from mla_deploy.job import job_of
from mla_deploy.output import check_output, check_space, writing
from mla_deploy.progress import Progress
from mla_deploy.quant.cache_choice import (
    AXES_FILE,
    CacheChoices,
    choose_cache,
    load_choices,
    save_choices,
)
from mla_deploy.quant.calibrate import AUTO
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.feedback import MOMENTS_FILE, measure_moments, moments_of
from mla_deploy.quant.hqq_source import open_source, options_of_source
from mla_deploy.quant.options import QuantizeOptions, recipe_for
from mla_deploy.quant.plan import Moments, Outcome, Plan, Step, make_plan
from mla_deploy.quant.weight_choice import (
    WeightChoices,
    check_weight_budget,
    choose_weights,
    load_weight_choices,
    save_weight_choices,
)
from mla_deploy.quant.weight_loss import Layers
from mla_deploy.recipe import RECIPE_KEY, Recipe
from mla_deploy.shards import ShardWriter
from mla_deploy.tokenizer_files import check_tokenizer_if_any, copy_to_checkpoint
from mla_deploy.workspace import workspace

_ERRORS_FILE = ".errors.jsonl"
"""In the partial folder: the error of each matrix done, so that a resumed run can report them."""
_SCRATCH = (_ERRORS_FILE, AXES_FILE, MOMENTS_FILE)


@dataclass
class KindReport:
    """What became of one kind of matrix."""

    tensors: int = 0
    parameters: int = 0
    source_bytes: int = 0
    output_bytes: int = 0
    squared_error: float = 0.0
    squared_sum: float = 0.0

    @property
    def nmse(self) -> float | None:
        """Squared error relative to the squared weights; None where nothing was quantised."""
        return self.squared_error / self.squared_sum if self.squared_sum > 0 else None


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_checkpoint` did."""

    recipe: Recipe
    source_bytes: int
    """Of the source's tensors that are used, each once."""
    output_bytes: int
    """Of the tensors written."""
    kinds: dict[str, KindReport]
    skipped: dict[str, tuple[str, ...]]
    """Tensors of the source that have no place in the output, by reason."""
    resumed_bytes: int
    """Written by an earlier, interrupted run."""
    seconds: float
    cache: CacheChoices | None = None
    """What the calibration found, if there was one."""
    weights: WeightChoices | None = None
    """What `--weights auto` found."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        kinds = {
            name: {
                "tensors": kind.tensors,
                "parameters": kind.parameters,
                "source_bytes": kind.source_bytes,
                "output_bytes": kind.output_bytes,
                "nmse": kind.nmse,
            }
            for name, kind in self.kinds.items()
        }
        return {
            "recipe": self.recipe.to_json(),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "kinds": kinds,
            "skipped": {reason: len(names) for reason, names in self.skipped.items()},
            "resumed_bytes": self.resumed_bytes,
            "seconds": self.seconds,
            "calibration": None if self.cache is None else self.cache.to_json(),
            "weight_bits": None if self.weights is None else self.weights.to_json(),
        }


def quantize_checkpoint(
    source: Path | str,
    out: Path | str,
    options: QuantizeOptions | None = None,
    progress: Progress | None = None,
    *,
    say: Callable[[str], None] | None = None,
    force: bool = False,
) -> QuantizeReport:
    """Quantise a checkpoint into a new folder.

    A run that was killed, or that failed with something finished, leaves `OUT.partial`, from which
    the same call goes on.

    Args:
        source: folder of a Hugging Face checkpoint.
        out: folder to make.
        say: told what the person at the terminal should know when it fails.
        force: replace an earlier result. It stays until the new one is whole.

    Raises:
        ConfigError, CheckpointError, TokenizerError: the source is broken or not supported.
        UsageError: options that do not fit the model, or a calibration text that is no use.
        OutputError: the output exists, the disk is full, or an unfinished other job is in the way.
    """
    started = time.monotonic()
    source, out = Path(source), Path(out)
    options = options or QuantizeOptions()
    checkpoint = open_source(source)
    options = options_of_source(checkpoint, options)
    raw_config = read_json_object(source / "config.json")
    if raw_config.get(RECIPE_KEY) is not None:
        raise CheckpointError(
            f"{source} is quantised already", hint="quantize the checkpoint it was made from"
        )
    config = checkpoint.config
    check_tokenizer_if_any(source)
    if options.calibration and type(checkpoint) is not Checkpoint:
        raise UsageError(
            "a checkpoint that is quantised already cannot be calibrated",
            found=f"{source}, and --calibration",
            hint="calibrate with the original checkpoint, or leave --calibration out",
        )
    recipe = recipe_for(config, options)
    plan = make_plan(checkpoint, replace(config, recipe=recipe))
    if options.allocated:
        check_weight_budget(plan, options.allocated, options.weights_budget or 0.0)
    output = check_output(source, out, _is_ours, force=force)
    text = None
    if options.calibration:
        text = CalibrationText.read(options.calibration, source, config)
    choices: CacheChoices | None = None
    weights: WeightChoices | None = None
    texts = [Path(name) for name in options.calibration]
    job = job_of("quantize", [source], {**dataclasses.asdict(options), "calibration": texts}, texts)
    with workspace(output, job, scratch=_SCRATCH, say=say) as folder:
        moments = None
        if text is not None:
            choices = _calibrate(source, folder, config, text, options, recipe, progress)
            recipe = recipe_for(config, options, choices)
            if options.feedback:
                measure_moments(source, folder, config, text, progress)
                moments = moments_of(folder, config)
            if options.allocated:
                weights = load_weight_choices(folder)
                if weights is None:
                    layers = Layers(
                        checkpoint, config, recipe, choices.rotations, moments, options.allocated
                    )
                    budget = options.weights_budget or 0.0
                    weights = choose_weights(source, config, text, layers, budget, progress)
                    save_weight_choices(folder, weights)
                recipe = weights.recipe(recipe, config.num_hidden_layers)
            plan = make_plan(checkpoint, replace(config, recipe=recipe), choices.rotations)
        run = _Run(checkpoint, plan, folder, progress, moments)
        run.weights()
        raw_config.pop("quantization_config", None)  # the source's, which is the recipe's now
        _write_companions(source, folder, {**raw_config, RECIPE_KEY: recipe.to_json()})
    return QuantizeReport(
        recipe=recipe,
        source_bytes=_source_bytes(checkpoint, plan),
        output_bytes=plan.output_bytes,
        kinds=run.kinds,
        skipped=plan.skipped,
        resumed_bytes=run.resumed_bytes,
        seconds=time.monotonic() - started,
        cache=choices,
        weights=weights,
    )


def _calibrate(
    source: Path,
    folder: Path,
    config: MlaConfig,
    text: CalibrationText,
    options: QuantizeOptions,
    recipe: Recipe,
    progress: Progress | None,
) -> CacheChoices:
    """Calibrate once: a resumed run must fold the very matrices that are in finished shards."""
    choices = load_choices(folder)
    if choices is None:
        formats = None if options.kv == AUTO else recipe.cache_formats(config.num_hidden_layers)
        choices = choose_cache(
            source, config, text, formats, options.kv_budget, options.rotate, progress
        )
        save_choices(folder, choices)
    return choices


@dataclass
class _Run:
    """Carries a plan out, from where an earlier run of it stopped."""

    checkpoint: Checkpoint
    plan: Plan
    folder: Path
    progress: Progress | None
    moments: Moments | None
    kinds: dict[str, KindReport] = field(default_factory=dict)
    resumed_bytes: int = 0

    def weights(self) -> None:
        """Write all tensors and the index."""
        writer = ShardWriter(self.folder)
        self.resumed_bytes = writer.done_bytes
        check_space(self.folder, self.plan.output_bytes - writer.done_bytes)
        errors_file = self.folder / _ERRORS_FILE
        known_errors = _read_errors(errors_file)
        total = sum(step.values for step in self.plan.steps)
        done = 0
        for step in self.plan.steps:
            if writer.is_done(step.outputs[0]):
                self._count(step, *known_errors.get(step.target, (0.0, 0.0)))
            else:
                outcome = step.run(self.checkpoint, self.moments)
                self._count(step, outcome.squared_error, outcome.squared_sum)
                _append_error(errors_file, step, outcome)
                writer.add_all(outcome.tensors)
            done += step.values
            if self.progress is not None:
                self.progress(done, total, step.target)
        writer.finish()

    def _count(self, step: Step, squared_error: float, squared_sum: float) -> None:
        kind = self.kinds.setdefault(step.kind, KindReport())
        kind.tensors += 1
        kind.parameters += step.values
        kind.source_bytes += self.checkpoint.info(step.source).bytes
        kind.output_bytes += step.output_bytes
        kind.squared_error += squared_error
        kind.squared_sum += squared_sum


def _append_error(file: Path, step: Step, outcome: Outcome) -> None:
    """Noted before the tensor's shard is written, so that no finished shard lacks its errors."""
    if step.weight_format is None:
        return
    line = json.dumps([step.target, outcome.squared_error, outcome.squared_sum])
    with writing(file.parent), file.open("a", encoding="utf-8") as handle:
        handle.write(f"\n{line}")  # a new line first: a kill may have cut off the last one


def _read_errors(file: Path) -> dict[str, tuple[float, float]]:
    """What `_append_error` noted; a line may have been cut off by a kill."""
    errors = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            name, squared_error, squared_sum = json.loads(line)
        except ValueError:
            continue
        errors[name] = (squared_error, squared_sum)
    return errors


def _write_companions(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    with writing(folder):
        copy_to_checkpoint(source, folder)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _is_ours(out: Path) -> bool:
    try:
        return RECIPE_KEY in read_json_object(out / "config.json")
    except ConfigError:
        return False


def _source_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    skipped = {name for names in plan.skipped.values() for name in names}
    return sum(info.bytes for name, info in checkpoint.tensors.items() if name not in skipped)

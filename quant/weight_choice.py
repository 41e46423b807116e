"""Which bits the matrices of every layer get, decided by a calibration under a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mla_deploy.config import MlaConfig
from mla_deploy.errors import UsageError
from mla_deploy.model import load_model
from mla_deploy.output import whole_file
from mla_deploy.progress import Progress
from mla_deploy.quant.allocate import Choice, Point, decide
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.plan import Plan, Step
from mla_deploy.quant.weight_loss import BITS, Layers, Part, joint_losses, losses, parts_of
from mla_deploy.recipe import WEIGHT_BITS_FILE, LayerRecipe, Recipe, WeightFormat


@dataclass(frozen=True)
class WeightChoice:
    """One format of the matrices of one kind in one layer."""

    format: str
    bytes: int
    """Codes, scales and zeros."""
    nmse: float
    """Squared error over squared weights."""
    kl: float
    """Mean KL divergence of the prediction if only these matrices are quantised."""


@dataclass(frozen=True)
class WeightItem:
    """The matrices of one kind in one layer: what was measured, and what they get."""

    layer: int
    kind: str
    """`linear` or `experts`."""
    parameters: int
    choices: tuple[WeightChoice, ...]
    chosen: int

    @property
    def choice(self) -> WeightChoice:
        """The one that was taken."""
        return self.choices[self.chosen]


@dataclass(frozen=True)
class WeightChoices:
    """What was measured and what follows."""

    items: tuple[WeightItem, ...]
    budget: float
    """Bits a weight, on average."""
    points: tuple[Point, ...]
    """Their size is bits a weight."""

    @property
    def bits_per_weight(self) -> float:
        """Of the matrices that were chosen for, scales and zeros included."""
        stored = sum(item.choice.bytes for item in self.items)
        return 8 * stored / sum(item.parameters for item in self.items)

    def recipe(self, recipe: Recipe, layers: int) -> Recipe:
        """The recipe with each layer's formats; layers that are all alike are not listed."""
        chosen = {(item.layer, item.kind): item.choice.format for item in self.items}

        def of(layer: int, kind: str, known: WeightFormat | None) -> WeightFormat | None:
            # A layer without such matrices is to look like the first that has them.
            first = next((name for (_, k), name in chosen.items() if k == kind), None)
            name = chosen.get((layer, kind), first)
            return known if known is None or name is None else replace(known, bits=BITS[name])

        each = []
        for layer in range(layers):
            own = recipe.of_layer(layer)
            each.append(
                LayerRecipe(
                    own.cache_format,
                    own.latent_rotation,
                    own.balanced,
                    of(layer, "linear", own.linear),
                    of(layer, "experts", own.experts),
                )
            )
        full = replace(recipe, layers=tuple(each))
        return full if len(set(each)) > 1 else full.of_layer(0)

    def to_json(self) -> dict[str, Any]:
        """For `weight_bits.json` and `--json`."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> WeightChoices:
        """What `to_json` gave."""
        items = tuple(
            WeightItem(**{**one, "choices": tuple(WeightChoice(**c) for c in one["choices"])})
            for one in raw["items"]
        )
        return cls(items, raw["budget"], tuple(Point(**one) for one in raw["points"]))


def check_weight_budget(plan: Plan, kinds: Sequence[str], budget: float) -> None:
    """Raise a UsageError that says the minimum, if the budget is below it.

    Args:
        plan: with all matrices in the smallest format.
        budget: bits a weight.
    """
    steps = [step for part in parts_of(plan, kinds).values() for step in part]
    stored, parameters = _bytes(steps), sum(step.values for step in steps)
    if 8 * stored > budget * parameters:
        smallest = next(iter(BITS))
        raise UsageError(
            f"the budget is below what {smallest} takes with its scales and zeros",
            found=f"{budget:g} bits a weight",
            allowed=f"{math.ceil(8000 * stored / parameters) / 1000:g} bits or more",
        )


def choose_weights(
    source: Path,
    config: MlaConfig,
    text: CalibrationText,
    layers: Layers,
    budget: float,
    progress: Progress | None = None,
) -> WeightChoices:
    """Measure and decide.

    Args:
        source: the unquantised checkpoint.
        config: of it.
        budget: bits a weight on average, scales and zeros included.
    """
    model = load_model(source)
    found = losses(model, config, text, layers, progress)
    parts = {part: sum(s.values for s in steps) for part, steps in layers.parts["int4"].items()}
    measured = {
        part: [
            WeightChoice(
                name,
                _bytes(layers.parts[name][part]),
                found[part, name].nmse,
                found[part, name].kl,
            )
            for name in BITS
        ]
        for part in parts
    }
    names = list(BITS)

    def measure(candidates: Sequence[Sequence[int]]) -> list[float]:
        formats: list[Mapping[Part, str]] = [
            {part: names[at] for part, at in zip(parts, chosen, strict=True)}
            for chosen in candidates
        ]
        return joint_losses(model, config, text, layers, formats, progress)

    items = [[Choice(c.format, c.bytes, c.kl) for c in measured[part]] for part in parts]
    unit = sum(parts.values()) / 8
    chosen, points = decide(items, budget * unit, unit, measure)
    return WeightChoices(
        tuple(
            WeightItem(part.layer, part.kind, parts[part], tuple(measured[part]), at)
            for part, at in zip(parts, chosen, strict=True)
        ),
        budget,
        points,
    )


def save_weight_choices(folder: Path, choices: WeightChoices) -> None:
    """Write `weight_bits.json`."""
    text = json.dumps(choices.to_json(), indent=1) + "\n"
    with whole_file(folder / WEIGHT_BITS_FILE) as file:
        file.write_text(text, encoding="utf-8")


def load_weight_choices(folder: Path) -> WeightChoices | None:
    """What `save_weight_choices` wrote; None if it did not come to that."""
    file = folder / WEIGHT_BITS_FILE
    if not file.exists():
        return None
    return WeightChoices.from_json(json.loads(file.read_text(encoding="utf-8")))


def _bytes(steps: Sequence[Step]) -> int:
    return sum(step.output_bytes for step in steps)

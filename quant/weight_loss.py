"""What each number of bits costs in each layer's matrices, measured on a text.

A layer of the unquantised model is exchanged for the one that would ship: its matrices go through
the steps of the plan, folded and with error feedback where that is asked for, and are computed in
the form they are stored in. The cache stays in float32, so that the loss is the matrices' alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.families import family_of
from mla_deploy.model import load_parameters
from mla_deploy.modules.decoder import Decoder, DecoderLayer
from mla_deploy.progress import Progress
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.fold import LatentRotation
from mla_deploy.quant.plan import Moments, Outcome, Plan, Step, make_plan
from mla_deploy.quant.window_run import WindowRun, divergence
from mla_deploy.recipe import Recipe, WeightFormat

BITS = {"int4": 4, "int8": 8}
"""What `--weights auto` chooses from."""
FLOAT = "none"
State = tuple[torch.Tensor, torch.Tensor | None]
"""x and residual between two layers."""


@dataclass(frozen=True)
class Part:
    """The matrices of one kind in one layer."""

    layer: int
    kind: str
    """`linear`: of attention, dense and shared feed-forward; or `experts`."""


def parts_of(plan: Plan, kinds: Sequence[str]) -> dict[Part, list[Step]]:
    """The steps of a plan that quantise matrices of these kinds, by part, in the model's order."""
    found: dict[Part, list[Step]] = {}
    for step in plan.steps:
        if step.kind in kinds and step.weight_format is not None:
            found.setdefault(Part(int(step.target.split(".")[2]), step.kind), []).append(step)
    return dict(sorted(found.items(), key=lambda item: (item[0].layer, item[0].kind)))


class Layers:
    """Makes layers with matrices in any of the formats.

    Args:
        config: of the unquantised model.
        recipe: of the model to be, with a format for each of `kinds`; their bits do not matter.
        rotations: of each layer's latent.
        kinds: of the matrices to quantise; all others stay in floating point.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: MlaConfig,
        recipe: Recipe,
        rotations: Sequence[LatentRotation | None],
        moments: Moments | None,
        kinds: Sequence[str],
    ) -> None:
        self._checkpoint, self._config, self._moments = checkpoint, config, moments
        self._recipe, self._kinds = recipe, kinds
        self._plans = {
            name: make_plan(
                checkpoint,
                replace(config, recipe=self._with(dict.fromkeys(kinds, name))),
                rotations,
            )
            for name in (FLOAT, *BITS)
        }
        self.parts = {name: parts_of(plan, kinds) for name, plan in self._plans.items()}

    def layer(self, index: int) -> Layer:
        """A layer, in all its formats."""
        prefix = f"model.layers.{index}."
        steps = {
            name: {
                output: step
                for step in plan.steps
                if step.target.startswith(prefix)
                for output in step.outputs
            }
            for name, plan in self._plans.items()
        }
        return Layer(self, index, steps)

    def build(self, index: int, formats: Mapping[str, str]) -> DecoderLayer:
        """The layer with a format for each kind, without storage; kinds not named are in floats."""
        config = replace(self._config, recipe=self._with(formats))
        family = family_of(config.model_type, str(self._checkpoint.path))
        return family.layer(config, index)

    def run(self, step: Step) -> Outcome:
        """The tensors of a step."""
        return step.run(self._checkpoint, self._moments)

    def _with(self, formats: Mapping[str, str]) -> Recipe:
        def of(kind: str, known: WeightFormat | None) -> WeightFormat | None:
            bits = BITS.get(formats.get(kind, FLOAT))
            return None if bits is None or known is None else replace(known, bits=bits)

        linear, experts = of("linear", self._recipe.linear), of("experts", self._recipe.experts)
        layers = tuple(replace(one, linear=linear, experts=experts) for one in self._recipe.layers)
        return replace(self._recipe, linear=linear, experts=experts, layers=layers)


class Layer:
    """One layer in every format. A matrix is quantised once for each."""

    def __init__(self, owner: Layers, index: int, steps: dict[str, dict[str, Step]]) -> None:
        self._owner, self._index, self._steps = owner, index, steps
        self._made: dict[tuple[str, str], Outcome] = {}

    def module(self, formats: Mapping[str, str]) -> DecoderLayer:
        """The layer with a format for each kind, with its weights."""

        def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            step, form = self._steps[FLOAT].get(name), FLOAT
            if step is None:
                kind = self._steps[next(iter(BITS))][name].kind
                form = formats[kind]
                step = self._steps[form][name]
            return self._outcome(step, form).tensors[name]

        module = self._owner.build(self._index, formats)
        load_parameters(module, read)
        return module

    def relative_error(self, steps: Sequence[Step], form: str) -> float:
        """Squared error over squared weights of those steps' matrices."""
        found = [self._outcome(step, form) for step in steps]
        energy = sum(one.squared_sum for one in found)
        return sum(one.squared_error for one in found) / energy if energy > 0 else 0.0

    def _outcome(self, step: Step, form: str) -> Outcome:
        key = form, step.target
        if key not in self._made:
            self._made[key] = self._owner.run(step)
        return self._made[key]


@dataclass(frozen=True)
class Loss:
    """Of one part in one format, alone."""

    nmse: float
    """Squared error over squared weights."""
    kl: float
    """Mean KL divergence of the prediction, in nats."""


@torch.no_grad()
def losses(
    model: Decoder,
    config: MlaConfig,
    text: CalibrationText,
    layers: Layers,
    progress: Progress | None = None,
) -> dict[tuple[Part, str], Loss]:
    """Measure every part in every format, all else being exact.

    Args:
        model: unquantised, with its weights.
    """
    runs = [WindowRun(model, config, ids) for ids in text.windows]
    states: list[State] = [run.start for run in runs]
    sums: dict[tuple[Part, str], float] = {}
    errors: dict[tuple[Part, str], float] = {}
    total, done = len(runs) * config.num_hidden_layers, 0
    for index in range(config.num_hidden_layers):
        layer = layers.layer(index)
        modules: dict[tuple[Part, str], DecoderLayer] = {}
        for name in BITS:
            for part, steps in layers.parts[name].items():
                if part.layer == index:
                    modules[part, name] = layer.module({part.kind: name})
                    errors[part, name] = layer.relative_error(steps, name)
        for place, run in enumerate(runs):
            exact = run.layer(index, *states[place])
            expected = _rest(run, index, exact)
            for key, module in modules.items():
                with replaced(model, index, module):
                    found = run.layer(index, *states[place])
                gap = divergence(expected, _rest(run, index, found))
                sums[key] = sums.get(key, 0.0) + gap
            states[place] = exact
            done += 1
            if progress is not None:
                progress(done, total, f"bits of layer {index}")
    positions = sum(len(ids) for ids in text.windows)
    return {key: Loss(errors[key], sums[key] / positions) for key in sums}


@torch.no_grad()
def joint_losses(
    model: Decoder,
    config: MlaConfig,
    text: CalibrationText,
    layers: Layers,
    candidates: Sequence[Mapping[Part, str]],
    progress: Progress | None = None,
) -> list[float]:
    """Mean KL divergence with a format for every part, all at once, for each candidate."""
    runs = [WindowRun(model, config, ids) for ids in text.windows]
    exact: list[State] = [run.start for run in runs]
    found: list[list[State]] = [[run.start for run in runs] for _ in candidates]
    total = config.num_hidden_layers
    for index in range(total):
        layer = layers.layer(index)
        for formats, states in zip(candidates, found, strict=True):
            own = {part.kind: name for part, name in formats.items() if part.layer == index}
            with replaced(model, index, layer.module(own)):
                for place, run in enumerate(runs):
                    states[place] = run.layer(index, *states[place])
        for place, run in enumerate(runs):
            exact[place] = run.layer(index, *exact[place])
        if progress is not None:
            progress(index + 1, total, "allocations of bits")
    sums = [0.0] * len(candidates)
    for place, run in enumerate(runs):
        expected = _rest(run, total - 1, exact[place])
        for at, states in enumerate(found):
            sums[at] += divergence(expected, _rest(run, total - 1, states[place]))
    positions = sum(len(ids) for ids in text.windows)
    return [one / positions for one in sums]


@contextmanager
def replaced(model: Decoder, index: int, module: DecoderLayer) -> Iterator[None]:
    """The model with another layer in that place, while the context lasts."""
    original = model.layers[index]
    model.layers[index] = module
    try:
        yield
    finally:
        model.layers[index] = original


def _rest(run: WindowRun, index: int, state: State) -> torch.Tensor:
    """Log-probabilities, given what comes out of that layer."""
    for later in range(index + 1, run.config.num_hidden_layers):
        state = run.layer(later, *state)
    x, residual = state
    assert residual is not None
    return run.log_probabilities(x, residual)

"""Error feedback: what rounding one column loses is made good in the columns that follow.

GPTQ (Frantar et al., 2022): with the second moments `M = X^T X` of a matrix's inputs the error of
its outputs is `tr(E M E^T)`, and passing the error of a column on by the rows of the Cholesky
factor of M^-1 keeps it small. Scale and zero of a group come from our own solver, when its columns'
turn has come, so that they fit what is left to be rounded.

On tiny-mla it takes two fifths off the KL divergence of int4 matrices
(`benchmarks/weight_feedback.py`), and needs a calibration, so that it is an option.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mla_deploy.config import MlaConfig
from mla_deploy.model import build, load_model
from mla_deploy.modules.decoder import Decoder
from mla_deploy.modules.linear import Linear
from mla_deploy.output import whole_file
from mla_deploy.packing import pack
from mla_deploy.progress import Progress
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.hqq import solve
from mla_deploy.quant.weights import QuantizedMatrix, check_group
from mla_deploy.quant.window_run import WindowRun
from mla_deploy.recipe import WeightFormat

DAMPING = 0.01
"""Share of the mean diagonal that is added to the moments, as in GPTQ."""
MOMENTS_FILE = "moments.safetensors"


def quantize_with_feedback(
    matrix: torch.Tensor, moments: torch.Tensor, weight_format: WeightFormat
) -> QuantizedMatrix:
    """Quantise along the last axis, with the second moments of the inputs.

    Shapes: matrix [rows, in] of any float type, moments [in, in] float32.

    Raises:
        UsageError: the group does not divide `in`.
        CheckpointError: values that are too large.
    """
    rows, columns = matrix.shape
    group, bits = weight_format.group, weight_format.bits
    check_group(group, columns)
    original = matrix.float()
    left = original.clone()
    factor = _inverse_factor(moments)
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    scales, zeros = [], []
    squared_error = 0.0
    for start in range(0, columns, group):
        end = start + group
        solved = solve(left[:, start:end].contiguous(), bits, weight_format.zeros)
        scale, zero = solved.scale.float()[:, 0], solved.zero.float()[:, 0]
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        errors = torch.empty(rows, group)
        for at, column in enumerate(range(start, end)):
            code = (left[:, column] * inverse + zero).round().clamp(0, 2**bits - 1)
            codes[:, column] = code.to(torch.uint8)
            restored = (code - zero) * scale
            errors[:, at] = (left[:, column] - restored) / factor[column, column]
            left[:, column:end] -= errors[:, at, None] * factor[column, column:end]
            squared_error += float((restored - original[:, column]).double().square().sum())
        left[:, end:] -= errors @ factor[start:end, end:]
        scales.append(solved.scale)
        zeros.append(solved.zero)
    energy = float(original.double().square().sum())
    return QuantizedMatrix(
        pack(codes, bits), torch.cat(scales, 1), torch.cat(zeros, 1), squared_error, energy
    )


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped moments. Shapes: [in, in] to the same."""
    damped = moments.double()
    # An input that is always zero has no moment at all; one step of the mean keeps it regular.
    mean = damped.diagonal().mean().clamp_min(1e-30)
    damped = damped + DAMPING * mean * torch.eye(len(damped), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


@torch.no_grad()
def measure_moments(
    source: Path,
    folder: Path,
    config: MlaConfig,
    text: CalibrationText,
    progress: Progress | None = None,
) -> None:
    """Run the text through the unquantised model and write the moments of all inputs to `folder`.

    Routed experts are left out: each sees too few tokens of a calibration.
    """
    if (folder / MOMENTS_FILE).exists():
        return
    model = load_model(source)
    found: dict[str, torch.Tensor] = {}

    def add(name: str, _: Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        square = x.T @ x
        found[name] = found[name] + square if name in found else square

    for names, module in _matrices(model):
        module.register_forward_pre_hook(functools.partial(add, names[0]))
    for done, ids in enumerate(text.windows, 1):
        run = WindowRun(model, config, ids)
        (*_, (x, residual)) = run.layer_inputs()
        run.log_probabilities(*run.layer(config.num_hidden_layers - 1, x, residual))
        if progress is not None:
            progress(done, len(text.windows), "moments of the inputs")
    with whole_file(folder / MOMENTS_FILE) as file:
        save_file(found, file)


def moments_of(folder: Path, config: MlaConfig) -> Callable[[str], torch.Tensor | None]:
    """Gives the moments of the inputs of a matrix by its name; None where none were measured."""
    owner = {name: names[0] for names, _ in _matrices(build(config)) for name in names}
    if config.tie_word_embeddings:
        owner["lm_head"] = owner["model.embed_tokens"]

    def read(name: str) -> torch.Tensor | None:
        if name not in owner:
            return None
        with safe_open(folder / MOMENTS_FILE, framework="pt") as file:
            moments: torch.Tensor = file.get_tensor(owner[name])
        return moments

    return read


def _matrices(model: Decoder) -> list[tuple[Sequence[str], Linear]]:
    """Linear modules with the names, in the checkpoint, of the matrices joined in them."""
    found: list[tuple[Sequence[str], Linear]] = []
    for module in model.modules():
        if isinstance(module, Linear):
            leaf = "weight" if module.weight_format is None else "codes"
            names = [
                name.removesuffix(f".{leaf}")
                for name in module.sources[leaf].tensors()
                if name.endswith(f".{leaf}")
            ]
            found.append((names, module))
    return found

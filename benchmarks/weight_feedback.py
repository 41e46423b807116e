"""Whether error feedback pays for int4 weights: GPTQ against the solver a matrix for itself.

    python benchmarks/weight_feedback.py [MODEL] TEXT --calibration TEXT [--tokens 2048]

Quantises the matrices of attention and of dense and shared feed-forward (the routed experts stay as
they are) to int4 with whole zeros, group 32, in two ways: each group for itself, and column by
column with the error of each passed on to those that follow, by the inverse of the inputs' second
moments (GPTQ, Frantar et al., 2022). Prints the error of the outputs on the calibration text, and
the KL divergence on the other text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from cache_study import fused

from mla_deploy.evaluate.text import encode_text, read_text
from mla_deploy.families import load_config
from mla_deploy.model import load_model
from mla_deploy.modules.decoder import Decoder
from mla_deploy.modules.linear import Linear
from mla_deploy.ops import attention
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.hqq import solve
from mla_deploy.quant.window_run import WindowRun
from mla_deploy.tokenizer import Tokenizer

GROUP = 32
DAMPING = 0.01
"""Share of the mean diagonal that is added to the second moments, as GPTQ's authors do."""


def alone(weight: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each group for itself. Shapes: [out, in] to the same."""
    found = solve(weight.reshape(-1, GROUP), 4, "integer")
    restored = (found.codes.float() - found.zero.float()) * found.scale.float()
    return restored.reshape(weight.shape)


def feedback(weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """GPTQ. Shapes: weight [out, in], moments [in, in], to [out, in]."""
    size = weight.shape[1]
    damped = moments.double() + DAMPING * moments.diag().mean() * torch.eye(size)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    upper = upper.float()
    left = weight.clone()
    restored = torch.empty_like(weight)
    for start in range(0, size, GROUP):
        found = solve(left[:, start : start + GROUP].contiguous(), 4, "integer")
        scale, zero = found.scale.float()[:, 0], found.zero.float()[:, 0]
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        for column in range(start, start + GROUP):
            code = (left[:, column] * inverse + zero).round().clamp(0, 15)
            restored[:, column] = (code - zero) * scale
            error = (left[:, column] - restored[:, column]) / upper[column, column]
            left[:, column:] -= error[:, None] * upper[column, column:]
    return restored


def linears(model: Decoder) -> dict[str, Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module is not model.epilogue.lm_head
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("model", type=Path, nargs="?", default=root / "examples/models/tiny-mla")
    parser.add_argument("text", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()

    attention.attend_absorbed = fused
    config, model = load_config(args.model), load_model(args.model)
    text = CalibrationText.read([args.calibration], args.model, config, args.tokens)
    moments: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Linear, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            moments[name] = moments.get(name, 0) + x.T @ x

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name)) for name, module in linears(model).items()
    ]
    for ids in text.windows:
        probabilities(model, config, ids)
    for handle in handles:
        handle.remove()
    corpus = encode_text(Tokenizer.open(args.model), read_text(args.text))
    stretches = [corpus.ids[start : start + 512] for start in range(0, args.tokens, 512)]
    expected = [probabilities(model, config, ids) for ids in stretches]
    originals = {name: module.weight.data.clone() for name, module in linears(model).items()}
    print("| int4, group 32, whole zeros | NMSE | output error | KL |\n|---|---|---|---|")
    for title, method in (("each group for itself", alone), ("with error feedback", feedback)):
        noise = energy = output_noise = output_energy = 0.0
        for name, module in linears(model).items():
            original = originals[name]
            module.weight.data = method(original, moments[name])
            gap = module.weight.data - original
            noise += float(gap.square().sum())
            energy += float(original.square().sum())
            output_noise += float(((gap @ moments[name]) * gap).sum())
            output_energy += float(((original @ moments[name]) * original).sum())
        found = [probabilities(model, config, ids) for ids in stretches]
        kl = torch.cat(
            [
                F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
                for q, p in zip(expected, found, strict=True)
            ]
        )
        print(
            f"| {title} | {noise / energy:.3e} | {(output_noise / output_energy) ** 0.5:.3%} "
            f"| {float(kl.mean()):.5f} |",
            flush=True,
        )


def probabilities(model: Decoder, config: object, ids: tuple[int, ...]) -> torch.Tensor:
    run = WindowRun(model, config, ids)  # type: ignore[arg-type]
    state = run.start
    for layer in range(len(model.layers)):
        state = run.layer(layer, *state)
    return run.log_probabilities(*state)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

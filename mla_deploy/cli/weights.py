"""The weight formats that `inspect` shows beside the model's own."""

from __future__ import annotations

from mla_deploy.recipe import Recipe, WeightFormat


def _all(bits: int) -> Recipe:
    each = WeightFormat(bits, 64)
    return Recipe(
        linear=each, experts=each, embedding=WeightFormat(8, 64), lm_head=each, half_precision=True
    )


inspection_recipes = {"int4": _all(4), "int8": _all(8)}

"""The weight formats that `inspect` shows beside the model's own."""

from __future__ import annotations

import functools

from mla_deploy.quant.options import QuantizeOptions, recipe_for

WEIGHT_RECIPES = {
    "int4": functools.partial(recipe_for, options=QuantizeOptions(kv="fp16", weights="int4")),
    "int8": functools.partial(recipe_for, options=QuantizeOptions(kv="fp16", weights="int8")),
}
"""What `mla-deploy quantize --weights NAME` makes of a model. The cache, which every latent fits
here, has no part in the bytes of the weights."""

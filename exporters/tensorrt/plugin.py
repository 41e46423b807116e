"""The decoder for TensorRT with the plugin: LatentAttention stays one node, over a cache of pages.

The node is that of the ONNX bundle, and the plugin (`runtime/csrc/tensorrt/`) runs the CUDA kernels
in it. Everything else is spelled as without the plugin. Inputs, beside those of `target.py`:

| name | type | shape |
|---|---|---|
| `new_lengths` | int64 | [1] |
| `block_table` | int64 | [1, M] |
| `cache.{layer}.{part}` | the part's; codes are int8 | [pages, *page_shape] |

and outputs: `logits`, `present.{layer}.{part}` as the inputs, to be bound to the same memory.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch

from mla_deploy.cache import CachePart
from mla_deploy.config import MlaConfig
from mla_deploy.errors import ConfigError
from mla_deploy.exporters.onnx.attention_function import ATTENTION_DOMAIN
from mla_deploy.exporters.onnx.attention_node import latent_attention
from mla_deploy.exporters.onnx.builder import DTYPES, GraphBuilder
from mla_deploy.exporters.onnx.graph import SEQUENCE_INPUTS
from mla_deploy.exporters.tensorrt.capability import Capability
from mla_deploy.exporters.tensorrt.target import TensorRt

CACHE_FORMATS = ("int4", "int8", "fp16")
RANKS = (256, 512)
ROPES = (16, 32, 48, 64)


def check_plugin(config: MlaConfig) -> None:
    """Raise a ConfigError for a model that the CUDA kernels cannot compute (`cuda.h`)."""
    choices: list[tuple[str, object, tuple[object, ...]]] = [
        ("kv_lora_rank", config.kv_lora_rank, RANKS),
        ("qk_rope_head_dim", config.qk_rope_head_dim, ROPES),
    ]
    for name in config.recipe.cache_formats(config.num_hidden_layers):
        choices.append(("cache format", name, CACHE_FORMATS))
    for name, value, allowed in choices:
        if value not in allowed:
            raise _refused(name, value, ", ".join(str(one) for one in allowed))
    for name, size in (
        ("qk_nope_head_dim", config.qk_nope_head_dim),
        ("v_head_dim", config.v_head_dim),
    ):
        if size % 8 or not 8 <= size <= 1024:
            raise _refused(name, size, "a multiple of 8, 8 to 1024")
    if config.num_attention_heads > 128:
        raise _refused("number of heads", config.num_attention_heads, "1 to 128")


def _refused(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(
        f"the plugin's kernels cannot compute this {name}",
        found=value,
        allowed=allowed,
        hint="export without --plugin",
    )


class TensorRtPlugin(TensorRt):
    """A graph for TensorRT's parser and the plugin."""

    sequence_inputs = tuple(SEQUENCE_INPUTS)

    def __init__(self, capability: Capability, dtype: torch.dtype) -> None:
        """Args:
        dtype: of activations, float matrices and scales.
        """
        super().__init__(capability, dtype)
        self.table = {
            **self.table,
            torch.ops.mla_deploy.latent_attention.default: partial(
                latent_attention, weight_dtype=torch.float16
            ),
        }
        self.opset_imports = {**self.opset_imports, ATTENTION_DOMAIN: 1}

    def cache_input(self, builder: GraphBuilder, layer: int, part: CachePart) -> ir.Value:
        name = f"cache.{layer}.{part.name}"
        return builder.input(name, _plugin_dtype(part), ("pages", *part.page_shape))

    def cache_value(self, builder: GraphBuilder, value: ir.Value, part: CachePart) -> ir.Value:
        return value

    def cache_output(
        self, builder: GraphBuilder, value: ir.Value, layer: int, part: CachePart
    ) -> ir.Value:
        value.name = f"present.{layer}.{part.name}"
        value.type = ir.TensorType(DTYPES[_plugin_dtype(part)])
        value.shape = ir.Shape(["pages", *part.page_shape])
        return value


def _plugin_dtype(part: CachePart) -> torch.dtype:
    """Plugins take no uint8; the bytes are the same."""
    return torch.int8 if part.dtype is torch.uint8 else part.dtype

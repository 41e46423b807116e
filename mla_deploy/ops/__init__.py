"""The deployment ops: the seam between model families and targets.

A family is written with plain torch and these ops; a target lowers these ops. Each op has a
reference implementation in torch, which is the oracle of every target, and a shape function for
tracing. A new family touches no lowering; a new target touches no family.

| op | meaning |
|---|---|
| `rms_norm`, `add_rms_norm` | RMSNorm, alone or after the residual addition |
| `linear_quantized`, `embedding_quantized` | a product with, or rows of, a quantised matrix |
| `swiglu` | `silu(gate) * up` of a joined [gate, up] |
| `moe`, `moe_quantized` | the routed experts, router scores in |
| `latent_attention` | everything between the projections into and out of MLA |

May import nothing of ours but `mla_deploy.packing`, `mla_deploy.cache` and `mla_deploy.errors`.
"""

from mla_deploy.ops.attention import latent_attention
from mla_deploy.ops.linear import embedding_quantized, linear_quantized
from mla_deploy.ops.moe import moe, moe_quantized
from mla_deploy.ops.norm import add_rms_norm, rms_norm
from mla_deploy.ops.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "embedding_quantized",
    "latent_attention",
    "linear_quantized",
    "moe",
    "moe_quantized",
    "rms_norm",
    "swiglu",
]

"""What is measured of a layer: second moments of its queries, keys and values.

Nothing of the size of the text is kept. The moments are of q, k and v before the rotary positions
and after the norms on queries and keys, where a model has them; everything behind is linear, so
they are all that a conversion needs.
"""

from __future__ import annotations

import torch

from mla_deploy.quant.compress.source import SourceConfig


class Moments:
    """Sums over the tokens seen, in float64."""

    def __init__(self, config: SourceConfig) -> None:
        heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.groups = groups
        self.tokens = 0
        width = 2 * groups * d
        self._kv = torch.zeros(width, width, dtype=torch.float64)
        self._kv_sum = torch.zeros(width, dtype=torch.float64)
        self._q = torch.zeros(heads, d, d, dtype=torch.float64)
        self._q_norms = torch.zeros(heads, d // 2, dtype=torch.float64)
        self._k_norms = torch.zeros(groups, d // 2, dtype=torch.float64)

    def add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take a batch. Shapes: q [B, H, T, d], k and v [B, G, T, d]."""
        kv = torch.cat((k, v), dim=1).transpose(1, 2).flatten(2).flatten(0, 1)  # [B T, 2 G d]
        by_head = q.transpose(0, 1).flatten(1, 2)  # [H, B T, d]
        # Products in float32 of one batch, sums over the batches in float64.
        self._kv += (kv.T @ kv).double()
        self._kv_sum += kv.double().sum(0)
        self._q += (by_head.transpose(1, 2) @ by_head).double()
        self._q_norms += _pair_norms(q).double().sum((0, 2))
        self._k_norms += _pair_norms(k).double().sum((0, 2))
        self.tokens += kv.shape[0]

    @property
    def kv(self) -> torch.Tensor:
        """E[y y^T] of y = [k; v]. Shapes: [2 G d, 2 G d]."""
        return self._kv / self.tokens

    @property
    def kv_mean(self) -> torch.Tensor:
        """E[y]. Shapes: [2 G d]."""
        return self._kv_sum / self.tokens

    @property
    def q(self) -> torch.Tensor:
        """E[q_h q_h^T]. Shapes: [H, d, d]."""
        return self._q / self.tokens

    @property
    def pair_scores(self) -> torch.Tensor:
        """The 2-norm score of MHA2MLA: `sum_{h in g} E|q_h^[f]| E|k_g^[f]|`. Shapes: [G, d / 2]."""
        queries = (self._q_norms / self.tokens).unflatten(0, (self.groups, -1)).sum(1)
        return queries * self._k_norms / self.tokens


def _pair_norms(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.hypot(a, b)

"""Runs a bundle's graph with nothing but onnxruntime and numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from mla_deploy.bundle import Bundle


class GraphRunner:
    """A batch of sequences over a shared arena, cache bound in place."""

    def __init__(
        self,
        bundle: Bundle,
        sequences: int,
        tokens: int,
        optimize: bool = True,
        ops_library: Path | None = None,
        padding: int = 7,  # which must not matter, but for the last bits
    ) -> None:
        self.padding = padding
        options = onnxruntime.SessionOptions()
        if ops_library is not None:
            options.register_custom_ops_library(str(ops_library))
        options.intra_op_num_threads = 1
        if not optimize:
            level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = level
        self.session = onnxruntime.InferenceSession(
            str(bundle.file(bundle.manifest.graph.path)), options, ["CPUExecutionProvider"]
        )
        pages = -(-tokens // 64)
        # A table in no particular order, so that nobody gets away with ignoring it.
        order = np.random.default_rng(3).permutation(sequences * pages) + 1
        self.block_table = order.reshape(sequences, pages).astype(np.int64)
        self.lengths = np.zeros(sequences, np.int64)
        self.cache: dict[str, Any] = {}
        for index, layer in enumerate(bundle.manifest.cache.layers):
            for part in layer.parts:
                arena = np.zeros((1 + sequences * pages, *part.page_shape), part.dtype)
                value = onnxruntime.OrtValue.ortvalue_from_numpy(arena)
                self.cache[f"{index}.{part.name}"] = value

    def append(self, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Feed each sequence its tokens; gives their logits, one [S, vocab] a sequence."""
        new = np.array([len(one) for one in tokens], np.int64)
        width = int(new.max())
        ids = np.full((len(tokens), width), self.padding, np.int64)
        for row, one in zip(ids, tokens, strict=True):
            row[: len(one)] = one.numpy()
        index = np.tile(np.arange(width, dtype=np.int64), (len(tokens), 1))
        binding = self.session.io_binding()
        binding.bind_output("logits")
        for name, value in (
            ("input_ids", ids),
            ("past_lengths", self.lengths),
            ("new_lengths", new),
            ("block_table", self.block_table),
            ("logit_index", index),
        ):
            binding.bind_cpu_input(name, value)
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(f"cache.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self.session.run_with_iobinding(binding)
        self.lengths = self.lengths + new
        logits = torch.from_numpy(binding.get_outputs()[0].numpy())
        return [one[:count] for one, count in zip(logits, new.tolist(), strict=True)]

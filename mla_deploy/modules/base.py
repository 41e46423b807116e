"""`Block`: a module whose parameters know where they come from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mla_deploy.sources import Source


class Block(nn.Module):
    """Base of the reference modules."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[str, Source] = {}

    def declare(
        self, name: str, shape: tuple[int, ...], source: Source, dtype: torch.dtype = torch.float32
    ) -> None:
        """Add a parameter, without storage until it is loaded."""
        empty = torch.empty(shape, dtype=dtype, device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.sources[name] = source


def parameter_sources(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Source]]:
    """All parameters below a module, with their dotted names and sources."""
    for path, child in module.named_modules():
        if isinstance(child, Block):
            for name, source in child.sources.items():
                yield f"{path}.{name}".lstrip("."), child.get_parameter(name), source


def checkpoint_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of this module holds, with their shapes."""
    return {
        name: shape
        for _, _, source in parameter_sources(module)
        for name, shape in source.tensors().items()
    }

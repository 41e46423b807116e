"""The plan of a quantisation: which tensor of the source becomes what, known before any is read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mla_deploy.checkpoint import Checkpoint, TensorInfo
from mla_deploy.config import MlaConfig
from mla_deploy.errors import CheckpointError
from mla_deploy.model import build, unquantized
from mla_deploy.modules.attention import LatentAttention
from mla_deploy.modules.base import checkpoint_shapes
from mla_deploy.modules.decoder import Decoder, DecoderLayer
from mla_deploy.packing import SUFFIXES
from mla_deploy.quant.feedback import quantize_with_feedback
from mla_deploy.quant.fold import LatentRotation, fold_kv_a, fold_kv_b
from mla_deploy.quant.hqq_source import HqqCheckpoint
from mla_deploy.quant.options import Matrix, matrices
from mla_deploy.quant.weight_axes import weight_rotation
from mla_deploy.quant.weights import quantize_matrix
from mla_deploy.recipe import WeightFormat
from mla_deploy.sources import UpProjection
from mla_deploy.unused import unused_tensors

Transform = Callable[[torch.Tensor], torch.Tensor]
Moments = Callable[[str], torch.Tensor | None]
Rotate = Callable[[], LatentRotation]
"""Gives a rotation when it is needed: that of the weights has to read them first."""
UNFED = frozenset({"experts", "embedding"})
"""Kinds of matrices without error feedback: a table has no inputs, an expert sees few."""


@dataclass(frozen=True)
class Outcome:
    """The tensors that a step gives, and the error it made."""

    tensors: dict[str, torch.Tensor]
    squared_error: float = 0.0
    squared_sum: float = 0.0


@dataclass(frozen=True)
class Step:
    """One tensor of the source on its way into the output."""

    kind: str
    """`linear`, `experts`, `embedding`, `lm_head`, or `other` for what is never quantised."""
    source: str
    target: str
    """The tensor's name; without its suffix if it is quantised."""
    shape: tuple[int, ...]
    weight_format: WeightFormat | None
    transform: Transform | None
    dtype: torch.dtype | None
    """The type of a tensor that stays in floating point; None: as stored."""
    output_bytes: int

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the tensors it writes."""
        if self.weight_format is None:
            return (self.target,)
        return tuple(f"{self.target}.{suffix}" for suffix in SUFFIXES)

    @property
    def values(self) -> int:
        """Numbers in the source tensor."""
        return torch.Size(self.shape).numel()

    def run(self, checkpoint: Checkpoint, moments: Moments | None = None) -> Outcome:
        """Read, transform, quantise.

        Args:
            moments: of the inputs of matrices, for error feedback.

        Raises:
            CheckpointError: as `Checkpoint.read`, or values too large for the output's type.
        """
        if (
            isinstance(checkpoint, HqqCheckpoint)
            and self.weight_format is not None
            and self.transform is None
        ):
            kept = checkpoint.quantized(self.source, self.weight_format)
            if kept is not None:
                return Outcome(kept.tensors(self.target), kept.squared_error, kept.squared_sum)
        tensor = checkpoint.read(self.source, self.shape)
        if self.transform is not None:
            tensor = self.transform(tensor)
        if self.weight_format is None:
            return Outcome({self.target: self._converted(tensor)})
        inputs = None if moments is None or self.kind in UNFED else moments(self.target)
        try:
            if inputs is None:
                matrix = quantize_matrix(tensor, self.weight_format)
            else:
                matrix = quantize_with_feedback(tensor, inputs, self.weight_format)
        except CheckpointError as error:
            error.what = f"{self.source}: {error.what}"
            raise
        return Outcome(matrix.tensors(self.target), matrix.squared_error, matrix.squared_sum)

    def _converted(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.dtype is None:
            return tensor.clone()  # a view would keep the mapped file in memory until it is written
        largest = float(tensor.abs().max())
        if largest > torch.finfo(self.dtype).max:
            raise CheckpointError(
                f"{self.source} has values that {self.dtype} cannot hold",
                found=f"{largest:.3g}",
                allowed=f"up to {torch.finfo(self.dtype).max:.3g}",
                hint="quantize with --embedding none",
            )
        return tensor.to(self.dtype)


@dataclass(frozen=True)
class Plan:
    """All steps, in the order of the output, and the tensors that have no place in it."""

    steps: tuple[Step, ...]
    skipped: dict[str, tuple[str, ...]]
    """Reason to the names of the tensors left out."""

    @property
    def output_bytes(self) -> int:
        """Bytes of the weights that will be written."""
        return sum(step.output_bytes for step in self.steps)


def make_plan(
    checkpoint: Checkpoint,
    config: MlaConfig,
    rotations: Sequence[LatentRotation | None] | None = None,
) -> Plan:
    """Plan the way from an ordinary checkpoint to the model of `config`, which has the recipe.

    Args:
        rotations: of each layer's latent; without, those that the recipe names, of the weights.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or is not known.
    """
    original = build(unquantized(config))
    expected = checkpoint_shapes(original)
    checkpoint.check(expected)
    target = build(config)
    # A tied table is met twice, first as the embedding.
    kinds: dict[str, Matrix] = {}
    for found in matrices(target):
        kinds.setdefault(found.name, found)
    if rotations is None:
        given = _of_weights(checkpoint, original, config)
    else:
        given = [_same(rotation) for rotation in rotations]
    transforms = dict(_transforms(checkpoint, target, config, given))
    steps: dict[str, Step] = {}
    for name, shape in checkpoint_shapes(target).items():
        base = name.rpartition(".")[0]
        matrix = kinds.get(base)
        weight_format = None if matrix is None else matrix.weight_format
        is_quantized = weight_format is not None and name.rpartition(".")[2] in SUFFIXES
        source = f"{base}.weight" if is_quantized else name
        if source not in expected:  # a quantised lm_head of its own where the source ties it
            source = "model.embed_tokens.weight"
        full = expected[source] if is_quantized else shape
        dtype = None if is_quantized else _table_dtype(source, transforms, config)
        step = Step(
            kind="other" if matrix is None else matrix.kind,
            source=source,
            target=base if is_quantized else name,
            shape=full,
            weight_format=weight_format if is_quantized else None,
            transform=transforms.get(source),
            dtype=dtype,
            output_bytes=_output_bytes(full, weight_format if is_quantized else None)
            or _plain_bytes(checkpoint.info(source), dtype),
        )
        steps[step.target] = step
    return Plan(tuple(steps.values()), unused_tensors(checkpoint, expected, config))


def _same(rotation: LatentRotation | None) -> Rotate | None:
    return None if rotation is None else lambda: rotation


def _of_weights(
    checkpoint: Checkpoint, original: Decoder, config: MlaConfig
) -> list[Rotate | None]:
    """The rotations that the recipe names, each made when a matrix first needs it."""

    @functools.lru_cache(maxsize=1)  # the matrices of a layer come one after the other
    def make(layer: int, block: int) -> LatentRotation:
        module = original.layers[layer]
        assert isinstance(module, DecoderLayer)
        return weight_rotation(checkpoint, module, block)

    found: list[Rotate | None] = []
    for layer in range(config.num_hidden_layers):
        block = config.recipe.of_layer(layer).latent_rotation
        found.append(None if block is None else functools.partial(make, layer, block))
    return found


def _transforms(
    checkpoint: Checkpoint,
    model: Decoder,
    config: MlaConfig,
    rotations: Sequence[Rotate | None],
) -> Iterator[tuple[str, Transform]]:
    """What happens to tensors of the source beside quantisation, by name."""
    rank = config.kv_lora_rank
    gamma_folded = config.recipe.gamma_folded and config.has_latent_norm
    for layer, rotation in zip(model.layers, rotations, strict=True):
        if not gamma_folded and rotation is None:
            continue
        module = layer.self_attn
        assert isinstance(module, LatentAttention)
        up = module.sources["w_uk"]
        assert isinstance(up, UpProjection)
        prefix = up.kv_b_proj.name.removesuffix("kv_b_proj.weight")
        gamma_name = f"{prefix}kv_a_layernorm.weight" if gamma_folded else None

        def fold_b(
            tensor: torch.Tensor,
            gamma_name: str | None = gamma_name,
            rotation: Rotate | None = rotation,
        ) -> torch.Tensor:
            gamma = None if gamma_name is None else checkpoint.read(gamma_name, (rank,))
            return fold_kv_b(tensor, gamma, None if rotation is None else rotation())

        yield up.kv_b_proj.name, fold_b
        if rotation is not None:

            def fold_a(tensor: torch.Tensor, rotation: Rotate = rotation) -> torch.Tensor:
                return fold_kv_a(tensor, rank, rotation())

            for name, _, _ in module.latent_writers():
                for leaf in ("weight", "bias"):
                    yield f"{prefix}{name}.{leaf}", fold_a


def _table_dtype(
    source: str, transforms: dict[str, Transform], config: MlaConfig
) -> torch.dtype | None:
    """The type of a tensor that stays in floating point; None: as stored."""
    is_table = source == "model.embed_tokens.weight" or source.endswith(".kv_b_proj.weight")
    if is_table and config.recipe.half_precision:
        return torch.float16
    return torch.float32 if source in transforms else None


def _output_bytes(shape: tuple[int, ...], weight_format: WeightFormat | None) -> int:
    """Bytes of a quantised matrix; 0 if it is not."""
    if weight_format is None:
        return 0
    values = torch.Size(shape).numel()
    zero_bytes = 1 if weight_format.zeros == "integer" else 2
    return values * weight_format.bits // 8 + values // weight_format.group * (2 + zero_bytes)


def _plain_bytes(info: TensorInfo, dtype: torch.dtype | None) -> int:
    return info.read_bytes if dtype is None else math.prod(info.shape) * dtype.itemsize

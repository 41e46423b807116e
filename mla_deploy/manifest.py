"""`manifest.json` of a bundle: what it must say, and what its graph takes and gives.

Graph inputs (B sequences, S new tokens padded on the right, M pages, L logits wanted a sequence):

| name | type | shape |
|---|---|---|
| `input_ids` | int64 | [B, S] |
| `past_lengths`, `new_lengths` | int64 | [B] |
| `block_table` | int64 | [B, M], page 0 is the scratch page |
| `logit_index` | int64 | [B, L], positions in S |
| `cache.{layer}.{part}` | the part's | [pages, *page_shape] |

and outputs: `logits` float32 [B, L, vocab_size], `present.{layer}.{part}` as the inputs, meant to
be bound to the same memory.

May be imported by the runtime: needs neither torch nor onnx.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FORMAT_VERSION = 1
PAGE_TOKENS = 64
"""A cache grows by pages of so many tokens."""
MAX_PAGE_BYTES = 64 << 20
"""Of one part: 1 MiB a token, where a real one takes less than 4 KiB."""
PORTABLE_TARGET = "sm80+"
"""An engine for every GPU of compute capability 8.0 and above."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """A file of the bundle, relative to its folder."""

    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.name:
            raise ValueError(f"the path {path!r} leaves the bundle")
        if not path.isprintable():
            raise ValueError(f"the path {path!r} holds characters that no file name needs")
        return path


class CachePartInfo(_Strict):
    """One typed array of a layer's cache: [pages, *page_shape]."""

    name: str = Field(pattern="^[a-z0-9_]+$")
    dtype: Literal["uint8", "int8", "float16", "float32"]
    page_shape: list[int] = Field(min_length=1, max_length=4)

    @field_validator("page_shape")
    @classmethod
    def _positive(cls, shape: list[int]) -> list[int]:
        if any(not 0 < extent <= 1 << 20 for extent in shape):
            raise ValueError(f"page shape {shape} is out of range")
        return shape

    @model_validator(mode="after")
    def _whole_tokens(self) -> CachePartInfo:
        size = _page_bytes(self)
        if size % PAGE_TOKENS or size > MAX_PAGE_BYTES:
            raise ValueError(
                f"a page of {size} bytes is not {PAGE_TOKENS} tokens of at most "
                f"{MAX_PAGE_BYTES // PAGE_TOKENS} bytes"
            )
        return self


class LayerCache(_Strict):
    """The cache of one layer."""

    format: str
    parts: list[CachePartInfo] = Field(min_length=1)

    @field_validator("parts")
    @classmethod
    def _distinct(cls, parts: list[CachePartInfo]) -> list[CachePartInfo]:
        if len({part.name for part in parts}) != len(parts):
            raise ValueError("two parts have the same name")
        return parts


class CacheInfo(_Strict):
    """The cache of the model."""

    page_tokens: Literal[64]
    layers: list[LayerCache] = Field(min_length=1)


class ModelInfo(_Strict):
    """What a program may want to know about the model."""

    model_type: str
    parameters: int
    vocab_size: int = Field(gt=0, le=1 << 24)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    q_lora_rank: int | None
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    bos_token_id: int | None
    eos_token_ids: list[int]


class GraphInfo(_Strict):
    """The decoder graph."""

    path: str
    backend: Literal["onnx", "tensorrt"]
    lowering: str
    opset: int


class CudaInfo(_Strict):
    """The graph is spelled for ONNX Runtime's CUDA provider."""

    dtype: Literal["float16"]
    """Of activations."""


class EngineInfo(_Strict):
    """A TensorRT engine."""

    target: str = Field(pattern=r"^sm([0-9]{2,3}|80\+)$")
    """The GPU it was built for, as `sm89`, or `PORTABLE_TARGET`."""
    path: str
    context: str
    """An ONNX model of one EPContext node that names the engine, for ONNX Runtime's providers."""


class ProfileInfo(_Strict):
    """What an engine was optimised for: least, usual and most."""

    tokens: tuple[int, int, int]
    rows: tuple[int, int, int]
    """Tokens of the cache that are read; whole pages."""
    logits: tuple[int, int, int]

    def extent(self, axis: str) -> tuple[int, int, int]:
        """Least, usual and most of an axis that a `TensorInfo` names.

        With pages, there is one more than a sequence needs: the scratch page.
        """
        if axis in ("pages", "pages_per_sequence"):
            least, usual, most = (rows // PAGE_TOKENS + (axis == "pages") for rows in self.rows)
            return least, usual, most
        extents = {"tokens": self.tokens, "rows": self.rows, "logits": self.logits}
        return extents[axis]


class TensorInfo(_Strict):
    """An input or output; extents that vary are named."""

    name: str
    dtype: Literal["int64", "uint8", "int8", "float16", "float32"]
    shape: list[int | str]


class TensorRtInfo(_Strict):
    """Engines and what they need."""

    module: Literal["tensorrt", "tensorrt_rtx"]
    version: str | None
    """Of the TensorRT that built the engines; None: there are none, only the graph."""
    dtype: Literal["float16", "bfloat16", "float32"]
    """Of activations."""
    profiles: list[ProfileInfo] = Field(min_length=2, max_length=2)
    """For up to a chunk of tokens, and for exactly one. In this order, as ONNX Runtime's providers
    stay with the first."""
    plugin: bool = False
    """Whether the graph has `LatentAttention` as a node, for the plugin, and a cache of pages."""
    engines: list[EngineInfo]
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]

    @field_validator("profiles")
    @classmethod
    def _order(cls, profiles: list[ProfileInfo]) -> list[ProfileInfo]:
        if profiles[1].tokens != (1, 1, 1):
            raise ValueError("the second profile is not for one token: export the model again")
        return profiles


class Manifest(_Strict):
    """`manifest.json`."""

    format: Literal["mla-deploy-bundle"] = "mla-deploy-bundle"
    version: int
    producer: str
    model: ModelInfo
    graph: GraphInfo
    cache: CacheInfo
    recipe: dict[str, Any]
    files: list[FileEntry]
    tensorrt: TensorRtInfo | None = None
    """Present with the backend `tensorrt`."""
    cuda: CudaInfo | None = None
    """Present where the graph is for a GPU; the backend is `onnx` then."""

    @model_validator(mode="after")
    def _one_cache_per_layer(self) -> Manifest:
        if len(self.cache.layers) != self.model.num_hidden_layers:
            raise ValueError(
                f"{len(self.cache.layers)} layers of cache for a model of "
                f"{self.model.num_hidden_layers} layers"
            )
        if (self.graph.backend == "tensorrt") != (self.tensorrt is not None):
            raise ValueError("the backend and the description of engines do not fit")
        if self.cuda is not None and self.graph.backend != "onnx":
            raise ValueError("a graph for ONNX Runtime's CUDA provider is of the backend onnx")
        return self

    @property
    def target(self) -> Literal["cpu", "cuda", "tensorrt"]:
        """What the bundle was exported for."""
        if self.tensorrt is not None:
            return "tensorrt"
        return "cpu" if self.cuda is None else "cuda"


def part_bytes_per_token(part: CachePartInfo) -> int:
    """Bytes of one token in one part."""
    return _page_bytes(part) // PAGE_TOKENS


def _page_bytes(part: CachePartInfo) -> int:
    width = {"uint8": 1, "int8": 1, "float16": 2, "float32": 4}[part.dtype]
    return math.prod(part.page_shape) * width

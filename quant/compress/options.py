"""What a user can choose about a conversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mla_deploy.errors import UsageError
from mla_deploy.quant.compress.methods import METHODS, QUERY_AWARE

SELF = "self"
"""As calibration text: the model writes it."""
Layout = Literal["mla_deploy", "deepseek_v3"]
Precision = Literal["fp32", "bf16"]
_POSITIVE = (
    "kv_lora_rank", "qk_rope_head_dim", "like_paper", "tokens", "window", "heal_tokens",
)  # fmt: skip
DEFAULT_TOKENS = 1 << 16
PAPER_HEAD_DIM, PAPER_ROPE = 128, 16
"""Of the keys in MHA2MLA's tables: the head size, and the channels of a head that stay rotary."""


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert; None stands for a default that depends on the rest or on the model."""

    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    """Default with `target_ratio` or `like_paper`: by trial on the calibration text."""
    target_ratio: float | None = None
    """(kv_lora_rank + qk_rope_head_dim) / (2 key heads x head size)."""
    like_paper: int | None = None
    """d_kv of MHA2MLA (arXiv 2502.14837): the cache ratio (d_kv + 16) / 256 of its tables."""
    method: str = QUERY_AWARE
    calibration: tuple[str, ...] = ()
    """Text files, or `self`. Without any, the weights alone decide (`no_calibration`)."""
    no_calibration: bool = False
    tokens: int | None = None
    """Of calibration text, at most. Default: 2^16."""
    window: int | None = None
    """Tokens of a window. Default: 512, or the model's context."""
    layout: Layout = "mla_deploy"
    seed: int = 0
    heal: tuple[str, ...] = ()
    """Text files to heal on."""
    heal_tokens: int | None = None
    """For each layer by itself, and again for the whole model. Default: 2^20."""
    device: str | None = None
    """That heals, as torch names it. Default: `cpu`."""
    precision: Precision | None = None
    """Of healing. Default: `fp32`."""

    def __post_init__(self) -> None:
        allowed = {
            "method": METHODS,
            "layout": get_args(Layout),
            "precision": (*get_args(Precision), None),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise UsageError(
                    f"{name} has a value that is not known",
                    found=getattr(self, name),
                    allowed=", ".join(value for value in values if value is not None),
                )
        self._check_healing()
        self._check_size()
        self._check_calibration()

    @property
    def ratio(self) -> float | None:
        """The cache ratio asked for, if the size is given that way."""
        if self.like_paper is not None:
            return (self.like_paper + PAPER_ROPE) / (2 * PAPER_HEAD_DIM)
        return self.target_ratio

    @property
    def texts(self) -> tuple[Path, ...]:
        """The calibration texts that are files."""
        return tuple(Path(name) for name in self.calibration if name != SELF)

    def by_name(self) -> dict[str, Any]:
        """All of them, names of files as paths."""
        return {
            **dataclasses.asdict(self),
            "calibration": calibration_paths(self.calibration),
            "heal": [Path(name) for name in self.heal],
        }

    def _check_size(self) -> None:
        sizes = [self.kv_lora_rank, self.target_ratio, self.like_paper]
        if sum(size is not None for size in sizes) != 1:
            raise UsageError(
                "the size of the cache must be given in one way",
                found=f"{sum(size is not None for size in sizes)} ways",
                allowed="--kv-lora-rank with --qk-rope-head-dim, --target-ratio, or --like-paper",
            )
        if self.kv_lora_rank is not None and self.qk_rope_head_dim is None:
            raise UsageError(
                "--kv-lora-rank needs --qk-rope-head-dim",
                hint="or give the size of both together: --target-ratio",
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UsageError(
                "the target ratio is out of range", found=self.ratio, allowed="above 0, up to 1"
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is out of range", found=value, allowed="1 or more")

    def _check_healing(self) -> None:
        names = ("heal_tokens", "device", "precision")
        given = [name for name in names if getattr(self, name) is not None]
        if given and not self.heal:
            raise UsageError(
                "options of healing without text to heal on",
                found=", ".join(given),
                hint="give --heal TEXT, or leave them out",
            )

    def _check_calibration(self) -> None:
        if self.no_calibration == bool(self.calibration):
            raise UsageError(
                "say what to calibrate on",
                found="text and --no-calibration" if self.calibration else "nothing",
                allowed="--calibration TEXT, --calibration self, or --no-calibration",
            )
        if SELF in self.calibration and len(self.calibration) > 1:
            raise UsageError(
                "the model's own text cannot be mixed with others",
                found=", ".join(self.calibration),
                allowed="--calibration self alone, or text files",
            )
        if self.no_calibration and (self.method != QUERY_AWARE):
            raise UsageError(
                f"the method {self.method} needs calibration text",
                found="--no-calibration",
                allowed=f"--no-calibration with --method {QUERY_AWARE}",
            )
        given = {"--tokens": self.tokens}
        if not self.heal:
            given |= {"--window": self.window, "--seed": self.seed or None}
        dead = [f"{name} {value}" for name, value in given.items() if value is not None]
        if self.no_calibration and dead:
            raise UsageError(
                "no text is read, so that its options have nothing to do",
                found=f"--no-calibration {' '.join(dead)}",
                hint=f"leave {' and '.join(dead)} out, or measure: --calibration TEXT",
            )


def calibration_paths(names: Iterable[str]) -> list[Path | str]:
    """Calibration texts, those that are files as paths."""
    return [name if name == SELF else Path(name) for name in names]

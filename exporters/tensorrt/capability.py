"""What each TensorRT understands: its parser's operators, its opset, the GPUs it builds for.

Sources: `docs/operators.md` and `docs/Changelog.md` of onnx/onnx-tensorrt, release 10.15 (opsets 9
to 24, no bitwise operators, UINT8 at inputs and outputs only, quantised types without zero points,
RMSNormalization new in that release) and the changes back to 10.0 (INT4 and blockwise
DequantizeLinear; 10.3: axes of Slice as a tensor). For TensorRT-RTX the parser itself is asked: a
test compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from mla_deploy.errors import UsageError
from mla_deploy.manifest import PORTABLE_TARGET

_OPERATORS_10_3 = frozenset(
    {
        "Add", "Cast", "Clip", "Concat", "Constant", "Cos", "DequantizeLinear", "Div", "Expand",
        "Floor", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "Less",
        "LessOrEqual", "MatMul", "Mod", "Mul", "QuantizeLinear", "Range", "Reciprocal",
        "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Reshape", "Round",
        "ScatterElements", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt",
        "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze", "Where", "Abs", "Equal",
    }
)  # fmt: skip
"""Of all that the parser lists, what a decoder can need."""
_OPERATORS_10_15 = _OPERATORS_10_3 | {"RMSNormalization"}

RTX_TARGETS = (PORTABLE_TARGET, "sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX builds for on any machine."""
DEVICE_TARGETS = ("sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm110", "sm120")
"""What TensorRT builds for, each on a machine that has such a GPU."""


@dataclass(frozen=True)
class Capability:
    """A version of TensorRT, as far as a graph made for it is concerned."""

    name: str
    module: str
    """The Python module that builds and runs engines."""
    opset: int
    operators: frozenset[str]
    targets: tuple[str, ...]
    needs_device: bool
    """Whether engines can be built only where the GPU is."""
    versions: tuple[str, ...]
    """Beginnings of the version numbers that read such a graph."""


CAPABILITIES = {
    one.name: one
    for one in (
        Capability(
            "rtx1.7", "tensorrt_rtx", 23, _OPERATORS_10_15, RTX_TARGETS, False, ("1.",)
        ),
        Capability(
            "trt11", "tensorrt", 23, _OPERATORS_10_15, DEVICE_TARGETS, True, ("11.",)
        ),
        Capability(
            "trt10.15", "tensorrt", 23, _OPERATORS_10_15, DEVICE_TARGETS, True, ("10.15", "10.16")
        ),
        Capability(
            "trt10.3", "tensorrt", 21, _OPERATORS_10_3, DEVICE_TARGETS, True, ("10.", "11.")
        ),
    )
}  # fmt: skip
DEFAULT = "rtx1.7"


def capability(name: str) -> Capability:
    """The capability of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in CAPABILITIES:
        raise UsageError(
            "there is no table for this TensorRT",
            found=name,
            allowed=", ".join(CAPABILITIES),
            hint="take the newest that is not newer than yours: trt10.3 for JetPack 6.2",
        )
    return CAPABILITIES[name]


def compute_capability(target: str, wanted: Capability) -> str | None:
    """What TensorRT calls a target, as `SM89`; None where it has no say, or shall take them all."""
    return None if wanted.needs_device or target == PORTABLE_TARGET else target.upper()


def check_target(target: str, wanted: Capability) -> None:
    """Raise a UsageError for a GPU that this TensorRT does not build for."""
    if target not in wanted.targets:
        raise UsageError(
            f"{wanted.module} does not build for this GPU",
            found=target,
            allowed=", ".join(wanted.targets),
            hint="sm87 is Orin, sm89 Ada, sm110 Thor, sm120 Blackwell; Jetsons need "
            "--compat trt10.3 and a build on the device",
        )

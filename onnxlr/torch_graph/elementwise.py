"""Operators that work element by element: arithmetic, comparisons, logic, selection, casts, with numpy's broadcasting.

From opset 7 on; binary operators before it broadcast by an attribute, and are refused for it.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onnxlr.torch_graph.registry import RefusedError, operator
from onnxlr.torch_graph.tensors import DTYPES, cast_refusal

if TYPE_CHECKING:
    from collections.abc import Callable

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Det": torch.det,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(a: Tensor, b: Tensor) -> Tensor:
        return function(a, b)

    return apply


for _name, _function in _UNARY.items():
    operator(_name)(_unary(_function))
for _name, _pair in _BINARY.items():
    operator(_name)(_binary(_pair))


@operator("Div")
def div(a: Tensor, b: Tensor) -> Tensor:
    """Quotient; of integers, rounded towards zero."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Mod")
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Remainder with the sign of the divisor, or with `fmod` of the dividend."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@operator("Pow")
def power(x: Tensor, exponent: Tensor) -> Tensor:
    """`x ** exponent`, of the type of `x`."""
    # a number as the exponent keeps the gradient finite where x is 0 and saves a logarithm
    value = (
        exponent.item() if exponent.numel() == 1 and exponent.ndim <= x.ndim and not exponent.requires_grad else None
    )
    if value is not None and x.is_floating_point():
        return torch.pow(x, value)
    return torch.pow(x, exponent).to(x.dtype)


@operator("BitShift")
def bit_shift(x: Tensor, count: Tensor, *, direction: str) -> Tensor:
    """`x` shifted by `count` bits to the LEFT or the RIGHT."""
    shift = torch.bitwise_left_shift if direction == "LEFT" else torch.bitwise_right_shift
    return shift(x, count)


@operator("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where `x` is infinite, of the signs asked for."""
    none = torch.zeros_like(x, dtype=torch.bool)
    return (torch.isneginf(x) if detect_negative else none) | (torch.isposinf(x) if detect_positive else none)


@operator("Sum")
def sum_of(*xs: Tensor) -> Tensor:
    """Sum of any number of tensors."""
    return reduce(torch.add, xs)


@operator("Mean")
def mean_of(*xs: Tensor) -> Tensor:
    """Mean of any number of tensors."""
    return reduce(torch.add, xs) / len(xs)


@operator("Max")
def max_of(*xs: Tensor) -> Tensor:
    """Elementwise maximum of any number of tensors."""
    return reduce(torch.maximum, xs)


@operator("Min")
def min_of(*xs: Tensor) -> Tensor:
    """Elementwise minimum of any number of tensors."""
    return reduce(torch.minimum, xs)


@operator("Where", since=9)
def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` where the condition holds, else `b`."""
    return torch.where(condition, a, b)


@operator("Clip", since=6)
def clip_6(x: Tensor, *, min: float | None = None, max: float | None = None) -> Tensor:  # noqa: A002
    """`x` within bounds that are attributes."""
    if min is None and max is None:
        return x
    return torch.clamp(x, min, max)


@operator("Clip", since=11)
def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """`x` within bounds that are inputs; where they cross, the upper one holds."""
    return x if low is None and high is None else torch.clamp(x, low, high)


def _cast(x: Tensor, to: int) -> Tensor:
    dtype = DTYPES[to]
    if x.is_floating_point() and not dtype.is_floating_point and dtype != torch.bool:
        return x.to(torch.int64).to(dtype)  # through int64, as casts to narrow integers wrap in ONNX
    return x.to(dtype)


@operator("Cast", since=6, refuse=lambda attributes: cast_refusal(attributes["to"]))
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` as another element type; `saturate` and `round_mode` speak of types that torch_graph refuses."""
    return _cast(x, to)


@operator("CastLike", since=15)
def cast_like(x: Tensor, target: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` as the element type of `target`."""
    return _cast(x, next(key for key, dtype in DTYPES.items() if dtype == target.dtype))


@operator("BitCast", since=26, refuse=lambda attributes: cast_refusal(attributes["to"]))
def bit_cast(x: Tensor, *, to: int) -> Tensor:
    """The bits of `x` read as another type of the same size."""
    return x.view(DTYPES[to])


@operator("Identity")
def identity(x: Tensor) -> Tensor:
    """`x`."""
    return x


@operator("Dropout", since=7)
def dropout_7(x: Tensor, *, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    """`x` and a mask that keeps everything: this is inference."""
    return x, torch.ones_like(x, dtype=torch.bool)


@operator("Dropout", since=12, host=(1, 2))
def dropout(
    x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """`x` and a mask that keeps everything: this is inference."""
    if training is not None and bool(training):
        raise RefusedError("training_mode is true")
    return x, torch.ones_like(x, dtype=torch.bool)

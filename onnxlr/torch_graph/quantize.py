"""Quantization to 8 (16, 32) bits and back: along an axis, in blocks, per tensor; and integer products.

Rounding has a gradient of zero, so nothing learns through QuantizeLinear; through DequantizeLinear the scales do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onnxlr.torch_graph.conv import conv
from onnxlr.torch_graph.linear import matmul_integer
from onnxlr.torch_graph.registry import operator
from onnxlr.torch_graph.tensors import DTYPES, cast_refusal

if TYPE_CHECKING:
    from collections.abc import Sequence


def _spread(values: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scales or zero points in a shape that broadcasts against `x`."""
    if values.numel() == 1 and values.ndim <= 1:
        return values.reshape(())
    axis %= x.ndim
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if values.ndim == 1:
        return values.reshape(-1, *[1] * (x.ndim - 1 - axis))
    return values


def _quantized(x: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    y = torch.round(x / scale)
    if zero is not None:
        y = y + zero.to(y.dtype)
    return y.clamp(limits.min, limits.max).to(dtype)


@operator(
    "QuantizeLinear", since=10, refuse=lambda a: cast_refusal(a["output_dtype"]) if a.get("output_dtype") else None
)
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """`x / scale + zero`, rounded to even and clipped to the type."""
    dtype = zero.dtype if zero is not None else DTYPES[output_dtype] if output_dtype else torch.uint8
    if precision:
        x, scale = x.to(DTYPES[precision]), scale.to(DTYPES[precision])
    spread = None if zero is None else _spread(zero, x, axis, block_size)
    return _quantized(x, _spread(scale, x, axis, block_size).to(x.dtype), spread, dtype)


@operator("DequantizeLinear", since=10)
def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """`(x - zero) scale`."""
    wide = x.to(torch.int32)
    if zero is not None:
        wide = wide - _spread(zero, x, axis, block_size).to(torch.int32)
    dtype = DTYPES[output_dtype] if output_dtype else scale.dtype
    return (wide.to(scale.dtype) * _spread(scale, x, axis, block_size)).to(dtype)


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To uint8 by the range of `x` (0 included); also the scale and the zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale).clamp(0, 255).to(torch.uint8)
    return _quantized(x, scale, zero, torch.uint8), scale, zero


@operator("QLinearMatMul", since=10)
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """Product of quantized matrices, quantized."""
    exact = matmul_integer(a, b, a_zero, b_zero).float()
    factor = a_scale.float() * b_scale.float() / y_scale.float()
    return _quantized(exact * factor, torch.ones_like(factor), y_zero, y_zero.dtype)


@operator("QLinearConv", since=10)
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """Convolution of quantized tensors, quantized; in doubles, whose integers are exact to 2**53."""
    channel = [-1] + [1] * (w.ndim - 1)
    exact = conv(
        x.double() - x_zero.double(),
        w.double() - w_zero.double().reshape(channel if w_zero.numel() > 1 else ()),
        None if bias is None else bias.double(),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    factor = (x_scale * w_scale / y_scale).double()
    factor = factor.reshape(channel[:-1]) if factor.numel() > 1 else factor.reshape(())
    return _quantized(exact * factor, torch.ones_like(factor), y_zero, y_zero.dtype)

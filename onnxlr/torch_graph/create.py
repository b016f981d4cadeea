"""Operators that make tensors: constants, ranges, paddings, triangles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from onnxlr.torch_graph.registry import operator
from onnxlr.torch_graph.tensors import DTYPES, cast_refusal, ints, to_tensor, type_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def _constant_refusal(attributes: Mapping[str, Any]) -> str | None:
    known = {"value", "value_float", "value_floats", "value_int", "value_ints"}
    if unknown := attributes.keys() - known:
        return f"attribute {', '.join(sorted(unknown))}"
    value = attributes.get("value")
    return None if value is None or value.data_type in DTYPES else f"of type {type_name(value.data_type)}"


@operator("Constant", refuse=_constant_refusal)
def constant(**attributes: Any) -> Tensor:
    """A value that an attribute holds; those of `value` are read once, when the graph is built."""
    ((name, value),) = attributes.items()
    if name == "value":
        return to_tensor(numpy_helper.to_array(value))
    return torch.tensor(value, dtype=torch.float32 if name.startswith("value_float") else torch.int64)


@operator("ConstantOfShape", since=9, host=(0,))
def constant_of_shape(new: Tensor, *, value: Any = None) -> Tensor:
    """A tensor of one value, by default float 0."""
    if value is None:
        return torch.zeros(ints(new))
    filling = to_tensor(numpy_helper.to_array(value))
    return filling.reshape(()).expand(ints(new)).clone()


@operator("Range", since=11, host=(0, 1, 2))
def range_of(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """`start, start + delta, ..` up to and without `limit`."""
    first, last, step = (value.item() for value in (start, limit, delta))
    count = max(0, -int(-(last - first) // step))
    return (first + step * torch.arange(count, dtype=torch.float64 if start.is_floating_point() else torch.int64)).to(
        start.dtype
    )


def _like(x: Tensor, dtype: int | None) -> Any:
    return x.dtype if dtype is None else DTYPES[dtype]


@operator("EyeLike", since=9, refuse=lambda attributes: cast_refusal(attributes.get("dtype", 1)))
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on the `k`-th diagonal of a matrix of the shape of `x`."""
    rows, columns = x.shape
    ones = torch.ones(rows, columns, dtype=torch.bool, device=x.device)
    return (ones.triu(k) & ones.tril(k)).to(_like(x, dtype))


@operator("Trilu", since=14, host=(1,))
def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of matrices, from the `k`-th diagonal."""
    diagonal = 0 if k is None else int(k)
    return x.triu(diagonal) if upper else x.tril(diagonal)


@operator("OneHot", since=9, host=(1,))
def one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """`values[1]` at the index along a new axis, `values[0]` elsewhere; indices out of range leave a row of zeros."""
    length = int(depth.reshape(-1)[0])
    axis = axis % (indices.ndim + 1)
    index = indices.long().unsqueeze(axis)
    index = torch.where(index < 0, index + length, index)
    grid = torch.arange(length, device=index.device).reshape([-1] + [1] * (indices.ndim - axis))
    return torch.where(index == grid, values[1], values[0])


def _window(length: Tensor, periodic: int, output_datatype: int, coefficients: Sequence[float]) -> Tensor:
    count = int(length)
    angle = 2 * torch.pi * torch.arange(count, dtype=torch.float64) / (count if periodic else count - 1)
    window = sum((-1) ** k * c * torch.cos(k * angle) for k, c in enumerate(coefficients))
    return torch.as_tensor(window).to(DTYPES[output_datatype])


@operator("HannWindow", since=17, host=(0,))
def hann(length: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """Hann's window."""
    return _window(length, periodic, output_datatype, (0.5, 0.5))


@operator("HammingWindow", since=17, host=(0,))
def hamming(length: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """Hamming's window."""
    return _window(length, periodic, output_datatype, (25 / 46, 21 / 46))


@operator("BlackmanWindow", since=17, host=(0,))
def blackman(length: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """Blackman's window."""
    return _window(length, periodic, output_datatype, (0.42, 0.5, 0.08))


def padded(x: Tensor, pads: Sequence[int], mode: str, value: float) -> Tensor:
    """`x` with `pads` = (begins of all axes, ends of all axes) added; negative ones cut.

    By index_select along each axis for the modes that repeat values: that holds for every rank and type.
    """
    rank = x.ndim
    begins, ends = pads[:rank], pads[rank:]
    if mode == "constant":
        pairs = [number for axis in reversed(range(rank)) for number in (begins[axis], ends[axis])]
        return F.pad(x, pairs, value=value)
    for axis in range(rank):
        before, after, length = begins[axis], ends[axis], x.shape[axis]
        if not before and not after:
            continue
        index = torch.arange(-before, length + after, device=x.device)
        if mode == "edge":
            index = index.clamp(0, length - 1)
        elif mode == "wrap":
            index = index.remainder(length)
        else:
            period = max(2 * (length - 1), 1)
            index = index.remainder(period)
            index = torch.where(index >= length, period - index, index)
        x = x.index_select(axis, index)
    return x


@operator("Pad", since=2)
def pad_2(x: Tensor, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """Padding given by attributes."""
    return padded(x, pads, mode, value)


@operator("Pad", since=11, host=(1, 2, 3))
def pad(
    x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *, mode: str = "constant"
) -> Tensor:
    """Padding given by inputs, of all axes or of some."""
    amounts, chosen = ints(pads), ints(axes)
    if axes is not None:
        every = [0] * (2 * x.ndim)
        for i, axis in enumerate(chosen):
            every[axis % x.ndim] = amounts[i]
            every[axis % x.ndim + x.ndim] = amounts[i + len(chosen)]
        amounts = every
    return padded(x, amounts, mode, 0 if value is None else value.item())


@operator("CenterCropPad", since=18, host=(1,))
def center_crop_pad(x: Tensor, new: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    """`x` cut or padded with zeros around its centre to a shape."""
    for axis, target in zip(range(x.ndim) if axes is None else axes, ints(new), strict=True):
        length = x.shape[axis]
        if length > target:
            x = x.narrow(axis, (length - target) // 2, target)
        elif length < target:
            amounts = [0] * (2 * x.ndim)
            amounts[axis % x.ndim] = (target - length) // 2
            amounts[axis % x.ndim + x.ndim] = target - length - (target - length) // 2
            x = padded(x, amounts, "constant", 0)
    return x

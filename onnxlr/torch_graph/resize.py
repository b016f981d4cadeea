"""Resize and Upsample: interpolation along one axis after the other, by a small matrix each.

Every mode is separable. Along an axis, output `i` is a weighted sum of inputs, so the axis is multiplied by a sparse
matrix [out, in] whose rows hold the weights: exact for every combination of modes and coordinates, and differentiable.
Nearest neighbours are picked by index instead.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onnxlr.torch_graph.registry import operator
from onnxlr.torch_graph.tensors import floats, ints

if TYPE_CHECKING:
    from collections.abc import Sequence


def _source(count: int, length: int, scale: float, mode: str, roi: tuple[float, float]) -> Tensor:
    """Where each of `count` outputs lies on the input axis, float64."""
    y = torch.arange(count, dtype=torch.float64)
    scaled = scale * length
    if mode == "align_corners":
        return torch.zeros_like(y) if scaled == 1 else y * (length - 1) / (scaled - 1)
    if mode == "asymmetric":
        return y / scale
    if mode == "tf_half_pixel_for_nn":
        return (y + 0.5) / scale
    if mode == "tf_crop_and_resize":
        start, end = roi
        if count == 1:
            return torch.full_like(y, (start + end) * (length - 1) / 2)
        return start * (length - 1) + y * (end - start) * (length - 1) / (scaled - 1)
    if mode == "pytorch_half_pixel" and scaled == 1:
        return torch.full_like(y, -0.5)
    offset = length / 2 * (1 - count / scaled) if mode == "half_pixel_symmetric" else 0.0
    return offset + (y + 0.5) / scale - 0.5


def _nearest(source: Tensor, mode: str) -> Tensor:
    rounded = {
        "round_prefer_floor": torch.ceil(source - 0.5),
        "round_prefer_ceil": torch.floor(source + 0.5),
        "floor": torch.floor(source),
        "ceil": torch.ceil(source),
    }
    return rounded[mode].long()


def _cubic(distance: Tensor, a: float) -> Tensor:
    """The cubic kernel at a distance, in units of input elements (Keys 1981)."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _matrix(
    source: Tensor, length: int, scale: float, mode: str, a: float, antialias: bool, exclude_outside: bool
) -> Tensor:
    """Weights [out, in], float64; what lies outside of the input counts for its edge, or not at all."""
    stretch = min(scale, 1.0) if antialias else 1.0
    radius = math.ceil((2 if mode == "cubic" else 1) / stretch)
    taps = torch.floor(source)[:, None] + torch.arange(-radius, radius + 2, dtype=torch.float64)
    distance = (taps - source[:, None]) * stretch
    weights = _cubic(distance, a) if mode == "cubic" else (1 - distance.abs()).clamp(min=0)
    if exclude_outside:
        weights = torch.where((taps < 0) | (taps >= length), torch.zeros_like(weights), weights)
    weights = weights / weights.sum(1, keepdim=True)
    places = taps.clamp(0, length - 1).long()
    return torch.zeros(len(source), length, dtype=torch.float64).scatter_add_(1, places, weights)


def interpolate(
    x: Tensor,
    axis: int,
    count: int,
    scale: float,
    *,
    mode: str,
    coordinates: str,
    nearest: str,
    a: float,
    antialias: bool,
    exclude_outside: bool,
    extrapolation: float,
    roi: tuple[float, float],
) -> Tensor:
    """One axis of `x` at `count` new positions."""
    length = x.shape[axis]
    source = _source(count, length, scale, coordinates, roi)
    if mode == "nearest":
        index = _nearest(source, nearest).clamp(0, length - 1)
        y = x.index_select(axis, index.to(x.device))
    else:
        weights = _matrix(source, length, scale, mode, a, antialias, exclude_outside)
        dtype = x.dtype if x.is_floating_point() else torch.float32
        y = torch.matmul(x.movedim(axis, -1).to(dtype), weights.T.to(x.device, dtype)).movedim(-1, axis)
        if not x.is_floating_point():
            limits = torch.iinfo(x.dtype)
            y = y.round().clamp(limits.min, limits.max).to(x.dtype)
    if coordinates == "tf_crop_and_resize":
        outside = ((source < 0) | (source > length - 1)).to(x.device)
        shape = [1] * x.ndim
        shape[axis] = count
        y = torch.where(outside.reshape(shape), torch.full((), extrapolation, dtype=y.dtype, device=x.device), y)
    return y


def _targets(
    shape: Sequence[int], scales: Sequence[float], sizes: Sequence[int], policy: str
) -> list[tuple[int, float]]:
    """Per axis the new length and the scale."""
    if scales:
        return [(math.floor(length * scale), scale) for length, scale in zip(shape, scales, strict=True)]
    ratios = [size / length for size, length in zip(sizes, shape, strict=True)]
    if policy == "stretch":
        return list(zip(sizes, ratios, strict=True))
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [(math.floor(ratio * length + 0.5), ratio) for length in shape]


@operator("Resize", since=11, host=(1, 2, 3))
def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] = (),
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """`x` resampled to scales or sizes."""
    chosen = [axis % x.ndim for axis in axes] or list(range(x.ndim))
    lengths = [x.shape[axis] for axis in chosen]
    targets = _targets(lengths, floats(scales), ints(sizes), keep_aspect_ratio_policy)
    region = floats(roi) or [0.0] * len(chosen) + [1.0] * len(chosen)
    crops = coordinate_transformation_mode == "tf_crop_and_resize"
    for i, (axis, (count, scale)) in enumerate(zip(chosen, targets, strict=True)):
        if scale == 1 and count == x.shape[axis] and not crops:
            continue
        x = interpolate(
            x,
            axis,
            count,
            scale,
            mode=mode,
            coordinates=coordinate_transformation_mode,
            nearest=nearest_mode,
            a=cubic_coeff_a,
            antialias=bool(antialias),
            exclude_outside=bool(exclude_outside),
            extrapolation=extrapolation_value,
            roi=(region[i], region[i + len(chosen)]) if crops else (0.0, 1.0),
        )
    return x


@operator("Upsample", since=9, host=(1,))
@operator("Resize", since=10, host=(1,))
def resize_10(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """`x` resampled to scales, outputs at `i / scale`."""
    return resize(x, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")

"""Pooling: windows that slide over the spatial axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxlr.torch_graph.conv import pad_spatial, resolved_pads
from onnxlr.torch_graph.registry import operator

if TYPE_CHECKING:
    from collections.abc import Sequence


def _windows(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    auto_pad: str,
    pads: Sequence[int],
    ceil_mode: int,
    fill: float,
) -> tuple[Tensor, list[int], list[int]]:
    """Every window as a trailing axis: [n, c, out .., prod(kernel)]; and the padding asked for.

    With `ceil_mode` a last window may hang over the end, as long as it starts inside the (begin-padded) input.
    """
    rank = len(kernel)
    begins, ends = resolved_pads(x.shape[2:], kernel, strides, dilations, auto_pad, pads)
    extra = [0] * rank
    if ceil_mode and auto_pad in ("NOTSET", "VALID"):
        for i in range(rank):
            length = x.shape[2 + i] + begins[i] + ends[i]
            reach = dilations[i] * (kernel[i] - 1) + 1
            count = -(-(length - reach) // strides[i]) + 1
            if (count - 1) * strides[i] >= x.shape[2 + i] + begins[i]:
                count -= 1
            extra[i] = max((count - 1) * strides[i] + reach - length, 0)
    x = pad_spatial(x, begins, [end + add for end, add in zip(ends, extra, strict=True)], fill)
    for i in range(rank):
        reach = dilations[i] * (kernel[i] - 1) + 1
        x = x.unfold(2 + i, reach, strides[i])[..., :: dilations[i]]
    return x.flatten(-rank), begins, extra


def _settings(x: Tensor, strides: Sequence[int], dilations: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    rank = x.ndim - 2
    return strides or [1] * rank, dilations or [1] * rank


@operator("MaxPool")
def max_pool(
    x: Tensor,
    *,
    n_outputs: int,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    storage_order: int = 0,
    strides: Sequence[int] = (),
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum of each window, and the flat index of where it is in `x`."""
    strides, dilations = _settings(x, strides, dilations)
    begins, ends = resolved_pads(x.shape[2:], kernel_shape, strides, dilations, auto_pad, pads)
    simple = begins == ends and all(2 * pad <= k for pad, k in zip(begins, kernel_shape, strict=True))
    if n_outputs == 1 and x.ndim == 4 and simple and x.is_floating_point():
        return F.max_pool2d(x, tuple(kernel_shape), tuple(strides), tuple(begins), tuple(dilations), bool(ceil_mode))
    lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    windows, begins, _ = _windows(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode, lowest)
    values, chosen = windows.max(-1)
    if n_outputs == 1:
        return values
    spatial = x.shape[2:]
    places: list[Tensor] = []
    for i in reversed(range(len(spatial))):
        offset = chosen % kernel_shape[i]
        chosen = chosen // kernel_shape[i]
        grid = torch.arange(values.shape[2 + i], device=x.device).reshape(-1, *[1] * (len(spatial) - 1 - i))
        places.insert(0, grid * strides[i] - begins[i] + offset * dilations[i])
    flat = torch.zeros_like(chosen)
    for i in range(len(spatial)) if not storage_order else reversed(range(len(spatial))):
        flat = flat * spatial[i] + places[i]
    image = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *[1] * len(spatial))
    return values, flat + image * spatial.numel()


@operator("AveragePool", since=7)
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """Mean of each window; padding counts only if `count_include_pad`, and what `ceil_mode` adds never does."""
    strides, dilations = _settings(x, strides, dilations)
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    total = _windows(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode, 0.0)[0].sum(-1)
    if count_include_pad:
        begins, ends = resolved_pads(x.shape[2:], kernel_shape, strides, dilations, auto_pad, pads)
        ones = pad_spatial(ones, begins, ends, 1.0)
        count, _, _ = _hanging(ones, kernel_shape, strides, dilations, total.shape[2:])
    else:
        count = _windows(ones, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode, 0.0)[0]
    return total / count.sum(-1)


def _hanging(
    ones: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], out: Sequence[int]
) -> tuple[Tensor, list[int], list[int]]:
    """Windows over an input that is padded already, `out` of them, hanging over its end where need be."""
    over = [
        max((count - 1) * stride + dilation * (k - 1) + 1 - length, 0)
        for count, stride, dilation, k, length in zip(out, strides, dilations, kernel, ones.shape[2:], strict=True)
    ]
    return _windows(ones, kernel, strides, dilations, "NOTSET", [0] * len(over) + over, 0, 0.0)


@operator("LpPool", since=2)
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] = (),
    p: int = 2,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """The p-norm of each window."""
    strides, dilations = _settings(x, strides, dilations)
    windows = _windows(x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode, 0.0)[0]
    return torch.linalg.vector_norm(windows, p, -1)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """Mean over all spatial axes."""
    return x.mean(_spatial(x), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    """Maximum over all spatial axes."""
    return x.amax(_spatial(x), keepdim=True)


@operator("GlobalLpPool", since=2)
def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    """The p-norm over all spatial axes."""
    return torch.linalg.vector_norm(x, p, _spatial(x), keepdim=True)

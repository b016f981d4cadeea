"""Convolutions of one to three spatial axes, their transposes and integer forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxlr.torch_graph.registry import operator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def resolved_pads(
    lengths: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    auto_pad: str,
    pads: Sequence[int],
) -> tuple[list[int], list[int]]:
    """What to add before and after each spatial axis, for any `auto_pad`."""
    rank = len(lengths)
    if auto_pad == "NOTSET":
        pads = pads or [0] * (2 * rank)
        return list(pads[:rank]), list(pads[rank:])
    if auto_pad == "VALID":
        return [0] * rank, [0] * rank
    begins, ends = [], []
    for length, window, stride, dilation in zip(lengths, kernel, strides, dilations, strict=True):
        total = max((-(-length // stride) - 1) * stride + dilation * (window - 1) + 1 - length, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if auto_pad == "SAME_UPPER" else large)
        ends.append(large if auto_pad == "SAME_UPPER" else small)
    return begins, ends


def pad_spatial(x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float) -> Tensor:
    """`x` with its last axes padded by a value."""
    pairs = [number for pair in zip(reversed(begins), reversed(ends), strict=True) for number in pair]
    return F.pad(x, pairs, value=value) if any(pairs) else x


@operator("Conv")
def conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """Convolution: x [n, c, ..], w [m, c / group, k ..] to [n, m, ..]."""
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    begins, ends = resolved_pads(x.shape[2:], w.shape[2:], strides, dilations, auto_pad, pads)
    if begins != ends or min(begins, default=0) < 0:
        x, begins = pad_spatial(x, begins, ends, 0.0), [0] * rank
    return _CONV[rank](x, w, bias, tuple(strides), tuple(begins), tuple(dilations), group)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    output_padding: Sequence[int] = (),
    output_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """Transposed convolution: x [n, c, ..], w [c, m / group, k ..] to [n, m, ..].

    Computed without padding, then cut: that holds for every combination of pads and output shape.
    """
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    extra = list(output_padding) or [0] * rank
    full = [
        stride * (length - 1) + dilation * (window - 1) + 1
        for length, window, stride, dilation in zip(x.shape[2:], w.shape[2:], strides, dilations, strict=True)
    ]
    if output_shape or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        targets = list(output_shape)[-rank:] or [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
        cuts = [length + add - target for length, add, target in zip(full, extra, targets, strict=True)]
        begins = [cut - cut // 2 if auto_pad == "SAME_LOWER" else cut // 2 for cut in cuts]
        if output_shape and auto_pad == "NOTSET":
            begins = [cut - cut // 2 for cut in cuts]
        ends = [cut - begin for cut, begin in zip(cuts, begins, strict=True)]
    elif auto_pad == "NOTSET" and pads:
        begins, ends = list(pads[:rank]), list(pads[rank:])
    else:
        begins, ends = [0] * rank, [0] * rank
    y = _TRANSPOSED[rank](x, w, None, tuple(strides), 0, 0, group, tuple(dilations))
    y = pad_spatial(y, [-b for b in begins], [add - e for add, e in zip(extra, ends, strict=True)], 0.0)
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


@operator("ConvInteger", since=10)
def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """Convolution of integers, less their zero points, in int32; in doubles, whose integers are exact to 2**53."""
    x = x.double() if x_zero_point is None else x.double() - x_zero_point.double()
    w = w.double()
    if w_zero_point is not None:
        w = w - w_zero_point.double().reshape(-1, *[1] * (w.ndim - 1))
    y = conv(x, w, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return y.round().to(torch.int32)

"""Operators that give a tensor another shape or order and leave its values alone; and those that read shapes.

Shapes are small int64 tensors in the host's memory, whatever device the model is on: chains such as
Shape, Gather, Concat, Reshape then cost no transfer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onnxlr.torch_graph.registry import operator
from onnxlr.torch_graph.tensors import ints

if TYPE_CHECKING:
    from collections.abc import Sequence


@operator("Shape")
def shape(x: Tensor) -> Tensor:
    """The shape of `x`, int64, in the host's memory."""
    return torch.tensor(x.shape, dtype=torch.int64)


@operator("Shape", since=15)
def shape_15(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """A part of the shape of `x`, as Python slices it."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


@operator("Size")
def size(x: Tensor) -> Tensor:
    """The number of elements of `x`, int64."""
    return torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape", since=5, host=(1,))
def reshape(x: Tensor, new: Tensor, *, allowzero: int = 0) -> Tensor:
    """`x` in another shape: -1 is what is left over, 0 (unless `allowzero`) the same axis of `x`."""
    dims = [x.shape[i] if dim == 0 and not allowzero else dim for i, dim in enumerate(ints(new))]
    if -1 in dims and x.numel() == 0:  # torch cannot tell which, onnx may
        rest = [dim for dim in dims if dim != -1]
        if torch.Size(rest).numel() == 0:
            dims[dims.index(-1)] = 0
    return x.reshape(dims)


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """A matrix: axes before `axis` by axes from it on."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(x.shape[:axis].numel(), x.shape[axis:].numel())


@operator("Transpose")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Axes in another order; by default reversed."""
    return x.permute(tuple(range(x.ndim))[::-1] if perm is None else tuple(perm))


def _squeezed(x: Tensor, axes: Sequence[int]) -> Tensor:
    chosen = {axis % x.ndim for axis in axes} if axes else {i for i, dim in enumerate(x.shape) if dim == 1}
    assert all(x.shape[axis] == 1 for axis in chosen), f"axes {sorted(chosen)} of {list(x.shape)} are not all 1 long"
    return x.reshape([dim for i, dim in enumerate(x.shape) if i not in chosen])


def _unsqueezed(x: Tensor, axes: Sequence[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze")
def squeeze_1(x: Tensor, *, axes: Sequence[int] = ()) -> Tensor:
    """`x` without some axes of length 1, by default all."""
    return _squeezed(x, axes)


@operator("Squeeze", since=13, host=(1,))
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """`x` without some axes of length 1, by default all."""
    return _squeezed(x, ints(axes))


@operator("Unsqueeze")
def unsqueeze_1(x: Tensor, *, axes: Sequence[int]) -> Tensor:
    """`x` with axes of length 1 put in."""
    return _unsqueezed(x, axes)


@operator("Unsqueeze", since=13, host=(1,))
def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    """`x` with axes of length 1 put in."""
    return _unsqueezed(x, ints(axes))


@operator("Expand", since=8, host=(1,))
def expand(x: Tensor, new: Tensor) -> Tensor:
    """`x` broadcast against a shape, in both directions."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(ints(new))))


@operator("Tile", since=6, host=(1,))
def tile(x: Tensor, repeats: Tensor) -> Tensor:
    """`x` repeated along each axis."""
    return x.repeat(ints(repeats))


@operator("Concat", since=4)
def concat(*xs: Tensor, axis: int) -> Tensor:
    """Tensors one after the other along an axis."""
    # torch.cat passes over tensors of shape [0] whatever the rank; ONNX has none such, so nothing is to be done
    return torch.cat(xs, axis)


def _split(x: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
    return tuple(x.split(list(sizes), axis))


@operator("Split", since=2)
def split_2(x: Tensor, *, n_outputs: int, axis: int = 0, split: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """Parts along an axis; by default equal ones."""
    return _split(x, split or [x.shape[axis] // n_outputs] * n_outputs, axis)


@operator("Split", since=13, host=(1,))
def split_13(x: Tensor, split: Tensor | None = None, *, n_outputs: int, axis: int = 0) -> tuple[Tensor, ...]:
    """Parts along an axis; by default equal ones."""
    return _split(x, ints(split) or [x.shape[axis] // n_outputs] * n_outputs, axis)


@operator("Split", since=18, host=(1,))
def split_18(
    x: Tensor, split: Tensor | None = None, *, n_outputs: int, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    """Parts along an axis; by default equal ones, the last smaller if need be."""
    length, parts = x.shape[axis], num_outputs or n_outputs
    chunk = -(-length // parts)
    return _split(x, ints(split) or [chunk] * (parts - 1) + [length - chunk * (parts - 1)], axis)


def _sliced(x: Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]) -> Tensor:
    axes = axes or range(len(starts))
    steps = steps or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        first, last, _ = slice(start, end, step).indices(x.shape[axis]) if step > 0 else (0, 0, 0)
        if step > 0:
            x = x.narrow(axis, first, max(last - first, 0))
            if step > 1:
                index = (slice(None),) * (axis % x.ndim) + (slice(None, None, step),)
                x = x[index]
        else:
            chosen = range(*slice(start, end, step).indices(x.shape[axis]))
            # for a negative step an end before the first element means "through it", as it does in Python
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    return x


@operator("Slice")
def slice_1(x: Tensor, *, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] = ()) -> Tensor:
    """A range along each of some axes, given by attributes."""
    return _sliced(x, starts, ends, axes, ())


@operator("Slice", since=10, host=(1, 2, 3, 4))
def slice_10(
    x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    """A range along each of some axes, with steps that may be negative."""
    return _sliced(x, ints(starts), ints(ends), ints(axes), ints(steps))


@operator("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels to blocks of `blocksize` by `blocksize` pixels: [n, c b b, h, w] to [n, c, h b, w b]."""
    n, c, h, w = x.shape
    depth = c // blocksize**2
    if mode == "DCR":
        return (
            x.reshape(n, blocksize, blocksize, depth, h, w)
            .permute(0, 3, 4, 1, 5, 2)
            .reshape(n, depth, h * blocksize, w * blocksize)
        )
    return (
        x.reshape(n, depth, blocksize, blocksize, h, w)
        .permute(0, 1, 4, 2, 5, 3)
        .reshape(n, depth, h * blocksize, w * blocksize)
    )


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Blocks of pixels to channels: [n, c, h b, w b] to [n, b b c, h, w]; in the mode CRD the blocks come last."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return blocks.permute(order).reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@operator("ReverseSequence", since=10, host=(1,))
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Each sequence with its first `lengths[i]` steps in reverse."""
    x = x.movedim((batch_axis, time_axis), (0, 1))
    rows = [torch.cat([row[:length].flip(0), row[length:]]) for row, length in zip(x, ints(lengths), strict=True)]
    return torch.stack(rows).movedim((0, 1), (batch_axis, time_axis))

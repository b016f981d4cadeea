"""Where the rows of a linear layer lie in a tensor: `x [n, d]` out of an array of any rank.

    axes     the axes of the features, in the order of the features; all other axes count rows
    parts    a chunk of some axes only: one group of a grouped convolution, one matrix of a batch
    patches  what a convolution's kernel covers at each position: `d = channels * kernel`, channels first

The patches of a large image are many times the image, so of a batch no more than `PATCH_ROWS` are taken, drawn evenly
from all positions. Which ones depends on the data alone: the same batch gives the same rows again.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxlr.metrics import token_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

PATCH_ROWS = 4096
"""The most patches that are taken of one batch."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of `count` equal chunks of an axis. An array without that axis, or of length 1 there, is taken whole."""

    axis: int
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Patches:
    """What a convolution reads at each position of an array [N, C, ...].

    Attributes
    ----------
    kernel, strides, dilations
        One a spatial axis.
    pads
        Zeros before every spatial axis, then those after; of no use where `auto_pad` says how many. What is negative is
        cut off.
    auto_pad
        ONNX's attribute: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
    spread
        Of a transposed convolution: at every how many positions the array lies, with zeros between; its kernel is the
        other way round. Empty for a plain one.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"
    spread: tuple[int, ...] = ()

    def of(self, array: NDArray[Any], mask: NDArray[Any] | None = None) -> NDArray[Any]:
        """A sample of the patches of `array [N, C, ...]`, as rows [n, C * prod(kernel)].

        Those at padded tokens are left out where there are as many patches as tokens in the mask [N, S].
        """
        if self.spread:
            array = _spread(array, self.spread)
        padding = self._padding(array.shape[2:])
        padded = np.pad(array, [(0, 0), (0, 0), *((max(one, 0), max(other, 0)) for one, other in padding)])
        cut = (slice(max(-one, 0), -max(-other, 0) or None) for one, other in padding)
        padded = padded[(slice(None), slice(None), *cut)]
        reach = [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, array.ndim)))
        stepped = tuple(slice(None, None, step) for step in self.strides)
        dilated = tuple(slice(None, None, step) for step in self.dilations)
        windows = windows[(slice(None), slice(None), *stepped, *dilated)]
        windows = np.moveaxis(windows, 1, 1 + len(self.kernel))
        places = windows.shape[: 1 + len(self.kernel)]
        chosen = np.arange(prod(places))
        if mask is not None and mask.shape == places:
            chosen = np.flatnonzero(mask)
        if len(chosen) > PATCH_ROWS:
            generator = np.random.default_rng(zlib.crc32(np.ascontiguousarray(array.ravel()[:4096]).tobytes()))
            chosen = np.sort(generator.choice(chosen, PATCH_ROWS, replace=False))
        rows = windows[np.unravel_index(chosen, places)]
        if self.spread:
            rows = np.flip(rows, tuple(range(2, rows.ndim)))
        return rows.reshape(len(rows), -1)

    def _padding(self, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
        if self.auto_pad == "NOTSET":
            half = len(self.kernel)
            return list(zip(self.pads[:half], self.pads[half:], strict=True))
        if self.auto_pad == "VALID":
            return [(0, 0)] * len(self.kernel)
        padding = []
        for length, size, stride, dilation in zip(lengths, self.kernel, self.strides, self.dilations, strict=True):
            missing = max((-(-length // stride) - 1) * stride + (size - 1) * dilation + 1 - length, 0)
            small, large = missing // 2, missing - missing // 2
            padding.append((small, large) if self.auto_pad == "SAME_UPPER" else (large, small))
        return padding


def _spread(array: NDArray[Any], steps: tuple[int, ...]) -> NDArray[Any]:
    lengths = [(length - 1) * step + 1 for length, step in zip(array.shape[2:], steps, strict=True)]
    result = np.zeros((*array.shape[:2], *lengths), array.dtype)
    result[(slice(None), slice(None), *(slice(None, None, step) for step in steps))] = array
    return result


@dataclass(frozen=True, slots=True)
class Rows:
    """How to take the rows of a layer out of a tensor; see the module."""

    axes: tuple[int, ...] = (-1,)
    parts: tuple[Part, ...] = ()
    patches: Patches | None = None

    @property
    def axis(self) -> int:
        """The one axis of the features."""
        (axis,) = self.axes
        return axis

    @property
    def key(self) -> str:
        """What tells these rows from others of the same tensor; "" for features on the last axis."""
        names: dict[tuple[int, ...], str] = {(-1,): "", (-2,): ":rows", (1,): ":channels"}
        key = names.get(self.axes, ":axes" + ",".join(map(str, self.axes)))
        if self.patches is not None:
            own = self.patches
            sizes = (
                "x".join(map(str, size)) for size in (own.kernel, own.strides, own.dilations, own.pads, own.spread)
            )
            key = ":".join((":patches", *sizes, own.auto_pad))
        return key + "".join(f":{part.axis}:{part.index}/{part.count}" for part in self.parts)

    def of(self, array: NDArray[Any], mask: NDArray[Any] | None = None) -> NDArray[Any]:
        """The rows [n, d] of `array`; those of padded tokens left out where a mask [N, S] is given.

        Raises
        ------
        DataError
            The mask is not of rank 2.
        """
        array = array[self.chunk(array.shape)]
        if self.patches is not None:
            return self.patches.of(array, mask)
        array = array.transpose(self.order(array.ndim))
        rows = array.reshape(self.shape(array.shape))
        real = None if mask is None else token_rows(mask, (*array.shape[: -len(self.axes)], rows.shape[1]))
        return rows if real is None else rows[real]

    def chunk(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """An index into an array of `shape` that leaves its part."""
        index = [slice(None)] * len(shape)
        for part in self.parts:
            there = -len(shape) <= part.axis < len(shape)
            if there and shape[part.axis] > 1:
                size = shape[part.axis] // part.count
                index[part.axis] = slice(part.index * size, (part.index + 1) * size)
        return tuple(index)

    def order(self, ndim: int) -> tuple[int, ...]:
        """The axes of an array of `ndim` axes with those of the features last; a vector is one row."""
        features = [0] if ndim == 1 else [axis % ndim for axis in self.axes]
        return (*(axis for axis in range(ndim) if axis not in features), *features)

    def shape(self, ordered: tuple[int, ...]) -> tuple[int, int]:
        """[n, d] of an array that has the shape `ordered` with its features last."""
        return prod(ordered[: -len(self.axes)]), prod(ordered[-len(self.axes) :])


def side_by_side(axes: tuple[int, ...], counts: Mapping[int, int]) -> tuple[Rows, ...]:
    """The rows of all groups: `counts` says which axes fall into parts, and into how many; the last runs fastest."""
    return tuple(
        Rows(axes, tuple(Part(axis, i, count) for i, (axis, count) in zip(index, counts.items(), strict=True)))
        for index in np.ndindex(*counts.values())
    )

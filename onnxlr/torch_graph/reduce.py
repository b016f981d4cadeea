"""Reductions over axes, in both of their forms: axes as an attribute, and (opset 13 or 18 on) as an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onnxlr.torch_graph.registry import operator
from onnxlr.torch_graph.tensors import ints

if TYPE_CHECKING:
    from collections.abc import Sequence

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]
"""From a tensor, the axes and whether to keep them, to the reduced tensor."""


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype)


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keep)
    count = torch.Size(x.shape[axis] for axis in axes).numel()
    return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc")


def _max(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.numel() == 0:
        return _of_nothing(x, axes, keep, largest=False)
    return torch.amax(x, axes, keep)


def _min(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.numel() == 0:
        return _of_nothing(x, axes, keep, largest=True)
    return torch.amin(x, axes, keep)


def _of_nothing(x: Tensor, axes: tuple[int, ...], keep: bool, *, largest: bool) -> Tensor:
    """The extremum of no values: the largest or the smallest value of the type."""
    if x.is_floating_point():
        value = float("inf") if largest else float("-inf")
    elif x.dtype == torch.bool:
        value = largest
    else:
        value = torch.iinfo(x.dtype).max if largest else torch.iinfo(x.dtype).min
    shape = torch.sum(x, axes, keep).shape
    return torch.full(shape, value, dtype=x.dtype, device=x.device)


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _l1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.linalg.vector_norm(x, 2, axes, keep)
    return torch.sqrt(_sum(x.double().square(), axes, keep)).to(x.dtype)


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.log(_sum(x, axes, keep)).to(x.dtype)


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x if x.is_floating_point() else x.float(), axes, keep).to(x.dtype)


def _sum_square(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.square(), axes, keep)


_REDUCTIONS: dict[str, tuple[Reduction, int]] = {
    "ReduceSum": (_sum, 13),
    "ReduceMean": (_mean, 18),
    "ReduceMax": (_max, 18),
    "ReduceMin": (_min, 18),
    "ReduceProd": (_prod, 18),
    "ReduceL1": (_l1, 18),
    "ReduceL2": (_l2, 18),
    "ReduceLogSum": (_log_sum, 18),
    "ReduceLogSumExp": (_log_sum_exp, 18),
    "ReduceSumSquare": (_sum_square, 18),
}


def _over(function: Reduction, x: Tensor, axes: Sequence[int], keepdims: int) -> Tensor:
    """Reduce; with no axes given, over all of them. A scalar has nothing to reduce, but is still mapped."""
    chosen = tuple(axis % x.ndim for axis in axes) or tuple(range(x.ndim))
    return function(x, chosen, bool(keepdims)) if x.ndim else function(x[None], (0,), False)


def _by_attribute(function: Reduction) -> Callable[..., Tensor]:
    def apply(x: Tensor, *, axes: Sequence[int] = (), keepdims: int = 1) -> Tensor:
        return _over(function, x, axes, keepdims)

    return apply


def _by_input(function: Reduction) -> Callable[..., Tensor]:
    def apply(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        chosen = ints(axes)
        if not chosen and noop_with_empty_axes:
            # "no axes" then means a reduction over groups of one element
            return function(x[None], (0,), False)
        return _over(function, x, chosen, keepdims)

    return apply


for _name, (_function, _since) in _REDUCTIONS.items():
    operator(_name)(_by_attribute(_function))
    operator(_name, since=_since, host=(1,))(_by_input(_function))


def _arg(x: Tensor, axis: int, keepdims: int, select_last_index: int, *, largest: bool) -> Tensor:
    if select_last_index:
        x = x.flip(axis)
    found = x.argmax(axis, bool(keepdims)) if largest else x.argmin(axis, bool(keepdims))
    return x.shape[axis] - 1 - found if select_last_index else found


@operator("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the first (or last) maximum along an axis."""
    return _arg(x, axis, keepdims, select_last_index, largest=True)


@operator("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the first (or last) minimum along an axis."""
    return _arg(x, axis, keepdims, select_last_index, largest=False)


def _cumulated(function: Callable[[Tensor, int], Tensor], first: int, x: Tensor, axis: int, flags: int) -> Tensor:
    exclusive, reverse = flags & 1, flags & 2
    x = x.flip(axis) if reverse else x
    if exclusive:
        head = torch.full_like(x.narrow(axis, 0, 1), first)
        x = torch.cat([head, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    y = function(x, axis).to(x.dtype)
    return y.flip(axis) if reverse else y


@operator("CumSum", since=11, host=(1,))
def cum_sum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running sum along an axis."""
    return _cumulated(torch.cumsum, 0, x, int(axis), exclusive | reverse << 1)


@operator("CumProd", since=26, host=(1,))
def cum_prod(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running product along an axis."""
    return _cumulated(torch.cumprod, 1, x, int(axis), exclusive | reverse << 1)


@operator("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """`x` divided by its norm along an axis; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))

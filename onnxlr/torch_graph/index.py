"""Operators that pick or place elements by index."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxlr.torch_graph.registry import operator

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(index: Tensor, length: int) -> Tensor:
    """Indices as int64, negative ones counted from the end."""
    index = index.long()
    return torch.where(index < 0, index + length, index)


@operator("Gather")
def gather(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    """Slices of `x` along an axis: shape[:axis] + index.shape + shape[axis + 1:]."""
    axis %= x.ndim
    if index.ndim == 0 and index.device.type == "cpu":
        return x.select(axis, int(index))
    chosen = x.index_select(axis, _wrapped(index, x.shape[axis]).reshape(-1))
    return chosen.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@operator("GatherElements", since=11)
def gather_elements(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    """Single elements of `x` along an axis."""
    return x.gather(axis, _wrapped(index, x.shape[axis]))


def _tuples(index: Tensor) -> tuple[Tensor, ...]:
    return tuple(index.long().unbind(-1))


@operator("GatherND", since=11)
def gather_nd(x: Tensor, index: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices of `x` at index tuples [.., k], the first `batch_dims` axes in step."""
    if batch_dims == 0:
        return x[_tuples(index)]
    batch = x.shape[:batch_dims]
    flat, chosen = x.reshape(-1, *x.shape[batch_dims:]), index.reshape(-1, *index.shape[batch_dims:])
    rows = torch.arange(len(flat), device=x.device).reshape(-1, *[1] * (chosen.ndim - 2))
    found = flat[(rows, *_tuples(chosen))]
    return found.reshape(*batch, *found.shape[1:])


@operator("Scatter", since=9)
def scatter(x: Tensor, index: Tensor, updates: Tensor, *, axis: int = 0) -> Tensor:
    """`x` with elements along an axis replaced."""
    return x.scatter(axis, _wrapped(index, x.shape[axis]), updates)


@operator("ScatterElements", since=11)
def scatter_elements(x: Tensor, index: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """`x` with elements along an axis replaced by or combined with updates."""
    index = _wrapped(index, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction])


@operator("ScatterND", since=11)
def scatter_nd(x: Tensor, index: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """`x` with slices at index tuples [.., k] replaced by or combined with updates."""
    depth = index.shape[-1]
    if reduction in ("none", "add"):
        return x.index_put(_tuples(index), updates, accumulate=reduction == "add")
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64, device=x.device)
    for axis in range(depth):
        flat = flat * x.shape[axis] + _wrapped(index[..., axis], x.shape[axis])
    rest = x.shape[depth:].numel()
    rows, values = x.reshape(-1, rest), updates.reshape(-1, rest)
    places = flat.reshape(-1, 1).expand(-1, rest)
    return rows.scatter_reduce(0, places, values, _REDUCTIONS[reduction]).reshape(x.shape)


@operator("TensorScatter", since=24)
def tensor_scatter(
    cache: Tensor, update: Tensor, start: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """A cache with `update` written at a position of its own for each row of the batch."""
    axis %= cache.ndim
    count, length = update.shape[axis], cache.shape[axis]
    first = torch.zeros(len(cache), dtype=torch.int64, device=cache.device) if start is None else start.long()
    places = first[:, None] + torch.arange(count, device=cache.device)
    if mode == "circular":
        places = places.remainder(length)
    view = [len(cache)] + [1] * (cache.ndim - 1)
    view[axis] = count
    return cache.scatter(axis, places.reshape(view).expand(update.shape), update)


def _top(x: Tensor, k: int, axis: int, largest: int) -> tuple[Tensor, Tensor]:
    # of equal values ONNX takes the lower index first; torch.topk promises nothing, a stable sort does
    values, index = x.sort(dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, k), index.narrow(axis, 0, k)


@operator("TopK", since=1)
def top_k_1(x: Tensor, *, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """The `k` largest values along an axis and their indices."""
    return _top(x, k, axis, 1)


@operator("TopK", since=10, host=(1,))
def top_k(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:  # noqa: A002
    """The `k` largest or smallest values along an axis and their indices."""
    return _top(x, int(k), axis, largest)


@operator("NonZero", since=9)
def non_zero(x: Tensor) -> Tensor:
    """Indices [rank, count] of the elements that are not zero."""
    return torch.nonzero(x).T.contiguous()


@operator("Compress", since=9)
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Slices along an axis (or elements of the flattened tensor) where the condition holds."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


@operator("Unique", since=11)
def unique(
    x: Tensor,
    *,
    axis: int | None = None,
    sorted: int = 1,  # noqa: A002
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct values (or slices), where each occurs first, the inverse map, and counts."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    values, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    place = torch.arange(x.shape[axis], device=x.device)
    first = torch.full_like(counts, x.shape[axis]).scatter_reduce(0, inverse, place, "amin")
    if not sorted:
        order = first.argsort()
        rank = order.argsort()
        values, first, counts, inverse = values.index_select(axis, order), first[order], counts[order], rank[inverse]
    return values, first, inverse, counts

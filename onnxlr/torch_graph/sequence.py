"""Sequences of tensors inside a graph, as older exporters write `split` and `chunk`: Python lists here.

They may not be inputs or outputs of the whole graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onnxlr.torch_graph.registry import operator
from onnxlr.torch_graph.tensors import DTYPES, ints


@operator("SequenceEmpty", since=11)
def sequence_empty(*, dtype: int = 1) -> list[Tensor]:
    """An empty sequence; its type shows when something is put in."""
    assert dtype in DTYPES
    return []


@operator("SequenceConstruct", since=11)
def sequence_construct(*xs: Tensor) -> list[Tensor]:
    """A sequence of its inputs."""
    return list(xs)


@operator("SequenceAt", since=11, host=(1,))
def sequence_at(sequence: list[Tensor], position: Tensor) -> Tensor:
    """One element; negative positions count from the end."""
    return sequence[int(position)]


@operator("SequenceLength", since=11)
def sequence_length(sequence: list[Tensor]) -> Tensor:
    """The number of elements, int64."""
    return torch.tensor(len(sequence))


@operator("SequenceInsert", since=11, host=(2,))
def sequence_insert(sequence: list[Tensor], x: Tensor, position: Tensor | None = None) -> list[Tensor]:
    """A sequence with one more element, at the end by default."""
    place = len(sequence) if position is None else int(position)
    place = place + len(sequence) if place < 0 else place
    return [*sequence[:place], x, *sequence[place:]]


@operator("SequenceErase", since=11, host=(1,))
def sequence_erase(sequence: list[Tensor], position: Tensor | None = None) -> list[Tensor]:
    """A sequence without one element, the last by default."""
    place = (-1 if position is None else int(position)) % len(sequence)
    return [*sequence[:place], *sequence[place + 1 :]]


@operator("SplitToSequence", since=11, host=(1,))
def split_to_sequence(x: Tensor, split: Tensor | None = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    """Parts along an axis: of given sizes, of one size, or single slices (without the axis, if `keepdims` is 0)."""
    if split is None:
        return [part if keepdims else part.squeeze(axis) for part in x.split(1, axis)]
    return list(x.split(ints(split) if split.ndim else int(split), axis))


@operator("ConcatFromSequence", since=11)
def concat_from_sequence(sequence: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    """All elements one after the other along an axis, or stacked on a new one."""
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)

"""What a model takes: the names, dtypes and shapes of its inputs, and where its batch axis is.

Calibration counts samples, a model runs feeds. Both are mappings from input names to arrays; they differ in the
leading axis: 1 row in a sample, as many as memory allows in a feed. That needs a batch axis to exist, and ONNX has no
mark for one, so the rule is:

    every input has rank >= 1 and all of them share the leading dim: the same symbol, the same number, or all unknown

A model that takes nothing but vectors of one fixed length has none: these are features, of which no run has fewer.
A batched model's feeds may be cut and merged along axis 0. Of any other model a sample is one whole feed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

Sample: TypeAlias = Mapping[str, Array]
"""One feed whose leading axis has length 1 where the model has a batch axis; otherwise one whole feed."""

Feed: TypeAlias = dict[str, Array]
"""What one run of the model takes: samples merged along axis 0."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input of a model.

    Attributes
    ----------
    name : str
        The input's name in the graph.
    dtype : numpy.dtype
        Its element type; bfloat16 and the float8 types are those of ml_dtypes.
    shape : tuple of int, str or None
        Its dims: a number where the model fixes it, a str where it gives a symbol, None where it says nothing.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        """Return the form error messages use, such as `float32 [N, 3, 224, 224]`."""
        return f"{self.dtype.name} {format_shape(self.shape)}"


def format_shape(shape: Sequence[int | str | None]) -> str:
    """Write a shape as `[N, 3, ?]`, a question mark standing for an unknown dim."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def has_batch_axis(inputs: Sequence[TensorSpec]) -> bool:
    """Whether axis 0 of every input is the batch: all ranks >= 1, all leading dims the same, not only fixed vectors."""
    if not inputs or any(not spec.shape for spec in inputs):
        return False
    if all(len(spec.shape) == 1 and isinstance(spec.shape[0], int) and spec.shape[0] > 1 for spec in inputs):
        return False
    return len({spec.shape[0] for spec in inputs}) == 1


def fixed_batch(inputs: Sequence[TensorSpec]) -> int | None:
    """Return the batch size the model is fixed to; None where it is free or where there is no batch axis."""
    leading = inputs[0].shape[0] if has_batch_axis(inputs) else None
    return leading if isinstance(leading, int) else None


def sample_count(feed: Feed, inputs: Sequence[TensorSpec]) -> int:
    """How many samples a feed holds: the length of its batch axis, or 1 where the model has none."""
    return len(feed[inputs[0].name]) if has_batch_axis(inputs) else 1


def names(inputs: Sequence[TensorSpec]) -> str:
    """List the inputs' names for a message: `'input_ids', 'attention_mask'`."""
    return ", ".join(repr(spec.name) for spec in inputs)

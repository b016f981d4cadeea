"""A linear layer as an objective sees it: its weight, the moments of its data, and what its errors weigh.

A `Layer` can be decomposed as it is, or first narrowed to some of its inputs or outputs, or stacked side by side with
others that read the same tensor: `[W_1 W_2 ...] [d_in, d_1 + d_2 + ...]`, so that one first factor serves them all.
Several of one size, each with data of its own, are cut at one rank as the groups of one (`grouped`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onnxlr.factorize import (
    GroupedDecomposition,
    InputDecomposition,
    OutputDecomposition,
    UtilizedDecomposition,
    WeighedDecomposition,
    WeightDecomposition,
    foreseen_by_inputs,
    foreseen_by_outputs,
)
from onnxlr.factors import tails
from onnxlr.gain import Gain
from onnxlr.tied import TiedDecomposition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from onnxlr.factors import Decomposition
    from onnxlr.gram import Moments

    Matrix = NDArray[np.float64]
    Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight and what decides how it is best cut.

    Attributes
    ----------
    matrix
        `W [d_in, d_out]`, float64; of groups [groups, d_in, d_out].
    moments
        Of the rows of `x` [d_in] or, with `observed_output`, of those of `x W` [d_out]; None for the plain singular
        value decomposition.
    observed_output
        Which of the two.
    gain
        What errors of the output weigh [d_out, d_out]; None where all weigh the same.
    projected
        The objective "utilized": project on the subspaces of the data in place of least squares.
    groups
        The layers that it consists of, where it is several.
    read
        Of an embedding table that is the output head too: the moments of what the head reads; `moments` are then those
        of the rows that are gathered.
    pulled
        Of such a table: the moments of the gradients at what the head reads, through the head alone, with a `gain`.
    """

    matrix: Matrix
    moments: Moments | None = None
    observed_output: bool = False
    gain: Gain | None = None
    projected: bool = False
    groups: tuple[Layer, ...] = ()
    read: Moments | None = None
    pulled: Moments | None = None

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return int(self.matrix.shape[-2])

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return int(self.matrix.shape[-1])

    def decompose(self) -> Decomposition:
        """Prepare to cut at any rank."""
        if self.groups:
            return GroupedDecomposition([layer.decompose() for layer in self.groups])
        if self.read is not None and self.moments is not None:
            gain = None if self.gain is None else self.gain.root @ self.gain.root.T
            return TiedDecomposition(self.matrix, self.moments, self.read, gain, self.pulled)
        if self._by_inputs:
            assert self.moments is not None
            return InputDecomposition(self.matrix, self.moments, self.gain)
        if self.gain is not None:
            return WeighedDecomposition(self._weighed().decompose(), self.gain)
        if self.moments is None:
            return WeightDecomposition(self.matrix)
        if self.projected:
            return UtilizedDecomposition(self.matrix, self.moments)
        return OutputDecomposition(self.matrix, self.moments, observed_output=self.observed_output)

    def foresee(self) -> Matrix:
        """What the decomposition loses at every rank, from 0 to the full one, to within `RIDGE` of the whole.

        By eigenvalues alone: for a third of the work, and nothing else to keep. Not for what is projected.
        """
        assert not self.projected
        if self.groups:
            return sum((layer.foresee() for layer in self.groups), np.zeros(1))
        if self._by_inputs:
            assert self.moments is not None
            return foreseen_by_inputs(self.matrix, self.moments, self.gain)
        weighed = self._weighed()
        if weighed.moments is None:
            singular = np.asarray(np.linalg.svd(weighed.matrix, compute_uv=False), np.float64)
            return tails(singular**2)
        return foreseen_by_outputs(weighed.matrix, weighed.moments, observed_output=self.observed_output)

    def _weighed(self) -> Layer:
        """Its outputs times `L` with `G = L L^T`, of which all errors weigh the same."""
        if self.gain is None:
            return self
        root, moments = self.gain.root, self.moments
        if moments is not None and self.observed_output:
            moments = moments.mapped(root)
        return replace(self, matrix=self.matrix @ root, moments=moments, gain=None)

    @property
    def _by_inputs(self) -> bool:
        return self.moments is not None and not (self.observed_output or self.projected) and self.d_in < self.d_out

    def narrowed_outputs(self, kept: Index) -> Layer:
        """The layer with some of its outputs only."""
        moments = self.moments
        if moments is not None and self.observed_output:
            moments = moments.kept(kept)
        gain = None if self.gain is None else self.gain.kept(kept)
        return replace(self, matrix=self.matrix[:, kept], moments=moments, gain=gain)

    def narrowed_inputs(self, kept: Index, matrix: Matrix) -> Layer:
        """The layer with some of its inputs only, and the `matrix` that makes the best of them.

        Moments have to be those of the input.
        """
        return replace(self, matrix=matrix, moments=None if self.moments is None else self.moments.kept(kept))


@dataclass(frozen=True, slots=True)
class Unread:
    """A layer [d_in, d_out] that is read when it is looked at."""

    d_in: int
    d_out: int
    read: Callable[[], Layer]


def grouped(layers: Sequence[Layer]) -> Layer:
    """The layers of all groups of one weight as one, which is cut at the same rank in each."""
    return layers[0] if len(layers) == 1 else Layer(np.stack([layer.matrix for layer in layers]), groups=tuple(layers))


def stacked(layers: Sequence[Layer], scales: Sequence[float]) -> Layer:
    """Layers that read one tensor, side by side; `scales` are what the damage of each counts.

    Moments have to be those of the input.
    """
    gains = [layer.gain or Gain(np.ones(layer.d_out)) for layer in layers]
    return replace(layers[0], matrix=np.hstack([layer.matrix for layer in layers]), gain=Gain.stacked(gains, scales))

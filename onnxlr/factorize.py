"""From a weight and the moments of its data to two factors: `W [d_in, d_out] ~ A [d_in, r] B [r, d_out]`.

A `Decomposition` is prepared once for a weight and then cut at any rank. `damage(r)` is what the cut loses in the
units of its objective, and `total` what cutting everything would lose. Four objectives:

weight
    The singular value decomposition of `W`; no data. Loses `||W - A B||^2`.

output
    Least squares on the layer's output. With the covariance of the output `S = W^T (C - mu^T mu) W` and `V` its `r`
    leading eigenvectors, `A = W V`, `B = V^T`, and the bias takes over the mean of what is cut off,
    `mu W (I - V V^T)`. Loses the tail of the eigenvalues of `S`. No inverse is taken, so a singular `C` is fine.
    Directions that the data never used are ordered by the weight alone: `S` is regularised by
    `ridge * tr(S) / ||W||^2 * W^T W`, so that full rank gives `W` back. (The optimum is that of Chen et al. 2021,
    "DRONE", and Wang et al. 2024, "SVD-LLM".)

utilized
    `P_T W P_S`, the projections on the leading eigenvectors of the input's and the output's second moments (Garg et
    al. 2024, arXiv 2407.04797), without a correction of the bias, as in the paper. Cut at a rank `r`, both sides keep
    `r` directions; by energy, each side keeps its own number, and the rank is the smaller one.

fisher
    The error of the network's output instead of the layer's own. With `G` the moments of the network's gradients at the
    layer's output (see `onnxlr.fisher`), `G = L L^T` and `V` the `r` leading eigenvectors of `L^T S L`, `A = W L V`,
    `B = V^T L^-1`, and the bias takes over the mean of what is cut off. Loses the tail of those eigenvalues, the
    expected squared change of the network's output. `G` is regularised by `SHRINKAGE * tr(G) / d_out` on its diagonal.
    It is the objective "output" for the weight `W L`, mapped back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from onnxlr.factors import Decomposition, Factors, Ordered, balanced, tails
from onnxlr.spectrum import eigen, eigenvalues, output_spectrum, rank_for_energy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from onnxlr.gain import Gain
    from onnxlr.gram import Moments

    Matrix = NDArray[np.float64]

RIDGE = 1e-6
"""Weight of the regularisation of the output objective, relative to the mean energy of a direction."""


class WeightDecomposition(Ordered):
    """The objective "weight" for `weight [d_in, d_out]`."""

    def __init__(self, weight: Matrix) -> None:
        self._left, self._singular, self._right = np.linalg.svd(weight, full_matrices=False)
        super().__init__(self._singular**2)

    def cut(self, rank: int) -> Factors:
        return self.unbalanced(rank)

    def unbalanced(self, rank: int) -> Factors:
        root = np.sqrt(self._singular[:rank])
        return Factors(self._left[:, :rank] * root, root[:, None] * self._right[:rank], None)


class OutputDecomposition(Ordered):
    """The objective "output" for `weight [d_in, d_out]`, by the covariance of its outputs [d_out, d_out].

    Parameters
    ----------
    weight
        `W`, float64.
    moments
        Of the rows of the input `x` [d_in] or, with `observed_output`, of those of the product `x W` [d_out].
    """

    def __init__(
        self,
        weight: Matrix,
        moments: Moments,
        *,
        observed_output: bool = False,
    ) -> None:
        self._weight = weight
        self._mean = moments.mean if observed_output else moments.mean @ weight
        outputs = _of_outputs(weight, moments, observed_output=observed_output)
        self._basis = eigen(_ridged(outputs, weight, moments, self._mean)).vectors[:, : min(weight.shape)]
        super().__init__(np.maximum(np.einsum("ir,ir->r", self._basis, outputs @ self._basis), 0.0))

    def unbalanced(self, rank: int) -> Factors:
        kept = self._basis[:, :rank]
        bias = self._mean - (self._mean @ kept) @ kept.T
        return Factors(self._weight @ kept, kept.T, bias)


def _of_outputs(weight: Matrix, moments: Moments, *, observed_output: bool) -> Matrix:
    covariance = moments.covariance
    return covariance if observed_output else weight.T @ (covariance @ weight)


def _ridged(outputs: Matrix, weight: Matrix, moments: Moments, mean: Matrix) -> Matrix:
    """What orders the directions of the output; its covariance is left as it is."""
    gram = weight.T @ weight
    energy = float(np.trace(outputs))
    if energy <= _floor(moments, float(mean @ mean)):
        return gram
    gram *= RIDGE * energy / max(float(np.trace(gram)), np.finfo(np.float64).tiny)
    gram += outputs
    return gram


def _floor(moments: Moments, squared_mean: float) -> float:
    """An energy below is what rounding leaves of the covariance of a constant."""
    return float(np.finfo(np.float64).eps * max(moments.count, moments.dim) * squared_mean)


class InputDecomposition(Ordered):
    """The objectives "output" and "fisher" for `weight [d_in, d_out]`, by a matrix of [d_in, d_in].

    With `R^T R` the regularised covariance of the input, the left singular vectors `U` of `R W L` are the eigenvectors
    of `R (W G W^T) R^T`, and `W ~ R^-1 U U^T R W`: neither `L` nor its inverse is needed. For weights with more outputs
    than inputs, whose covariance of outputs would be larger and singular.

    Parameters
    ----------
    weight
        `W`, float64.
    moments
        Of the rows of the input `x` [d_in].
    gain
        `G`; None for the identity.
    """

    def __init__(self, weight: Matrix, moments: Moments, gain: Gain | None = None) -> None:
        self._weight, self._mean = weight, moments.mean
        covariance, gram = moments.covariance, _between(weight, gain)
        root = _root_of_inputs(covariance, gram, moments)
        spectrum = eigen(root @ gram @ root.T)
        self._first: Matrix = scipy.linalg.solve_triangular(root, spectrum.vectors, check_finite=False)
        self._reading = root.T @ spectrum.vectors
        shares = np.einsum("ir,ir->r", self._first, covariance @ self._first)
        super().__init__(spectrum.values * np.maximum(shares, 0.0))

    def unbalanced(self, rank: int) -> Factors:
        first, reading = self._first[:, :rank], self._reading[:, :rank]
        bias = (self._mean - (self._mean @ first) @ reading.T) @ self._weight
        return Factors(first, reading.T @ self._weight, bias)


def _between(weight: Matrix, gain: Gain | None) -> Matrix:
    return weight @ weight.T if gain is None else gain.between(weight)


def _energy(covariance: Matrix, gram: Matrix, moments: Moments) -> float:
    """That of the output; 0 where it is but rounding."""
    energy = float(np.vdot(covariance, gram))
    return energy if energy > _floor(moments, float(moments.mean @ gram @ moments.mean)) else 0.0


def _root_of_inputs(covariance: Matrix, gram: Matrix, moments: Moments) -> Matrix:
    """An upper triangular `R`, of `R^T R` the covariance with the ridge that the gram of the weight gives."""
    energy = _energy(covariance, gram, moments)
    if not energy:
        return np.eye(len(gram))
    level = RIDGE * energy / max(float(np.trace(gram)), np.finfo(np.float64).tiny)
    # less is what rounding makes of eigenvalues that are 0, most of all beside a large mean
    level = max(
        level,
        float(np.finfo(np.float64).eps * np.trace(moments.gram) / max(moments.count, 1)),
        np.finfo(np.float64).tiny,
    )
    while True:
        padded = covariance.copy()
        padded.flat[:: len(gram) + 1] += level
        try:
            root: Matrix = scipy.linalg.cholesky(padded, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            level *= 4
        else:
            return root


def least_squares(weight: Matrix, moments: Moments) -> InputDecomposition | OutputDecomposition:
    """The objective "output" from moments of the input, by the smaller of the two matrices."""
    if weight.shape[0] < weight.shape[1]:
        return InputDecomposition(weight, moments)
    return OutputDecomposition(weight, moments)


def foreseen_by_inputs(weight: Matrix, moments: Moments, gain: Gain | None) -> Matrix:
    """What `InputDecomposition` loses at every rank [d_in + 1], by eigenvalues alone.

    The ridge counts too: it adds at most the share `RIDGE` of the whole.
    """
    covariance, gram = moments.covariance, _between(weight, gain)
    if not _energy(covariance, gram, moments):
        return np.zeros(len(gram) + 1)
    root = _root_of_inputs(covariance, gram, moments)
    return tails(eigenvalues(root @ gram @ root.T))


def foreseen_by_outputs(weight: Matrix, moments: Moments, *, observed_output: bool) -> Matrix:
    """What `OutputDecomposition` loses at every rank [min(d_in, d_out) + 1], by eigenvalues alone.

    Of the best directions: those of the decomposition, chosen with a ridge, lose at most the share `RIDGE` more.
    """
    outputs = _of_outputs(weight, moments, observed_output=observed_output)
    return tails(eigenvalues(outputs)[: min(weight.shape)])


class WeighedDecomposition:
    """Another decomposition, of `W L`, mapped back: errors of the output are weighed by `G = L L^T`.

    Parameters
    ----------
    inner
        The decomposition of `W L`.
    gain
        `G` [d_out, d_out].
    """

    def __init__(self, inner: Decomposition, gain: Gain) -> None:
        self._inner, self._gain = inner, gain

    @property
    def total(self) -> float:
        return self._inner.total

    def damage(self, rank: int) -> float:
        return self._inner.damage(rank)

    def rank_for(self, energy: float) -> int:
        return self._inner.rank_for(energy)

    def cut(self, rank: int) -> Factors:
        return balanced(self.unbalanced(rank))

    def unbalanced(self, rank: int) -> Factors:
        weighed, back = self._inner.unbalanced(rank), self._gain.inverse_root
        bias = None if weighed.bias is None else weighed.bias @ back
        return Factors(weighed.first, weighed.second @ back, bias)

    def cut_by_energy(self, energy: float, rank: int) -> tuple[Factors, float]:
        return self.cut(rank), self.damage(rank)


class GroupedDecomposition:
    """Decompositions of several weights [d_in, d_out], all cut at one rank; damages add up."""

    def __init__(self, members: Sequence[Decomposition]) -> None:
        self._members = members

    @property
    def total(self) -> float:
        return sum(member.total for member in self._members)

    def damage(self, rank: int) -> float:
        return sum(member.damage(rank) for member in self._members)

    def rank_for(self, energy: float) -> int:
        return max(member.rank_for(energy) for member in self._members)

    def cut(self, rank: int) -> Factors:
        return _side_by_side([member.cut(rank) for member in self._members])

    def unbalanced(self, rank: int) -> Factors:
        return _side_by_side([member.unbalanced(rank) for member in self._members])

    def cut_by_energy(self, energy: float, rank: int) -> tuple[Factors, float]:
        cuts = [member.cut_by_energy(energy, rank) for member in self._members]
        return _side_by_side([factors for factors, _ in cuts]), sum(damage for _, damage in cuts)


def _side_by_side(cuts: Sequence[Factors]) -> Factors:
    """One array of every kind; ranks that fall short of the largest are filled up with zeros."""
    rank = max(factors.rank for factors in cuts)
    first = [np.pad(factors.first, ((0, 0), (0, rank - factors.rank))) for factors in cuts]
    second = [np.pad(factors.second, ((0, rank - factors.rank), (0, 0))) for factors in cuts]
    biases = [factors.bias for factors in cuts if factors.bias is not None]
    return Factors(np.stack(first), np.stack(second), np.concatenate(biases) if biases else None)


class UtilizedDecomposition:
    """The objective "utilized" for `weight [d_in, d_out]` and the moments of its input rows [d_in]."""

    def __init__(self, weight: Matrix, moments: Moments) -> None:
        self._weight = weight
        self._inputs = eigen(moments.second)
        self._outputs = output_spectrum(weight, self._inputs)
        core = self._inputs.vectors.T @ weight @ self._outputs.vectors
        energy = self._inputs.values[:, None] * core**2
        # [k, l] is the energy kept by k directions of the input and l of the output
        self._kept = np.pad(np.cumsum(np.cumsum(energy, 0), 1), ((1, 0), (1, 0)))
        self.total = float(self._kept[-1, -1])

    def damage(self, rank: int) -> float:
        return 0.0 if rank >= min(self._weight.shape) else self._damage(rank, rank)

    def _damage(self, k_input: int, k_output: int) -> float:
        return max(self.total - float(self._kept[k_input, k_output]), 0.0)

    def rank_for(self, energy: float) -> int:
        return min(rank_for_energy(self._inputs.values, energy), rank_for_energy(self._outputs.values, energy))

    def unbalanced(self, rank: int) -> Factors:
        return self.cut(rank)

    def cut(self, rank: int) -> Factors:
        if rank >= min(self._weight.shape):
            return WeightDecomposition(self._weight).cut(rank)
        return self._project(rank, rank)

    def cut_by_energy(self, energy: float, rank: int) -> tuple[Factors, float]:
        k_input = max(rank, rank_for_energy(self._inputs.values, energy))
        k_output = max(rank, rank_for_energy(self._outputs.values, energy))
        k_output = min(k_output, len(self._outputs.values))
        return self._project(k_input, k_output), self._damage(k_input, k_output)

    def _project(self, k_input: int, k_output: int) -> Factors:
        seen, used = self._inputs.vectors[:, :k_input], self._outputs.vectors[:, :k_output]
        core = seen.T @ self._weight @ used
        if k_input <= k_output:
            return balanced(Factors(seen, core @ used.T, None))
        return balanced(Factors(seen @ core, used.T, None))

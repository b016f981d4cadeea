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

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import scipy.linalg

from onnxlr.spectrum import Spectrum, eigen, output_spectrum, rank_for_energy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from onnxlr.gram import Moments

    Matrix = NDArray[np.float64]

SHRINKAGE = 0.03
"""Weight of the identity in the gradient moments: a random probe a row is a noisy look at them."""
RIDGE = 1e-6
"""Weight of the regularisation of the output objective, relative to the mean energy of a direction."""


@dataclass(frozen=True, slots=True)
class Factors:
    """`x W + b ~ (x first) second + b + bias`; first [d_in, r], second [r, d_out], bias [d_out] or None, float64.

    Of several weights side by side they are [groups, d_in, r], [groups, r, d_out] and [groups * d_out].
    """

    first: Matrix
    second: Matrix
    bias: Matrix | None

    @property
    def rank(self) -> int:
        """The number of columns of `first`."""
        return int(self.first.shape[-1])


class Decomposition(Protocol):
    """A weight prepared for one objective."""

    @property
    def total(self) -> float:
        """The damage of cutting everything."""

    def damage(self, rank: int) -> float:
        """The damage of a cut at `rank`, in the same unit; 0 at full rank."""

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps the share `energy`, in the sense of the objective."""

    def cut(self, rank: int) -> Factors:
        """Balanced factors of rank `rank`."""

    def unbalanced(self, rank: int) -> Factors:
        """The same product as it comes, for those who go on to change it."""

    def cut_by_energy(self, energy: float, rank: int) -> tuple[Factors, float]:
        """Balanced factors that keep the share `energy`, at a rank of at least `rank_for(energy)`, and their damage."""


class Ordered(ABC):
    """Directions with an energy each [k], taken in this order: the damage of a cut is the energy of the tail."""

    def __init__(self, energies: Matrix) -> None:
        self._energies = energies
        self._tails = np.append(np.cumsum(energies[::-1])[::-1], 0.0)

    @property
    def total(self) -> float:
        return float(self._tails[0])

    def damage(self, rank: int) -> float:
        return float(self._tails[min(rank, len(self._energies))])

    def rank_for(self, energy: float) -> int:
        return rank_for_energy(self._energies, energy)

    @abstractmethod
    def unbalanced(self, rank: int) -> Factors: ...

    def cut(self, rank: int) -> Factors:
        return balanced(self.unbalanced(rank))

    def cut_by_energy(self, energy: float, rank: int) -> tuple[Factors, float]:
        return self.cut(rank), self.damage(rank)


class WeightDecomposition(Ordered):
    """The objective "weight" for `weight [d_in, d_out]`."""

    def __init__(self, weight: Matrix) -> None:
        self._left, self._singular, self._right = scipy.linalg.svd(weight, full_matrices=False, check_finite=False)
        super().__init__(self._singular**2)

    def cut(self, rank: int) -> Factors:
        return self.unbalanced(rank)

    def unbalanced(self, rank: int) -> Factors:
        root = np.sqrt(self._singular[:rank])
        return Factors(self._left[:, :rank] * root, root[:, None] * self._right[:rank], None)


class OutputDecomposition(Ordered):
    """The objective "output" for `weight [d_in, d_out]`.

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
        ridge: float = RIDGE,
    ) -> None:
        self._weight = weight
        self._mean = moments.mean if observed_output else moments.mean @ weight
        # less is what rounding leaves of the covariance of a constant
        floor = np.finfo(np.float64).eps * max(moments.count, moments.dim) * float(self._mean @ self._mean)
        covariance = moments.covariance
        if observed_output:
            self._basis = self._of_output(covariance, ridge, floor).vectors[:, : min(weight.shape)]
        else:
            self._basis = self._of_input(covariance, ridge, floor).vectors
        seen = self._basis if observed_output else weight @ self._basis
        super().__init__(np.maximum(np.einsum("ir,ir->r", seen, covariance @ seen), 0.0))

    def _of_output(self, covariance: Matrix, ridge: float, floor: float) -> Spectrum:
        gram = self._weight.T @ self._weight
        energy = np.trace(covariance)
        if energy <= floor:
            return eigen(gram)
        return eigen(covariance + ridge * energy / max(np.trace(gram), np.finfo(np.float64).tiny) * gram)

    def _of_input(self, covariance: Matrix, ridge: float, floor: float) -> Spectrum:
        if self._weight.shape[1] < self._weight.shape[0]:
            return self._of_output(self._weight.T @ covariance @ self._weight, ridge, floor)
        squared = max(float(np.sum(self._weight**2)), np.finfo(np.float64).tiny)
        energy = float(np.sum(self._weight * (covariance @ self._weight)))
        if energy <= floor:
            return output_spectrum(self._weight, eigen(np.eye(len(covariance))))
        inputs = eigen(covariance)
        # added to the spectrum, where what rounding made negative is 0 already: every direction keeps its ridge
        return output_spectrum(self._weight, Spectrum(inputs.values + ridge * energy / squared, inputs.vectors))

    def unbalanced(self, rank: int) -> Factors:
        kept = self._basis[:, :rank]
        bias = self._mean - (self._mean @ kept) @ kept.T
        return Factors(self._weight @ kept, kept.T, bias)


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


class Gain:
    """A symmetric positive definite `G [d_out, d_out]` by which errors of an output are weighed, `e G e^T`."""

    def __init__(self, gram: Matrix) -> None:
        self._gram = gram

    @classmethod
    def of(cls, gradients: Moments) -> Gain:
        """`E[g^T g]` of the network's gradients at an output, regularised; the identity where there are none."""
        gram = gradients.second
        scale = float(np.trace(gram)) / len(gram)
        return cls(gram + SHRINKAGE * scale * np.eye(len(gram)) if scale > 0 else np.eye(len(gram)))

    @classmethod
    def stacked(cls, gains: Sequence[Gain], scales: Sequence[float]) -> Gain:
        """Block diagonal, for outputs side by side; each multiplied by its scale."""
        result = cls(scipy.linalg.block_diag(*(scale * gain._gram for gain, scale in zip(gains, scales, strict=True))))
        pairs = [(scale**0.5, gain) for gain, scale in zip(gains, scales, strict=True)]
        result.root = scipy.linalg.block_diag(*(root * gain.root for root, gain in pairs))
        result.inverse_root = scipy.linalg.block_diag(*(gain.inverse_root / root for root, gain in pairs))
        return result

    def kept(self, features: NDArray[np.intp]) -> Gain:
        """That of some features of the output, in that order."""
        return Gain(self._gram[np.ix_(features, features)])

    @cached_property
    def root(self) -> Matrix:
        """A lower triangular `L` with `L L^T = G`: the weighed error is `|e L|^2`."""
        lower: Matrix = scipy.linalg.cholesky(self._gram, lower=True, check_finite=False)
        return lower

    @cached_property
    def inverse_root(self) -> Matrix:
        """`L^-1`."""
        inverse: Matrix = scipy.linalg.solve_triangular(
            self.root, np.eye(len(self._gram)), lower=True, check_finite=False
        )
        return inverse


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


def balanced(factors: Factors) -> Factors:
    """The same product with the singular values split evenly between the two factors.

    Two thin QR decompositions and one small SVD: `A = Q1 R1`, `B^T = Q2 R2`, `R1 R2^T = U s V^T`. Unbalanced pairs
    overflow in fp16 and cannot be fine-tuned at one learning rate.
    """
    left, upper = scipy.linalg.qr(factors.first, mode="economic", check_finite=False)
    right, lower = scipy.linalg.qr(factors.second.T, mode="economic", check_finite=False)
    u, singular, vt = scipy.linalg.svd(upper @ lower.T, full_matrices=False, check_finite=False)
    root = np.sqrt(singular)
    return Factors((left @ u) * root, root[:, None] * (vt @ right.T), factors.bias)

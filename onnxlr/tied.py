"""An embedding table that is the output head as well: one weight `E [V, d]` with two uses, and one pair for both.

    y = E[ids]      the rows that are gathered have the moments `S = E^T diag(counts) E`; errors weigh `G [d, d]`
    z = x E^T       the input `x` has the moments `C`; errors weigh `H [V, V]`, of which `E^T H E [d, d]` is known

With `E ~ E Q`, `Q [d, d]` of rank `r`, they lose `tr(G (I - Q)^T S (I - Q))` and `tr(C (I - Q)^T E^T H E (I - Q))`.
Gradients tell both in one unit, the change of the network's output, and their sum is to be small, each as often as it
has rows. Without gradients `G` and `H` are identities and each is taken relative to its own whole.

The sum is `sum_k tr(R_k (I - Q)^T L_k (I - Q))`. For one term the optimum is `Q = L^-1/2 [L^1/2 R^1/2]_r R^-1/2`, for
two there is no closed form. So it is sought in two steps:

    the start       the optimum of the nearest single Kronecker product `L (x) R` to the sum (Van Loan and Pitsianis
                    1993, "Approximation with Kronecker products"), at all ranks at once
    the sweeps      `Q = F S`: the best `F` for this `S`, then the best `S` for this `F`, and again. Each solves
                    `sum_k L_k F (S R_k S^T) = sum_k L_k R_k S^T`, which falls apart in the bases that make both `L_k`
                    and both `S R_k S^T` diagonal

No sweep loses more than the one before; where they end need not be the least of all. The damages that are told are
those of the start: a cut loses that or less. Rows of `E` of their own, in place of `E Q`, could lose less still. A
correction of the bias would add a vector of the length of the vocabulary to the head: there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from onnxlr.factors import Factors, balanced
from onnxlr.gain import SHRINKAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from onnxlr.gram import Moments

    Matrix = NDArray[np.float64]

RIDGE = 1e-6
"""Of each of the four sides, relative to its mean diagonal: directions that no data show keep an order."""
ITERATIONS = 30
"""Of the power method for the nearest product: both sides are positive, so it converges quickly."""
SWEEPS = 2
"""More of them gain little: of what sweeps without end save on random tables, two save nine parts in ten."""


class TiedDecomposition:
    """Prepared to be cut at any rank.

    Parameters
    ----------
    table
        `E` [V, d], float64.
    gathered
        Moments of the rows that were gathered [d].
    read
        Moments of the rows that the head reads [d].
    gain
        `G` [d, d]; None where all errors weigh the same.
    pulled
        Moments of the gradients at the rows that the head reads, of which `E^T H E` [d, d] is the second; None where
        there is no `gain` either.
    """

    def __init__(
        self, table: Matrix, gathered: Moments, read: Moments, gain: Matrix | None = None, pulled: Moments | None = None
    ) -> None:
        self._table = table
        width = table.shape[1]
        gram = table.T @ table
        lefts = [gathered.second, gram if pulled is None else _shrunk(pulled.second, gram)]
        rights = [np.eye(width) if gain is None else gain, read.second]
        if pulled is None:
            wholes = [float(np.sum(left * right)) for left, right in zip(lefts, rights, strict=True)]
            shares = [1 / whole if whole > 0 else 0.0 for whole in wholes]
        else:
            shares = [moments.count / max(gathered.count + read.count, 1) for moments in (gathered, read)]
        lefts = [share * left for share, left in zip(shares, lefts, strict=True)]
        solid_lefts, solid_rights = ([_ridged(side) for side in sides] for sides in (lefts, rights))
        self._lefts, self._rights = _Common.of(*solid_lefts), _Common.of(*solid_rights)
        self._sides = solid_lefts, solid_rights
        self._both: Matrix = sum(map(np.matmul, solid_lefts, solid_rights), np.zeros((width, width)))
        self._start(lefts, rights)
        self.total = float(self._damages[0])

    def _start(self, lefts: Sequence[Matrix], rights: Sequence[Matrix]) -> None:
        """The optima of the nearest product, and what they lose of the sum."""
        left, right = (scipy.linalg.cholesky(side, lower=True, check_finite=False) for side in _nearest(*self._sides))
        u, self._singular, vt = scipy.linalg.svd(left.T @ right, check_finite=False)
        self._first = scipy.linalg.solve_triangular(left, u, trans="T", lower=True, check_finite=False)
        self._second = scipy.linalg.solve_triangular(right, vt.T, trans="T", lower=True, check_finite=False).T
        self._damages = np.zeros(len(u) + 1)
        for own_left, own_right in zip(lefts, rights, strict=True):
            lost = (self._first.T @ own_left @ self._first) * (self._second @ own_right @ self._second.T)
            lost *= np.outer(self._singular, self._singular)
            # [r] is the sum over both indices from r on
            tails = np.cumsum(np.cumsum(lost[::-1, ::-1], 0), 1)[::-1, ::-1]
            self._damages[:-1] += np.diag(tails)
        # it is the optimum of another sum, so a larger rank may lose a little more: it is never said to
        self._damages = np.maximum.accumulate(np.maximum(self._damages[::-1], 0.0))[::-1]

    def damage(self, rank: int) -> float:
        return float(self._damages[min(rank, len(self._damages) - 1)])

    def rank_for(self, energy: float) -> int:
        """The least rank that loses at most the share `1 - energy`; at least 1."""
        allowed = (1 - energy + 4 * np.finfo(np.float64).eps) * self.total
        return max(1, int(np.argmax(self._damages <= allowed)))

    def unbalanced(self, rank: int) -> Factors:
        first, second = self._first[:, :rank] * self._singular[:rank], self._second[:rank]
        if rank < len(self._singular):
            lefts, rights = self._sides
            for _ in range(SWEEPS):
                first = _orthonormal(_best(self._lefts, rights, self._both, _orthonormal(second.T)))
                second = _best(self._rights, lefts, self._both.T, first).T
        return Factors(self._table @ first, second, None)

    def cut(self, rank: int) -> Factors:
        return balanced(self.unbalanced(rank))

    def cut_by_energy(self, energy: float, rank: int) -> tuple[Factors, float]:
        return self.cut(rank), self.damage(rank)


@dataclass(frozen=True, slots=True)
class _Common:
    """The basis `X` in which two positive definite matrices are diagonal, and their sum is the identity.

    `shares` is the diagonal of the first; that of the second is the rest to 1.
    """

    basis: Matrix
    shares: Matrix

    @classmethod
    def of(cls, one: Matrix, other: Matrix) -> _Common:
        shares, basis = scipy.linalg.eigh(one, one + other, check_finite=False)
        return cls(basis, np.clip(shares, 0.0, 1.0))


def _best(outer: _Common, sides: Sequence[Matrix], both: Matrix, given: Matrix) -> Matrix:
    """The best factor [d, r] on the side of `outer`, where the other one [d, r], among the other `sides`, is given."""
    inner = _Common.of(*(given.T @ side @ given for side in sides))
    weights = np.outer(outer.shares, inner.shares) + np.outer(1 - outer.shares, 1 - inner.shares)
    solved = (outer.basis.T @ (both @ given) @ inner.basis) / weights
    best: Matrix = outer.basis @ solved @ inner.basis.T
    return best


def _orthonormal(columns: Matrix) -> Matrix:
    basis: Matrix = scipy.linalg.qr(columns, mode="economic", check_finite=False)[0]
    return basis


def _nearest(lefts: Sequence[Matrix], rights: Sequence[Matrix]) -> tuple[Matrix, Matrix]:
    """`L, R` with the least `||sum_k L_k (x) R_k - L (x) R||`, up to a factor: combinations of the ones given."""
    left_products = np.array([[float(np.sum(a * b)) for b in lefts] for a in lefts])
    right_products = np.array([[float(np.sum(a * b)) for b in rights] for a in rights])
    weights = np.ones(len(lefts))
    for _ in range(ITERATIONS):
        other = left_products @ weights
        weights = right_products @ (other / max(float(np.linalg.norm(other)), np.finfo(np.float64).tiny))
        weights /= max(float(np.linalg.norm(weights)), np.finfo(np.float64).tiny)
    left = sum((w * side for w, side in zip(weights, lefts, strict=True)), np.zeros_like(lefts[0]))
    right = sum((w * side for w, side in zip(left_products @ weights, rights, strict=True)), np.zeros_like(rights[0]))
    return left, right


def _shrunk(pulled: Matrix, gram: Matrix) -> Matrix:
    """`E^T (H + h I) E`, with as much of the identity as `onnxlr.gain.Gain` takes."""
    whole = float(np.trace(gram))
    return pulled + (SHRINKAGE * float(np.trace(pulled)) / whole if whole > 0 else 0.0) * gram


def _ridged(gram: Matrix) -> Matrix:
    level = float(np.trace(gram)) / len(gram) or 1.0
    ridged: Matrix = gram + RIDGE * level * np.eye(len(gram))
    return ridged

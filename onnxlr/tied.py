"""An embedding table that is the output head as well: one weight `E [V, d]` with two uses, and one pair for both.

    y = E[ids]      the rows that are gathered have the moments `S = E^T diag(counts) E`; errors weigh `G [d, d]`
    z = x E^T       the input `x` has the moments `C`

With `E ~ E Q`, `Q [d, d]` of rank `r`, they lose `tr(G (I - Q)^T S (I - Q))` and `tr(C (I - Q)^T E^T E (I - Q))`. Each
is taken relative to its own whole, and their sum is to be small. It has the form of `sum_k L_k (x) R_k` in `I - Q`: for
one term the optimum is known, `Q = L^-1/2 [L^1/2 R^1/2]_r R^-1/2`, for two there is no closed form. So the two are put
together as the nearest single Kronecker product `L (x) R` (Van Loan and Pitsianis 1993, "Approximation with Kronecker
products"), whose optimum is taken, and both losses are told exactly for the `Q` that this gives. A correction of the
bias would add a vector of the length of the vocabulary to the head: there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from onnxlr.factors import Factors, balanced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from onnxlr.gram import Moments

    Matrix = NDArray[np.float64]

RIDGE = 1e-6
"""Of each side of the product, relative to its mean diagonal: directions that no data show keep an order."""
ITERATIONS = 30
"""Of the power method for the nearest product: both sides are positive, so it converges quickly."""


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
        `G` [d, d]; None where all errors of what is gathered weigh the same.
    """

    def __init__(self, table: Matrix, gathered: Moments, read: Moments, gain: Matrix | None) -> None:
        self._table = table
        width = table.shape[1]
        lefts = [gathered.second, table.T @ table]
        rights = [np.eye(width) if gain is None else gain, read.second]
        wholes = [float(np.sum(left * right)) for left, right in zip(lefts, rights, strict=True)]
        lefts = [left / whole if whole > 0 else 0.0 * left for left, whole in zip(lefts, wholes, strict=True)]
        left, right = (_root(side) for side in _nearest_product(lefts, rights))
        u, self._singular, vt = scipy.linalg.svd(left.T @ right, check_finite=False)
        self._first = scipy.linalg.solve_triangular(left, u, trans="T", lower=True, check_finite=False)
        self._second = scipy.linalg.solve_triangular(right, vt.T, trans="T", lower=True, check_finite=False).T
        self._damages = np.zeros(width + 1)
        for own_left, own_right in zip(lefts, rights, strict=True):
            lost = (self._first.T @ own_left @ self._first) * (self._second @ own_right @ self._second.T)
            lost *= np.outer(self._singular, self._singular)
            # [r] is the sum over both indices from r on
            tails = np.cumsum(np.cumsum(lost[::-1, ::-1], 0), 1)[::-1, ::-1]
            self._damages[:-1] += np.diag(tails)
        # it is the optimum of another sum, so a larger rank may lose a little more: it is never said to
        self._damages = np.maximum.accumulate(np.maximum(self._damages[::-1], 0.0))[::-1]
        self.total = float(self._damages[0])

    def damage(self, rank: int) -> float:
        return float(self._damages[min(rank, len(self._damages) - 1)])

    def rank_for(self, energy: float) -> int:
        """The least rank that loses at most the share `1 - energy`; at least 1."""
        allowed = (1 - energy + 4 * np.finfo(np.float64).eps) * self.total
        return max(1, int(np.argmax(self._damages <= allowed)))

    def unbalanced(self, rank: int) -> Factors:
        return Factors(self._table @ self._first[:, :rank] * self._singular[:rank], self._second[:rank], None)

    def cut(self, rank: int) -> Factors:
        return balanced(self.unbalanced(rank))

    def cut_by_energy(self, energy: float, rank: int) -> tuple[Factors, float]:
        return self.cut(rank), self.damage(rank)


def _nearest_product(lefts: Sequence[Matrix], rights: Sequence[Matrix]) -> tuple[Matrix, Matrix]:
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


def _root(gram: Matrix) -> Matrix:
    """A lower triangular root of `gram`, regularised."""
    level = float(np.trace(gram)) / len(gram) or 1.0
    lower: Matrix = scipy.linalg.cholesky(gram + RIDGE * level * np.eye(len(gram)), lower=True, check_finite=False)
    return lower

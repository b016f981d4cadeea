"""Which hidden units a layer can spare, and how the rest stand in for them.

The input of `y = z W + b`, `z [n, H]`, `W [H, d_out]`, is made unit by unit by the layer before,
`z = act(x W_1 + b_1)`: a unit that is dropped takes a column of `W_1` and a row of `W` with it. With `C` the covariance
of `z` and `K` the units kept, the best weight for them is the least-squares solution `W_K = C_KK^-1 C_K: W`, and the
bias takes over the mean of what is lost. With `P = C^-1` over the units still there and `V` the current weight times
`L` (errors of `y` weigh `G = L L^T`), dropping a set `R` loses `tr(V_R^T (P_RR)^-1 V_R)`, and a single unit
`|V_i|^2 / P_ii`. That is Optimal Brain Surgeon (Hassibi and Stork 1992) for a layer's output; MoDeGPT (Lin et al. 2024)
meets the same solution as a Nystroem approximation.

Units are eliminated backwards, the cheapest first, some at a time: picked one by one, exactly, among a pool of the
cheapest, then taken out of `P` and `V` together. With the units that stay longest first and `C = T^T T`, `T` upper
triangular, dropping all but the first `k` loses the squares in the rows of `T W L` from `k` on; and what the first `k`
show of the output has the moments `Y^T Y`, with `Y` the rows before. All of it is found in float32, of correlations,
which are better conditioned than `C`: within some 1e-6 of the damage in float64. So are the weights that stand in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import scipy.linalg

from onnxlr.factors import tails
from onnxlr.spectrum import eigenvalues

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from onnxlr.gram import Moments

    Matrix = NDArray[np.float64]
    Index = NDArray[np.intp]
    Floats = NDArray[np.float32] | NDArray[np.float64]

T = TypeVar("T")

RIDGE = 1e-4
"""Added to the covariance, relative to its mean diagonal: units that calibration never told apart stay apart."""
ROUNDS = 64
"""In about so many rounds units are taken out."""
POOL = 4
"""Candidates for every unit that goes in one round."""
COMPACT = 0.87
"""The share of units still there below which the others are cleared away."""


def narrower(units: int, step: int) -> list[int]:
    """The numbers of units on offer, rising, all of them left out."""
    return list(range(step, units, step))


class Elimination:
    """The order in which hidden units go, and what is lost.

    Parameters
    ----------
    weight
        `W [H, d_out]`, float64.
    moments
        Of the rows of `z` [H]; None without data: units are then told apart by their weights alone.
    root
        `L [d_out, d_out]`; None where all errors of the output weigh the same.
    step
        The widths on offer are the multiples of `step` below `H`.
    foreseen
        Widths at which it is foreseen what the narrowed weight would lose at every rank.

    Attributes
    ----------
    widths
        Those on offer, rising.
    has_mean
        Whether there are data, and a mean that the bias takes over.
    """

    def __init__(
        self,
        weight: Matrix,
        moments: Moments | None,
        root: Matrix | None,
        step: int,
        foreseen: Iterable[int] = (),
    ) -> None:
        self.widths, self.has_mean = narrower(len(weight), step), moments is not None
        value = weight.copy() if root is None else weight @ root
        covariance = _covariance(moments, len(weight))
        scale = np.sqrt(np.diag(covariance))
        # each unit relative to its own size, which leaves what is lost as it is
        value *= scale[:, None]
        size = _normalize(value)
        self._order, shown = _by_correlations(
            covariance, scale, lambda correlations: _last_first(correlations, value, step)
        )
        self._damages = size**2 * tails(np.einsum("id,id->i", shown, shown, dtype=np.float64))
        self._foreseen = {width: size**2 * _lost(shown[:width]) for width in foreseen}

    def damage(self, width: int) -> float:
        """The weighed error of the output with `width` units, one of `widths`; with 0, all that there is to lose."""
        return float(self._damages[width])

    def foreseen(self, width: int) -> Matrix:
        """What the weight for `width` units loses at every rank, beside what the missing units cost.

        The ridge counts too.
        """
        return self._foreseen[width]

    def kept(self, width: int) -> Index:
        """The units that stay, in their old order."""
        return np.sort(self._order[:width])


def _lost(shown: Floats) -> Matrix:
    narrow = shown if shown.shape[0] < shown.shape[1] else shown.T
    return tails(eigenvalues((narrow @ narrow.T).astype(np.float64)))


def stand_in(weight: Matrix, moments: Moments | None, kept: Index) -> tuple[Matrix, Matrix]:
    """`W_K [width, d_out]` for the units `kept`, and the correction of the bias [d_out], 0 without data."""
    covariance = _covariance(moments, len(weight))
    scale = np.sqrt(np.diag(covariance))
    gone = np.delete(np.arange(len(weight)), kept)
    lost = weight[gone] * scale[gone, None]
    size = _normalize(lost)

    def found(correlations: Floats) -> Floats:
        lower = scipy.linalg.cho_factor(_picked(correlations, kept), lower=True, overwrite_a=True, check_finite=False)
        missing = correlations.T.take(kept, 0).take(gone, 1) @ lost.astype(correlations.dtype)
        solution: Floats = scipy.linalg.cho_solve(lower, missing, overwrite_b=True, check_finite=False)
        return solution

    solved = weight[kept] + size * _by_correlations(covariance, scale, found) / scale[kept, None]
    if moments is None:
        return solved, np.zeros(weight.shape[1])
    return solved, moments.mean @ weight - moments.mean[kept] @ solved


def _normalize(values: Matrix) -> float:
    """Divide by the largest, in place, and give it."""
    size = max(float(np.abs(values).max(initial=0.0)), np.finfo(np.float64).tiny)
    values /= size
    return size


def _covariance(moments: Moments | None, units: int) -> Matrix:
    """Regularised, so that it has an inverse; of units that never move, the identity times next to nothing."""
    if moments is None:
        return np.eye(units)
    covariance = moments.covariance
    level = float(np.trace(covariance)) / units
    # less is what rounding leaves of the covariance of a constant
    floor = np.finfo(np.float64).eps * max(moments.count, units) * float(np.mean(moments.mean**2))
    if level <= floor:
        return max(floor, float(np.sqrt(np.finfo(np.float64).tiny))) * np.eye(units)
    covariance.flat[:: units + 1] += RIDGE * level
    return covariance


def _by_correlations(covariance: Matrix, scale: Matrix, find: Callable[[Floats], T]) -> T:
    """What `find` makes of the correlations, in the order of columns: in float64 where in float32 they have no root."""
    try:
        return find(_correlations(covariance, scale, np.float32))
    except np.linalg.LinAlgError:
        return find(_correlations(covariance, scale, np.float64))


def _correlations(covariance: Matrix, scale: Matrix, dtype: type[np.floating[Any]]) -> Any:
    result = np.empty(covariance.shape, dtype)
    for rows in np.array_split(np.arange(len(scale)), max(1, len(scale) // 256)):
        result[rows] = covariance[rows] / scale / scale[rows, None]
    return result.T


def _last_first(correlations: Floats, value: Matrix, step: int) -> tuple[Index, Floats]:
    """The units, the last to go first, and what each shows of the output beside those before it [H, d_out]."""
    own: Any = value.astype(correlations.dtype)
    order = _eliminated(correlations.copy(order="F"), own.copy(), step)[::-1]
    (multiply,) = scipy.linalg.get_blas_funcs(("trmm",), (own,))
    upper = scipy.linalg.cholesky(_picked(correlations, order), overwrite_a=True, check_finite=False)
    return order, multiply(1.0, upper, own[order])


def _eliminated(correlations: Floats, value: Floats, step: int) -> Index:
    """The units, the first to go first; both arguments are filled with rubbish."""
    inverse: Any = _inverse(correlations)
    (update,) = scipy.linalg.get_blas_funcs(("syrk",), (inverse,))
    units, count = np.arange(len(value)), len(value)
    size = step * max(1, len(value) // (ROUNDS * step))
    gone: list[Index] = []
    while count > step:
        alive = np.flatnonzero(units >= 0)
        if count <= COMPACT * len(units):
            inverse, value = _picked(inverse, alive), value[alive]
            units, alive = units[alive], np.arange(count)
        scores = np.einsum("id,id->i", value, value)[alive] / np.diag(inverse)[alive]
        number = min(size, count - step)
        pool = alive[np.argsort(scores, kind="stable")[: POOL * number]]
        going = pool[_cheapest(_square(inverse, pool), value[pool].astype(np.float64), number)]
        corner = scipy.linalg.cholesky(_square(inverse, going), lower=True, check_finite=False)
        half = scipy.linalg.solve_triangular(corner, _columns(inverse, going).T, lower=True, check_finite=False)
        lost = scipy.linalg.solve_triangular(corner, value[going], lower=True, check_finite=False)
        value -= half.T.astype(value.dtype) @ lost.astype(value.dtype)
        inverse = update(-1.0, half.astype(value.dtype), beta=1.0, c=inverse, trans=1, lower=1, overwrite_c=1)
        gone.append(units[going])
        units[going] = -1
        count -= number
    return np.concatenate([*gone, units[units >= 0]])


def _inverse(matrix: Floats) -> Floats:
    """The lower triangle of the inverse of a positive definite matrix, which is overwritten."""
    factorize, invert = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (matrix,))
    lower, failed = factorize(matrix, lower=1, clean=0, overwrite_a=1)
    if failed:
        raise np.linalg.LinAlgError
    inverse: Floats = invert(lower, lower=1, overwrite_c=1)[0]
    return inverse


def _picked(matrix: Any, features: Index) -> Any:
    """Rows and columns of a matrix of which the lower triangle or all is there; both in the order of columns."""
    return matrix.T.take(features, 0).take(features, 1).T


def _square(lower: Floats, features: Index) -> Matrix:
    """Rows and columns of a symmetric matrix of which the lower triangle is there."""
    rows, columns = np.maximum.outer(features, features), np.minimum.outer(features, features)
    return np.asfortranarray(lower[rows, columns], np.float64)


def _columns(lower: Floats, features: Index) -> Matrix:
    """Whole columns of it [n, len(features)]."""
    below = np.arange(len(lower))[:, None] >= features
    return np.where(below, lower[:, features], lower[features].T).astype(np.float64)


def _cheapest(inverse: Matrix, value: Matrix, count: int) -> Index:
    """The `count` units of a pool that go one after the other, each the cheapest once those before it are gone."""
    subtract = scipy.linalg.blas.dger
    squares = np.asfortranarray(value @ value.T)
    alive = np.ones(len(value), bool)
    chosen = []
    for _ in range(min(count, len(value))):
        scores = np.diag(squares) / np.where(alive, np.diag(inverse), 1.0)
        unit = int(np.argmin(np.where(alive, scores, np.inf)))
        chosen.append(unit)
        alive[unit] = False
        column, row = inverse[:, unit].copy(), squares[unit].copy()
        share = column / column[unit]
        row -= share * (row[unit] / 2)
        inverse = subtract(-1.0, share, column, a=inverse, overwrite_a=1)
        squares = subtract(-1.0, share, row, a=squares, overwrite_a=1)
        squares = subtract(-1.0, row, share, a=squares, overwrite_a=1)
    return np.array(chosen, np.intp)

"""Which hidden units a layer can spare, and how the rest stand in for them.

The input of `y = z W + b`, `z [n, H]`, `W [H, d_out]`, is made unit by unit by the layer before,
`z = act(x W_1 + b_1)`: a unit that is dropped takes a column of `W_1` and a row of `W` with it. With `C` the covariance
of `z` and `K` the units kept, the best weight for them is the least-squares solution `W_K = C_KK^-1 C_K: W`, and the
bias takes over the mean of what is lost. With `P = C^-1` over the units still there and `V` the current weight times
`L` (errors of `y` weigh `G = L L^T`), dropping a set `R` loses `tr(V_R^T (P_RR)^-1 V_R)`, and a single unit
`|V_i|^2 / P_ii`. That is Optimal Brain Surgeon (Hassibi and Stork 1992) for a layer's output; MoDeGPT (Lin et al. 2024)
meets the same solution as a Nystroem approximation.

Units are eliminated backwards, the cheapest first, and `P` and `V` follow exactly. `step` units go at a time: picked
one by one, exactly, among a pool of the cheapest, then taken out of the large matrices together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxlr.gram import Moments

    Matrix = NDArray[np.float64]
    Index = NDArray[np.intp]

RIDGE = 1e-4
"""Added to the covariance, relative to its mean diagonal: units that calibration never told apart stay apart."""
POOL = 4
"""Candidates for every unit that goes in one step."""


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
        Units that go at a time: the widths on offer are the multiples of `step` below `H`.
    """

    def __init__(self, weight: Matrix, moments: Moments | None, root: Matrix | None, step: int) -> None:
        self._damages = {len(weight): 0.0}
        inverse = np.asfortranarray(np.linalg.inv(_covariance(moments, len(weight))))
        self._order = self._eliminate(inverse, weight.copy() if root is None else weight @ root, step)

    def _eliminate(self, inverse: Matrix, value: Matrix, step: int) -> Index:
        """The units, first to go first; fills the damages by number of units kept, and its arguments with rubbish."""
        units = np.arange(len(value))
        gone: list[Index] = []
        damage, count = 0.0, len(value)
        while count > step:
            # rows and columns of units that are gone are zero: they are cleared away when they are half of all
            alive = np.flatnonzero(units >= 0)
            if 2 * count <= len(units):
                inverse, value, units = np.asfortranarray(inverse[np.ix_(alive, alive)]), value[alive], units[alive]
                alive = np.arange(count)
            scores = np.einsum("id,id->i", value[alive], value[alive]) / np.diag(inverse)[alive]
            size = count % step or step
            pool = alive[np.argsort(scores, kind="stable")[: POOL * size]]
            going = pool[_cheapest(inverse[np.ix_(pool, pool)], value[pool], size)]
            block = np.linalg.inv(inverse[np.ix_(going, going)])
            lost = block @ value[going]
            damage += float(np.sum(value[going] * lost))
            across = inverse[:, going]
            value -= across @ lost
            inverse = scipy.linalg.blas.dgemm(-1.0, across, block @ across.T, 1.0, inverse, overwrite_c=True)
            gone.append(units[going])
            units[going] = -1
            count -= size
            self._damages[count] = damage
        return np.concatenate([*gone, units[units >= 0]])

    @property
    def widths(self) -> list[int]:
        """The numbers of units on offer, rising, all of them left out."""
        return sorted(self._damages)[:-1]

    def damage(self, width: int) -> float:
        """The weighed error of the output with `width` units, one of `widths`."""
        return self._damages[width]

    def kept(self, width: int) -> Index:
        """The units that stay, in their old order."""
        return np.sort(self._order[len(self._order) - width :])


def stand_in(weight: Matrix, moments: Moments | None, kept: Index) -> tuple[Matrix, Matrix | None]:
    """`W_K [width, d_out]` for the units `kept`, and the correction of the bias [d_out], None without data."""
    across = _covariance(moments, len(weight))[kept]
    solved = scipy.linalg.solve(across[:, kept], across @ weight, assume_a="pos", check_finite=False)
    if moments is None:
        return solved, None
    return solved, moments.mean @ weight - moments.mean[kept] @ solved


def _covariance(moments: Moments | None, units: int) -> Matrix:
    """Regularised, so that it has an inverse; of units that never move, the identity times next to nothing."""
    if moments is None:
        return np.eye(units)
    level = float(np.trace(moments.covariance)) / moments.dim
    # less is what rounding leaves of the covariance of a constant
    floor = np.finfo(np.float64).eps * max(moments.count, moments.dim) * float(np.mean(moments.mean**2))
    identity: Matrix = np.eye(moments.dim)
    if level <= floor:
        return max(floor, float(np.sqrt(np.finfo(np.float64).tiny))) * identity
    return moments.covariance + RIDGE * level * identity


def _cheapest(inverse: Matrix, value: Matrix, count: int) -> Index:
    """The `count` units of a pool that go one after the other, each the cheapest once those before it are gone."""
    inverse, value = inverse.copy(), value.copy()
    alive = np.ones(len(value), bool)
    chosen = []
    for _ in range(min(count, len(value))):
        scores = np.einsum("id,id->i", value, value) / np.where(alive, np.diag(inverse), 1.0)
        unit = int(np.argmin(np.where(alive, scores, np.inf)))
        chosen.append(unit)
        alive[unit] = False
        column, pivot, row = inverse[:, unit].copy(), float(inverse[unit, unit]), value[unit].copy()
        value[alive] -= np.outer(column[alive] / pivot, row)
        inverse[np.ix_(alive, alive)] -= np.outer(column[alive], column[alive]) / pivot
    return np.array(chosen, np.intp)

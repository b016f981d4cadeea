"""Moments of a tensor while its rows come in, batch by batch, at the precision and price of float32.

A matrix product in float64 costs twice that in float32, and the cast as much again. So products of a batch are taken in
float32 and added up in float64, with two things that make it safe:

    shift    the first batch's mean `s` is taken off every row before it is multiplied. Where the mean is large beside
             the spread `x - s` is exact, and the products have the size of the spread. It is put back at the end in
             float64, so that no digit of the covariance is lost to the mean. Shards have shifts of their own: they add
             up to the moments of a single pass within the rounding of float32, and exactly where rows are of float64
    range    a batch whose squares leave the range of float32 is multiplied in float64

Only one triangle is computed and kept, as a vector of `d (d + 1) / 2` numbers in LAPACK's rectangular full packed
format, which multiplies as fast as whole matrices do (Gustavson, Wasniewski, Dongarra, Langou 2010, ACM Transactions on
Mathematical Software 37). Rows of float64 stay float64 throughout.

How many rows are enough? `n` independent rows of a normal distribution tell its covariance `C` up to an expected
squared error of `(tr(C)^2 + ||C||^2) / n` (Frobenius norm). Rows of one image or sentence are not independent, so their
error `V / n` is measured. Of `n` rows and the `m` of the next batch, where both are samples of the same data,

    E ||C_m - C_n||^2 = V / m + V / n

and `V` is the mean over batches, not all of which are compared (`EVERY`). Each row is then worth `tr(C)^2 / V`
independent ones. With `k d` independent rows the leading directions of any rank `r` leave out about `r / (k d)`, at
most `1 / k`, more than the best ones do.

Rows that are worth little each, those of one image, say much the same. Of the batches that follow, only the share of
them that one is worth has to be taken, at random: where `n` rows of a sample, correlated by `c`, are worth
`n / (1 + (n - 1) c)`, so many fewer are worth half of that at least.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import blas, lapack

from onnxlr.gram import Moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE = 8192
"""The most rows whose products are added up in float32."""
TINY = 1e-30
"""A sum of squares below this may have lost digits to the lower end of float32."""
MIRRORED = 256
"""Rows of a triangle that are mirrored at a time: a whole one at once is slow to read across."""
EVERY = 1.125
"""How many times as many rows there are at the next comparison: it costs as much as some hundred rows."""
ENOUGH, COMPARISONS = 8, 4
"""Independent rows a dimension that are enough, and the least number of batches that are compared to know it."""


def packed_bytes(dim: int) -> int:
    """What the moments of rows of width `dim` take while they come in."""
    return 8 * (dim * (dim + 1) // 2 + dim)


class RunningMoments:
    """The moments of one tensor over the rows so far.

    Parameters
    ----------
    dim
        The width `d` of the rows.
    watched
        Measure what the rows are worth: without it they never settle.
    """

    def __init__(self, dim: int, *, watched: bool = False) -> None:
        self.dim, self.count, self._watched = dim, 0, watched
        self._triangle, self._total, self._squares = np.zeros(dim * (dim + 1) // 2), np.zeros(dim), 0.0
        self._shift: NDArray[Any] | None = None
        self._compared, self._variance, self._due = 0, 0.0, 1.0

    def add(self, rows: NDArray[Any]) -> None:
        """Add the rows of one batch, `[n, d]`, any floating dtype.

        Raises
        ------
        FloatingPointError
            One of them is not finite.
        """
        if not len(rows):
            return
        dtype = np.float64 if rows.dtype == np.float64 else np.float32
        with np.errstate(invalid="ignore", over="ignore"):
            rows = rows.astype(dtype, copy=False)
            if self._shift is None:
                self._shift = rows.mean(0, dtype=np.float64).astype(dtype)
            total = rows.sum(0, dtype=np.float64)
            rows = np.subtract(rows, self._shift, order="C")
            # where this sum is finite every entry of the triangle is
            squares = _squared(rows)
            if dtype == np.float32 and not TINY < squares < np.inf:
                rows = rows.astype(np.float64)
                squares = _squared(rows)
        if not np.isfinite(squares):
            raise FloatingPointError("a row is not finite")
        triangle = _triangle(rows[:PIECE])
        for start in range(PIECE, len(rows), PIECE):
            triangle = triangle.astype(np.float64, copy=False) + _triangle(rows[start : start + PIECE])
        if self._watched and self.count >= self._due:
            difference = self._triangle / -self.count
            difference += triangle / len(rows)
            # both triangles of the matrix, and its diagonal twice: never too small
            distance = 2 * _squared(difference)
            self._variance += distance / (1 / len(rows) + 1 / self.count)
            self._compared += 1
            self._due = EVERY * self.count
        self._triangle += triangle
        self._total += total
        self._squares += squares
        self.count += len(rows)

    @property
    def shift(self) -> NDArray[Any] | None:
        """What is taken off every row before it is multiplied, [d], of the dtype of the rows; None before the first."""
        return self._shift

    @property
    def single(self) -> bool:
        """Whether the rows so far, less the shift, are well within what single precision can square."""
        return TINY < self._squares < 1 / TINY

    def merge(self, count: int, total: NDArray[np.float64], gram: NDArray[np.float64]) -> None:
        """Add rows that were added up elsewhere, not before the first batch and never where they are watched.

        Parameters
        ----------
        count
            How many they are.
        total, gram
            Of `z = x - shift`: their sum [d], and `z^T z` [d, d].

        Raises
        ------
        FloatingPointError
            A sum is not finite.
        """
        assert self._shift is not None
        trace = float(np.trace(gram))
        # a square on the diagonal is not finite where anything beside it is not
        if not np.isfinite(trace):
            raise FloatingPointError("a sum is not finite")
        packed, _ = lapack.dtrttf(gram.T)  # which is in the order of LAPACK
        self._triangle += packed
        self._total += total + count * self._shift.astype(np.float64)
        self._squares += trace
        self.count += count

    @property
    def worth(self) -> float:
        """How many independent rows tell the covariance as well; 0 before there is anything to compare."""
        if not self._compared:
            return 0.0
        trace, variance = self._squares / self.count, self._variance / self._compared
        return self.count * (min(1.0, trace**2 / variance) if variance else 1.0)

    @property
    def settled(self) -> bool:
        """Whether more rows would change little: see the module."""
        return self._compared >= COMPARISONS and self.worth >= ENOUGH * self.dim

    @property
    def share(self) -> float:
        """Which share of the rows to come is worth being taken: 1 without a measurement."""
        return self.worth / self.count if self._compared else 1.0

    def moments(self) -> Moments:
        """What the rows add up to."""
        if self._shift is None:
            return Moments.zero(self.dim)
        # of x = z + s: sum x^T x = sum z^T z + s^T sum x + (sum z)^T s
        shift = self._shift.astype(np.float64)
        upper, _ = lapack.dtfttr(self.dim, self._triangle)
        upper = blas.dsyr2(1.0, shift, self._total - self.count / 2 * shift, a=upper, overwrite_a=True)
        gram = upper.T  # in the order of rows, as all that follows
        for start in range(0, self.dim, MIRRORED):
            stop = start + MIRRORED
            gram[start:stop, stop:] = gram[stop:, start:stop].T
            square = gram[start:stop, start:stop]
            square[:] = np.tril(square) + np.tril(square, -1).T
        return Moments(self.count, self._total, gram)


def drawn(rows: NDArray[Any], share: float, seed: int) -> NDArray[Any]:
    """A share of the rows, at random, in their order; the same ones for the same seed."""
    if share >= 1:
        return rows
    chosen = np.random.default_rng(seed).choice(len(rows), math.ceil(share * len(rows)), replace=False)
    return rows[np.sort(chosen)]


def _squared(array: NDArray[Any]) -> float:
    """The sum of squares. numpy's BLAS has threads of its own, which would wait, spinning, on the cores of scipy's."""
    flat = array.reshape(-1)
    return float(np.einsum("i,i->", flat, flat))


def _triangle(rows: NDArray[Any]) -> NDArray[Any]:
    """`rows^T rows`, packed."""
    multiply, dim = lapack.dsfrk if rows.dtype == np.float64 else lapack.ssfrk, rows.shape[1]
    packed = np.zeros(dim * (dim + 1) // 2, rows.dtype)
    result: NDArray[Any] = multiply(dim, len(rows), 1.0, rows.T, 0.0, packed, overwrite_c=1)
    return result

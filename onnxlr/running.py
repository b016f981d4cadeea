"""Moments of a tensor while its rows come in, batch by batch, at the precision and price of float32.

A matrix product in float64 costs twice that in float32, and the cast as much again. So products of a batch are taken in
float32 and added up in float64, with two things that make it safe:

    shift    the first batch's mean `s` is taken off every row before it is multiplied. Where the mean is large beside
             the spread `x - s` is exact, and the products have the size of the spread. It is put back at the end in
             float64, so that no digit of the covariance is lost to the mean. Shards have shifts of their own: they add
             up to the moments of a single pass within the rounding of float32, and exactly where rows are of float64
    range    a batch whose squares leave the range of float32 is multiplied in float64

Only what is on the diagonal and right of it is computed and kept, in blocks of `BLOCK` rows: `B` of them of width `d`
hold `(d + B) / 2d` of the whole.

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

from onnxlr.gram import Moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE = 8192
"""The most rows whose products are added up in float32."""
TINY = 1e-30
"""A sum of squares below this may have lost digits to the lower end of float32."""
BLOCK = 128
"""Rows of a block. Smaller ones would take less memory, and products more time."""
EVERY = 1.125
"""How many times as many rows there are at the next comparison: it costs as much as some hundred rows."""
ENOUGH, COMPARISONS = 8, 4
"""Independent rows a dimension that are enough, and the least number of batches that are compared to know it."""


def packed_bytes(dim: int) -> int:
    """What the moments of rows of width `dim` take while they come in."""
    return 8 * (sum(min(BLOCK, dim - start) * (dim - start) for start in range(0, dim, BLOCK)) + dim)


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
        self._blocks = [np.zeros((min(BLOCK, dim - start), dim - start)) for start in range(0, dim, BLOCK)]
        self._total, self._squares = np.zeros(dim), 0.0
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
            squares = _on_diagonal(rows)
            trace = _trace(squares)
            if dtype == np.float32 and not TINY < trace < np.inf:
                rows = rows.astype(np.float64)
                squares = _on_diagonal(rows)
                trace = _trace(squares)
        # a square on the diagonal is not finite where anything beside it is not
        if not np.isfinite(trace):
            raise FloatingPointError("a row is not finite")
        compared = self._watched and self.count >= self._due
        distance = 0.0
        for start, block, square in zip(range(0, self.dim, BLOCK), self._blocks, squares, strict=True):
            beside = _product(rows[:, start : start + BLOCK], rows[:, start + BLOCK :])
            if compared:
                distance += self._distance(block, square, beside, len(rows))
            block[:, : len(block)] += square
            block[:, len(block) :] += beside
        if compared:
            self._variance += distance / (1 / len(rows) + 1 / self.count)
            self._compared += 1
            self._due = EVERY * self.count
        self._total += total
        self._squares += trace
        self.count += len(rows)

    def _distance(self, block: NDArray[np.float64], square: NDArray[Any], beside: NDArray[Any], count: int) -> float:
        """What the covariance of `count` rows differs by from that of all before: its part in a block, squared."""
        of_square = block[:, : len(block)] / -self.count + square / count
        of_beside = block[:, len(block) :] / -self.count + beside / count
        # the diagonal twice: with few rows, those worth less than they seem are not to settle
        return _squared(of_square) + 2 * _squared(of_beside) + float(np.square(of_square.diagonal()).sum())

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
        if not np.isfinite(trace):
            raise FloatingPointError("a sum is not finite")
        for start, block in enumerate(self._blocks):
            block += gram[start * BLOCK : (start + 1) * BLOCK, start * BLOCK :]
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
        # of x = z + s: sum x^T x = sum z^T z + s^T o + o^T s, where o = sum x - n / 2 s
        shift = self._shift.astype(np.float64)
        offset = self._total - self.count / 2 * shift
        gram = np.empty((self.dim, self.dim))
        for index, block in enumerate(self._blocks):
            start, stop = index * BLOCK, index * BLOCK + len(block)
            own = np.outer(shift[start:stop], offset[start:])
            own += np.outer(offset[start:stop], shift[start:])
            own += block
            gram[start:stop, start:] = own
            gram[stop:, start:stop] = own[:, stop - start :].T
        return Moments(self.count, self._total, gram)


def drawn(rows: NDArray[Any], share: float, seed: int) -> NDArray[Any]:
    """A share of the rows, at random, in their order; the same ones for the same seed."""
    if share >= 1:
        return rows
    chosen = np.random.default_rng(seed).choice(len(rows), math.ceil(share * len(rows)), replace=False)
    return rows[np.sort(chosen)]


def _on_diagonal(rows: NDArray[Any]) -> list[NDArray[Any]]:
    """The squares of `rows^T rows` at the left of its blocks."""
    columns = (rows[:, start : start + BLOCK] for start in range(0, rows.shape[1], BLOCK))
    return [_product(own, own) for own in columns]


def _product(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """`left^T right`: of an array with itself it is symmetric, and half of the work."""
    product: NDArray[Any] = left[:PIECE].T @ right[:PIECE]
    for start in range(PIECE, len(left), PIECE):
        stop = start + PIECE
        product = np.add(product, left[start:stop].T @ right[start:stop], dtype=np.float64)
    return product


def _trace(squares: list[NDArray[Any]]) -> float:
    return float(sum(np.trace(square, dtype=np.float64) for square in squares))


def _squared(array: NDArray[Any]) -> float:
    """The sum of squares of a matrix."""
    return float(np.einsum("ij,ij->", array, array))

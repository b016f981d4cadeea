"""A convolution of kh x kw as one of kh x 1, then one of 1 x kw: `W [C_in kh kw, C_out]` cut between rows and columns.

With the patch `x [C_in kh kw]` written as `kw` vertical strips `x_j [C_in kh]`, and `W` as the matrix
`[C_in kh, kw C_out]`, of rank `r` and its parts `W_j [C_in kh, C_out]`,

    h = x_j A,  y = sum_j h_j B_j          A [C_in kh, r],  B [r kw, C_out],  W_j ~ A B_j

(Jaderberg, Vedaldi, Zisserman 2014, "Speeding up convolutional neural networks with low rank expansions", their
second scheme). The error that counts is `tr(L^T E^T C E L)`, `E` what `W` lost, `C` the covariance of whole patches and
`G = L L^T` what errors of the output weigh. Given `A`, the `r kw` numbers of all `h_j` are a linear map `x P` of the
patch, and `B = (P^T C P)^-1 P^T C W` is the least-squares solution.

`A` are the leading directions of a simpler problem, in which strips do not move together: the pair of
`[W_1 L, ..., W_kw L]` for the moments of a strip. They are nested, so one Cholesky decomposition of `P^T C P` gives the
error at every rank: what each column of `A` explains beyond those before it.

A pair projects what it sees, and cannot see too much in few data; a least-squares solution can. So `C` is shrunk
towards a multiple of the identity by as much as its number of rows asks for (`shrunk`), which also gives `W` back at
full rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from onnxlr.factorize import least_squares
from onnxlr.factors import Factors, Ordered
from onnxlr.gram import Moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxlr.gain import Gain

    Matrix = NDArray[np.float64]

LEAST_SHRUNK = 1e-5
"""The least share of the identity in a covariance: products of rows are summed in float32, and smaller ones drown."""


def as_columns(weight: Matrix, taps: int) -> Matrix:
    """`W [d_in, d_out]`, or [groups, d_in, d_out], as the matrix [d_in / taps, taps * d_out] that a split cuts."""
    return weight.reshape(*weight.shape[:-2], weight.shape[-2] // taps, taps * weight.shape[-1])


class SeparableDecomposition(Ordered):
    """The split of `weight [d_in, d_out]` between the rows and the columns of its kernel.

    Its factors are `A [d_in / taps, r]` and `B [r, taps * d_out]`: a pair of `as_columns(weight, taps)`.

    Parameters
    ----------
    weight
        `W`, float64; the columns of the kernel run fastest along `d_in`.
    taps
        The number `kw` of those columns.
    most
        The largest rank that is asked for.
    moments
        Of the patches [d_in].
    gain
        What errors of the output weigh [d_out, d_out]; None where all weigh the same.
    """

    def __init__(self, weight: Matrix, taps: int, most: int, moments: Moments, gain: Gain | None = None) -> None:
        self._weight, self._taps, self._mean, self._gain = weight, taps, moments.mean, gain
        weighed = weight if gain is None else weight @ gain.root
        strips = least_squares(as_columns(weighed, taps), strip_moments(moments, taps))
        # orthonormal, so that P^T C P is as well conditioned as C whatever the weight
        self._first = scipy.linalg.qr(strips.unbalanced(most).first, mode="economic", check_finite=False)[0]
        most = self._first.shape[1]
        covariance = shrunk(moments)
        half = self._narrowed(covariance)
        self._lower = scipy.linalg.cholesky(self._narrowed(half.T), lower=True, check_finite=False)
        seen = half @ weighed
        self._seen = scipy.linalg.solve_triangular(self._lower, seen, lower=True, check_finite=False)
        explained = np.sum(self._seen.reshape(most, -1) ** 2, axis=1)
        whole = most == min(as_columns(weight, taps).shape)
        total = float(np.sum(weighed * (covariance @ weighed)))
        super().__init__(np.append(explained, 0.0 if whole else max(total - float(explained.sum()), 0.0)))

    def _narrowed(self, matrix: Matrix) -> Matrix:
        """`P^T M [most * taps, n]` of a matrix [d_in, n]."""
        width = matrix.shape[1]
        strips = np.ascontiguousarray(matrix).reshape(len(self._first), self._taps * width)
        narrow: Matrix = self._first.T @ strips
        return narrow.reshape(-1, width)

    def unbalanced(self, rank: int) -> Factors:
        first, size = self._first[:, :rank], rank * self._taps
        lower, seen = self._lower[:size, :size], self._seen[:size]
        solved = scipy.linalg.solve_triangular(lower, seen, lower=True, trans="T", check_finite=False)
        if self._gain is not None:
            solved = solved @ self._gain.inverse_root
        second = solved.reshape(rank, -1)
        lost = self._weight - (first @ second).reshape(self._weight.shape)
        return Factors(first, second, self._mean @ lost)


def strip_moments(moments: Moments, taps: int) -> Moments:
    """The moments of vertical strips [d_in / taps], all of a patch alike, from those of patches [d_in]."""
    height = moments.dim // taps
    gram = moments.gram.reshape(height, taps, height, taps)
    return Moments(
        moments.count * taps,
        moments.total.reshape(height, taps).sum(1),
        np.ascontiguousarray(np.einsum("ajbj->ab", gram)),
    )


def shrunk(moments: Moments) -> Matrix:
    """The covariance [d, d], a share of it replaced by the identity at its mean level: positive definite.

    The share is the one that comes closest to the true covariance for so many independent rows of a normal distribution
    (Chen, Wiesel, Eldar, Hero 2010, "Shrinkage algorithms for MMSE covariance estimation"; their OAS).
    """
    covariance, count, dim = moments.covariance, moments.count, moments.dim
    trace, squares = float(np.trace(covariance)), float(np.sum(covariance**2))
    # less is what rounding leaves of the covariance of a constant
    floor = np.finfo(np.float64).eps * max(count, dim) * float(moments.mean @ moments.mean)
    identity: Matrix = np.eye(dim)
    if trace <= floor:
        return max(floor, float(np.sqrt(np.finfo(np.float64).tiny))) * identity
    uneven = squares - trace**2 / dim
    share = ((1 - 2 / dim) * squares + trace**2) / max((count + 1 - 2 / dim) * uneven, np.finfo(np.float64).tiny)
    share = min(1.0, max(LEAST_SHRUNK, share))
    return (1 - share) * covariance + share * trace / dim * identity

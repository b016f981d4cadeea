"""The forms in which a weight can be stored, and what is stored in each.

dense
    `W` itself, or what is left of it where hidden units were dropped (`onnxlr.width`).
pair
    `h = x A`, `y = h B`: `r (d_in + d_out)` parameters.
block
    A pair of which `r` rows of `A`, or columns of `B`, are the identity. Any product of rank `r` can be written so,
    since `A B = (A T) (T^-1 B)` for every invertible `T`. On the output side `T` are `r` neighbouring columns of `B`,
    so `y = [h, h M]` or `[h M, h]`; on the input side `T^-1` are `r` neighbouring rows of `A`, so
    `h = x_window + x_rest M`. `r (d_in + d_out) - r^2` parameters: fewer than dense at every rank below full, and the
    same error as the pair. The window lies at the start or at the end, where one Concat or Split of two parts does, and
    of the two it is the one whose `T` is better conditioned: rounding is amplified by its condition number. Where that
    is too large, the hidden units between two layers can be put in a better order (`onnxlr.order`).
separable
    Of a convolution of kh x kw: one of kh x 1 to `r` channels, then one of 1 x kw (`onnxlr.separable`):
    `r (C_in kh + kw C_out)` parameters. Together they are a kernel of kh x kw again.

A pair or block may share its first factor with other weights that read the same tensor, and any form may stand for a
narrowed weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy.linalg

from onnxlr.factors import Factors, balanced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]
    Index = NDArray[np.intp]
    Side = Literal["input", "output"]
    Products = tuple[tuple[int, int], ...]

MAX_CONDITION = {"float64": 1e6, "float32": 1e4, "float16": 30.0, "bfloat16": 10.0}
"""The largest condition number of a block's window, by dtype: it costs its logarithm in digits."""
LARGEST = {"float16": 65504.0}
"""The largest number of a dtype, where factors of a weight that fits it may be beyond."""


@dataclass(frozen=True, slots=True)
class Window:
    """Where the identity of a block lies: from feature `start` of its side on, at the start or the end of them."""

    side: Side
    start: int
    condition: float


@dataclass(frozen=True, slots=True)
class Stored:
    """What takes the place of one weight.

    Attributes
    ----------
    first
        `A [d_in, r]`, or [groups, d_in, r] of a weight with groups; for a block on the input side its rows outside the
        window, `[d_in - r, r]`; of a separable kernel `[d_in / taps, r]`; None for dense.
    second
        `B [r, d_out]`, or [groups, r, d_out]; for a block on the output side its columns outside the window,
        `[r, d_out - r]`; of a separable kernel `[r * taps, d_out]`, `taps` running fastest; for dense the weight.
    bias
        What is added to the bias [groups * d_out], or None.
    window
        Of a block.
    shared
        Under which name `first`, and `h`, are shared with other weights that read the same tensor.
    inputs, outputs
        The features of the dense layer that are left of its input and output, where it was narrowed.
    taps
        Of a separable kernel: its columns, as many neighbouring `h` the second product reads; else 1.
    """

    first: Matrix | None
    second: Matrix
    bias: Matrix | None
    window: Window | None = None
    shared: str | None = None
    inputs: Index | None = None
    outputs: Index | None = None
    taps: int = 1

    @classmethod
    def pair(cls, factors: Factors) -> Stored:
        """Two factors as they are."""
        return cls(factors.first, factors.second, factors.bias)

    @classmethod
    def separable(cls, factors: Factors, taps: int) -> Stored:
        """A kernel of `taps` columns, from `A [d_in / taps, r]` and `B [r, taps * d_out]`."""
        second = factors.second
        rows = second.reshape(*second.shape[:-2], second.shape[-2] * taps, second.shape[-1] // taps)
        return cls(factors.first, rows, factors.bias, taps=taps)

    def balanced(self) -> Stored:
        """A pair, with the singular values of its product split evenly; dense as it is."""
        if self.first is None:
            return self
        even = balanced(Factors(self.first, self.second, None))
        return replace(self, first=even.first, second=even.second)

    @property
    def rank(self) -> int | None:
        """The width of `h`; None for dense."""
        return None if self.first is None else int(self.first.shape[-1])

    @property
    def split(self) -> tuple[int, int]:
        """Of a block: how many features of its side are in the window and outside of it."""
        if self.first is None or self.window is None:
            return 0, 0
        return self.first.shape[1], self.first.shape[0] if self.window.side == "input" else self.second.shape[1]

    @property
    def products(self) -> Products:
        """The shapes of its matrices, of one group where there are groups."""
        matrices = (self.second,) if self.first is None else (self.first, self.second)
        return tuple((matrix.shape[-2], matrix.shape[-1]) for matrix in matrices)

    def factors(self, d_in: int, d_out: int) -> Factors:
        """The same map from and to all features of the dense layer [d_in], [d_out], as two factors.

        Features that were dropped are not read, and are given out as 0.
        """
        if self.first is not None and self.taps > 1:
            return self._merged(d_in, d_out)
        if self.first is None:
            first, second = np.eye(self.second.shape[-2]), self.second
        else:
            first, second = self.first, self.second
        window = self.window
        if window is not None and window.side == "input":
            first = np.insert(first, np.full(len(second), window.start), np.eye(len(second)), axis=0)
        if window is not None and window.side == "output":
            rank = first.shape[1]
            second = np.insert(second, np.full(rank, window.start), np.eye(rank), axis=1)
        bias = self.bias
        if self.inputs is not None:
            first = _placed(first, self.inputs, d_in, axis=0)
        if self.outputs is not None:
            second = _placed(second, self.outputs, d_out, axis=1)
            bias = None if bias is None else _placed(bias, self.outputs, d_out, axis=0)
        return Factors(first, second, bias)

    def _merged(self, d_in: int, d_out: int) -> Factors:
        """The kernel that a separable one is, as one factor, and the identity."""
        assert self.first is not None
        *groups, rank = *self.first.shape[:-2], self.first.shape[-1]
        kernel = (self.first @ self.second.reshape(*groups, rank, -1)).reshape(*groups, d_in, d_out)
        identity = np.broadcast_to(np.eye(min(d_in, d_out)), (*groups, min(d_in, d_out), min(d_in, d_out)))
        return Factors(kernel, identity, self.bias) if d_out <= d_in else Factors(identity, kernel, self.bias)


def _placed(array: Matrix, index: Index, length: int, axis: int) -> Matrix:
    shape = list(array.shape)
    shape[axis] = length
    result = np.zeros(shape)
    result[(slice(None),) * axis + (index,)] = array
    return result


def pair_products(d_in: int, d_out: int, rank: int) -> Products:
    """The shapes of the two matrices of a pair."""
    return (d_in, rank), (rank, d_out)


def separable_products(d_in: int, d_out: int, rank: int, taps: int) -> Products:
    """The shapes of the two matrices of a separable kernel."""
    return (d_in // taps, rank), (rank * taps, d_out)


def block_products(d_in: int, d_out: int, rank: int, side: Side) -> Products:
    """The shapes of the two matrices of a block."""
    if side == "input":
        return (d_in - rank, rank), (rank, d_out)
    return (d_in, rank), (rank, d_out - rank)


def best_window(factor: Matrix, side: Side) -> Window:
    """The best conditioned window of a first factor [d, r] on the input side, of a second [r, d] on the output side."""
    square = factor if side == "input" else factor.T
    rank = square.shape[1]
    conditions = {start: float(np.linalg.cond(square[start : start + rank])) for start in (0, len(square) - rank)}
    start = min(conditions, key=lambda key: conditions[key])
    return Window(side, start, conditions[start])


def holds(dtype: str, block: Stored) -> bool:
    """Whether a block is fit to be stored in `dtype`: its window well conditioned, its matrices in range."""
    matrices = (block.second,) if block.first is None else (block.first, block.second)
    in_range = all(np.abs(matrix).max(initial=0.0) <= LARGEST.get(dtype, np.inf) for matrix in matrices)
    return in_range and (block.window is None or block.window.condition <= MAX_CONDITION[dtype])


def as_block(pair: Stored, window: Window) -> Stored:
    """A pair as a block: the same product, `r^2` numbers fewer."""
    assert pair.first is not None
    rank = pair.first.shape[1]
    inside = np.arange(window.start, window.start + rank)
    if window.side == "output":
        square = pair.second[:, inside]
        solved = scipy.linalg.solve(square, np.delete(pair.second, inside, axis=1), check_finite=False)
        return replace(pair, first=pair.first @ square, second=solved, window=window)
    (result,) = as_shared_block([pair], window)
    return result


def as_shared_block(pairs: Sequence[Stored], window: Window) -> list[Stored]:
    """Pairs with one first factor as blocks on the input side, with one first factor still."""
    first = pairs[0].first
    assert first is not None
    inside = np.arange(window.start, window.start + first.shape[1])
    square = first[inside]
    rest = scipy.linalg.solve(square.T, np.delete(first, inside, axis=0).T, check_finite=False).T
    return [replace(pair, first=rest, second=square @ pair.second, window=window) for pair in pairs]

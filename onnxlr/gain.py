"""What errors of a layer's output weigh, beyond their size."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from onnxlr.gram import Moments

    Matrix = NDArray[np.float64]

SHRINKAGE = 0.03
"""Weight of the identity in the gradient moments: a random probe a row is a noisy look at them."""


class Gain:
    """A symmetric positive definite `G [d_out, d_out]` by which errors of an output are weighed, `e G e^T`.

    Block diagonal, of one block or several; a block that is a vector stands for a diagonal.
    """

    def __init__(self, *blocks: Matrix) -> None:
        self._blocks = blocks

    @classmethod
    def of(cls, gradients: Moments) -> Gain:
        """`E[g^T g]` of the network's gradients at an output, regularised; the identity where there are none."""
        gram = gradients.second
        scale = float(np.trace(gram)) / len(gram)
        if not scale > 0:
            return cls(np.ones(len(gram)))
        gram.flat[:: len(gram) + 1] += SHRINKAGE * scale
        return cls(gram)

    @classmethod
    def stacked(cls, gains: Sequence[Gain], scales: Sequence[float]) -> Gain:
        """That of outputs side by side; each multiplied by its scale."""
        pairs = zip(gains, scales, strict=True)
        return cls(*(scale * block for gain, scale in pairs for block in gain._blocks))

    def kept(self, features: NDArray[np.intp]) -> Gain:
        """That of some features of the output, in that order."""
        (block,) = self._blocks
        return Gain(block[features] if block.ndim == 1 else block[np.ix_(features, features)])

    def between(self, weight: Matrix) -> Matrix:
        """`W G W^T [d_in, d_in]` of `W [d_in, d_out]`."""
        result, start = np.zeros((len(weight), len(weight))), 0
        for block in self._blocks:
            own = weight[:, start : start + len(block)]
            result += (own * block if block.ndim == 1 else own @ block) @ own.T
            start += len(block)
        return result

    @cached_property
    def root(self) -> Matrix:
        """A lower triangular `L` with `L L^T = G`: the weighed error is `|e L|^2`."""
        roots = (
            np.diag(np.sqrt(block)) if block.ndim == 1 else scipy.linalg.cholesky(block, lower=True, check_finite=False)
            for block in self._blocks
        )
        root: Matrix = scipy.linalg.block_diag(*roots)
        return root

    @cached_property
    def inverse_root(self) -> Matrix:
        """`L^-1`."""
        inverse: Matrix = scipy.linalg.solve_triangular(
            self.root, np.eye(len(self.root)), lower=True, check_finite=False
        )
        return inverse

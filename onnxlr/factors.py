"""Two factors in place of a weight, and what it takes to have them at any rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import scipy.linalg

from onnxlr.spectrum import rank_for_energy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]


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
        """The same product as it comes, for less: for those who only try it."""

    def cut_by_energy(self, energy: float, rank: int) -> tuple[Factors, float]:
        """Balanced factors that keep the share `energy`, at a rank of at least `rank_for(energy)`, and their damage."""


def tails(energies: Matrix) -> Matrix:
    """What is lost at every rank from 0 to the full one [k + 1], of directions of falling energy [k]."""
    return np.append(np.cumsum(energies[::-1])[::-1], 0.0)


class Ordered(ABC):
    """Directions with an energy each [k], taken in this order: the damage of a cut is the energy of the tail."""

    def __init__(self, energies: Matrix) -> None:
        self._energies, self._tails = energies, tails(energies)

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


def evened(factors: Factors) -> Factors:
    """The same product with every column of the first factor as long as its row of the second.

    For next to nothing, and enough to hold the numbers of both in the range of one type.
    """
    columns, rows = np.linalg.norm(factors.first, axis=-2), np.linalg.norm(factors.second, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where((columns > 0) & (rows > 0), np.sqrt(rows / columns), 1.0)
    return Factors(factors.first * scale[..., None, :], factors.second / scale[..., :, None], factors.bias)


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

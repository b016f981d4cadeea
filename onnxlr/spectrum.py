"""Spectra of moments, and the utilized rank of a layer.

With `x [n, d_in]`, `W [d_in, d_out]` and the second moments `C = E[x^T x]`, a layer's outputs have the moments
`S = W^T C W`. Let `k_T` leading eigenvectors of `C` and `k_S` of `S` hold a share `e` of their energy (the sum of the
eigenvalues). What the layer really uses is `P_T W P_S`, of rank `min(k_T, k_S)`: its utilized rank. Utilization is
that rank over `min(d_in, d_out)`, and MLU its mean over the layers of a model (Garg, Koguchi, Verma, Ulbricht 2024,
"Revealing the Utilized Rank of Subspaces of Learning in Neural Networks", arXiv 2407.04797).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues `values [k]`, descending and not negative, with their eigenvectors `vectors [d, k]`."""

    values: Matrix
    vectors: Matrix


def eigen(matrix: Matrix) -> Spectrum:
    """The spectrum of a symmetric positive semi-definite matrix [d, d], all d eigenpairs."""
    values, vectors = np.linalg.eigh(matrix)
    return Spectrum(np.maximum(values[::-1], 0.0), vectors[:, ::-1])


def eigenvalues(matrix: Matrix) -> Matrix:
    """Those of `eigen(matrix)` alone, descending [d]: less than half of its work."""
    descending: Matrix = np.maximum(np.linalg.eigvalsh(matrix)[::-1], 0.0)
    return descending


def output_spectrum(weight: Matrix, inputs: Spectrum) -> Spectrum:
    """The spectrum of `S = W^T C W`, from the spectrum of `C`; at most `min(d_in, d_out)` eigenpairs.

    Computed as the singular values of `C^1/2 W`, which keeps twice the digits that forming `S` would.
    """
    root = np.sqrt(inputs.values)[:, None] * (inputs.vectors.T @ weight)
    _, singular, right = np.linalg.svd(root, full_matrices=False)
    return Spectrum(singular**2, right.T)


def rank_for_energy(values: Matrix, energy: float) -> int:
    """The least number of leading `values` (descending) that hold the share `energy` of their sum; at least 1."""
    cumulative = np.cumsum(values)
    # a share of exactly 1 must not hang on the last bit of a sum
    needed = energy * cumulative[-1] * (1 - 4 * np.finfo(np.float64).eps * len(values))
    return int(min(np.searchsorted(cumulative, needed) + 1, len(values)))


@dataclass(frozen=True, slots=True)
class Utilization:
    """What a layer uses of its rank at one share of energy; `utilization` in 0 to 1."""

    energy: float
    k_input: int
    k_output: int
    rank: int
    utilization: float


def utilization(weight: Matrix, inputs: Spectrum, outputs: Spectrum, energy: float) -> Utilization:
    """The utilized rank of `weight [d_in, d_out]` (arXiv 2407.04797), from the spectra of its inputs and outputs."""
    k_input, k_output = rank_for_energy(inputs.values, energy), rank_for_energy(outputs.values, energy)
    rank = min(k_input, k_output)
    return Utilization(energy, k_input, k_output, rank, rank / min(weight.shape))

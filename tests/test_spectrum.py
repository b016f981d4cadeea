"""Spectra and utilization against their definitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlr.spectrum import Spectrum, eigen, output_spectrum, rank_for_energy, utilization

if TYPE_CHECKING:
    from numpy.typing import NDArray

EPS = np.finfo(np.float64).eps

sizes = st.integers(1, 12)
seeds = st.integers(0, 9999)


def orthogonal(dim: int, seed: int) -> NDArray[np.float64]:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


def moments(dim: int, rank: int, decades: float, seed: int) -> NDArray[np.float64]:
    """Positive semi-definite [dim, dim] of a known rank, its nonzero eigenvalues spread over `decades`."""
    values = np.append(np.logspace(0, -decades, rank), np.zeros(dim - rank))
    basis = orthogonal(dim, seed)
    return (basis * values) @ basis.T


@settings(max_examples=40, deadline=None)
@given(dim=sizes, missing=st.integers(0, 11), decades=st.sampled_from([0.0, 3.0, 12.0]), seed=seeds)
def test_eigen_sorts_and_reconstructs(dim: int, missing: int, decades: float, seed: int) -> None:
    matrix = moments(dim, max(dim - missing, 0), decades, seed)
    spectrum = eigen(matrix)
    assert (np.diff(spectrum.values) <= 0).all()
    assert (spectrum.values >= 0).all()
    atol = 32 * dim * EPS * max(np.abs(matrix).max(), EPS)
    np.testing.assert_allclose((spectrum.vectors * spectrum.values) @ spectrum.vectors.T, matrix, rtol=0, atol=atol)
    np.testing.assert_allclose(spectrum.vectors.T @ spectrum.vectors, np.eye(dim), rtol=0, atol=32 * dim * EPS)


def test_eigen_makes_nothing_of_what_rounding_made_negative() -> None:
    assert eigen(np.diag([1.0, -1e-17])).values.tolist() == [1.0, 0.0]


@settings(max_examples=40, deadline=None)
@given(d_in=sizes, d_out=sizes, missing=st.integers(0, 11), decades=st.sampled_from([0.0, 2.0, 6.0]), seed=seeds)
def test_the_output_spectrum_is_that_of_the_output_moments(
    d_in: int, d_out: int, missing: int, decades: float, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((d_in, d_out))
    second = moments(d_in, max(d_in - missing, 0), decades, seed)
    outputs = output_spectrum(weight, eigen(second))
    count = min(d_in, d_out)
    assert outputs.values.shape == (count,)
    assert outputs.vectors.shape == (d_out, count)
    direct = weight.T @ second @ weight
    expected = np.linalg.eigvalsh(direct)[::-1][:count]
    atol = 64 * (d_in + d_out) * EPS * np.linalg.norm(weight) ** 2
    np.testing.assert_allclose(outputs.values, expected, rtol=0, atol=atol)
    np.testing.assert_allclose((outputs.vectors * outputs.values) @ outputs.vectors.T, direct, rtol=0, atol=atol)
    np.testing.assert_allclose(outputs.vectors.T @ outputs.vectors, np.eye(count), rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_the_output_spectrum_keeps_digits_that_forming_the_moments_loses(seed: int) -> None:
    dim = 12
    rotation = orthogonal(dim, seed)
    values = np.logspace(0, -22, dim)
    # C is diagonal and W a rotation, so the eigenvalues of S are those of C, far below the rounding of S itself
    accurate = output_spectrum(rotation, Spectrum(values, np.eye(dim))).values
    formed = np.maximum(np.linalg.eigvalsh(rotation.T @ np.diag(values) @ rotation)[::-1], 0.0)
    errors = [np.abs(found / values - 1).max() for found in (accurate, formed)]
    assert errors[0] < 1e-3
    assert errors[1] > 1


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    energy=st.integers(1, 100).map(lambda percent: percent / 100),
)
def test_the_rank_for_an_energy_is_the_least_by_definition(values: list[int], energy: float) -> None:
    falling = sorted(values, reverse=True)
    # in integers, so that the definition itself has no rounding
    least = next(k for k in range(1, len(falling) + 1) if 100 * sum(falling[:k]) >= round(100 * energy) * sum(falling))
    assert rank_for_energy(np.array(falling, np.float64), energy) == least


@settings(max_examples=30, deadline=None)
@given(dim=st.integers(1, 40), missing=st.integers(0, 39), seed=seeds)
def test_all_energy_is_the_numerical_rank(dim: int, missing: int, seed: int) -> None:
    rank = max(dim - missing, 1)
    spectrum = eigen(moments(dim, rank, 6.0, seed))
    assert rank_for_energy(spectrum.values, 1.0) == rank


def test_no_energy_needs_one_direction() -> None:
    for energy in (0.01, 1.0):
        assert rank_for_energy(np.zeros(5), energy) == 1


@settings(max_examples=40, deadline=None)
@given(
    d_in=st.integers(2, 14),
    d_out=st.integers(2, 14),
    k_input=st.integers(1, 14),
    k_output=st.integers(1, 14),
    seed=seeds,
)
def test_utilization_finds_the_ranks_it_was_built_with(
    d_in: int, d_out: int, k_input: int, k_output: int, seed: int
) -> None:
    k_input, k_output = min(k_input, d_in), min(k_output, d_in, d_out)
    # equal energies in k_input directions; W carries k_output of the axes of C, equally, and the rest not at all
    basis, out = orthogonal(d_in, seed), orthogonal(d_out, seed + 1)
    inputs = (basis[:, :k_input]) @ basis[:, :k_input].T
    weight = basis[:, :k_output] @ out[:, :k_output].T
    used = min(k_input, k_output)
    spectrum = eigen(inputs)
    found = utilization(weight, spectrum, output_spectrum(weight, spectrum), 1.0)
    assert (found.k_input, found.k_output) == (k_input, used)
    assert found.rank == used
    assert found.utilization == used / min(d_in, d_out)
    assert found.energy == 1.0


def test_the_input_can_be_what_limits_the_utilized_rank() -> None:
    # 90% of the input's energy is in one direction that the weight hardly reads: k_T = 1 while k_S = 3
    inputs = Spectrum(np.array([90.0, 4.0, 3.0, 3.0]), np.eye(4))
    weight = np.diag([1e-3, 1.0, 1.0, 1.0])
    found = utilization(weight, inputs, output_spectrum(weight, inputs), 0.9)
    assert (found.k_input, found.k_output, found.rank, found.utilization) == (1, 3, 1, 0.25)


def test_a_weight_of_zeros_uses_one_direction() -> None:
    inputs = eigen(np.eye(4))
    found = utilization(np.zeros((4, 3)), inputs, output_spectrum(np.zeros((4, 3)), inputs), 0.99)
    assert (found.k_output, found.rank) == (1, 1)

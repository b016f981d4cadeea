"""Factors against what they are defined to be, computed the naive way on the rows themselves."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlr import layer as of_model
from onnxlr.factorize import OutputDecomposition, UtilizedDecomposition, WeightDecomposition
from onnxlr.factors import Factors, balanced
from onnxlr.gram import Moments
from onnxlr.spectrum import rank_for_energy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxlr.factors import Decomposition

    Matrix = NDArray[np.float64]

EPS = np.finfo(np.float64).eps
RIDGE = 1e-6  # the most, of the whole energy, that the regularisation may cost


@dataclass(frozen=True)
class Layer:
    """Rows x [n, d_in] and a weight [d_in, d_out]."""

    x: Matrix
    weight: Matrix

    @property
    def full(self) -> int:
        return min(self.weight.shape)

    def decompositions(self) -> dict[str, Decomposition]:
        return {
            "weight": WeightDecomposition(self.weight),
            "output": of_model.Layer(self.weight, Moments.of(self.x)).decompose(),
            "observed": OutputDecomposition(self.weight, Moments.of(self.x @ self.weight), observed_output=True),
            "utilized": UtilizedDecomposition(self.weight, Moments.of(self.x)),
        }

    def in_use(self) -> dict[str, Decomposition]:
        """Those that onnxlr uses: outputs are observed where they are the smaller side, so that they span all of W."""
        found = self.decompositions()
        if self.weight.shape[1] > self.weight.shape[0]:
            del found["observed"]
        return found

    def error(self, factors: Factors) -> float:
        """Mean over the rows of `||x W - (x A B + bias)||^2`."""
        bias = 0.0 if factors.bias is None else factors.bias
        missing = self.x @ (self.weight - factors.first @ factors.second) - bias
        return float(np.square(missing).sum(1).mean())

    def rounding(self) -> float:
        """What the rounding of second moments may do to an error: they hold its squares, of the size of `(x W)^2`."""
        rows, (d_in, d_out) = len(self.x), self.weight.shape
        size = float(np.square(self.x).sum(1).mean() * np.square(self.weight).sum())
        return 8 * (rows + d_in + d_out) * EPS * size


def conditioned(rows: int, columns: int, decades: float, rng: np.random.Generator) -> Matrix:
    left, _, right = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
    return (left * np.logspace(0, -decades, min(rows, columns))) @ right


@st.composite
def layers(draw: st.DrawFn, *, min_rows: int = 1) -> Layer:
    """Layers of any shape; their data may be ill-conditioned, too few, in a subspace, constant or far from zero."""
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    d_in, d_out, rows = draw(st.integers(1, 10)), draw(st.integers(1, 10)), draw(st.integers(min_rows, 40))
    weight = conditioned(d_in, d_out, draw(st.sampled_from([0.0, 2.0, 8.0])), rng)
    kind = draw(st.sampled_from(["any", "ill-conditioned", "subspace", "constant", "zero", "weight of zeros"]))
    x = rng.standard_normal((rows, d_in)) @ conditioned(d_in, d_in, 6.0 if kind == "ill-conditioned" else 1.0, rng)
    if kind == "subspace":
        x[:, draw(st.integers(0, d_in - 1)) :] = 0
    if kind == "constant":
        x[:] = x[0]
    if kind == "zero":
        x[:] = 0
    if kind == "weight of zeros":
        weight[:] = 0
    x += draw(st.sampled_from([0.0, 1.0, 30.0])) * rng.standard_normal(d_in) * (kind != "zero")
    return Layer(x, weight)


def well_conditioned(d_in: int, d_out: int, seed: int, rows: int = 200) -> Layer:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, d_in)) @ conditioned(d_in, d_in, 1.5, rng) + rng.standard_normal(d_in)
    return Layer(x, conditioned(d_in, d_out, 1.0, rng))


@settings(max_examples=80, deadline=None)
@given(layer=layers())
def test_full_rank_gives_the_weight_back(layer: Layer) -> None:
    scale = np.linalg.norm(layer.weight)
    for name, decomposition in layer.in_use().items():
        factors = decomposition.cut(layer.full)
        assert factors.rank == layer.full
        assert np.linalg.norm(factors.first @ factors.second - layer.weight) <= 1e-9 * scale, name
        bias = np.zeros(1) if factors.bias is None else factors.bias
        assert np.linalg.norm(bias) <= 1e-9 * scale * np.linalg.norm(layer.x.mean(0)), name
        assert decomposition.damage(layer.full) == 0, name


@settings(max_examples=80, deadline=None)
@given(layer=layers())
def test_the_damage_is_the_error_on_the_calibration_rows(layer: Layer) -> None:
    for name, decomposition in layer.in_use().items():
        for rank in range(1, layer.full + 1):
            factors = decomposition.cut(rank)
            damage = decomposition.damage(rank)
            if name == "weight":
                error = float(np.square(layer.weight - factors.first @ factors.second).sum())
                assert damage == pytest.approx(error, rel=1e-9, abs=32 * EPS * decomposition.total)
            else:
                assert damage == pytest.approx(layer.error(factors), rel=1e-9, abs=layer.rounding()), name


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_the_total_is_what_is_lost_with_everything(layer: Layer) -> None:
    outputs = layer.x @ layer.weight
    atol = layer.rounding()
    found = layer.decompositions()
    assert found["weight"].total == pytest.approx(np.square(layer.weight).sum(), rel=1e-12)
    assert found["output"].total == pytest.approx(
        np.square(outputs - outputs.mean(0)).sum(1).mean(), rel=1e-9, abs=atol
    )
    assert found["utilized"].total == pytest.approx(np.square(outputs).sum(1).mean(), rel=1e-9, abs=atol)


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_the_damage_never_grows_with_the_rank(layer: Layer) -> None:
    for decomposition in layer.decompositions().values():
        damages = [decomposition.damage(rank) for rank in range(layer.full + 1)]
        assert damages[0] == decomposition.total
        assert all(after <= before for before, after in itertools.pairwise(damages))
        assert min(damages) >= 0


@settings(max_examples=60, deadline=None)
@given(layer=layers(), energy=st.sampled_from([0.3, 0.9, 0.99]))
def test_the_rank_for_an_energy_is_the_least_that_keeps_it(layer: Layer, energy: float) -> None:
    for name in ("weight", "output"):
        decomposition = layer.decompositions()[name]
        rank, lost = decomposition.rank_for(energy), (1 - energy) * decomposition.total
        slack = 1e-12 * decomposition.total
        assert 1 <= rank <= layer.full
        assert decomposition.damage(rank) <= lost + slack
        assert rank == 1 or decomposition.damage(rank - 1) >= lost - slack


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_the_corrected_bias_makes_the_mean_error_zero(layer: Layer) -> None:
    scale = np.linalg.norm(layer.weight) * np.linalg.norm(layer.x, axis=1).max()
    for name in ("output", "observed"):
        for rank in range(1, layer.full + 1):
            factors = layer.decompositions()[name].cut(rank)
            assert factors.bias is not None
            missing = layer.x @ (layer.weight - factors.first @ factors.second) - factors.bias
            assert np.linalg.norm(missing.mean(0)) <= 1e-12 * scale


def least_error(layer: Layer, rank: int) -> float:
    """The optimum of the output objective, reached another way: whiten by Cholesky, then truncate an SVD."""
    centred = layer.x - layer.x.mean(0)
    lower = np.linalg.cholesky(centred.T @ centred / len(centred))
    left, singular, right = np.linalg.svd(lower.T @ layer.weight, full_matrices=False)
    singular[rank:] = 0
    product = np.linalg.solve(lower.T, (left * singular) @ right)
    missing = centred @ (layer.weight - product)
    return float(np.square(missing).sum(1).mean())


shapes = pytest.mark.parametrize(("d_in", "d_out"), [(6, 11), (11, 6), (8, 8)])


@shapes
@pytest.mark.parametrize("seed", range(3))
def test_no_rank_r_regression_has_a_lower_output_error(d_in: int, d_out: int, seed: int) -> None:
    layer = well_conditioned(d_in, d_out, seed)
    found = layer.decompositions()
    for rank in range(1, layer.full):
        errors = {name: layer.error(decomposition.cut(rank)) for name, decomposition in found.items()}
        optimum = least_error(layer, rank)
        # the ridge moves the objective by at most RIDGE times the whole energy, and with it the optimum
        slack = RIDGE * found["output"].total
        for name in ("output", "observed"):
            assert optimum - 1e-12 * found["output"].total <= errors[name] <= optimum + slack
        assert errors["output"] < errors["utilized"]
        assert errors["output"] < errors["weight"]


@shapes
def test_no_random_neighbour_has_a_lower_output_error(d_in: int, d_out: int) -> None:
    layer, rng = well_conditioned(d_in, d_out, 7), np.random.default_rng(8)
    for rank in (1, 3, 5):
        best = layer.decompositions()["output"].cut(rank)
        error = layer.error(best)
        for _ in range(100):
            step = 10 ** rng.uniform(-4, 0)
            first = best.first + step * rng.standard_normal(best.first.shape)
            second = best.second + step * rng.standard_normal(best.second.shape)
            bias = (layer.x @ (layer.weight - first @ second)).mean(0)
            other = Factors(first, second, bias)
            assert layer.error(other) >= error - RIDGE * layer.decompositions()["output"].total


@shapes
def test_observed_outputs_give_the_same_factors(d_in: int, d_out: int) -> None:
    layer = well_conditioned(d_in, d_out, 11)
    found = layer.decompositions()
    for rank in range(1, layer.full + 1):
        a, b = found["output"].cut(rank), found["observed"].cut(rank)
        assert a.bias is not None
        assert b.bias is not None
        np.testing.assert_allclose(b.first @ b.second, a.first @ a.second, rtol=0, atol=1e-9)
        np.testing.assert_allclose(b.bias, a.bias, rtol=0, atol=1e-9)
        assert found["observed"].damage(rank) == pytest.approx(found["output"].damage(rank), rel=1e-9, abs=1e-13)


@shapes
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_directions_without_data_are_ordered_by_the_weight(d_in: int, d_out: int, offset: float) -> None:
    rng = np.random.default_rng(3)
    constant = Layer(np.tile(offset * rng.standard_normal(d_in), (30, 1)), conditioned(d_in, d_out, 2.0, rng))
    found = constant.decompositions()
    for rank in range(1, constant.full):
        for name in ("output", "observed"):
            factors = found[name].cut(rank)
            lost = np.square(constant.weight - factors.first @ factors.second).sum()
            assert lost == pytest.approx(found["weight"].damage(rank), rel=1e-9), name


def test_unseen_directions_come_after_those_the_data_use() -> None:
    rng = np.random.default_rng(5)
    x = np.zeros((50, 6))
    x[:, :2] = rng.standard_normal((50, 2))
    # what no row shows has by far the larger weights
    layer = Layer(x, np.vstack([0.1 * rng.standard_normal((2, 8)), 10 * rng.standard_normal((4, 8))]))
    for name in ("output", "observed"):
        error = layer.error(layer.decompositions()[name].cut(2))
        assert error <= RIDGE * layer.decompositions()[name].total, name
    assert layer.error(layer.decompositions()["weight"].cut(2)) > 0.1 * layer.decompositions()["output"].total


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), d_in=st.integers(2, 10), d_out=st.integers(2, 10), energy=st.floats(0.3, 0.999))
def test_utilized_is_the_weight_between_two_projections(seed: int, d_in: int, d_out: int, energy: float) -> None:
    layer = well_conditioned(d_in, d_out, seed)
    second = layer.x.T @ layer.x / len(layer.x)
    in_values, in_vectors = (array[..., ::-1] for array in np.linalg.eigh(second))
    out_values, out_vectors = (array[..., ::-1] for array in np.linalg.eigh(layer.weight.T @ second @ layer.weight))

    def projected(k_input: int, k_output: int) -> Matrix:
        used, given_out = in_vectors[:, :k_input], out_vectors[:, :k_output]
        product: Matrix = used @ used.T @ layer.weight @ given_out @ given_out.T
        return product

    decomposition = UtilizedDecomposition(layer.weight, Moments.of(layer.x))
    for rank in range(1, layer.full):
        factors = decomposition.cut(rank)
        assert factors.bias is None
        assert factors.rank == rank
        np.testing.assert_allclose(factors.first @ factors.second, projected(rank, rank), rtol=0, atol=1e-8)
    k_input, k_output = rank_for_energy(in_values, energy), rank_for_energy(np.maximum(out_values, 0), energy)
    rank = decomposition.rank_for(energy)
    assert rank == min(k_input, k_output)
    for asked in range(rank, layer.full + 1):
        factors, damage = decomposition.cut_by_energy(energy, asked)
        assert factors.rank == asked
        expected = projected(max(k_input, asked), max(k_output, asked))
        np.testing.assert_allclose(factors.first @ factors.second, expected, rtol=0, atol=1e-8)
        lost = layer.weight - expected
        assert damage == pytest.approx(float(np.sum(lost * (second @ lost))), abs=1e-8 * decomposition.total)


@pytest.mark.parametrize("name", ["weight", "output"])
def test_a_cut_by_energy_is_the_cut_at_its_rank(name: str) -> None:
    decomposition = well_conditioned(7, 9, 1).decompositions()[name]
    (a, damage), b = decomposition.cut_by_energy(0.9, 4), decomposition.cut(4)
    np.testing.assert_array_equal(a.first, b.first)
    np.testing.assert_array_equal(a.second, b.second)
    assert damage == decomposition.damage(4)


def assert_balanced(factors: Factors) -> None:
    """Orthogonal columns and rows of equal, falling norms: A^T A = B B^T = diag(s)."""
    left, right = factors.first.T @ factors.first, factors.second @ factors.second.T
    singular = np.linalg.svd(factors.first @ factors.second, compute_uv=False)[: factors.rank]
    atol = 1e-12 * max(float(singular[0]), EPS)
    np.testing.assert_allclose(left, np.diag(singular), rtol=0, atol=atol)
    np.testing.assert_allclose(right, np.diag(singular), rtol=0, atol=atol)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    rank=st.integers(1, 9),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_balancing_keeps_the_product_and_evens_the_factors(
    seed: int, d_in: int, d_out: int, rank: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    lopsided = Factors(scale * rng.standard_normal((d_in, rank)), rng.standard_normal((rank, d_out)) / scale, None)
    product = lopsided.first @ lopsided.second
    even = balanced(lopsided)
    assert even.rank == min(rank, d_in, d_out)
    np.testing.assert_allclose(even.first @ even.second, product, rtol=0, atol=1e-13 * rank * np.linalg.norm(product))
    assert_balanced(even)


@settings(max_examples=30, deadline=None)
@given(layer=layers())
def test_every_cut_is_balanced(layer: Layer) -> None:
    for decomposition in layer.decompositions().values():
        for rank in range(1, layer.full + 1):
            assert_balanced(decomposition.cut(rank))


def test_balancing_keeps_the_bias() -> None:
    bias = np.arange(3.0)
    assert balanced(Factors(np.ones((4, 2)), np.ones((2, 3)), bias)).bias is bias

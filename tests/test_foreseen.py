"""Damages that eigenvalues alone foresee, and cheaper ways to the same factors, against the full answer in float64."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxlr.factorize import RIDGE
from onnxlr.factors import Factors, evened
from onnxlr.gain import Gain
from onnxlr.gram import Moments
from onnxlr.layer import Layer, stacked
from onnxlr.recent import Recent, decomposed
from onnxlr.width import Elimination

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxlr.factors import Decomposition

    Matrix = NDArray[np.float64]

EPS = np.finfo(np.float64).eps
KINDS = ("any", "ill-conditioned", "outlier", "few rows", "subspace", "constant", "zero")


def rows_of(kind: str, width: int, rng: np.random.Generator, rows: int = 60) -> Matrix:
    x = rng.standard_normal((rows, width)) @ rng.standard_normal((width, width))
    if kind == "ill-conditioned":
        x *= np.logspace(0, -6, width)
    if kind == "outlier":
        x[:, 0] *= 1e3
    if kind == "few rows":
        x = x[: max(width // 2, 1)]
    if kind == "subspace":
        x[:, width // 2 :] = 0
    if kind == "constant":
        x[:] = 30 * x[0]
    if kind == "zero":
        x[:] = 0
    return x


def gain_of(width: int, rng: np.random.Generator) -> Gain:
    return Gain.of(Moments.of(rng.standard_normal((20, width)) * np.logspace(0, -3, width)))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Of all kinds of data, weighed or not, input or output observed."""
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    d_in, d_out = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    weight = rng.standard_normal((d_in, d_out)) * np.logspace(0, -draw(st.sampled_from([0, 3, 8])), d_out)
    x = rows_of(draw(st.sampled_from(KINDS)), d_in, rng)
    gain = gain_of(d_out, rng) if draw(st.booleans()) else None
    if draw(st.booleans()) and d_out <= d_in:
        return Layer(weight, Moments.of(x @ weight), observed_output=True, gain=gain)
    return Layer(weight, Moments.of(x), gain=gain)


def size(layer: Layer) -> float:
    """Of what second moments are rounded relative to: the mean counts too."""
    moments, root = layer.moments, np.eye(layer.d_out) if layer.gain is None else layer.gain.root
    assert moments is not None
    second = moments.second if layer.observed_output else layer.matrix.T @ moments.second @ layer.matrix
    spread = np.trace(moments.second) * (1.0 if layer.observed_output else np.sum(layer.matrix**2))
    return float(np.trace(root.T @ second @ root) + spread * np.sum(root**2))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layer=layers())
def test_what_is_foreseen_is_what_the_decomposition_loses(layer: Layer) -> None:
    decomposition, foreseen = layer.decompose(), layer.foresee()
    assert len(foreseen) == min(layer.d_in, layer.d_out) + 1
    # a constant loses nothing but what rounding makes of it
    room = 2 * RIDGE * decomposition.total + 100 * (60 + layer.d_in) * EPS * size(layer)
    for rank, damage in enumerate(foreseen):
        assert damage == pytest.approx(decomposition.damage(rank), rel=0, abs=room)
    assert foreseen[-1] == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layer=layers())
def test_the_damage_is_the_weighed_error_whatever_the_way(layer: Layer) -> None:
    assume(not layer.observed_output)  # only the moments of the input tell what an error does
    decomposition = layer.decompose()
    assert layer.moments is not None
    root = np.eye(layer.d_out) if layer.gain is None else layer.gain.root
    for rank in range(min(layer.d_in, layer.d_out) + 1):
        factors = decomposition.unbalanced(rank)
        missing = (layer.matrix - factors.first @ factors.second) @ root
        lost = float(np.sum(missing * (layer.moments.covariance @ missing)))
        room = 1e-9 * decomposition.total + 100 * (60 + layer.d_in) * EPS * size(layer)
        assert decomposition.damage(rank) == pytest.approx(lost, rel=0, abs=room)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), d_in=st.integers(1, 9), more=st.integers(1, 9), seed=st.integers(0, 999))
def test_a_wide_weight_is_cut_as_well_as_by_its_outputs(kind: str, d_in: int, more: int, seed: int) -> None:
    """The optimum in another way: the singular values of a root of the regularised covariance times the weight."""
    rng = np.random.default_rng(seed)
    weight, moments = rng.standard_normal((d_in, d_in + more)), Moments.of(rows_of(kind, d_in, rng))
    decomposition = Layer(weight, moments).decompose()
    values, vectors = np.linalg.eigh(moments.covariance)
    singular = np.linalg.svd((vectors * np.sqrt(np.maximum(values, 0))).T @ weight, compute_uv=False)
    room = RIDGE * decomposition.total + 100 * (60 + d_in) * EPS * size(Layer(weight, moments))
    for rank in range(d_in + 1):
        optimum = float(np.sum(singular[rank:] ** 2))
        assert optimum - room <= decomposition.damage(rank) <= optimum + room


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    d_in=st.integers(1, 8),
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    weighed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_weights_side_by_side_are_weighed_each_by_its_own(
    kind: str, d_in: int, widths: list[int], weighed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    moments = Moments.of(rows_of(kind, d_in, rng))
    members = [
        Layer(rng.standard_normal((d_in, width)), moments, gain=gain_of(width, rng) if weighed else None)
        for width in widths
    ]
    scales = [1.0, 1e-6, 0.3][: len(widths)]
    together = stacked(members, scales)
    decomposition = together.decompose()
    room = 1e-9 * decomposition.total + 100 * (60 + d_in) * EPS * size(together)
    for rank in range(min(d_in, sum(widths)) + 1):
        factors, start, lost = decomposition.unbalanced(rank), 0, 0.0
        for member, scale in zip(members, scales, strict=True):
            own = factors.second[:, start : start + member.d_out]
            start += member.d_out
            error = member.matrix - factors.first @ own
            error = error if member.gain is None else error @ member.gain.root
            lost += scale * float(np.sum(error * (moments.covariance @ error)))
        assert decomposition.damage(rank) == pytest.approx(lost, rel=0, abs=room)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.integers(0, 3),
    d_in=st.integers(1, 6),
    d_out=st.integers(1, 6),
    rank=st.integers(0, 6),
    decades=st.integers(0, 8),
    seed=st.integers(0, 999),
)
def test_evening_keeps_the_product(groups: int, d_in: int, d_out: int, rank: int, decades: int, seed: int) -> None:
    rng, front = np.random.default_rng(seed), (groups,) if groups else ()
    first = rng.standard_normal((*front, d_in, rank)) * np.logspace(decades, -decades, rank)
    second = rng.standard_normal((*front, rank, d_out))
    first[..., : rank // 2] *= seed % 3 > 0
    even = evened(Factors(first, second, None))
    scale = np.abs(first) @ np.abs(second)
    assert (np.abs(even.first @ even.second - first @ second) <= 8 * EPS * scale).all()
    columns, rows = np.linalg.norm(even.first, axis=-2), np.linalg.norm(even.second, axis=-1)
    np.testing.assert_allclose(np.where(columns > 0, rows, 0), columns, rtol=1e-12)


def test_what_is_foreseen_is_decomposed_only_for_its_factors() -> None:
    rng = np.random.default_rng(0)
    layer = Layer(rng.standard_normal((6, 9)), Moments.of(rows_of("any", 6, rng)))
    made: list[Decomposition] = []

    def make() -> Decomposition:
        made.append(layer.decompose())
        return made[-1]

    found = decomposed(make, Recent(), layer.foresee)
    assert found.total == layer.foresee()[0]
    assert found.damage(3) == layer.foresee()[3]
    assert found.damage(99) == 0
    assert not made
    assert found.cut(3).rank == 3
    assert len(made) == 1


def test_a_decomposition_is_made_again_for_its_factors_alone() -> None:
    rng, recent = np.random.default_rng(0), Recent[Any]()
    made: list[int] = []
    own = [Layer(rng.standard_normal((6, 4)), Moments.of(rng.standard_normal((30, 6)))) for _ in range(2)]

    def make(number: int) -> Decomposition:
        made.append(number)
        return own[number].decompose()

    first, second = (decomposed(partial(make, number), recent) for number in range(2))
    wholes = [layer.decompose() for layer in own]
    for decomposition, whole in zip((first, second), wholes, strict=True):
        assert [decomposition.damage(rank) for rank in range(6)] == [whole.damage(rank) for rank in range(6)]
    assert (first.total, second.total) == (wholes[0].total, wholes[1].total) == (first.damage(0), second.damage(0))
    assert made == [0, 1]
    np.testing.assert_array_equal(first.unbalanced(2).first, own[0].decompose().unbalanced(2).first)
    assert made == [0, 1, 0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), hidden=st.integers(6, 24), weighed=st.booleans(), seed=st.integers(0, 999))
def test_the_order_in_float32_is_as_good_as_a_greedy_one_in_float64(
    kind: str, hidden: int, weighed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    z = np.maximum(rows_of(kind, hidden, rng), 0) if kind != "constant" else rows_of(kind, hidden, rng)
    weight, moments = rng.standard_normal((hidden, 5)), Moments.of(z)
    root = gain_of(5, rng).root if weighed else None
    elimination = Elimination(weight, moments, root, 1)
    covariance = moments.covariance
    covariance += np.eye(hidden) * 1e-4 * np.trace(covariance) / hidden
    value = weight if root is None else weight @ root
    left = list(range(hidden))
    # where nothing moves every order is as good
    moves = np.trace(covariance) > 1e-9 * np.trace(moments.second)
    for width in reversed(elimination.widths) if moves else ():
        inverse = np.linalg.inv(covariance[np.ix_(left, left)])
        current = inverse @ covariance[left] @ value
        left.pop(int(np.argmin(np.sum(current**2, axis=1) / np.diag(inverse))))
        small = covariance[np.ix_(left, left)]
        rest = np.setdiff1d(np.arange(hidden), left)
        schur = covariance[np.ix_(rest, rest)] - covariance[np.ix_(rest, left)] @ np.linalg.solve(
            small, covariance[np.ix_(left, rest)]
        )
        lost = float(np.sum(value[rest] * (schur @ value[rest])))
        whole = float(np.sum(value * (covariance @ value)))
        assert elimination.damage(width) <= lost * 1.05 + 1e-6 * whole

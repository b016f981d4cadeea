"""Hidden units that are dropped, against least squares on the rows themselves."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlr.gram import Moments
from onnxlr.width import RIDGE, Elimination, stand_in

Array = np.ndarray[Any, Any]

ROUNDING = 1e-5
"""How far damages may be off, relative to themselves: they are found in float32."""


def case(hidden: int, d_out: int, seed: int, rows: int = 80) -> tuple[Array, Array, Array]:
    """Rows of hidden units that hang together, as after an activation; a weight; a root of what errors weigh."""
    rng = np.random.default_rng(seed)
    z = np.maximum(rng.standard_normal((rows, 5)) @ rng.standard_normal((5, hidden)) + rng.standard_normal(hidden), 0)
    z += 0.1 * rng.standard_normal(z.shape)
    gradients = rng.standard_normal((50, d_out)) * np.logspace(0, -1, d_out)
    values, vectors = np.linalg.eigh(gradients.T @ gradients / 50)
    return z, rng.standard_normal((hidden, d_out)), (vectors * np.sqrt(values)) @ vectors.T


def regularised(z: Array) -> Array:
    """Centred rows with `Z^T Z` their covariance, and below them the ridge as rows of its own."""
    centred = (z - z.mean(0)) / np.sqrt(len(z))
    ridge = RIDGE * np.trace(centred.T @ centred) / z.shape[1]
    return np.vstack([centred, np.sqrt(ridge) * np.eye(z.shape[1])])


def least_squares(z: Array, weight: Array, kept: Any) -> Array:
    padded = regularised(z)
    solution: Array = np.linalg.lstsq(padded[:, kept], padded @ weight, rcond=None)[0]
    return solution


def lost(z: Array, weight: Array, kept: Any, root: Array) -> float:
    """The weighed error of the best weight for the units kept."""
    padded = regularised(z)
    error = padded @ weight - padded[:, kept] @ least_squares(z, weight, kept)
    return float(np.sum((error @ root) ** 2))


shapes = {
    "hidden": st.integers(2, 14), "d_out": st.integers(1, 6), "step": st.integers(1, 5), "seed": st.integers(0, 1000)
}  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True)
@given(**shapes, weighed=st.booleans())
def test_the_weights_and_damages_are_those_of_least_squares(
    hidden: int, d_out: int, step: int, seed: int, weighed: bool
) -> None:
    z, weight, root = case(hidden, d_out, seed)
    root = root if weighed else np.eye(d_out)
    elimination = Elimination(weight, Moments.of(z), root if weighed else None, step)
    assert elimination.widths == list(range(step, hidden, step))
    damages = []
    for width in elimination.widths:
        kept = elimination.kept(width)
        assert len(kept) == width
        assert np.array_equal(kept, np.unique(kept))
        found, bias = stand_in(weight, Moments.of(z), kept)
        np.testing.assert_allclose(found, least_squares(z, weight, kept), rtol=0, atol=1e-4 * np.abs(weight).max())
        error = z @ weight - (z[:, kept] @ found + bias)
        assert np.abs(error.mean(0)).max() < 1e-9
        assert elimination.damage(width) == pytest.approx(lost(z, weight, kept, root), rel=ROUNDING)
        # the ridge only ever adds to what is really lost
        real = float(np.mean(np.sum((error @ root) ** 2, axis=1)))
        ridge = RIDGE * np.trace(np.cov(z.T, bias=True).reshape(hidden, hidden)) / hidden
        room = np.sum((weight @ root) ** 2) + np.sum((found @ root) ** 2)
        assert real * (1 - ROUNDING) <= elimination.damage(width) <= real + ridge * room
        damages.append(elimination.damage(width))
    assert damages == sorted(damages, reverse=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(hidden=st.integers(2, 9), d_out=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_first_unit_to_go_is_the_cheapest_of_all(hidden: int, d_out: int, seed: int) -> None:
    z, weight, root = case(hidden, d_out, seed)
    elimination = Elimination(weight, Moments.of(z), root, 1)
    every = {kept: lost(z, weight, list(kept), root) for kept in combinations(range(hidden), hidden - 1)}
    assert tuple(elimination.kept(hidden - 1)) == min(every, key=lambda kept: every[kept])
    assert elimination.damage(hidden - 1) == pytest.approx(min(every.values()), rel=ROUNDING)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(hidden=st.integers(3, 8), d_out=st.integers(1, 5), step=st.integers(2, 4), seed=st.integers(0, 1000))
def test_a_step_goes_one_unit_after_the_other(hidden: int, d_out: int, step: int, seed: int) -> None:
    # the pool holds all units here, so steps of several end where steps of one do
    z, weight, root = case(hidden, d_out, seed)
    single, several = (Elimination(weight, Moments.of(z), root, size) for size in (1, step))
    for width in several.widths:
        if hidden - width <= step:
            assert np.array_equal(several.kept(width), single.kept(width))
            assert several.damage(width) == pytest.approx(single.damage(width), rel=ROUNDING)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_copies_of_units_cost_nothing_to_drop(step: int) -> None:
    z, weight, _ = case(8, 5, 0)
    z = np.hstack([z, z])
    twice = np.vstack([weight, 0.5 * weight])
    elimination = Elimination(twice, Moments.of(z), None, step)
    energy = float(np.sum(np.var(z @ twice, axis=0)))
    assert elimination.damage(8) < 1e-3 * energy
    assert sorted(elimination.kept(8) % 8) == list(range(8))
    assert elimination.damage(8 - step) > 10 * elimination.damage(8)
    found, bias = stand_in(twice, Moments.of(z), elimination.kept(8))
    stood_in = z[:, elimination.kept(8)] @ found + bias
    assert np.linalg.norm(stood_in - 1.5 * z[:, :8] @ weight) < 1e-2 * np.linalg.norm(z[:, :8] @ weight)


def test_a_unit_that_never_moves_goes_first_and_the_bias_takes_its_place() -> None:
    z, weight, _ = case(6, 4, 1)
    z[:, 2] = 3.0
    elimination = Elimination(weight, Moments.of(z), None, 1)
    assert 2 not in elimination.kept(5)
    found, bias = stand_in(weight, Moments.of(z), elimination.kept(5))
    np.testing.assert_allclose(z[:, elimination.kept(5)] @ found + bias, z @ weight, rtol=0, atol=1e-3)
    assert np.abs(bias).max() > 0.5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**shapes)
def test_without_data_the_largest_rows_stay(hidden: int, d_out: int, step: int, seed: int) -> None:
    _, weight, _ = case(hidden, d_out, seed)
    norms = np.sum(weight**2, axis=1)
    elimination = Elimination(weight, None, None, step)
    for width in elimination.widths:
        kept = elimination.kept(width)
        assert np.array_equal(kept, np.sort(np.argsort(-norms)[:width]))
        found, bias = stand_in(weight, None, kept)
        np.testing.assert_allclose(found, weight[kept], rtol=1e-12)
        assert not bias.any()
        assert elimination.damage(width) == pytest.approx(norms.sum() - norms[kept].sum(), rel=ROUNDING)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-3, 77.7])
def test_units_that_never_move_are_dropped_for_nothing(value: float) -> None:
    _, weight, _ = case(7, 3, 2)
    z = np.full((21, 7), value) * np.arange(1, 8)
    elimination = Elimination(weight, Moments.of(z), None, 2)
    assert elimination.widths == [2, 4, 6]
    for width in elimination.widths:
        found, bias = stand_in(weight, Moments.of(z), elimination.kept(width))
        assert np.isfinite(found).all()
        assert elimination.damage(width) <= 1e-10 * value**2 + 1e-100
        np.testing.assert_allclose(z[:, elimination.kept(width)] @ found + bias, z @ weight, rtol=1e-9, atol=1e-9)

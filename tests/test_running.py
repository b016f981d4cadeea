"""Moments gathered in float32 against float64: precision, range, and how many independent rows they are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlr.gram import Moments
from onnxlr.running import ENOUGH, PIECE, RunningMoments

if TYPE_CHECKING:
    from numpy.typing import NDArray

EPS = float(np.finfo(np.float32).eps)


def data(rows: int, dim: int, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, dim)) @ rng.standard_normal((dim, dim))


def gathered(x: NDArray[Any], batch: int) -> RunningMoments:
    running = RunningMoments(x.shape[1])
    for start in range(0, len(x), batch):
        running.add(x[start : start + batch])
    return running


def norm(array: NDArray[Any]) -> float:
    return float(np.linalg.norm(array))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    dim=st.integers(1, 9),
    batch=st.integers(1, 40),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.float64]),
    order=st.sampled_from(["C", "F"]),
)
def test_moments_are_those_of_the_rows_in_float64(
    rows: int, dim: int, batch: int, seed: int, dtype: Any, order: Any
) -> None:
    x = np.asarray(data(rows, dim, seed).astype(dtype), order=order)
    moments, exact = gathered(x, batch).moments(), Moments.of(x.astype(np.float64))
    assert (moments.count, moments.dim) == (rows, dim)
    assert moments.total.dtype == moments.gram.dtype == np.float64
    np.testing.assert_array_equal(moments.gram, moments.gram.T)
    assert norm(moments.total - exact.total) <= 1e-14 * np.abs(x.astype(np.float64)).sum()
    assert (
        norm(moments.gram - exact.gram)
        <= (1e-14 if dtype == np.float64 else 4 * EPS) * np.square(exact.gram.trace()) ** 0.5
    )


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e3])
def test_the_covariance_survives_a_mean_far_beyond_the_spread(mean: float) -> None:
    x = (mean + data(20_000, 12) / 4).astype(np.float32)
    moments = gathered(x, 500).moments()
    wide = x.astype(np.float64)
    exact = np.cov(wide, rowvar=False, bias=True)
    assert norm(moments.covariance - exact) <= 1e-7 * norm(exact)
    np.testing.assert_allclose(moments.mean, wide.mean(0), rtol=0, atol=1e-12 * np.abs(wide).max())
    if mean:  # and would not, were the rows multiplied as they are
        plain = (x.T @ x).astype(np.float64) / len(x) - np.outer(wide.mean(0), wide.mean(0))
        assert norm(plain - exact) > 1e-2 * norm(exact)


def test_the_error_does_not_grow_with_the_number_of_rows() -> None:
    x = data(40 * PIECE, 6).astype(np.float32)
    errors = []
    for rows in (PIECE, len(x)):
        exact = Moments.of(x[:rows].astype(np.float64))
        errors.append(norm(gathered(x[:rows], 256).moments().gram - exact.gram) / norm(exact.gram))
    assert errors[1] <= max(errors[0], 5e-8)


@pytest.mark.parametrize("scale", [1e25, 1e-30])
def test_what_single_precision_cannot_square_is_squared_in_double(scale: float) -> None:
    x = (scale * data(60, 5)).astype(np.float32)
    x[30:] /= np.float32(scale)  # some batches are in range and some are not
    exact = Moments.of(x.astype(np.float64))
    moments = gathered(x, 10).moments()
    np.testing.assert_allclose(moments.gram, exact.gram, rtol=0, atol=4 * EPS * np.abs(exact.gram).max())
    tiny = gathered((1e-30 * data(60, 5)).astype(np.float32), 60).moments()
    assert norm(tiny.covariance) > 0


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("batch", [0, 3])
def test_a_row_that_is_not_finite_is_refused(bad: float, dtype: Any, batch: int) -> None:
    x = data(40, 5).astype(dtype)
    x[10 * batch + 4, 2] = bad
    running = RunningMoments(5)
    for index in range(batch):
        running.add(x[10 * index : 10 * index + 10])
    with pytest.raises(FloatingPointError):
        running.add(x[10 * batch : 10 * batch + 10])


def correlated(samples: int, tokens: int, dim: int, share: float) -> NDArray[Any]:
    """Rows of samples whose tokens have a share of their variance in common: [samples * tokens, dim]."""
    rng = np.random.default_rng(7)
    common = np.repeat(rng.standard_normal((samples, dim)), tokens, axis=0)
    own = rng.standard_normal((samples * tokens, dim))
    return (share**0.5 * common + (1 - share) ** 0.5 * own) @ np.diag(0.9 ** np.arange(dim)) + 3


def watched(x: NDArray[Any], batch: int) -> RunningMoments:
    running = RunningMoments(x.shape[1], watched=True)
    for start in range(0, len(x), batch):
        running.add(x[start : start + batch])
    return running


def test_independent_rows_are_worth_what_they_are() -> None:
    running = watched(correlated(4000, 1, 24, 0.0).astype(np.float32), 50)
    assert 0.7 * running.count < running.worth <= running.count == 4000


def test_rows_that_repeat_each_other_are_worth_one() -> None:
    # what is common to all 20 tokens of a sample tells the covariance no better than one row would
    running = watched(correlated(1000, 20, 24, 1.0).astype(np.float32), 100)
    assert 700 < running.worth < 1100


def test_what_rows_are_worth_is_the_error_that_they_leave() -> None:
    x = correlated(60_000, 10, 16, 0.5)
    truth = np.cov(x, rowvar=False, bias=True)
    squared, worth = [], []
    for part in np.array_split(x, 300):
        squared.append(norm(np.cov(part, rowvar=False, bias=True) - truth) ** 2)
        worth.append(watched(part, 40).worth)
    independent = (truth.trace() ** 2 + norm(truth) ** 2) / np.mean(squared)
    assert 0.6 * independent < np.median(worth) < 1.05 * independent


def test_rows_settle_once_they_are_worth_enough_and_not_before() -> None:
    x, running = correlated(3000, 4, 16, 0.5), RunningMoments(16, watched=True)
    for start in range(0, len(x), 8):
        running.add(x[start : start + 8])
        if running.settled:
            break
    assert ENOUGH * 16 <= running.worth < running.count < len(x) / 4
    assert not watched(x[: 4 * ENOUGH * 4], 8).settled
    unwatched = gathered(x, 8)
    assert (unwatched.worth, unwatched.settled) == (0, False)

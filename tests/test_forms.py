"""Identity blocks hold the product of their pair in fewer numbers, wherever their window lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlr.forms import Stored, Window, as_block, as_shared_block, best_window, block_products, pair_products

if TYPE_CHECKING:
    from onnxlr.forms import Side

    Array = np.ndarray[Any, Any]

SIDES: tuple[Side, Side] = ("input", "output")
EPS = np.finfo(np.float64).eps


def close(found: Array, expected: Array, condition: float = 1.0) -> None:
    """Equal but for what rounding becomes under a condition number."""
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= 100 * EPS * condition * np.linalg.norm(expected)


@st.composite
def pairs(draw: st.DrawFn) -> Stored:
    """A pair below full rank."""
    d_in, d_out = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    rank = draw(st.integers(1, min(d_in, d_out) - 1))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    bias = rng.standard_normal(d_out) if draw(st.booleans()) else None
    return Stored(rng.standard_normal((d_in, rank)), rng.standard_normal((rank, d_out)), bias)


def product(stored: Stored, d_in: int, d_out: int) -> Array:
    factors = stored.factors(d_in, d_out)
    assert factors.first.shape[1] == factors.second.shape[0]
    return factors.first @ factors.second


def elements(stored: Stored) -> int:
    return sum(d * e for d, e in stored.products)


def windows(pair: Stored, side: Side) -> list[Window]:
    """Both, with the condition number of what is inside."""
    assert pair.first is not None
    along = pair.first if side == "input" else pair.second.T
    rank = along.shape[1]
    return [Window(side, start, float(np.linalg.cond(along[start : start + rank]))) for start in (0, len(along) - rank)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(pair=pairs(), side=st.sampled_from(SIDES))
def test_a_block_is_its_pair_in_fewer_numbers(pair: Stored, side: Side) -> None:
    assert pair.first is not None
    (d_in, rank), d_out = pair.first.shape, pair.second.shape[1]
    assert pair.products == pair_products(d_in, d_out, rank)
    for window in windows(pair, side):
        block = as_block(pair, window)
        close(product(block, d_in, d_out), pair.first @ pair.second, window.condition)
        assert block.first is not None
        assert (block.first.shape, block.second.shape) == block_products(d_in, d_out, rank, side)
        assert elements(block) == elements(pair) - rank**2
        assert (block.window, block.rank, block.bias is pair.bias) == (window, rank, True)
        assert block.split == (rank, (d_in if side == "input" else d_out) - rank)
        factors = block.factors(d_in, d_out)
        identity = factors.first if side == "input" else factors.second.T
        assert np.array_equal(identity[window.start : window.start + rank], np.eye(rank))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pair=pairs(), widths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_blocks_share_their_first_factor(pair: Stored, widths: list[int], seed: int) -> None:
    assert pair.first is not None
    d_in, rank = pair.first.shape
    rng = np.random.default_rng(seed)
    members = [
        Stored(pair.first, rng.standard_normal((rank, width)), rng.standard_normal(width), shared="a+b")
        for width in widths
    ]
    for window in windows(pair, "input"):
        blocks = as_shared_block(members, window)
        for block, member, width in zip(blocks, members, widths, strict=True):
            close(product(block, d_in, width), pair.first @ member.second, window.condition)
            assert block.first is blocks[0].first
            assert (block.shared, block.bias is member.bias) == ("a+b", True)
        assert blocks[0].first is not None
        assert blocks[0].first.shape == (d_in - rank, rank)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pair=pairs(), side=st.sampled_from([None, *SIDES]), more=st.tuples(st.integers(0, 5), st.integers(0, 5)),
       which=st.integers(0, 1), seed=st.integers(0, 1000))  # fmt: skip
def test_factors_are_those_of_all_features(
    pair: Stored, side: Side | None, more: tuple[int, int], which: int, seed: int
) -> None:
    assert pair.first is not None
    (narrow_in, _), narrow_out = pair.first.shape, pair.second.shape[1]
    d_in, d_out = narrow_in + more[0], narrow_out + more[1]
    rng = np.random.default_rng(seed)
    inputs = np.sort(rng.permutation(d_in)[:narrow_in])
    outputs = np.sort(rng.permutation(d_out)[:narrow_out])
    expected = np.zeros((d_in, d_out))
    expected[np.ix_(inputs, outputs)] = pair.first @ pair.second
    stored = Stored(pair.first, pair.second, pair.bias, inputs=inputs, outputs=outputs)
    condition = 1.0
    if side is not None:
        window = windows(pair, side)[which]
        stored, condition = as_block(stored, window), window.condition
    close(product(stored, d_in, d_out), expected, condition)
    dense = Stored(None, pair.first @ pair.second, pair.bias, inputs=inputs, outputs=outputs)
    close(product(dense, d_in, d_out), expected)
    assert (dense.rank, dense.split, dense.products) == (None, (0, 0), ((narrow_in, narrow_out),))
    for made in (stored, dense):
        bias = made.factors(d_in, d_out).bias
        assert (bias is None) == (pair.bias is None)
        if bias is not None:
            assert np.array_equal(bias[outputs], pair.bias)
            assert not np.delete(bias, outputs).any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pair=pairs(), side=st.sampled_from(SIDES))
def test_the_better_conditioned_window_is_taken(pair: Stored, side: Side) -> None:
    assert pair.first is not None
    found = best_window(pair.first if side == "input" else pair.second, side)
    assert found == min(windows(pair, side), key=lambda window: window.condition)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("start", [0, 6])
def test_a_singular_window_is_left_for_the_other(side: Side, start: int) -> None:
    factor = np.random.default_rng(0).standard_normal((9, 3))
    factor[start] = factor[start + 2]
    found = best_window(factor if side == "input" else factor.T, side)
    assert found.start == 6 - start
    assert found.condition == pytest.approx(np.linalg.cond(factor[6 - start : 9 - start]))

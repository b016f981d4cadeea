"""Hidden units in another order: the same function, and windows that are well conditioned."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import parsed, random, relative, run

from onnxlr.choice import BadlyConditionedError, Part, Terms, best_side, width_key
from onnxlr.config import Config
from onnxlr.costs import Parameters
from onnxlr.forms import MAX_CONDITION, Stored, Window, as_block, best_window
from onnxlr.groups import Chained
from onnxlr.layer import Layer
from onnxlr.order import blocks_among_units, reordered
from onnxlr.rewrite import rewrite
from onnxlr.sites import parameter_count, take_inventory

if TYPE_CHECKING:
    from onnxlr.choice import Choice
    from onnxlr.forms import Side
    from onnxlr.plan import Option
    from onnxlr.sites import Inventory

    Array = np.ndarray[Any, Any]


def product(stored: Stored, d_in: int, d_out: int) -> Array:
    factors = stored.factors(d_in, d_out)
    return factors.first @ factors.second


@settings(max_examples=80, deadline=None)
@given(
    d_in=st.integers(2, 9),
    d_out=st.integers(2, 9),
    rank=st.integers(0, 8),
    side=st.sampled_from(["input", "output"]),
    block=st.booleans(),
    narrowed=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_an_order_changes_nothing(
    d_in: int, d_out: int, rank: int, side: Side, block: bool, narrowed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rank = min(rank, d_in - 1, d_out - 1)
    bias = rng.standard_normal(d_out)
    stored = Stored(None, rng.standard_normal((d_in, d_out)), bias)
    if rank:
        stored = Stored(rng.standard_normal((d_in, rank)), rng.standard_normal((rank, d_out)), bias)
        if block:
            other: Side = "output" if side == "input" else "input"
            stored = as_block(stored, Window(other, 0, 1.0))
    full = {"input": d_in, "output": d_out}
    if narrowed:
        full[side] += 3
        kept = np.sort(rng.permutation(full[side])[: full[side] - 3])
        stored = replace(stored, **{f"{side}s": kept})
    order = rng.permutation(d_in if side == "input" else d_out)
    turned = reordered(stored, order, side)
    before, after = (one.factors(full["input"], full["output"]) for one in (stored, turned))
    np.testing.assert_allclose(after.first @ after.second, before.first @ before.second, rtol=0, atol=1e-9)
    assert before.bias is not None
    assert after.bias is not None
    np.testing.assert_array_equal(after.bias, before.bias)
    axis = 0 if side == "input" else 1
    matrices = [one.second if one.first is None or side == "output" else one.first for one in (stored, turned)]
    np.testing.assert_array_equal(np.take(matrices[0], order, axis), matrices[1])


@settings(max_examples=40, deadline=None)
@given(
    units=st.integers(8, 40), d=st.integers(5, 12), ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    blocks=st.sampled_from([("a",), ("b",), ("a", "b"), ("b", "a")]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_blocks_among_units_are_their_pairs(
    units: int, d: int, ranks: tuple[int, int], blocks: tuple[str, ...], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    first = Stored(
        rng.standard_normal((d, ranks[0])), rng.standard_normal((ranks[0], units)), rng.standard_normal(units)
    )
    second = Stored(rng.standard_normal((units, ranks[1])), rng.standard_normal((ranks[1], d)), None)
    pairs: dict[str, Stored] = {"a": first, "b": second}
    sides: dict[str, Side] = {"a": "output", "b": "input"}
    result = blocks_among_units(pairs, sides, blocks, units)
    assert result["a"].outputs is not None
    assert np.array_equal(result["a"].outputs, result["b"].inputs)
    assert sorted(result["a"].outputs) == list(range(units))
    for name, shape in (("a", (d, units)), ("b", (units, d))):
        np.testing.assert_allclose(
            product(result[name], *shape), product(pairs[name], *shape), rtol=0, atol=1e-8 * units
        )  # fmt: skip
        window = result[name].window
        assert (window is not None) == (name in blocks)
        if window is not None:
            assert window.side == sides[name]
            factors = pairs[name].factors(*shape)
            inside = result["a"].outputs[window.start : window.start + len(result[name].second)]
            square = factors.second[:, inside] if name == "a" else factors.first[inside]
            assert window.condition == pytest.approx(np.linalg.cond(square), rel=1e-6)


def window_of(pair: Stored, side: Side | None) -> Window:
    assert side is not None
    assert pair.first is not None
    return best_window(pair.first if side == "input" else pair.second, side)


BODIES = {
    "slope": "p = MatMul(x, w1) s = Add(p, b1) h = PRelu(s, c) y = MatMul(h, w2)",
    "gemm": "s = Gemm(x, w1, b1) h = Relu(s) y = Gemm<transB = 1>(h, w2t, b2)",
    "gate": "g = MatMul(x, w1) u = Gemm(x, wu, b1) a = Sigmoid(g) h = Mul(a, u) y = MatMul(h, w2)",
}
D, UNITS = 24, 64


def chain(name: str, dtype: Any) -> tuple[Inventory, list[Option[Choice]]]:
    """A chain whose hidden units stand in an order that suits no window: neighbours are alike."""
    alike = np.repeat(random(1, D, UNITS // 8, dtype=np.float64), 8, axis=1) / D**0.5
    w1, wu = (alike + 0.05 * random(seed, D, UNITS, dtype=np.float64) for seed in (2, 3))
    w2 = np.repeat(random(4, UNITS // 8, D, dtype=np.float64), 8, axis=0) / UNITS**0.5
    w2 = w2 + 0.02 * random(5, UNITS, D, dtype=np.float64)
    every = {"w1": w1, "wu": wu, "w2": w2, "w2t": w2.T.copy(), "b1": random(6, UNITS), "b2": random(7, D),
             "c": 0.5 + 0.1 * random(8, UNITS)}  # fmt: skip
    words = BODIES[name].replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {key: array.astype(dtype) for key, array in every.items() if key in words}
    kind = "float16" if dtype == np.float16 else "float"
    model = parsed(f"({kind}[N, {D}] x) => ({kind}[N, {D}] y)", BODIES[name], **used)
    inventory = take_inventory(model)
    parts = [Part(weight, Layer(inventory.matrix(weight))) for weight in inventory.weights]
    config = Config(objective="weight", rank_multiple=4, margin=0.95, forms=frozenset({"block", "width"}))
    ones = {key: 1.0 for part in parts for key in (part.name, width_key(part.name))}
    return inventory, Chained(parts[:-1], parts[-1], config).options(Terms(config, Parameters(inventory), ones))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", BODIES)
def test_blocks_that_no_window_suits_find_one_among_the_hidden_units(
    name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_CONDITION, "float32", MAX_CONDITION["float16"])
    limit = MAX_CONDITION["float16"]
    inventory, options = chain(name, dtype)
    weights = {weight.name: weight for weight in inventory.weights}
    consumer = inventory.chains[0].consumer
    x = random(9, 40, D).astype(dtype)
    moved: dict[tuple[int, bool], int] = {}
    for option in options:
        blocks = [n for n, cut in option.choice.cuts.items() if cut.form == "block"]
        pairs = {n: pair.balanced() for n, pair in option.choice.store(False).items()}
        own = {n: best_side(weights[n], len(first), pairs[n].second.shape[1])
               for n in blocks if (first := pairs[n].first) is not None}  # fmt: skip
        bad = [n for n, side in own.items() if window_of(pairs[n], side).condition > limit]
        try:
            stored = option.choice.store(True)
        except BadlyConditionedError:
            assert bad
            continue
        windows = {n: window for n in blocks if (window := stored[n].window) is not None}
        assert all(window.condition <= limit for window in windows.values())
        if not bad:
            assert {n: window.side for n, window in windows.items()} == own
            continue
        assert {n: window.side for n, window in windows.items()} == {
            n: "input" if n == consumer else "output" for n in blocks
        }
        model, plain = rewrite(inventory, stored), rewrite(inventory, pairs)
        onnx.checker.check_model(model.proto, full_check=True)
        assert parameter_count(plain) - parameter_count(model) == sum(stored[n].rank ** 2 for n in blocks)
        for n, one in stored.items():
            whole = (
                inventory.matrix(weights[n]) if n not in pairs else product(pairs[n], weights[n].d_in, weights[n].d_out)
            )
            assert relative(whole, product(one, weights[n].d_in, weights[n].d_out)) < 1e-10
        tolerance = 2 * limit * (2.0**-11 if dtype == np.float16 else 2.0**-24)
        assert relative(run(plain, x=x)["y"], run(model, x=x)["y"]) < tolerance
        key = len(blocks), option.choice.cuts[consumer].width is not None
        moved[key] = moved.get(key, 0) + 1
    assert {key[0] for key in moved} == {1, 2}
    assert {key[1] for key in moved} == {True, False}

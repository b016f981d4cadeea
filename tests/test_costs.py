"""Latency as a budget: what adds up, what costs nothing, and what a share of it promises. No assertion is timed."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import Result, decaying, mlp, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from models import parsed

import onnxlr
from onnxlr import Config, Target, search
from onnxlr.case import prepare
from onnxlr.choice import Part, Terms, separable_key
from onnxlr.costs import SIZES, Latency
from onnxlr.errors import GateError
from onnxlr.forms import block_products, pair_products, separable_products
from onnxlr.groups import group
from onnxlr.layer import Layer
from onnxlr.parts import parts_of
from onnxlr.shapes import measure_shapes
from onnxlr.sites import take_inventory
from onnxlr.sites.convolution import Convolution
from onnxlr.targets import Planner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from onnxlr.sites import Inventory

FEEDS = [{"x": x[None]} for x in rows(320)]
SETTINGS: dict[str, Any] = {"objective": "weight", "rank_multiple": 4, "rounds": 0, "threads": 1}


class Clockwork:
    """Stands in for measured times, with a price for every operator as such."""

    def __init__(self) -> None:
        self.asked: set[tuple[int, int, int]] = set()

    def measure(self, products: Iterable[tuple[int, int, int]]) -> None:
        self.asked.update(products)

    def product(self, rows: int, d_in: int, d_out: int) -> float:
        return 50.0 + rows * d_in * d_out / 64

    def moved(self, rows: int, features: int) -> float:
        return 5.0 + rows * features / 64


def take(*, known: bool = True) -> Inventory:
    """Two weights; of the second the rows are unknown where not `known`."""
    rng = np.random.default_rng(0)
    weights = {"w": decaying(rng, 96, 160), "v": decaying(rng, 160, 72)}
    model = parsed(
        "(float[N, 96] x) => (float[N, 72] y)", "h = MatMul(x, w) t = Softmax(h) y = MatMul(t, v)", **weights
    )
    shapes = {"x": (5, 96), "h": (5, 160)} | ({"t": (5, 160), "y": (5, 72)} if known else {})
    return take_inventory(model, shapes)


def costs_of(inventory: Inventory, batch: int, whole: float) -> tuple[Latency, Clockwork]:
    clockwork: Any = Clockwork()
    return Latency(inventory, clockwork, batch, whole), clockwork


def planner(inventory: Inventory, costs: Latency) -> Planner:
    parts = [Part(weight, Layer(inventory.matrix(weight))) for weight in inventory.weights]
    config = Config(**SETTINGS)
    importance = {part.name: 1 / part.decomposition.total for part in parts}
    return Planner(group(parts, inventory, config), Terms(config, costs, importance))


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 9),
    products=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=4),
    moved=st.integers(0, 300),
    corrected=st.booleans(),
)
def test_times_of_products_and_of_what_is_moved_add_up(
    batch: int, products: list[tuple[int, int]], moved: int, corrected: bool
) -> None:
    inventory = take()
    costs, clockwork = costs_of(inventory, batch, 1e6)
    weight = inventory.weights[0]
    rows = 5 * batch
    apart = sum(clockwork.product(rows, d, e) for d, e in products) + (clockwork.moved(rows, moved) if moved else 0.0)
    assert costs.form(weight, tuple(products), moved=moved, corrected=corrected) == pytest.approx(apart, rel=1e-12)
    assert costs.dense(weight) == clockwork.product(rows, 96, 160)


def test_what_a_plan_will_ask_for_is_timed_together() -> None:
    _, clockwork = costs_of(take(), 2, 1e6)
    assert {(rows, d, e) for rows, d, e in clockwork.asked if SIZES not in (d, e)} == {
        *((10, d, e) for d in (96,) for e in (128, 160)), *((10, d, e) for d in (128, 160) for e in (72,))}  # fmt: skip
    assert {rows for rows, _, _ in clockwork.asked} == {10}


def test_a_weight_of_unknown_rows_costs_nothing_and_stays_dense() -> None:
    inventory = take(known=False)
    w, v = inventory.weights
    assert v.macs is None
    costs, clockwork = costs_of(inventory, 2, 1e5)
    assert costs.dense(v) == costs.form(v, ((160, 8), (8, 72)), moved=72, corrected=True) == 0
    assert costs.dense(w) > 0
    assert (10, 160, 72) not in clockwork.asked
    plans = planner(inventory, costs)
    choice = plans.fits(plans.least)
    assert choice.cuts["w"].rank == 4
    assert choice.cuts["v"].rank is None


class Geared(Clockwork):
    """A price for convolutions as well, in which all that tells them apart counts."""

    def product(self, over: int | Convolution, d_in: int, d_out: int) -> float:
        self.used.add((over, d_in, d_out))
        if isinstance(over, int):
            return super().product(over, d_in, d_out)
        strides, kernel = dict(over.attributes)["strides"], over.kernel
        return sum((i + 2) * s * k for i, (s, k) in enumerate(zip(strides, kernel, strict=True))) + (  # type: ignore[arg-type]
            over.positions * over.groups * d_in * d_out / 64
        )

    def __init__(self) -> None:
        super().__init__()
        self.used: set[tuple[Any, int, int]] = set()


def convolutional() -> Inventory:
    """One kernel of two convolutions, one in groups, one of 1 x 1, and a product."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) / 9
        for name, shape in {"k": (24, 24, 3, 3), "g": (32, 12, 3, 2), "p": (40, 32, 1, 1), "w": (40, 72)}.items()
    }
    body = """a = Conv<pads = [1, 1, 1, 1]>(x, k) b = Relu(a) c = Conv<strides = [2, 1]>(b, k) d = Relu(c)
              e = Conv<group = 2, dilations = [1, 2]>(d, g) f = Relu(e) h = Conv(f, p) i = GlobalAveragePool(h)
              j = Flatten(i) y = MatMul(j, w)"""
    model = parsed("(float[N, 24, 11, 9] x) => (float[N, 72] y)", body, **weights)
    return take_inventory(model, measure_shapes(model, {"x": np.zeros((1, 24, 11, 9), np.float32)}))


def test_what_runs_as_convolutions_is_priced_as_such_and_what_multiplies_as_before() -> None:
    inventory, clockwork = convolutional(), Geared()
    costs = Latency(inventory, clockwork, 3, 1e6, 4)  # type: ignore[arg-type]
    kernel, grouped, point, matrix = sorted(inventory.weights, key=lambda weight: "kgpw".index(weight.name))

    def of(one: Convolution, c_in: int, c_out: int) -> float:
        return clockwork.product(one.times(3), c_in, c_out)

    attributes: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    same = Convolution.of("Conv", (1, 24, 11, 9), (1, 24, 11, 9), (3, 3), attributes)
    stepped = Convolution.of("Conv", (1, 24, 11, 9), (1, 24, 5, 7), (3, 3), {"strides": [2, 1]})
    assert costs.dense(kernel) == of(same, 24, 24) + of(stepped, 24, 24)
    pair = costs.form(kernel, pair_products(216, 24, 8), moved=0, corrected=True)
    assert pair == sum(of(one, 24, 8) + of(one.pointwise(), 8, 24) for one in (same, stepped))
    split = costs.form(kernel.in_strips, separable_products(216, 24, 12, 3), moved=0, corrected=True)
    assert split == sum(of(one.halves()[0], 24, 12) + of(one.halves()[1], 12, 24) for one in (same, stepped))
    column, row = stepped.halves()
    assert (column.kernel, column.read, column.written, row.kernel, row.read) == (
        (3, 1),
        (11, 9),
        (5, 9),
        (1, 3),
        (5, 9),
    )
    moved = costs.form(kernel, block_products(216, 24, 8, "output"), moved=24, corrected=True)
    narrow = sum(of(one, 24, 8) + of(one.pointwise(), 8, 16) for one in (same, stepped))
    assert moved == narrow + clockwork.moved(3 * (99 + 35), 24)
    groups = Convolution.of("Conv", (1, 24, 5, 7), (1, 32, 3, 5), (3, 2), {"group": 2, "dilations": [1, 2]})
    assert costs.dense(grouped) == of(groups, 12, 16)
    assert costs.form(grouped, pair_products(72, 16, 4), moved=0, corrected=True) == pytest.approx(
        of(groups, 12, 4) + of(groups.pointwise(), 4, 16)
    )
    assert costs.dense(point) == of(groups.pointwise().of("Conv", (1, 0, 3, 5), (1, 0, 3, 5), (1, 1), {}), 32, 40)
    assert costs.dense(matrix) == Clockwork().product(3, 40, 72)
    assert costs.form(matrix, pair_products(40, 72, 8), moved=0, corrected=True) == pytest.approx(
        Clockwork().product(3, 40, 8) + Clockwork().product(3, 8, 72)
    )


def test_all_convolutions_that_a_plan_asks_for_are_timed_beforehand() -> None:
    config, clockwork = Config(**SETTINGS), Geared()
    case = prepare(convolutional().model, [{"x": np.zeros((2, 24, 11, 9), np.float32)}], config)
    inventory, parts = case.inventory, parts_of(case, None, config)
    costs = Latency(inventory, clockwork, 2, 1e6, 4)  # type: ignore[arg-type]
    importance = {key: 1.0 for part in parts for key in (part.name, separable_key(part.name))}
    terms = Terms(config, costs, importance)
    forms = {cut.form for one in group(parts, inventory, config) for option in one.options(terms)
             for cut in option.choice.cuts.values()}  # fmt: skip
    assert forms == {"dense", "pair", "block", "separable"}
    used = {key for key in clockwork.used if not isinstance(key[0], int)}
    assert used
    assert used <= clockwork.asked


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.01, 1.0), besides=st.floats(-500, 5000))
def test_a_share_is_met_by_the_times_of_products_or_the_least_is_named(share: float, besides: float) -> None:
    inventory = take()
    costs, _ = costs_of(inventory, 2, 1.0)
    whole = sum(costs.dense(weight) for weight in inventory.weights) + besides
    costs, _ = costs_of(inventory, 2, whole)
    plans = planner(inventory, costs)
    try:
        choice = plans.fits(share * whole)
    except GateError as refusal:
        said = str(refusal)
        assert said.startswith(f"--max-latency {share:g} cannot be reached: ")
        assert "\n" not in said
        least = float(said.split(" keep ")[1].split(" of the model")[0])
        assert share < plans.least / whole <= least <= plans.least / whole + 0.001
        assert plans.fits(least * whole).cost <= least * whole * (1 + 1e-12)
        return
    assert choice.cost <= share * whole * (1 + 1e-12)
    if share == 1:
        assert all(cut.form == "dense" for cut in choice.cuts.values())


def test_all_of_the_latency_leaves_the_model_as_it_is() -> None:
    report = onnxlr.compress(mlp(), FEEDS, Config(target=Target("max_latency", 1.0), **SETTINGS))
    assert [weight.form for weight in report.weights] == ["dense"] * 3
    assert report.after.parameters == report.before.parameters
    assert report.validation.error == 0


def test_an_impossible_share_says_which_is_possible(compress: Callable[..., Result], tmp_path: Path) -> None:
    result = compress("--max-latency", 0.0001, "--objective", "weight")
    assert (result.code, result.out) == (3, "")
    found = re.fullmatch(
        r"onnxlr: error: --max-latency 0\.0001 cannot be reached: .* keep ([0-9.]+) of .*\n", result.err
    )
    assert found is not None
    assert 0.0001 < float(found[1]) <= 1
    assert not (tmp_path / "out.onnx").exists()


def test_a_share_from_the_command_line(compress: Callable[..., Result]) -> None:
    result = compress("--max-latency", 1, "--objective", "weight", "--json")
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    assert document["config"]["target"] == {"kind": "max_latency", "value": 1.0}
    for value in ("0", "1.5", "fast"):
        misused = compress("--max-latency", value, "--force")
        assert misused.code == 2
        assert "Invalid value for '--max-latency'" in misused.err
    two = compress("--max-latency", 0.9, "--keep-params", 0.5, "--force")
    assert (two.code, two.out) == (2, "")
    assert "one target at a time" in two.err


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Sets what latency the models have, one after the other, over that of the dense one; times are clockwork."""

    def given(*values: float) -> list[float]:
        left = list(values)
        monkeypatch.setattr(search, "_latency", lambda *_: left.pop(0))
        return left

    def clockwork(case: Any, config: Config) -> Latency:
        costs, _ = costs_of(case.inventory, 1, 1.0)
        whole = sum(costs.dense(weight) for weight in case.inventory.weights)
        return costs_of(case.inventory, 1, whole)[0]

    monkeypatch.setattr(search, "_costs", clockwork)
    return given


def test_a_model_that_takes_longer_than_its_products_is_planned_anew(ratios: Callable[..., list[float]]) -> None:
    config = Config(target=Target("max_latency", 0.9), **SETTINGS)
    sizes = []
    for measured in ((0.9,), (0.95, 0.89), (0.95, 0.92, 0.9)):
        left = ratios(*measured)
        sizes.append(onnxlr.compress(mlp(), FEEDS, config).after.parameters)
        assert not left
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_model_that_is_faster_than_asked_for_keeps_more_where_it_still_meets_the_target(
    ratios: Callable[..., list[float]],
) -> None:
    config = Config(target=Target("max_latency", 0.8), **SETTINGS)
    sizes = []
    for measured in ((0.8,), (0.7, 0.79), (0.7, 0.82), (0.7, 0.75, 0.82)):
        left = ratios(*measured)
        sizes.append(onnxlr.compress(mlp(), FEEDS, config).after.parameters)
        assert not left
    as_planned, more, not_more, in_between = sizes
    assert as_planned == not_more < more
    assert in_between == more


def test_what_does_not_shrink_with_the_plan_is_seen_after_two_of_them() -> None:
    def measured(limit: float) -> float:
        return 0.2 + 0.6 * limit

    first = 0.5
    second = search._faster([(first, measured(first))], 0.38)
    assert second == pytest.approx(first * 0.38 / measured(first))
    third = search._faster([(first, measured(first)), (second, measured(second))], 0.38)
    assert measured(third) == pytest.approx(0.38)
    assert search._faster([(0.5, 0.51), (0.4, 0.51)], 0.38) == pytest.approx(0.4 * 0.38 / 0.51)
    assert search._faster([(0.5, 0.51), (0.4, 0.509)], 0.38) == pytest.approx(0.3)


@pytest.mark.parametrize("measured", [(0.97, 0.96, 0.95, 0.94), (100.0,)])
def test_a_share_that_only_the_products_keep_is_refused_with_what_was_reached(
    ratios: Callable[..., list[float]], measured: tuple[float, ...]
) -> None:
    # what would make up for a hundred times the latency cannot be planned, but was not asked for either
    left = ratios(*measured)
    took = rf"--max-latency 0\.9 holds for .* took {measured[-1]:.3f} of the dense latency: ask for at least that"
    with pytest.raises(GateError, match=took):
        onnxlr.compress(mlp(), FEEDS, Config(target=Target("max_latency", 0.9), **SETTINGS))
    assert not left

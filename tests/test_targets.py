"""Plans under targets: budgets that are kept, refusals that tell the truth, and the search, without a session."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxlr.config import Config, Target
from onnxlr.errors import GateError
from onnxlr.factorize import UtilizedDecomposition, WeightDecomposition
from onnxlr.gram import Moments
from onnxlr.model_io import from_proto
from onnxlr.sites import Inventory, take_inventory
from onnxlr.targets import SEARCH_STEPS, Chooser, Part, Planner, by_energy, offered_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnxlr.factorize import Factors
    from onnxlr.sites import Weight

SIZES = (32, 24, 40, 10)


def take(sizes: Sequence[int] = SIZES, *, zero: bool = False, shapes: bool = True) -> Inventory:
    """A chain of matrix products w1, w2, ... and an elementwise constant, which no plan can make smaller."""
    rng = np.random.default_rng(0)
    count = len(sizes) - 1
    nodes = "".join(f"h{index} = MatMul(h{index - 1}, w{index}) " for index in range(1, count + 1))
    text = (
        f'<ir_version: 8, opset_import: ["" : 17]> '
        f"g (float[1, {sizes[0]}] h0) => (float[1, {sizes[-1]}] y) {{ {nodes} y = Add(h{count}, c) }}"
    )
    proto = onnx.parser.parse_model(text)
    for index in range(1, count + 1):
        left, _, right = np.linalg.svd(rng.standard_normal((sizes[index - 1], sizes[index])), full_matrices=False)
        array = ((left * 0.8 ** np.arange(left.shape[1])) @ right).astype(np.float32) * (not zero)
        proto.graph.initializer.append(numpy_helper.from_array(array, f"w{index}"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(sizes[-1], np.float32), "c"))
    known = {f"h{index}": (1, size) for index, size in enumerate(sizes)}
    return take_inventory(from_proto(proto), known if shapes else None)


def parts_of(inventory: Inventory, config: Config, fixed: Mapping[str, int] | None = None) -> list[Part]:
    return [
        Part(
            weight,
            WeightDecomposition(inventory.matrix(weight)),
            offered_ranks(weight, config),
            (fixed or {}).get(weight.name),
        )
        for weight in inventory.weights
    ]


def relative_to(parts: Sequence[Part]) -> dict[str, float]:
    """Importances that make every weight's damage count as a share of its own total."""
    return {part.weight.name: 1 / part.decomposition.total for part in parts if part.decomposition.total}


def planner_of(inventory: Inventory, config: Config, fixed: Mapping[str, int] | None = None) -> Planner:
    parts = parts_of(inventory, config, fixed)
    return Planner(inventory, parts, relative_to(parts), corrected=False)


def spent(inventory: Inventory, ranks: Mapping[str, int | None], unit: str) -> float:
    """What a plan costs, counted anew: everything, less what the pairs save."""
    total = float(inventory.parameters if unit == "params" else inventory.macs or 0)
    for weight in inventory.weights:
        rank = ranks[weight.name]
        # one row passes through this chain, so a weight's parameters are its multiply-accumulates too
        total += 0 if rank is None else rank * (weight.d_in + weight.d_out) - weight.d_in * weight.d_out
    return total


FINE = Config(rank_multiple=1, margin=1.0)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.05, 1.0), multiple=st.sampled_from([1, 2, 4]))
@pytest.mark.parametrize("unit", ["params", "macs"])
def test_a_plan_keeps_its_budget_or_names_the_least_that_is_kept(unit: Any, share: float, multiple: int) -> None:
    inventory = take()
    config = Config(rank_multiple=multiple)
    planner = planner_of(inventory, config)
    whole = planner.whole(unit)
    cheapest = {weight.name: min(offered_ranks(weight, config)) for weight in inventory.weights}
    least = spent(inventory, cheapest, unit)
    assert planner.least(unit) == pytest.approx(least, rel=1e-12)
    if share * whole < least:
        with pytest.raises(GateError) as refused:
            planner.fits(share * whole, unit)
        stated = float(str(refused.value).split(" keep ")[1].split(" of the model")[0])
        assert least / whole <= stated * (1 + 1e-12)
        assert stated - least / whole <= 0.001
        assert spent(inventory, planner.fits(stated * whole, unit), unit) <= stated * whole * (1 + 1e-12)
    else:
        ranks = planner.fits(share * whole, unit)
        assert ranks.keys() == cheapest.keys()
        assert spent(inventory, ranks, unit) <= share * whole * (1 + 1e-12)


def test_what_cannot_be_reached_is_said_with_what_can() -> None:
    inventory = take()
    # ranks of 8 where a pair is smaller, the last layer dense; and the elementwise constant
    least = 8 * (32 + 24) + 8 * (24 + 40) + 40 * 10 + 10
    assert inventory.parameters == 32 * 24 + 24 * 40 + 40 * 10 + 10
    share = math.ceil(1000 * least / inventory.parameters) / 1000
    with pytest.raises(GateError) as refused:
        planner_of(inventory, Config(rank_multiple=8, margin=0.9)).fits(0.1 * inventory.parameters, "params")
    assert str(refused.value) == (
        f"--keep-params 0.1 cannot be reached: what stays dense and the least ranks of the rest keep {share:g} of the "
        "model; ask for at least that, or offer lower ranks with --rank-multiple"
    )
    assert refused.value.exit_code == 3


def test_the_least_share_is_reachable_where_it_is_a_round_figure() -> None:
    # 10 x 9 and the constant of 9: 99 - 90 + 19 = 28 of 99 is no round figure, 29 of 100 is, and 0.29 * 100 < 29
    assert 0.29 * 100 < 29
    inventory = take((9, 10))
    weight = inventory.weights[0]
    assert (inventory.parameters, weight.d_in + weight.d_out) == (100, 19)
    planner = planner_of(inventory, Config(rank_multiple=1))
    with pytest.raises(GateError, match=r"keep 0\.29 of the model"):
        planner.fits(0.28 * 100, "params")
    assert planner.fits(0.29 * 100, "params") == {"w1": 1}


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_the_whole_budget_keeps_everything_dense(unit: Any) -> None:
    inventory = take()
    planner = planner_of(inventory, FINE)
    assert planner.fits(planner.whole(unit), unit) == {"w1": None, "w2": None, "w3": None}


def test_the_least_budget_fits() -> None:
    planner = planner_of(take(), FINE)
    assert planner.fits(planner.least("params"), "params") == {"w1": 1, "w2": 1, "w3": 1}


def test_a_fixed_rank_is_kept_under_every_budget() -> None:
    planner = planner_of(take(), FINE, {"w2": 7})
    for share in (0.4, 0.7, 1.0):
        assert planner.fits(share * planner.whole("params"), "params")["w2"] == 7


def test_multiply_accumulates_that_nobody_counted_are_no_budget() -> None:
    inventory = take(shapes=False)
    with pytest.raises(GateError, match="--keep-macs cannot be met: the model has no macs that could be counted"):
        planner_of(inventory, FINE).fits(0.5 * (inventory.macs or 0), "macs")


def test_predictions_are_in_the_unit_of_the_importance() -> None:
    inventory = take()
    parts = parts_of(inventory, FINE)
    first, second, _ = parts
    relative = planner_of(inventory, FINE)
    weighed = Planner(inventory, parts, {"w1": 3.0}, corrected=False)
    assert relative.predicted(first, 0) == pytest.approx(1.0)
    assert relative.predicted(first, 5) == pytest.approx(first.decomposition.damage(5) / first.decomposition.total)
    assert weighed.predicted(first, 5) == 3.0 * first.decomposition.damage(5)
    assert weighed.predicted(second, 5) == 0
    assert relative.predicted(first, None) == weighed.predicted(first, None) == 0


def test_a_weight_of_zeros_and_an_infinite_importance_are_planned_with_numbers() -> None:
    inventory = take(zero=True)
    parts = parts_of(inventory, FINE)
    assert parts[0].decomposition.total == 0
    for importance in ({}, {part.weight.name: math.inf for part in parts}):
        planner = Planner(inventory, parts, importance, corrected=False)
        assert [planner.predicted(part, 1) for part in parts] == [0.0] * len(parts)
        assert set(planner.fits(planner.least("params"), "params").values()) == {1}


def test_a_correction_of_the_bias_is_part_of_the_cost() -> None:
    inventory = take()
    (first, *_), config = inventory.weights, FINE
    plain, corrected = (
        Planner(inventory, parts_of(inventory, config), {}, corrected=corrected) for corrected in (False, True)
    )
    part = parts_of(inventory, config)[0]
    assert plain.cost(part, 3, "params") == 3 * (first.d_in + first.d_out)
    assert corrected.cost(part, 3, "params") == 3 * (first.d_in + first.d_out) + first.d_out
    assert plain.cost(part, None, "params") == corrected.cost(part, None, "params") == first.d_in * first.d_out


@settings(max_examples=40, deadline=None)
@given(energy=st.floats(0.2, 0.999), multiple=st.integers(1, 6))
def test_ranks_by_energy_are_rounded_up_and_dense_where_no_pair_is_smaller(energy: float, multiple: int) -> None:
    inventory = take()
    config = Config(rank_multiple=multiple)
    parts = parts_of(inventory, config)
    plan = by_energy(parts, energy, config)
    assert plan.predicted is None
    for part in parts:
        name, needed = part.weight.name, part.decomposition.rank_for(energy)
        able = [rank for rank in part.ranks if rank >= needed]
        assert plan.ranks[name] == (able[0] if able else None)
        assert (name in plan.factors) == bool(able)
        if able:
            assert plan.factors[name].rank == able[0]
            assert part.decomposition.damage(able[0]) <= (1 - energy + 1e-12) * part.decomposition.total


def test_a_fixed_rank_outweighs_the_energy() -> None:
    config = Config(rank_multiple=4)
    plan = by_energy(parts_of(take(), config, {"w1": 3, "w3": 9}), 0.5, config)
    assert (plan.ranks["w1"], plan.factors["w1"].rank) == (3, 3)
    assert (plan.ranks["w3"], plan.factors["w3"].rank) == (9, 9)
    assert plan.ranks["w2"] is not None
    assert plan.ranks["w2"] % 4 == 0


def test_the_utilized_objective_keeps_its_energy_on_both_sides() -> None:
    inventory, config = take(), Config(rank_multiple=2)
    weight = inventory.weights[0]
    x = np.random.default_rng(1).standard_normal((200, weight.d_in)) * 0.9 ** np.arange(weight.d_in)
    decomposition = UtilizedDecomposition(inventory.matrix(weight), Moments.of(x))
    part = Part(weight, decomposition, offered_ranks(weight, config))
    (factors,) = by_energy([part], 0.7, config).factors.values()
    assert factors.rank == -(-decomposition.rank_for(0.7) // 2) * 2
    (both, _), same = decomposition.cut_by_energy(0.7, factors.rank), decomposition.cut(factors.rank)
    product = factors.first @ factors.second
    np.testing.assert_allclose(product, both.first @ both.second, rtol=0, atol=1e-12)
    # the side that needs more directions keeps them
    assert np.abs(product - same.first @ same.second).max() > 1e-3


PROBED: Any = object()
HELD_OUT: Any = object()


@dataclass
class Stub:
    """Stands in for a trial: the error is the share of squared singular values lost, the metric what of it is left.

    `alone` are the errors with one weight cut, of which the importances are made.
    """

    parts: Sequence[Part]
    alone: Mapping[str, float] = field(default_factory=dict)
    tried: list[dict[str, int]] = field(default_factory=list)

    def error(self, factors: Mapping[str, Factors], observed: object) -> float:
        if observed is PROBED:
            (name,) = factors
            return self.alone.get(name, self._lost(factors))
        self.tried.append({name: pair.rank for name, pair in factors.items()})
        return self._lost(factors)

    def metric(self, factors: Mapping[str, Factors], observed: object) -> float:
        assert observed is HELD_OUT
        return 0.9 * (1 - self._lost(factors))

    def _lost(self, factors: Mapping[str, Factors]) -> float:
        lost = [
            part.decomposition.damage(factors[part.weight.name].rank) / part.decomposition.total
            for part in self.parts
            if part.weight.name in factors
        ]
        return math.sqrt(sum(lost))


def choose(
    target: Target,
    *,
    alone: Mapping[str, float] | None = None,
) -> tuple[Any, Inventory, Stub, list[tuple[str, int, int | None]]]:
    inventory = take()
    config = Config(target=target, objective="weight", rank_multiple=1, margin=1.0)
    parts = parts_of(inventory, config)
    stub, steps = Stub(parts, alone or {}), []
    trial: Any = stub
    chooser = Chooser(inventory, parts, trial, PROBED, HELD_OUT, config, lambda *step: steps.append(step))
    return chooser.plan(target.value), inventory, stub, steps


@pytest.mark.parametrize(("kind", "unit"), [("keep_params", "params"), ("keep_macs", "macs")])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_share_is_met_from_below(kind: Any, unit: str, share: float) -> None:
    plan, inventory, stub, _ = choose(Target(kind, share))
    whole = inventory.parameters if unit == "params" else inventory.macs
    assert whole is not None
    cost = spent(inventory, plan.ranks, unit)
    assert cost <= share * whole
    # one more rank of the smallest pair would not have fitted
    assert cost > share * whole - max(weight.d_in + weight.d_out for weight in inventory.weights)
    assert plan.factors.keys() == {name for name, rank in plan.ranks.items() if rank is not None}
    assert not stub.tried


def test_predicted_errors_go_through_the_measured_ones() -> None:
    measured = {"w1": 0.2, "w2": 0.4, "w3": 0.1}
    plan, _, stub, _ = choose(Target("keep_params", 0.5), alone=measured)
    for part in stub.parts:
        name, decomposition = part.weight.name, part.decomposition
        middle = part.ranks[len(part.ranks) // 2]
        rank = plan.ranks[name]
        share = 0 if rank is None else decomposition.damage(rank) / decomposition.damage(middle)
        assert plan.predicted[name] == pytest.approx(measured[name] ** 2 * share, rel=1e-12)
    assert any(plan.predicted.values())


def test_an_important_weight_keeps_more_of_its_rank() -> None:
    def kept(alone: Mapping[str, float]) -> float:
        plan, _, _, _ = choose(Target("keep_params", 0.4), alone=alone)
        return math.inf if plan.ranks["w1"] is None else plan.ranks["w1"]

    assert kept({"w1": 0.9, "w2": 0.1}) > kept({"w1": 0.1, "w2": 0.9})


def smallest(inventory: Inventory, accepts: Callable[[dict[str, int | None]], bool], planner: Planner) -> float:
    """The least whole budget whose plan is accepted, by trying every one."""
    for budget in range(math.ceil(planner.least("params")), inventory.parameters + 1):
        if accepts(planner.fits(budget, "params")):
            return budget
    raise AssertionError


@pytest.mark.parametrize("bound", [0.05, 0.2, 0.5])
def test_the_search_finds_the_smallest_plan_within_the_error(bound: float) -> None:
    plan, inventory, stub, steps = choose(Target("max_error", bound))
    parts = stub.parts
    assert stub._lost(plan.factors) <= bound
    assert {name: pair.rank for name, pair in plan.factors.items()} in stub.tried
    # the stub's error is what the importances predict, so the plans of this planner are those of the search
    importance = {part.weight.name: 1 / part.decomposition.total for part in parts}
    planner = Planner(inventory, parts, importance, corrected=False)

    def accepts(ranks: dict[str, int | None]) -> bool:
        cut = {part.weight.name: part.cut(rank) for part in parts if (rank := ranks[part.weight.name]) is not None}
        return stub._lost(cut) <= bound

    least, low = smallest(inventory, accepts, planner), planner.least("params")
    resolution = (inventory.parameters - low) / 2 ** (SEARCH_STEPS - 1)
    assert spent(inventory, plan.ranks, "params") <= least + resolution + 1
    assert [stage for stage, _, _ in steps].count("search") == len(stub.tried) <= SEARCH_STEPS


def test_the_search_keeps_the_metric() -> None:
    plan, inventory, stub, _ = choose(Target("min_metric_kept", 0.8))
    assert stub.metric(plan.factors, HELD_OUT) >= 0.8 * stub.metric({}, HELD_OUT)
    assert spent(inventory, plan.ranks, "params") < inventory.parameters


def test_a_loose_bound_ends_at_the_smallest_model() -> None:
    plan, _, stub, _ = choose(Target("max_error", 100.0))
    assert plan.ranks == {"w1": 1, "w2": 1, "w3": 1}
    assert len(stub.tried) == 1


def test_a_bound_that_no_pair_keeps_leaves_all_dense() -> None:
    plan, _, _, _ = choose(Target("max_error", 1e-9))
    assert plan.ranks == {"w1": None, "w2": None, "w3": None}
    assert plan.factors == {}


@pytest.mark.parametrize("rank", [2, 24])
def test_a_bound_that_a_given_rank_breaks_is_refused(rank: int) -> None:
    # at 24, its full rank, the pair costs more than the dense weight, and so does the least model
    bound = 0.01 if rank == 2 else 1e-12
    alone = {"w1": 0.5}
    inventory = take()
    config = Config(target=Target("max_error", bound), objective="weight", rank_multiple=1, margin=1.0)
    fixed = {"w1": rank, "w2": 24, "w3": 10} if rank == 24 else {"w1": rank}
    parts = parts_of(inventory, config, fixed)
    trial: Any = Stub(parts, alone)
    if rank == 24:
        trial.error = lambda factors, observed: 0.5
    with pytest.raises(GateError) as refused:
        Chooser(inventory, parts, trial, PROBED, HELD_OUT, config, lambda *_: None).plan(bound)
    assert f"--max-error {bound:g} cannot be reached" in str(refused.value)
    assert "drop or raise the ranks given with --rank" in str(refused.value)


def test_a_weight_whose_cut_loses_nothing_is_not_measured() -> None:
    inventory = take(zero=True)
    config = Config(target=Target("keep_params", 0.5), objective="weight", rank_multiple=1)

    class Unused:
        def error(self, factors: object, observed: object) -> float:
            raise AssertionError

    trial: Any = Unused()
    plan = Chooser(inventory, parts_of(inventory, config), trial, PROBED, HELD_OUT, config, lambda *_: None).plan(0.5)
    assert set(plan.predicted.values()) == {0.0}


def test_offered_ranks_follow_the_settings() -> None:
    weight: Weight = take().weights[0]
    assert (weight.d_in, weight.d_out) == (32, 24)
    assert offered_ranks(weight, Config(rank_multiple=4, margin=1.0)) == [4, 8, 12]
    assert offered_ranks(weight, Config(rank_multiple=4, margin=0.6)) == [4, 8]

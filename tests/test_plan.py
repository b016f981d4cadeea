"""Allocation against exhaustive search on cases small enough for it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlr.plan import BudgetTooSmall, Option, allocate, joined, lower_hull

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@st.composite
def option_lists(draw: st.DrawFn) -> list[Option]:
    """Options of whole costs and damages, so that sums are exact; dense is the dearest and does no damage."""
    pairs = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60)), max_size=6))
    return [Option(None, 21, 0), *(Option(rank, cost, damage) for rank, (cost, damage) in enumerate(pairs, 1))]


problems = st.lists(option_lists(), min_size=1, max_size=4).map(
    lambda lists: {f"w{index}": options for index, options in enumerate(lists)}
)


def cost(chosen: Mapping[str, Option]) -> float:
    return sum(option.cost for option in chosen.values())


def damage(chosen: Mapping[str, Option]) -> float:
    return sum(option.damage for option in chosen.values())


def optimum(options: Mapping[str, Sequence[Option]], budget: float) -> float:
    every = itertools.product(*options.values())
    return min(sum(o.damage for o in choice) for choice in every if sum(o.cost for o in choice) <= budget)


def on_lower_hull(option: Option, options: Sequence[Option]) -> bool:
    """By definition: no other option is as cheap and as good, and no two have a chord below it."""
    others = [other for other in options if (other.cost, other.damage) != (option.cost, option.damage)]
    if any(other.cost <= option.cost and other.damage <= option.damage for other in others):
        return False
    for a, b in itertools.product(others, others):
        if a.cost < option.cost < b.cost:
            chord = a.damage * (b.cost - option.cost) + b.damage * (option.cost - a.cost)
            if chord < option.damage * (b.cost - a.cost):
                return False
    return True


@settings(max_examples=200, deadline=None)
@given(options=option_lists(), order=st.randoms(use_true_random=False))
def test_the_lower_hull_is_that_of_brute_force(options: list[Option], order: object) -> None:
    order.shuffle(options)  # type: ignore[attr-defined]
    hull = lower_hull(options)
    expected = {(option.cost, option.damage) for option in options if on_lower_hull(option, options)}
    assert {(option.cost, option.damage) for option in hull} == expected
    assert len(hull) == len(expected)
    for a, b in itertools.pairwise(hull):
        assert a.cost < b.cost
        assert a.damage > b.damage


@settings(max_examples=200, deadline=None)
@given(options=problems, share=st.floats(0, 1))
def test_a_budget_is_kept_and_nothing_affordable_is_left(options: dict[str, list[Option]], share: float) -> None:
    least = sum(min(option.cost for option in choices) for choices in options.values())
    most = sum(max(option.cost for option in choices) for choices in options.values())
    budget = least + round(share * (most - least))
    chosen = allocate(options, budget)
    assert chosen.keys() == options.keys()
    assert all(chosen[name] in choices for name, choices in options.items())
    assert cost(chosen) <= budget
    left = budget - cost(chosen)
    for name, choices in options.items():
        for option in choices:
            assert not (option.cost - chosen[name].cost <= left and option.damage < chosen[name].damage)
    # a greedy walk down convex hulls loses at most the step that it could not afford
    steps = [a.damage - b.damage for choices in options.values() for a, b in itertools.pairwise(lower_hull(choices))]
    assert damage(chosen) <= optimum(options, budget) + max(steps, default=0)


@settings(max_examples=100, deadline=None)
@given(
    gains=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=4),
    step=st.integers(1, 5),
    steps=st.integers(0, 16),
)
def test_convex_options_of_equal_steps_are_solved_exactly(gains: list[list[int]], step: int, steps: int) -> None:
    options = {
        f"w{index}": [
            Option(rank + 1, (rank + 1) * step, sum(sorted(falls, reverse=True)[rank:]))
            for rank in range(len(falls) + 1)
        ]
        for index, falls in enumerate(gains)
    }
    budget = step * (len(options) + steps)
    assert damage(allocate(options, budget)) == optimum(options, budget)


@settings(max_examples=100, deadline=None)
@given(options=problems)
def test_the_least_budget_is_exact(options: dict[str, list[Option]]) -> None:
    with pytest.raises(BudgetTooSmall) as refused:
        allocate(options, 0.5)
    least = refused.value.minimum
    assert least == min(sum(option.cost for option in choice) for choice in itertools.product(*options.values()))
    assert cost(allocate(options, least)) == least
    with pytest.raises(BudgetTooSmall):
        allocate(options, least - 0.5)


def test_the_least_budget_has_no_rounding_of_the_budget() -> None:
    with pytest.raises(BudgetTooSmall, match="the least possible cost is 1e-17") as refused:
        allocate({"w": [Option(1, 1e-17, 1.0)]}, -0.3)
    assert refused.value.minimum == 1e-17


@settings(max_examples=50, deadline=None)
@given(options=problems, extra=st.integers(0, 5))
def test_everything_is_dense_where_the_budget_allows(options: dict[str, list[Option]], extra: int) -> None:
    chosen = allocate(options, 21 * len(options) + extra)
    assert all(option.choice is None for option in chosen.values())


def test_a_step_too_dear_for_one_weight_leaves_the_budget_to_others() -> None:
    options = {
        "steep": [Option(1, 1, 100), Option(None, 50, 0)],
        "flat": [Option(1, 1, 2), Option(2, 4, 1), Option(None, 9, 0)],
    }
    assert {name: option.choice for name, option in allocate(options, 12).items()} == {"steep": 1, "flat": None}


def test_small_steps_do_not_keep_a_large_one_from_what_it_is_worth() -> None:
    # the steepest step buys 2 for 1, and the large one, which buys 10, no longer fits
    options = {"small": [Option(1, 0, 2), Option(None, 1, 0)], "large": [Option(1, 0, 10), Option(None, 10, 0)]}
    assert {name: option.choice for name, option in allocate(options, 10).items()} == {"small": 1, "large": None}
    assert {name: option.choice for name, option in allocate(options, 9).items()} == {"small": None, "large": 1}


def test_what_is_left_is_spent_off_the_hull() -> None:
    # (3, 9) lies above the chord from (1, 10) to (9, 0), yet is all that a budget of 4 can buy
    options = {"w": [Option(1, 1, 10), Option(2, 3, 9), Option(None, 9, 0)]}
    assert allocate(options, 4)["w"].choice == 2


@settings(max_examples=150, deadline=None)
@given(data=st.data(), parts=st.lists(option_lists(), min_size=1, max_size=4), more=problems, share=st.floats(0, 1))
def test_inside_a_group_nothing_affordable_is_left_either(
    data: st.DataObject, parts: list[list[Option]], more: dict[str, list[Option]], share: float
) -> None:
    # a group of groups: the second half is joined first
    half = data.draw(st.integers(0, len(parts) - 1))
    inner = [option.revised(lambda choice: choice) for option in joined(parts[half:])]
    nested: list[list[Option]] = [*parts[:half], inner]
    doubled = [option.revised(lambda choice: ("revised", *choice), added=7) for option in joined(nested)]
    options: dict[str, list[Option]] = {**more, "group": doubled}
    least = sum(min(option.cost for option in choices) for choices in options.values())
    budget = least + round(share * (21 * (len(parts) + len(more)) - least))
    chosen = allocate(options, budget)
    left = budget - cost(chosen)
    assert left >= 0
    mark, *flat = chosen["group"].choice
    ranks = [*flat[:-1], *flat[-1]]
    assert mark == "revised"
    found = [next(o for o in choices if o.choice == rank) for choices, rank in zip(parts, ranks, strict=True)]
    assert sum(option.cost for option in found) == chosen["group"].cost
    assert sum(option.damage for option in found) + 7 == chosen["group"].damage
    for choices, member in [*zip(parts, found, strict=True), *((more[name], chosen[name]) for name in more)]:
        for option in choices:
            assert not (option.cost - member.cost <= left and option.damage < member.damage)


def test_no_weights_need_no_budget() -> None:
    assert allocate({}, 0) == {}

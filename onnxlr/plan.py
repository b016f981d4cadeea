"""Which form and rank for which weight: allocation of one budget over all of them.

Every weight, or group of weights, offers options: dense, at its own cost and no damage, or some form and rank, at a
lower cost and some predicted damage. Damages are in one unit over all weights and add up. `allocate` walks down the
lower convex hulls of (cost, damage): it starts every weight at its cheapest option and buys, one at a time, the step
that repairs the most damage per unit of cost, wherever in the model that is (the greedy solution of a knapsack whose
hulls are convex is optimal up to its last step; Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set
of quantizers"). What then is left of the budget is spent on the best steps that still fit, so that a target is met
from below with nothing left that could be bought. Where one weight is much of the model its steps are large, and small
ones bought before may be what one of them lacks: the first that does not fit is tried at the expense of the others too,
and taken if it is better by far (which bounds the loss in a knapsack; Dantzig 1957, "Discrete-variable extremum
problems"): where errors are large their predictions are too low, most of all for weights that are cut to little.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


Chosen = TypeVar("Chosen", covariant=True)
Other = TypeVar("Other")


DECISIVE = 0.5
"""The share of the damage that a plan which favours one large step may have of another's, to be preferred."""


@dataclass(frozen=True, slots=True)
class Option(Generic[Chosen]):
    """One way to keep a weight or a group of them: what is chosen, its cost and its predicted damage.

    `steps(left)` are options besides those that were offered with it, better ones for at most `left` more; they are
    made when they are asked for.
    """

    choice: Chosen
    cost: float
    damage: float
    steps: Callable[[float], Iterator[Option[Chosen]]] = field(default=lambda _: iter(()), repr=False, compare=False)

    def revised(self, revise: Callable[[Chosen], Other], added: float = 0.0) -> Option[Other]:
        """The same with another choice, and its steps; `added` to all damages."""
        return Option(
            revise(self.choice),
            self.cost,
            self.damage + added,
            lambda left: (option.revised(revise, added) for option in self.steps(left)),
        )

    def improved_by(self, option: Option[object], left: float) -> bool:
        """Whether `option` is better, and at most `left` dearer."""
        return 0 < option.cost - self.cost <= left and option.damage < self.damage


class BudgetTooSmall(ValueError):  # noqa: N818 -- what happened, not that something failed
    """No choice of options fits the budget; `minimum` is the least that would."""

    def __init__(self, minimum: float) -> None:
        super().__init__(f"the least possible cost is {minimum}")
        self.minimum = minimum


def lower_hull(options: Sequence[Option[Chosen]]) -> list[Option[Chosen]]:
    """The options on the lower convex hull of (cost, damage), by rising cost and falling damage.

    Those on a straight edge belong to it: small steps spend a budget better than large ones.
    """
    hull: list[Option[Chosen]] = []
    for option in sorted(options, key=lambda o: (o.cost, o.damage)):
        if hull and option.damage >= hull[-1].damage:
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) > _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option[object], b: Option[object]) -> float:
    return (b.damage - a.damage) / (b.cost - a.cost)


def joined(parts: Sequence[Sequence[Option[Chosen]]]) -> list[Option[tuple[Chosen, ...]]]:
    """The options of several weights as those of one group: the lower hull of all their sums, by rising cost.

    The hull of a sum of convex hulls is walked by always taking the steepest step that any of them has next. What lies
    off the hull is too much to list; from each sum, `Option.steps` are those in which one of its members is better.
    """
    hulls = [lower_hull(options) for options in parts]
    chosen = [hull[0] for hull in hulls]
    steps = sorted(
        (_slope(hull[index], hull[index + 1]), number, index + 1)
        for number, hull in enumerate(hulls)
        for index in range(len(hull) - 1)
    )
    result = [_sum(parts, chosen)]
    for _, number, index in steps:
        chosen[number] = hulls[number][index]
        result.append(_sum(parts, chosen))
    return result


def _sum(parts: Sequence[Sequence[Option[Chosen]]], chosen: Sequence[Option[Chosen]]) -> Option[tuple[Chosen, ...]]:
    members = tuple(chosen)

    def steps(left: float) -> Iterator[Option[tuple[Chosen, ...]]]:
        for number, (options, member) in enumerate(zip(parts, members, strict=True)):
            for option in _better(options, member, left):
                yield _sum(parts, (*members[:number], option, *members[number + 1 :]))

    return Option(
        tuple(option.choice for option in members),
        sum(option.cost for option in members),
        sum(option.damage for option in members),
        steps,
    )


def _better(options: Sequence[Option[Chosen]], chosen: Option[Chosen], left: float) -> Iterator[Option[Chosen]]:
    """Whatever is better than what was chosen of `options`, and at most `left` dearer."""
    yield from (option for option in options if chosen.improved_by(option, left))
    yield from chosen.steps(left)


def allocate(options: Mapping[str, Sequence[Option[Chosen]]], budget: float) -> dict[str, Option[Chosen]]:
    """One option for each weight, of a total cost of at most `budget`.

    Parameters
    ----------
    options
        By weight; at least one each.
    budget
        In the unit of the options' costs.

    Raises
    ------
    BudgetTooSmall
        Even the cheapest options together cost more.
    """
    hulls = {name: lower_hull(choices) for name, choices in options.items()}
    chosen, left, blocked = _walk(hulls, budget)
    best = _spend(options, chosen, left)
    if blocked is not None:
        name, index = blocked
        try:
            chosen, left, _ = _walk({**hulls, name: hulls[name][index:]}, budget)
        except BudgetTooSmall:
            return best
        other = _spend(options, chosen, left)
        best = other if _damage(other) <= DECISIVE * _damage(best) else best
    return best


def _walk(
    hulls: Mapping[str, Sequence[Option[Chosen]]], budget: float
) -> tuple[dict[str, Option[Chosen]], float, tuple[str, int] | None]:
    """The steepest steps that fit, what they leave of the budget, and the first that did not fit.

    Raises
    ------
    BudgetTooSmall
        Even the cheapest options together cost more.
    """
    chosen = {name: hull[0] for name, hull in hulls.items()}
    least = sum(option.cost for option in chosen.values())
    if least > budget:
        raise BudgetTooSmall(least)
    left = budget - least

    steps = [(_slope(hull[0], hull[1]), name, 1) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    blocked = None
    while steps:
        _, name, index = heapq.heappop(steps)
        hull = hulls[name]
        price = hull[index].cost - chosen[name].cost
        if price > left:
            blocked = blocked or (name, index)
            continue  # this weight's hull ends here; cheaper steps of others may still fit
        chosen[name] = hull[index]
        left -= price
        if index + 1 < len(hull):
            heapq.heappush(steps, (_slope(hull[index], hull[index + 1]), name, index + 1))
    return chosen, left, blocked


def _damage(chosen: Mapping[str, Option[object]]) -> float:
    return sum(option.damage for option in chosen.values())


def _spend(
    options: Mapping[str, Sequence[Option[Chosen]]], chosen: dict[str, Option[Chosen]], left: float
) -> dict[str, Option[Chosen]]:
    """Buy the best single steps, on a hull or off it, until none fits into what is left."""
    while True:
        fitting = [
            (_slope(chosen[name], option), name, option)
            for name, choices in options.items()
            for option in _better(choices, chosen[name], left)
        ]
        if not fitting:
            return chosen
        _, name, option = min(fitting, key=lambda step: step[:2])
        left -= option.cost - chosen[name].cost
        chosen[name] = option

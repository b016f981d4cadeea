"""Which weights are cut, and how, so that a target is met.

A budget (`keep_params`, `keep_macs`, `max_latency`) is allocated over the whole model by `onnxlr.plan`, by what each
weight's cut does to the model's outputs (`onnxlr.importance`). Where the error that a plan predicts is off, that is
measured again at the plan, in rounds; a round's plan is kept if it is better on the same samples.

A bound on the error or the task metric is met by bisection over the budget; every step runs the whole plan on held-out
data, so the prediction only ranks the plans and never vouches for one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from onnxlr.choice import ANY_RANK, BadlyConditionedError, Choice, Cut, Terms, separable_key
from onnxlr.config import BUDGETS
from onnxlr.errors import GateError
from onnxlr.importance import factors, measure_again, measure_alone
from onnxlr.plan import BudgetTooSmall, allocate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnxlr.choice import Block, Keep, Part
    from onnxlr.config import Config
    from onnxlr.costs import Costs
    from onnxlr.factors import Factors
    from onnxlr.forms import Stored
    from onnxlr.offers import Group
    from onnxlr.plan import Option
    from onnxlr.trial import Observed, Trial

SEARCH_STEPS = 10
"""Plans tried in a search: the smallest model is found to within 0.2% of the range of budgets."""
TRUSTED = 1.25
"""By what factor a predicted error may be off before importances are measured again."""
EVEN_STEPS = 12
"""Bisections of the share that all groups keep alike: to within 0.025%."""
ROUNDING = 1 + 1e-13
"""On every budget: 0.29 of 100 parameters is 28.999999999999996, and 29 must fit."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of every weight.

    Attributes
    ----------
    cuts
        By weight.
    stored
        The arrays of those that are not left as they are.
    energy
        By weight: the share of its energy that is kept, in the sense of the objective.
    predicted
        By weight: the squared relative error of the outputs that is predicted; None where no importance was measured.
    """

    cuts: Mapping[str, Cut]
    stored: Mapping[str, Stored]
    energy: Mapping[str, float]
    predicted: Mapping[str, float] | None


class Planner:
    """Allocates budgets over groups of weights.

    Parameters
    ----------
    groups
        What may be cut; what the model holds besides belongs to every budget.
    terms
        On what terms, and in which unit.
    keep
        Puts what is stored where there is room for it.
    """

    def __init__(self, groups: Sequence[Group], terms: Terms, keep: Keep = lambda stored: stored) -> None:
        self._terms, self._keep = terms, keep
        self.whole = terms.costs.whole
        self._offers = {str(number): offering.options(terms) for number, offering in enumerate(groups)}
        self._dense = {
            str(number): sum(terms.costs.dense(part.weight) for part in offering.parts)
            for number, offering in enumerate(groups)
        }
        self._rest = self.whole - sum(self._dense.values())

    def fits(self, budget: float) -> Choice:
        """The best choice under which the whole model costs at most `budget`.

        Raises
        ------
        GateError
            There is none; the least share that can be met is said.
        """
        flag = self._terms.costs.flag
        if not self.whole:
            lacking = "parameters" if flag == "--keep-params" else "MACs that could be counted"
            raise GateError(f"{flag} cannot be met: the model has no {lacking}")
        try:
            chosen = self._allocate(budget * ROUNDING - self._rest)
        except BudgetTooSmall as refusal:
            least = math.ceil((refusal.minimum + self._rest) / ROUNDING / self.whole * 1000) / 1000
            raise GateError(
                f"{flag} {budget / self.whole:g} cannot be reached: what stays dense and the least ranks "
                f"of the rest keep {least:g} of the model; ask for at least that, or offer lower ranks with "
                "--rank-multiple"
            ) from None
        choice = Choice.of([option.choice for option in chosen], self._keep)
        return replace(choice, cost=self._rest + sum(option.cost for option in chosen))

    def _allocate(self, budget: float) -> list[Option[Choice]]:
        if self._terms.config.allocation == "global":
            return list(allocate(self._offers, budget).values())
        return self._evenly(budget)

    def _evenly(self, budget: float) -> list[Option[Choice]]:
        """The largest share that all groups can keep alike; those that cannot go so low keep their least."""
        least = {name: min(option.cost for option in offer) for name, offer in self._offers.items()}
        if sum(least.values()) > budget:
            raise BudgetTooSmall(sum(least.values()))

        def at(share: float) -> list[Option[Choice]]:
            return [
                allocate({name: offer}, max(share * self._dense[name] * ROUNDING, least[name]))[name]
                for name, offer in self._offers.items()
            ]

        low, high = 0.0, 1.0
        whole = at(high)
        if sum(option.cost for option in whole) <= budget:
            return whole
        for _ in range(EVEN_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(option.cost for option in at(middle)) <= budget else (low, middle)
        return at(low)

    @property
    def least(self) -> float:
        """The least budget that `fits` can meet."""
        return self._rest + sum(min(option.cost for option in offer) for offer in self._offers.values())


def by_energy(
    parts: Sequence[Part],
    energy: float,
    config: Config,
    keep: Keep = lambda stored: stored,
    progress: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Every weight at the least rank that keeps `energy`, rounded up to the multiple; dense where that is no gain.
    As pairs only: the rule is the one of arXiv 2407.04797. `keep` puts what is stored where there is room for it,
    `progress` is called with 1 after each weight.
    """
    cuts: dict[str, Cut] = {}
    stored: dict[str, Stored] = {}
    kept: dict[str, float] = {}
    for part in parts:
        decomposition, weight = part.decomposition, part.weight
        least = max(decomposition.rank_for(energy), config.floor * min(weight.d_in, weight.d_out))
        rank = part.fixed or math.ceil(least / config.rank_multiple) * config.rank_multiple
        cuts[part.name], damage = Cut(), 0.0
        if part.fixed is not None:
            cuts[part.name], stored[part.name] = Cut("pair", rank), keep(part.pair(rank))
            damage = decomposition.damage(rank)
        elif rank * (weight.d_in + weight.d_out) <= config.margin * weight.d_in * weight.d_out:
            factors, damage = decomposition.cut_by_energy(energy, rank)
            cuts[part.name], stored[part.name] = Cut("pair", rank), keep(part.put(factors))
        kept[part.name] = 1 - damage / decomposition.total if decomposition.total else 1.0
        progress(1)
    return Plan(cuts, stored, kept, None)


def well_conditioned(choice: Choice, again: Callable[[frozenset[Block]], Choice]) -> tuple[Choice, dict[str, Stored]]:
    """A choice and its arrays; where blocks of it are badly conditioned, what is chosen `again` without those."""
    refused: set[Block] = set()
    for trial in count():
        try:
            return choice, choice.store(True)
        except BadlyConditionedError as refusal:
            # one rank at first; a weight that is refused again and again has no good block at any
            refused |= {(name, width, rank if trial < 2 else ANY_RANK) for name, width, rank in refusal.blocks}
            choice = again(frozenset(refused))
    raise AssertionError("unreachable: there are only so many blocks")


def _predicted(choice: Choice, error: float) -> bool:
    """Whether the predicted error is off by no more than `TRUSTED` on the samples that it was predicted from."""
    predicted: float = sum(choice.damages.values()) ** 0.5
    return error / TRUSTED <= predicted <= error * TRUSTED


class Chooser:
    """Finds the plan that meets the configured target.

    Parameters
    ----------
    groups
        The weights that take part.
    trial
        The same weights with free ranks.
    probed
        Calibration samples, on which the importance of every weight is measured.
    held_out
        Held-out samples, on which a search is judged; with labels for the target min_metric_kept.
    costs
        In the unit of the target, or of what a search makes small.
    config
        The target, and all that decides what is offered.
    progress
        Called with (stage, steps done, steps in all).
    recall
        Gives the importances from what measures them, or from where they were kept.
    keep
        Puts what is stored where there is room for it.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        trial: Trial,
        probed: Observed,
        held_out: Observed,
        costs: Costs,
        config: Config,
        progress: Callable[[str, int, int | None], None],
        recall: Callable[[Callable[[], dict[str, float]]], dict[str, float]] = lambda make: make(),
        keep: Keep = lambda stored: stored,
    ) -> None:
        self._groups, self._trial, self._costs = groups, trial, costs
        self._parts = {part.name: part for members in groups for part in members.parts}
        self._probed, self._held_out, self._config, self._progress = probed, held_out, config, progress
        self._keep = keep
        self._importance: Mapping[str, float] = recall(
            lambda: measure_alone(
                self._groups, trial, probed, config, lambda done: progress("importance", done, len(self._parts))
            )
        )

    def plan(self, limit: float) -> Plan:
        """The plan that keeps `limit` of the target's quantity, or stays within it.

        Raises
        ------
        GateError
            There is none; the message says what can be reached.
        """
        best = self._again(self._search(self._planner(), limit), limit)
        choice, stored = well_conditioned(best, lambda refused: self._search(self._planner(refused), limit))
        energy = {}
        for name, damage in choice.damages.items():
            split = choice.cuts[name].form == "separable"
            part, key = self._parts[name], separable_key(name) if split else name
            total = self._importance[key] * (part.separation if split else part.decomposition).total
            energy[name] = 1 - damage / total if total else 1.0
        return Plan(choice.cuts, stored, energy, choice.damages)

    def _again(self, best: Choice, limit: float) -> Choice:
        """The choice for `limit` once importances are measured again, as long as that makes it better."""
        error: float | None = None
        for _ in range(self._config.rounds):
            cut = self._factors(best)
            error = self._trial.error(cut, self._probed) if error is None else error
            if _predicted(best, error):
                break
            kept = self._importance
            self._importance = measure_again(
                best, cut, error**2, self._groups, kept, self._trial, self._probed,
                lambda done: self._progress("rounds", done, None),
            )  # fmt: skip
            del cut
            found = self._search(self._planner(), limit)
            found_error = self._trial.error(self._factors(found), self._probed)
            # where the error is the target, it is the cost that tells
            by_error = self._config.target.kind in BUDGETS
            if not (found_error < error if by_error else found.cost < best.cost):
                self._importance = kept
                break
            best, error = found, found_error
        return best

    def rest(self) -> None:
        """Give back the memory that is needed for the next plan only."""
        self._trial.rest()

    def _planner(self, no_blocks: frozenset[Block] = frozenset()) -> Planner:
        return Planner(self._groups, Terms(self._config, self._costs, self._importance, no_blocks), self._keep)

    def _factors(self, choice: Choice) -> dict[str, Factors]:
        return factors(list(self._parts.values()), choice.store(False))

    def _search(self, planner: Planner, limit: float) -> Choice:
        kind = self._config.target.kind
        if kind in BUDGETS:
            return planner.fits(limit * planner.whole)
        if kind == "max_error":
            return self._smallest(planner, partial(self._trial.error, floating=False), lambda error: error <= limit)
        dense = self._trial.metric({}, self._held_out)
        return self._smallest(planner, self._trial.metric, lambda metric: metric >= limit * dense)

    def _smallest(
        self,
        planner: Planner,
        measure: Callable[[Mapping[str, Factors], Observed], float],
        accepts: Callable[[float], bool],
    ) -> Choice:
        """The choice of the fewest parameters whose measure is accepted, by bisection over the budget.

        What is accepted is taken to grow with the budget; the choice given back was itself measured.
        """

        def measured(choice: Choice) -> float:
            return measure(self._factors(choice), self._held_out)

        low = planner.least
        most = high = max(low, planner.whole)  # given ranks may cost more than dense weights
        best, budget = None, low
        for _ in range(SEARCH_STEPS):
            choice = planner.fits(budget)
            if accepts(measured(choice)):
                best, high = choice, budget
            else:
                low = budget
            self._progress("search", 1, SEARCH_STEPS)
            if high <= low:
                break
            budget = (low + high) / 2
        if best is not None:
            return best
        choice = planner.fits(most)
        reached = measured(choice)
        fixed = any(part.fixed is not None for part in self._parts.values())
        if not (accepts(reached) or fixed):
            # what the calibration data never did may be cut in the largest plan, and be what the others do
            choice = Choice(dict.fromkeys(self._parts, Cut()), dict.fromkeys(self._parts, 0.0), lambda _: {}, most)
            reached = measured(choice)
        if not accepts(reached):
            remedy = "drop or raise the ranks given with --rank" if fixed else "the model differs from run to run"
            raise GateError(
                f"--{self._config.target} cannot be reached: even with every rank that is not fixed left dense it is "
                f"{reached:.4g}; {remedy}"
            )
        return choice

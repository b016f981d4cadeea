"""Which weights are cut, and how, so that a target is met.

A budget (`keep_params`, `keep_macs`) is allocated over the whole model by `onnxlr.plan`. For that the damages of all
weights must be in one unit, and a layer's own error is not: some layers' errors never reach the output, others grow.
So each weight's importance is measured. It alone is cut to a middle rank, the rest stays dense, and the squared
relative error `e^2` of the model's outputs is read off; its damage at any rank `r` is then predicted as
`e^2 damage(r) / damage(middle)`. The predictions of all weights add up to that of the model's squared error, as long
as the errors are small and independent.

Where much is cut they are neither. So importances are measured again at the plan that was found, in rounds: a group of
weights is made dense again, the rest stays cut, and the fall of the squared error is what that group's cut costs there.
A round's plan is kept if it is better on the same samples.

A bound on the error or the task metric is met by bisection over the budget; every step runs the whole plan on held-out
data, so the prediction only ranks the plans and never vouches for one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onnxlr.costs import costs_in
from onnxlr.errors import GateError
from onnxlr.groups import BadlyConditionedError, Choice, Cut, Terms, group, ranks
from onnxlr.plan import BudgetTooSmall, allocate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnxlr.config import Config
    from onnxlr.costs import Unit
    from onnxlr.factorize import Factors
    from onnxlr.forms import Stored
    from onnxlr.groups import Group, Part
    from onnxlr.plan import Option
    from onnxlr.sites import Inventory
    from onnxlr.trial import Observed, Trial

SEARCH_STEPS = 10
"""Plans tried in a search: the smallest model is found to within 0.2% of the range of budgets."""
SHARE_STEPS = 20
"""Halvings of the range in which the one share of the allocation "uniform" is searched."""
ROUNDING = 1 + 1e-13
"""On every budget: 0.29 of 100 parameters is 28.999999999999996, and 29 must fit."""
MOST_CORRECTED = 8.0
"""The most by which one round changes an importance: marginal errors are differences of two noisy figures."""


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
    inventory
        The model; what it holds besides the groups belongs to every budget.
    groups
        What may be cut.
    terms
        On what terms.
    unit
        Of the budgets.
    """

    def __init__(self, inventory: Inventory, groups: Sequence[Group], terms: Terms, unit: Unit) -> None:
        self._unit, self._terms = unit, terms
        self.whole = costs_in(unit, inventory).whole
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
        if not self.whole:
            raise GateError(f"--keep-{self._unit} cannot be met: the model has no {self._unit} that could be counted")
        try:
            chosen = self._allocate(budget * ROUNDING - self._rest)
        except BudgetTooSmall as refusal:
            least = math.ceil((refusal.minimum + self._rest) / ROUNDING / self.whole * 1000) / 1000
            raise GateError(
                f"--keep-{self._unit} {budget / self.whole:g} cannot be reached: what stays dense and the least ranks "
                f"of the rest keep {least:g} of the model; ask for at least that, or offer lower ranks with "
                "--rank-multiple"
            ) from None
        choice = Choice.of([option.choice for option in chosen])
        return replace(choice, cost=self._rest + sum(option.cost for option in chosen))

    def _allocate(self, budget: float) -> list[Option[Choice]]:
        if self._terms.config.allocation == "global":
            return list(allocate(self._offers, budget).values())
        return self._at_one_share(budget)

    def _at_one_share(self, budget: float) -> list[Option[Choice]]:
        """Every group within the same share of its own dense cost, or at its least where that is more."""
        least = {name: min(option.cost for option in offer) for name, offer in self._offers.items()}
        if sum(least.values()) > budget:
            raise BudgetTooSmall(sum(least.values()))

        def at(share: float) -> list[Option[Choice]]:
            limits = {name: max(share * self._dense[name] * ROUNDING, cost) for name, cost in least.items()}
            return [allocate({name: offer}, limits[name])[name] for name, offer in self._offers.items()]

        low, high = 0.0, 1.0
        best = at(high)
        if sum(option.cost for option in best) <= budget:
            return best
        best = at(low)
        for _ in range(SHARE_STEPS):
            share = (low + high) / 2
            found = at(share)
            if sum(option.cost for option in found) <= budget:
                best, low = found, share
            else:
                high = share
        return best

    @property
    def least(self) -> float:
        """The least budget that `fits` can meet."""
        return self._rest + sum(min(option.cost for option in offer) for offer in self._offers.values())


def by_energy(parts: Sequence[Part], energy: float, config: Config) -> Plan:
    """Every weight at the least rank that keeps `energy`, rounded up to the multiple; dense where that is no gain.

    As pairs only: the rule is the one of arXiv 2407.04797.
    """
    cuts: dict[str, Cut] = {}
    stored: dict[str, Stored] = {}
    kept: dict[str, float] = {}
    for part in parts:
        decomposition, weight = part.decomposition, part.weight
        rank = part.fixed or -(-decomposition.rank_for(energy) // config.rank_multiple) * config.rank_multiple
        cuts[part.name], damage = Cut(), 0.0
        if part.fixed is not None:
            cuts[part.name], stored[part.name] = Cut("pair", rank), part.pair(rank)
            damage = decomposition.damage(rank)
        elif rank * (weight.d_in + weight.d_out) <= config.margin * weight.d_in * weight.d_out:
            factors, damage = decomposition.cut_by_energy(energy, rank)
            cuts[part.name], stored[part.name] = Cut("pair", rank), part.put(factors)
        kept[part.name] = 1 - damage / decomposition.total if decomposition.total else 1.0
    return Plan(cuts, stored, kept, None)


class Chooser:
    """Finds the plan that meets the configured target.

    Parameters
    ----------
    inventory, parts
        The model, and its weights that take part.
    trial
        The same weights with free ranks.
    probed
        Calibration samples, on which the importance of every weight is measured.
    held_out
        Held-out samples, on which a search is judged; with labels for the target min_metric_kept.
    config
        The target, and all that decides what is offered.
    progress
        Called with (stage, steps done, steps in all).
    """

    def __init__(
        self,
        inventory: Inventory,
        parts: Sequence[Part],
        trial: Trial,
        probed: Observed,
        held_out: Observed,
        config: Config,
        progress: Callable[[str, int, int | None], None],
    ) -> None:
        self._inventory, self._parts, self._trial = inventory, {part.name: part for part in parts}, trial
        self._probed, self._held_out, self._config, self._progress = probed, held_out, config, progress
        self._unit: Unit = "macs" if config.target.kind == "keep_macs" else "params"
        self._groups = group(parts, inventory, config)
        self._no_blocks: frozenset[str] = frozenset()
        self._importance = {part.name: self._alone(part) for part in parts}

    def _alone(self, part: Part) -> float:
        """The squared error of the outputs for a unit of damage, measured with all other weights dense."""
        self._progress("importance", 1, len(self._parts))
        weight = part.weight
        offered = ranks(self._config, min(weight.d_in, weight.d_out))
        middle = weight.d_in * weight.d_out / (weight.d_in + weight.d_out) / 2
        if not offered or (part.fixed is None and not self._config.forms):
            return 0.0
        rank = min(offered, key=lambda rank: abs(rank - middle))
        damage = part.decomposition.damage(rank)
        if damage <= 0:
            return 0.0
        return self._trial.error(self._factors({part.name: part.pair(rank)}), self._probed) ** 2 / damage

    def _factors(self, stored: Mapping[str, Stored]) -> dict[str, Factors]:
        weights = {name: self._parts[name].weight for name in stored}
        return {name: arrays.factors(weights[name].d_in, weights[name].d_out) for name, arrays in stored.items()}

    def plan(self, limit: float) -> Plan:
        """The plan that keeps `limit` of the target's quantity, or stays within it.

        Raises
        ------
        GateError
            There is none; the message says what can be reached.
        """
        best = self._search(self._planner(), limit)
        for _ in range(self._config.rounds):
            kept = self._importance
            self._importance = self._measured_again(best)
            found = self._search(self._planner(), limit)
            if not self._better(found, best):
                self._importance = kept
                break
            best = found
        while True:
            try:
                return self._finished(best)
            except BadlyConditionedError as refusal:
                self._no_blocks |= refusal.names
                best = self._search(self._planner(), limit)

    def _planner(self) -> Planner:
        terms = Terms(self._config, costs_in(self._unit, self._inventory), self._importance, self._no_blocks)
        return Planner(self._inventory, self._groups, terms, self._unit)

    def _finished(self, choice: Choice) -> Plan:
        energy = {}
        for name, damage in choice.damages.items():
            total = self._importance[name] * self._parts[name].decomposition.total
            energy[name] = 1 - damage / total if total else 1.0
        return Plan(choice.cuts, choice.store(True), energy, choice.damages)

    def _better(self, found: Choice, best: Choice) -> bool:
        """Whether a choice for the same target errs less or, where the error is the target, costs less."""
        if not self._config.target.kind.startswith("keep"):
            return found.cost < best.cost
        new, old = (self._trial.error(self._factors(choice.store(False)), self._probed) for choice in (found, best))
        return new < old

    def _measured_again(self, choice: Choice) -> dict[str, float]:
        """Importances as they are where `choice` is made: by what making a group dense again gains."""
        cut = self._factors(choice.store(False))
        whole = self._trial.error(cut, self._probed) ** 2
        changes = {}
        for number, members in enumerate(self._groups):
            names = {part.name for part in members.parts}
            predicted = sum(choice.damages[name] for name in names)
            if predicted > 0:
                others = {name: factors for name, factors in cut.items() if name not in names}
                gained = whole - self._trial.error(others, self._probed) ** 2
                changes[number] = float(np.clip(gained / predicted, 1 / MOST_CORRECTED, MOST_CORRECTED))
            self._progress("importance", 1, None)
        # what is dense now shares the fate of the others on average
        usual = float(np.exp(np.mean(np.log(list(changes.values()))))) if changes else 1.0
        return {
            part.name: self._importance[part.name] * changes.get(number, usual)
            for number, members in enumerate(self._groups)
            for part in members.parts
        }

    def _search(self, planner: Planner, limit: float) -> Choice:
        kind = self._config.target.kind
        if kind in ("keep_params", "keep_macs"):
            return planner.fits(limit * planner.whole)
        if kind == "max_error":
            return self._smallest(planner, self._trial.error, lambda error: error <= limit)
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
            return measure(self._factors(choice.store(False)), self._held_out)

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
        if not accepts(reached):
            raise GateError(
                f"--{self._config.target} cannot be reached: even with every rank that is not fixed left dense it is "
                f"{reached:.4g}; drop or raise the ranks given with --rank"
            )
        return choice

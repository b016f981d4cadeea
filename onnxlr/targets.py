"""Which weights are cut, and at which rank, so that a target is met.

A budget (`keep_params`, `keep_macs`) is allocated over the whole model by `onnxlr.plan`. For that the damages of all
weights must be in one unit, and a layer's own error is not: some layers' errors never reach the output, others grow.
So each weight's importance is measured. It alone is cut to a middle rank, the rest stays dense, and the squared
relative error `e^2` of the model's outputs is read off; its damage at any rank `r` is then predicted as
`e^2 damage(r) / damage(middle)`. The predictions of all weights add up to that of the model's squared error, as long
as the errors are small and independent.

A bound on the error or the task metric is met by bisection over the budget; every step runs the whole plan on held-out
data, so the prediction only ranks the plans and never vouches for one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from onnxlr.errors import GateError
from onnxlr.plan import BudgetTooSmall, Option, allocate, pair_ranks
from onnxlr.rewrite import pair_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnxlr.config import Config
    from onnxlr.factorize import Decomposition, Factors
    from onnxlr.sites import Inventory, Weight
    from onnxlr.trial import Observed, Trial

    Unit = Literal["params", "macs"]

SEARCH_STEPS = 10
"""Plans tried in a search: the smallest model is found to within 0.2% of the range of budgets."""
ROUNDING = 1 + 1e-13
"""On every budget: 0.29 of 100 parameters is 28.999999999999996, and 29 must fit."""


@dataclass(frozen=True, slots=True)
class Part:
    """A weight that takes part, ready to be cut.

    `ranks` are those on offer, `fixed` the one demanded, if any; `rows` of width `dim` made up its moments, if any.
    `note` goes before the reason for its rank in the report.
    """

    weight: Weight
    decomposition: Decomposition
    ranks: Sequence[int]
    fixed: int | None = None
    rows: int | None = None
    dim: int = 0
    note: str = ""

    def cut(self, rank: int) -> Factors:
        """Its factors at `rank`."""
        return self.decomposition.cut(rank)


def offered_ranks(weight: Weight, config: Config) -> list[int]:
    """The ranks at which a pair of `weight` is worth having."""
    return pair_ranks(weight.d_in, weight.d_out, config.rank_multiple, config.margin)


@dataclass(frozen=True, slots=True)
class Plan:
    """Rank (None is dense), factors and damage by weight, and the squared relative error predicted for each cut alone.

    `damages` are in the units of the objective; `predicted` is None where no importance was measured.
    """

    ranks: Mapping[str, int | None]
    factors: Mapping[str, Factors]
    damages: Mapping[str, float]
    predicted: Mapping[str, float] | None


class Planner:
    """Allocates budgets over `parts`.

    Parameters
    ----------
    inventory
        The model; what it holds besides `parts` belongs to every budget.
    parts
        The weights that may be cut.
    importance
        Squared error of the outputs for each unit of a weight's damage; 0 where a weight has none.
    corrected
        Whether pairs carry biases.
    """

    def __init__(
        self, inventory: Inventory, parts: Sequence[Part], importance: Mapping[str, float], *, corrected: bool
    ) -> None:
        self._inventory, self._parts, self._corrected = inventory, parts, corrected
        self._importance = importance

    def predicted(self, part: Part, rank: int | None) -> float:
        """The squared relative error of the model's outputs if `part` alone is cut at `rank`."""
        if rank is None:
            return 0.0
        damage = part.decomposition.damage(rank)
        if damage == 0:
            return 0.0  # whatever its importance: an infinite one has no product with 0
        return self._importance.get(part.weight.name, 0.0) * damage

    def cost(self, part: Part, rank: int | None, unit: Unit) -> float:
        """Parameters, or multiply-accumulates of one sample, of `part` at `rank`."""
        weight = part.weight
        if unit == "params":
            dense = weight.parameters
            if rank is None:
                return dense
            return pair_parameters(self._inventory, weight, rank, corrected=self._corrected)
        macs = weight.macs or 0
        return macs if rank is None else macs * rank * (weight.d_in + weight.d_out) / (weight.d_in * weight.d_out)

    def _options(self, part: Part, unit: Unit) -> list[Option]:
        def option(rank: int | None) -> Option:
            return Option(rank, self.cost(part, rank, unit), self.predicted(part, rank))

        if part.fixed is not None:
            return [option(part.fixed)]
        dense = option(None)
        return [dense, *(pair for pair in map(option, part.ranks) if pair.cost < dense.cost)]

    def fits(self, budget: float, unit: Unit) -> dict[str, int | None]:
        """Ranks under which the whole model costs at most `budget`.

        Raises
        ------
        GateError
            There are none; the least share that can be met is said.
        """
        whole = self.whole(unit)
        if not whole:
            raise GateError(f"--keep-{unit} cannot be met: the model has no {unit} that could be counted")
        rest = whole - sum(self.cost(part, None, unit) for part in self._parts)
        try:
            chosen = allocate({p.weight.name: self._options(p, unit) for p in self._parts}, budget * ROUNDING - rest)
        except BudgetTooSmall as refusal:
            least = math.ceil((refusal.minimum + rest) / ROUNDING / whole * 1000) / 1000
            raise GateError(
                f"--keep-{unit} {budget / whole:g} cannot be reached: what stays dense and the least ranks of the "
                f"rest keep {least:g} of the model; ask for at least that, or offer lower ranks with --rank-multiple"
            ) from None
        return {name: option.rank for name, option in chosen.items()}

    def least(self, unit: Unit) -> float:
        """The least budget that `fits` can meet."""
        saved = sum(
            self.cost(part, None, unit) - min(option.cost for option in self._options(part, unit))
            for part in self._parts
        )
        return self.whole(unit) - saved

    def whole(self, unit: Unit) -> int:
        """What the dense model costs."""
        return self._inventory.parameters if unit == "params" else self._inventory.macs or 0


def by_energy(parts: Sequence[Part], energy: float, config: Config) -> Plan:
    """Every weight at the least rank that keeps `energy`, rounded up to the multiple; dense where that is no gain."""
    ranks: dict[str, int | None] = {}
    factors: dict[str, Factors] = {}
    damages: dict[str, float] = {}
    for part in parts:
        name = part.weight.name
        if part.fixed is not None:
            ranks[name], factors[name] = part.fixed, part.cut(part.fixed)
            damages[name] = part.decomposition.damage(part.fixed)
            continue
        rank = -(-part.decomposition.rank_for(energy) // config.rank_multiple) * config.rank_multiple
        if part.ranks and rank <= part.ranks[-1]:
            ranks[name] = rank
            factors[name], damages[name] = part.decomposition.cut_by_energy(energy, rank)
        else:
            ranks[name], damages[name] = None, 0.0
    return Plan(ranks, factors, damages, None)


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
        The target.
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
        self._parts, self._trial, self._held_out = parts, trial, held_out
        self._target, self._progress = config.target, progress
        self._planner = Planner(inventory, parts, self._importance(probed), corrected=config.corrects_bias)

    def _importance(self, probed: Observed) -> dict[str, float]:
        importance = {}
        for part in self._parts:
            if part.ranks:
                middle = part.ranks[len(part.ranks) // 2]
                damage = part.decomposition.damage(middle)
                cut = {part.weight.name: part.cut(middle)}
                error = self._trial.error(cut, probed) if damage > 0 else 0.0
                importance[part.weight.name] = error**2 / damage if damage > 0 else 0.0
            self._progress("importance", 1, len(self._parts))
        return importance

    def plan(self, limit: float) -> Plan:
        """The plan that keeps `limit` of the target's quantity, or stays within it.

        Raises
        ------
        GateError
            There is none; the message says what can be reached.
        """
        kind = self._target.kind
        if kind == "keep_params":
            return self._plan(self._planner.fits(limit * self._planner.whole("params"), "params"))
        if kind == "keep_macs":
            return self._plan(self._planner.fits(limit * self._planner.whole("macs"), "macs"))
        if kind == "max_error":
            return self._smallest(self._trial.error, lambda error: error <= limit)
        dense = self._trial.metric({}, self._held_out)
        return self._smallest(self._trial.metric, lambda metric: metric >= limit * dense)

    def _plan(self, ranks: Mapping[str, int | None]) -> Plan:
        factors, damages, predicted = {}, {}, {}
        for part in self._parts:
            name, rank = part.weight.name, ranks[part.weight.name]
            if rank is not None:
                factors[name] = part.cut(rank)
            damages[name] = 0.0 if rank is None else part.decomposition.damage(rank)
            predicted[name] = self._planner.predicted(part, rank)
        return Plan(ranks, factors, damages, predicted)

    def _smallest(
        self, measure: Callable[[Mapping[str, Factors], Observed], float], accepts: Callable[[float], bool]
    ) -> Plan:
        """The plan of the fewest parameters whose measure is accepted, by bisection over the budget.

        What is accepted is taken to grow with the budget; the plan given back was itself measured.
        """
        low = self._planner.least("params")
        most = high = max(low, float(self._planner.whole("params")))  # given ranks may cost more than dense weights
        best, budget = None, low
        for _ in range(SEARCH_STEPS):
            plan = self._plan(self._planner.fits(budget, "params"))
            if accepts(measure(plan.factors, self._held_out)):
                best, high = plan, budget
            else:
                low = budget
            self._progress("search", 1, SEARCH_STEPS)
            if high <= low:
                break
            budget = (low + high) / 2
        if best is not None:
            return best
        plan = self._plan(self._planner.fits(most, "params"))
        reached = measure(plan.factors, self._held_out)
        if not accepts(reached):
            raise GateError(
                f"--{self._target} cannot be reached: even with every rank that is not fixed left dense it is "
                f"{reached:.4g}; drop or raise the ranks given with --rank"
            )
        return plan

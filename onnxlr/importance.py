"""What the model's outputs make of the damage done to each weight: measured, in one unit.

Damages of different weights do not compare: some layers' errors never reach the output, others grow. So each weight
alone is cut to a middle rank, the rest stays dense, and the squared relative error `e^2` of the model's outputs is
read off; `e^2 / damage` is its importance, and at any other rank its damage is predicted as importance times damage.
The predictions of all weights add up to that of the model's squared error, as long as the errors are small and
independent.

What a body of If or Loop holds may never run while this is measured. That its cut does nothing then says nothing, and
its own relative error is taken for that of the outputs.

Where much is cut they are neither. Then importances can be measured again at a choice that was made: a group of weights
is made dense again, the rest stays cut, and the fall of the squared error is what that group's cut costs there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnxlr.choice import ranks, separable_key, separable_ranks, width_key
from onnxlr.groups import Chained

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnxlr.choice import Choice, Part
    from onnxlr.config import Config
    from onnxlr.factors import Factors
    from onnxlr.forms import Stored
    from onnxlr.offers import Group
    from onnxlr.trial import Observed, Trial

    Importance = Mapping[str, float]

MOST_CORRECTED = 8.0
"""The most by which one round changes an importance: marginal errors are differences of two noisy figures."""
ROUNDING = 1e-6
"""The share of a squared error that says nothing."""


def measure_alone(
    groups: Sequence[Group], trial: Trial, probed: Observed, config: Config, progress: Callable[[int], None]
) -> dict[str, float]:
    """The importance of every weight, all others dense; 0 where no rank is on offer or nothing is damaged.

    What dropping hidden units does has an importance of its own, under `width_key`, and so has the split of a kernel,
    under `separable_key`: those errors look otherwise.

    Parameters
    ----------
    groups
        The weights.
    trial, probed
        The model with free ranks, and what it is measured on.
    config
        What is on offer.
    progress
        Called with 1 after each weight.
    """
    importance = {}
    nested = any(_is_nested(group) for group in groups)
    rounding = trial.error({}, probed) if nested else 0.0
    for group in groups:
        least = 2 * rounding if _is_nested(group) else -1.0
        for part in group.parts:
            importance[part.name] = _alone(part, trial, probed, config, least)
            if part.split is not None:
                importance[separable_key(part.name)] = _separated(part, trial, probed, config, least)
            progress(1)
        if isinstance(group, Chained):
            importance[width_key(group.consumer.name)] = _narrowed(group, trial, probed, least)
    return importance


def _narrowed(group: Chained, trial: Trial, probed: Observed, least: float) -> float:
    widths = group.widths
    if not widths:
        return 0.0
    width = widths[len(widths) // 2]
    damage = group.elimination.damage(width)
    total = group.elimination.damage(0)
    return _tried(group.parts, lambda: group.store_narrowed(width), damage, total, trial, probed, least)


def _alone(part: Part, trial: Trial, probed: Observed, config: Config, least: float) -> float:
    weight = part.weight
    offered = ranks(config, min(weight.d_in, weight.d_out))
    middle = weight.d_in * weight.d_out / (weight.d_in + weight.d_out) / 2
    if not offered:
        return 0.0
    rank = min(offered, key=lambda rank: abs(rank - middle))
    damage, total = part.decomposition.damage(rank), part.decomposition.total
    return _tried([part], lambda: {part.name: part.pair(rank, final=False)}, damage, total, trial, probed, least)


def _separated(part: Part, trial: Trial, probed: Observed, config: Config, least: float) -> float:
    offered = separable_ranks(part.weight, config)
    if not offered:
        return 0.0
    rank = offered[len(offered) // 2]
    damage, total = part.separation.damage(rank), part.separation.total
    return _tried([part], lambda: {part.name: part.separable(rank)}, damage, total, trial, probed, least)


def _tried(
    parts: Sequence[Part],
    store: Callable[[], Mapping[str, Stored]],
    damage: float,
    total: float,
    trial: Trial,
    probed: Observed,
    least: float,
) -> float:
    """The importance of a damage, by what the model makes of `parts` stored so; 0 where there is none.

    `total` is the damage of cutting everything: an error of no more than `least` says that it never ran.
    """
    if damage <= 0:
        return 0.0
    error = trial.error(factors(parts, store()), probed)
    return error**2 / damage if error > least else 1 / total


def _is_nested(group: Group) -> bool:
    return any(site.bodies for part in group.parts for site in part.weight.sites)


def measure_again(
    choice: Choice,
    cut: Mapping[str, Factors],
    whole: float,
    groups: Sequence[Group],
    importance: Importance,
    trial: Trial,
    probed: Observed,
    progress: Callable[[int], None],
) -> dict[str, float]:
    """Importances as they are where `choice` is made; `importance` are those that it was made with.

    `cut` are its factors, and `whole` is the squared error of the outputs with all of them.
    """
    if not np.isfinite(whole):
        return dict(importance)
    changes: dict[int, float] = {}
    for number, group in enumerate(groups):
        names = {part.name for part in group.parts}
        predicted = sum(choice.damages[name] for name in names)
        if 0 < predicted < np.inf:
            others = {name: pair for name, pair in cut.items() if name not in names}
            gained = whole - trial.error(others, probed) ** 2
            if _is_nested(group) and abs(gained) <= ROUNDING * whole:
                gained = predicted  # it never ran, so nothing was learnt
            changes[number] = float(np.clip(gained / predicted, 1 / MOST_CORRECTED, MOST_CORRECTED))
        progress(1)
    # what is dense now shares the fate of the others on average
    usual = float(np.exp(np.mean(np.log(list(changes.values()))))) if changes else 1.0
    again = {}
    for number, group in enumerate(groups):
        for part in group.parts:
            for key in importance.keys() & {part.name, width_key(part.name), separable_key(part.name)}:
                again[key] = importance[key] * changes.get(number, usual)
    return again


def factors(parts: Sequence[Part], stored: Mapping[str, Stored]) -> dict[str, Factors]:
    """What is stored, as two factors from and to all features of each weight: as a trial takes them."""
    weights = {part.name: part.weight for part in parts}
    return {name: arrays.factors(weights[name].d_in, weights[name].d_out) for name, arrays in stored.items()}

"""What the model's outputs make of the damage done to each weight: measured, in one unit.

Damages of different weights do not compare: some layers' errors never reach the output, others grow. So each weight
alone is cut to a middle rank, or as far below as it takes to do damage that the element type's own rounding does not
drown, the rest stays dense, and the squared relative error `e^2` of the model's outputs is read off; `e^2 / damage` is
its importance, and at any other rank its damage is predicted as importance times damage. The predictions of all
weights add up to that of the model's squared error, as long as the errors are small and independent.

That the outputs do not change at all says little: they may be labels, of few samples, and what a body of If or Loop
holds may never run while this is measured. The weight's own relative error is then taken for that of the outputs.

Where much is cut they are neither. Then importances can be measured again at a choice that was made: a group of weights
is made dense again, the rest stays cut, and the fall of the squared error is what that group's cut costs there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from onnxlr.choice import ranks, separable_key, separable_ranks, width_key
from onnxlr.groups import Chained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

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
ABOVE_NOISE = 8.0
"""How many times the rounding of its element type a weight's relative error is, at the rank where it is measured."""
MOST_ERROR = 1e6
"""What an error counts that is larger or not finite: predictions of other ranks still tell them apart."""


def measure_alone(
    groups: Sequence[Group], trial: Trial, probed: Observed, config: Config, progress: Callable[[int], None]
) -> dict[str, float]:
    """The importance of every weight, all others dense: positive and finite, 0 where there is nothing to damage.

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
        least = 2 * rounding if _is_nested(group) else 0.0
        for cut in _cuts(group, config):
            importance[cut.key] = _importance(cut, trial, probed, least)
        progress(len(group.parts))
    return importance


@dataclass(frozen=True, slots=True)
class _Cuts:
    """What is cut of `parts` alone, and keeps its importance under `key`: at one of the falling `sizes`."""

    key: str
    parts: Sequence[Part]
    sizes: Sequence[int]
    damage: Callable[[int], float]
    store: Callable[[int], Mapping[str, Stored]]

    @property
    def size(self) -> int | None:
        """The largest whose relative damage is above the noise, else the last that does any; None where none does."""
        noise = max((ABOVE_NOISE * _rounding(part.weight.dtype)) ** 2 for part in self.parts)
        harmful = [size for size in self.sizes if self.damage(size) > 0]
        loud = (size for size in harmful if self.damage(size) > noise * self.damage(0))
        return next(loud, harmful[-1] if harmful else None)


def _cuts(group: Group, config: Config) -> Iterator[_Cuts]:
    for part in group.parts:
        yield _Cuts(part.name, [part], _falling(part, config), part.decomposition.damage, partial(_pair, part))
        if part.split is not None:
            sizes = _from_the_middle(separable_ranks(part.weight, config))
            yield _Cuts(separable_key(part.name), [part], sizes, part.separation.damage, partial(_separable, part))
    if isinstance(group, Chained):
        sizes, key = _from_the_middle(group.widths), width_key(group.consumer.name)
        yield _Cuts(key, group.parts, sizes, group.elimination.damage, group.store_narrowed)


def _falling(part: Part, config: Config) -> list[int]:
    """Ranks of a weight from a middle one of those on offer down; of any below the full one, where none is on offer."""
    d_in, d_out = part.weight.d_in, part.weight.d_out
    offered = ranks(config, min(d_in, d_out)) or range(1, min(d_in, d_out))
    middle = min(offered, key=lambda rank: abs(rank - d_in * d_out / (d_in + d_out) / 2), default=0)
    return [rank for rank in reversed(offered) if rank <= middle]


def _from_the_middle(rising: Sequence[int]) -> Sequence[int]:
    return rising[len(rising) // 2 :: -1]


def _rounding(dtype: str) -> float:
    return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def _pair(part: Part, rank: int) -> dict[str, Stored]:
    return {part.name: part.pair(rank, final=False)}


def _separable(part: Part, rank: int) -> dict[str, Stored]:
    return {part.name: part.separable(rank)}


def _importance(cut: _Cuts, trial: Trial, probed: Observed, least: float) -> float:
    """By an error above `least`; a lower one says nothing."""
    size = cut.size
    error = 0.0 if size is None else trial.error(factors(cut.parts, cut.store(size)), probed)
    if size is not None and error > least:
        return min(error, MOST_ERROR) ** 2 / cut.damage(size)
    return 1 / cut.damage(0) if cut.damage(0) > 0 else 0.0


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

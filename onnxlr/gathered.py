"""The moments of a case: gathered here, or there before and fit for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from onnxlr.calibrate import INSTEAD, accumulate
from onnxlr.config import FORMS
from onnxlr.data import fixed_batch, shuffled
from onnxlr.errors import InstallError, ModelError, StatsError
from onnxlr.gram import beside
from onnxlr.probes import has_gradients, probe_key, probes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from onnxlr.case import Case, Progress
    from onnxlr.config import Config
    from onnxlr.gram import Stats
    from onnxlr.model_io import Model
    from onnxlr.work import Work

    Recall = Callable[[str, object, Callable[[], Stats]], Stats]
    """Gives the moments of a stage from what they follow from and from what makes them."""


def gather(
    case: Case, config: Config, progress: Progress, labels: NDArray[Any] | None = None, work: Work | None = None
) -> Stats:
    """The moments that `config.objective` needs, over the calibration part of the data.

    `labels`, one a sample of the whole data, are for `config.loss`. For the objective "auto" the moments are those of
    "fisher", or of "output" where there can be no gradients: then they say why. With `work` they are in its files,
    those that are there already are not gathered again.
    """
    kept = work is not None and (work.resumable or config.memory is not None)
    recall = work.stats if work is not None and kept else _in_memory
    gradients, no_gradients = None, ""
    if config.objective in ("fisher", "auto"):
        try:
            gradients = _gradients(case, config, progress, labels, recall)
        except (InstallError, ModelError) as error:
            if config.objective == "fisher":
                raise
            no_gradients = str(error).removesuffix(INSTEAD)
    stats = accumulate(
        case.model,
        case.inventory,
        case.calibration
        if config.rows == "all"
        else shuffled(case.calibration, fixed_batch(case.inputs) or config.batch),
        case.inputs,
        config,
        recall=lambda settings, make: recall("moments", settings, make),
        progress=lambda done: progress("calibrate", done, None),
    )
    if gradients is None:
        return replace(stats, no_gradients=no_gradients)
    return replace(beside(stats, gradients), loss=config.loss or "")


def _in_memory(stage: str, settings: object, make: Callable[[], Stats]) -> Stats:
    return make()


def resolve(config: Config, stats: Stats) -> tuple[Config, str]:
    """The objective "auto" as the one that its moments allow, and why it is that one; "" where it was not left open."""
    if config.objective != "auto":
        return config, ""
    if has_gradients(stats):
        return replace(config, objective="fisher"), "torch has the gradients of the model"
    return replace(config, objective="output"), stats.no_gradients or "the moments hold no gradients"


def _gradients(
    case: Case,
    config: Config,
    progress: Progress,
    labels: NDArray[Any] | None,
    recall: Recall,
) -> Stats:
    from onnxlr.fisher import gradient_moments  # torch is not there for every user, and missed before the work

    return gradient_moments(
        case.model,
        case.inventory,
        case.calibration,
        case.inputs,
        config,
        labels=None if labels is None else labels[[index for index, _ in case.calibration.read()]],
        recall=lambda settings, make: recall("gradients", settings, make),
        progress=lambda done: progress("gradients", done, None),
    )


def require_same_model(stats: Stats, model: Model) -> Stats:
    """`stats`, if they are those of `model`.

    Raises
    ------
    StatsError
        They are not.
    """
    if stats.model != model.fingerprint():
        raise StatsError("these moments were gathered on another model: run `onnxlr calibrate` on this one")
    return stats


def require_same_loss(stats: Stats, config: Config) -> None:
    """Refuse moments whose gradients are not of the loss that is asked for.

    Raises
    ------
    StatsError
        They are of another, or of the outputs, or there are none.
    """
    if config.loss is not None and config.loss != stats.loss:
        found = f"are of {stats.loss or 'the outputs'}" if has_gradients(stats) else "are missing"
        raise StatsError(
            f"the gradients of these moments {found}: give --loss {config.loss} to `onnxlr calibrate`, or leave it out"
        )


def as_gathered(case: Case, stats: Stats, config: Config) -> Case:
    """The case as `stats` see it: moments that were gathered for more forms serve for fewer as well."""
    others = [form for form in FORMS if form not in config.forms]
    for more in (more for count in range(len(others) + 1) for more in combinations(others, count)):
        inventory = case.inventory.observing(config.forms | set(more))
        own = {weight.name: weight for weight in inventory.weights}
        weights = [own[weight.name] for weight in case.weights]
        if all(probe_key(probe) in stats.moments for probe in probes(weights, config.objective)):
            return replace(case, inventory=inventory, weights=weights)
    return case  # whatever is missing is said where it is looked for


def require_same_division(stats: Stats, config: Config) -> Stats:
    """`stats`, if the samples and the padding that they left out are those that are left out now.

    Raises
    ------
    StatsError
        They are not: the result would be validated on samples that it was calibrated on, or cut for padding.
    """
    if stats.holdout_every != config.holdout_every:
        raise StatsError(
            f"these moments held out one sample of {stats.holdout_every}, this run one of {config.holdout_every}: it "
            f"would validate on samples that were calibrated on; give --holdout-every {stats.holdout_every}"
        )
    if stats.mask != (config.mask or ""):
        gathered, now = (f"with --mask {mask}" if mask else "without --mask" for mask in (stats.mask, config.mask))
        raise StatsError(f"these moments were gathered {gathered}, and this run is {now}: gather them as they are used")
    return stats

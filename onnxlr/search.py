"""Plans that are tried on the model itself until one meets its target on all held-out samples.

A plan is found on few samples and from single measurements (`onnxlr.targets`). What it does to the model, fewer bits
included where they are asked for, is validated on all; where that misses the target, a stricter plan is tried.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from math import prod
from typing import TYPE_CHECKING

from onnxlr.bench import compare_latency
from onnxlr.config import BUDGETS, Target
from onnxlr.costs import Latency, Macs, Parameters, timed_dtype
from onnxlr.data import batches, fixed_batch, sample_count, spread
from onnxlr.errors import GateError
from onnxlr.groups import decompose, group
from onnxlr.offers import Single
from onnxlr.plan_file import load_plan, save_plan
from onnxlr.quantize import quantize
from onnxlr.rewrite import rewrite
from onnxlr.targets import Chooser, by_energy
from onnxlr.timing_cache import recalled
from onnxlr.trial import Trial
from onnxlr.validate import validate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from onnxlr.case import Case, Progress
    from onnxlr.choice import Keep, Part
    from onnxlr.clock import Clock
    from onnxlr.config import Config
    from onnxlr.costs import Costs
    from onnxlr.data import Feed
    from onnxlr.forms import Stored
    from onnxlr.model_io import Model
    from onnxlr.offers import Group
    from onnxlr.targets import Plan
    from onnxlr.trial import Observed
    from onnxlr.validate import Validation
    from onnxlr.work import Work

SEARCH_SAMPLES = 256
"""Held-out samples that a search runs again and again; the final validation takes all of them."""
IMPORTANCE_SAMPLES, FEW_SAMPLES, IMPORTANCE_ROWS = 16, 4, 64
"""Calibration samples on which the importance of weights is measured: the few, where those have so many tokens."""
QUANTIZE_SAMPLES = 64
"""Calibration samples that show the range of activations, where those are quantized beforehand."""
ATTEMPTS = 4
"""Searches for a target, each stricter than the one before, until all held-out samples agree that it is met."""

NEAR = 0.95
"""A plan that takes less than this share of the latency that it may take is tried again with more of the model kept."""


def meet_target(
    case: Case,
    parts: Sequence[Part],
    config: Config,
    labels: NDArray[np.int64] | None,
    work: Work,
    clock: Clock,
    progress: Progress,
) -> tuple[Plan, Result]:
    """A plan, its models, and the validation that shows the target met on all held-out samples."""
    target = config.target

    def factorized(groups: Sequence[Group]) -> Sequence[Group]:
        with clock.stage("factorize"):
            decompose(groups, config, lambda done: progress("factorize", done, len(parts)))
        return groups

    @cache
    def chooser() -> Chooser:
        groups = factorized(group(parts, case.inventory, config))
        with clock.stage("importance"):
            return _chooser(case, parts, groups, config, labels, progress, work)

    def planned(limit: float) -> Plan:
        # nothing to cut meets every bound, but no budget below the whole
        if target.kind == "energy" or not (parts or target.kind in BUDGETS):
            factorized(list(map(Single, parts)))
            with clock.stage("search"):
                return by_energy(
                    parts, limit, config, _keep(config, work), lambda done: progress("search", done, len(parts))
                )
        own = chooser()
        with clock.stage("search"):
            plan = own.plan(limit)
        own.rest()
        return plan

    limit, met = target.value, None
    slow: list[tuple[float, float]] = []
    for attempt in range(ATTEMPTS):
        try:
            plan = _recalled(work, (_settings(config, parts, labels), limit), partial(planned, limit))
        except GateError:
            if target.kind != "max_latency" or limit == target.value:
                raise
            break  # what was asked for could be planned, only not what would make up for the difference
        with clock.stage("rewrite"):
            compressed = rewrite(case.inventory, plan.stored, work.scratch if case.model.external_files else None)
        result = finish(case, compressed, config, labels, clock, progress)
        validation = result.judged
        if target.kind == "max_error" and not meets(validation, target):
            reached = f"a relative error of {validation.error:.4g}"
            limit *= _stricter(config, result)
        elif target.kind == "min_metric_kept" and not meets(validation, target):
            reached = f"{validation.metric_b:.4g} of {validation.metric_a:.4g}"
            limit += (1 - limit) / 2
        elif target.kind == "max_latency" and (ratio := _latency(case, compressed, config)) > target.value:
            reached = f"{ratio:.3f} of the dense latency"
            slow.append((limit, ratio))
            limit = _faster(slow, 0.98 * target.value)
            if met is not None:
                break
        elif target.kind == "max_latency" and ratio < NEAR * target.value and limit < 1 and attempt + 1 < ATTEMPTS:
            met = plan, result  # faster than asked for, at the cost of accuracy
            limit = min(1.0, limit * (1 + NEAR) / 2 * target.value / ratio)
        else:
            return plan, result
    if met is not None:
        return met
    if target.kind == "max_latency":
        raise GateError(
            f"--{target} holds for the times of single products, but the model took {reached}: ask for at least that"
        )
    raise GateError(
        f"--{target} holds on {SEARCH_SAMPLES} held-out samples but not on all {validation.samples}, where "
        f"{reached} was reached: ask for a little more and try again"
    )


@dataclass(frozen=True, slots=True)
class Result:
    """The compressed model and its parity, and what fewer bits make of it where they are asked for."""

    compressed: Model
    validation: Validation
    quantized: Model | None
    judged: Validation

    @property
    def written(self) -> Model:
        return self.quantized or self.compressed


def finish(
    case: Case,
    compressed: Model,
    config: Config,
    labels: NDArray[np.int64] | None,
    clock: Clock,
    progress: Progress,
) -> Result:
    with clock.stage("validate"):
        alone = _validate(case, compressed, config, labels, progress)
    if config.then is None:
        return Result(compressed, alone, None, alone)
    with clock.stage("quantize"):
        feeds = batches(spread(case.calibration, QUANTIZE_SAMPLES), config.batch, case.inputs)
        quantized = quantize(compressed, config.then, feeds)
    with clock.stage("validate"):
        return Result(compressed, alone, quantized, _validate(case, quantized, config, labels, progress))


def _faster(slow: Sequence[tuple[float, float]], ratio: float) -> float:
    """The limit for a plan that takes `ratio`, after others for which (limit, ratio) was found.

    In proportion to the last one; or on the line through the last two, for what is no product does not shrink, but not
    by more than a quarter: two times may be as good as equal.
    """
    limit, found = slow[-1]
    if len(slow) > 1 and slow[-2][0] > limit and slow[-2][1] > found:
        limit_before, found_before = slow[-2]
        return max(0.75 * limit, limit - (found - ratio) * (limit_before - limit) / (found_before - found))
    return limit * ratio / found


def _stricter(config: Config, result: Result) -> float:
    """By what the bound on the error of low rank has to shrink, where what fewer bits add is in squares."""
    alone, both, bound = result.validation.error, result.judged.error, config.target.value
    added = max(0.0, both**2 - alone**2)
    if not added < bound**2:
        raise GateError(
            f"--{config.target} cannot be reached with --then {config.then}, which adds an error of {added**0.5:.4g}: "
            "ask for more than that, or leave --then out"
        )
    return min(1.0, 0.99 * (bound**2 - added) ** 0.5 / alone) if alone else 1.0


def _validate(
    case: Case, compressed: Model, config: Config, labels: NDArray[np.int64] | None, progress: Progress
) -> Validation:
    return validate(
        case.model,
        compressed,
        case.held_out,
        batch=config.batch,
        mask=config.mask,
        labels=labels,
        metric=config.metric,
        provider=config.provider,
        threads=config.threads,
        max_error=config.target.value if config.target.kind == "max_error" else None,
        progress=lambda done: progress("validate", done, None),
    )


def meets(validation: Validation, target: Target) -> bool:
    """Whether what was found on the held-out samples is within a target that bounds it."""
    if target.kind == "max_error":
        return validation.error <= target.value
    if target.kind == "min_metric_kept":
        assert validation.metric_a is not None
        assert validation.metric_b is not None
        return validation.metric_b >= target.value * validation.metric_a
    return True


def _chooser(
    case: Case,
    parts: Sequence[Part],
    groups: Sequence[Group],
    config: Config,
    labels: NDArray[np.int64] | None,
    progress: Progress,
    work: Work,
) -> Chooser:
    trial = Trial(case.inventory, case.weights, case.inputs, config, corrected=config.corrects_bias)
    probed = _probed(case, trial)
    numbered = list(spread(case.held_out, SEARCH_SAMPLES).indexed())
    truth = None if labels is None else labels[[index for index, _ in numbered]]
    searched = config.target.kind in ("max_error", "min_metric_kept")
    held_out = trial.observe((sample for _, sample in numbered), truth) if searched else []
    costs = _costs(case, config)
    keep = _keep(config, work)
    if not work.resumable:
        return Chooser(groups, trial, probed, held_out, costs, config, progress, keep=keep)
    # whatever the target: importances are the same for all
    measured_so = _settings(replace(config, rounds=0, target=Target()), parts, labels)
    return Chooser(
        groups, trial, probed, held_out, costs, config, progress,
        recall=lambda make: work.values("importance", measured_so, make), keep=keep,
    )  # fmt: skip


def _settings(config: Config, parts: Sequence[Part], labels: NDArray[np.int64] | None) -> str:
    """What a plan follows from beside the model, the data and how far it goes."""
    threads = config.threads if config.target.kind == "max_latency" else 0
    settings = replace(config, target=replace(config.target, value=1.0), threads=threads, memory=None, then=None)
    seen = [(part.name, part.rows) for part in parts]
    truth = None if labels is None else labels.tolist()
    return json.dumps([asdict(settings) | {"forms": sorted(config.forms)}, seen, truth])


def _recalled(work: Work, settings: object, make: Callable[[], Plan]) -> Plan:
    """A plan, made unless there is a file of it."""
    if not work.resumable:
        return make()
    path = work.path("plan", settings, ".json")
    if not path.exists():
        save_plan(make(), path)
    return load_plan(path)


def _keep(config: Config, work: Work) -> Keep:
    """Where what is stored goes: to a file, where memory is scarce."""
    if config.memory is None:
        return lambda stored: stored

    def keep(stored: Stored) -> Stored:
        return replace(
            stored,
            first=None if stored.first is None else work.array(stored.first),
            second=work.array(stored.second),
        )

    return keep


def _probed(case: Case, trial: Trial) -> Observed:
    """What importances are measured on: few samples where each gives many rows out, or where more would take long."""
    few = max(FEW_SAMPLES, fixed_batch(case.inputs) or 1)
    observed = trial.observe(spread(case.calibration, few), inside=True)
    tokens = sum(max(prod(array.shape[:2]) * (array.ndim == 3) for array in out.values()) for _, out, _ in observed)
    # the model runs once for every weight: over as many samples in all as calibration ran on
    affordable = sum(1 for _ in case.calibration.read()) // max(1, len(case.weights))
    many = min(IMPORTANCE_SAMPLES, affordable)
    if tokens >= IMPORTANCE_ROWS or many <= few:
        return observed
    return trial.observe(spread(case.calibration, many), inside=True)


def _costs(case: Case, config: Config) -> Costs:
    if config.target.kind == "keep_macs":
        return Macs(case.inventory)
    if config.target.kind != "max_latency":
        return Parameters(case.inventory)
    feed = bench_feed(case, config)
    timings, _ = recalled(provider=config.provider, threads=config.threads, dtype=timed_dtype(case.weights))
    # a batch that is fixed is what rows were counted for
    times = 1 if fixed_batch(case.inputs) else sample_count(feed, case.inputs)
    return Latency(case.inventory, timings, times, timings.whole(case.model, feed), config.rank_multiple)


def bench_feed(case: Case, config: Config) -> Feed:
    """What latency is measured on: it begins with the sample whose shapes the multiply-accumulates are counted for."""
    return next(iter(batches(case.calibration, config.batch, case.inputs)))


def _latency(case: Case, compressed: Model, config: Config) -> float:
    """The latency of the compressed model over that of the dense one, measured in turn."""
    if compressed is case.model:
        return 1.0  # whatever noise would make of it
    feed = bench_feed(case, config)
    return compare_latency([case.model, compressed], feed, provider=config.provider, threads=config.threads)[1].ratio

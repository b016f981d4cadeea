"""The whole way from a model and data to a compressed model.

compress = sites -> moments -> decompositions -> ranks under a target -> rewrite -> validate -> save -> report
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnxlr.bench import compare_latency
from onnxlr.case import (
    gather,
    load_truth,
    passes_check,
    prepare,
    quiet,
    require_held_out,
    require_loss_of_use,
    require_one_process,
    require_same_division,
    require_same_model,
    require_tuning,
    resolve,
    tune,
)
from onnxlr.clock import Clock
from onnxlr.config import BUDGETS, Config
from onnxlr.costs import Latency, Macs, Parameters, timed_dtype
from onnxlr.data import ImageOptions, batches, fixed_batch, sample_count, spread
from onnxlr.errors import ConfigError, GateError, ModelError, OutputError
from onnxlr.files import require_writable
from onnxlr.groups import group
from onnxlr.metrics import load_metric
from onnxlr.model_io import load, save
from onnxlr.parts import parts_of
from onnxlr.quantize import quantize
from onnxlr.report import Quantized
from onnxlr.rewrite import rewrite
from onnxlr.session import fused_operators
from onnxlr.summary import summarize
from onnxlr.targets import Chooser, by_energy
from onnxlr.timing_cache import recalled
from onnxlr.trial import Trial
from onnxlr.validate import validate
from onnxlr.work import working

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from onnxlr.case import Case, ModelLike, Progress
    from onnxlr.choice import Part
    from onnxlr.config import Tuning
    from onnxlr.costs import Costs
    from onnxlr.data import Feed
    from onnxlr.gram import Stats
    from onnxlr.model_io import Model
    from onnxlr.report import Report
    from onnxlr.targets import Plan
    from onnxlr.validate import Validation
    from onnxlr.work import Work

SEARCH_SAMPLES = 256
"""Held-out samples that a search runs again and again; the final validation takes all of them."""
IMPORTANCE_SAMPLES = 16
"""Calibration samples on which the importance of every weight is measured."""
QUANTIZE_SAMPLES = 64
"""Calibration samples that show the range of activations, where those are quantized beforehand."""
ATTEMPTS = 3
"""Searches for a target, each stricter than the one before, until all held-out samples agree that it is met."""

NEAR = 0.95
"""A plan that takes less than this share of the latency that it may take is tried again with more of the model kept."""


def compress(
    model: ModelLike,
    calib: object,
    config: Config | None = None,
    *,
    output: str | Path | None = None,
    labels: str | Path | NDArray[np.int64] | None = None,
    stats: Stats | None = None,
    tuning: Tuning | None = None,
    images: ImageOptions | None = None,
    work: str | Path | None = None,
    force: bool = False,
    progress: Progress = quiet,
) -> Report:
    """Compress a model and report what was done, with the evidence.

    Parameters
    ----------
    model
        A path, a reference to a torch model (as `onnxlr.export` takes them), a `Model` or a ModelProto.
    calib
        Calibration data: whatever `onnxlr.data.open_data` takes. A part is held out and validates the result.
    config
        Objective, target and all else; the defaults, when None.
    output
        Where the compressed model is saved; nothing is written when None.
    labels
        One a sample of `calib`, a file or an array, for the task metric and for a loss.
    stats
        Moments to reuse in place of calibration.
    tuning
        Fine-tune the compressed model so (`onnxlr.finetune`); not at all when None.
    images
        How images become inputs, where `calib` is a folder of images.
    work
        A folder that keeps what is finished, so that the same call goes on from there after it was cut off. What does
        not fit into memory goes there too, or to the temporary folder when None.
    force
        Replace an existing `output`.
    progress
        Called with (stage, steps done, steps in all or None) as the work goes on.

    Raises
    ------
    OnnxlrError
        Whatever is wrong with the input. GateError: the target cannot be reached, and what can be.
    """
    config = config or Config()
    if config.target.kind == "min_metric_kept" and labels is None:
        raise ConfigError("--min-metric-kept needs --labels: one label for every sample of --calib")
    if config.metric != "top1" and labels is None:
        raise ConfigError(f"--metric {config.metric} needs --labels: one label for every sample of --calib")
    require_loss_of_use(config, labels)
    if tuning is not None:
        require_tuning(tuning, labels)
        require_one_process()
    load_metric(config.metric)
    if stats is not None and config.objective == "weight":
        raise ConfigError("the objective weight uses no moments: leave --stats out, or choose another --objective")
    path = None if output is None else Path(output)
    if path is not None:
        require_writable(path, force=force)
    if config.then in ("int8", "int8-static") and config.forms != {"block"}:
        config = replace(config, forms=config.forms - {"block"})
    if config.objective == "utilized":  # it has no least squares to narrow a layer or to share a factor by
        config = replace(config, forms=config.forms & {"pair", "block"})
    clock = Clock()
    with clock.stage("prepare"):
        case = prepare(model, calib, config, images)
        truth = None if labels is None else load_truth(case, labels)
        require_held_out(case)
    with working(work, case.fingerprint) as kept:
        return _compress(
            case,
            stats,
            config,
            path,
            truth,
            tuning,
            kept,
            resumable=work is not None,
            force=force,
            clock=clock,
            progress=progress,
        )


def _compress(
    case: Case,
    stats: Stats | None,
    config: Config,
    path: Path | None,
    truth: NDArray[np.int64] | None,
    tuning: Tuning | None,
    work: Work,
    *,
    resumable: bool,
    force: bool,
    clock: Clock,
    progress: Progress,
) -> Report:
    why = ""
    if stats is not None:
        require_same_division(require_same_model(stats, case.model), config)
    elif config.objective != "weight":
        with clock.stage("calibrate"):
            stats = gather(case, config, progress, truth, work if resumable or config.memory is not None else None)
    if stats is not None:
        config, why = resolve(config, stats)
    with clock.stage("prepare"):
        parts = parts_of(case, stats, config)
    plan, result = _meet_target(case, parts, config, truth, work, clock, progress)
    recovery = None
    if tuning is not None and plan.stored:
        with clock.stage("finetune"):
            tuned, recovery = tune(result.compressed, case, config, tuning, truth, progress)
        result = _finish(case, tuned, config, truth, clock, progress)
    with clock.stage("benchmark"):
        models = [case.model, result.compressed, *([result.quantized] if result.quantized else [])]
        latencies = compare_latency(models, _bench_feed(case, config), provider=config.provider, threads=config.threads)
        fused = (_fused(case.model, config), _fused(result.compressed, config))
    written = result.written.nbytes
    if path is not None:
        with clock.stage("save"):
            # a model that the checker refuses to begin with is not made worse by its compression
            save(result.written, path, force=force, check=passes_check(case.model))
            written = load(path).nbytes
    quantized = None
    if result.judged is not result.validation:
        own = latencies[2]
        quantized = Quantized(str(config.then), written, own.median_ms, own.ratio, result.judged)
    return summarize(
        case, parts, plan, config, why, stats, result.validation, result.compressed, recovery,
        output=path, file_bytes=written if quantized is None else result.compressed.nbytes, quantized=quantized,
        latencies=latencies, fused=fused, seconds=clock.seconds,
    )  # fmt: skip


def _meet_target(
    case: Case,
    parts: Sequence[Part],
    config: Config,
    labels: NDArray[np.int64] | None,
    work: Work,
    clock: Clock,
    progress: Progress,
) -> tuple[Plan, _Result]:
    """A plan, its models, and the validation that shows the target met on all held-out samples."""
    target, chooser = config.target, None
    # nothing to cut meets every bound, but no budget below the whole
    if target.kind != "energy" and (parts or target.kind in BUDGETS):
        with clock.stage("importance"):
            chooser = _chooser(case, parts, config, labels, progress)
    limit, met = target.value, None
    for attempt in range(ATTEMPTS):
        with clock.stage("search"):
            try:
                plan = by_energy(parts, limit, config) if chooser is None else chooser.plan(limit)
            except GateError:
                if target.kind != "max_latency" or limit == target.value:
                    raise
                break  # what was asked for could be planned, only not what would make up for the difference
        with clock.stage("rewrite"):
            compressed = rewrite(case.inventory, plan.stored, work.folder if case.model.external_files else None)
        result = _finish(case, compressed, config, labels, clock, progress)
        validation = result.judged
        if target.kind == "max_error" and validation.error > target.value:
            reached = f"a relative error of {validation.error:.4g}"
            limit *= _stricter(config, result)
        elif target.kind == "min_metric_kept" and not _metric_kept(validation, target.value):
            reached = f"{validation.metric_b:.4g} of {validation.metric_a:.4g}"
            limit += (1 - limit) / 2
        elif target.kind == "max_latency" and (ratio := _latency(case, compressed, config)) > target.value:
            reached = f"{ratio:.3f} of the dense latency"
            limit *= 0.98 * target.value / ratio
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
class _Result:
    """The compressed model and its parity, and what fewer bits make of it where they are asked for."""

    compressed: Model
    validation: Validation
    quantized: Model | None
    judged: Validation

    @property
    def written(self) -> Model:
        return self.quantized or self.compressed


def _finish(
    case: Case,
    compressed: Model,
    config: Config,
    labels: NDArray[np.int64] | None,
    clock: Clock,
    progress: Progress,
) -> _Result:
    with clock.stage("validate"):
        alone = _validate(case, compressed, config, labels, progress)
    if config.then is None:
        return _Result(compressed, alone, None, alone)
    with clock.stage("quantize"):
        feeds = batches(spread(case.calibration, QUANTIZE_SAMPLES), config.batch, case.inputs)
        quantized = quantize(compressed, config.then, feeds)
    with clock.stage("validate"):
        return _Result(compressed, alone, quantized, _validate(case, quantized, config, labels, progress))


def _stricter(config: Config, result: _Result) -> float:
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


def _metric_kept(validation: Validation, share: float) -> bool:
    assert validation.metric_a is not None
    assert validation.metric_b is not None
    return validation.metric_b >= share * validation.metric_a


def _chooser(
    case: Case, parts: Sequence[Part], config: Config, labels: NDArray[np.int64] | None, progress: Progress
) -> Chooser:
    trial = Trial(case.inventory, case.weights, case.inputs, config, corrected=config.corrects_bias)
    probed = trial.observe(spread(case.calibration, max(IMPORTANCE_SAMPLES, fixed_batch(case.inputs) or 1)))
    numbered = list(spread(case.held_out, SEARCH_SAMPLES).indexed())
    truth = None if labels is None else labels[[index for index, _ in numbered]]
    searched = config.target.kind in ("max_error", "min_metric_kept")
    held_out = trial.observe((sample for _, sample in numbered), truth) if searched else []
    groups = group(parts, case.inventory, config)
    return Chooser(groups, trial, probed, held_out, _costs(case, config), config, progress)


def _costs(case: Case, config: Config) -> Costs:
    if config.target.kind == "keep_macs":
        return Macs(case.inventory)
    if config.target.kind != "max_latency":
        return Parameters(case.inventory)
    feed = _bench_feed(case, config)
    (dense,) = compare_latency([case.model], feed, provider=config.provider, threads=config.threads)
    timings, _ = recalled(provider=config.provider, threads=config.threads, dtype=timed_dtype(case.weights))
    # a batch that is fixed is what rows were counted for; and other load only ever adds
    times = 1 if fixed_batch(case.inputs) else sample_count(feed, case.inputs)
    return Latency(case.inventory, timings, times, 1e3 * dense.p10_ms)


def _bench_feed(case: Case, config: Config) -> Feed:
    """What latency is measured on: it begins with the sample whose shapes the multiply-accumulates are counted for."""
    return next(iter(batches(case.calibration, config.batch, case.inputs)))


def _latency(case: Case, compressed: Model, config: Config) -> float:
    """The latency of the compressed model over that of the dense one, measured in turn."""
    if compressed is case.model:
        return 1.0  # whatever noise would make of it
    feed = _bench_feed(case, config)
    return compare_latency([case.model, compressed], feed, provider=config.provider, threads=config.threads)[1].ratio


def _fused(model: Model, config: Config) -> dict[str, int] | None:
    """What onnxruntime fuses; None where it cannot save that: a provider compiles the graph, a disk is full."""
    try:
        return fused_operators(model, provider=config.provider, threads=config.threads)
    except (ModelError, OutputError):
        return None

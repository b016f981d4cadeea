"""The whole way from a model and data to a compressed model.

compress = sites -> moments -> decompositions -> ranks under a target -> rewrite -> validate -> save -> report
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnxlr.bench import compare_latency
from onnxlr.case import (
    load_truth,
    passes_check,
    prepare,
    quiet,
    require_held_out,
    require_loss_of_use,
    require_metric_of_use,
    require_one_process,
    require_tuning,
    tune,
)
from onnxlr.clock import Clock
from onnxlr.config import Config
from onnxlr.errors import ConfigError, ModelError, OutputError
from onnxlr.files import require_writable
from onnxlr.fusion import fused_operators
from onnxlr.gathered import as_gathered, gather, require_same_division, require_same_loss, require_same_model, resolve
from onnxlr.model_io import load, require_room, save
from onnxlr.parts import parts_of
from onnxlr.quantize import require_quantizable
from onnxlr.report import Quantized
from onnxlr.search import bench_feed, finish, meet_target, meets
from onnxlr.summary import summarize
from onnxlr.threads import one_blas
from onnxlr.work import working

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from onnxlr.case import Case, ModelLike, Progress
    from onnxlr.config import Form, Tuning
    from onnxlr.data import ImageOptions
    from onnxlr.gram import Stats
    from onnxlr.model_io import Model
    from onnxlr.report import Report
    from onnxlr.work import Work


def compress(
    model: ModelLike,
    calib: object,
    config: Config | None = None,
    *,
    output: str | Path | None = None,
    labels: str | Path | ArrayLike | None = None,
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
    require_metric_of_use(config, labels)
    require_loss_of_use(config, labels, tuned=tuning is not None)
    if tuning is not None:
        require_tuning(tuning, labels)
    require_one_process()
    if stats is not None and config.objective == "weight":
        raise ConfigError("the objective weight uses no moments: leave --stats out, or choose another --objective")
    path = None if output is None else Path(output)
    if path is not None:
        require_writable(path, force=force)
    config = replace(config, forms=_of_use(config))
    clock = Clock()
    with clock.stage("prepare"):
        case = prepare(model, calib, config, images)
        truth = None if labels is None else load_truth(case, labels)
        require_held_out(case)
        if path is not None:
            require_room(case.model, path, force=force)
        if config.then is not None:
            require_quantizable(case.model, case.weights, config.then)

    def source() -> str:
        return case.fingerprint() if stats is None else f"{case.fingerprint()} {stats.fingerprint()}"

    with working(work, source) as kept, one_blas():
        return _compress(
            case,
            stats,
            config,
            path,
            truth,
            tuning,
            kept,
            force=force,
            clock=clock,
            progress=progress,
        )


def _of_use(config: Config) -> frozenset[Form]:
    """Of the forms on offer, those that the rest of the settings leave.

    Raises
    ------
    ConfigError
        None of them.
    """
    forms, why = config.forms, f"objective {config.objective}"
    if config.objective == "utilized":  # it has no least squares to narrow a layer or to share a factor by
        forms &= {"pair", "block"}
    if config.then in ("int8", "int8-static"):
        forms, why = forms - {"block"}, f"--then {config.then}"
    if config.target.kind == "energy":
        forms, why = forms & {"pair"}, "--energy"
    if config.ranks and "pair" not in forms:
        raise ConfigError(f"--rank makes pairs, which are not among --forms {','.join(sorted(forms))}: add pair")
    if forms <= {"shared"}:  # pairs or blocks are what has a factor to share
        raise ConfigError(f"of --forms {','.join(sorted(config.forms))} none is of use with {why}: add pair")
    return forms


def _compress(
    case: Case,
    stats: Stats | None,
    config: Config,
    path: Path | None,
    truth: NDArray[np.int64] | None,
    tuning: Tuning | None,
    work: Work,
    *,
    force: bool,
    clock: Clock,
    progress: Progress,
) -> Report:
    why = ""
    if stats is not None:
        require_same_division(require_same_model(stats, case.model), config)
        if tuning is None:
            require_same_loss(stats, config)
    elif config.objective != "weight":
        with clock.stage("calibrate"):
            stats = gather(case, config, progress, truth, work)
    if stats is not None:
        config, why = resolve(config, stats)
        case = as_gathered(case, stats, config)
    with clock.stage("prepare"):
        parts = parts_of(case, stats, config)
    plan, result = meet_target(case, parts, config, truth, work, clock, progress)
    recovery = None
    if tuning is not None and plan.stored:
        with clock.stage("finetune"):
            tuned, recovery = tune(result.compressed, case, config, tuning, truth, progress)
        if recovery.kept:
            trained = finish(case, tuned, config, truth, clock, progress)
            if meets(trained.judged, config.target):
                result = trained
            else:
                recovery = replace(recovery, kept=False, ended=f"{recovery.ended}; tuned, it misses --{config.target}")
    with clock.stage("benchmark"):
        models = [case.model, result.compressed, *([result.quantized] if result.quantized else [])]
        latencies = compare_latency(models, bench_feed(case, config), provider=config.provider, threads=config.threads)
        fused = (_fused(case.model, config), _fused(result.compressed, config))
    dense = case.model.fingerprint(), case.model.nbytes  # its files may be those that are replaced
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
        dense=dense, output=path, file_bytes=written if quantized is None else result.compressed.nbytes,
        quantized=quantized, latencies=latencies, fused=fused, seconds=clock.seconds,
    )  # fmt: skip


def _fused(model: Model, config: Config) -> dict[str, int] | None:
    """What onnxruntime fuses; None where it cannot save that: a provider compiles the graph, a disk is full."""
    try:
        return fused_operators(model, provider=config.provider, threads=config.threads)
    except (ModelError, OutputError):
        return None

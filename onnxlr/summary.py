"""From a finished compression to its report: what became of every weight, and why."""

from __future__ import annotations

import resource
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from onnxlr.report import ModelFigures, RefusalReport, Report, WeightReport
from onnxlr.rewrite import pair_parameters
from onnxlr.session import import_onnxruntime
from onnxlr.sites import parameter_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from onnxlr.bench import Latency
    from onnxlr.case import Case
    from onnxlr.config import Config
    from onnxlr.gram import Stats
    from onnxlr.model_io import Model
    from onnxlr.targets import Part, Plan
    from onnxlr.validate import Validation


def summarize(
    case: Case,
    parts: Sequence[Part],
    plan: Plan,
    config: Config,
    stats: Stats | None,
    validation: Validation,
    compressed: Model,
    *,
    output: Path | None,
    file_bytes: int,
    latencies: tuple[Latency, Latency],
    seconds: dict[str, float],
) -> Report:
    """The report; `latencies` are those of the dense and of the compressed model, `file_bytes` of what was written."""
    weights = _weight_reports(case, parts, plan, config)
    dense, low_rank = latencies
    macs = case.inventory.macs
    saved = sum(w.macs - w.macs_after for w in weights if w.macs is not None and w.macs_after is not None)
    return Report(
        model=str(case.model.path or "in memory"),
        fingerprint=case.model.fingerprint(),
        output=None if output is None else str(output),
        config=asdict(config),
        samples=0 if stats is None else stats.samples,
        held_out=validation.samples,
        before=ModelFigures(case.inventory.parameters, macs, case.model.nbytes, dense.median_ms, validation.metric_a),
        after=ModelFigures(
            parameter_count(compressed),
            None if macs is None else round(macs - saved),
            file_bytes,
            low_rank.median_ms,
            validation.metric_b,
        ),
        predicted_error=None if plan.predicted is None else sum(plan.predicted.values()) ** 0.5,
        validation=validation,
        latency_ratio=low_rank.ratio,
        weights=weights,
        refusals=tuple(RefusalReport(r.name, r.op, r.reason, r.parameters, r.macs) for r in case.inventory.refusals),
        warnings=tuple(_warnings(case, parts, weights)),
        seconds=seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        versions={
            "onnxlr": version("onnxlr"),
            "onnx": version("onnx"),
            "onnxruntime": import_onnxruntime().__version__,
            "onnx_graphsurgeon": version("onnx_graphsurgeon"),
        },
    )


def _weight_reports(case: Case, parts: Sequence[Part], plan: Plan, config: Config) -> tuple[WeightReport, ...]:
    by_name = {part.weight.name: part for part in parts}
    corrected = config.corrects_bias
    reports = []
    for weight in case.inventory.weights:
        part = by_name.get(weight.name)
        rank = None if part is None else plan.ranks[weight.name]
        damage = 0.0 if part is None else plan.damages[weight.name]
        share = weight.d_in * weight.d_out / (weight.d_in + weight.d_out)
        reports.append(
            WeightReport(
                name=weight.name,
                sites=weight.labels,
                d_in=weight.d_in,
                d_out=weight.d_out,
                rank=rank,
                reason=case.held_back[weight.name] if part is None else part.note + _reason(part, rank, config),
                parameters=weight.parameters,
                parameters_after=weight.parameters
                if rank is None
                else pair_parameters(case.inventory, weight, rank, corrected=corrected),
                macs=weight.macs,
                macs_after=weight.macs if rank is None or weight.macs is None else weight.macs * rank / share,
                energy=1.0 if part is None or part.decomposition.total == 0 else 1 - damage / part.decomposition.total,
                predicted_error=None if plan.predicted is None or part is None else plan.predicted[weight.name] ** 0.5,
                rows=None if part is None else part.rows,
            )
        )
    return tuple(reports)


def _reason(part: Part, rank: int | None, config: Config) -> str:
    if part.fixed is not None:
        return "its rank was given"
    if rank is not None:
        return f"chosen for {config.target}"
    if not part.ranks:
        return (
            f"no pair is smaller: no multiple of {config.rank_multiple} is within {config.margin:g} of its break-even "
            f"rank {part.weight.d_in * part.weight.d_out / (part.weight.d_in + part.weight.d_out):.1f}"
        )
    if config.target.kind == "energy":
        needed = part.decomposition.rank_for(config.target.value)
        return f"no pair is smaller: {config.target} needs rank {needed}, pairs end at {part.ranks[-1]}"
    return f"{config.target} is best met with it dense"


def _warnings(case: Case, parts: Sequence[Part], weights: Sequence[WeightReport]) -> Iterator[str]:
    for part in parts:
        if part.rows is not None and part.rows <= part.dim:
            yield (
                f"{part.weight.name}: {part.rows} calibration rows for {part.dim} dimensions; directions that no row "
                "shows are ranked by the weight alone, so calibrate on more data"
            )
    for weight in weights:
        if weight.rank is not None and weight.parameters_after > weight.parameters:
            yield (
                f"{weight.name}: its pair of rank {weight.rank} is larger than the dense weight; a rank below "
                f"{weight.d_in * weight.d_out / (weight.d_in + weight.d_out):.1f} would make it smaller"
            )
    if case.inventory.uncounted:
        listed = ", ".join(case.inventory.uncounted[:3])
        yield f"the multiply-accumulates of {len(case.inventory.uncounted)} operators are unknown ({listed})"
    if not any(weight.rank is not None for weight in weights):
        why = "the target leaves every weight dense" if weights else "the model has no weight that can be compressed"
        yield f"nothing was compressed: {why}"

"""From a finished compression to its report: what became of every weight, and why."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from onnxlr.choice import Cut, best_side, block_ranks, pair_ranks, separable_ranks
from onnxlr.data import fixed_batch
from onnxlr.memory import largest_resident
from onnxlr.report import ModelFigures, RefusalReport, Report, WeightReport
from onnxlr.rewrite import copies, new_biases
from onnxlr.session import import_onnxruntime
from onnxlr.sites import parameter_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from onnxlr.bench import Latency
    from onnxlr.case import Case
    from onnxlr.choice import Part
    from onnxlr.config import Config
    from onnxlr.forms import Products, Stored
    from onnxlr.gram import Stats
    from onnxlr.model_io import Model
    from onnxlr.report import Quantized, Recovery
    from onnxlr.sites import Weight
    from onnxlr.targets import Plan
    from onnxlr.validate import Validation


def summarize(
    case: Case,
    parts: Sequence[Part],
    plan: Plan,
    config: Config,
    why: str,
    stats: Stats | None,
    validation: Validation,
    compressed: Model,
    recovery: Recovery | None,
    *,
    dense: tuple[str, int],
    output: Path | None,
    file_bytes: int,
    quantized: Quantized | None,
    latencies: Sequence[Latency],
    fused: tuple[dict[str, int] | None, dict[str, int] | None],
    seconds: dict[str, float],
) -> Report:
    """The report.

    `dense` are fingerprint and bytes of the dense model, `latencies` and `fused` are of the dense and the compressed
    model, `file_bytes` of low rank alone.
    """
    weights = _weight_reports(case, parts, plan, config)
    before, after = latencies[:2]
    macs = case.inventory.macs
    saved = sum(w.macs - w.macs_after for w in weights if w.macs is not None and w.macs_after is not None)
    return Report(
        model=case.name,
        fingerprint=dense[0],
        output=None if output is None else str(output),
        config={**asdict(config), "forms": sorted(config.forms)},
        objective_reason=why,
        samples=0 if stats is None else stats.samples,
        held_out=validation.samples,
        before=ModelFigures(case.inventory.parameters, macs, dense[1], before.median_ms, validation.metric_a, fused[0]),
        after=ModelFigures(
            parameter_count(compressed),
            None if macs is None else round(macs - saved),
            file_bytes,
            after.median_ms,
            validation.metric_b,
            fused[1],
        ),
        predicted_error=None if plan.predicted is None else sum(plan.predicted.values()) ** 0.5,
        validation=validation,
        latency_ratio=after.ratio,
        recovery=recovery,
        quantized=quantized,
        weights=weights,
        refusals=tuple(RefusalReport(r.name, r.op, r.reason, r.parameters, r.macs) for r in case.inventory.refusals),
        warnings=tuple(_warnings(case, parts, weights, validation, counted=None not in fused)),
        seconds=seconds,
        peak_memory_bytes=largest_resident(),
        versions={
            "onnxlr": version("onnxlr"),
            "onnx": version("onnx"),
            "onnxruntime": import_onnxruntime().__version__,
            "onnx_graphsurgeon": version("onnx_graphsurgeon"),
        },
    )


def _weight_reports(case: Case, parts: Sequence[Part], plan: Plan, config: Config) -> tuple[WeightReport, ...]:
    by_name = {part.name: part for part in parts}
    counted: set[str] = set()
    reports = []
    for weight in case.inventory.weights:
        part = by_name.get(weight.name)
        cut = Cut() if part is None else plan.cuts[weight.name]
        products, biases = _kept(case, weight, plan.stored.get(weight.name), counted)
        elements = weight.groups * copies(weight) * sum(d * e for d, e in products)
        reports.append(
            WeightReport(
                name=weight.name,
                sites=weight.labels,
                d_in=weight.d_in,
                d_out=weight.d_out,
                form=str(cut),
                rank=cut.rank,
                reason=case.held_back[weight.name] if part is None else part.note + _reason(part, cut, config),
                parameters=weight.parameters,
                parameters_after=elements + biases if weight.name in plan.stored else weight.parameters,
                macs=weight.macs,
                macs_after=None if weight.macs is None else _macs(weight, plan.stored.get(weight.name), products),
                energy=1.0 if part is None else plan.energy[weight.name],
                predicted_error=None if plan.predicted is None or part is None else plan.predicted[weight.name] ** 0.5,
                rows=None if part is None else part.rows,
            )
        )
    return tuple(reports)


def _kept(case: Case, weight: Weight, stored: Stored | None, counted: set[str]) -> tuple[Products, int]:
    """Matrices, and numbers in new biases; a first factor that is shared counts for the first that has it."""
    if stored is None:
        return ((weight.d_in, weight.d_out),), 0
    biases = 0 if stored.bias is None else new_biases(case.inventory, weight) * len(stored.bias)
    if stored.shared in counted:
        return stored.products[1:], biases
    counted.update({stored.shared} if stored.shared else ())
    return stored.products, biases


def _macs(weight: Weight, stored: Stored | None, products: Products) -> float:
    if stored is None:
        return float(weight.macs or 0)
    return (weight if stored.taps == 1 else weight.in_strips).macs_of(products)


def _reason(part: Part, cut: Cut, config: Config) -> str:
    if part.fixed is not None:
        return "its rank was given"
    if cut != Cut():
        return f"chosen for {config.target}"
    weight = part.weight
    break_even = weight.d_in * weight.d_out / (weight.d_in + weight.d_out)
    if config.target.kind == "energy":
        needed = part.decomposition.rank_for(config.target.value)
        return (
            f"no pair is smaller: {config.target} needs rank {needed}, and no multiple of {config.rank_multiple} from "
            f"there on is within {config.margin:g} of its break-even rank {break_even:.1f}"
        )
    size = weight.d_in, weight.d_out
    pairs = "pair" in config.forms and pair_ranks(*size, config)
    blocks = "block" in config.forms and best_side(weight, *size) and block_ranks(*size, config)
    separable = part.split is not None and separable_ranks(weight, config)
    if not pairs and not blocks and not separable:
        return (
            f"no pair or block is smaller: no multiple of {config.rank_multiple} below its full rank {min(size)} keeps "
            f"at most {config.margin:g} of its parameters; a pair breaks even at rank {break_even:.1f}"
        )
    return f"{config.target} is best met with it dense"


def _warnings(
    case: Case, parts: Sequence[Part], weights: Sequence[WeightReport], validation: Validation, *, counted: bool
) -> Iterator[str]:
    if validation.no_noise:
        yield f"the model's own half-precision noise is unknown: {validation.no_noise}"
    yield from case.notes
    if (fixed := fixed_batch(case.inputs) or 1) > 1:
        yield (
            f"the first axis of the inputs is fixed to {fixed} and taken for the batch: {fixed} samples to a run, put "
            "together anew; where it is none, give the model a batch axis of 1 in front"
        )
    for part in parts:
        if part.rows is not None and part.rows <= part.dim:
            yield (
                f"{part.weight.name}: {part.rows} calibration rows for {part.dim} dimensions; directions that no row "
                "shows are ranked by the weight alone, so calibrate on more data"
            )
    given = {part.name for part in parts if part.fixed is not None}
    for weight in weights:
        if weight.name in given and weight.parameters_after > weight.parameters:
            yield (
                f"{weight.name}: its pair of rank {weight.rank} is larger than the dense weight; a rank below "
                f"{weight.d_in * weight.d_out / (weight.d_in + weight.d_out):.1f} would make it smaller"
            )
    if case.inventory.uncounted:
        names = case.inventory.uncounted
        plural = "s" if len(names) > 1 else ""
        yield f"the multiply-accumulates of {len(names)} operator{plural} are unknown ({', '.join(names[:3])})"
    if not counted:
        yield "fused operators were not counted: onnxruntime cannot save what it makes of the models"
    if all(weight.form == "dense" for weight in weights):
        why = "the target leaves every weight dense" if weights else "the model has no weight that can be compressed"
        yield f"nothing was compressed: {why}"

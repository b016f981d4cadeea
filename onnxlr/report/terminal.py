"""Tables for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from onnxlr.metrics import OutputParity
    from onnxlr.report.recovery import Recovery
    from onnxlr.report.schema import Report, WeightReport
    from onnxlr.validate import Validation


def render_report(report: Report, *, verbose: bool) -> Iterable[RenderableType]:
    """What was gained and what it cost; with `verbose`, also what became of every weight and operator."""
    yield _figures(report)
    yield _parity(report.validation.outputs, f"Parity on {report.held_out} held-out samples")
    if verbose:
        yield _weights(report.weights)
        if report.refusals:
            columns = ["operator", "op", "parameters", "MACs", "why"]
            rows = [(r.name, r.op, count(r.parameters), count(r.macs), r.reason) for r in report.refusals]
            yield render_rows("Not supported", columns, rows)
    kept = [weight for weight in report.weights if weight.form == "dense"]
    forms = Counter(weight.form.partition(" ")[0] for weight in report.weights if weight not in kept)
    named = {
        "dense": "narrowed", "pair": "as pairs", "block": "as blocks", "separable": "as columns and rows of kernels"
    }  # fmt: skip
    made = ", ".join(f"{number} {named[form]}" for form, number in forms.most_common())
    yield (
        f"{len(report.weights) - len(kept)} of {len(report.weights)} weights compressed{f' ({made})' if made else ''}, "
        f"{len(kept)} kept dense, {len(report.refusals)} linear operators not supported"
        + ("" if verbose else "; reasons with -v or in the report")
    )
    if report.objective_reason:
        yield objective(report.config["objective"], report.objective_reason)
    if report.recovery is not None:
        yield from render_recovery(report.recovery, verbose=verbose)
    if fewer := _fewer_fused(report):
        yield f"onnxruntime fuses fewer operators: {fewer}"
    for warning in report.warnings if verbose else report.warnings[:3]:
        yield f"warning: {warning}"
    if not verbose and len(report.warnings) > 3:
        yield f"warning: {len(report.warnings) - 3} more with -v or in the report"
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items() if seconds >= 0.05)
    yield (
        f"{sum(report.seconds.values()):.1f} s" + (f" ({stages})" if stages else "")
        + f", peak memory {megabytes(report.peak_memory_bytes)}"
    )  # fmt: skip
    if report.output is not None:
        yield f"written to {report.output}"


def render_recovery(recovery: Recovery, *, verbose: bool) -> Iterable[RenderableType]:
    """What fine-tuning gained; with `verbose`, also how the held-out error went."""
    r = recovery
    if verbose:
        rows = [(str(step), number(loss), number(error)) for step, loss, error in r.history]
        yield render_rows("Fine-tuning", ["step", "loss", "held-out error"], rows)
    metric = ""
    if r.metric_before is not None:
        metric = f", metric {number(r.metric_before, '.4f')} -> {number(r.metric_after, '.4f')}"
        metric += f" (dense {number(r.metric_dense, '.4f')})"
    shared = f" in {r.processes} processes" if r.processes > 1 else ""
    yield (
        f"fine-tuning of {count(r.trained)} numbers on {r.samples} samples, {r.seconds:.0f} s{shared}: held-out error "
        f"{r.error_before:.4g} -> {r.error_after:.4g}{metric}; {r.ended}"
    )
    if not r.kept:
        yield f"that is no better on the {r.held_out} held-out samples: the model stays as it was"


def objective(name: str, reason: str) -> str:
    """One line on which objective it is, and why where that was left open."""
    return f"objective {name}: {reason}" if reason else f"objective {name}"


def _fewer_fused(report: Report) -> str:
    """The fused operators that the compressed model has less of; empty where there is none, or none was counted."""
    before, after = report.before.fused, report.after.fused
    if before is None or after is None:
        return ""
    return ", ".join(f"{op} {n} -> {after.get(op, 0)}" for op, n in before.items() if after.get(op, 0) < n)


def _figures(report: Report) -> Table:
    before, after = report.before, report.after
    fewer = report.quantized
    columns = ["", "dense", "compressed", "kept", *([] if fewer is None else [f"then {fewer.then}", "kept"])]
    table = _table(*columns, title=f"{report.config['objective']} objective")
    table.add_row("parameters", count(before.parameters), count(after.parameters),
                  percent(after.parameters, before.parameters))  # fmt: skip
    table.add_row("MACs", count(before.macs), count(after.macs), percent(after.macs, before.macs))
    table.add_row("file", megabytes(before.file_bytes), megabytes(after.file_bytes),
                  percent(after.file_bytes, before.file_bytes),
                  *([] if fewer is None else [megabytes(fewer.file_bytes),
                                              percent(fewer.file_bytes, before.file_bytes)]))  # fmt: skip
    table.add_row("latency", milliseconds(before.latency_ms), milliseconds(after.latency_ms),
                  percent(report.latency_ratio, 1),
                  *([] if fewer is None else [milliseconds(fewer.latency_ms),
                                              percent(fewer.latency_ratio, 1)]))  # fmt: skip
    if before.metric is not None and after.metric is not None:
        name = report.validation.metric_name or "metric"
        cells = [f"{before.metric:.4f}", f"{after.metric:.4f}", percent(after.metric, before.metric)]
        if fewer is not None:
            metric = fewer.validation.metric_b
            cells += [number(metric, ".4f"), percent(metric, before.metric)]
        table.add_row(name, *cells)
    predicted = "" if report.predicted_error is None else f"predicted {report.predicted_error:.4f}"
    quantized = [] if fewer is None else [f"{fewer.validation.error:.4f}"]
    table.add_row("relative error", "", f"{report.validation.error:.4f}", predicted, *quantized)
    if report.validation.noise is not None:
        table.add_row("half-precision noise", "", f"{report.validation.noise:.4f}", "")
    return table


def render_validation(validation: Validation) -> Iterable[RenderableType]:
    """Parity by output, the metric and the verdict."""
    yield _parity(validation.outputs, f"{validation.samples} samples")
    if validation.metric_name is not None:
        yield f"{validation.metric_name}: {validation.metric_a:.4f} before, {validation.metric_b:.4f} after"
    verdict = (
        ""
        if validation.passed is None
        else f" against {validation.max_error:g}: " + ("passed" if validation.passed else "FAILED")
    )
    yield f"relative error {validation.error:.6g}{verdict}"
    if validation.noise is not None:
        yield f"the first model's own half-precision noise {validation.noise:.6g}: its error beside its float32 self"
    elif validation.no_noise:
        yield f"the first model's half-precision noise is unknown: {validation.no_noise}"


def _parity(outputs: Sequence[OutputParity], title: str) -> Table:
    table = _table("output", "relative L2", "max abs", "mean abs", "cosine", "same top-1", title=title)
    for output in outputs:
        agreement = output.top1_agreement if output.agreement is None else output.agreement
        table.add_row(output.name, number(output.relative_l2), number(output.max_abs), number(output.mean_abs),
                      number(output.cosine, ".6f"), number(agreement, ".4f"))  # fmt: skip
    return table


def _weights(weights: Iterable[WeightReport]) -> Table:
    table = _table("weight", "sites", "shape", "form", "rank", "params kept", "energy kept", "predicted", "reason")
    for weight in weights:
        table.add_row(
            weight.name,
            ", ".join(weight.sites),
            f"{weight.d_in} x {weight.d_out}",
            weight.form,
            "-" if weight.rank is None else str(weight.rank),
            percent(weight.parameters_after, weight.parameters),
            f"{weight.energy:.4f}",
            number(weight.predicted_error, ".4f"),
            weight.reason,
        )
    return table


def render_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table; the first column to the left, figures to the right."""
    table = _table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    prose = {"reason", "sites", "operator", "why", "weight", "form"}
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column in prose else "right", overflow="fold")
    return table


def count(value: float | None) -> str:
    """A count in thousands, millions or billions."""
    if value is None:
        return "unknown"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}" if value < 100 * size else f"{value / size:.0f}{unit}"
    return f"{value:g}"


def megabytes(value: float) -> str:
    """Bytes in megabytes (10^6)."""
    return f"{value / 1e6:.2f} MB" if value < 1e8 else f"{value / 1e6:.0f} MB"


def milliseconds(value: float) -> str:
    """A latency in milliseconds."""
    return f"{value:.2f} ms"


def percent(part: float | None, whole: float | None) -> str:
    """A share in percent."""
    return "unknown" if part is None or not whole else f"{100 * part / whole:.1f}%"


def number(value: Any, form: str = ".4g") -> str:
    """A figure that may be missing."""
    return "-" if value is None else format(value, form)

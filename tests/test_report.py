"""The report as strict JSON, and the tables that people read."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from onnxlr.config import Config
from onnxlr.demo import Demo, DemoRow
from onnxlr.errors import OutputError
from onnxlr.metrics import OutputParity
from onnxlr.report import FORMAT, ModelFigures, Recovery, RefusalReport, Report, WeightReport
from onnxlr.report.terminal import (
    count,
    megabytes,
    milliseconds,
    number,
    percent,
    render_recovery,
    render_report,
    render_rows,
    render_validation,
)
from onnxlr.validate import Validation

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.console import RenderableType

CUT = WeightReport(
    name="blocks.0.fc1.weight",
    sites=("/blocks.0/fc1/MatMul", "/blocks.1/fc1/MatMul"),
    d_in=384,
    d_out=1536,
    form="pair",
    rank=64,
    reason="max-error 0.05",
    parameters=589_824,
    parameters_after=122_880,
    macs=1_000_000,
    macs_after=208_333.25,
    energy=0.98765,
    predicted_error=0.0123,
    rows=4096,
)
KEPT = replace(
    CUT,
    name="head.weight",
    sites=("/head/Gemm",),
    d_out=10,
    form="dense",
    rank=None,
    reason="max-error 0.05 is best met with it dense",
    parameters=3840,
    parameters_after=3840,
    energy=1.0,
    predicted_error=None,
    rows=None,
)
SCORES = OutputParity("logits", 0.0312, 0.25, 0.015, 0.999512, 0.9875, None, 5000)
LABELS = OutputParity("label", None, None, None, None, None, 0.75, 512)
VALIDATION = Validation(512, (SCORES, LABELS), 0.0312, "top1", 0.8834, 0.8801, 0.05, True)


def report(**changes: Any) -> Report:
    whole = Report(
        model="vit.onnx",
        fingerprint="0" * 64,
        output="small.onnx",
        config=asdict(Config(objective="output", ranks={"*fc2": 32}, include=("*fc*",))),
        objective_reason="",
        samples=4096,
        held_out=512,
        before=ModelFigures(1_234_567, 8_900_000_000, 4_938_268, 12.5, 0.8834, None),
        after=ModelFigures(617_283, 4_450_000_000, 2_469_134, 10.0, 0.8801, None),
        predicted_error=0.0287,
        validation=VALIDATION,
        latency_ratio=0.8125,
        recovery=None,
        quantized=None,
        weights=(CUT, KEPT),
        refusals=(RefusalReport("/conv", "Conv", "convolutions are not supported yet", 1000, None),),
        warnings=("blocks.0.fc1.weight: 300 calibration rows for 384 dimensions",),
        seconds={"calibrate": 12.34, "search": 3.21, "rewrite": 0.01},
        peak_memory_bytes=1_500_000_000,
        versions={"onnxlr": "0.1.0"},
    )
    return replace(whole, **changes)


def shown(renderables: Iterable[RenderableType], width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    for renderable in renderables:
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, name: str) -> list[str]:
    """The cells of the one row that starts with `name`, without the blanks between them."""
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


def test_the_report_is_json_that_comes_back_as_it_was() -> None:
    document = report().to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["format"] == FORMAT
    assert document["before"]["parameters"] == 1_234_567
    assert document["weights"][0]["sites"] == list(CUT.sites)
    assert document["validation"]["outputs"][1]["agreement"] == 0.75
    assert document["config"]["ranks"] == {"*fc2": 32}
    assert document["weights"][1]["rank"] is None


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_figures_that_json_lacks_are_strings_and_missing_ones_null(tmp_path: Path, value: float) -> None:
    validation = replace(VALIDATION, error=value, outputs=(replace(SCORES, relative_l2=value),))
    path = tmp_path / "report.json"
    report(validation=validation, predicted_error=value).save(path)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    document = json.loads(path.read_text(), parse_constant=refuse)
    expected = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}[str(value)]
    assert document["validation"]["error"] == document["predicted_error"] == expected
    assert document["validation"]["outputs"][0]["relative_l2"] == expected
    assert str(float(expected)) == str(value)
    assert document["before"]["fused"] is None


def test_a_report_is_saved_whole_and_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report().save(path)
    assert json.loads(path.read_text()) == report().to_dict()
    with pytest.raises(OutputError, match="exists already"):
        report(samples=1).save(path)
    assert json.loads(path.read_text())["samples"] == 4096
    report(samples=1).save(path, force=True)
    assert json.loads(path.read_text())["samples"] == 1
    with pytest.raises(TypeError):
        report(samples=object()).save(path, force=True)
    assert json.loads(path.read_text())["samples"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("verbose", [True, False])
def test_the_figures_of_both_models_are_side_by_side(verbose: bool) -> None:
    text = shown(render_report(report(), verbose=verbose))
    assert "output objective" in text
    assert row(text, "parameters") == ["1.23M", "617k", "50.0%"]
    assert row(text, "MACs") == ["8.9G", "4.45G", "50.0%"]
    assert row(text, "file") == ["4.94", "MB", "2.47", "MB", "50.0%"]
    assert row(text, "latency") == ["12.50", "ms", "10.00", "ms", "81.2%"]
    assert row(text, "top1") == ["0.8834", "0.8801", "99.6%"]
    assert row(text, "relative error") == ["0.0312", "predicted", "0.0287"]
    assert "Parity on 512 held-out samples" in text
    assert row(text, "logits") == ["0.0312", "0.25", "0.015", "0.999512", "0.9875"]
    assert row(text, "label") == ["-", "-", "-", "-", "0.7500"]
    assert "1 of 2 weights compressed (1 as pairs), 1 kept dense, 1 linear operators not supported" in text
    assert "warning: blocks.0.fc1.weight: 300 calibration rows for 384 dimensions" in text
    assert "15.6 s (calibrate 12.3, search 3.2), peak memory 1500 MB" in text
    assert "written to small.onnx" in text


def test_the_forms_are_counted() -> None:
    forms = (
        "pair", "block", "block with a shared first factor", "pair of 96 hidden units", "dense of 96 hidden units",
        "separable",
    )  # fmt: skip
    text = shown(render_report(report(weights=(KEPT, *(replace(CUT, form=form) for form in forms))), verbose=True))
    made = "2 as pairs, 2 as blocks, 1 narrowed, 1 as columns and rows of kernels"
    assert f"6 of 7 weights compressed ({made}), 1 kept dense" in " ".join(text.split())
    for form in forms:
        assert form in text


def test_an_objective_that_was_left_open_says_why_it_is_that_one() -> None:
    why = "the moments hold no gradients"
    assert f"objective output: {why}\n" in shown(render_report(report(objective_reason=why), verbose=False))
    assert "objective output:" not in shown(render_report(report(), verbose=False))
    demo = Demo((DemoRow(report(objective_reason=why), VALIDATION, ()),))
    assert f"objective output: {why}\n" in shown(demo.render(verbose=False))


def test_every_weight_has_its_reason_where_one_asks() -> None:
    text = shown(render_report(report(), verbose=True))
    sites = "/blocks.0/fc1/MatMul, /blocks.1/fc1/MatMul"
    assert row(text, f"{CUT.name}  {sites}") == [
        "384", "x", "1536", "pair", "64", "20.8%", "0.9877", "0.0123", "max-error", "0.05"]  # fmt: skip
    kept = row(text, KEPT.name)
    assert kept[:9] == ["/head/Gemm", "384", "x", "10", "dense", "-", "100.0%", "1.0000", "-"]
    assert " ".join(kept[9:]) == KEPT.reason
    assert "reasons with -v" not in text
    brief = shown(render_report(report(), verbose=False))
    assert "reasons with -v or in the report" in brief
    assert KEPT.reason not in brief


def test_a_narrow_terminal_folds_and_loses_nothing() -> None:
    name, reason = "encoder.blocks.10.attention.projection.weight", KEPT.reason
    text = shown([render_rows("Weights", ["weight", "reason"], [[name, reason]])], width=40)
    _, header, *lines = text.splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 40
    edge = header.index("reason")
    assert "".join(line[:edge].strip() for line in lines) == name
    assert "".join("".join(line[edge:].split()) for line in lines) == "".join(reason.split())


def test_more_than_three_warnings_are_counted_unless_asked_for() -> None:
    many = report(warnings=tuple(f"warning number {index}" for index in range(5)))
    brief, verbose = (shown(render_report(many, verbose=verbose)) for verbose in (False, True))
    assert "warning: warning number 2" in brief
    assert "number 3" not in brief
    assert "warning: 2 more with -v or in the report" in brief
    assert "warning: warning number 4" in verbose
    assert "more with" not in verbose


def test_operators_that_are_fused_no_more_are_named() -> None:
    def text(before: dict[str, int] | None, after: dict[str, int] | None) -> str:
        figures = report()
        changed = report(before=replace(figures.before, fused=before), after=replace(figures.after, fused=after))
        assert changed.to_dict()["before"]["fused"] == before
        return shown(render_report(changed, verbose=False))

    dense = {"Attention": 6, "BiasGelu": 6, "SkipLayerNormalization": 12}
    fewer = text(dense, {"BiasGelu": 6, "FusedMatMul": 3, "SkipLayerNormalization": 11})
    assert "onnxruntime fuses fewer operators: Attention 6 -> 0, SkipLayerNormalization 12 -> 11\n" in fewer
    for before, after in ((dense, dense), ({}, dense), (None, {}), (dense, None)):
        assert "fuses" not in text(before, after)


def test_what_was_not_measured_is_said() -> None:
    unknown = ModelFigures(100, None, 1000, 1.5, None, None)
    text = shown(
        render_report(
            report(
                before=unknown,
                after=unknown,
                output=None,
                predicted_error=None,
                warnings=(),
            ),
            verbose=False,
        )
    )
    assert row(text, "MACs") == ["unknown"] * 3
    for absent in ("top1", "predicted", "written to", "warning"):
        assert absent not in text


@pytest.mark.parametrize(
    ("passed", "gate", "verdict"),
    [
        (True, 0.05, "relative error 0.0312 against 0.05: passed"),
        (False, 0.01, "relative error 0.0312 against 0.01: FAILED"),
        (None, None, "relative error 0.0312"),
    ],
)
def test_a_validation_ends_with_its_verdict(passed: bool | None, gate: float | None, verdict: str) -> None:
    lines = shown(render_validation(replace(VALIDATION, passed=passed, max_error=gate))).splitlines()
    assert lines[0].strip() == "512 samples"
    assert lines[-2:] == ["top1: 0.8834 before, 0.8801 after", verdict]


def test_a_validation_without_labels_has_no_metric() -> None:
    bare = replace(VALIDATION, metric_name=None, metric_a=None, metric_b=None, error=math.inf)
    text = shown(render_validation(bare))
    assert "before" not in text
    assert "relative error inf" in text


def test_names_with_brackets_are_shown_as_they_are() -> None:
    text = shown([render_rows("Weights", ["weight", "parameters"], [["layers[bold].w[/x]", "12"]])])
    assert row(text, "layers[bold].w[/x]") == ["12"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unknown"),
        (0, "0"),
        (999, "999"),
        (12.5, "12.5"),
        (1000, "1k"),
        (1234, "1.23k"),
        (123_456, "123k"),
        (1_000_000, "1M"),
        (85_800_000, "85.8M"),
        (7_240_000_000, "7.24G"),
        (1_750_000_000_000, "1750G"),
    ],
)
def test_counts(value: float | None, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.00 MB"), (1_234_567, "1.23 MB"), (99_994_999, "99.99 MB"), (1e8, "100 MB")]
)
def test_megabytes(value: float, text: str) -> None:
    assert megabytes(value) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(1, 2, "50.0%"), (0, 3, "0.0%"), (3, 2, "150.0%"), (None, 2, "unknown"), (1, None, "unknown"), (1, 0, "unknown")],
)
def test_percent(part: float | None, whole: float | None, text: str) -> None:
    assert percent(part, whole) == text


def test_a_missing_figure_is_a_dash() -> None:
    assert (number(None), number(0.123456), number(0.5, ".4f")) == ("-", "0.1235", "0.5000")
    assert milliseconds(1.234) == "1.23 ms"


@pytest.mark.parametrize("kept", [True, False])
def test_fine_tuning_is_told_as_it_went(kept: bool) -> None:
    recovery = Recovery(
        kept=kept, ended="all 60 steps", steps=60, steps_planned=60, samples=896, held_out=128, trained=5100,
        inner=("h",), error_before=0.15, error_after=0.0625, metric_before=0.8, metric_after=0.875, metric_dense=0.9,
        history=((0, float("nan"), 0.15), (60, 0.01, 0.0625)), processes=2, seconds=12.0,
    )  # fmt: skip
    text = shown(render_recovery(recovery, verbose=True))
    assert "fine-tuning of 5.1k numbers on 896 samples, 12 s in 2 processes: held-out error 0.15 -> 0.0625" in text
    assert "metric 0.8000 -> 0.8750 (dense 0.9000); all 60 steps" in text
    assert ("no better on the 128 held-out samples" in text) is not kept
    assert re.search(r"^60 +0.01 +0.0625", text, re.MULTILINE)

"""The main job on the model that comes with the package: a vision transformer for Fashion-MNIST."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxlr.api import calibrate
from onnxlr.case import quiet
from onnxlr.config import Config, Target
from onnxlr.data import batches, load_labels, open_data
from onnxlr.errors import DataError
from onnxlr.model_io import load
from onnxlr.pipeline import compress
from onnxlr.polygraphy_files import Verdict, run_comparator
from onnxlr.report.terminal import count, megabytes, milliseconds, objective, percent, render_rows
from onnxlr.session import Session
from onnxlr.validate import Validation, validate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from onnxlr.case import Progress
    from onnxlr.report import Report

KEPT = (0.5, 0.25)
"""The shares of the model's parameters that the demo keeps, one after another."""


def sample_folder() -> Path:
    """Where the sample lies: within an installed package, or beside it in a checkout.

    Raises
    ------
    DataError
        In neither place.
    """
    package = Path(__file__).parent
    for root in (package, package.parent):
        folder = root / "samples" / "fashion_vit"
        if (folder / "model.onnx").is_file():
            return folder
    raise DataError("the sample model is missing from this installation: install onnxlr again, or use a checkout")


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One compressed model beside the dense one: the compression, the test set, and Polygraphy's opinion."""

    report: Report
    test: Validation
    polygraphy: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo saw: a row for every share kept."""

    rows: tuple[DemoRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, under a "format"."""
        return {"format": "onnxlr-demo/1", **asdict(self)}

    def render(self, *, verbose: bool) -> Iterable[RenderableType]:
        """The table of all shares."""
        first = self.rows[0]
        before = first.report.before
        columns = ["", "parameters", "MACs", "file", "latency", "top-1", "same class", "relative error", "polygraphy"]
        assert first.test.metric_a is not None
        table = [
            ["dense", count(before.parameters), count(before.macs), megabytes(before.file_bytes),
             milliseconds(before.latency_ms), f"{100 * first.test.metric_a:.2f}%", "", "", ""]
        ]  # fmt: skip
        for row in self.rows:
            after = row.report.after
            assert row.test.metric_b is not None
            table.append(
                [f"keep {row.report.config['target']['value']:.0%}",
                 f"{count(after.parameters)}", percent(after.macs, before.macs), megabytes(after.file_bytes),
                 percent(row.report.latency_ratio, 1), f"{100 * row.test.metric_b:.2f}%",
                 percent(row.test.outputs[0].top1_agreement, 1), f"{row.test.error:.4f}",
                 "passed" if all(v.passed for v in row.polygraphy) else "FAILED"]
            )  # fmt: skip
        yield render_rows(
            f"ViT for Fashion-MNIST, calibrated on {first.report.samples} images, tested on {first.test.samples}",
            columns,
            table,
        )
        yield objective(first.report.config["objective"], first.report.objective_reason)
        yield "MACs and latency (of a batch of 8, runs in turn) are shares of the dense model's."
        if verbose:
            for row in self.rows:
                yield f"{row.report.config['target']['value']:.0%}: ranks " + ", ".join(
                    str(weight.rank or "dense") for weight in row.report.weights
                )


def run_demo(progress: Progress = quiet) -> Demo:
    """Compress the sample model to several sizes, test each on labelled images it never saw, and time it.

    Raises
    ------
    OnnxlrError
        As `compress`; DataError when the sample is missing.
    """
    folder = sample_folder()
    dense = load(folder / "model.onnx")
    inputs = Session(dense).inputs
    test = open_data(folder / "test", inputs)
    labels = load_labels(folder / "test_labels.npy")
    rows = []
    stats = calibrate(dense, folder / "calib", progress=progress)
    with tempfile.TemporaryDirectory() as scratch:
        for kept in KEPT:
            output, config = Path(scratch, f"{kept}.onnx"), Config(target=Target("keep_params", kept))
            report = compress(dense, folder / "calib", config, output=output, stats=stats, progress=progress)
            small = load(output)
            parity = validate(
                dense, small, test, batch=100, labels=labels, progress=lambda n: progress("test", n, None)
            )
            feed = next(batches(test, 8, inputs))
            verdicts = run_comparator(folder / "model.onnx", output, [feed], max_error=0.1)
            rows.append(DemoRow(report, parity, verdicts))
    return Demo(tuple(rows))

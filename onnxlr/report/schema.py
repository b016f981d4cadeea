"""The report of a compression: everything that was decided and measured, as one versioned JSON document."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from onnxlr.files import replacing

if TYPE_CHECKING:
    from pathlib import Path

    from onnxlr.report.recovery import Recovery
    from onnxlr.validate import Validation

FORMAT = "onnxlr-report/1"


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What became of one weight.

    Attributes
    ----------
    name, sites
        The stored constant, and the operators that use it.
    d_in, d_out
        Its shape, as `y = x W`.
    form
        What was made of it: "dense", "pair", "block", "separable" (a column, then a row of a kernel), and what was
        shared or narrowed (`onnxlr.choice.Cut`).
    rank
        Of its pair or block; None where it stayed dense.
    reason
        Why it stayed dense, or why it has just this form and rank.
    parameters, parameters_after
        Elements stored.
    macs, macs_after
        Multiply-accumulates of one sample; None where unknown.
    energy
        The share of its energy that is kept, in the sense of the objective.
    predicted_error
        The relative error of the model's outputs that is predicted for this cut alone.
    rows
        Calibration rows that its moments were gathered from; None without data.
    """

    name: str
    sites: tuple[str, ...]
    d_in: int
    d_out: int
    form: str
    rank: int | None
    reason: str
    parameters: int
    parameters_after: int
    macs: int | None
    macs_after: float | None
    energy: float
    predicted_error: float | None
    rows: int | None


@dataclass(frozen=True, slots=True)
class RefusalReport:
    """A linear operator that cannot be compressed, why, and how much of the model it is."""

    name: str
    op: str
    reason: str
    parameters: int
    macs: int | None


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """Size and speed of a model: figures that do not stand for one another.

    `macs` are of one sample, `latency_ms` the median of one run of the benchmark's batch, `metric` the task metric on
    held-out labelled data (None without labels), `fused` the operators, by type, that onnxruntime puts in the place of
    several; None where they could not be counted.
    """

    parameters: int
    macs: int | None
    file_bytes: int
    latency_ms: float
    metric: float | None
    fused: dict[str, int] | None


@dataclass(frozen=True, slots=True)
class Quantized:
    """What fewer bits made of the compressed model: it is the one that is written.

    `then` says how (`Config.then`), `file_bytes`, `latency_ms`, `latency_ratio` (against the dense model) and
    `validation` are as of a `Report`.
    """

    then: str
    file_bytes: int
    latency_ms: float
    latency_ratio: float
    validation: Validation


@dataclass(frozen=True, slots=True)
class Report:
    """A compression, whole.

    Attributes
    ----------
    model, fingerprint, output
        The dense model's path and sha256; the path of the compressed one.
    config
        Every setting, defaults included; the objective is the one that ran.
    objective_reason
        Why it was that one, where the user left it open.
    samples, held_out
        How many samples were calibrated on and how many validated on.
    before, after
        The figures of both models.
    predicted_error
        The relative error of the outputs that the plan predicts, where importances were measured.
    validation
        Parity on the held-out samples.
    latency_ratio
        Median over pairs of runs in turn, compressed over dense; below 1 is faster.
    recovery
        What fine-tuning did; None without it.
    quantized
        What fewer bits did; None without them. `after`, `validation` and `latency_ratio` are of low rank alone.
    weights, refusals
        What became of every linear operator.
    warnings
        What a user should know before trusting the result.
    seconds
        By stage.
    peak_memory_bytes
        Largest resident size of the process so far.
    versions
        Of onnxlr and of what it ran on.
    """

    model: str
    fingerprint: str
    output: str | None
    config: dict[str, Any]
    objective_reason: str
    samples: int
    held_out: int
    before: ModelFigures
    after: ModelFigures
    predicted_error: float | None
    validation: Validation
    latency_ratio: float
    recovery: Recovery | None
    quantized: Quantized | None
    weights: tuple[WeightReport, ...]
    refusals: tuple[RefusalReport, ...]
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    peak_memory_bytes: int
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, under a "format" that changes when a reader would break.

        JSON knows no infinity and no NaN (an error is infinite where a reference output is all zero): they become the
        strings "Infinity", "-Infinity" and "NaN", and null stays what was not measured.
        """
        return {"format": FORMAT, **plain(asdict(self))}

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write as JSON, whole or not at all.

        Raises
        ------
        OutputError
            `path` exists without `force`, or cannot be written.
        """
        with replacing(path, force=force) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` in types that strict JSON has; see `Report.to_dict`."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value

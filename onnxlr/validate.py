"""Parity of two models on data, and their task metric, streamed: one batch in memory, whatever the size of the set.

Both models get the same feeds. Every output is compared as `onnxlr.metrics` defines it, padded tokens left out where a
mask names the real ones, and one figure is made of all outputs, that of the one which is furthest off:

    error = max over outputs of relative_l2, or of 1 - agreement        passed: error <= max_error

A half-precision reference is off by its own rounding. So it is also compared with its float32 self, on the same feeds:
the error of that is the `noise` that any error of the candidate is to be read beside. It is that of the provider at
hand: onnxruntime's CPU computes float16 models in float32 from one operator to the next and rounds less than a GPU. Of
many samples with large outputs it is that of the first, so that they can wait until the two models are out of memory.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from onnxlr.calibrate import mask_of
from onnxlr.data import numbered_batches
from onnxlr.errors import ConfigError, DataError, ModelError, OutputError
from onnxlr.metrics import OutputComparison, is_floating, relative_error, token_rows
from onnxlr.precision import float32_self, half_types, widened_feed
from onnxlr.session import Session
from onnxlr.task_metrics import MeanMetric, load_metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from onnxlr.data import Dataset, Feed, TensorSpec
    from onnxlr.metrics import Array, OutputParity
    from onnxlr.model_io import Model

    Outputs: TypeAlias = Mapping[str, Array]

KEPT = 2**28
"""Bytes of the batches that a half-precision model is compared with its float32 self on."""


@dataclass(frozen=True, slots=True)
class Validation:
    """How near a candidate is to a reference.

    Attributes
    ----------
    samples : int
        Compared.
    outputs : tuple of OutputParity
        In the order of the reference.
    error : float
        The one figure of all outputs, as `relative_error`; inf where a reference output is all zero and the other not.
    metric_name, metric_a, metric_b : str or None, float or None
        The task metric of the reference and of the candidate; None without labels.
    max_error : float or None
        The gate.
    passed : bool or None
        Whether the gate is met; None without one.
    noise : float or None
        The same figure of the reference beside its float32 self: what half precision costs by itself. None for a model
        that has no tensor in half precision, or where it cannot be measured.
    no_noise : str
        Why it cannot be; else "".
    """

    samples: int
    outputs: tuple[OutputParity, ...]
    error: float
    metric_name: str | None
    metric_a: float | None
    metric_b: float | None
    max_error: float | None
    passed: bool | None
    noise: float | None = None
    no_noise: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def validate(
    a: Model,
    b: Model,
    data: Dataset,
    *,
    batch: int = 8,
    mask: str | None = None,
    labels: Array | None = None,
    metric: str = "top1",
    provider: str = "cpu",
    threads: int = 0,
    max_error: float | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Validation:
    """Compare two models over a data set.

    Parameters
    ----------
    a, b : Model
        The reference and the candidate, with the same inputs and outputs.
    data : Dataset
        Samples for the models' inputs; all of them are used.
    batch : int
        Samples in a run, where the models' batch axis is free.
    mask : str, optional
        The input `[N, S]` that is nonzero where a token is real.
    labels : array `[n, ...]`, optional
        One for each sample of the whole data set; of a part, as from `split`, each sample keeps its own label.
    metric : str
        "top1", "top1:output" or "module:function", computed where `labels` are given.
    provider, threads
        As of `Session`.
    max_error : float, optional
        The gate.
    progress : callable
        Called with the number of samples after each batch.

    Returns
    -------
    Validation
        Whether the gate is met is for the caller to act on.

    Raises
    ------
    ConfigError
        No such metric, a metric without labels, or a gate that is negative or not finite.
    ModelError
        The models differ in an input or output, or one cannot be run.
    DataError
        No samples, as many labels as there are not samples, no such mask, outputs that are not finite.
    InstallError
        As `Session`.
    """
    if max_error is not None and not (math.isfinite(max_error) and max_error >= 0):
        raise ConfigError(f"max_error {max_error}: expected a finite number, 0 or more")
    if labels is None and metric != "top1":
        raise ConfigError(f"metric {metric!r} needs labels: give them, or leave the metric out")
    if labels is not None:
        _check_labels(data, len(labels))
    function = load_metric(metric)
    means = (MeanMetric(metric, function), MeanMetric(metric, function))
    noise = _Noise(a, provider=provider, threads=threads)
    samples = 0

    def both() -> Iterator[tuple[Feed, Outputs, Outputs]]:
        nonlocal samples
        session_a, session_b = (Session(model, provider=provider, threads=threads) for model in (a, b))
        check_same_interface(session_a, session_b)
        for indices, feed in numbered_batches(data.indexed(), batch, session_a.inputs):
            outputs = session_a.run(feed), session_b.run(feed)
            if labels is not None:
                for mean, values in zip(means, outputs, strict=True):
                    mean.update(values, labels[indices])
            noise.keep(session_a, feed, outputs[0])
            yield feed, *outputs
            samples += len(indices)
            progress(len(indices))

    parities = compare(both(), mask=mask)
    if not samples:
        raise DataError(f"{data.name}: no samples to validate on; give more data, or hold out a larger share")
    error = relative_error(parities)
    noise.measure(mask)
    return Validation(
        samples=samples,
        outputs=parities,
        error=error,
        metric_name=None if labels is None else metric,
        metric_a=means[0].value,
        metric_b=means[1].value,
        max_error=max_error,
        passed=None if max_error is None else error <= max_error,
        noise=noise.value,
        no_noise=noise.reason,
    )


def compare(runs: Iterable[tuple[Feed, Outputs, Outputs]], *, mask: str | None = None) -> tuple[OutputParity, ...]:
    """Compare outputs, wherever they come from: two sessions, stored references, a graph with free ranks.

    Parameters
    ----------
    runs : iterable of (feed, reference outputs, candidate outputs)
        Batch by batch; the names of the reference's outputs count. Read once.
    mask : str, optional
        The input of a feed that is nonzero where a token is real, `[N, S]`.

    Returns
    -------
    tuple of OutputParity
        One an output; empty where there are no runs.

    Raises
    ------
    DataError
        No such mask, or outputs that cannot be compared.
    """
    comparisons: dict[str, OutputComparison] = {}
    for feed, reference, candidate in runs:
        real = mask_of(feed, mask)
        for name, array in reference.items():
            rows = None if real is None else token_rows(real, array.shape)
            comparisons.setdefault(name, OutputComparison(name)).update(array, candidate[name], rows)
    return tuple(comparison.result() for comparison in comparisons.values())


class _Noise:
    """A half-precision model beside its float32 self, which is loaded once no other session is.

    Until then the first batches are kept, as many as `KEPT` bytes hold. That a model has no such self is no failure,
    but a reason.
    """

    def __init__(self, model: Model, *, provider: str, threads: int) -> None:
        self._model, self._provider, self._threads = model, provider, threads
        self._half = bool(half_types(model))
        self._kept: list[tuple[Feed, Outputs]] = []
        self._bytes = 0
        self.value: float | None = None
        self.reason = ""

    def keep(self, session: Session, feed: Feed, outputs: Outputs) -> None:
        """Take in a batch of the model."""
        if session.computes:
            self.reason = f"{session.provider} has no kernels for bfloat16 and computes the model in {session.computes}"
        elif self._half and self._bytes < KEPT:
            self._kept.append((feed, outputs))
            self._bytes += sum(array.nbytes for array in (*feed.values(), *outputs.values()))

    def measure(self, mask: str | None) -> None:
        """Find the value, or the reason why there is none."""
        if not self._kept:
            return
        try:
            with float32_self(self._model) as wide:
                session = Session(wide, provider=self._provider, threads=self._threads)
        except (ModelError, OutputError) as error:
            self.reason = str(error)
            return
        runs = ((feed, session.run(widened_feed(feed)), outputs) for feed, outputs in self._kept)
        try:
            self.value = relative_error(compare(runs, mask=mask))
        except (ModelError, DataError) as error:
            self.reason = f"the model's float32 self cannot be compared with it: {error}"


def check_same_interface(a: Session, b: Session) -> None:
    """Refuse two models that cannot stand in for each other.

    Names have to match, dtypes too (outputs may be floating of another width), and dims where both models fix them.

    Raises
    ------
    ModelError
        Naming the first input or output that differs.
    """
    for kind, ours, theirs in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        first, second = ({spec.name: spec for spec in specs} for specs in (ours, theirs))
        for name in (*first, *second):
            if name not in first or name not in second:
                has, lacks = ("first", "second") if name in first else ("second", "first")
                raise ModelError(
                    f"{kind} {name!r} of the {has} model is missing in the {lacks} ({a.name}, {b.name}): "
                    "only models with the same inputs and outputs can be compared"
                )
            if not _alike(first[name], second[name], widths=kind == "output"):
                raise ModelError(
                    f"{kind} {name!r} is {first[name]} in the first model, {second[name]} in the second "
                    f"({a.name}, {b.name}): only models with the same inputs and outputs can be compared"
                )


def _alike(a: TensorSpec, b: TensorSpec, *, widths: bool) -> bool:
    if a.dtype != b.dtype and not (widths and is_floating(a.dtype) and is_floating(b.dtype)):
        return False
    if not a.shape or not b.shape:
        return True  # onnxruntime gives an unknown rank as it gives a scalar
    return len(a.shape) == len(b.shape) and all(
        x == y for x, y in zip(a.shape, b.shape, strict=True) if isinstance(x, int) and isinstance(y, int)
    )


def _check_labels(data: Dataset, labels: int) -> None:
    indices = [index for index, _ in data.read()]
    whole = indices == list(range(len(indices)))
    if (len(indices) != labels) if whole else (max(indices) >= labels):
        counted = f"{len(indices)} samples" if whole else f"samples numbered up to {max(indices)}"
        raise DataError(f"{data.name}: {labels} labels for {counted}; give one a sample, in the order of the data")

"""How far a model's outputs are from a reference's, streamed: sums are kept, arrays are not.

For one output, over all values `a` of the reference and `b` of the candidate that count (`n` of them):

    relative_l2 = sqrt(sum (a - b)^2 / sum a^2)        0 for two equal zeros, inf where only the reference is zero
    cosine      = sum a b / sqrt(sum a^2 sum b^2)      1 for two zeros, 0 where only one is zero
    mean_abs    = sum |a - b| / n,   max_abs = max |a - b|

Every value is widened to fp64 before it is subtracted, in blocks, so neither fp16 nor the number of batches matters.
Two outputs that are not floating (labels, masks, text) are compared by the share of equal elements instead.

`top1_agreement`, the share of rows with the same argmax, is given where an output looks like scores: floating, rank 2
with at least 2 columns (`[N, classes]`), or rank 3 and more with at least 1000 (`[N, S, vocabulary]`).

Task metrics compare outputs with labels: a `Metric` maps the outputs and labels of one batch to the batch's mean.
"""

from __future__ import annotations

import importlib
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from onnxlr.errors import ConfigError, DataError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

Metric: TypeAlias = Callable[[Mapping[str, Array], Array], float]
"""(outputs of a batch, each `[n, ...]`; labels `[n, ...]`) -> mean over the batch; larger is better by convention."""

BLOCK = 1 << 20
"""Values widened to fp64 at a time: 8 MB an array, whatever the size of an output."""

MIN_VOCABULARY = 1000


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output of two models, over all samples streamed.

    Attributes
    ----------
    name : str
        The output's name.
    relative_l2, max_abs, mean_abs, cosine : float or None
        As in the module's docstring; None where the output is not floating or `count` is 0.
    top1_agreement : float or None
        Share of rows with the same argmax; None where the output does not look like scores.
    agreement : float or None
        Share of equal elements, of outputs that are not floating; else None.
    count : int
        Elements compared.
    """

    name: str
    relative_l2: float | None
    max_abs: float | None
    mean_abs: float | None
    cosine: float | None
    top1_agreement: float | None
    agreement: float | None
    count: int


class CandidateError(DataError):
    """The candidate's outputs are not finite where those of the reference are looked at."""


class OutputComparison:
    """Accumulates one output of a reference and a candidate, batch by batch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._floating: bool | None = None
        self._count = 0
        self._equal = 0
        self._rows = 0
        self._same_top = 0
        self._aa = self._bb = self._ab = self._dd = self._abs = self._max = 0.0

    def update(self, reference: Array, candidate: Array, rows: Array | None = None) -> None:
        """Add one batch.

        Parameters
        ----------
        reference, candidate : array, same shape `[..., features]`
            Any dtypes, either both floating (of any widths) or neither.
        rows : bool array `[prod of the leading dims]`, optional
            Which rows count, as from `token_rows`; the others are not looked at. All of them, when None.

        Raises
        ------
        DataError
            Shapes or kinds differ, `rows` does not fit, or a value that counts is not finite.
        """
        if reference.shape != candidate.shape:
            raise DataError(
                f"output {self.name!r}: the reference gives the shape {list(reference.shape)}, the candidate "
                f"{list(candidate.shape)}: only models with the same outputs can be compared; where the values decide "
                "how many there are (NonZero, NonMaxSuppression), end the graph before that"
            )
        floating = is_floating(reference.dtype)
        if is_floating(candidate.dtype) != floating or self._floating not in (None, floating):
            raise DataError(
                f"output {self.name!r}: the reference gives {reference.dtype}, the candidate {candidate.dtype}: "
                "only floating with floating outputs, or neither, can be compared"
            )
        self._floating = floating
        features = reference.shape[-1] if reference.ndim else 1
        if reference.size == 0:
            return
        a, b = reference.reshape(-1, features), candidate.reshape(-1, features)
        if rows is not None:
            if rows.shape != (len(a),):
                raise DataError(f"output {self.name!r}: {len(a)} rows, but a selection of {list(rows.shape)} of them")
            a, b = a[rows], b[rows]
        if not floating:
            self._count += a.size
            self._equal += int(np.count_nonzero(a == b))
            return
        scores = features >= 2 if reference.ndim == 2 else reference.ndim > 2 and features >= MIN_VOCABULARY
        step = max(1, BLOCK // features)
        for start in range(0, len(a), step):
            self._add(self._widen(a, start, step, "reference"), self._widen(b, start, step, "candidate"), scores)

    def result(self) -> OutputParity:
        """What has been streamed so far."""
        if not self._count or not self._floating:
            agreement = self._equal / self._count if self._count else None
            return OutputParity(self.name, None, None, None, None, None, agreement, self._count)
        norms = math.sqrt(self._aa) * math.sqrt(self._bb)
        cosine = max(-1.0, min(1.0, self._ab / norms)) if norms else float(self._aa == self._bb)
        return OutputParity(
            name=self.name,
            relative_l2=_ratio(math.sqrt(self._dd), math.sqrt(self._aa)),
            max_abs=self._max,
            mean_abs=self._abs / self._count,
            cosine=cosine,
            top1_agreement=self._same_top / self._rows if self._rows else None,
            agreement=None,
            count=self._count,
        )

    def _widen(self, rows: Array, start: int, step: int, whose: str) -> Array:
        block = rows[start : start + step].astype(np.float64)
        bad = block.size - int(np.count_nonzero(np.isfinite(block)))
        if bad:
            raise (CandidateError if whose == "candidate" else DataError)(
                f"output {self.name!r} of the {whose} model holds NaN or infinity ({bad} of {block.size} values "
                "looked at): no error can be measured on it; find the sample, or leave this output out"
            )
        return block

    def _add(self, a: Array, b: Array, scores: bool) -> None:
        self._count += a.size
        if scores:
            self._rows += len(a)
            self._same_top += int(np.count_nonzero(a.argmax(axis=-1) == b.argmax(axis=-1)))
        self._aa += float(np.vdot(a, a))
        self._bb += float(np.vdot(b, b))
        self._ab += float(np.vdot(a, b))
        difference = np.abs(a - b)
        self._dd += float(np.vdot(difference, difference))
        self._abs += float(difference.sum())
        self._max = max(self._max, float(difference.max()))


def relative_error(parities: Iterable[OutputParity]) -> float:
    """The one figure of a model: `sqrt(mean of relative_l2^2)` over its floating outputs that hold values.

    A model none of whose outputs is floating is judged by `1 - agreement` in place of relative_l2.

    Raises
    ------
    DataError
        No output holds a value: nothing was compared, which is no sign of parity.
    """
    counted = [parity for parity in parities if parity.count]
    errors = [parity.relative_l2 for parity in counted if parity.relative_l2 is not None]
    errors = errors or [1.0 - parity.agreement for parity in counted if parity.agreement is not None]
    if not errors:
        raise DataError("no output holds a value: there is nothing to compare; check the data and the padding mask")
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is floating, those of ml_dtypes (bfloat16, float8) included: numpy takes them for void."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def token_rows(mask: Array, shape: tuple[int, ...]) -> Array | None:
    """Which rows of a tensor belong to real tokens and not to padding.

    Parameters
    ----------
    mask : array `[N, S]`
        Nonzero where a token is real.
    shape : tuple of int
        The tensor's, features last; its leading dims count rows.

    Returns
    -------
    bool array `[prod(shape[:-1])]`, or None
        For leading dims `(N, S, ...)`, `(N, ..., S)` (the first where both fit) and `(N S,)`. None for any other:
        its rows are no tokens, such as those of a pooled output.

    Raises
    ------
    DataError
        The mask is not of rank 2.
    """
    if mask.ndim != 2:
        raise DataError(f"the padding mask has the shape {list(mask.shape)}: expected [samples, tokens]")
    real = mask != 0
    samples, tokens = real.shape
    leading = shape[:-1]
    if len(leading) >= 2 and leading[0] == samples:
        for axis in (1, len(leading) - 1):
            if leading[axis] == tokens:
                spread = [1] * len(leading)
                spread[0], spread[axis] = samples, tokens
                return np.broadcast_to(real.reshape(spread), leading).reshape(-1)
    return real.reshape(-1) if leading == (samples * tokens,) else None


def top1(outputs: Mapping[str, Array], labels: Array) -> float:
    """Share of samples whose highest score is at the label.

    Parameters
    ----------
    outputs : mapping of str to array
        The first floating output `[n, classes]` with at least 2 classes is taken.
    labels : integer array `[n]`
        The right classes, from 0.

    Raises
    ------
    DataError
        No output of such a shape, or labels that are not classes of it.
    """
    count = len(labels)
    found = [(name, array) for name, array in outputs.items() if _class_scores(array, count)]
    if not found:
        shapes = ", ".join(f"{name!r} {array.dtype} {list(array.shape)}" for name, array in outputs.items())
        raise DataError(
            f"top1 needs a floating output [{count}, classes] with 2 classes or more, the model gives {shapes}: "
            "pass a metric of your own as module:function"
        )
    name, scores = found[0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"top1 needs one integer label a sample, got {labels.dtype} labels {list(labels.shape)}")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise DataError(
            f"labels from {labels.min()} to {labels.max()} are not classes of output {name!r}, which has "
            f"{scores.shape[1]} (0 to {scores.shape[1] - 1}): do they count from 1, or belong to another model?"
        )
    return float(np.mean(scores.astype(np.float64).argmax(axis=-1) == labels))


def load_metric(spec: str) -> Metric:
    """The metric of that name: "top1", or "module:function".

    Raises
    ------
    ConfigError
        As of `load_function`.
    """
    metric: Metric = load_function("metric", spec, {"top1": top1})
    return metric


def load_function(kind: str, spec: str, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """One of the `known` functions, or "module:function", imported with the current folder on the path.

    Parameters
    ----------
    kind
        What it is, for messages.
    spec
        Its name.
    known
        What has a name of its own.

    Raises
    ------
    ConfigError
        The spec is neither, or names nothing that can be called.
    """
    if spec in known:
        return known[spec]
    module_name, separator, function_name = spec.partition(":")
    if not (module_name and separator and function_name):
        raise ConfigError(f"unknown {kind} {spec!r}: give {', '.join(map(repr, known))} or 'module:function'")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
        function = operator.attrgetter(function_name)(module)
    except AttributeError:
        raise ConfigError(f"{kind} {spec!r}: the module {module_name} has no {function_name!r}") from None
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"{kind} {spec!r}: {module_name} cannot be imported: {one_line(error)}") from error
    finally:
        sys.path.remove(folder)
    if not callable(function):
        raise ConfigError(f"{kind} {spec!r}: {function_name} is a {type(function).__name__}, expected a function")
    return function  # type: ignore[no-any-return]


class MeanMetric:
    """A task metric over a whole set: the mean of its batches, weighted by their sizes."""

    def __init__(self, name: str, function: Metric) -> None:
        self.name = name
        self._function = function
        self._sum = 0.0
        self._count = 0

    def update(self, outputs: Mapping[str, Array], labels: Array) -> None:
        """Add one batch.

        Raises
        ------
        DataError
            The metric fails, or gives something that is not a finite number.
        """
        try:
            value = self._function(outputs, labels)
        except DataError:
            raise
        except Exception as error:  # whatever the user's function raises
            raise DataError(f"metric {self.name!r} fails on a batch: {one_line(error)}") from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"metric {self.name!r} gives {value!r}: expected one finite number, the batch's mean")
        self._sum += number * len(labels)
        self._count += len(labels)

    @property
    def value(self) -> float | None:
        """The mean so far; None before the first sample."""
        return self._sum / self._count if self._count else None


def _class_scores(array: Array, count: int) -> bool:
    return array.ndim == 2 and is_floating(array.dtype) and array.shape[0] == count and array.shape[1] >= 2


def _ratio(difference: float, reference: float) -> float:
    return difference / reference if reference else (math.inf if difference else 0.0)


def one_line(error: Exception) -> str:
    """What an error of somebody else's code says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}" if str(error).strip() else type(error).__name__

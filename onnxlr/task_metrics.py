"""How good a model's outputs are at its task: a `Metric` maps the outputs and labels of one batch to their mean."""

from __future__ import annotations

import importlib
import math
import operator
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from onnxlr.errors import ConfigError, DataError, one_line
from onnxlr.metrics import Array, is_floating

TOP1 = "top1"

Metric: TypeAlias = Callable[[Mapping[str, Array], Array], float]
"""(outputs of a batch, each `[n, ...]`; labels `[n, ...]`) -> mean over the batch; larger is better by convention."""


def top1(outputs: Mapping[str, Array], labels: Array, *, output: str = "") -> float:
    """Share of samples whose highest score is at the label.

    Parameters
    ----------
    outputs : mapping of str to array
        One of them holds the scores: floating, `[n, classes]`, with at least 2 classes.
    labels : integer array `[n]`
        The right classes, from 0.
    output
        Its name, where others look like it.

    Raises
    ------
    DataError
        No output of such a shape or several, or labels that are not classes of it.
    """
    count = len(labels)
    found = [name for name, array in outputs.items() if _class_scores(array, count) and output in ("", name)]
    if len(found) != 1:
        shapes = ", ".join(f"{name!r} {array.dtype} {list(array.shape)}" for name, array in outputs.items())
        remedy = f"name the right one: --metric {TOP1}:{found[0]}" if found else "pass one of your own: module:function"
        raise DataError(
            f"{TOP1} needs one floating output [{count}, classes] with 2 classes or more, the model gives {shapes}: "
            f"{remedy}"
        )
    (name,), scores = found, outputs[found[0]]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"top1 needs one integer label a sample, got {labels.dtype} labels {list(labels.shape)}")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise DataError(
            f"labels from {labels.min()} to {labels.max()} are not classes of output {name!r}, which has "
            f"{scores.shape[1]} (0 to {scores.shape[1] - 1}): do they count from 1, or belong to another model?"
        )
    return float(np.mean(scores.astype(np.float64).argmax(axis=-1) == labels))


def load_metric(spec: str) -> Metric:
    """The metric of that name: "top1", "top1:output", or "module:function".

    Raises
    ------
    ConfigError
        As of `load_function`.
    """
    if spec.startswith(f"{TOP1}:"):
        return partial(top1, output=spec.removeprefix(f"{TOP1}:"))
    metric: Metric = load_function("metric", spec, {TOP1: top1})
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

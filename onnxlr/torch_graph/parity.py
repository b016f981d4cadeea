"""Does torch compute what onnxruntime computes? Checked before any gradient is trusted.

The error of a tensor is `||torch - onnxruntime|| / ||onnxruntime||` over its finite values; values smaller than 1e-4 in
the root mean square count as that large (onnxruntime's sigmoid is off by 1e-8, which shows where nothing is detected).
For integers and booleans it is the share of elements that differ.

Where an output is off, every tensor of the graph is compared, in the order of the
nodes, and the first one that differs is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onnxlr.calibrate import with_outputs
from onnxlr.errors import DataError, ModelError
from onnxlr.session import Session
from onnxlr.torch_graph.precision import float32_products
from onnxlr.torch_graph.tensors import to_array, to_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnxlr.data import Feed
    from onnxlr.model_io import Model
    from onnxlr.torch_graph.module import TorchGraph


_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ZERO = 1e-4
"""The root mean square below which values count as zeros."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How far torch is from onnxruntime.

    Attributes
    ----------
    errors
        Per output the largest relative error over the feeds.
    feeds
        How many were compared.
    tolerance
        What was allowed.
    """

    errors: dict[str, float]
    feeds: int
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)


def relative_error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Distance of two arrays, relative to the second; infinite where shapes, NaNs or infinities differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    if expected.dtype.kind in "biu":
        return float(np.mean(found != expected))
    a, b = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(finite, np.isfinite(a)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    distance, norm = np.linalg.norm(a[finite] - b[finite]), np.linalg.norm(b[finite])
    return float(distance / max(norm, _ZERO * np.sqrt(finite.sum())))


@float32_products()
def check_parity(
    graph: TorchGraph,
    model: Model,
    feeds: Iterable[Feed],
    tolerance: float | None = None,
) -> Parity:
    """Compare a graph with onnxruntime on feeds.

    Parameters
    ----------
    graph, model
        The module and the model it was built from.
    feeds
        Arrays by input name; at least one.
    tolerance
        The largest relative error allowed, of any output and feed; when None 1e-4, or what the shortest type of the
        graph's weights is good for: 1e-2 for float16, 5e-2 for bfloat16.

    Raises
    ------
    ModelError
        An output is off: with the name of the first tensor that is. Or one of the two fails.
    DataError
        There are no feeds.
    """
    session = Session(model)
    if tolerance is None:
        tolerance = max((_TOLERANCES.get(parameter.dtype, 0.0) for parameter in graph.parameters()), default=0.0)
        tolerance = max(tolerance, 1e-4)
    errors = dict.fromkeys(graph.outputs, 0.0)
    count = 0
    for feed in feeds:
        expected = session.run(feed, list(graph.outputs))
        found = _run(graph, feed, graph.outputs)
        count += 1
        for name, array in expected.items():
            errors[name] = max(errors[name], relative_error(found[name], array))
        if not max(errors.values(), default=0.0) <= tolerance:
            raise ModelError(_diagnosis(graph, model, feed, errors, tolerance))
    if not count:
        raise DataError("parity with onnxruntime cannot be checked without data")
    return Parity(errors, count, tolerance)


def _run(graph: TorchGraph, feed: Feed, names: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
    device = next((parameter.device for parameter in graph.parameters()), torch.device("cpu"))
    with torch.no_grad():
        found = graph({name: to_tensor(array, device) for name, array in feed.items()}, outputs=list(names))
    return {name: to_array(tensor) for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def _diagnosis(graph: TorchGraph, model: Model, feed: Feed, errors: dict[str, float], tolerance: float) -> str:
    """The message that names the first tensor to differ."""
    output = max(errors, key=lambda name: errors[name])
    text = (
        f"torch and onnxruntime disagree on output {output!r}: relative error {errors[output]:.1e}, "
        f"allowed {tolerance:.1e}"
    )
    names = graph.tensor_names()
    # unoptimized, or the tensors of fused nodes would still be computed apart and differ from what ran
    expected = Session(with_outputs(model, names), optimize=False).run(feed, names)
    found = _run(graph, feed, names)
    for name in names:
        if (
            isinstance(expected[name], np.ndarray)
            and (error := relative_error(found[name], expected[name])) > tolerance
        ):
            return f"{text}. The first tensor to differ is {name!r} ({error:.1e}), made by {graph.node_of(name)}"
    return f"{text}. No inner tensor differs once onnxruntime's graph optimizations are off: they are what differs"

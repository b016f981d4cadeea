"""Trying many ranks on one graph.

Every weight that takes part becomes a pair whose factors are inputs of the graph, of a rank that is free. One session
then runs any plan: dense weights are fed as `W I`. That makes the search for a target cheap (no rewriting, no loading),
and it measures what each weight's cut does to the model's output, one weight at a time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxlr.data import batches, sample_count
from onnxlr.errors import RangeError
from onnxlr.forms import Stored
from onnxlr.metrics import MeanMetric, load_metric, relative_error
from onnxlr.rewrite import emit, lay_out
from onnxlr.session import Session
from onnxlr.validate import compare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnxlr.config import Config
    from onnxlr.data import Feed, Sample, TensorSpec
    from onnxlr.factorize import Factors
    from onnxlr.model_io import Model
    from onnxlr.rewrite import SiteArrays
    from onnxlr.sites import Inventory, Weight

    Outputs = Mapping[str, NDArray[Any]]
    Observed = Sequence[tuple[Feed, Outputs, NDArray[Any] | None]]
    """By batch: what the dense model was fed, what it gave, and the labels."""


class Trial:
    """A model with free ranks, compared with itself on samples that are observed first and stay in memory.

    Parameters
    ----------
    inventory
        The model.
    weights
        Those whose rank is to be tried.
    inputs
        The model's inputs.
    config
        Batch size, mask, metric, provider and threads are used.
    corrected
        Whether the factors to come carry a bias.

    Raises
    ------
    ModelError, InstallError, DataError
        As for calibration.
    """

    def __init__(
        self,
        inventory: Inventory,
        weights: Sequence[Weight],
        inputs: Sequence[TensorSpec],
        config: Config,
        *,
        corrected: bool,
    ) -> None:
        self._inventory, self._weights, self._inputs = inventory, weights, inputs
        self._batch, self._mask, self._metric = config.batch, config.mask, config.metric
        self._corrected = corrected
        self._reference = Session(inventory.model, provider=config.provider, threads=config.threads)
        dense = {w.name: lay_out(inventory, w, _dense(inventory.matrix(w), corrected)) for w in weights}
        free = self._with_free_ranks([arrays for layouts in dense.values() for arrays in layouts])
        self._session = Session(free, provider=config.provider, threads=config.threads)
        self._dense = {name: _named(layouts) for name, layouts in dense.items()}

    def _with_free_ranks(self, layouts: Sequence[SiteArrays]) -> Model:
        free: dict[str, NDArray[Any]] = {}

        def make(name: str, array: NDArray[Any]) -> gs.Tensor:
            free[name] = array
            return gs.Variable(name, dtype=array.dtype)

        model = emit(self._inventory, layouts, make)
        for name, array in free.items():
            element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            axes = [f"{name}.{axis}" for axis in range(array.ndim)]
            model.proto.graph.input.append(onnx.helper.make_tensor_value_info(name, element, axes))
        return model

    def observe(self, samples: Iterable[Sample], labels: NDArray[Any] | None = None) -> Observed:
        """Run the dense model on `samples`, to compare plans with; `labels`, one a sample, are for `metric`."""
        observed = []
        first = 0
        for feed in batches(samples, self._batch, self._inputs):
            rows = sample_count(feed, self._inputs)
            own = None if labels is None else labels[first : first + rows]
            observed.append((feed, self._reference.run(feed), own))
            first += rows
        return observed

    def _outputs(self, factors: Mapping[str, Factors], observed: Observed) -> Iterator[Outputs]:
        arrays: dict[str, NDArray[Any]] = {}
        for weight in self._weights:
            cut = factors.get(weight.name)
            if cut is None:
                arrays |= self._dense[weight.name]
            else:
                bias = np.zeros(weight.groups * weight.d_out) if self._corrected and cut.bias is None else cut.bias
                arrays |= _named(lay_out(self._inventory, weight, Stored(cut.first, cut.second, bias)))
        for feed, _, _ in observed:
            yield self._session.run({**feed, **arrays})

    def error(self, factors: Mapping[str, Factors], observed: Observed) -> float:
        """The relative error of the outputs with the weights in `factors` cut and all others dense.

        Infinite where the model's element type cannot hold a factor.
        """
        runs = (
            (feed, reference, candidate)
            for (feed, reference, _), candidate in zip(observed, self._outputs(factors, observed), strict=True)
        )
        try:
            return relative_error(compare(runs, mask=self._mask))
        except RangeError:
            return math.inf

    def metric(self, factors: Mapping[str, Factors], observed: Observed) -> float:
        """The task metric with the weights in `factors` cut, on samples observed with their labels."""
        mean = MeanMetric(self._metric, load_metric(self._metric))
        for (_, _, labels), candidate in zip(observed, self._outputs(factors, observed), strict=True):
            assert labels is not None
            mean.update(candidate, labels)
        assert mean.value is not None
        return mean.value


def _named(layouts: Iterable[SiteArrays]) -> dict[str, NDArray[Any]]:
    return dict(pair for arrays in layouts for pair in (arrays.first, arrays.second, arrays.bias) if pair is not None)


def _dense(matrix: NDArray[np.float64], corrected: bool) -> Stored:
    *groups, d_in, d_out = matrix.shape
    bias = np.zeros(math.prod(groups) * d_out) if corrected else None
    same = np.broadcast_to(np.eye(min(d_in, d_out)), (*groups, min(d_in, d_out), min(d_in, d_out)))
    return Stored(matrix, same, bias) if d_out <= d_in else Stored(same, matrix, bias)

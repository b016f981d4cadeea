"""Trying many ranks on one graph.

Every weight that takes part becomes a pair whose factors are inputs of the graph, of a rank that is free. One session
then runs any plan: dense weights are fed as `W I`. That makes the search for a target cheap (no rewriting, no loading),
and it measures what each weight's cut does to the model's output, one weight at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxlr.data import batches, has_batch_axis
from onnxlr.factorize import Factors
from onnxlr.metrics import MeanMetric, load_metric, relative_error
from onnxlr.rewrite import emit, lay_out
from onnxlr.session import Session
from onnxlr.validate import compare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnxlr.config import Config
    from onnxlr.data import Feed, Sample, TensorSpec
    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory, Weight

    Outputs = Mapping[str, NDArray[Any]]


class Trial:
    """A model with free ranks, compared with itself on a fixed set of samples.

    Parameters
    ----------
    inventory
        The model.
    weights
        Those whose rank is to be tried.
    samples
        Held-out samples; they and the dense model's outputs on them stay in memory.
    inputs
        The model's inputs.
    config
        Batch size, mask, metric, provider and threads are used.
    corrected
        Whether the factors to come carry a bias.
    labels
        One a sample, for `metric`.

    Raises
    ------
    ModelError, InstallError, DataError
        As for calibration.
    """

    def __init__(
        self,
        inventory: Inventory,
        weights: Sequence[Weight],
        samples: Iterable[Sample],
        inputs: Sequence[TensorSpec],
        config: Config,
        *,
        corrected: bool,
        labels: NDArray[Any] | None = None,
    ) -> None:
        self._inventory, self._weights, self._inputs = inventory, weights, inputs
        self._mask, self._labels, self._metric = config.mask, labels, config.metric
        run = Session(inventory.model, provider=config.provider, threads=config.threads).run
        self._feeds: list[Feed] = list(batches(samples, config.batch, inputs))
        self._references = [run(feed) for feed in self._feeds]
        self._dense = {weight.name: _dense(inventory.matrix(weight), corrected) for weight in weights}
        self._session = Session(self._with_free_ranks(), provider=config.provider, threads=config.threads)
        self._dense_arrays = {weight.name: self._arrays(weight, self._dense[weight.name]) for weight in weights}

    def _with_free_ranks(self) -> Model:
        layouts = [arrays for w in self._weights for arrays in lay_out(self._inventory, w, self._dense[w.name])]
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

    def _arrays(self, weight: Weight, factors: Factors) -> dict[str, NDArray[Any]]:
        layouts = lay_out(self._inventory, weight, factors)
        named = [pair for arrays in layouts for pair in (arrays.first, arrays.second, arrays.bias) if pair is not None]
        return dict(named)

    def outputs(
        self, factors: Mapping[str, Factors], samples: int | None = None
    ) -> Iterator[tuple[Feed, Outputs, Outputs]]:
        """(feed, dense outputs, outputs with the weights in `factors` cut), batch by batch.

        `samples` ends it after the batch that completes so many.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for weight in self._weights:
            cut = weight.name in factors
            arrays |= self._arrays(weight, factors[weight.name]) if cut else self._dense_arrays[weight.name]
        done = 0
        for feed, reference in zip(self._feeds, self._references, strict=True):
            if samples is not None and done >= samples:
                return
            yield feed, reference, self._session.run({**feed, **arrays})
            done += self._rows(feed)

    def error(self, factors: Mapping[str, Factors], samples: int | None = None) -> float:
        """The relative error of the outputs with the weights in `factors` cut and all others dense."""
        return relative_error(compare(self.outputs(factors, samples), mask=self._mask))

    def metric(self, factors: Mapping[str, Factors]) -> float:
        """The task metric with the weights in `factors` cut, on the labels given."""
        assert self._labels is not None
        mean, done = MeanMetric(self._metric, load_metric(self._metric)), 0
        for feed, _, candidate in self.outputs(factors):
            rows = self._rows(feed)
            mean.update(candidate, self._labels[done : done + rows])
            done += rows
        assert mean.value is not None
        return mean.value

    def _rows(self, feed: Feed) -> int:
        return len(feed[self._inputs[0].name]) if has_batch_axis(self._inputs) else 1


def _dense(matrix: NDArray[np.float64], corrected: bool) -> Factors:
    d_in, d_out = matrix.shape
    bias = np.zeros(d_out) if corrected else None
    return Factors(matrix, np.eye(d_out), bias) if d_out <= d_in else Factors(np.eye(d_in), matrix, bias)

"""Trying many ranks on one graph.

Every operator whose weight takes part goes into an If: one branch is the operator as it is, the other a pair whose
factors are inputs of the graph, of a rank that is free. One session then runs any plan, and nothing but what the plan
takes. That makes the search for a target cheap (no rewriting, no loading), and it measures what each weight's cut does
to the model's output, one weight at a time, at half the price of the dense model: a run begins where something is cut
(`onnxlr.entrances`).
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxlr.data import numbered_batches
from onnxlr.entrances import Entrances, part
from onnxlr.errors import RangeError
from onnxlr.forms import Stored
from onnxlr.metrics import CandidateError, relative_error
from onnxlr.precision import half_types
from onnxlr.rewrite import emit, lay_out, put_in_place
from onnxlr.session import Session
from onnxlr.task_metrics import MeanMetric, load_metric
from onnxlr.validate import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnxlr.config import Config
    from onnxlr.data import Feed, Sample, TensorSpec
    from onnxlr.factors import Factors
    from onnxlr.model_io import Model
    from onnxlr.rewrite import SiteArrays
    from onnxlr.sites import Inventory, Site, Weight
    from onnxlr.sites.emit import Parts

    Outputs = Mapping[str, NDArray[Any]]
    Observed = Sequence[tuple[Feed, Outputs, NDArray[Any] | None]]
    """By batch: what the dense model was fed, what it gave, and the labels."""

ENTRANCES, WEIGHTS_EACH = 8, 8
"""At how many tensors a run may begin, and the least number of weights for each, or it is not worth loading."""


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
        self._switches = {site.output: f"{weight.name}.lr_cut" for weight in weights for site in weight.sites}
        pairs = {weight.name: lay_out(inventory, weight, _no_pair(weight, corrected)) for weight in weights}
        self._free = self._with_free_ranks([arrays for layouts in pairs.values() for arrays in layouts])
        self._provider, self._threads = config.provider, config.threads
        self._open: tuple[str | None, Session] | None = None
        # bfloat16 may run as float32, and then is no tensor that the model takes
        most = 0 if "bfloat16" in half_types(inventory.model) else min(ENTRANCES, len(weights) // WEIGHTS_EACH)
        self._entrances = Entrances(inventory.model.proto.graph, most)
        self._entered: Observed | None = None
        self._inside: list[Outputs] = []
        self._outputs_of = {weight.name: [site.output for site in weight.sites] for weight in weights}
        self._dense = {name: _named(layouts) for name, layouts in pairs.items()}

    @property
    def _session(self) -> Session:
        return self._opened(None, lambda: self._free)

    def _opened(self, entrance: str | None, make: Callable[[], Model]) -> Session:
        """The session of the model behind an entrance; one at a time is in memory."""
        if self._open is None or self._open[0] != entrance:
            self._open = None
            self._open = entrance, Session(make(), provider=self._provider, threads=self._threads)
        return self._open[1]

    def rest(self) -> None:
        """Give back the memory that running takes; whoever goes on trying takes it again."""
        self._open = None

    def _with_free_ranks(self, layouts: Sequence[SiteArrays]) -> Model:
        free: dict[str, NDArray[Any]] = {}

        def make(name: str, array: NDArray[Any]) -> gs.Tensor:
            free[name] = array
            return gs.Variable(name, dtype=array.dtype)

        model = emit(self._inventory, layouts, make, put=self._put)
        # before, a weight that only bodies read had to be an input of the graph
        model.proto.ir_version = max(4, model.proto.ir_version)
        inputs = model.proto.graph.input
        for name, array in free.items():
            element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            axes = [f"{name}.{axis}" for axis in range(array.ndim)]
            inputs.append(onnx.helper.make_tensor_value_info(name, element, axes))
        for name in dict.fromkeys(self._switches.values()):
            inputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []))
        return model

    def _put(self, graph: gs.Graph, site: Site, node: gs.Node, parts: Parts) -> None:
        """`node` and the pair of `parts` as the two branches of an If, which gives out what the node did."""
        outputs = list(node.outputs)
        dense, pair = ([_named_after(output, branch) for output in outputs] for branch in ("dense", "pair"))
        as_it_is = gs.Node(node.op, node.name, dict(node.attrs), list(node.inputs), dense, domain=node.domain)
        node.outputs = pair
        graph.nodes.remove(node)
        cut, whole = (
            gs.Graph([own], outputs=[tensor for tensor in own.outputs if tensor.name], name=f"{site.output}/{branch}")
            for own, branch in ((node, "pair"), (as_it_is, "dense"))
        )
        put_in_place(cut, site, node, parts)
        condition = gs.Variable(self._switches[site.output], dtype=np.bool_)
        branches = {"then_branch": cut, "else_branch": whole}
        chosen = [tensor for tensor in outputs if tensor.name]
        graph.nodes.append(gs.Node("If", f"{site.output}/choice", branches, [condition], chosen))

    def observe(
        self, samples: Iterable[Sample], labels: NDArray[Any] | None = None, *, inside: bool = False
    ) -> Observed:
        """Run the dense model on `samples`, to compare plans with; `labels`, one a sample, are for `metric`.

        With `inside` what it computes at some places is kept too, of these samples alone: later runs over them begin
        there.
        """
        observed = []
        for numbers, feed in numbered_batches(enumerate(samples), self._batch, self._inputs):
            own = None if labels is None else labels[numbers]
            observed.append((feed, self._session.run({**feed, **self._given({})}), own))
        if inside and self._entrances.tensors:
            self._entered, self._inside = observed, self._made_inside(observed)
        return observed

    def _given(self, factors: Mapping[str, Factors]) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        for weight in self._weights:
            cut = factors.get(weight.name)
            arrays[f"{weight.name}.lr_cut"] = np.array(cut is not None)
            if cut is None:
                arrays |= self._dense[weight.name]
            else:
                corrected = self._corrected and weight.corrected
                bias = np.zeros(weight.groups * weight.d_out) if corrected and cut.bias is None else cut.bias
                arrays |= _named(lay_out(self._inventory, weight, Stored(cut.first, cut.second, bias)))
        return arrays

    def _outputs(self, factors: Mapping[str, Factors], observed: Observed) -> Iterator[Outputs]:
        arrays = self._given(factors)
        cut = (output for name in factors for output in self._outputs_of[name])
        entrance = self._entrances.before(cut) if observed is self._entered else None
        if entrance is None:
            for feed, _, _ in observed:
                yield self._session.run({**feed, **arrays})
            return
        outputs = [value.name for value in self._free.proto.graph.output]
        values = [made[entrance] for made in self._inside]
        session = self._opened(entrance, lambda: part(self._free, outputs, entrance, values))
        wanted = {spec.name for spec in session.inputs}
        for (feed, _, _), value in zip(observed, values, strict=True):
            given = {**feed, **arrays, entrance: value}
            yield session.run({name: array for name, array in given.items() if name in wanted})

    def _made_inside(self, observed: Observed) -> list[Outputs]:
        """What the dense model makes of the entrances, by batch."""
        self._open = None
        model = part(self._inventory.model, self._entrances.tensors)
        session = Session(model, provider=self._provider, threads=self._threads)
        wanted = {spec.name for spec in session.inputs}
        return [session.run({name: feed[name] for name in wanted}) for feed, _, _ in observed]

    def error(self, factors: Mapping[str, Factors], observed: Observed, *, floating: bool = True) -> float:
        """The relative error of the outputs with the weights in `factors` cut and all others dense.

        As of `relative_error`; what is predicted from it has to change with every rank, so that of floating outputs.

        Infinite where the model's element type cannot hold a factor, or an output is not finite then.
        """
        runs = (
            (feed, reference, candidate)
            for (feed, reference, _), candidate in zip(observed, self._outputs(factors, observed), strict=True)
        )
        try:
            return relative_error(compare(runs, mask=self._mask), floating=floating)
        except (RangeError, CandidateError):
            return inf

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


def _named_after(output: gs.Tensor, branch: str) -> gs.Tensor:
    return gs.Variable(f"{output.name}/{branch}", dtype=output.dtype) if output.name else output


def _no_pair(weight: Weight, corrected: bool) -> Stored:
    """The least to feed for a pair that is not run; its bias counts where an Add behind the operator reads it."""
    groups = (weight.groups,) if weight.groups > 1 else ()
    bias = np.zeros(weight.groups * weight.d_out) if corrected and weight.corrected else None
    return Stored(np.zeros((*groups, weight.d_in, 1)), np.zeros((*groups, 1, weight.d_out)), bias)

"""Moments that the graph computes itself, where the model runs in a memory of its own: a GPU.

There every activation that comes out is copied to the host, and adding up its products there takes longer than the
model does. So the model gets a few more nodes for every tensor whose rows `x [n, d]` matter, as `onnxlr.running` has
it, of the standard operators:

    z     = x - shift         rows of padding set to 0; `shift` is the mean of the first batch
    sum z, n                  come out of every run: [d + 1] numbers, which tell at once where something is not finite
    gram += z^T z             [d, d] in float64, which stays there, is overwritten in place, and is fetched once

Products and sums are in float32 (in float64 where the rows are). Where the first batch has more than `PIECE` rows they
are cut into pieces of at most so many, of one length, with rows of 0 behind the last, whose products are added up in
float64: some twenty nodes more, which a GPU takes longer to start than to compute.

The first batch comes out as activations, as without a GPU. It tells the shift, and the number of axes and the dtype of
every tensor, which a graph need not say. What goes on coming out after it are the patches of convolutions, tensors in
bodies of If, Loop and Scan, those that had no rows in the first batch or none that single precision can square, and all
of them where they are watched (`--rows auto`), where the model takes strings, or is older than opset `SINCE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxlr.errors import DataError
from onnxlr.liveness import keep_only
from onnxlr.model_io import from_proto
from onnxlr.probes import probe_key
from onnxlr.protos import opset_of
from onnxlr.running import PIECE
from onnxlr.session import Session
from onnxlr.sums import not_finite

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from onnxlr.config import Config
    from onnxlr.data import Feed, TensorSpec
    from onnxlr.model_io import Model
    from onnxlr.probes import Probe
    from onnxlr.rows import Rows
    from onnxlr.running import RunningMoments

SINCE = 10
"""The opset from which Slice takes its ends as inputs."""
AXES_AS_INPUT = 13
"""The opset from which ReduceSum takes its axes as an input."""
SUMS = "onnxlr.sums"


def gram_bytes(dim: int) -> int:
    """What the moments of rows of width `dim` take on the device."""
    return 8 * dim * dim


def taken(
    model: Model,
    inputs: Iterable[TensorSpec],
    wanted: Iterable[Probe],
    inner: Container[str],
    sums: Mapping[Probe, RunningMoments],
) -> list[Probe]:
    """Those of `wanted` that the graph can add up, after a first batch that is in `sums`."""
    if opset_of(model.proto) < SINCE or any(spec.dtype == object for spec in inputs):
        return []
    return [
        (tensor, rows)
        for tensor, rows in wanted
        if tensor not in inner and rows.patches is None and sums[tensor, rows].single
    ]


class InGraph:
    """A model that adds up moments while it runs.

    Parameters
    ----------
    model
        What has the tensors of `probes`, and all of `outputs` among its outputs.
    probes
        What to add up, as from `taken`.
    axes
        The number of axes of each of their tensors, by name.
    sums
        Their moments so far; `finish` adds to them.
    outputs
        What else is to come out of every run.
    config
        Of it `mask` and `threads` are used.
    provider
        As of `Session`.

    Raises
    ------
    ModelError, InstallError
        From onnxruntime.
    """

    def __init__(
        self,
        model: Model,
        probes: Sequence[Probe],
        axes: Mapping[str, int],
        sums: Mapping[Probe, RunningMoments],
        outputs: Sequence[str],
        config: Config,
        *,
        provider: str,
    ) -> None:
        self._sums = {probe: sums[probe] for probe in probes}
        self._totals = {probe: np.zeros(running.dim + 1) for probe, running in self._sums.items()}
        extended = with_moments(model, self._sums, axes, outputs, config.mask)
        self._session = Session(extended, provider=provider, threads=config.threads, streaming=True)
        self._grams = {
            probe: self._session.placed(np.zeros((running.dim, running.dim))) for probe, running in self._sums.items()
        }
        self._kept = {_gram_names(probe): gram for probe, gram in self._grams.items()}

    def run(self, feed: Feed, outputs: Sequence[str], first: int) -> dict[str, NDArray[Any]]:
        """Add the rows of one batch, which begins with sample `first`, and give its tensors `outputs`.

        Raises
        ------
        DataError
            A row is not finite.
        ModelError
            The model fails on this feed.
        """
        found = self._session.run_in_place(feed, [*outputs, SUMS], self._kept)
        start, added = 0, found.pop(SUMS)
        for (tensor, _), total in self._totals.items():
            own = added[start : start + len(total)]
            if not np.isfinite(own).all():
                raise not_finite(tensor, first)
            total += own
            start += len(total)
        return found

    def finish(self) -> None:
        """Fetch what has been added up, one tensor at a time, and give back the memory.

        Raises
        ------
        DataError
            A square left the range of float32.
        """
        self._kept.clear()
        for probe, running in self._sums.items():
            total, gram = self._totals[probe], self._grams.pop(probe)  # what it gives to numpy may be its own memory
            try:
                running.merge(int(total[-1]), total[:-1], gram.numpy())
            except FloatingPointError:
                raise DataError(
                    f"tensor {probe[0]!r} holds values whose squares leave the range of float32: gather the moments "
                    "with --provider cpu, which squares them in float64"
                ) from None


def with_moments(
    model: Model,
    sums: Mapping[Probe, RunningMoments],
    axes: Mapping[str, int],
    outputs: Sequence[str],
    mask: str | None,
) -> Model:
    """A copy of `model` that gives `outputs`, and the moments of `sums` as `InGraph` takes them."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph, parts = proto.graph, []
    nodes = _Nodes(graph, opset_of(model.proto))
    given = [value for value in graph.output if value.name in outputs]
    for probe, running in sums.items():
        before, after = _gram_names(probe)
        value = helper.make_tensor_value_info(before, TensorProto.DOUBLE, [running.dim] * 2)
        graph.input.append(value)
        given.append(helper.make_tensor_value_info(after, TensorProto.DOUBLE, [running.dim] * 2))
        part, product = _moments(nodes, probe, axes[probe[0]], running, mask)
        parts.append(part)
        nodes.add("Add", before, product, name=after)
    nodes.add("Concat", nodes.constant(np.zeros(0)), *parts, name=SUMS, axis=0)
    keep_only(graph, [*given, helper.make_tensor_value_info(SUMS, TensorProto.DOUBLE, None)])
    return from_proto(proto, model.folder)


def _gram_names(probe: Probe) -> tuple[str, str]:
    return f"{probe_key(probe)}:gram", f"{probe_key(probe)}:gram/added"


@dataclass(slots=True)
class _Nodes:
    """Nodes at the end of a graph, which are called by what they make."""

    graph: onnx.GraphProto
    opset: int
    count: int = 0

    def add(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """The output of a new node."""
        self.count += 1
        name = name or f"onnxlr.moments/{self.count}"
        self.graph.node.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, values: Any) -> str:
        return self.add("Constant", value=numpy_helper.from_array(np.asarray(values)))

    def cast(self, tensor: str, element: int) -> str:
        return self.add("Cast", tensor, to=element)

    def lengths(self, tensor: str, *axes: int) -> str:
        """The lengths of some axes, as a vector."""
        return self.add("Gather", self.add("Shape", tensor), self.constant(np.array(axes, np.int64)))

    def sum(self, tensor: str, *axes: int) -> str:
        if self.opset < AXES_AS_INPUT:
            return self.add("ReduceSum", tensor, axes=axes, keepdims=0)
        return self.add("ReduceSum", tensor, self.constant(axes), keepdims=0)

    def whole(self, op: str, a: str, b: str | int) -> str:
        """Arithmetic of vectors of integers."""
        return self.add(op, a, b if isinstance(b, str) else self.constant([b]))


def _moments(nodes: _Nodes, probe: Probe, ndim: int, running: RunningMoments, mask: str | None) -> tuple[str, str]:
    """`[sum z, n]` and `z^T z` of one run, in float64."""
    (tensor, rows), shift = probe, running.shift
    assert shift is not None
    ordered = _ordered(nodes, tensor, rows, ndim)
    dim, leading = len(shift), ndim - len(rows.axes)
    x = nodes.add("Reshape", ordered, nodes.constant([-1, dim]))
    element = helper.np_dtype_to_tensor_dtype(shift.dtype)
    z = nodes.add("Sub", nodes.cast(x, element), nodes.constant(shift))
    count = nodes.cast(nodes.lengths(z, 0), TensorProto.DOUBLE)
    if mask is not None and leading:
        real = _real(nodes, mask, nodes.lengths(ordered, *range(leading)), leading)
        z = nodes.add("Where", real, z, nodes.constant(np.zeros(1, shift.dtype)))
        count = nodes.sum(nodes.cast(real, TensorProto.DOUBLE), 0)
    if running.count > PIECE:
        pieces = _pieces(nodes, z, dim, shift.dtype)
        product = nodes.add("MatMul", nodes.add("Transpose", pieces, perm=[0, 2, 1]), pieces)
        total, gram = (nodes.sum(nodes.cast(each, TensorProto.DOUBLE), 0) for each in (nodes.sum(pieces, 1), product))
    else:
        # a sum over no rows is not 0 on every provider
        z = nodes.add("Concat", z, nodes.constant(np.zeros((1, dim), shift.dtype)), axis=0)
        product = nodes.add("MatMul", nodes.add("Transpose", z, perm=[1, 0]), z)
        total, gram = (nodes.cast(each, TensorProto.DOUBLE) for each in (nodes.sum(z, 0), product))
    return nodes.add("Concat", total, count, axis=0), gram


def _ordered(nodes: _Nodes, tensor: str, rows: Rows, ndim: int) -> str:
    """The part of a tensor that `rows` take, with the axes of the features last; see `Rows.of`."""
    for part in rows.parts:
        if -ndim <= part.axis < ndim:
            length = nodes.lengths(tensor, part.axis % ndim)
            # of length 1 it is taken whole
            start = nodes.whole("Mul", nodes.whole("Div", length, part.count), part.index)
            size = nodes.whole("Div", nodes.whole("Add", length, part.count - 1), part.count)
            stop = nodes.whole("Add", start, size)
            tensor = nodes.add("Slice", tensor, start, stop, nodes.constant([part.axis % ndim]))
    return nodes.add("Transpose", tensor, perm=rows.order(ndim))


def _real(nodes: _Nodes, mask: str, lengths: str, leading: int) -> str:
    """Which rows are of real tokens, `[n, 1]`, of a tensor with so many axes before its features; see `token_rows`.

    Which axes are those of the mask is seen anew in each run. Where none are, one that is real stands for all.
    """
    samples, tokens = nodes.lengths(mask, 0), nodes.lengths(mask, 1)
    both, one = nodes.whole("Mul", samples, tokens), nodes.constant([1])

    def length(axis: int) -> str:
        return nodes.add("Gather", lengths, nodes.constant([axis]))

    if leading == 1:
        found = [(nodes.add("Equal", length(0), both), both)]
    else:
        found = []
        for axis in dict.fromkeys((leading - 1, 1)):  # the last that fits counts
            fits = nodes.add("And", nodes.add("Equal", length(0), samples), nodes.add("Equal", length(axis), tokens))
            spread = [samples, *[one] * (leading - 1)]
            spread[axis] = tokens
            found.append((fits, nodes.add("Concat", *spread, axis=0)))
    shape, start = nodes.constant([1] * leading), nodes.constant([0])
    for fits, spread_as in found:
        shape, start = nodes.add("Where", fits, spread_as, shape), nodes.add("Where", fits, one, start)
    stop = nodes.add("Where", nodes.add("Equal", start, one), nodes.whole("Add", both, 1), one)
    values = nodes.add("Reshape", nodes.cast(mask, TensorProto.BOOL), nodes.constant([-1]))
    values = nodes.add("Concat", nodes.constant(np.ones(1, bool)), values, axis=0)
    values = nodes.add("Reshape", nodes.add("Slice", values, start, stop), shape)
    return nodes.add("Reshape", nodes.add("Expand", values, lengths), nodes.constant([-1, 1]))


def _pieces(nodes: _Nodes, z: str, dim: int, dtype: np.dtype[Any]) -> str:
    """Rows in equal pieces `[k, size, d]` of at most `PIECE`, with rows of 0 at the end; at least one."""
    rows = nodes.lengths(z, 0)
    count = nodes.whole("Add", nodes.whole("Div", rows, PIECE), 1)
    size = nodes.whole("Add", nodes.whole("Div", rows, count), 1)
    lacking = nodes.whole("Sub", nodes.whole("Mul", count, size), rows)
    width, zero = nodes.constant([dim]), numpy_helper.from_array(np.zeros(1, dtype))
    padding = nodes.add("ConstantOfShape", nodes.add("Concat", lacking, width, axis=0), value=zero)
    padded = nodes.add("Concat", z, padding, axis=0)
    return nodes.add("Reshape", padded, nodes.add("Concat", count, size, width, axis=0))

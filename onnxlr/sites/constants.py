"""Where a node's weight comes from: constants, seen through the operators that only rearrange them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxlr.protos import graphs as protos
from onnxlr.sites.base import INDEX_TYPES
from onnxlr.sites.bodies import graphs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from onnxlr.model_io import Model

REARRANGING = frozenset(
    {"Identity", "Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Concat"}
)
"""What a weight is seen through; exporters put the gates of an LSTM in order with Slice and Concat."""

QUANTIZING = frozenset({"DequantizeLinear", "DequantizeBFP", "DequantizeWithOrder", "DynamicQuantizeLinear"})

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)


class GraphView:
    """A graph with its constants: which tensors are constant, their values, and who reads them.

    `graph` is the graphsurgeon graph of `model`, bodies included. Values are read on demand, one tensor at a time.
    """

    def __init__(self, model: Model, graph: gs.Graph) -> None:
        self.model = model
        self.graph = graph
        scopes = [scope for scope, _ in graphs(graph)]
        # a body that gives out a tensor of an outer graph has a stand-in for it, of the same name
        self.tensors: dict[str, Any] = {k: v for scope in reversed(scopes) for k, v in scope.tensors().items()}
        self.graph_outputs = {tensor.name for scope in scopes for tensor in scope.outputs}
        proto = model.proto.graph
        self.sources = {tensor.name: tensor for scope in protos(proto) for tensor in scope.initializer}
        for node in (node for scope in protos(proto) for node in scope.node):
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.sources[node.output[0]] = node.attribute[0].t
        # from IR version 4 on, an initializer that is also an input is only a default, which a caller may override
        inputs = {value.name for value in proto.input} if model.proto.ir_version >= 4 else set()
        self.overridable = inputs & self.sources.keys()

    def is_constant(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor's values are fixed by the model and can be read."""
        if tensor.name in self.sources:
            return tensor.name not in self.overridable
        producer = _producer(tensor)
        return (
            producer is not None
            and producer.op in REARRANGING
            and all(self.is_constant(value) for value in producer.inputs if value.name)
        )

    def values(self, tensor: gs.Tensor) -> NDArray[Any]:
        """The values of a constant tensor."""
        if tensor.name in self.sources:
            return self.model.array(self.sources[tensor.name])
        producer = _producer(tensor)
        assert producer is not None
        names = [value.name for value in producer.inputs if value.name]
        feed = {value.name: self.values(value) for value in producer.inputs if value.name}
        node = OnnxExporter.export_node(producer)
        inputs = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(feed[name].dtype), None)
            for name in dict.fromkeys(names)
        ]
        body = onnx.helper.make_graph([node], "constant", inputs, [onnx.ValueInfoProto(name=tensor.name)])
        opsets = [onnx.helper.make_opsetid("", self.graph.opset)]
        evaluated: Any = ReferenceEvaluator(onnx.helper.make_model(body, opset_imports=opsets)).run(None, feed)
        return np.asarray(evaluated[0])

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """The shape of a constant tensor, without reading its values where the model states it."""
        if tensor.name in self.sources:
            return tuple(self.sources[tensor.name].dims)
        return self.values(tensor).shape

    def dtype(self, tensor: gs.Tensor) -> str:
        """The name of the numpy dtype of a constant tensor."""
        if tensor.name in self.sources:
            return onnx.helper.tensor_dtype_to_np_dtype(self.sources[tensor.name].data_type).name
        return self.values(tensor).dtype.name

    def rank(self, tensor: gs.Tensor) -> int | None:
        """The number of axes of any tensor, where the graph or its inferred shapes tell."""
        lengths = self.lengths(tensor)
        return None if lengths is None else len(lengths)

    def lengths(self, tensor: gs.Tensor) -> tuple[int | None, ...] | None:
        """The shape of any tensor, where the graph or its inferred shapes tell; None for a length that is free."""
        if tensor.shape is not None:
            return tuple(length if isinstance(length, int) else None for length in tensor.shape)
        value = self._inferred.get(tensor.name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        dims = value.type.tensor_type.shape.dim
        return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)

    def is_floating(self, tensor: gs.Tensor) -> bool:
        """Whether the elements of any tensor are floating, or may be for all that the graph tells."""
        element = tensor.dtype
        if element is None and tensor.name in self._inferred:
            element = self._inferred[tensor.name].type.tensor_type.elem_type or None
        return element is None or "float" in _type_name(element)

    @cached_property
    def _inferred(self) -> dict[str, onnx.ValueInfoProto]:
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model.proto)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            return {}  # an operator that onnx cannot infer; what it would tell stays unknown
        return {value.name: value for scope in protos(inferred.graph) for value in scope.value_info}

    def origins(self, tensor: gs.Tensor) -> set[str]:
        """The names of the floating sources that a constant tensor is made of."""
        if tensor.name in self.sources:
            return {tensor.name}
        producer = _producer(tensor)
        return set() if producer is None else {name for part in _data(producer) for name in self.origins(part)}

    def final_readers(self, source: str) -> Iterator[gs.Node | None]:
        """The nodes that use a source's values, seen through rearrangements; None where it is a graph output."""
        pending = [self.tensors[source]]
        seen = set()
        while pending:
            tensor = pending.pop()
            if tensor.name in seen:  # the slices of a weight meet again in one tensor
                continue
            seen.add(tensor.name)
            if tensor.name in self.graph_outputs:
                yield None
            for node in tensor.outputs:
                passed = node.op in REARRANGING and any(part is tensor for part in _data(node))
                if passed and self.is_constant(node.outputs[0]):
                    pending.append(node.outputs[0])
                else:
                    yield node

    def refusal(self, tensor: gs.Tensor) -> str | None:
        """Why a tensor that looks like a weight is not a readable constant; None where it is an activation."""
        if tensor.name in self.overridable:
            return "its weight is also an input of the graph, so a caller may replace it: drop it from the inputs"
        producer = _producer(tensor)
        if self.is_sparse(tensor):
            return "its weight is sparse: store it densely"
        if producer is None:
            return None
        if producer.op in QUANTIZING and self._constant_data(producer):
            return "its weight is quantized: compress before quantizing"
        if producer.op in REARRANGING and producer.inputs:
            reasons = [self.refusal(part) for part in _data(producer) if not self.is_constant(part)]
            if reasons:
                return reasons[0] if all(reasons) else None
        if producer.op == "Constant":
            return "its weight is a Constant without a dense value: store it densely"
        if tensor.name in self._computed:
            return f"its weight is computed from constants by {producer.op}: fold constants first"
        return None

    def is_sparse(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is a constant that is stored sparsely."""
        producer = _producer(tensor)
        if producer is not None:
            return producer.op == "Constant" and not producer.attrs  # graphsurgeon has no sparse attributes
        return isinstance(tensor, gs.Constant) and tensor.name not in self.sources

    def matrices(self, tensor: gs.Tensor, axes: int = 2) -> set[str]:
        """The constant matrices, of numbers and not indices, that a tensor is computed from and from nothing else.

        They have two axes or more, or another number of `axes`.
        """
        stored = {name: self.sources[name] for name in self._computed.get(tensor.name, ())}
        return {name for name, t in stored.items() if len(t.dims) >= axes and t.data_type not in INDEX_TYPES}

    @cached_property
    def _computed(self) -> dict[str, set[str]]:
        """The tensors that follow from constants alone, by whatever operators, with the names of those constants."""
        known = {"": set(), **{name: {name} for name in self.sources.keys() - self.overridable}}
        for node in (node for scope in protos(self.model.proto.graph) for node in scope.node):
            subgraphs = any(attribute.HasField("g") for attribute in node.attribute)
            if known.keys() >= set(node.input) and not subgraphs and node.op_type not in RANDOM:
                sources = set().union(*(known[name] for name in node.input))
                for name in node.output:
                    known.setdefault(name, sources)
        return known

    def _constant_data(self, node: gs.Node) -> bool:
        return bool(node.inputs) and node.inputs[0].name in self._computed


def _type_name(element: Any) -> str:
    """Of a numpy dtype or a TensorProto type, such as "bfloat16"."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element) if isinstance(element, int) else np.dtype(element)
    return dtype.name


def _data(node: gs.Node) -> list[gs.Tensor]:
    """What a rearranging operator rearranges; shapes and axes, its other inputs, are shared between nodes freely."""
    return list(node.inputs) if node.op == "Concat" else list(node.inputs[:1])


def _producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None

"""Edit a model with onnx-graphsurgeon, and lose nothing of what was not edited.

onnx-graphsurgeon exports a graph from its own, poorer representation: metadata, doc strings, annotations, unused
initializers, encodings and unknown attributes do not survive even without an edit. So nothing is exported that need
not be: every node remembers its protobuf, and `close_graph` builds the result from the original's own protobufs.
Only new and edited things are exported.

    graph = open_graph(model.proto)
    ...                                    # edit nodes, tensors, bodies of If and Loop; no cleanup()
    result = close_graph(graph, model.proto)

What lost its last consumer by the edit (a weight, the Transpose that made it) goes. What never had one stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    ValueInfoProto,
    numpy_helper,
)
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from onnxlr.errors import ModelError
from onnxlr.liveness import all_names, consumed, initializer_names, order, prune
from onnxlr.protos import PAYLOAD, copy_fields

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Set


@dataclass(slots=True)
class _Origin:
    """What a gs node was imported from; lists among the attributes are copies, for callers may change theirs."""

    proto: NodeProto
    attributes: dict[str, Any]


def open_graph(model: ModelProto) -> gs.Graph:
    """Import a model for editing; weights are not loaded, local functions are not imported.

    Raises
    ------
    ModelError
        onnx-graphsurgeon cannot represent the model.
    """
    try:
        with G_LOGGER.suppress():
            graph = OnnxImporter.import_graph(
                model.graph,
                opset=OnnxImporter.get_opset(model),
                import_domains=model.opset_import,
                producer_name=model.producer_name,
                producer_version=model.producer_version,
                ir_version=model.ir_version,
            )
    except Exception as error:
        raise ModelError(f"onnx-graphsurgeon cannot import the graph {model.graph.name!r}: {error}") from error
    _remember(graph, model.graph)
    return graph


def close_graph(graph: gs.Graph, original: ModelProto) -> ModelProto:
    """The original with the edits of `graph` in it; without edits, equal to it byte for byte.

    New nodes stand before their first consumer, or at the end. New initializers (numpy arrays, `ml_dtypes` included)
    follow the old ones; those of bodies do so in the main graph, where all bodies see them. Before IR version 4 they
    are listed as inputs too. `original` is not changed.

    Parameters
    ----------
    graph
        What `open_graph(original)` returned, edited: nodes, tensors, values, bodies, graph inputs and outputs.

    Raises
    ------
    ModelError
        The edited graph has a cycle.
    """
    model = ModelProto()
    copy_fields(original, model, skip={"graph"})
    model.graph.SetInParent()
    added = {tensor.name: tensor for tensor in _body_constants(graph) if not hasattr(tensor, "origin")}
    listing = 0 < original.ir_version < 4
    with G_LOGGER.suppress():
        _close(graph, original.graph, frozenset(), model.graph, added, list_initializers=listing)
    return model


def _remember(graph: gs.Graph, proto: GraphProto) -> None:
    """Attach to every node and constant of `graph` the protobuf that it came from."""
    for tensor in graph.outputs:
        _remember_tensor(tensor)
    for node, node_proto in zip(graph.nodes, proto.node, strict=True):
        snapshot = {name: list(value) if isinstance(value, list) else value for name, value in node.attrs.items()}
        node.origin = _Origin(node_proto, snapshot)
        for tensor in node.inputs:
            _remember_tensor(tensor)
        for attribute in node_proto.attribute:
            body = node.attrs.get(attribute.name)
            if isinstance(body, gs.Graph):
                _remember(body, attribute.g)


def _remember_tensor(tensor: gs.Tensor) -> None:
    if isinstance(tensor, gs.Constant):
        tensor.origin = tensor._values.tensor


_REBUILT = frozenset(
    {"node", "initializer", "sparse_initializer", "input", "output", "value_info", "quantization_annotation"}
)
"""What `_close` writes itself, of a graph's fields."""


def _close(
    graph: gs.Graph,
    original: GraphProto,
    outer: Set[str],
    target: GraphProto,
    added: Mapping[str, gs.Constant] = MappingProxyType({}),
    *,
    list_initializers: bool = False,
) -> None:
    """Fill the empty `target` with the edited `graph`.

    `outer` are the names that the enclosing graphs define, `added` constants that it stores beside its own.
    """
    initializers = initializer_names(original)
    constants = {**added} | {
        tensor.name: tensor
        for tensors in (*(node.inputs for node in graph.nodes), graph.outputs)
        for tensor in tensors
        if isinstance(tensor, gs.Constant)
    }
    inputs = {tensor.name for tensor in graph.inputs}
    made = inputs | {tensor.name for node in graph.nodes for tensor in node.outputs}

    visible = outer | initializers | made | constants.keys()
    nodes = [_node(node, visible) for node in graph.nodes]
    origins = [origin and origin.proto for origin in (getattr(node, "origin", None) for node in graph.nodes)]
    before = consumed(original.node, original.output)
    kept, used = prune(nodes, origins, before, (tensor.name for tensor in graph.outputs))
    nodes, origins = [nodes[index] for index in kept], [origins[index] for index in kept]
    if any(node is not origin for node, origin in zip(nodes, origins, strict=True)):
        nodes = [nodes[index] for index in order(nodes, [origin is not None for origin in origins])]
    target.node.extend(nodes)

    live = initializers - made - (before - used)
    _close_initializers(graph, original, constants, live, target)
    new = [name for name in constants if name in used and name not in initializers | made | outer]
    target.initializer.extend(_tensor(constants[name]) for name in new)

    listed = {value.name for value in original.input}
    target.input.extend(value for value in original.input if value.name in inputs | live)
    target.input.extend(_value_info(tensor) for tensor in graph.inputs if tensor.name not in listed)
    if list_initializers:
        target.input.extend(_value_info(constants[name]) for name in new)
    # An output that the edit added is typed best by what the original says about it.
    outputs = {value.name: value for values in (original.value_info, original.output) for value in values}
    target.output.extend(outputs.get(tensor.name) or _value_info(tensor) for tensor in graph.outputs)

    known = all_names(original)
    vanished = known - all_names(target)
    target.value_info.extend(value for value in original.value_info if value.name not in vanished)
    target.value_info.extend(_value_info(tensor) for tensor in _new_variables(graph, known | outer))
    target.quantization_annotation.extend(
        annotation for annotation in original.quantization_annotation if annotation.tensor_name not in vanished
    )
    copy_fields(original, target, skip=_REBUILT)


def _close_initializers(
    graph: gs.Graph, original: GraphProto, constants: dict[str, gs.Constant], live: Set[str], target: GraphProto
) -> None:
    """Copy the original's live initializers to `target`, in their order, with the values that `graph` gives them."""
    # A weight that only bodies read is not among the graph's own constants, and a name could be a body's own.
    remembered = {id(tensor.origin): tensor for tensor in _body_constants(graph) if hasattr(tensor, "origin")}
    for proto in original.initializer:
        if proto.name not in live:
            continue
        constant = constants.get(proto.name, remembered.get(id(proto)))
        if constant is None or _unchanged(constant, proto):
            target.initializer.add().CopyFrom(proto)
        else:
            copy = target.initializer.add()
            copy_fields(proto, copy, skip=PAYLOAD | {"dims", "data_type", "name", "segment"})
            copy.MergeFrom(_tensor(constant))
    for sparse in original.sparse_initializer:
        if sparse.values.name not in live:
            continue
        constant = constants.get(sparse.values.name, remembered.get(id(sparse)))
        if constant is None or _unchanged(constant, sparse):
            target.sparse_initializer.add().CopyFrom(sparse)
        else:
            target.initializer.add().CopyFrom(_tensor(constant))


def _body_constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    for body in graph.subgraphs(recursive=True):
        for node in body.nodes:
            yield from (tensor for tensor in node.inputs if isinstance(tensor, gs.Constant))


def _new_variables(graph: gs.Graph, known: Set[str]) -> Iterator[gs.Variable]:
    """Tensors that the edit made, where their type and shape are known."""
    seen = known | {tensor.name for tensors in (graph.inputs, graph.outputs) for tensor in tensors}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name and tensor.name not in seen and tensor.dtype is not None and tensor.shape is not None:
                yield tensor


def _value_info(tensor: gs.Tensor) -> ValueInfoProto:
    exported: ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, do_type_check=False)
    return exported


def _node(node: gs.Node, visible: Set[str]) -> NodeProto:
    """The node's own protobuf if it is unchanged, else a new one with whatever of the old still holds."""
    origin = getattr(node, "origin", None)
    old, snapshot = (origin.proto, origin.attributes) if origin else (NodeProto(), {})
    old_attributes = {attribute.name: attribute for attribute in old.attribute}
    attributes = {}
    for name, value in node.attrs.items():
        attribute = old_attributes.get(name)
        if isinstance(value, gs.Graph):
            closed = _body(name, value, attribute, visible)
            attributes[name] = attribute if attribute is not None and closed == attribute else closed
        elif attribute is not None and name in snapshot and _same(value, snapshot[name], attribute):
            attributes[name] = attribute
        else:
            attributes[name] = _attribute(name, value, attribute)
    # What was not imported (an attribute type that onnx-graphsurgeon does not know) cannot have been edited.
    kept = [
        attributes.get(name, old) for name, old in old_attributes.items() if name in attributes or name not in snapshot
    ]
    kept += [attribute for name, attribute in attributes.items() if name not in old_attributes]

    inputs, outputs = [[tensor.name for tensor in tensors] for tensors in (node.inputs, node.outputs)]
    scalars = {"op_type": node.op, "name": node.name or "", "domain": node.domain or ""}
    edited = {name: value for name, value in scalars.items() if getattr(old, name) != value}
    same_attributes = len(kept) == len(old.attribute) and all(
        attribute is other for attribute, other in zip(kept, old.attribute, strict=True)
    )
    if origin and not edited and same_attributes and inputs == list(old.input) and outputs == list(old.output):
        return old
    result = NodeProto(input=inputs, output=outputs)
    copy_fields(old, result, skip={"input", "output", "attribute"})
    for name, value in edited.items():
        setattr(result, name, value)
    result.attribute.extend(kept)
    return result


def _body(name: str, body: gs.Graph, old: AttributeProto | None, visible: Set[str]) -> AttributeProto:
    attribute = AttributeProto(name=name, type=AttributeProto.GRAPH)
    if old is not None:
        copy_fields(old, attribute, skip={"g", "name", "type"})
    attribute.g.SetInParent()
    _close(body, old.g if old is not None else GraphProto(name=body.name), visible, attribute.g)
    return attribute


def _attribute(name: str, value: object, old: AttributeProto | None) -> AttributeProto:
    """A new or edited attribute."""
    if isinstance(value, gs.Constant):
        attribute = AttributeProto(name=name, type=AttributeProto.TENSOR, t=_tensor(value))
    elif isinstance(value, (gs.Node.AttributeRef, type)):
        attribute = OnnxExporter.export_attributes({name: value})[0]
    else:
        # An empty list does not tell its type.
        known_type = old.type if old is not None and isinstance(value, list) and not value else None
        attribute = onnx.helper.make_attribute(name, value, attr_type=known_type)
    if old is not None and old.doc_string:
        attribute.doc_string = old.doc_string
    return attribute


def _same(value: object, snapshot: object, attribute: AttributeProto) -> bool:
    if isinstance(value, gs.Constant):
        return attribute.type == AttributeProto.TENSOR and _unchanged(value, attribute.t)
    return type(value) is type(snapshot) and (value is snapshot or value == snapshot)


def _unchanged(constant: gs.Constant, proto: TensorProto | SparseTensorProto) -> bool:
    """Whether the protobuf still says what the constant does, also if its values were loaded to be looked at."""
    sparse = isinstance(proto, SparseTensorProto)
    head = proto.values if sparse else proto
    values = constant._values
    if constant.name != head.name:
        return False
    if isinstance(values, LazyValues):
        return values.tensor is proto or values.tensor == proto
    if head.data_location == TensorProto.EXTERNAL:
        return False
    old = (SparseValues if sparse else LazyValues)(proto).load()
    if values.shape != old.shape or values.dtype != old.dtype:
        return False
    if old.dtype == object:
        return bool(np.array_equal(values, old))
    # Bit by bit: NaN equals NaN, -0 is not 0.
    return bool(np.array_equal(_bytes(values), _bytes(old)))


def _bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _tensor(constant: gs.Constant) -> TensorProto:
    values = constant._values
    if isinstance(values, SparseValues):
        values = values.load().astype(values.dtype)
    if isinstance(values, LazyValues):
        copy = TensorProto()
        copy.CopyFrom(values.tensor)
        copy.name = constant.name
        return copy
    return numpy_helper.from_array(np.asarray(values), constant.name)

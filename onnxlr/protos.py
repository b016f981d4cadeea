"""Walk and copy protobufs without copying the weights in them.

A protobuf's own `CopyFrom` copies everything. Here a model is copied field by field down to its tensors, and what
becomes of each tensor is the caller's choice: that is how 12 GB of weights stay out of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, TensorProto

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Set

    from onnx import ModelProto, NodeProto

PAYLOAD = frozenset(
    {"raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data"}
    | {"external_data", "data_location"}
)
"""The fields of a tensor that hold its values, or say where they are."""

_HOLDERS = frozenset(
    {"ModelProto", "GraphProto", "NodeProto", "AttributeProto", "FunctionProto", "TrainingInfoProto"}
    | {"TensorProto", "SparseTensorProto"}
)


def tensors(message: Message) -> Iterator[TensorProto]:
    """Every tensor inside a protobuf: initializers and attributes, in bodies, functions and training graphs too."""
    if isinstance(message, TensorProto):
        yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and descriptor.message_type.name in _HOLDERS:
            for item in (value,) if isinstance(value, Message) else value:
                yield from tensors(item)


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all bodies in it, each before those inside of it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from graphs(attribute.g)
            for body in attribute.graphs:
                yield from graphs(body)


def nodes(proto: ModelProto) -> Iterator[NodeProto]:
    """Every operator of a model, those of bodies and local functions too."""
    for own in (proto.graph.node, *(function.node for function in proto.functions)):
        yield from with_bodies(own)


def with_bodies(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Operators, each before those of the bodies in it."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from with_bodies(body.node)


def opset_of(proto: ModelProto) -> int:
    """The version of ONNX's own operators; 1 where a model of before there were versions states none."""
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1)


def copy_fields(source: Message, target: Message, skip: Set[str] = frozenset()) -> None:
    """Copy the fields that are set in `source`, except those named in `skip`, to an empty `target`."""
    for descriptor, value in source.ListFields():
        if descriptor.name in skip:
            continue
        if isinstance(value, Message):
            getattr(target, descriptor.name).SetInParent()
            getattr(target, descriptor.name).CopyFrom(value)
        elif isinstance(value, (int, float, str, bytes)):
            setattr(target, descriptor.name, value)
        else:
            getattr(target, descriptor.name).extend(value)


def copy_around_tensors(source: Message, target: Message, place: Callable[[TensorProto, TensorProto], None]) -> None:
    """Copy a protobuf to an empty one, except that each tensor is left to `place(source, target)`."""
    if isinstance(source, TensorProto) and isinstance(target, TensorProto):
        place(source, target)
        return
    holders = {
        descriptor.name: value
        for descriptor, value in source.ListFields()
        if descriptor.message_type is not None and descriptor.message_type.name in _HOLDERS
    }
    copy_fields(source, target, skip=holders.keys())
    for name, value in holders.items():
        if isinstance(value, Message):
            getattr(target, name).SetInParent()
            copy_around_tensors(value, getattr(target, name), place)
        else:
            for item in value:
                copy_around_tensors(item, getattr(target, name).add(), place)

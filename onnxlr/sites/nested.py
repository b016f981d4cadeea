"""Linear operators in the bodies of control flow and in local functions: found and listed, not compressed yet."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from onnxlr.sites.base import INDEX_TYPES, Refusal
from onnxlr.sites.macs import COUNTED

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    import onnx

    Constants = Mapping[str, Mapping[str, onnx.TensorProto]]
    """By tensor: the stored constants, by name, that its values follow from."""


def nested_operators(model: onnx.ModelProto, operators: Collection[str]) -> tuple[list[Refusal], list[str]]:
    """Refusals for all nested nodes of a type in `operators` that read a constant matrix; names of those that multiply.

    A constant is seen through whatever operators of the body compute from constants alone. In a function every such
    node is listed, since its weight may be an argument.
    """
    refusals, multiplying = [], []
    for node, constants, where in _nested_nodes(model):
        name = node.name or (node.output[0] if node.output else "?")
        if node.op_type in COUNTED:
            multiplying.append(name)
        read = {source: tensor for value in node.input for source, tensor in constants.get(value, {}).items()}
        matrices = {s: t for s, t in read.items() if len(t.dims) > 1 and t.data_type not in INDEX_TYPES}
        if node.op_type in operators and (matrices or "function" in where):
            parameters = sum(prod(tensor.dims) for tensor in matrices.values())
            refusals.append(Refusal(name, node.op_type, where, tuple(sorted(matrices)), parameters))
    return refusals, multiplying


def _nested_nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, Constants, str]]:
    outer = _with_constants({}, model.graph.initializer, model.graph.node)
    yield from _in_bodies(model.graph.node, outer)
    for function in model.functions:
        constants = _with_constants({}, (), function.node)
        for node in function.node:
            yield node, constants, f"it is inside the function {function.name!r}: inline it"
        yield from _in_bodies(function.node, constants)


def _in_bodies(nodes: Iterable[onnx.NodeProto], outer: Constants) -> Iterator[tuple[onnx.NodeProto, Constants, str]]:
    for parent in nodes:
        for attribute in parent.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                constants = _with_constants(outer, body.initializer, body.node)
                for node in body.node:
                    yield node, constants, f"it is inside a body of {parent.op_type}: not supported yet"
                yield from _in_bodies(body.node, constants)


def _with_constants(
    outer: Constants, initializers: Iterable[onnx.TensorProto], nodes: Iterable[onnx.NodeProto]
) -> Constants:
    known = {**outer, **{tensor.name: {tensor.name: tensor} for tensor in initializers}}
    for node in nodes:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            known[node.output[0]] = {node.output[0]: node.attribute[0].t}
        elif node.input and all(value in known or not value for value in node.input):
            sources = {s: t for value in node.input if value for s, t in known[value].items()}
            known.update(dict.fromkeys(node.output, sources))
    return known

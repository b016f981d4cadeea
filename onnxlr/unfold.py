"""A model as the stages take it: linear operators out of their functions, and one tensor to a name.

Two things hide a linear operator from whoever looks for it by name. A local function is written once and called with
many weights, so functions that hold linear operators are inlined; all others stay. And bodies of If and Loop may each
have a tensor of the same name, so where they do, all but the first get a new one.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import onnx
import onnx.inliner

from onnxlr.liveness import defined
from onnxlr.protos import copy_around_tensors, graphs, with_bodies
from onnxlr.sites import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from onnx import GraphProto, ModelProto

    from onnxlr.model_io import Model


def unfold(model: Model) -> tuple[Model, tuple[str, ...]]:
    """The model with functions inlined and names made unique where that is needed, and what was done, in words.

    A model that needs neither is returned as it is. Weights of the main graph are not copied on the way, and external
    data stay where they are.
    """
    proto, notes = model.proto, []
    functions = _linear_functions(proto)
    if functions:
        names = ", ".join(sorted(repr(name) for _, name in functions))
        try:
            proto = _inlined(proto, functions)
        except RuntimeError as error:
            notes.append(f"the functions {names} hold linear operators but cannot be inlined: {error}")
        else:
            notes.append(f"the functions {names} hold linear operators and were inlined")
    if _clashing(proto.graph):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        proto, renamed = copy, sorted(_make_unique(copy.graph))
        listed = ", ".join(map(repr, renamed[:3])) + (", ..." if len(renamed) > 3 else "")
        notes.append(f"{len(renamed)} tensors of bodies were renamed, for others have their names ({listed})")
    return (model if proto is model.proto else replace(model, proto=proto)), tuple(notes)


def _linear_functions(proto: ModelProto) -> list[tuple[str, str]]:
    """Domains and names of the functions that hold a linear operator, or call one that does."""
    called = {
        (f.domain, f.name): {(node.domain, node.op_type) for node in with_bodies(f.node)} for f in proto.functions
    }
    linear: set[tuple[str, str]] = set()
    for _ in called:
        for function, calls in called.items():
            if any(call in linear or (call not in called and _is_linear(*call)) for call in calls):
                linear.add(function)
    return [function for function in called if function in linear]


def _is_linear(domain: str, op: str) -> bool:
    return op in FAMILIES and domain in FAMILIES[op].domains


def _inlined(proto: ModelProto, functions: list[tuple[str, str]]) -> ModelProto:
    """Inline by onnx, which copies the model twice: so without the weights of the main graph, which follow after."""
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    own = {id(tensor) for tensor in proto.graph.initializer}
    outline = onnx.ModelProto()
    copy_around_tensors(
        proto,
        outline,
        lambda source, target: target.CopyFrom(
            onnx.TensorProto(name=source.name, data_type=source.data_type) if id(source) in own else source
        ),
    )
    result: ModelProto = onnx.inliner.inline_selected_functions(outline, functions)
    _share_constants(result.graph, {name for node in proto.graph.node for name in node.output})
    for tensor in result.graph.initializer:
        tensor.CopyFrom(weights[tensor.name])
    return result


def _share_constants(graph: GraphProto, known: Collection[str]) -> None:
    """Of matrices that inlining has copied, one to every call, the first serves for all; `known` outputs stay."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    for node in graph.node:
        matrix = node.op_type == "Constant" and any(len(attribute.t.dims) > 1 for attribute in node.attribute)
        if matrix and node.output[0] not in known:
            value = onnx.NodeProto(op_type=node.op_type, attribute=node.attribute)
            digest = hashlib.sha256(value.SerializeToString(deterministic=True)).digest()
            same[node.output[0]] = first.setdefault(digest, node.output[0])
    same = {name: other for name, other in same.items() if name != other}
    for index in reversed(range(len(graph.node))):
        if not same.keys().isdisjoint(graph.node[index].output):
            del graph.node[index]
    for node in (node for scope in graphs(graph) for node in scope.node):
        for index, name in enumerate(node.input):
            if name in same:
                node.input[index] = same[name]
    for scope in graphs(graph):
        for value in [value for value in scope.value_info if value.name in same]:
            scope.value_info.remove(value)


def _clashing(graph: GraphProto) -> bool:
    names = [defined(scope) for scope in graphs(graph)]
    return sum(map(len, names)) > len(set().union(*names))


def _make_unique(main: GraphProto) -> set[str]:
    """Rename, in place, whatever a body defines under a name that is taken; the names that were."""
    taken = defined(main)
    reserved = set().union(*map(defined, graphs(main)))
    renamed: set[str] = set()

    def unique(graph: GraphProto, outer: Mapping[str, str]) -> None:
        own = {} if graph is main else {name: name for name in defined(graph)}
        for name in own.keys() & taken:
            own[name] = next(new for n in count(1) if (new := f"{name}_{n}") not in reserved)
            reserved.add(own[name])
            renamed.add(name)
        taken.update(own.values())
        names = {**outer, **own}
        _rename(graph, names)
        for node in graph.node:
            for attribute in node.attribute:
                for body in ([attribute.g] if attribute.HasField("g") else [], attribute.graphs):
                    for inner in body:
                        unique(inner, names)

    unique(main, {})
    return renamed


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Give the tensors of a graph other names, bodies in it left alone."""
    for items in (graph.input, graph.output, graph.value_info, graph.initializer):
        for item in items:
            item.name = names.get(item.name, item.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = names.get(sparse.values.name, sparse.values.name)
    for annotation in graph.quantization_annotation:
        annotation.tensor_name = names.get(annotation.tensor_name, annotation.tensor_name)
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]

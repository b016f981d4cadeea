"""Tensors of bodies, brought out of a model: every value that they had in one run.

A body of If may not run, one of Loop or Scan runs again and again, and a tensor may have another shape each time. So
what leaves the body are two vectors: the values of all runs one after another, and their shapes, each with its number
of axes before it.

    If      the vectors are one more output of the branch; the other branch gives empty ones
    Loop    they are carried from run to run, and grow
    Scan    they are stacked and flattened, which takes equal shapes: `onnxlr.sites.bodies.unseen` says where not
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from onnx import GraphProto, NodeProto

    from onnxlr.sites.bodies import Body

VALUES, SHAPES = int(TensorProto.DOUBLE), int(TensorProto.INT64)
_FLAT = "onnxlr.flat"
_EMPTY = {VALUES: "onnxlr.no_values", SHAPES: "onnxlr.no_shapes"}
_CONSTANTS = {_FLAT: np.array([-1]), _EMPTY[VALUES]: np.zeros(0), _EMPTY[SHAPES]: np.zeros(0, np.int64)}


def outputs_of(seen_as: str) -> tuple[str, str]:
    """The names of the model's outputs that hold the values and the shapes of what is called `seen_as`."""
    return f"{seen_as}:values", f"{seen_as}:shapes"


def bring_out(graph: GraphProto, tensor: str, seen_as: str, bodies: Sequence[Body]) -> None:
    """Make a tensor, as it is in the last of `bodies`, an output of the main graph, in place; see `outputs_of`."""
    if not any(node.output[0] == _FLAT for node in graph.node if node.output):
        for index, (name, array) in enumerate(_CONSTANTS.items()):
            value = numpy_helper.from_array(array)
            graph.node.insert(index, helper.make_node("Constant", [], [name], value=value))
    scopes, parents = [graph], []
    for body in bodies:
        parents.append(next(node for node in scopes[-1].node if body.output in node.output))
        scopes.append(_body(parents[-1], body.attribute))
    wide, shape, axes = (f"{seen_as}:{part}" for part in ("double", "shape", "axes"))
    values, shapes = outputs_of(seen_as)
    inside = "/" * len(bodies)
    scopes[-1].node.extend(
        [
            helper.make_node("Cast", [tensor], [wide], to=VALUES),
            helper.make_node("Reshape", [wide, _FLAT], [values + inside]),
            helper.make_node("Shape", [tensor], [shape]),
            helper.make_node("Shape", [shape], [axes]),
            helper.make_node("Concat", [axes, shape], [shapes + inside], axis=0),
        ]
    )
    for depth in reversed(range(len(bodies))):
        for name, kind in ((values, VALUES), (shapes, SHAPES)):
            _carry(scopes[depth], parents[depth], bodies[depth], name + "/" * depth, kind)
    graph.output.extend(
        [helper.make_tensor_value_info(values, VALUES, [None]), helper.make_tensor_value_info(shapes, SHAPES, [None])]
    )


def pieces(values: NDArray[Any], shapes: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """The arrays that a tensor was in one run of the model, in order."""
    first = place = 0
    while place < len(shapes):
        start = place + 1
        place = start + int(shapes[place])
        shape = tuple(int(length) for length in shapes[start:place])
        yield values[first : first + prod(shape)].reshape(shape)
        first += prod(shape)


def _carry(outer: GraphProto, node: NodeProto, body: Body, name: str, kind: int) -> None:
    """Give the vector `name`/ of a body out as `name` of the graph around it."""
    inner, inside = _body(node, body.attribute), name + "/"
    if node.op_type == "If":
        for attribute in node.attribute:
            given = inside
            if attribute.name != body.attribute:
                given = f"{inside}none"
                attribute.g.node.append(helper.make_node("Identity", [_EMPTY[kind]], [given]))
            attribute.g.output.append(helper.make_tensor_value_info(given, kind, [None]))
        node.output.append(name)
    elif node.op_type == "Loop":
        node.input.extend([""] * (2 - len(node.input)))
        states = len(node.input) - 2
        before, after = f"{inside}before", f"{inside}after"
        inner.input.append(helper.make_tensor_value_info(before, kind, [None]))
        inner.node.append(helper.make_node("Concat", [before, inside], [after], axis=0))
        inner.output.insert(1 + states, helper.make_tensor_value_info(after, kind, [None]))
        node.input.append(_EMPTY[kind])
        node.output.insert(states, name)
    else:
        stacked = f"{inside}stacked"
        inner.output.append(helper.make_tensor_value_info(inside, kind, [None]))
        node.output.append(stacked)
        for attribute in node.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)
        outer.node.append(helper.make_node("Reshape", [stacked, _FLAT], [name]))


def _body(node: NodeProto, attribute: str) -> GraphProto:
    body: GraphProto = next(a.g for a in node.attribute if a.name == attribute)
    return body

"""Tensors through which all that a model computes must pass: where a compressed model is held to the dense one.

Behind a residual block there is one: the sum that the next block both reads and adds to. Within the block there is
none, since the sum goes past it. So the waists of a transformer or a residual network are the ends of its blocks, and
those of a chain of layers the layers' outputs. What does not depend on a weight that is trained (a mask, positions) may
go past a waist; so may a tensor's shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxlr.liveness import reads

if TYPE_CHECKING:
    from collections.abc import Collection

    from onnx import GraphProto

_SHAPES = frozenset({"Shape", "Size"})


def waists(graph: GraphProto, trained: Collection[str]) -> list[str]:
    """The waists of a graph, in the order of its nodes; of several without a trained matrix between them, the last.

    Parameters
    ----------
    graph
        Its nodes in an order in which they can run. A cut is found where this order shows it: of branches whose nodes
        are interleaved no waist is missed, but one that ends in an output of its own may hide some.
    trained
        Names of the initializers that are trained.
    """
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1 and tensor.name in trained}
    outputs = {value.name for value in graph.output}
    last_use = {name: position for position, node in enumerate(graph.node) for name in reads(node)}
    flow: set[str] = set()
    found: list[str] = []
    fresh = False  # has a trained matrix been used since the last waist?
    for position, node in enumerate(graph.node):
        read = reads(node)
        fresh = fresh or not read.isdisjoint(matrices)
        if not (read.isdisjoint(trained) and read.isdisjoint(flow)) and node.op_type not in _SHAPES:
            flow.update(name for name in node.output if name)
        flow = {name for name in flow if last_use.get(name, -1) > position}
        if len(flow) == 1 and (name := next(iter(flow))) in node.output and name not in outputs:
            if not fresh and found:
                found.pop()
            found.append(name)
            fresh = False
    return found

"""The bodies of If, Loop and Scan: the graphs inside a graph, at any depth, and where a node lies among them.

A name stands for one tensor in the whole model (`onnxlr.unfold` sees to that), so a body's tensors are known by their
names alone, as those of the main graph are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RUN_BODIES = frozenset({"If", "Loop", "Scan"})
"""Operators of ONNX's own that run bodies; what others do with theirs is not known."""
DOMAINS = frozenset({"", "ai.onnx", None})


@dataclass(frozen=True, slots=True)
class Body:
    """One body: `attribute` of the node with the operator `op` and the name `node`, whose first output is `output`."""

    op: str
    node: str
    output: str
    attribute: str
    known: bool = True

    def __str__(self) -> str:
        return f"{self.attribute} of {self.op} {self.node!r}"


def graphs(graph: gs.Graph, bodies: tuple[Body, ...] = ()) -> Iterator[tuple[gs.Graph, tuple[Body, ...]]]:
    """The graph itself and all bodies in it, each with those that it lies in, outermost first."""
    yield graph, bodies
    for node in graph.nodes:
        for attribute, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                output = next((tensor.name for tensor in node.outputs if tensor.name), "")
                known = node.op in RUN_BODIES and node.domain in DOMAINS
                yield from graphs(value, (*bodies, Body(node.op, node.name or output, output, attribute, known)))


def refusal(bodies: Sequence[Body]) -> str | None:
    """Why nothing in these bodies can be compressed."""
    for body in bodies:
        if not body.known:
            return f"it is inside {body}: only bodies of If, Loop and Scan can be compressed"
    return None


def unseen(bodies: Sequence[Body], opset: int) -> str:
    """Why no data can be gathered of what is in these bodies; "" where they can.

    A Scan stacks what its body gives, so that has to be there, and of one shape, whenever it runs. Before opset 11 both
    branches of an If give the same shapes.
    """
    if opset < 11 and any(body.op == "If" for body in bodies):
        return f"no data can be gathered inside an If at opset {opset}: convert the model to opset 11 or newer"
    for outer, inner in pairwise(bodies):
        if outer.op == "Scan" and inner.op != "Scan":
            return f"no data can be gathered inside {inner}, which a Scan runs"
    return ""

"""Names in a graph: who reads what, what died by an edit, and an order in which every name is made before it is read.

All of it works on protobufs and tensor names, in time linear in the nodes. A node reads its inputs, and whatever the
bodies in its attributes (If, Loop, Scan) read from the graph around them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from onnx import AttributeProto, GraphProto, NodeProto, ValueInfoProto

from onnxlr.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def reads(node: NodeProto) -> set[str]:
    """The tensors that a node needs: its inputs, and what its bodies take from outside."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            names |= outer_reads(attribute.g)
        elif attribute.type == AttributeProto.GRAPHS:
            names.update(*map(outer_reads, attribute.graphs))
    return names


def outer_reads(graph: GraphProto) -> set[str]:
    """The tensors that a body takes from the graphs around it."""
    return consumed(graph.node, graph.output) - defined(graph)


def consumed(nodes: Iterable[NodeProto], outputs: Iterable[object] = ()) -> set[str]:
    """The tensors that nodes read or that are graph outputs."""
    names = {getattr(output, "name", "") for output in outputs}
    for node in nodes:
        names |= reads(node)
    return names


def initializer_names(graph: GraphProto) -> set[str]:
    """The names of a graph's initializers, sparse ones included."""
    dense = {tensor.name for tensor in graph.initializer}
    return dense | {sparse.values.name for sparse in graph.sparse_initializer}


def all_names(graph: GraphProto) -> set[str]:
    """Every tensor that a graph defines or reads."""
    return consumed(graph.node, graph.output) | defined(graph)


def prune(
    nodes: Sequence[NodeProto], origins: Sequence[NodeProto | None], before: set[str], outputs: Iterable[str]
) -> tuple[list[int], set[str]]:
    """Drop the nodes that an edit has left without a consumer, and in turn those that only fed them.

    Parameters
    ----------
    nodes
        The edited graph's nodes.
    origins
        For each, the node that it was before the edit; None for a new one, which always stays.
    before
        What was consumed before the edit: a node of which nothing was stays as well.
    outputs
        Names of the edited graph's outputs.

    Returns
    -------
    tuple[list[int], set[str]]
        The indices of the nodes that stay, and the names they and the outputs consume.
    """
    needs = [reads(node) for node in nodes]
    uses = Counter(outputs)
    for names in needs:
        uses.update(names)
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    gone: set[int] = set()
    suspects = list(range(len(nodes)))
    while suspects:
        index = suspects.pop()
        origin = origins[index]
        if origin is None or index in gone or any(uses[name] for name in nodes[index].output if name):
            continue
        if before.isdisjoint(origin.output):
            continue
        gone.add(index)
        for name in needs[index]:
            uses[name] -= 1
            if not uses[name] and name in maker:
                suspects.append(maker[name])
    return [index for index in range(len(nodes)) if index not in gone], {name for name in uses if uses[name]}


def needed(graph: GraphProto, names: Iterable[str]) -> list[NodeProto]:
    """The nodes of a graph without which the tensors `names` cannot be made, in their order."""
    wanted = set(names)
    kept = []
    for node in reversed(graph.node):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted |= reads(node)
    return kept[::-1]


def keep_only(graph: GraphProto, outputs: Sequence[ValueInfoProto]) -> None:
    """Leave of a graph, in place, these outputs and what they are made of; inputs stay, but for those with a value."""
    graph.ClearField("output")
    graph.output.extend(outputs)
    nodes = needed(graph, (value.name for value in outputs))
    graph.ClearField("node")
    graph.node.extend(nodes)
    unread = initializer_names(graph) - consumed(nodes, outputs)
    for field in (graph.initializer, graph.input):
        for index in reversed([i for i, each in enumerate(field) if each.name in unread]):
            del field[index]


def order(nodes: Sequence[NodeProto], fixed: Sequence[bool]) -> list[int]:
    """A topological order that moves as little as possible.

    A node that is not `fixed` stays where it is if its inputs are made by then; otherwise it moves to just before its
    first consumer, or to the end. A fixed one moves only where no other order is valid.

    Returns
    -------
    list[int]
        A permutation of the nodes' indices.

    Raises
    ------
    ModelError
        There is a cycle.
    """
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needs = [sorted({maker[name] for name in reads(node) if name in maker}) for node in nodes]
    placed: dict[int, None] = {}

    def place(index: int) -> None:
        stack, opened = [index], set()
        while stack:
            top = stack[-1]
            missing = [need for need in needs[top] if need not in placed]
            if top in placed or not missing:
                placed[stack.pop()] = None
            elif top in opened:
                raise ModelError(
                    f"the edited graph has a cycle through node {nodes[top].name!r} ({nodes[top].op_type})"
                )
            else:
                opened.add(top)
                stack.extend(reversed(missing))

    for index, names in enumerate(needs):
        if fixed[index] or all(need in placed for need in names):
            place(index)
    for index in range(len(nodes)):
        place(index)
    return list(placed)


def defined(graph: GraphProto) -> set[str]:
    """The tensors that a graph has of its own: its inputs, initializers and what its nodes make."""
    made = {name for node in graph.node for name in node.output if name}
    return made | initializer_names(graph) | {value.name for value in graph.input}

"""From a GraphProto to steps that can run: attributes decoded, implementations chosen, functions inlined.

A `Graph` is compiled once. It knows, for each step, what it reads (names that the bodies of its If or Loop capture
included), so the executor can leave out what was not asked for and free tensors after their last use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx
from onnx import AttributeProto

from onnxlr.torch_graph.registry import Implementation, Missing, find
from onnxlr.torch_graph.tensors import DTYPES, type_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from onnx import FunctionProto, GraphProto, NodeProto, TensorProto

DOMAINS = {"ai.onnx": ""}


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A compiled graph, body or function.

    Attributes
    ----------
    inputs, outputs
        Names, in order; an output name may be empty in a function call that leaves it out.
    steps
        The nodes in order.
    weights
        Initializers and values of Constant nodes, by name; emptied once they have become parameters.
    captured
        Names that it reads from the scope around it.
    scope
        What its weights' names begin with; empty for the main graph.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    weights: dict[str, TensorProto]
    captured: frozenset[str]
    scope: str

    def walk(self) -> Iterable[Graph]:
        """The graph itself and all bodies and functions in it."""
        yield self
        for step in self.steps:
            for body in step.bodies:
                yield from body.walk()


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One node: the function that computes it, or the local function it calls.

    `label` is what errors call it; `reads` are all names it needs from its scope.
    """

    label: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    implementation: Implementation | None
    function: Graph | None
    opset: int
    bodies: tuple[Graph, ...] = ()
    reads: frozenset[str] = field(default=frozenset())


class Compiler:
    """Compiles the graphs of one model; what it cannot is counted in `missing`."""

    def __init__(self, proto: onnx.ModelProto, missing: Missing) -> None:
        self.missing = missing
        self.functions: dict[tuple[str, str, str], FunctionProto] = {
            (_domain(f.domain), f.name, f.overload): f for f in proto.functions
        }
        self.opsets = {_domain(entry.domain): entry.version for entry in proto.opset_import} or {"": 1}

    def graph(self, proto: GraphProto, opsets: Mapping[str, int], scope: str, given: Mapping[str, Any]) -> Graph:
        """Compile a graph or body; `given` are the attributes of the function around it."""
        for value in (*proto.input, *proto.output):
            self._check_type(value, scope)
        for sparse in proto.sparse_initializer:
            self.missing.add("initializer", "", opsets.get("", 0), f"sparse: {sparse.values.name}")
        weights = {tensor.name: tensor for tensor in proto.initializer}
        for tensor in proto.initializer:
            self._check_tensor(tensor, opsets)
        steps = self._steps(proto.node, opsets, scope, given, weights)
        inputs = tuple(value.name for value in proto.input)
        outputs = tuple(value.name for value in proto.output)
        return _assembled(inputs, outputs, steps, weights, scope)

    def _steps(
        self,
        nodes: Iterable[NodeProto],
        opsets: Mapping[str, int],
        scope: str,
        given: Mapping[str, Any],
        weights: dict[str, TensorProto],
    ) -> tuple[Step, ...]:
        steps = []
        for index, node in enumerate(nodes):
            if node.op_type == "Constant" and not node.domain and node.attribute[0].name == "value":
                attribute = node.attribute[0]
                if not attribute.ref_attr_name:
                    weights[node.output[0]] = attribute.t
                    self._check_tensor(attribute.t, opsets)
                    continue
            steps.append(self._step(node, opsets, f"{scope}{node.name or index}", given))
        return tuple(steps)

    def _step(self, node: NodeProto, opsets: Mapping[str, int], path: str, given: Mapping[str, Any]) -> Step:
        domain = _domain(node.domain)
        opset = opsets.get(domain, 1 if domain else 0)
        attributes: dict[str, Any] = {}
        bodies = []
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                if attribute.ref_attr_name in given:
                    attributes[attribute.name] = given[attribute.ref_attr_name]
            elif attribute.type == AttributeProto.GRAPH:
                body = self.graph(attribute.g, opsets, f"{path}/{attribute.name}/", given)
                attributes[attribute.name] = body
                bodies.append(body)
            else:
                attributes[attribute.name] = onnx.helper.get_attribute_value(attribute)
        attributes = {name: _text(value) for name, value in attributes.items()}
        inputs, outputs = tuple(node.input), tuple(node.output)
        reads = frozenset(name for name in inputs if name).union(*(body.captured for body in bodies))
        label = f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type} of {', '.join(map(repr, outputs))}"

        function = self.functions.get((domain, node.op_type, node.overload))
        if function is not None:
            called = self._call(function, path, attributes)
            return Step(label, node.op_type, domain, inputs, outputs, {}, None, called, opset, (called,), reads)
        implementation = find(domain, node.op_type, opset)
        if implementation is None:
            self.missing.add(node.op_type, domain, opset)
        elif reason := implementation.refusal(attributes):
            self.missing.add(node.op_type, domain, opset, reason)
        return Step(
            label, node.op_type, domain, inputs, outputs, attributes, implementation, None, opset, tuple(bodies), reads
        )

    def _call(self, function: FunctionProto, path: str, attributes: dict[str, Any]) -> Graph:
        given = {a.name: _text(onnx.helper.get_attribute_value(a)) for a in function.attribute_proto} | attributes
        opsets = self.opsets | {_domain(entry.domain): entry.version for entry in function.opset_import}
        weights: dict[str, TensorProto] = {}
        scope = f"{path}/{function.name}/"
        steps = self._steps(function.node, opsets, scope, given, weights)
        return _assembled(tuple(function.input), tuple(function.output), steps, weights, scope)

    def _check_type(self, value: onnx.ValueInfoProto, scope: str) -> None:
        kind = value.type.WhichOneof("value")
        if scope and kind == "sequence_type":
            return  # lists, within
        if kind in ("sequence_type", "optional_type", "map_type", "sparse_tensor_type"):
            self.missing.add("value", "", self.opsets.get("", 0), f"{kind.removesuffix('_type')}: {value.name}")
        elif kind == "tensor_type" and value.type.tensor_type.elem_type not in (*DTYPES, 0):
            self.missing.add(
                "value", "", self.opsets.get("", 0), f"{type_name(value.type.tensor_type.elem_type)}: {value.name}"
            )

    def _check_tensor(self, tensor: TensorProto, opsets: Mapping[str, int]) -> None:
        if tensor.data_type not in DTYPES:
            self.missing.add("initializer", "", opsets.get("", 0), f"{type_name(tensor.data_type)}: {tensor.name}")


def _assembled(
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    steps: tuple[Step, ...],
    weights: dict[str, TensorProto],
    scope: str,
) -> Graph:
    made = {*inputs, *weights}
    captured: set[str] = set()
    for step in steps:
        captured |= step.reads - made
        made.update(step.outputs)
    captured |= {name for name in outputs if name} - made
    return Graph(inputs, outputs, steps, weights, frozenset(captured), scope)


def schedule(graph: Graph, wanted: tuple[str, ...]) -> tuple[tuple[Step, tuple[str, ...]], ...]:
    """The steps that `wanted` needs, in order, each with the names that are not needed after it."""
    needed = set(wanted)
    chosen = []
    for step in reversed(graph.steps):
        if needed.intersection(step.outputs):
            needed |= step.reads
            chosen.append(step)
    seen = set(wanted)
    plan = []
    for step in chosen:
        touched = step.reads.union(name for name in step.outputs if name)
        plan.append((step, tuple(touched - seen)))
        seen |= touched
    return tuple(reversed(plan))


def _domain(name: str) -> str:
    return DOMAINS.get(name, name)


def _text(value: Any) -> Any:
    """Strings of attributes as str."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [item.decode("utf-8", "replace") for item in value]
    return value

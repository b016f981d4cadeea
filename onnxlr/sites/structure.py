"""How weights hang together: which read one tensor, and which feed another through elementwise operators only.

Weights that read one tensor (queries, keys and values; the gate and the up projection of an MLP) can share a first
factor. Where one or more of them make the hidden units of another (fc1, GELU, fc2; gate and up, their product, down),
a unit can be dropped from all of them and from whatever acts on it in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx_graphsurgeon as gs

    from onnxlr.sites.base import Site
    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.weight import Weight

ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "BiasGelu", "Cast", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "FastGelu", "Gelu",
        "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow",
        "QuickGelu", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum",
        "Swish", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
"""Operators that act on every element alone."""
DOMAINS = frozenset({"", "ai.onnx", "com.microsoft", None})
"""Where these names mean that; a model may have functions and custom operators of the same names elsewhere."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Weights whose outputs are the hidden units of another.

    Attributes
    ----------
    producers
        Names of the weights that make hidden units; they all have `d_out` of `width`.
    consumer
        Name of the weight that reads them.
    width
        The number of hidden units.
    tensors
        All tensors between, the outputs of the producers and the input of the consumer included.
    constants
        Constants with a value a unit that act on them in between: name, and the axis of the units.
    """

    producers: tuple[str, ...]
    consumer: str
    width: int
    tensors: frozenset[str]
    constants: tuple[tuple[str, int], ...]


def find_chains(weights: Sequence[Weight], nodes: Mapping[str, gs.Node], view: GraphView) -> tuple[Chain, ...]:
    """Every consumer with its producers; no weight is in two chains."""
    makers = {w.sites[0].output: w for w in weights if len(w.sites) == 1 and _plain(w.sites[0])}
    taken: set[str] = set()
    chains = []
    for consumer in makers.values():
        chain = _chain(consumer, makers, nodes, view)
        if chain is not None and taken.isdisjoint((*chain.producers, chain.consumer)):
            chains.append(chain)
            taken.update((*chain.producers, chain.consumer))
    return tuple(chains)


def _plain(site: Site) -> bool:
    return site.plain and site.input_axis == site.output_axis == -1 and not site.opaque_addend


def _chain(
    consumer: Weight, makers: Mapping[str, Weight], nodes: Mapping[str, gs.Node], view: GraphView
) -> Chain | None:
    """Walk backwards from the consumer's input; None where anything but elementwise operators is met."""
    site, width = consumer.sites[0], consumer.d_in
    producers: dict[str, Weight] = {}
    between: list[gs.Node] = []
    constants: dict[str, int] = {}
    tensors: set[str] = set()
    pending = [view.tensors[site.input]]
    while pending:
        tensor = pending.pop()
        if tensor.name in tensors:
            continue
        tensors.add(tensor.name)
        if tensor.name in view.graph_outputs or not tensor.inputs:
            return None
        if tensor.name in makers:
            maker = makers[tensor.name]
            if maker is consumer or maker.d_out != width or maker.sites[0].bodies != site.bodies:
                return None
            producers[maker.name] = maker
            continue
        node = tensor.inputs[0]
        if node.op not in ELEMENTWISE or node.domain not in DOMAINS or len(node.outputs) != 1:
            return None
        between.append(node)
        for value in node.inputs:
            if not value.name:
                continue
            if not view.is_constant(value):
                pending.append(value)
                continue
            axis = _unit_axis(view.shape(value), width)
            if axis is None:
                return None
            if axis < 0:
                constants[value.name] = axis
    own = {id(node) for node in between} | {id(nodes[site.output])}
    if not producers or any(id(reader) not in own for name in tensors for reader in view.tensors[name].outputs):
        return None
    if not _own_values(constants, producers.values(), between, view):
        return None
    ordered = sorted(producers.values(), key=lambda weight: list(makers).index(weight.sites[0].output))
    return Chain(
        tuple(weight.name for weight in ordered),
        consumer.name,
        width,
        frozenset(tensors),
        tuple(sorted(constants.items())),
    )


def _own_values(
    constants: Iterable[str], producers: Iterable[Weight], between: Sequence[gs.Node], view: GraphView
) -> bool:
    """Whether the values a unit go where their units go: what others read as well would stay, beside its narrower copy.

    A bias is laid out with its layer, so nothing but the node that adds it may read it.
    """
    biases = {maker.sites[0].bias.tensor for maker in producers if maker.sites[0].bias}
    for name in {*constants, *biases}:
        for origin in view.origins(view.tensors[name]):
            readers = list(view.final_readers(origin))
            if name in biases and len(readers) > 1:
                return False
            if name not in biases and not all(any(reader is node for node in between) for reader in readers):
                return False
    return True


def _unit_axis(shape: tuple[int, ...], width: int) -> int | None:
    """-1 for a constant with a value for each unit, 0 for one that is the same for all, None for any other."""
    if all(length == 1 for length in shape):
        return 0 if width > 1 or not shape else -1
    return -1 if shape[-1] == width and all(length == 1 for length in shape[:-1]) else None


def shared_inputs(weights: Iterable[Weight]) -> list[tuple[Weight, ...]]:
    """Weights that read one tensor along one axis in one graph, two or more at a time, by the order of the first."""
    readers: dict[tuple[object, ...], list[Weight]] = {}
    for weight in weights:
        site = weight.sites[0]
        if len(weight.sites) == 1 and site.plain:
            readers.setdefault((site.bodies, site.input, site.input_axis, weight.dtype), []).append(weight)
    return [tuple(members) for members in readers.values() if len(members) > 1]

"""Everything linear in a graph: sites grouped by the weight that they share, and refusals with their reasons.

Sites with one weight are one `Weight`: their moments add up and it is factored once. That holds for one initializer
that several nodes read, and for copies that an exporter made of a tied weight, plain or transposed, which are found by
their content after every site's weight has been laid out as `W [d_in, d_out]`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from onnxlr.protos import graphs as protos
from onnxlr.protos import tensors
from onnxlr.sites.base import INDEX_TYPES, Family, Refusal, Site
from onnxlr.sites.bodies import graphs, refusal, unseen
from onnxlr.sites.constants import GraphView
from onnxlr.sites.conv import Conv
from onnxlr.sites.conv_transpose import ConvTranspose
from onnxlr.sites.einsum import Einsum
from onnxlr.sites.front import Attention, FusedGemm, Recurrent
from onnxlr.sites.functions import in_functions
from onnxlr.sites.fused_conv import FusedConv
from onnxlr.sites.fused_matmul import FusedMatMul
from onnxlr.sites.gather import Gather
from onnxlr.sites.gemm import Gemm
from onnxlr.sites.macs import macs
from onnxlr.sites.matmul import MatMul
from onnxlr.sites.structure import Chain, find_chains, shared_inputs
from onnxlr.sites.unsupported import REASONS, matrices, unsupported
from onnxlr.surgery import open_graph

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnxlr.forms import Products, Side
    from onnxlr.model_io import Model

FAMILIES: dict[str, Family] = {
    op: family
    for family in (
        MatMul(),
        Gemm(),
        Einsum(),
        Gather(),
        Conv(),
        ConvTranspose(),
        FusedMatMul(),
        FusedGemm(),
        FusedConv(),
        Attention(),
        Recurrent(),
    )
    for op in family.ops
}
"""The family of every operator that can be compressed."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight `W [d_in, d_out]` and the sites that use it.

    `sources` are the stored constants it is read from (several where an exporter copied it), `parameters` their
    elements together. `macs` are those of all its sites for one sample, None where unknown; `rows` how many rows of one
    sample the first and the second product of a pair multiply. `needs_input` is set where the moments of its input
    matter even if its output is smaller: it ends a chain, or others read the same tensor. `strips` is how many rows of
    one sample the first product multiplies where the kernel is split.
    """

    name: str
    d_in: int
    d_out: int
    dtype: str
    sites: tuple[Site, ...]
    sources: tuple[str, ...]
    parameters: int
    macs: int | None
    rows: tuple[float, float] = (0, 0)
    needs_input: bool = False
    strips: float = 0

    @property
    def taps(self) -> int:
        """The columns of a kernel that all of its sites can have split into a column and a row; else 1."""
        kernels = {(site.kernel, site.taps) for site in self.sites}
        return self.sites[0].taps if len(kernels) == 1 else 1

    @property
    def in_strips(self) -> Weight:
        """The weight as a split of its kernel sees it: by its patches, and with the rows of its two products."""
        return replace(self, needs_input=True, rows=(self.strips, self.rows[1]))

    @property
    def shows_input(self) -> bool:
        """Whether moments can be gathered of its inputs: no table is among its sites."""
        return all(site.input_rows for site in self.sites)

    @property
    def observes_output(self) -> bool:
        """Whether moments are gathered of its outputs: they are the smaller side, and those of the input not needed.

        Where no tensor shows the input, they have to be.
        """
        smaller = not self.needs_input and all(site.observes_output for site in self.sites)
        return smaller or not self.shows_input

    @property
    def groups(self) -> int:
        """The number of its matrices [d_in, d_out], one of which each of its sites has as many of."""
        return self.sites[0].groups

    def macs_of(self, products: Products) -> float:
        """Multiply-accumulates of one sample with the weight, or each of its groups, stored as `products`."""
        rows = self.rows if len(products) == len(self.rows) else (self.rows[0],) * len(products)
        return self.groups * sum(n * d * e for n, (d, e) in zip(rows, products, strict=True))

    @property
    def block_sides(self) -> frozenset[Side]:
        """On which sides all of its sites can be written with an identity block."""
        return frozenset.intersection(*(site.block_sides for site in self.sites))

    def matches(self, pattern: str) -> bool:
        """Whether a shell pattern matches its own name, or the name or module of one of its sites."""
        names = {self.name, *(site.name for site in self.sites), *self.labels}
        return pattern in names or any(fnmatchcase(name, pattern) for name in names)

    @property
    def labels(self) -> tuple[str, ...]:
        """What people know its sites by."""
        return tuple(site.label for site in self.sites)


@dataclass(frozen=True, slots=True)
class Inventory:
    """A model's linear operators.

    Attributes
    ----------
    weights
        What can be compressed.
    refusals
        What cannot, and why.
    parameters
        Elements of all the model's weights: every constant but those of integer and boolean index types.
    macs
        Multiply-accumulates of one sample over all operators whose shapes are known; None without shapes.
    uncounted
        Names of the nodes that multiply but whose shapes are unknown, so that `macs` lacks them.
    chains
        Weights that make the hidden units of another, with that one.
    shared
        Names of weights that read one tensor, two or more at a time.
    nodes, view
        The graph that was searched: its nodes by their outputs, and its constants.
    """

    model: Model
    weights: tuple[Weight, ...]
    refusals: tuple[Refusal, ...]
    parameters: int
    macs: int | None
    uncounted: tuple[str, ...]
    chains: tuple[Chain, ...]
    shared: tuple[tuple[str, ...], ...]
    nodes: Mapping[str, gs.Node] = field(repr=False)
    view: GraphView = field(repr=False)

    def matrix(self, weight: Weight) -> NDArray[np.float64]:
        """`W [d_in, d_out]`, or [groups, d_in, d_out], float64, read from the model now."""
        return _matrix(weight.sites[0], self.nodes, self.view)

    def own_bias(self, site: Site) -> NDArray[np.float64] | None:
        """The constant vector [groups * d_out] that the site's own node adds to its output; None for an Add behind."""
        if site.bias is None or site.bias.reader != site.output:
            return None
        values = self.view.values(self.view.tensors[site.bias.tensor])
        return site.bias.scale * values.ravel().astype(np.float64)


def family_of(node: gs.Node) -> Family | None:
    """The family that can compress operators like `node`, if there is one."""
    family = FAMILIES.get(node.op)
    return family if family is not None and node.domain in family.domains else None


def by_output(graph: gs.Graph) -> dict[str, gs.Node]:
    """The nodes of a graph and of the bodies in it, by each of their outputs."""
    nodes = (node for scope, _ in graphs(graph) for node in scope.nodes)
    return {tensor.name: node for node in nodes for tensor in node.outputs if tensor.name}


def parameter_count(model: Model) -> int:
    """Elements of all constants that hold numbers rather than indices, shapes or flags; in bodies and functions too."""
    places = (model.proto.graph, *model.proto.functions)
    return sum(prod(t.dims) for place in places for t in tensors(place) if t.data_type not in INDEX_TYPES)


def take_inventory(model: Model, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Inventory:
    """Find every linear operator of `model`.

    Parameters
    ----------
    model
        The model; weights are read one at a time, to recognise copies.
    shapes
        Shapes of the tensors for one sample, by name, to count multiply-accumulates with.
    """
    graph = open_graph(model.proto)
    view = GraphView(model, graph)
    measured, shapes = shapes is not None, shapes or {}
    nodes = by_output(graph)

    modules = _torch_modules(model)
    sites: list[Site] = []
    refusals, in_functions_only = in_functions(model.proto, FAMILIES.keys() | REASONS.keys())
    placed = [(node, bodies) for scope, bodies in graphs(graph) for node in scope.nodes]
    for node, bodies in placed:
        family = family_of(node)
        found = family.find(node, view) if family is not None else unsupported(node, view)
        if isinstance(found, Site):
            found = refusal(bodies) or replace(
                found, module=modules.get(found.output), bodies=bodies, unseen=unseen(bodies, graph.opset)
            )
        if isinstance(found, Site):
            sites.append(found)
        elif found is not None:
            refusals.append(_refusal(node, found, view, shapes))

    weights = []
    for members, finite in _by_content(sites, nodes, view):
        sources = _sources(members, view)
        reason = _shared_with_others(members, sources, nodes, view) or _unobservable(members)
        if not finite:
            reason = "its weight holds values that are not finite, which no product can make"
        if reason is not None:
            refusals += [_refusal(nodes[site.output], reason, view, shapes) for site in members]
            continue
        counts = [macs(nodes[site.output], shapes) for site in members]
        first, rows = members[0], _rows(members, nodes, shapes)
        weights.append(
            Weight(
                name=min(sources),
                d_in=first.d_in,
                d_out=first.d_out,
                dtype=first.dtype,
                sites=tuple(members),
                sources=sources,
                parameters=sum(prod(view.shape(view.tensors[source])) for source in sources),
                macs=None if None in counts else round(first.groups * rows[0] * first.d_in * first.d_out),
                rows=rows,
                strips=sum(FAMILIES[site.op].strips(site, nodes[site.output], shapes) for site in members),
            )
        )
        refusals += [rest for site in members if (rest := _remaining(site, nodes[site.output], view, shapes))]

    chains = find_chains(weights, nodes, view)
    shared = shared_inputs(weights)
    seen = {chain.consumer for chain in chains} | {weight.name for members in shared for weight in members}

    # names of nodes need not be unique
    per_node = [(node.name or node.outputs[0].name, macs(node, shapes)) for node, _ in placed if node.outputs]
    return Inventory(
        model=model,
        weights=tuple(replace(weight, needs_input=weight.name in seen) for weight in weights),
        refusals=tuple(refusals),
        parameters=parameter_count(model),
        macs=sum(count for _, count in per_node if count is not None) if measured else None,
        uncounted=(*(name for name, count in per_node if count is None), *in_functions_only) if measured else (),
        chains=chains,
        shared=tuple(tuple(weight.name for weight in members) for members in shared),
        nodes=nodes,
        view=view,
    )


def _torch_modules(model: Model) -> dict[str, str]:
    """The innermost torch module of every node, by output, as torch's exporter leaves it in the node's metadata."""
    modules = {}
    for node in (node for scope in protos(model.proto.graph) for node in scope.node):
        for entry in node.metadata_props:
            if entry.key == "pkg.torch.onnx.name_scopes":
                try:
                    scopes = ast.literal_eval(entry.value)
                except (ValueError, SyntaxError):
                    continue
                if len(scopes) > 1 and scopes[-2]:
                    modules[node.output[0]] = str(scopes[-2])
    return modules


def _matrix(site: Site, nodes: Mapping[str, gs.Node], view: GraphView) -> NDArray[np.float64]:
    return FAMILIES[site.op].matrix(site, nodes[site.output], view.values(view.tensors[site.weight]))


def _by_content(sites: list[Site], nodes: Mapping[str, gs.Node], view: GraphView) -> Iterator[tuple[list[Site], bool]]:
    """Groups of sites with equal `W`, in the order of their first site, and whether all of `W` is finite."""
    groups: dict[tuple[tuple[int, ...], str, bytes], list[list[Site]]] = {}
    finite = {}
    for site in sites:
        matrix = _matrix(site, nodes, view)
        finite[site.output] = bool(np.isfinite(matrix).all())
        sample = matrix[..., :: max(1, site.d_in // 8), :: max(1, site.d_out // 8)].tobytes()
        candidates = groups.setdefault((matrix.shape, site.dtype, sample), [])
        for members in candidates:
            if np.array_equal(_matrix(members[0], nodes, view), matrix):
                members.append(site)
                break
        else:
            candidates.append([site])
    order = {site.output: index for index, site in enumerate(sites)}
    everything = [members for candidates in groups.values() for members in candidates]
    for members in sorted(everything, key=lambda members: order[members[0].output]):
        yield members, finite[members[0].output]


def _rows(
    members: list[Site], nodes: Mapping[str, gs.Node], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[float, float]:
    """Rows of one sample that the first and the second product of all sites together multiply; 0 where unknown."""
    counts = [FAMILIES[site.op].rows(site, nodes[site.output], shapes) for site in members]
    return sum(first for first, _ in counts), sum(second for _, second in counts)


def _sources(members: list[Site], view: GraphView) -> tuple[str, ...]:
    return tuple(sorted({source for site in members for source in view.origins(view.tensors[site.weight])}))


def _shared_with_others(
    members: list[Site], sources: tuple[str, ...], nodes: Mapping[str, gs.Node], view: GraphView
) -> str | None:
    """Why factoring would not make the stored weight go away: somebody else needs it too."""
    own = [nodes[site.output] for site in members]
    for source in sources:
        for reader in view.final_readers(source):
            if reader is None:
                return f"its weight {source!r} is also an output of the graph"
            if not any(reader is node for node in own):
                name = reader.name or (reader.outputs[0].name if reader.outputs else "?")
                reason = f"its weight {source!r} is also read by {reader.op} {name!r}, so a pair would only add to it"
                # tied the other way round, such as a table and an output head: no one pair is the best of both
                untied = ": a copy for each of them pays where both ranks are below half the break-even rank"
                inner = not any(reader is node for node in nodes.values())
                return reason + (untied if family_of(reader) is not None and not inner else "")
    return None


def _unobservable(members: list[Site]) -> str | None:
    """Why neither the input nor the output of all sites of a weight can be observed."""
    table = next((site for site in members if not site.input_rows), None)
    hidden = next((site for site in members if not site.shows_output), None)
    if table is None or hidden is None:
        return None
    return (
        f"Gather {table.name!r} shows only its output and {hidden.op} {hidden.name!r} of the same weight only its input"
    )


def _remaining(site: Site, node: gs.Node, view: GraphView, shapes: Mapping[str, tuple[int, ...]]) -> Refusal | None:
    """A refusal of the constant weight of a node that is no part of its site, where it has one."""
    family = FAMILIES[site.op]
    remaining = family.remaining(node)
    if remaining is None or not (sources := tuple(sorted(view.matrices(remaining[0])))):
        return None
    whole, own = macs(node, shapes), family.rows(site, node, shapes)[0] * site.d_in * site.d_out
    parameters = sum(prod(view.sources[source].dims) for source in sources)
    return Refusal(site.name, site.op, remaining[1], sources, parameters, None if whole is None else round(whole - own))


def _refusal(node: gs.Node, reason: str, view: GraphView, shapes: Mapping[str, tuple[int, ...]]) -> Refusal:
    weights = sorted(matrices(node, view))
    return Refusal(
        name=node.name or (node.outputs[0].name if node.outputs else "?"),
        op=node.op,
        reason=reason,
        sources=tuple(weights),
        parameters=sum(prod(view.sources[source].dims) for source in weights),
        macs=macs(node, shapes) if shapes else None,
    )

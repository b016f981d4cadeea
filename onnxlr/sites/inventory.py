"""Everything linear in a graph: sites grouped by the weight that they share, and refusals with their reasons.

Sites with one weight are one `Weight`: their moments add up and it is factored once. That holds for one initializer
that several nodes read, and for copies that an exporter made of a tied weight, plain or transposed, which are found by
their content after every site's weight has been laid out as `W [d_in, d_out]`.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from onnxlr.protos import graphs as protos
from onnxlr.protos import tensors
from onnxlr.sites.base import INDEX_TYPES, Refusal, Site
from onnxlr.sites.bodies import graphs, refusal, unseen
from onnxlr.sites.constants import GraphView
from onnxlr.sites.families import FAMILIES, by_output, family_of, matrix_of
from onnxlr.sites.functions import in_functions
from onnxlr.sites.macs import macs
from onnxlr.sites.structure import find_chains, shared_inputs
from onnxlr.sites.unsupported import REASONS, matrices, unsupported
from onnxlr.sites.weight import Inventory, Weight
from onnxlr.surgery import open_graph

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_graphsurgeon as gs

    from onnxlr.model_io import Model
    from onnxlr.sites.convolution import Convolution


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
            empty = "" if found.d_in * found.d_out else "its weight is empty"
            found = (
                empty
                or refusal(bodies)
                or replace(found, module=modules.get(found.output), bodies=bodies, unseen=unseen(bodies, graph.opset))
            )
        if isinstance(found, Site):
            sites.append(found)
        elif found is not None:
            refusals.append(_refusal(node, found, view, shapes))

    weights = []
    for members, finite in _with_heads(list(_by_content(sites, nodes, view)), nodes, view):
        sources = _sources(members, view)
        reason = _shared_with_others(members, sources, nodes, view) or _unobservable(members)
        if not finite:
            reason = "its weight holds values that are not finite, which no product can make"
        if reason is not None:
            refusals += [_refusal(nodes[site.output], reason, view, shapes) for site in members]
            continue
        # one that is unknown does not count, as its rows do not
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
                macs=round(first.groups * rows[0] * first.d_in * first.d_out)
                if counts.count(None) < len(counts)
                else None,
                rows=rows,
                convolutions=_convolutions(members, nodes, shapes),
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


def _by_content(sites: list[Site], nodes: Mapping[str, gs.Node], view: GraphView) -> Iterator[tuple[list[Site], bool]]:
    """Groups of sites with equal `W`, in the order of their first site, and whether all of `W` is finite."""
    groups: dict[tuple[tuple[int, ...], str, bytes], list[list[Site]]] = {}
    finite = {}
    for site in sites:
        matrix = matrix_of(site, nodes, view)
        finite[site.output] = bool(np.isfinite(matrix).all())
        sample = matrix[..., :: max(1, site.d_in // 8), :: max(1, site.d_out // 8)].tobytes()
        candidates = groups.setdefault((matrix.shape, site.dtype, sample), [])
        for members in candidates:
            if np.array_equal(matrix_of(members[0], nodes, view), matrix):
                members.append(site)
                break
        else:
            candidates.append([site])
    order = {site.output: index for index, site in enumerate(sites)}
    everything = [members for candidates in groups.values() for members in candidates]
    for members in sorted(everything, key=lambda members: order[members[0].output]):
        yield members, finite[members[0].output]


def _with_heads(
    groups: list[tuple[list[Site], bool]], nodes: Mapping[str, gs.Node], view: GraphView
) -> Iterator[tuple[list[Site], bool]]:
    """The same groups, but tables of embeddings with the output heads that read the same constant transposed."""
    heads = [members for members, _ in groups if all(map(_is_head, members))]
    tied: dict[int, list[list[Site]]] = {}
    for table, _ in groups:
        if any(site.input_rows for site in table):
            continue
        tied[id(table)] = [
            members
            for members in heads
            if _sources(members, view) == _sources(table, view)
            and np.array_equal(matrix_of(members[0], nodes, view).T, matrix_of(table[0], nodes, view))
        ]
    gone = {id(members) for own in tied.values() for members in own}
    for members, finite in groups:
        if id(members) in gone:
            continue
        # blocks would need features of the one use among those of the other
        turned = [
            replace(site, transposed=True, plain=False, block_sides=frozenset())
            for own in tied.get(id(members), ())
            for site in own
        ]
        yield [*members, *turned], finite


def _is_head(site: Site) -> bool:
    """Whether it multiplies rows on its left by one whole matrix."""
    return site.plain and site.layout == (-1, ()) and site.input_axis == site.output_axis == -1


def _rows(
    members: list[Site], nodes: Mapping[str, gs.Node], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[float, float]:
    """Rows of one sample that the first and the second product of all sites together multiply; 0 where unknown."""
    counts = [FAMILIES[site.op].rows(site, nodes[site.output], shapes) for site in members]
    return sum(first for first, _ in counts), sum(second for _, second in counts)


def _convolutions(
    members: list[Site], nodes: Mapping[str, gs.Node], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[Convolution, Convolution], ...]:
    """What pairs of all sites are run as; none where one of them is no convolution, as a weight has one unit."""
    if not all(site.kernel for site in members):
        return ()
    found = [FAMILIES[site.op].convolutions(site, nodes[site.output], shapes) for site in members]
    return tuple(pair for pair in found if pair is not None)


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
                untied = ": a copy for each of them pays where both ranks are below half the break-even rank"
                inner = not any(reader is node for node in nodes.values())
                return reason + (untied if family_of(reader) is not None and not inner else "")
    return None


def _unobservable(members: list[Site]) -> str | None:
    """Why neither the input nor the output of all sites of a weight can be observed."""
    table = next((site for site in members if not site.input_rows), None)
    hidden = next((site for site in members if not site.shows_output and not site.transposed), None)
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

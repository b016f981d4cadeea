"""Puts forms of weights into a graph: every site of a weight is replaced, everything else stays as it was.

No mathematics here. `lay_out` names and shapes the arrays that take a weight's place; `emit` puts nodes in place that
read them from whatever tensors `make` gives: constants for a compressed model, graph inputs for a trial of many ranks
on one graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxlr.data_file import DataFile
from onnxlr.errors import RangeError
from onnxlr.external_data import EXTERNAL_FROM
from onnxlr.model_io import from_proto
from onnxlr.protos import graphs as protos
from onnxlr.sites import FAMILIES, by_output
from onnxlr.sites.bodies import graphs
from onnxlr.sites.conv import halves
from onnxlr.sites.emit import Parts
from onnxlr.surgery import close_graph, open_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from onnxlr.forms import Index, Stored, Window
    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory, Site, Weight

    Make = Callable[[str, NDArray[Any]], gs.Tensor]


@dataclass(frozen=True, slots=True)
class SiteArrays:
    """What one site stores: arrays with their tensor names, as the graph reads them, and how they hang together.

    `first` is None for a dense weight; `bias` is as the graph adds it, or None.
    """

    site: Site
    stored: Stored
    first: tuple[str, NDArray[Any]] | None
    second: tuple[str, NDArray[Any]]
    bias: tuple[str, NDArray[Any]] | None


def lay_out(inventory: Inventory, weight: Weight, stored: Stored) -> list[SiteArrays]:
    """The arrays of every site of `weight`, in the dtype of the model.

    Sites that store the factors alike share one copy, and so do weights that share a first factor. Names depend on the
    weight and its sites alone, not on the rank.

    Raises
    ------
    RangeError
        A factor overflows the weight's dtype.
    """
    dtype = np.dtype(ml_dtypes.bfloat16) if weight.dtype == "bfloat16" else np.dtype(weight.dtype)
    layouts: list[tuple[object, ...]] = []
    named = partial(_free, taken=inventory.view.tensors)
    arrays = []
    for site in weight.sites:
        family = FAMILIES[site.op]
        if site.layout not in layouts:
            layouts.append(site.layout)
        suffix = f".{layouts.index(site.layout)}" if layouts.index(site.layout) else ""
        column, row = halves(site) if stored.taps > 1 else (site, site)
        first, second = None, family.stored(row, stored.second, reads_input=stored.first is None or stored.taps > 1)
        if stored.first is not None:
            first = _cast(family.stored(column, stored.first, reads_input=True), dtype, site)
        arrays.append(
            SiteArrays(
                site,
                stored,
                None if first is None else (named(f"{stored.shared or weight.name}.lr_first{suffix}"), first),
                (
                    named(f"{weight.name}.lr_{'kept' if first is None else 'second'}{suffix}"),
                    _cast(second, dtype, site),
                ),
                _bias(inventory, site, stored, dtype),
            )
        )
    return arrays


def _bias(inventory: Inventory, site: Site, stored: Stored, dtype: np.dtype[Any]) -> tuple[str, NDArray[Any]] | None:
    correction, name = stored.bias, _free(f"{site.output}.lr_bias", inventory.view.tensors)
    if site.bias is None:
        if correction is None:
            return None
        return name, _cast(FAMILIES[site.op].stored_bias(site, correction), dtype, site)
    if correction is None and stored.outputs is None:
        return None
    view = inventory.view
    old = view.values(view.tensors[site.bias.tensor])
    if stored.outputs is not None:
        old = np.take(old, stored.outputs, axis=site.output_axis)
    return name, _cast(old if correction is None else FAMILIES[site.op].corrected(site, old, correction), dtype, site)


def _cast(array: NDArray[Any], dtype: np.dtype[Any], site: Site) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype)
    if not np.isfinite(cast.astype(np.float64)).all():
        raise RangeError(f"a factor of {site.name!r} overflows {dtype}: leave it out with --exclude {site.name!r}")
    return cast


def put_in_place(graph: gs.Graph, site: Site, node: gs.Node, parts: Parts) -> None:
    """Write the form that `parts` make up into `graph`, in the place of the `node` of `site`."""
    FAMILIES[site.op].put(graph, site, node, parts)


def emit(
    inventory: Inventory,
    layouts: Iterable[SiteArrays],
    make: Make,
    folder: Path | None = None,
    put: Callable[[gs.Graph, Site, gs.Node, Parts], None] = put_in_place,
) -> Model:
    """A copy of the model in which the sites of `layouts` are stored so, in tensors that `make(name, array)` gives.

    External data are those in `folder`, or in that of the model. `put` writes what takes the place of a site's node.

    The last operator of a form keeps the name of the site's output tensor, and so do all other tensors.
    """
    model = inventory.model
    graph = open_graph(model.proto)
    nodes = by_output(graph)
    scopes = {bodies: scope for scope, bodies in graphs(graph)}
    given = [tensor for scope in scopes.values() for node in scope.nodes for tensor in node.outputs]
    made: dict[str, gs.Tensor] = {}
    hidden: dict[str, gs.Tensor] = {}

    def tensor(named: tuple[str, NDArray[Any]]) -> gs.Tensor:
        if named[0] not in made:
            made[named[0]] = make(*named)
        return made[named[0]]

    turned: dict[str, gs.Tensor] = {}

    def transposed(given: gs.Tensor) -> gs.Tensor:
        if given.name not in turned:
            turned[given.name] = gs.Variable(f"{given.name}/turned", dtype=given.dtype)
            attributes, outputs = {"perm": [1, 0]}, [turned[given.name]]
            graph.nodes.append(gs.Node("Transpose", f"{given.name}/turned", attributes, [given], outputs))
        return turned[given.name]

    placed = [_placed(arrays, tensor, transposed) for arrays in layouts]
    narrowed = _narrow(inventory, placed, nodes, tensor)
    for each in placed:
        site, bias = each.site, each.bias
        if bias is not None and site.bias is not None and site.bias.reader != site.output:
            adding = nodes[site.bias.reader]
            index = next(i for i, value in enumerate(adding.inputs) if value.name == site.bias.tensor)
            adding.inputs[index] = bias
            bias = None
        name = f"{each.shared or site.output}.lr_hidden"
        parts = Parts(
            each.first,
            each.second,
            bias,
            hidden.get(name) or gs.Variable(name, dtype=nodes[site.output].outputs[0].dtype),
            name in hidden,
            each.window,
            each.split,
            each.taps,
        )
        put(scopes[site.bodies], site, nodes[site.output], parts)
        hidden[name] = parts.hidden
    _name_anew(scopes.values(), [*given, *made.values()], set(inventory.view.tensors))
    result = close_graph(graph, model.proto)
    for scope in protos(result.graph):
        for value in [value for value in scope.value_info if value.name in narrowed]:
            scope.value_info.remove(value)
    return from_proto(result, folder or model.folder)


def _name_anew(scopes: Iterable[gs.Graph], named: Iterable[gs.Tensor], tensors: set[str]) -> None:
    """Other names for new nodes and tensors that the model has some of already; those of `named` and `tensors` stay.

    It may have been compressed before. onnxruntime loads no model with two nodes of a name, and of two constants one
    would take the other's place.
    """
    every = [node for scope in scopes for node in scope.nodes]
    done = set(map(id, named))
    nodes = {node.name for node in every if hasattr(node, "origin")}
    for node in (node for node in every if not hasattr(node, "origin")):
        if node.name:
            node.name = _free(node.name, nodes)
            nodes.add(node.name)
        constants = (tensor for tensor in node.inputs if isinstance(tensor, gs.Constant))
        for tensor in (*constants, *node.outputs):
            if id(tensor) not in done and not hasattr(tensor, "origin"):
                done.add(id(tensor))
                tensor.name = _free(tensor.name, tensors)
                tensors.add(tensor.name)


def _free(name: str, taken: Container[str]) -> str:
    while name in taken:
        name += "_"
    return name


@dataclass(frozen=True, slots=True)
class _Placed:
    """What `SiteArrays` holds, as tensors of the graph: the arrays themselves are gone."""

    site: Site
    first: gs.Tensor | None
    second: gs.Tensor
    bias: gs.Tensor | None
    window: Window | None
    split: tuple[int, int]
    taps: int
    shared: str | None
    inputs: Index | None


def _placed(
    arrays: SiteArrays,
    tensor: Callable[[tuple[str, NDArray[Any]]], gs.Tensor],
    transposed: Callable[[gs.Tensor], gs.Tensor],
) -> _Placed:
    stored = arrays.stored
    first, bias = (None if named is None else tensor(named) for named in (arrays.first, arrays.bias))
    second = tensor(arrays.second)
    if arrays.site.transposed and first is not None:  # (A B)^T = B^T A^T
        first, second = transposed(second), transposed(first)
    return _Placed(
        arrays.site, first, second, bias, stored.window, stored.split, stored.taps, stored.shared, stored.inputs
    )


def _narrow(
    inventory: Inventory,
    placed: Iterable[_Placed],
    nodes: Mapping[str, gs.Node],
    tensor: Callable[[tuple[str, NDArray[Any]]], gs.Tensor],
) -> set[str]:
    """Narrow what acts on hidden units between layers that lost some; the tensors that are narrower now."""
    kept = {each.site.input: each.inputs for each in placed if each.inputs is not None}
    narrowed: set[str] = set()
    weights = {weight.name: weight for weight in inventory.weights}
    view = inventory.view
    for chain in inventory.chains:
        units = kept.get(weights[chain.consumer].sites[0].input)
        if units is None:
            continue
        narrowed |= chain.tensors
        # the biases of the layers are laid out with the layers
        biases = {site.bias.tensor for name in chain.producers for site in weights[name].sites if site.bias}
        for name, axis in chain.constants:
            if name in biases:
                continue
            array = np.take(view.values(view.tensors[name]), units, axis=axis)
            for node in (nodes[reader.outputs[0].name] for reader in view.tensors[name].outputs):
                if node.outputs[0].name in chain.tensors:
                    index = next(i for i, value in enumerate(node.inputs) if value.name == name)
                    node.inputs[index] = tensor((_free(f"{name}.lr_kept", view.tensors), array))
    return narrowed


def rewrite(inventory: Inventory, stored: Mapping[str, Stored], folder: Path | None = None) -> Model:
    """The compressed model: every weight named in `stored` is stored so, all else is as it was.

    With `folder` its weights are external data in a new folder there, and one at a time passes through memory.

    Raises
    ------
    RangeError
        A factor overflows the weight's dtype.
    OutputError
        `folder` cannot be written.
    """
    weights = [weight for weight in inventory.weights if weight.name in stored]
    layouts = (arrays for weight in weights for arrays in lay_out(inventory, weight, stored[weight.name]))
    if not weights:
        return inventory.model
    if folder is None:
        return emit(inventory, layouts, gs.Constant)
    with DataFile(folder, beside=inventory.model) as data:

        def make(name: str, array: NDArray[Any]) -> gs.Tensor:
            small = array.nbytes < EXTERNAL_FROM
            return gs.Constant(name, array if small else LazyValues(data.put(name, array)))

        return emit(inventory, layouts, make, data.folder)


def copies(weight: Weight) -> int:
    """How many copies of its factors the sites of a weight need."""
    return len({site.layout for site in weight.sites})


def new_biases(inventory: Inventory, weight: Weight) -> int:
    """How many vectors [groups * d_out] a correction of the bias adds to the model; never too few.

    A bias that other sites share is counted as if it stayed: whether it goes depends on what becomes of them.
    """
    return sum(_bias_is_new(inventory, site) for site in weight.sites) if weight.corrected else 0


def _bias_is_new(inventory: Inventory, site: Site) -> bool:
    if site.bias is None:
        return True
    view = inventory.view
    origins = view.origins(view.tensors[site.bias.tensor])
    return any(sum(1 for _ in view.final_readers(origin)) > 1 for origin in origins)

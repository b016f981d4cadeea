"""Puts factors into a graph: every site of a factored weight becomes a pair, everything else stays as it was.

No mathematics here. `lay_out` names and shapes the arrays of a weight's pairs; `emit` lets the site's family put the
nodes in place, reading the arrays from whatever tensors `make` gives: constants for a compressed model, graph inputs
for a trial of many ranks on one graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from onnxlr.errors import OnnxlrError
from onnxlr.model_io import from_proto
from onnxlr.sites import FAMILIES, Pair
from onnxlr.surgery import close_graph, open_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from numpy.typing import NDArray

    from onnxlr.factorize import Factors
    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory, Site, Weight

    Make = Callable[[str, NDArray[Any]], gs.Tensor]


@dataclass(frozen=True, slots=True)
class SiteArrays:
    """The stored arrays of one site's pair, each with its tensor name; the bias as the graph adds it, or None."""

    site: Site
    first: tuple[str, NDArray[Any]]
    second: tuple[str, NDArray[Any]]
    bias: tuple[str, NDArray[Any]] | None


def lay_out(inventory: Inventory, weight: Weight, factors: Factors) -> list[SiteArrays]:
    """The arrays of every site of `weight`, in the dtype of the model.

    Sites that store the factors alike share one copy. Names depend on the weight and its sites alone, not on the rank.

    Raises
    ------
    OnnxlrError
        A factor overflows the weight's dtype.
    """
    dtype = np.dtype(ml_dtypes.bfloat16) if weight.dtype == "bfloat16" else np.dtype(weight.dtype)
    layouts: list[tuple[int, int]] = []
    arrays = []
    for site in weight.sites:
        node, family = inventory.nodes[site.output], FAMILIES[site.op]
        first, second = family.stored(site, node, factors.first, factors.second)
        layout = (site.output_axis, site.leading_ones)
        if layout not in layouts:
            layouts.append(layout)
        suffix = f".{layouts.index(layout)}" if layouts.index(layout) else ""
        arrays.append(
            SiteArrays(
                site,
                (f"{weight.name}.lr_first{suffix}", _cast(first, dtype, site)),
                (f"{weight.name}.lr_second{suffix}", _cast(second, dtype, site)),
                None if factors.bias is None else _corrected_bias(inventory, site, factors.bias, dtype),
            )
        )
    return arrays


def _corrected_bias(
    inventory: Inventory, site: Site, correction: NDArray[Any], dtype: np.dtype[Any]
) -> tuple[str, NDArray[Any]]:
    if site.bias is None:
        shaped = FAMILIES[site.op].stored_bias(site, inventory.nodes[site.output], correction)
        return f"{site.output}.lr_bias", _cast(shaped, dtype, site)
    view = inventory.view
    old = view.values(view.tensors[site.bias.tensor])
    new = old.astype(np.float64) + correction.reshape(old.shape) / site.bias.scale
    return f"{site.output}.lr_bias", _cast(new, dtype, site)


def _cast(array: NDArray[Any], dtype: np.dtype[Any], site: Site) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype)
    if not np.isfinite(cast.astype(np.float64)).all():
        raise OnnxlrError(f"a factor of {site.name!r} overflows {dtype}: leave it out with --exclude {site.name!r}")
    return cast


def emit(inventory: Inventory, layouts: Iterable[SiteArrays], make: Make) -> Model:
    """A copy of the model in which every site of `layouts` is a pair whose tensors `make(name, array)` gives.

    The second operator of a pair keeps the name of the site's output tensor, and so do all other tensors.
    """
    model = inventory.model
    graph = open_graph(model.proto)
    nodes = {node.outputs[0].name: node for node in graph.nodes if node.outputs}
    names = set(graph.tensors())
    made: dict[str, gs.Tensor] = {}

    def tensor(named: tuple[str, NDArray[Any]]) -> gs.Tensor:
        if named[0] not in made:
            made[named[0]] = make(*named)
        return made[named[0]]

    for arrays in layouts:
        site = arrays.site
        bias = None if arrays.bias is None else tensor(arrays.bias)
        if bias is not None and site.bias is not None and site.bias.reader != site.output:
            adding = nodes[site.bias.reader]
            index = next(i for i, value in enumerate(adding.inputs) if value.name == site.bias.tensor)
            adding.inputs[index] = bias
            bias = None
        hidden = f"{site.output}.lr_hidden"
        while hidden in names:  # left by an earlier compression of the same model
            hidden += "_"
        pair = Pair(tensor(arrays.first), tensor(arrays.second), bias, hidden)
        FAMILIES[site.op].emit(graph, site, nodes[site.output], pair)
    return from_proto(close_graph(graph, model.proto), model.folder)


def rewrite(inventory: Inventory, factors: Mapping[str, Factors]) -> Model:
    """The compressed model: every weight named in `factors` becomes its pair, all else is as it was.

    Raises
    ------
    OnnxlrError
        A factor overflows the weight's dtype.
    """
    layouts = [
        arrays
        for weight in inventory.weights
        if weight.name in factors
        for arrays in lay_out(inventory, weight, factors[weight.name])
    ]
    return emit(inventory, layouts, gs.Constant) if layouts else inventory.model


def pair_parameters(inventory: Inventory, weight: Weight, rank: int, *, corrected: bool) -> int:
    """Elements that the pairs of `weight` store at `rank`, with new biases where `corrected`; never too few.

    A bias that other sites share is counted as if it stayed: whether it goes depends on what becomes of them.
    """
    layouts = {(site.output_axis, site.leading_ones) for site in weight.sites}
    count = len(layouts) * rank * (weight.d_in + weight.d_out)
    if corrected:
        count += sum(weight.d_out for site in weight.sites if _bias_is_new(inventory, site))
    return count


def _bias_is_new(inventory: Inventory, site: Site) -> bool:
    if site.bias is None:
        return True
    view = inventory.view
    origins = view.origins(view.tensors[site.bias.tensor])
    return any(sum(1 for _ in view.final_readers(origin)) > 1 for origin in origins)

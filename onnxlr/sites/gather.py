"""Gather of rows of a constant table: an embedding.

A table `W [V, d]` is a linear layer `y = x W` whose rows `x` are one-hot, so nothing of the size `V x V` need be
formed: the moments of what is gathered are `W^T diag(counts) W [d, d]` (and rows that were never gathered count a
little, see `onnxlr.probes.UNSEEN`). The pair gathers rows of `A [V, r]` and
multiplies them by `B [r, d]`; only the second product costs anything. No tensor shows `x`, indices stand for it.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxlr.rows import Rows
from onnxlr.sites.base import BLOCKS_SINCE, FLOATING, INDEX_DTYPES, Product, Site, bias_behind

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.emit import Operands


class Gather(Product):
    """The operator Gather."""

    ops = frozenset({"Gather"})
    adds_bias = False

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        table, indices = node.inputs
        if not view.is_constant(table):
            return view.refusal(table) if view.is_floating(table) else None
        shape, dtype = view.shape(table), view.dtype(table)
        if len(shape) < 2 or dtype in INDEX_DTYPES:
            return None
        if dtype not in FLOATING:
            return f"its table has the type {dtype}"
        if view.graph.opset < 7:
            return f"opset {view.graph.opset} broadcasts an Add by an older rule: convert the model to 7 or newer"
        if view.is_constant(indices):
            return "its indices are constant: fold constants first"
        axis = node.attrs.get("axis", 0)
        if axis % len(shape) != 0:
            return f"it gathers along axis {axis}: only rows of a table, along axis 0, are a linear layer"
        if len(shape) != 2:
            return f"its table has {len(shape)} axes, {list(shape)}: expected rows and columns"
        output = node.outputs[0]
        return Site(
            name=node.name or output.name,
            op=node.op,
            output=output.name,
            input=indices.name,
            weight=table.name,
            d_in=shape[0],
            d_out=shape[1],
            dtype=dtype,
            input_rows=(),
            output_rows=(Rows((-1,)),),
            bias=bias_behind(output, (shape[1],), view),
            layout=(-1, ()),
            block_sides=frozenset({"output"} if view.graph.opset >= BLOCKS_SINCE else ()),
        )

    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        return stored.astype(np.float64)

    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        return matrix

    def stored_bias(self, site: Site, bias: NDArray[Any]) -> NDArray[Any]:
        return bias

    def rows(self, site: Site, node: gs.Node, shapes: Mapping[str, tuple[int, ...]]) -> tuple[float, float]:
        return 0, prod(shapes[site.input]) if site.input in shapes else 0

    def addend(self, node: gs.Node) -> gs.Tensor | None:
        return None

    def product(self, site: Site, node: gs.Node, operands: Operands) -> gs.Node:
        return operands.node("Gather", {"axis": 0}, left=True) if operands.read(site) else operands.node("MatMul")

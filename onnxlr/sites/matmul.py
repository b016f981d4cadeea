"""MatMul with a constant on either side, one matrix or a batch of them.

On the right, `y = x W`: features lie on the last axis, and the pair is `MatMul(MatMul(x, A), B)`. On the left,
`y = W' x` with `W' = W^T`: features lie on axis -2, and the pair is `MatMul(B^T, MatMul(A^T, x))`. An Add of a constant
vector behind the MatMul is its bias.

A weight `[*, K, N]` has a matrix for each index into its leading axes (the experts of a layer): they are its groups,
and the factors `A [*, K, r]` and `B [*, r, N]` have the same leading axes. Data are broadcast against them; without
such an axis, or of length 1 there, serve all groups. Leading axes of length 1 are kept, since they count towards the
rank of the output.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxlr.rows import side_by_side
from onnxlr.sites.base import BLOCKS_SINCE, FLOATING, Product, Site, bias_behind

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnxlr.rows import Rows
    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.emit import Operands


class MatMul(Product):
    """The operator MatMul."""

    ops = frozenset({"MatMul"})
    adds_bias = False

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        if len(node.inputs) != 2:
            return "it has not two inputs"
        left, right = (view.is_constant(tensor) for tensor in node.inputs)
        if left and right:
            return "both of its operands are constant: fold constants first"
        if not (left or right):
            return view.refusal(node.inputs[1]) or view.refusal(node.inputs[0])
        weight, data = node.inputs if left else reversed(node.inputs)
        shape, dtype = view.shape(weight), view.dtype(weight)
        if dtype not in FLOATING:
            return f"its weight has the type {dtype}"
        if view.graph.opset < 7:
            return f"opset {view.graph.opset} broadcasts an Add by an older rule: convert the model to 7 or newer"
        if len(shape) < 2:
            return "its weight is a vector"
        leading, several = shape[:-2], prod(shape[:-2]) > 1
        if (left or several) and (view.rank(data) or 1) < 2:
            kind = "on the left" if left else "a batch of matrices"
            return f"its weight is {kind} and the rank of its input is unknown or 1: run shape inference first"
        axis = -2 if left else -1
        d_in, d_out = shape[-2:][:: -1 if left else 1]
        output = node.outputs[0]
        rows = side_by_side((axis,), {i - len(shape): length for i, length in enumerate(leading) if length > 1})
        return Site(
            name=node.name or output.name,
            op=node.op,
            output=output.name,
            input=data.name,
            weight=weight.name,
            d_in=d_in,
            d_out=d_out,
            dtype=dtype,
            input_rows=tuple(_own_parts(each, view.lengths(data)) for each in rows),
            output_rows=rows,
            bias=bias_behind(output, _on_output(leading, d_out, axis), view),
            leading=leading,
            layout=(axis, leading),
            plain=len(shape) == 2,
            block_sides=frozenset({"input", "output"} if view.graph.opset >= BLOCKS_SINCE and not several else ()),
        )

    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        groups = (site.groups,) if site.groups > 1 else ()
        return _turned(site, stored.reshape(*groups, *stored.shape[-2:]).astype(np.float64))

    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        turned = _turned(site, matrix)
        leading = site.leading if reads_input or site.groups > 1 else ()
        return turned.reshape(*leading, *turned.shape[-2:])

    def stored_bias(self, site: Site, bias: NDArray[Any]) -> NDArray[Any]:
        if site.groups > 1:
            return bias.reshape(_on_output(site.leading, site.d_out, site.output_axis))
        return bias[:, None] if site.output_axis == -2 else bias

    def addend(self, node: gs.Node) -> gs.Tensor | None:
        return None

    def product(self, site: Site, node: gs.Node, operands: Operands) -> gs.Node:
        return operands.node("MatMul", left=site.input_axis == -2)


def _turned(site: Site, matrix: NDArray[Any]) -> NDArray[Any]:
    return np.swapaxes(matrix, -1, -2) if site.input_axis == -2 else matrix


def _on_output(leading: tuple[int, ...], d_out: int, axis: int) -> tuple[int, ...]:
    return (*leading, 1, d_out) if axis == -1 else (*leading, d_out, 1)


def _own_parts(rows: Rows, lengths: tuple[int | None, ...] | None) -> Rows:
    """The same without parts of axes that data of these lengths lack: moments taken once serve all groups."""
    if lengths is None:
        return rows
    return replace(
        rows, parts=tuple(part for part in rows.parts if -part.axis <= len(lengths) and lengths[part.axis] != 1)
    )

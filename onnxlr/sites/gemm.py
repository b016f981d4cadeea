"""Gemm with a constant on either side: `y = alpha op(a) op(b) + beta c`, `op` the transposition that is asked for.

With the weight on the right, `W = alpha op(b)`: the pair is `Gemm(Gemm(op(x), A), B, c)`. With the weight on the left,
`W = alpha op(a)^T`: features lie on the rows, and the pair is `Gemm(B^T, Gemm(A^T, op(x)), c)`. `alpha` goes into the
first factor; `beta` and `c` stay with the second, and where there was no `c`, the correction of the bias is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from onnxlr.rows import Rows
from onnxlr.sites.base import BLOCKS_SINCE, FLOATING, Bias, Product, Site

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnxlr.forms import Side
    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.emit import Operands


class Gemm(Product):
    """The operator Gemm."""

    ops = frozenset({"Gemm"})
    adds_bias = True
    op: ClassVar = "Gemm"
    """What computes a product that MatMul cannot."""

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        left, right = (view.is_constant(tensor) for tensor in node.inputs[:2])
        if left and right:
            return "both of its operands are constant: fold constants first"
        if not (left or right):
            return view.refusal(node.inputs[1]) or view.refusal(node.inputs[0])
        weight, data = node.inputs[:2] if left else reversed(node.inputs[:2])
        dtype = view.dtype(weight)
        if dtype not in FLOATING:
            return f"its weight has the type {dtype}"
        if node.attrs.get("alpha", 1.0) == 0.0:
            return "it multiplies by alpha = 0"
        weight_flipped = bool(node.attrs.get("transA" if left else "transB", 0))
        data_flipped = bool(node.attrs.get("transB" if left else "transA", 0))
        obstacle = self.obstacle(node, view, left=left, flipped=data_flipped)
        if obstacle is not None:
            return obstacle
        rows, columns = view.shape(weight)[:: -1 if weight_flipped else 1]
        d_in, d_out = (columns, rows) if left else (rows, columns)
        output = node.outputs[0]
        addend = _addend(node)
        bias = _vector_addend(node, addend, d_out, -2 if left else -1, view)
        return Site(
            name=node.name or output.name,
            op=node.op,
            output=output.name,
            input=data.name,
            weight=weight.name,
            d_in=d_in,
            d_out=d_out,
            dtype=dtype,
            input_rows=(Rows((-1 if left == data_flipped else -2,)),),
            output_rows=(Rows((-2 if left else -1,)),),
            bias=bias,
            opaque_addend=addend is not None and bias is None,
            layout=(-2 if left else -1, ()),
            plain=not data_flipped,
            block_sides=_block_sides(node, view, flipped=data_flipped),
        )

    def obstacle(self, node: gs.Node, view: GraphView, *, left: bool, flipped: bool) -> str | None:
        """Why a node cannot be a site that has its weight on the `left` and its data transposed if `flipped`."""
        if view.graph.opset < 7:
            return f"opset {view.graph.opset} broadcasts its addend by an older rule: convert the model to 7 or newer"
        if flipped and view.graph.opset < 11:
            return f"it transposes its input at opset {view.graph.opset}: convert the model to opset 11 or newer"
        return None

    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        left = on_left(site)
        flipped = bool(node.attrs.get("transA" if left else "transB", 0))
        matrix = float(node.attrs.get("alpha", 1.0)) * stored.astype(np.float64)
        return matrix.T if flipped != left else matrix

    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        return matrix.T if on_left(site) else matrix

    def stored_bias(self, site: Site, bias: NDArray[Any]) -> NDArray[Any]:
        return bias[:, None] if on_left(site) else bias

    def addend(self, node: gs.Node) -> gs.Tensor | None:
        return _addend(node)

    def product(self, site: Site, node: gs.Node, operands: Operands) -> gs.Node:
        left = on_left(site)
        flip = "transB" if left else "transA"
        attributes = {flip: 1} if node.attrs.get(flip, 0) and operands.read(site) else {}
        # a correction that is the only addend is not what the operator's beta was for
        if operands.addend is not None and "beta" in node.attrs and _addend(node) is not None:
            attributes["beta"] = node.attrs["beta"]
        # without its addend a Gemm exists from opset 11 on only; MatMul is the same operator wherever it can be had
        if operands.addend is None and not attributes:
            return operands.node("MatMul", left=left)
        return operands.node(self.op, attributes, left=left, domain=node.domain)


def on_left(site: Site) -> bool:
    """Whether the weight is on the left, so that the features of the output lie on its rows."""
    return site.layout[0] == -2


def _block_sides(node: gs.Node, view: GraphView, *, flipped: bool) -> frozenset[Side]:
    sides: set[Side] = set()
    if view.graph.opset >= BLOCKS_SINCE:
        if not flipped:
            sides.add("input")
        # the addend of a block on the output side is added behind its Concat, as it is
        if _addend(node) is None or node.attrs.get("beta", 1.0) == 1.0:
            sides.add("output")
    return frozenset(sides)


def _addend(node: gs.Node) -> gs.Tensor | None:
    present = len(node.inputs) > 2 and node.inputs[2].name and node.attrs.get("beta", 1.0) != 0.0
    return node.inputs[2] if present else None


def _vector_addend(node: gs.Node, addend: gs.Tensor | None, d_out: int, axis: int, view: GraphView) -> Bias | None:
    if addend is None or not view.is_constant(addend):
        return None
    shape = view.shape(addend)
    if len(shape) >= -axis and shape[axis] == d_out and int(np.prod(shape)) == d_out:
        return Bias(addend.name, float(node.attrs.get("beta", 1.0)), node.outputs[0].name)
    return None

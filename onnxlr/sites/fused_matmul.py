"""FusedMatMul of com.microsoft (once TransposeMatMul): `y = alpha op(a) op(b)`, `op` the transposition asked for.

A Gemm without an addend whose data may have more axes, the last two of which may be turned. `alpha` goes into the first
factor. The first product is a FusedMatMul where the data have to be turned, all others are MatMuls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxlr.rows import Rows
from onnxlr.sites.base import FLOATING, MICROSOFT, Site, bias_behind
from onnxlr.sites.gemm import Gemm

if TYPE_CHECKING:
    from onnxlr.sites.constants import GraphView


class FusedMatMul(Gemm):
    """FusedMatMul and TransposeMatMul, which lay a weight out as a Gemm does."""

    ops = frozenset({"FusedMatMul", "TransposeMatMul"})
    domains = MICROSOFT
    adds_bias = False

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        left, right = (view.is_constant(tensor) for tensor in node.inputs)
        if left and right:
            return "both of its operands are constant: fold constants first"
        if not (left or right):
            return view.refusal(node.inputs[1]) or view.refusal(node.inputs[0])
        weight, data = node.inputs if left else reversed(node.inputs)
        shape, dtype = view.shape(weight), view.dtype(weight)
        if dtype not in FLOATING:
            return f"its weight has the type {dtype}"
        if len(shape) != 2:
            return f"its weight has {len(shape)} axes, {list(shape)}: compress before fusing"
        if node.attrs.get("alpha", 1.0) == 0.0:
            return "it multiplies by alpha = 0"
        if any(node.attrs.get(name, 0) for name in ("transBatchA", "transBatchB")):
            return "it turns the axes of its batch: compress before fusing"
        flipped = bool(node.attrs.get("transB" if left else "transA", 0))
        if (left or flipped) and (view.rank(data) or 1) < 2:
            return "the rank of its input is unknown or 1: run shape inference first"
        rows, columns = shape[:: -1 if node.attrs.get("transA" if left else "transB", 0) else 1]
        d_in, d_out = (columns, rows) if left else (rows, columns)
        axis = -2 if left else -1
        output = node.outputs[0]
        return Site(
            name=node.name or output.name,
            op=node.op,
            output=output.name,
            input=data.name,
            weight=weight.name,
            d_in=d_in,
            d_out=d_out,
            dtype=dtype,
            input_rows=(Rows((-1 if left == flipped else -2,)),),
            output_rows=(Rows((axis,)),),
            bias=bias_behind(output, (d_out, 1) if left else (d_out,), view),
            layout=(axis, ()),
            plain=not flipped,
        )

    def addend(self, node: gs.Node) -> gs.Tensor | None:
        return None

    def product(
        self,
        site: Site,
        node: gs.Node,
        data: gs.Tensor,
        weight: gs.Tensor,
        output: gs.Tensor,
        name: str,
        addend: gs.Tensor | None = None,
    ) -> gs.Node:
        left = site.output_axis == -2
        operands = [weight, data] if left else [data, weight]
        if site.plain or data.name != site.input:
            return gs.Node("MatMul", name, inputs=operands, outputs=[output])
        turned = {"transB" if left else "transA": 1}
        return gs.Node(node.op, name, attrs=turned, inputs=operands, outputs=[output], domain=node.domain)

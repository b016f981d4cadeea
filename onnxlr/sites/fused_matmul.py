"""FusedMatMul of com.microsoft (once TransposeMatMul): `y = alpha op(a) op(b)`, `op` the transposition asked for.

A Gemm without an addend whose data may have more axes, the last two of which may be turned. `alpha` goes into the first
factor. The first product is a FusedMatMul where the data have to be turned, all others are MatMuls.

FusedMatMulActivation, of DirectML, applies an activation to the product: `y = f(x W)` becomes `h = x A, y = f(h B)`. No
tensor shows the product, and it has no place for a correction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from onnxlr.sites.base import MICROSOFT, Site, bias_behind
from onnxlr.sites.emit import Operands
from onnxlr.sites.gemm import Gemm, on_left

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.emit import Parts


class FusedMatMul(Gemm):
    """FusedMatMul and TransposeMatMul, which lay a weight out as a Gemm does."""

    ops = frozenset({"FusedMatMul", "TransposeMatMul"})
    domains = MICROSOFT
    adds_bias = False
    op = "FusedMatMul"

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        found = super().find(node, view)
        if not isinstance(found, Site):
            return found
        lengths = (found.d_out, 1) if on_left(found) else (found.d_out,)
        return replace(found, bias=bias_behind(node.outputs[0], lengths, view))

    def obstacle(self, node: gs.Node, view: GraphView, *, left: bool, flipped: bool) -> str | None:
        weight, data = node.inputs if left else reversed(node.inputs)
        shape = view.shape(weight)
        if view.graph.opset < 7:
            return f"opset {view.graph.opset} broadcasts an Add by an older rule: convert the model to 7 or newer"
        if len(shape) != 2:
            return f"its weight has {len(shape)} axes, {list(shape)}: compress before fusing"
        if any(node.attrs.get(name, 0) for name in ("transBatchA", "transBatchB")):
            return "it turns the axes of its batch: compress before fusing"
        if (left or flipped) and (view.rank(data) or 1) < 2:
            return "the rank of its input is unknown or 1: run shape inference first"
        return None


class FusedMatMulActivation(FusedMatMul):
    """FusedMatMulActivation, which stays and multiplies by the second factor."""

    ops = frozenset({"FusedMatMulActivation"})
    corrects = False

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        found = super().find(node, view)
        if not isinstance(found, Site):
            return found
        return replace(found, output_rows=(), bias=None, plain=False, block_sides=frozenset())

    def put(self, graph: gs.Graph, site: Site, node: gs.Node, parts: Parts) -> None:
        assert parts.first is not None
        assert parts.hidden is not None
        data, second = node.inputs[on_left(site)], [parts.hidden, parts.second]
        graph.nodes.append(self.product(site, node, Operands(data, parts.first, parts.hidden, f"{site.name}/first")))
        node.attrs.update(alpha=1.0, transA=0, transB=0)
        node.inputs[0], node.inputs[1] = reversed(second) if on_left(site) else second

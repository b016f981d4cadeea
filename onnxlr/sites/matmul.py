"""MatMul with a constant on either side.

On the right, `y = x W`: features lie on the last axis, and the pair is `MatMul(MatMul(x, A), B)`. On the left,
`y = W' x` with `W' = W^T`: features lie on axis -2, and the pair is `MatMul(B^T, MatMul(A^T, x))`. Leading axes of
length 1 of the weight are kept, since they count towards the rank of the output. An Add of a constant vector behind
the MatMul is its bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxlr.rows import Rows
from onnxlr.sites.base import BLOCKS_SINCE, FLOATING, Bias, Family, Site

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxlr.sites.constants import GraphView


class MatMul(Family):
    """The operator MatMul."""

    ops = frozenset({"MatMul"})
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
        if view.graph.opset < 7:
            return f"opset {view.graph.opset} broadcasts an Add by an older rule: convert the model to 7 or newer"
        if len(shape) < 2:
            return "its weight is a vector"
        if any(length != 1 for length in shape[:-2]):
            return f"its weight is a batch of matrices, {list(shape)}: not supported yet"
        if left and (view.rank(data) or 1) < 2:
            return "its weight is on the left and the rank of its input is unknown or 1: run shape inference first"
        axis = -2 if left else -1
        d_in, d_out = shape[-2:][:: -1 if left else 1]
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
            input_rows=(Rows((axis,)),),
            output_rows=(Rows((axis,)),),
            bias=_added_vector(output, d_out, axis, view),
            leading_ones=len(shape) - 2,
            layout=(axis, len(shape) - 2),
            plain=len(shape) == 2,
            block_sides=frozenset({"input", "output"} if view.graph.opset >= BLOCKS_SINCE else ()),
        )

    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        matrix = stored.reshape(stored.shape[-2:]).astype(np.float64)
        return matrix.T if site.input_axis == -2 else matrix

    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        turned = matrix.T if site.input_axis == -2 else matrix
        return turned.reshape((1,) * site.leading_ones + turned.shape) if reads_input else turned

    def stored_bias(self, site: Site, bias: NDArray[Any]) -> NDArray[Any]:
        return bias[:, None] if site.output_axis == -2 else bias

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
        left = site.input_axis == -2
        return gs.Node("MatMul", name, inputs=[weight, data] if left else [data, weight], outputs=[output])


def _added_vector(output: gs.Tensor, d_out: int, axis: int, view: GraphView) -> Bias | None:
    if len(output.outputs) != 1 or output.name in view.graph_outputs or output.outputs[0].op != "Add":
        return None
    add = output.outputs[0]
    other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
    if other is output or not view.is_constant(other):
        return None
    shape = view.shape(other)
    along_features = len(shape) >= -axis and shape[axis] == d_out and int(np.prod(shape)) == d_out
    return Bias(other.name, 1.0, add.outputs[0].name) if along_features else None

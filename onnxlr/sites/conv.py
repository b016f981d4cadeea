"""Conv of one, two or three spatial axes: a pair is the convolution to `r` channels, then one of 1 x 1.

At every position of the output, `x [C_in * prod(kernel)]` is what the kernel covers, channels first, so that
`W [d_in, d_out]` is the kernel `[C_out, C_in, ...]` with its axes flattened and turned. `A` keeps the node's strides,
pads and dilations and is a kernel `[r, C_in, ...]`; `B` is one of 1 x 1, `[C_out, r, 1, ...]`, and takes the bias. With
groups there is a matrix for each, of `C_in / groups` and `C_out / groups` channels, and one rank for all of them.

A kernel of kh x kw can also be split into one column, then one row: `A [C_in * kh, r]` is a kernel `[r, C_in, kh, 1]`
with the strides, pads and dilations of the first axis, `B [r * kw, C_out]` one `[C_out, r, 1, kw]` with those of the
second. What the first multiplies are the strips of the input at the rows of the output and at all columns of the input.

The output shows `y` with fewer numbers than the kernel covers, so its moments are gathered wherever they suffice.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxlr.rows import Part, Patches, Rows
from onnxlr.sites.base import BLOCKS_SINCE, FLOATING, Bias, Product, Site
from onnxlr.sites.convolution import Convolution, along
from onnxlr.sites.emit import emit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from onnxlr.forms import Side
    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.emit import Operands, Parts

DEPTHWISE = (
    "depthwise: every group reads a single channel, so each of its kernels has a rank of 1 or is thinner than it"
)


class Conv(Product):
    """The operator Conv."""

    ops = frozenset({"Conv"})
    adds_bias = True
    multiplies: ClassVar[str] = "Conv"
    """The operator that the first product of a pair is."""

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        weight, refusal = node.inputs[1], refused(node, view)
        if refusal is not None or not view.is_constant(weight):
            return refusal
        channels, width, *kernel = view.shape(weight)
        groups = int(node.attrs.get("group", 1))
        if groups > 1 and width == 1:
            return DEPTHWISE
        if groups < 1 or channels % groups:
            return f"its {channels} output channels do not fall into {groups} groups"
        patches = patches_of(node, tuple(kernel))
        single = not any(patches.pads) and all(step == 1 for step in (*kernel, *patches.strides))
        return replace(
            site_of(node, view, width, channels // groups, patches),
            input_rows=tuple(Rows((1,), part, None if single else patches) for part in channel_parts(groups)),
            taps=kernel[1] if len(kernel) == 2 and min(kernel) > 1 else 1,
            block_sides=_block_sides(view, groups, single=single),
        )

    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        flat = stored.astype(np.float64).reshape(site.groups, site.d_out, site.d_in).swapaxes(1, 2)
        return flat if site.groups > 1 else flat[0]

    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        return as_kernel(matrix, site.kernel if reads_input else (1,) * len(site.kernel))

    def stored_bias(self, site: Site, bias: NDArray[Any]) -> NDArray[Any]:
        return bias

    def addend(self, node: gs.Node) -> gs.Tensor | None:
        return node.inputs[2] if own_bias(node) else None

    def spread(self, site: Site, addend: gs.Tensor, name: str) -> gs.Node:
        axes = gs.Constant(f"{name}/axes", np.arange(1, 1 + len(site.kernel)))
        output = gs.Variable(f"{name}/spread", dtype=addend.dtype)
        return gs.Node("Unsqueeze", f"{name}/spread", inputs=[addend, axes], outputs=[output])

    def convolutions(
        self, site: Site, node: gs.Node, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Convolution, Convolution] | None:
        read, written = (shapes.get(tensor.name) for tensor in (node.inputs[0], node.outputs[0]))
        if read is None or written is None:
            return None
        first = Convolution.of(self.multiplies, read, written, site.kernel, node.attrs)
        return first, first.pointwise()

    def put(self, graph: gs.Graph, site: Site, node: gs.Node, parts: Parts) -> None:
        emit(graph, self if parts.taps == 1 else SEPARABLE, site, node, parts)

    def product(self, site: Site, node: gs.Node, operands: Operands) -> gs.Node:
        return operands.node(node.op, node.attrs) if operands.read(site) else operands.node("Conv", pointwise(site))


class _Separable(Conv):
    """The products of a kernel that is split: one along each of the two axes."""

    def product(self, site: Site, node: gs.Node, operands: Operands) -> gs.Node:
        return operands.node("Conv", along(node.attrs, 0 if operands.read(site) else 1))


SEPARABLE = _Separable()


def halves(site: Site) -> tuple[Site, Site]:
    """The two convolutions that a split of the kernel makes of one, as sites that read their input."""
    height, width = site.kernel
    return replace(site, kernel=(height, 1)), replace(site, kernel=(1, width))


def refused(node: gs.Node, view: GraphView) -> str | None:
    """Why a convolution cannot be a site, whatever its sizes; None where nothing is known against it."""
    data, weight = node.inputs[:2]
    if not view.is_constant(weight):
        return view.refusal(weight)
    if view.is_constant(data):
        return "both of its operands are constant: fold constants first"
    if view.dtype(weight) not in FLOATING:
        return f"its weight has the type {view.dtype(weight)}"
    if own_bias(node) and not view.is_constant(node.inputs[2]):
        return "its bias is not constant: make it an initializer that is no input of the graph"
    return None


def site_of(node: gs.Node, view: GraphView, width: int, d_out: int, patches: Patches) -> Site:
    """The site whose groups make `d_out` channels each of the `patches` of `width` channels."""
    data, weight = node.inputs[:2]
    groups = int(node.attrs.get("group", 1))
    parts = channel_parts(groups)
    return Site(
        name=node.name or node.outputs[0].name,
        op=node.op,
        output=node.outputs[0].name,
        input=data.name,
        weight=weight.name,
        d_in=width * prod(patches.kernel),
        d_out=d_out,
        dtype=view.dtype(weight),
        input_rows=tuple(Rows((1,), part, patches) for part in parts),
        output_rows=tuple(Rows((1,), part) for part in parts),
        bias=own_bias(node),
        layout=(node.op, groups, *patches.kernel),
        kernel=patches.kernel,
    )


def own_bias(node: gs.Node) -> Bias | None:
    """The vector that a convolution adds to its output."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    return Bias(node.inputs[2].name, 1.0, node.outputs[0].name)


def channel_parts(groups: int) -> list[tuple[Part, ...]]:
    """The channels of every group, of data [N, C, ...]."""
    return [(Part(1, group, groups),) for group in range(groups)] if groups > 1 else [()]


def patches_of(node: gs.Node, kernel: tuple[int, ...]) -> Patches:
    """What a convolution's attributes say of the positions at which it reads."""
    ones, pads = [1] * len(kernel), [0] * 2 * len(kernel)
    return Patches(
        kernel,
        tuple(node.attrs.get("strides", ones)),
        tuple(node.attrs.get("dilations", ones)),
        tuple(node.attrs.get("pads", pads)),
        node.attrs.get("auto_pad", "NOTSET"),
    )


def as_kernel(matrix: NDArray[Any], kernel: tuple[int, ...]) -> NDArray[Any]:
    """A matrix [d, e], or [groups, d, e], as a kernel [groups * e, d / prod(kernel), ...]."""
    turned = np.swapaxes(matrix, -1, -2)
    return turned.reshape(-1, matrix.shape[-2] // prod(kernel), *kernel)


def pointwise(site: Site) -> dict[str, Any]:
    """The attributes of a convolution of 1 x 1 with the groups of a site."""
    return {"kernel_shape": [1] * len(site.kernel)} | ({"group": site.groups} if site.groups > 1 else {})


def _block_sides(view: GraphView, groups: int, *, single: bool) -> frozenset[Side]:
    if groups > 1 or view.graph.opset < BLOCKS_SINCE:
        return frozenset()
    return frozenset({"input", "output"} if single else {"output"})

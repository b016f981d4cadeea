"""ConvTranspose: a pair is the transposed convolution to `r` channels, then a convolution of 1 x 1.

A transposed convolution is an ordinary one, with its kernel turned around, over data between whose positions
`stride - 1` zeros were put. So `x [C_in * prod(kernel)]` is what that kernel covers at a position of the output, and
`W [d_in, d_out]` the stored kernel `[C_in, C_out, ...]` with the channels of the output last. The first product
multiplies at every position of the input, the second at every position of the output.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxlr.rows import Patches
from onnxlr.sites.conv import DEPTHWISE, Conv, patches_of, refused, site_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnxlr.sites.base import Site
    from onnxlr.sites.constants import GraphView


class ConvTranspose(Conv):
    """The operator ConvTranspose, whose bias is as that of a Conv."""

    ops = frozenset({"ConvTranspose"})
    multiplies = "ConvTranspose"

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        weight, refusal = node.inputs[1], refused(node, view)
        if refusal is not None or not view.is_constant(weight):
            return refusal
        channels, d_out, *kernel = view.shape(weight)
        if "output_shape" in node.attrs or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return "its padding follows from the size of its output: state it as pads"
        groups = int(node.attrs.get("group", 1))
        width = channels // groups
        if groups > 1 and width == 1:
            return DEPTHWISE
        return site_of(node, view, width, d_out, _patches(node, tuple(kernel)))

    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        width = site.d_in // prod(site.kernel)
        grouped = stored.astype(np.float64).reshape(site.groups, width, site.d_out, prod(site.kernel))
        flat = grouped.swapaxes(2, 3).reshape(site.groups, site.d_in, site.d_out)
        return flat if site.groups > 1 else flat[0]

    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        if not reads_input:
            return super().stored(site, matrix, reads_input=False)
        width = site.d_in // prod(site.kernel)
        turned = matrix.reshape(site.groups, width, prod(site.kernel), -1).swapaxes(2, 3)
        return turned.reshape(site.groups * width, -1, *site.kernel)

    def rows(self, site: Site, node: gs.Node, shapes: Mapping[str, tuple[int, ...]]) -> tuple[float, float]:
        read, written = (shapes.get(tensor.name, (0,)) for tensor in (node.inputs[0], node.outputs[0]))
        return prod((read[0], *read[2:])), prod((written[0], *written[2:]))


def _patches(node: gs.Node, kernel: tuple[int, ...]) -> Patches:
    """The positions at which the convolution reads that is the same as the transposed one of `node`."""
    given = patches_of(node, kernel)
    more = tuple(node.attrs.get("output_padding", [0] * len(kernel)))
    reach = [(size - 1) * step for size, step in zip(kernel, given.dilations, strict=True)]
    before = [r - pad for r, pad in zip(reach, given.pads[: len(kernel)], strict=True)]
    after = [r - pad + extra for r, pad, extra in zip(reach, given.pads[len(kernel) :], more, strict=True)]
    ones = (1,) * len(kernel)
    return Patches(kernel, ones, given.dilations, (*before, *after), spread=given.strides)

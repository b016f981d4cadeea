"""FusedConv of com.microsoft: a Conv with an activation, and with an addend from elsewhere.

y = f(x W + b + z)      ->      h = x A (Conv),  y = f(h B + b' + z) (FusedConv of 1 x 1, or of 1 x kw)
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxlr.sites.base import MICROSOFT, Site
from onnxlr.sites.conv import Conv, pointwise
from onnxlr.sites.convolution import along

if TYPE_CHECKING:
    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.emit import Parts

POSITIONS = ("kernel_shape", "strides", "pads", "dilations", "auto_pad", "group")
"""The attributes of a Conv."""


class FusedConv(Conv):
    """The operator FusedConv."""

    ops = frozenset({"FusedConv"})
    domains = MICROSOFT

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        found = super().find(node, view)
        if not isinstance(found, Site):
            return found
        return replace(found, output_rows=(), block_sides=frozenset())

    def put(self, graph: gs.Graph, site: Site, node: gs.Node, parts: Parts) -> None:
        assert parts.first is not None
        assert parts.hidden is not None
        own = {name: node.attrs.pop(name) for name in POSITIONS if name in node.attrs}
        first, second = (own, pointwise(site)) if parts.taps == 1 else (along(own, 0), along(own, 1))
        graph.nodes.append(
            gs.Node(
                "Conv", f"{site.name}/first", attrs=first, inputs=[node.inputs[0], parts.first], outputs=[parts.hidden]
            )
        )
        node.attrs.update(second)
        node.inputs[0], node.inputs[1] = parts.hidden, parts.second
        if parts.bias is not None:
            while len(node.inputs) < 3:
                node.inputs.append(gs.Variable.empty())
            node.inputs[2] = parts.bias

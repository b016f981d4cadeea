"""Puts a form in the place of a linear operator, out of the products that its family knows how to write.

    dense    y = x W                              pair    h = x A, y = h B
    block    h = x A, y = [h, h M]   (output)     h = x_window + x_rest M, y = h B   (input)
    separable: a pair of two convolutions, the second of which reads neighbouring `h` (`onnxlr.sites.conv`)

The tensor `y` keeps its name, whatever made it; a constant that the operator added stays with the last product. Where
it had none, the last product takes the correction if its operator can, and an Add of the correction follows if not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxlr.forms import Window
    from onnxlr.sites.base import Product, Site


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors that an emitted form reads.

    Attributes
    ----------
    first, second
        The two factors as stored; `first` is None for a dense weight.
    bias
        Added to the output; where the site has a `Bias`, it replaces that constant.
    hidden
        The tensor `h`; None for a dense weight.
    hidden_exists
        Whether another site that shares the first factor has made `h` already.
    window, split
        Of a block: where its identity lies, and how many features of its side are in the window and outside of it.
    taps
        The columns of a separable kernel; else 1.
    """

    first: gs.Tensor | None
    second: gs.Tensor
    bias: gs.Tensor | None
    hidden: gs.Tensor | None = None
    hidden_exists: bool = False
    window: Window | None = None
    split: tuple[int, int] = (0, 0)
    taps: int = 1


@dataclass(frozen=True, slots=True)
class Operands:
    """What one product of a form reads, a stored matrix among it, and what it makes.

    Attributes
    ----------
    data, weight
        What is multiplied.
    output, name
        The tensor that the product is, and the name of its node.
    addend
        Added to it, where the operator can.
    """

    data: gs.Tensor
    weight: gs.Tensor
    output: gs.Tensor
    name: str
    addend: gs.Tensor | None = None

    def read(self, site: Site) -> bool:
        """Whether the data are the site's own input, as it lies there."""
        return str(self.data.name) == site.input

    def node(
        self, op: str, attributes: Mapping[str, Any] | None = None, *, left: bool = False, domain: str | None = None
    ) -> gs.Node:
        """The operator that computes it, with the weight behind the data or to their `left`."""
        operands = [self.weight, self.data] if left else [self.data, self.weight]
        added = [] if self.addend is None else [self.addend]
        return gs.Node(op, self.name, dict(attributes or {}), [*operands, *added], [self.output], domain=domain)


def emit(graph: gs.Graph, family: Product, site: Site, node: gs.Node, parts: Parts) -> None:
    """Replace `node` by the form that `parts` make up."""
    output = node.outputs[0]
    data = next(tensor for tensor in node.inputs if tensor.name == site.input)
    added = parts.bias is not None and (site.opaque_addend or (site.bias is None and not family.adds_bias))
    product = gs.Variable(f"{site.output}/product", dtype=output.dtype) if added else output
    addend = family.addend(node) if parts.bias is None or added else parts.bias
    node.outputs.clear()
    window = parts.window
    if parts.first is None:
        graph.nodes.append(family.product(site, node, Operands(data, parts.second, product, site.name, addend)))
    else:
        assert parts.hidden is not None
        if not parts.hidden_exists:
            if window is not None and window.side == "input":
                _narrow_input(graph, family, site, node, data, parts)
            else:
                operands = Operands(data, parts.first, parts.hidden, f"{site.name}/first")
                graph.nodes.append(family.product(site, node, operands))
        if window is not None and window.side == "output":
            _widen_output(graph, family, site, node, parts, addend, product)
        else:
            operands = Operands(parts.hidden, parts.second, product, f"{site.name}/second", addend)
            graph.nodes.append(family.product(site, node, operands))
    if added:
        graph.nodes.append(gs.Node("Add", f"{site.name}/mean", inputs=[product, parts.bias], outputs=[output]))
    node.inputs.clear()
    graph.nodes.remove(node)


def _narrow_input(graph: gs.Graph, family: Product, site: Site, node: gs.Node, data: gs.Tensor, parts: Parts) -> None:
    """`h = x_window + x_rest M`, the window at the start or the end."""
    assert parts.window is not None
    assert parts.first is not None
    assert parts.hidden is not None
    at_start = parts.window.start == 0
    inside, outside, moved = (
        gs.Variable(f"{parts.hidden.name}/{part}", dtype=data.dtype) for part in ("window", "rest", "moved")
    )
    sizes = parts.split if at_start else parts.split[::-1]
    lengths = gs.Constant(f"{parts.hidden.name}/split", np.array(sizes, np.int64))
    graph.nodes += [
        gs.Node(
            "Split",
            f"{site.name}/split",
            attrs={"axis": site.input_axis},
            inputs=[data, lengths],
            outputs=[inside, outside] if at_start else [outside, inside],
        ),
        family.product(site, node, Operands(outside, parts.first, moved, f"{site.name}/first")),
        gs.Node("Add", f"{site.name}/window", inputs=[inside, moved], outputs=[parts.hidden]),
    ]


def _widen_output(
    graph: gs.Graph,
    family: Product,
    site: Site,
    node: gs.Node,
    parts: Parts,
    addend: gs.Tensor | None,
    product: gs.Tensor,
) -> None:
    """`y = [h, h M]` or `[h M, h]`, and what the operator itself added."""
    assert parts.window is not None
    rest = gs.Variable(f"{site.output}/rest", dtype=product.dtype)
    whole = product if addend is None else gs.Variable(f"{site.output}/whole", dtype=product.dtype)
    graph.nodes += [
        family.product(site, node, Operands(parts.hidden, parts.second, rest, f"{site.name}/second")),
        gs.Node(
            "Concat",
            f"{site.name}/concat",
            attrs={"axis": site.output_axis},
            inputs=[parts.hidden, rest] if parts.window.start == 0 else [rest, parts.hidden],
            outputs=[whole],
        ),
    ]
    if addend is not None:
        spread = family.spread(site, addend, f"{site.name}/bias")
        if spread is not None:
            graph.nodes.append(spread)
            (addend,) = spread.outputs
        graph.nodes.append(gs.Node("Add", f"{site.name}/bias", inputs=[whole, addend], outputs=[product]))

"""Operators that do more than multiply: the first product of a pair goes in front of them, and they keep the second.

    y = f(x W + b)      ->      h = x A,  y = f(h B + b')

Nothing but the data, the weight and the bias that the node reads changes; its other inputs, its attributes and all its
outputs stay. What it multiplies and adds is seen by no tensor, so the moments of `x` are gathered, and no gradient of
it can be had.

    Attention            com.microsoft: `W [d, queries + keys + values]` packed, and so in PackedAttention and
                         DecoderMaskedSelfAttention. ONNX's own Attention has no weight
    LSTM, GRU, RNN       `W [directions, gates, d]` as `[d, directions * gates]`; the recurrent weights stay
    FusedGemm            com.microsoft: a Gemm with an activation
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxlr.rows import Rows
from onnxlr.sites.base import FLOATING, MICROSOFT, Bias, Family, Site

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.emit import Parts


class InFront(Family):
    """What these operators have in common: data, weight and bias at fixed places among their inputs."""

    BIAS: ClassVar[int]
    """The place of the bias; data and weight are at 0 and 1."""

    @abstractmethod
    def width(self, node: gs.Node, shape: tuple[int, ...]) -> tuple[int, int]:
        """`d_in` and `d_out` of a weight of `shape`."""

    def obstacle(self, node: gs.Node, added: tuple[int, ...] | None, d_out: int) -> str | None:
        """Why the node cannot be a site of `d_out` outputs, with a constant of the shape `added` as its bias."""
        return None

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        data, weight = node.inputs[:2]
        if not view.is_constant(weight):
            return view.refusal(weight) or self._beside(node, view)
        if view.is_constant(data):
            return "both of its operands are constant: fold constants first"
        if view.dtype(weight) not in FLOATING:
            return f"its weight has the type {view.dtype(weight)}"
        added = self.added(node)
        if added is not None and not view.is_constant(added):
            return "its bias is not constant: make it an initializer that is no input of the graph"
        d_in, d_out = self.width(node, view.shape(weight))
        obstacle = self.obstacle(node, None if added is None else view.shape(added), d_out)
        if obstacle is not None:
            return obstacle
        output = next(tensor.name for tensor in node.outputs if tensor.name)
        return Site(
            name=node.name or output,
            op=node.op,
            output=output,
            input=data.name,
            weight=weight.name,
            d_in=d_in,
            d_out=d_out,
            dtype=view.dtype(weight),
            input_rows=(Rows(),),
            output_rows=(),
            bias=None if added is None else Bias(added.name, self.scale(node), output),
            layout=(node.op, *view.shape(weight)),
        )

    def _beside(self, node: gs.Node, view: GraphView) -> str | None:
        """Why a constant that the node reads stays, where it is not the weight that a site has."""
        remaining = self.remaining(node)
        if remaining is not None and view.matrices(remaining[0]):
            return remaining[1]
        return "its weight is on the left: compress before fusing" if view.matrices(node.inputs[0]) else None

    def added(self, node: gs.Node) -> gs.Tensor | None:
        """The bias that the node reads."""
        return node.inputs[self.BIAS] if len(node.inputs) > self.BIAS and node.inputs[self.BIAS].name else None

    def scale(self, node: gs.Node) -> float:
        """What the operator multiplies its bias by."""
        return 1.0

    def rows(self, site: Site, node: gs.Node, shapes: Mapping[str, tuple[int, ...]]) -> tuple[float, float]:
        shape = shapes.get(site.input)
        count = prod(shape[:-1]) if shape else 0
        return count, count

    def stored_bias(self, site: Site, bias: NDArray[Any]) -> NDArray[Any]:
        return bias

    def put(self, graph: gs.Graph, site: Site, node: gs.Node, parts: Parts) -> None:
        assert parts.first is not None
        assert parts.hidden is not None
        first = gs.Node("MatMul", f"{site.name}/first", inputs=[node.inputs[0], parts.first], outputs=[parts.hidden])
        graph.nodes.append(first)
        node.inputs[0], node.inputs[1] = parts.hidden, parts.second
        if parts.bias is not None:
            while len(node.inputs) <= self.BIAS:
                node.inputs.append(gs.Variable.empty())
            node.inputs[self.BIAS] = parts.bias


class Attention(InFront):
    """Attention, PackedAttention and DecoderMaskedSelfAttention of com.microsoft."""

    ops = frozenset({"Attention", "PackedAttention", "DecoderMaskedSelfAttention"})
    domains = MICROSOFT
    BIAS = 2

    def width(self, node: gs.Node, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], shape[1]

    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        return stored.astype(np.float64)

    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        return matrix


class Recurrent(InFront):
    """The input weights of LSTM, GRU and RNN."""

    ops = frozenset({"LSTM", "GRU", "RNN"})
    BIAS = 3

    def width(self, node: gs.Node, shape: tuple[int, ...]) -> tuple[int, int]:
        directions, gates, d_in = shape
        return d_in, directions * gates

    def remaining(self, node: gs.Node) -> tuple[gs.Tensor, str] | None:
        return node.inputs[2], "recurrent weights: every step multiplies by them, after the step before"

    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        return stored.reshape(site.d_out, site.d_in).T.astype(np.float64)

    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        return matrix if reads_input else matrix.T.reshape(self._directions(site), -1, len(matrix))

    def stored_bias(self, site: Site, bias: NDArray[Any]) -> NDArray[Any]:
        """[directions, gates of the input and then of the recurrence]."""
        own = bias.reshape(self._directions(site), -1)
        return np.concatenate([own, np.zeros_like(own)], axis=1)

    def corrected(self, site: Site, old: NDArray[Any], correction: NDArray[np.float64]) -> NDArray[np.float64]:
        added: NDArray[np.float64] = old.astype(np.float64) + self.stored_bias(site, correction)
        return added

    def _directions(self, site: Site) -> int:
        directions = site.layout[1]
        assert isinstance(directions, int)
        return directions


class FusedGemm(InFront):
    """FusedGemm of com.microsoft: `f(alpha x W + beta c)`, alpha a part of the site's `W`."""

    ops = frozenset({"FusedGemm"})
    domains = MICROSOFT
    BIAS = 2

    def width(self, node: gs.Node, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = shape[:: -1 if node.attrs.get("transB", 0) else 1]
        return rows, columns

    def obstacle(self, node: gs.Node, added: tuple[int, ...] | None, d_out: int) -> str | None:
        if node.attrs.get("transA", 0):
            return "it transposes its input: compress before fusing"
        if node.attrs.get("alpha", 1.0) == 0.0:
            return "it multiplies by alpha = 0"
        if added is not None and (added[-1:] != (d_out,) or prod(added) != d_out):
            return f"what it adds is no vector of {d_out} numbers: compress before fusing"
        return None

    def added(self, node: gs.Node) -> gs.Tensor | None:
        return super().added(node) if node.attrs.get("beta", 1.0) != 0.0 else None

    def scale(self, node: gs.Node) -> float:
        return float(node.attrs.get("beta", 1.0))

    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        matrix = float(node.attrs.get("alpha", 1.0)) * stored.astype(np.float64)
        return matrix.T if node.attrs.get("transB", 0) else matrix

    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        return matrix

    def put(self, graph: gs.Graph, site: Site, node: gs.Node, parts: Parts) -> None:
        node.attrs.update(alpha=1.0, transB=0)
        if site.bias is None and parts.bias is not None:  # beta was for another addend, or 0
            node.attrs["beta"] = 1.0
        super().put(graph, site, node, parts)

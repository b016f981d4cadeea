"""What a linear site is, and what a family of operators has to do to have its sites compressed.

A family is one file in this folder. It recognises its operators in a graph, refuses with a reason what it cannot do,
lays the stored weight out as `W [d_in, d_out]`, and writes the products out of which `onnxlr.sites.emit` makes what
takes the operator's place. Everything between (moments, spectra, ranks, factors) sees only `y = x W + b`, whatever the
operator was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnxlr.forms import Side
    from onnxlr.sites.constants import GraphView

BLOCKS_SINCE = 13
"""The opset from which identity blocks are written: from here on Split takes its lengths as an input."""

FLOATING = frozenset({"float16", "bfloat16", "float32", "float64"})


INDEX_TYPES = frozenset({6, 7, 8, 9, 12, 13})
"""TensorProto's int32, int64, string, bool, uint32 and uint64: what shapes, indices and flags are stored in."""


@dataclass(frozen=True, slots=True)
class Bias:
    """A constant vector already added to a site's output, which can take the correction of the mean.

    Attributes
    ----------
    tensor
        Its name; `d_out` values in the order of the features.
    scale
        What the operator multiplies it by (Gemm's beta).
    reader
        Output name of the node that adds it: the site's own node, or an Add behind it.
    """

    tensor: str
    scale: float
    reader: str


@dataclass(frozen=True, slots=True)
class Site:
    """One linear operator `y = x W + b` in a graph.

    Attributes
    ----------
    name
        The node's name, or the name of its output where the node has none.
    op
        The operator type.
    output
        The node's output tensor, by which the node is found in any copy of the graph.
    input
        The tensor whose rows are `x`.
    weight
        The constant tensor that the node reads as its weight.
    d_in, d_out
        The shape of `W`.
    dtype
        Name of the weight's numpy dtype.
    input_axis, output_axis
        The axes (-1 or -2) of the input and output tensors along which the features lie.
    bias
        A constant vector added to the output, if there is one.
    opaque_addend
        The output contains something other than `x W` and `bias`, so its moments are not those of the layer.
    leading_ones
        Axes of length 1 before the two of the stored weight; they count towards the rank of the output.
    block_sides
        On which sides it can be written with an identity block (`onnxlr.forms`).
    module
        The torch module that it was exported from, such as "blocks.0.fc1", where the exporter wrote it down.
    """

    name: str
    op: str
    output: str
    input: str
    weight: str
    d_in: int
    d_out: int
    dtype: str
    input_axis: int
    output_axis: int
    bias: Bias | None
    opaque_addend: bool = False
    leading_ones: int = 0
    block_sides: frozenset[Side] = frozenset()
    module: str | None = None

    @property
    def label(self) -> str:
        """What people know it by: the torch module that it was exported from, or else its name."""
        return self.module or self.name

    @property
    def observes_output(self) -> bool:
        """Whether the output is the smaller side to gather moments of, and shows the layer alone."""
        return self.d_out < self.d_in and not self.opaque_addend


@dataclass(frozen=True, slots=True)
class Refusal:
    """A linear operator with a constant weight that stays as it is, and why.

    `parameters` counts the elements of the main graph's constant matrices that it reads, shared or not; `macs` the
    multiply-accumulates of one sample, where they are known.
    """

    name: str
    op: str
    reason: str
    sources: tuple[str, ...]
    parameters: int = 0
    macs: int | None = None


class Family(ABC):
    """One kind of linear operator."""

    ops: ClassVar[frozenset[str]]
    adds_bias: ClassVar[bool]
    """Whether its products take an addend, so that a correction needs no Add behind."""

    @abstractmethod
    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        """The site at `node`; why it cannot be one; or None where no constant weight is involved."""

    @abstractmethod
    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        """`W [d_in, d_out]` from the values of the weight tensor."""

    @abstractmethod
    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        """A matrix [d, e] as `product` reads it; `reads_input` where it multiplies the site's own input."""

    @abstractmethod
    def stored_bias(self, site: Site, bias: NDArray[Any]) -> NDArray[Any]:
        """A correction [d_out] in the shape in which it is added; only for sites without a `Bias`."""

    @abstractmethod
    def addend(self, node: gs.Node) -> gs.Tensor | None:
        """What the operator itself adds to its product."""

    @abstractmethod
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
        """A node that multiplies `data`, the site's own input or what was made of it, with a stored matrix."""

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

import numpy as np

from onnxlr.sites.emit import emit
from onnxlr.sites.macs import macs

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnxlr.forms import Side
    from onnxlr.rows import Rows
    from onnxlr.sites.bodies import Body
    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.convolution import Convolution
    from onnxlr.sites.emit import Operands, Parts

BLOCKS_SINCE = 13
"""The opset from which identity blocks are written: from here on Split takes its lengths as an input."""

ONNX_DOMAINS: frozenset[str | None] = frozenset({"", "ai.onnx", None})
MICROSOFT: frozenset[str | None] = frozenset({"com.microsoft"})

FLOATING = frozenset({"float16", "bfloat16", "float32", "float64"})


INDEX_TYPES = frozenset({6, 7, 8, 9, 12, 13})
"""TensorProto's int32, int64, string, bool, uint32 and uint64: what shapes, indices and flags are stored in."""
INDEX_DTYPES = frozenset({"int32", "int64", "uint32", "uint64", "bool", "object"})
"""The names of the numpy dtypes of the same."""


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
    """One linear operator `y = x W + b` in a graph, or several side by side with a matrix each: its groups.

    Attributes
    ----------
    name
        The node's name, or the name of its output where the node has none.
    op
        The operator type.
    output
        The node's output tensor, by which the node is found in any copy of the graph.
    input
        The tensor whose rows are `x`, or the indices that stand for them.
    weight
        The constant tensor that the node reads as its weight.
    d_in, d_out
        The shape of `W`, or of each group's.
    dtype
        Name of the weight's numpy dtype.
    input_rows, output_rows
        How `x` and `y` lie in the input and the output tensor, one a group. `output_rows` is empty where no tensor
        shows `y`: the operator does more to it. `input_rows` is empty where none shows `x`: indices stand for it.
    bias
        A constant vector added to the output, if there is one.
    opaque_addend
        The output contains something other than `x W` and `bias`, so its moments are not those of the layer.
    leading
        Lengths of the axes before the two of the stored weight; they count towards the rank of the output.
    layout
        What tells how factors are stored: sites of one weight with equal layouts share them.
    plain
        The features lie on the last axis or the one before, in input and output alike, and the operator does nothing
        but multiply and add: its weight can share a first factor with others and be narrowed.
    kernel
        Of a convolution, the spatial sizes of its kernel.
    taps
        The columns of a kernel that can be split into one column and one row (`onnxlr.separable`); else 1.
    block_sides
        On which sides it can be written with an identity block (`onnxlr.forms`).
    module
        The torch module that it was exported from, such as "blocks.0.fc1", where the exporter wrote it down.
    bodies
        The bodies that it lies in, outermost first; none in the main graph.
    unseen
        Why no data can be gathered of it; "" where they can.
    transposed
        It multiplies by the transpose of the weight that it belongs to, whose other sites gather rows: `W` of this site
        is [d, V] where the table is [V, d].
    """

    name: str
    op: str
    output: str
    input: str
    weight: str
    d_in: int
    d_out: int
    dtype: str
    input_rows: tuple[Rows, ...]
    output_rows: tuple[Rows, ...]
    bias: Bias | None
    opaque_addend: bool = False
    leading: tuple[int, ...] = ()
    layout: tuple[object, ...] = ()
    plain: bool = False
    kernel: tuple[int, ...] = ()
    taps: int = 1
    block_sides: frozenset[Side] = frozenset()
    module: str | None = None
    bodies: tuple[Body, ...] = ()
    unseen: str = ""
    transposed: bool = False

    @property
    def label(self) -> str:
        """What people know it by: the torch module that it was exported from, or else its name."""
        return self.module or self.name

    @property
    def groups(self) -> int:
        """The number of its matrices."""
        return len(self.input_rows or self.output_rows)

    def seen_as(self, tensor: str) -> str:
        """What a tensor that it reads or writes is called where data are gathered.

        What a body takes from outside is another thing in it than outside: it is seen only when the body runs.
        """
        return f"{tensor}@{self.bodies[-1].output}.{self.bodies[-1].attribute}" if self.bodies else tensor

    @property
    def input_axis(self) -> int:
        """The axis of the input along which the features lie, where it is one."""
        return self.input_rows[0].axis

    @property
    def output_axis(self) -> int:
        """The axis of the output along which the features lie, where it is one."""
        return self.output_rows[0].axis

    @property
    def shows_output(self) -> bool:
        """Whether a tensor shows `x W` and `bias`, and nothing else."""
        return not self.opaque_addend and bool(self.output_rows)

    @property
    def observes_output(self) -> bool:
        """Whether the output is the smaller side to gather moments of, or the only one, and shows the layer alone.

        Patches are costlier to gather than an output of the same width.
        """
        if not self.shows_output or not self.input_rows:
            return self.shows_output
        return self.d_out < self.d_in + (self.input_rows[0].patches is not None)


def bias_behind(output: gs.Tensor, lengths: tuple[int, ...], view: GraphView) -> Bias | None:
    """The constant that an Add behind `output` adds, if it has one value for each feature.

    `lengths` are those of the last axes of the output, with 1 for each that counts rows.
    """
    if len(output.outputs) != 1 or output.name in view.graph_outputs or output.outputs[0].op != "Add":
        return None
    add = output.outputs[0]
    other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
    if other is output or not view.is_constant(other):
        return None
    shape = view.shape(other)
    rank = max(len(shape), len(lengths))
    same = (1,) * (rank - len(shape)) + shape == (1,) * (rank - len(lengths)) + lengths
    return Bias(other.name, 1.0, add.outputs[0].name) if same and shape else None


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
    """One kind of linear operator that can be compressed.

    Matrices of a site are [d, e], or [groups, d, e] where it has groups; vectors of its output are [groups * d_out].
    """

    ops: ClassVar[frozenset[str]]
    domains: ClassVar[frozenset[str | None]] = ONNX_DOMAINS
    corrects: ClassVar[bool] = True
    """Whether a correction can be added to what it multiplies."""

    @abstractmethod
    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        """The site at `node`; why it cannot be one; or None where no constant weight is involved."""

    @abstractmethod
    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        """`W [d_in, d_out]` from the values of the weight tensor."""

    @abstractmethod
    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        """A matrix [d, e] as the graph reads it; `reads_input` where it multiplies the site's own input."""

    @abstractmethod
    def stored_bias(self, site: Site, bias: NDArray[Any]) -> NDArray[Any]:
        """A correction [d_out] in the shape in which it is added; only for sites without a `Bias`."""

    def corrected(self, site: Site, old: NDArray[Any], correction: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values `old` of the site's `Bias` with a correction [groups * d_out] added, in the shape of `old`."""
        assert site.bias is not None
        return old.astype(np.float64) + correction.reshape(old.shape) / site.bias.scale

    def rows(self, site: Site, node: gs.Node, shapes: Mapping[str, tuple[int, ...]]) -> tuple[float, float]:
        """How many rows of one sample the first and the second product of a pair multiply; 0 where it is unknown."""
        count = (macs(node, shapes) or 0) / (site.groups * site.d_in * site.d_out)
        return count, count

    def convolutions(
        self, site: Site, node: gs.Node, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Convolution, Convolution] | None:
        """What the two products of a pair are run as, for one sample; None where no convolutions, or it is unknown."""
        return None

    def remaining(self, node: gs.Node) -> tuple[gs.Tensor, str] | None:
        """Another weight of the node, which stays as it is, and why."""
        return None

    @abstractmethod
    def put(self, graph: gs.Graph, site: Site, node: gs.Node, parts: Parts) -> None:
        """Write the form that `parts` make up into `graph`, in the place of `node`."""


class Product(Family):
    """An operator that multiplies, and adds at most: all forms are made of its products."""

    adds_bias: ClassVar[bool]
    """Whether its products take an addend, so that a correction needs no Add behind."""

    def put(self, graph: gs.Graph, site: Site, node: gs.Node, parts: Parts) -> None:
        emit(graph, self, site, node, parts)

    @abstractmethod
    def addend(self, node: gs.Node) -> gs.Tensor | None:
        """What the operator itself adds to its product."""

    def spread(self, site: Site, addend: gs.Tensor, name: str) -> gs.Node | None:
        """What makes of an addend of `product` one that an Add behind it can take; None where it is that already."""
        return None

    @abstractmethod
    def product(self, site: Site, node: gs.Node, operands: Operands) -> gs.Node:
        """The node that makes a product; its data are the site's own input or what was made of it."""

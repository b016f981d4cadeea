"""Einsum of data with a constant, where that is a linear layer.

Every letter of the equation has its part, by where it occurs:

    data, weight               contracted: the features of `x`
    weight, output             the features of `y`
    data, weight, output       a group, with a matrix of its own
    data, output               rows

So `bshi,hio->bsho` is a linear layer with a matrix for each `h`. Anything else is refused: a letter that is summed in
one operand alone, a diagonal, more than two operands. The pair is two Einsums with a new letter for the rank,
`bshi,hir->bshr` and `bshr,hro->bsho`; a product that MatMul computes is written as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from onnxlr.rows import side_by_side
from onnxlr.sites.base import BLOCKS_SINCE, FLOATING, Product, Site, bias_behind
from onnxlr.sites.equation import ELLIPSIS, free_letter, spelled_out, terms

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.emit import Operands

    Lengths = tuple[int, ...]

AS_MATMUL = (-1, ())
"""The layout of a MatMul with its weight on the right, which some equations are."""


@dataclass(frozen=True, slots=True)
class Letters:
    """The letters of the two operands and of the output."""

    data: str
    weight: str
    output: str

    @property
    def groups(self) -> str:
        """In data, weight and output."""
        return "".join(letter for letter in self.output if letter in self.data and letter in self.weight)

    @property
    def contracted(self) -> str:
        """In data and weight alone, in the order of the data."""
        return "".join(letter for letter in self.data if letter in self.weight and letter not in self.output)

    @property
    def features(self) -> str:
        """In weight and output alone, in the order of the output."""
        return "".join(letter for letter in self.output if letter in self.weight and letter not in self.data)

    @property
    def is_matmul(self) -> bool:
        """Whether it is `x W` as MatMul has it, but for a transposition of the weight."""
        same_rows = self.data[:-1] == self.output[:-1]
        return same_rows and set(self.weight) == {self.data[-1:], self.output[-1:]} and len(self.weight) == 2

    def refusal(self) -> str | None:
        """Why it is no linear layer."""
        if ELLIPSIS in self.weight:
            return "its equation has an ellipsis for axes of the weight: write them out"
        for what, term in (("data", self.data), ("weight", self.weight), ("output", self.output)):
            repeated = [letter for letter in term if letter != "." and term.count(letter) > 1]
            if repeated:
                return f"its equation repeats {repeated[0]!r} in its {what}: a diagonal is no linear layer"
        for what, term, other in (("weight", self.weight, self.data), ("data", self.data, self.weight)):
            alone = [letter for letter in term if letter not in other and letter not in self.output]
            if alone:
                return f"its equation sums its {what} alone over {alone[0]!r}: sum before, or fold it into the weight"
        if not self.contracted:
            return "its equation contracts nothing: it multiplies element by element"
        if not self.features:
            return "its weight is a vector for every group: no pair is smaller"
        return None


class Einsum(Product):
    """The operator Einsum."""

    ops = frozenset({"Einsum"})
    adds_bias = False

    def find(self, node: gs.Node, view: GraphView) -> Site | str | None:
        constant = [view.is_constant(tensor) for tensor in node.inputs]
        if all(constant):
            return "all of its operands are constant: fold constants first"
        if not any(constant):
            return next((reason for tensor in node.inputs if (reason := view.refusal(tensor))), None)
        if len(constant) != 2:
            return f"it multiplies {len(constant)} operands at once: split it into products of two"
        weight, data = node.inputs if constant[0] else reversed(node.inputs)
        shape, dtype = view.shape(weight), view.dtype(weight)
        if dtype not in FLOATING:
            return f"its weight has the type {dtype}"
        try:
            written = _letters(node, *terms(node.attrs["equation"]), weight_first=constant[0])
            reason = written.refusal()
            if reason is not None:
                return reason
            rank = view.rank(data) if ELLIPSIS in written.data else len(written.data)
            if rank is None:
                return "its equation has an ellipsis and the rank of its input is unknown: run shape inference first"
            ranks = (len(shape), rank) if constant[0] else (rank, len(shape))
            spelled = _letters(node, *spelled_out(node.attrs["equation"], ranks), weight_first=constant[0])
        except ValueError as error:
            return str(error)
        if set(spelled.output) - set(spelled.data + spelled.weight) or spelled.refusal():
            return f"its equation {node.attrs['equation']!r} is no linear layer"
        return self._site(node, view, spelled, weight, data)

    def _site(self, node: gs.Node, view: GraphView, letters: Letters, weight: gs.Tensor, data: gs.Tensor) -> Site:
        length = dict(zip(letters.weight, view.shape(weight), strict=True))
        groups, contracted, features = (
            tuple(length[letter] for letter in part) for part in (letters.groups, letters.contracted, letters.features)
        )

        def places(term: str, part: str) -> Lengths:
            return tuple(term.index(letter) - len(term) for letter in part)

        output = node.outputs[0]
        on_output = dict.fromkeys(letters.output, 1) | {
            letter: length[letter] for letter in letters.groups + letters.features
        }
        return Site(
            name=node.name or output.name,
            op=node.op,
            output=output.name,
            input=data.name,
            weight=weight.name,
            d_in=prod(contracted),
            d_out=prod(features),
            dtype=view.dtype(weight),
            input_rows=side_by_side(
                places(letters.data, letters.contracted),
                dict(zip(places(letters.data, letters.groups), groups, strict=True)),
            ),
            output_rows=side_by_side(
                places(letters.output, letters.features),
                dict(zip(places(letters.output, letters.groups), groups, strict=True)),
            ),
            bias=bias_behind(output, tuple(on_output[letter] for letter in letters.output), view),
            layout=AS_MATMUL if letters.is_matmul else (groups, contracted, features),
            plain=letters.is_matmul,
            block_sides=frozenset(
                {"input", "output"} if letters.is_matmul and view.graph.opset >= BLOCKS_SINCE else ()
            ),
        )

    def matrix(self, site: Site, node: gs.Node, stored: NDArray[Any]) -> NDArray[np.float64]:
        letters = _of(node, site)
        order = [letters.weight.index(letter) for letter in letters.groups + letters.contracted + letters.features]
        groups = (site.groups,) if site.groups > 1 else ()
        return stored.transpose(order).reshape(*groups, site.d_in, site.d_out).astype(np.float64)

    def stored(self, site: Site, matrix: NDArray[Any], *, reads_input: bool) -> NDArray[Any]:
        if site.plain:
            return matrix
        groups, contracted, features = _lengths(site)
        return matrix.reshape(
            *groups,
            *(contracted if reads_input else matrix.shape[-2:-1]),
            *(matrix.shape[-1:] if reads_input else features),
        )

    def stored_bias(self, site: Site, bias: NDArray[Any]) -> NDArray[Any]:
        if site.plain:
            return bias
        rows, (groups, _, features) = site.output_rows[0], _lengths(site)
        axes = (*(part.axis for part in rows.parts), *rows.axes)
        array = bias.reshape(*groups, *features).transpose(np.argsort(axes))
        return np.expand_dims(array, tuple(axis for axis in range(min(axes), 0) if axis not in axes))

    def corrected(self, site: Site, old: NDArray[Any], correction: NDArray[np.float64]) -> NDArray[np.float64]:
        return super().corrected(site, old, self.stored_bias(site, correction))

    def addend(self, node: gs.Node) -> gs.Tensor | None:
        return None

    def product(self, site: Site, node: gs.Node, operands: Operands) -> gs.Node:
        letters = _of(node, site)
        rank = free_letter(node.attrs["equation"])
        hidden = "".join(letter for letter in letters.data if letter not in letters.contracted) + rank
        if operands.read(site):
            own = Letters(letters.data, letters.groups + letters.contracted + rank, hidden)
        else:
            own = Letters(hidden, letters.groups + rank + letters.features, letters.output)
        if site.plain or own.is_matmul:
            return operands.node("MatMul")
        return operands.node("Einsum", {"equation": f"{own.data},{own.weight}->{own.output}"})


def _letters(node: gs.Node, operands: tuple[str, ...], output: str, *, weight_first: bool) -> Letters:
    if len(operands) != 2:
        raise ValueError(f"its equation {node.attrs['equation']!r} is of {len(operands)} operands, not of 2")
    weight, data = operands if weight_first else operands[::-1]
    return Letters(data, weight, output)


def _of(node: gs.Node, site: Site) -> Letters:
    """The letters as they are written: an ellipsis stays one."""
    return _letters(node, *terms(node.attrs["equation"]), weight_first=node.inputs[0].name == site.weight)


def _lengths(site: Site) -> tuple[Lengths, Lengths, Lengths]:
    """Of the axes of groups, contracted letters and features."""
    return cast("tuple[Lengths, Lengths, Lengths]", site.layout)

"""What a form of a weight costs, in the unit of a budget.

Every form is a list of matrix products `[rows, d] x [d, e]`, so one rule prices them all: parameters are the elements
of the matrices, multiply-accumulates those times the rows of one sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from onnxlr.rewrite import copies, new_biases

if TYPE_CHECKING:
    from onnxlr.forms import Products
    from onnxlr.sites import Inventory, Weight

    Unit = Literal["params", "macs"]


class Costs(Protocol):
    """Prices in one unit."""

    @property
    def whole(self) -> float:
        """The dense model."""

    def dense(self, weight: Weight) -> float:
        """A weight as it is."""

    def form(self, weight: Weight, products: Products, *, moved: int, corrected: bool) -> float:
        """A weight as `products`; `moved` features a row go through a Concat or Split; `corrected` if its bias is."""


class Parameters:
    """Elements stored."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self.whole = float(inventory.parameters)

    def dense(self, weight: Weight) -> float:
        return weight.parameters

    def form(self, weight: Weight, products: Products, *, moved: int, corrected: bool) -> float:
        biases = weight.d_out * new_biases(self._inventory, weight) if corrected else 0
        return copies(weight) * sum(d * e for d, e in products) + biases


class Macs:
    """Multiply-accumulates of one sample; 0 where they are unknown."""

    def __init__(self, inventory: Inventory) -> None:
        self.whole = float(inventory.macs or 0)

    def dense(self, weight: Weight) -> float:
        return weight.macs or 0

    def form(self, weight: Weight, products: Products, *, moved: int, corrected: bool) -> float:
        rows = (weight.macs or 0) / (weight.d_in * weight.d_out)
        return rows * sum(d * e for d, e in products)


def costs_in(unit: Unit, inventory: Inventory) -> Costs:
    """The prices of a unit."""
    return Parameters(inventory) if unit == "params" else Macs(inventory)

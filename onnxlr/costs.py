"""What a form of a weight costs, in the unit of a budget.

Every form is a list of matrix products `[rows, d] x [d, e]`, so one rule prices them all: parameters are the elements
of the matrices, multiply-accumulates those times the rows of one sample, and latency the sum of their times.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

from onnxlr.rewrite import copies, new_biases

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnxlr.forms import Products
    from onnxlr.latency import Timings
    from onnxlr.sites import Inventory, Weight

SIZES = 64
"""Steps of the sizes that are timed beforehand; what lies between is interpolated, or timed when it is asked for."""


def timed_dtype(weights: Iterable[Weight]) -> str:
    """The dtype that products are timed in: that of most parameters; float32 where there are none."""
    parameters: Counter[str] = Counter()
    for weight in weights:
        parameters[weight.dtype] += weight.parameters
    return max(parameters, key=lambda dtype: parameters[dtype], default="float32")


class Costs(Protocol):
    """Prices in one unit."""

    flag: str
    """The target that is a share of it."""

    @property
    def whole(self) -> float:
        """The dense model."""

    def dense(self, weight: Weight) -> float:
        """A weight as it is."""

    def form(self, weight: Weight, products: Products, *, moved: int, corrected: bool) -> float:
        """A weight as `products`; `moved` features a row go through a Concat or Split; `corrected` if its bias is."""


class Parameters:
    """Elements stored."""

    flag = "--keep-params"

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self.whole = float(inventory.parameters)

    def dense(self, weight: Weight) -> float:
        return weight.parameters

    def form(self, weight: Weight, products: Products, *, moved: int, corrected: bool) -> float:
        biases = weight.d_out * new_biases(self._inventory, weight) if corrected else 0
        return weight.groups * (copies(weight) * sum(d * e for d, e in products) + biases)


class Macs:
    """Multiply-accumulates of one sample; 0 where they are unknown."""

    flag = "--keep-macs"

    def __init__(self, inventory: Inventory) -> None:
        self.whole = float(inventory.macs or 0)

    def dense(self, weight: Weight) -> float:
        return weight.macs or 0

    def form(self, weight: Weight, products: Products, *, moved: int, corrected: bool) -> float:
        return weight.macs_of(products)


class Latency:
    """Microseconds of one run, from products timed on this machine (`onnxlr.latency`).

    Parameters
    ----------
    inventory
        The model. Weights whose rows are unknown cost nothing, in whatever form: they stay dense.
    timings
        Times of products; a convolution counts as the product that it is.
    batch
        Samples in a run.
    whole
        Microseconds of the dense model.
    """

    flag = "--max-latency"

    def __init__(self, inventory: Inventory, timings: Timings, batch: int, whole: float) -> None:
        self._timings, self._batch, self.whole = timings, batch, whole
        # all together: what else the machine does then meets all of them alike
        timings.measure(
            (rows, d, e)
            for weight in inventory.weights
            for rows in dict.fromkeys(self._rows(weight))
            if rows
            # a first product that costs nothing is never asked for, and the second reads no more than the rank
            for d_in in (weight.d_in if weight.rows[0] else min(weight.d_in, weight.d_out),)
            for d in {*range(SIZES, d_in, SIZES), d_in}
            for e in {*range(SIZES, weight.d_out, SIZES), weight.d_out}
        )

    def _rows(self, weight: Weight) -> tuple[int, int]:
        first, second = weight.rows
        return round(self._batch * first), round(self._batch * second)

    def dense(self, weight: Weight) -> float:
        return self.form(weight, ((weight.d_in, weight.d_out),), moved=0, corrected=False)

    def form(self, weight: Weight, products: Products, *, moved: int, corrected: bool) -> float:
        rows = self._rows(weight)
        if not any(rows):
            return 0.0
        counts = rows if len(products) == len(rows) else rows[:1] * len(products)
        time = sum(self._timings.product(n, d, e) for n, (d, e) in zip(counts, products, strict=True) if n)
        return weight.groups * time + (self._timings.moved(rows[0], moved) if moved else 0.0)

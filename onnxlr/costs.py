"""What a form of a weight costs, in the unit of a budget.

Every form is a list of matrix products `[rows, d] x [d, e]`, so one rule prices them all: parameters are the elements
of the matrices, multiply-accumulates those times the rows of one sample, and latency the sum of their times. A product
that runs as a convolution is timed as such: `d` are its channels times the size of its kernel.
"""

from __future__ import annotations

from collections import Counter
from math import ceil, prod
from typing import TYPE_CHECKING, Protocol

from onnxlr.forms import block_products, pair_products, separable_products
from onnxlr.rewrite import copies, new_biases

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from onnxlr.forms import Products
    from onnxlr.latency import Timings
    from onnxlr.sites import Inventory, Weight
    from onnxlr.sites.convolution import Convolution

SIZES = 64
"""Steps of the sizes of products that are timed beforehand; between, time is interpolated, or taken when asked for."""


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
    """Microseconds of one run, from products and convolutions timed on this machine (`onnxlr.latency`).

    Parameters
    ----------
    inventory
        The model. Weights whose rows are unknown cost nothing, in whatever form: they stay dense.
    timings
        Times of products and convolutions.
    batch
        Samples in a run.
    whole
        Microseconds of the dense model.
    rank_multiple
        Ranks are multiples of it.
    """

    flag = "--max-latency"

    def __init__(
        self, inventory: Inventory, timings: Timings, batch: int, whole: float, rank_multiple: int = 16
    ) -> None:
        self._timings, self._batch, self.whole, self._multiple = timings, batch, whole, rank_multiple
        # all together: what else the machine does then meets all of them alike
        timings.measure(
            timed
            for weight in inventory.weights
            for timed in (self._convolutions(weight) if weight.convolutions else self._products(weight))
        )

    def _products(self, weight: Weight) -> Iterator[tuple[int, int, int]]:
        """What forms of a weight may need the times of."""
        # a first product that costs nothing is never asked for, and the second reads no more than the rank
        d_in = weight.d_in if weight.rows[0] else min(weight.d_in, weight.d_out)
        for rows in filter(None, dict.fromkeys(self._rows(weight))):
            for d in {*range(SIZES, d_in, SIZES), d_in}:
                yield from ((rows, d, e) for e in {*range(SIZES, weight.d_out, SIZES), weight.d_out})

    def _convolutions(self, weight: Weight) -> Iterator[tuple[Convolution, int, int]]:
        """What forms of a weight that runs as convolutions may need the times of."""
        d_in, d_out, taps = weight.d_in, weight.d_out, weight.taps
        yield from self._as_convolutions(weight, ((d_in, d_out),))
        for rank in range(self._multiple, min(d_in, d_out), self._multiple):
            yield from self._as_convolutions(weight, pair_products(d_in, d_out, rank))
            for side in sorted(weight.block_sides):
                yield from self._as_convolutions(weight, block_products(d_in, d_out, rank, side))
        even = d_in * d_out / (d_in // taps + taps * d_out)  # the rank of a split that is no smaller
        for rank in range(self._multiple, ceil(even) if taps > 1 else 0, self._multiple):
            yield from self._as_convolutions(weight.in_strips, separable_products(d_in, d_out, rank, taps))

    def _as_convolutions(self, weight: Weight, products: Products) -> Iterator[tuple[Convolution, int, int]]:
        """The convolutions of all sites that `products` are run as, and between how many channels of each group."""
        for operators in weight.convolutions:
            for one, (d, e) in zip(operators, products, strict=False):  # a dense weight is the first alone
                yield one.times(self._batch), d // prod(one.kernel), e

    def _rows(self, weight: Weight) -> tuple[int, int]:
        first, second = weight.rows
        return round(self._batch * first), round(self._batch * second)

    def dense(self, weight: Weight) -> float:
        return self.form(weight, ((weight.d_in, weight.d_out),), moved=0, corrected=False)

    def form(self, weight: Weight, products: Products, *, moved: int, corrected: bool) -> float:
        rows = self._rows(weight)
        if not any(rows):
            return 0.0
        if weight.convolutions:
            time = sum(self._timings.product(*timed) for timed in self._as_convolutions(weight, products))
        else:
            counts = rows if len(products) == len(rows) else rows[:1] * len(products)
            each = sum(self._timings.product(n, d, e) for n, (d, e) in zip(counts, products, strict=True) if n)
            time = weight.groups * each
        return time + (self._timings.moved(rows[0], moved) if moved else 0.0)

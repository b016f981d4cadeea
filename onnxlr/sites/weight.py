"""What was found in a model: weights with the sites that use them, and all else that is linear, with reasons."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from onnxlr.sites.families import FAMILIES, matrix_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnxlr.forms import Products, Side
    from onnxlr.model_io import Model
    from onnxlr.sites.base import Refusal, Site
    from onnxlr.sites.constants import GraphView
    from onnxlr.sites.convolution import Convolution
    from onnxlr.sites.structure import Chain


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight `W [d_in, d_out]` and the sites that use it.

    `sources` are the stored constants it is read from (several where an exporter copied it), `parameters` their
    elements together. `macs` are those of all its sites for one sample, None where unknown; `rows` how many rows of one
    sample the first and the second product of a pair multiply. `needs_input` is set where the moments of its input
    matter even if its output is smaller: it ends a chain, or others read the same tensor. `convolutions` are what the
    two products of a pair are run as for one sample, at each site of known shapes; none where one is no convolution.
    """

    name: str
    d_in: int
    d_out: int
    dtype: str
    sites: tuple[Site, ...]
    sources: tuple[str, ...]
    parameters: int
    macs: int | None
    rows: tuple[float, float] = (0, 0)
    needs_input: bool = False
    convolutions: tuple[tuple[Convolution, Convolution], ...] = ()

    @property
    def taps(self) -> int:
        """The columns of a kernel that all of its sites can have split into a column and a row; else 1."""
        kernels = {(site.kernel, site.taps) for site in self.sites}
        return self.sites[0].taps if len(kernels) == 1 else 1

    @property
    def in_strips(self) -> Weight:
        """The weight as a split of its kernel sees it: by its patches, and with the rows of its two products."""
        halves = tuple(dense.halves() for dense, _ in self.convolutions)
        strips = sum(column.positions for column, _ in halves)
        return replace(self, needs_input=True, rows=(strips, self.rows[1]), convolutions=halves)

    @property
    def shows_input(self) -> bool:
        """Whether moments can be gathered of its inputs: no table is among its sites."""
        return all(site.input_rows for site in self.sites)

    @property
    def tied(self) -> bool:
        """Whether it is a table of embeddings and, transposed, the output head too."""
        return any(site.transposed for site in self.sites)

    @property
    def corrected(self) -> bool:
        """Whether a cut can be made up for by a bias: all of its sites have a place for one, of `d_out` numbers."""
        return not self.tied and all(FAMILIES[site.op].corrects for site in self.sites)

    @property
    def observes_output(self) -> bool:
        """Whether moments are gathered of its outputs: they are the smaller side, and those of the input not needed.

        Where no tensor shows the input, they have to be.
        """
        smaller = not self.needs_input and all(site.observes_output for site in self.sites)
        return smaller or not self.shows_input

    @property
    def groups(self) -> int:
        """The number of its matrices [d_in, d_out], one of which each of its sites has as many of."""
        return self.sites[0].groups

    def macs_of(self, products: Products) -> float:
        """Multiply-accumulates of one sample with the weight, or each of its groups, stored as `products`."""
        rows = self.rows if len(products) == len(self.rows) else (self.rows[0],) * len(products)
        return self.groups * sum(n * d * e for n, (d, e) in zip(rows, products, strict=True))

    @property
    def block_sides(self) -> frozenset[Side]:
        """On which sides all of its sites can be written with an identity block."""
        return frozenset.intersection(*(site.block_sides for site in self.sites))

    def matches(self, pattern: str) -> bool:
        """Whether a shell pattern matches its own name, or the name or module of one of its sites."""
        names = {self.name, *(site.name for site in self.sites), *self.labels}
        return pattern in names or any(fnmatchcase(name, pattern) for name in names)

    @property
    def labels(self) -> tuple[str, ...]:
        """What people know its sites by."""
        return tuple(site.label for site in self.sites)


@dataclass(frozen=True, slots=True)
class Inventory:
    """A model's linear operators.

    Attributes
    ----------
    weights
        What can be compressed.
    refusals
        What cannot, and why.
    parameters
        Elements of all the model's weights: every constant but those of integer and boolean index types.
    macs
        Multiply-accumulates of one sample over all operators whose shapes are known; None without shapes.
    uncounted
        Names of the nodes that multiply but whose shapes are unknown, so that `macs` lacks them.
    chains
        Weights that make the hidden units of another, with that one.
    shared
        Names of weights that read one tensor, two or more at a time.
    nodes, view
        The graph that was searched: its nodes by their outputs, and its constants.
    """

    model: Model
    weights: tuple[Weight, ...]
    refusals: tuple[Refusal, ...]
    parameters: int
    macs: int | None
    uncounted: tuple[str, ...]
    chains: tuple[Chain, ...]
    shared: tuple[tuple[str, ...], ...]
    nodes: Mapping[str, gs.Node] = field(repr=False)
    view: GraphView = field(repr=False)

    def matrix(self, weight: Weight) -> NDArray[np.float64]:
        """`W [d_in, d_out]`, or [groups, d_in, d_out], float64, read from the model now."""
        return matrix_of(weight.sites[0], self.nodes, self.view)

    def observing(self, forms: Collection[str]) -> Inventory:
        """The same, with moments of inputs that are larger than the outputs only where one of `forms` needs them.

        They are those of what a chain makes, for the form "width", and of what several weights read, for "shared".
        """
        needed = {chain.consumer for chain in self.chains if "width" in forms}
        needed |= {name for members in self.shared if "shared" in forms for name in members}
        return replace(self, weights=tuple(replace(w, needs_input=w.name in needed) for w in self.weights))

    def own_bias(self, site: Site) -> NDArray[np.float64] | None:
        """The constant vector [groups * d_out] that the site's own node adds to its output; None for an Add behind."""
        if site.bias is None or site.bias.reader != site.output:
            return None
        values = self.view.values(self.view.tensors[site.bias.tensor])
        return site.bias.scale * values.ravel().astype(np.float64)

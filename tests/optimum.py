"""A model of one weight, cut to a rank by what its data show, and the least that any pair of that rank can lose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from models import relative, run

from onnxlr.calibrate import accumulate
from onnxlr.config import Config
from onnxlr.factorize import WeightDecomposition
from onnxlr.factors import Factors
from onnxlr.forms import Stored
from onnxlr.layer import Layer, grouped
from onnxlr.probes import weight_moments
from onnxlr.rewrite import rewrite
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes
from onnxlr.sites import Inventory, Weight, take_inventory
from onnxlr.trial import Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxlr.model_io import Model
    from onnxlr.sites import Site

    Array = NDArray[Any]

CONFIG = Config(objective="output", threads=1, batch=100_000)
TOLERANCE = {"float16": 6 * 2.0**-11, "float32": 1e-5, "float64": 1e-12}


def only_weight(model: Model, **feed: Array) -> tuple[Inventory, Weight]:
    """The inventory of a model with one weight and nothing refused."""
    inventory = take_inventory(model, measure_shapes(model, feed))
    assert not inventory.refusals
    (weight,) = inventory.weights
    return inventory, weight


def matrices(inventory: Inventory, weight: Weight) -> Array:
    """[groups, d_in, d_out]."""
    return inventory.matrix(weight).reshape(weight.groups, weight.d_in, weight.d_out)


def on_output(site: Site, vector: Array, y: Array) -> Array:
    """A vector [groups * d_out], where it belongs on an output `y`, by the site's rows."""
    placed = np.zeros(y.shape)
    for rows, part in zip(site.output_rows, vector.reshape(site.groups, site.d_out), strict=True):
        chunk = placed[rows.chunk(y.shape)]
        order = rows.order(y.ndim)
        turned = chunk.transpose(order)
        turned[...] = part.reshape(turned.shape[-len(rows.axes) :])
    return placed


def assert_full_rank_is_dense(model: Model, **feed: Array) -> None:
    """A pair of full rank, as a constant and as a trial feeds it; and a correction of its output."""
    inventory, weight = only_weight(model, **feed)
    (site,) = weight.sites
    dense = run(model, **feed)["y"]
    own = [WeightDecomposition(each).cut(min(weight.d_in, weight.d_out)) for each in matrices(inventory, weight)]
    first, second = np.stack([f.first for f in own]), np.stack([f.second for f in own])
    if weight.groups == 1:
        first, second = first[0], second[0]
    correction = np.random.default_rng(9).standard_normal(weight.groups * weight.d_out)
    tolerance = TOLERANCE[weight.dtype]
    plain = rewrite(inventory, {weight.name: Stored(first, second, None)})
    assert relative(dense, run(plain, **feed)["y"]) < tolerance
    corrected = rewrite(inventory, {weight.name: Stored(first, second, correction)})
    expected = dense.astype(np.float64) + on_output(site, correction, dense)
    assert relative(expected, run(corrected, **feed)["y"]) < tolerance
    for bias, real in ((None, plain), (correction, corrected)):
        tried = Trial(inventory, [weight], Session(model).inputs, CONFIG, corrected=bias is not None)
        observed = tried.observe([feed])
        assert tried.error({}, observed) < tolerance
        error = tried.error({weight.name: Factors(first, second, bias)}, observed)
        assert abs(error - relative(dense, run(real, **feed)["y"])) < tolerance


def assert_cut_is_the_optimum(model: Model, rank: int, rows: list[Array], **feed: Array) -> None:
    """No pair of this rank with a bias loses less; `rows` are the products `x W` [n, d_out] of each group.

    What is lost at least is the tail of the singular values of the centred product: Eckart and Young.
    """
    inventory, weight = only_weight(model, **feed)
    stats = accumulate(model, inventory, [feed], Session(model).inputs, CONFIG)
    moments = weight_moments(stats, inventory, weight, "output")
    layers = [
        Layer(each, own, observed_output=weight.observes_output)
        for each, own in zip(matrices(inventory, weight), moments, strict=True)
    ]
    decomposition = grouped(layers).decompose()
    compressed = rewrite(inventory, {weight.name: Stored.pair(decomposition.cut(rank))})
    lost = np.sum((run(compressed, **feed)["y"] - run(model, **feed)["y"]) ** 2)
    squares = [np.linalg.svd(y - y.mean(0), compute_uv=False) ** 2 for y in rows]
    total, least = sum(float(s.sum()) for s in squares), sum(float(s[rank:].sum()) for s in squares)
    # the ridge turns the basis by a millionth of the energy
    assert abs(lost - least) < 1e-5 * total
    assert abs(decomposition.damage(rank) * len(rows[0]) - least) < 1e-5 * total

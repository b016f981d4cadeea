"""Convolutions and their transposes as linear layers: layout, rows, pairs, optimum, costs, refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import parsed, random, relative, run
from onnx import TensorProto, helper, numpy_helper

import onnxlr
from onnxlr.calibrate import accumulate
from onnxlr.config import Config, Target
from onnxlr.errors import ModelError
from onnxlr.factors import Factors
from onnxlr.forms import MAX_CONDITION, Stored, as_block, best_window
from onnxlr.layer import Layer, grouped
from onnxlr.model_io import Model, from_proto
from onnxlr.probes import weight_moments
from onnxlr.rewrite import rewrite
from onnxlr.rows import Patches
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes
from onnxlr.sites import Inventory, Weight, take_inventory
from onnxlr.sites.conv import DEPTHWISE
from onnxlr.sites.convolution import Convolution

if TYPE_CHECKING:
    from onnxlr.config import Objective

    Array = np.ndarray[Any, Any]

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
TOLERANCE = {"float32": 2e-5, "float16": 2e-2}


@dataclass(frozen=True)
class Case:
    """A model `y = op(x)` of one convolution, and data for it."""

    model: Model
    x: Array

    @property
    def inventory(self) -> Inventory:
        return take_inventory(self.model, measure_shapes(self.model, {"x": self.x}))


def case(op: str, weight: Array, x: Array, bias: Array | None = None, opset: int = 17, **attributes: Any) -> Case:
    element = TYPES[weight.dtype.name]
    arrays = {"w": weight} | ({} if bias is None else {"b": bias})
    node = helper.make_node(op, ["x", *arrays], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", element, ["N", x.shape[1], *(f"s{axis}" for axis in range(x.ndim - 2))])],
        [helper.make_tensor_value_info("y", element, [None] * x.ndim)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])
    onnx.checker.check_model(proto)
    return Case(from_proto(proto), x)


@st.composite
def convolutions(draw: st.DrawFn, ops: tuple[str, ...] = ("Conv", "ConvTranspose")) -> Case:
    op, rank = draw(st.sampled_from(ops)), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    c_in, c_out = draw(st.integers(2, 4)), draw(st.integers(1, 5))
    axes = {"min_size": rank, "max_size": rank}
    kernel = draw(st.lists(st.integers(1, 3), **axes))
    strides = draw(st.lists(st.integers(1, 2), **axes))
    dilations = draw(st.lists(st.integers(1, 2), **axes))
    pads = draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
    attributes: dict[str, Any] = {"group": groups, "strides": strides, "dilations": dilations}
    automatic = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])) if op == "Conv" else "NOTSET"
    if automatic.startswith("SAME"):
        attributes["dilations"] = [1] * rank  # onnxruntime refuses others
    attributes |= {"pads": pads} if automatic == "NOTSET" else {"auto_pad": automatic}
    if op == "ConvTranspose":
        more = [draw(st.integers(0, step - 1)) for step in strides]
        attributes["output_padding"] = more
    lengths = draw(st.lists(st.integers(5, 7), **axes))
    seed = draw(st.integers(0, 2**31))
    shape = (groups * c_out, c_in, *kernel) if op == "Conv" else (groups * c_in, c_out, *kernel)
    bias = random(seed + 2, groups * c_out) if draw(st.booleans()) else None
    # so few that no patches are sampled
    x = random(seed, 1 if rank == 3 else 3, groups * c_in, *lengths) + np.float32(0.5)
    return case(op, random(seed + 1, *shape), x, bias, **attributes)


def outputs(given: Case) -> Array:
    """What onnxruntime makes of the data; cases that it cannot run, or whose output is empty, are no cases."""
    try:
        result = run(given.model, x=given.x)["y"]
    except ModelError:
        assume(False)
    assume(result.size > 0)
    return result


def full_rank(inventory: Inventory, weight: Weight, rank: int | None = None) -> Stored:
    """`W` as the product of two factors, cut to `rank`."""
    u, s, vt = np.linalg.svd(inventory.matrix(weight), full_matrices=False)
    root = np.sqrt(s[..., :rank])
    return Stored.pair(Factors(u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :], None))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(convolutions())
def test_a_pair_is_run_as_the_convolutions_that_are_written(given: Case) -> None:
    outputs(given)
    inventory = given.inventory
    (weight,) = inventory.weights
    rank = min(weight.d_in, weight.d_out)
    assume(weight.groups == 1 or rank > 1)  # what reads a single channel in each group is no site
    small = Case(rewrite(inventory, {"w": full_rank(inventory, weight)}), given.x).inventory
    first, second = small.weights
    assert weight.convolutions == ((first.convolutions[0][0], second.convolutions[0][0]),)
    (node,) = given.model.proto.graph.node
    stated = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    ((dense, _),) = weight.convolutions
    assert (dense.op, dense.groups, list(dense.kernel)) == (node.op_type, stated["group"], list(weight.sites[0].kernel))
    assert (dense.samples, dense.read) == (len(given.x), given.x.shape[2:])
    assert dense.positions * weight.groups * weight.d_in * weight.d_out == weight.macs
    assert {"strides": tuple(stated["strides"]), "dilations": tuple(stated["dilations"])}.items() <= dict(
        dense.attributes
    ).items()
    assert Convolution.from_dict(json.loads(json.dumps(dense.to_dict()))) == dense


@settings(max_examples=120, deadline=None, derandomize=True)
@given(convolutions())
def test_rows_times_matrix_is_what_onnxruntime_computes(given: Case) -> None:
    y = outputs(given)
    inventory = given.inventory
    (weight,) = inventory.weights
    (site,) = weight.sites
    matrices = inventory.matrix(weight).reshape(-1, weight.d_in, weight.d_out)
    own = inventory.own_bias(site)
    for group, (read, written) in enumerate(zip(site.input_rows, site.output_rows, strict=True)):
        product = read.of(given.x).astype(np.float64) @ matrices[group]
        if own is not None:
            product += own[group * weight.d_out : (group + 1) * weight.d_out]
        assert relative(product, written.of(y)) < TOLERANCE[weight.dtype]
    rows = y.size // (weight.groups * weight.d_out)
    assert weight.rows[1] == rows
    assert weight.macs == inventory.macs == weight.macs_of(((weight.d_in, weight.d_out),))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(convolutions(), st.booleans())
def test_full_rank_is_the_dense_model_and_a_correction_is_added_to_it(given: Case, corrected: bool) -> None:
    y = outputs(given)
    inventory = given.inventory
    (weight,) = inventory.weights
    pair = full_rank(inventory, weight)
    correction = random(9, weight.groups * weight.d_out, dtype=np.float64) if corrected else None
    model = rewrite(inventory, {weight.name: Stored(pair.first, pair.second, correction)})
    onnx.checker.check_model(model.proto, full_check=True)
    expected = y.astype(np.float64)
    if correction is not None:
        expected = expected + correction.reshape(-1, *(1,) * (y.ndim - 2))
    assert relative(expected, run(model, x=given.x)["y"]) < 2 * TOLERANCE[weight.dtype]
    assert model.proto.graph.node[-1].output[0] == "y"
    assert "w" not in {tensor.name for tensor in model.proto.graph.initializer}


def decomposed(given: Case, objective: Objective) -> tuple[Inventory, Weight, Any]:
    inventory = given.inventory
    (weight,) = inventory.weights
    config = Config(objective=objective, threads=1)
    stats = accumulate(given.model, inventory, [{"x": given.x}], Session(given.model).inputs, config)
    moments = weight_moments(stats, inventory, weight, objective)
    matrices = inventory.matrix(weight).reshape(-1, weight.d_in, weight.d_out)
    layers = [
        Layer(
            matrix,
            own,
            observed_output=weight.observes_output and objective != "utilized",
            projected=objective == "utilized",
        )
        for matrix, own in zip(matrices, moments, strict=True)
    ]
    return inventory, weight, grouped(layers).decompose()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions(), st.integers(1, 3))
def test_a_cut_loses_what_the_least_squares_optimum_must_lose(given: Case, rank: int) -> None:
    y = outputs(given)
    inventory, weight, decomposition = decomposed(given, "output")
    rank = min(rank, weight.d_in, weight.d_out)
    factors = decomposition.cut(rank)
    model = rewrite(inventory, {weight.name: Stored.pair(factors)})
    lost = run(model, x=given.x)["y"].astype(np.float64) - y
    least = 0.0
    for rows in weight.sites[0].output_rows:
        seen = rows.of(y).astype(np.float64)
        least += float(np.sum(np.linalg.svd(seen - seen.mean(0), compute_uv=False)[rank:] ** 2))
    energy = float(np.sum((y.astype(np.float64) - y.mean()) ** 2)) + 1e-9
    assert abs(np.sum(lost**2) - least) / energy < 1e-4
    assert abs(decomposition.damage(rank) * (y.size // (weight.groups * weight.d_out)) - least) / energy < 1e-4


@settings(max_examples=20, deadline=None, derandomize=True)
@given(convolutions())
def test_the_paper_s_projection_sees_the_patches(given: Case) -> None:
    outputs(given)
    _, weight, decomposition = decomposed(given, "utilized")
    for group, rows in enumerate(weight.sites[0].input_rows):
        seen = rows.of(given.x).astype(np.float64)
        own = decomposition if weight.groups == 1 else decomposition._members[group]
        np.testing.assert_allclose(own._inputs.values.sum(), (seen**2).sum() / len(seen), rtol=1e-5)


@pytest.mark.parametrize(("kernel", "sides"), [(1, {"input", "output"}), (3, {"output"})])
@pytest.mark.parametrize("bias", [None, random(3, 12)])
def test_blocks_of_a_convolution(kernel: int, sides: set[str], bias: Array | None) -> None:
    given = case("Conv", random(1, 12, 10, kernel, kernel), random(2, 2, 10, 6, 6), bias)
    inventory = given.inventory
    (weight,) = inventory.weights
    assert weight.block_sides == sides
    pair = full_rank(inventory, weight, 4)
    assert pair.first is not None
    expected = run(rewrite(inventory, {"w": pair}), x=given.x)["y"]
    for side in sorted(weight.block_sides):
        window = best_window(pair.first if side == "input" else pair.second, side)
        assert window.condition < MAX_CONDITION["float32"]
        model = rewrite(inventory, {"w": as_block(pair, window)})
        onnx.checker.check_model(model.proto, full_check=True)
        assert relative(expected, run(model, x=given.x)["y"]) < 1e-3


def test_normalization_and_activation_behind_a_pair_stay_right() -> None:
    arrays = {
        "w": random(1, 8, 6, 3, 3), "b": random(2, 8), "s": np.abs(random(3, 8)) + 0.5, "o": random(4, 8),
        "m": random(5, 8), "v": np.abs(random(6, 8)) + 0.5,
    }  # fmt: skip
    body = "c = Conv<pads = [1, 1, 1, 1]>(x, w, b) n = BatchNormalization(c, s, o, m, v) y = Relu(n)"
    model = parsed("(float[N, 6, 9, 9] x) => (float[N, 8, 9, 9] y)", body, **arrays)
    x = random(7, 3, 6, 9, 9)
    inventory = take_inventory(model)
    small = rewrite(inventory, {"w": full_rank(inventory, inventory.weights[0])})
    assert relative(run(model, x=x)["y"], run(small, x=x)["y"]) < 1e-5


def test_half_precision_convolutions() -> None:
    given = case("Conv", random(1, 8, 6, 3, 3, dtype=np.float16), random(2, 2, 6, 7, 7, dtype=np.float16))
    inventory = given.inventory
    small = rewrite(inventory, {"w": full_rank(inventory, inventory.weights[0])})
    assert relative(run(given.model, x=given.x)["y"], run(small, x=given.x)["y"]) < TOLERANCE["float16"]


def test_many_patches_are_sampled_and_the_same_ones_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = Patches((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    x = random(1, 2, 3, 20, 20)
    everything = patches.of(x)
    assert everything.shape == (2 * 20 * 20, 27)
    monkeypatch.setattr("onnxlr.rows.PATCH_ROWS", 100)
    some = patches.of(x)
    assert some.shape == (100, 27)
    known = {row.tobytes() for row in everything}
    assert all(row.tobytes() in known for row in some)
    assert np.array_equal(some, patches.of(x.copy()))


@pytest.mark.parametrize(
    ("op", "weight", "attributes", "reason"),
    [
        ("Conv", random(1, 6, 1, 3, 3), {"group": 6}, DEPTHWISE),
        ("ConvTranspose", random(1, 6, 1, 3, 3), {"group": 6}, DEPTHWISE),
        (
            "ConvTranspose",
            random(1, 6, 5, 3, 3),
            {"auto_pad": "SAME_UPPER"},
            "its padding follows from the size of its output: state it as pads",
        ),
    ],
)
def test_what_is_refused(op: str, weight: Array, attributes: dict[str, Any], reason: str) -> None:
    inventory = case(op, weight, random(2, 1, 6, 7, 7), **attributes).inventory
    assert not inventory.weights
    assert [(refusal.op, refusal.reason, refusal.parameters) for refusal in inventory.refusals] == [
        (op, reason, weight.size)
    ]


def test_weights_and_biases_that_are_not_constant_are_no_sites() -> None:
    signature = "(float[N, 6, 9, 9] x, float[8, 6, 3, 3] w, float[8] b) => (float[N, 8, 7, 7] y)"
    assert not take_inventory(parsed(signature, "y = Conv(x, w, b)")).weights
    (refusal,) = take_inventory(parsed(signature, "y = Conv(x, v, b)", v=random(1, 8, 6, 3, 3))).refusals
    assert refusal.reason == "its bias is not constant: make it an initializer that is no input of the graph"


def cnn() -> Model:
    arrays = {
        "w1": random(1, 16, 3, 3, 3) / 5, "b1": random(2, 16), "w2": random(3, 24, 16, 3, 3) / 12, "b2": random(4, 24),
        "w3": random(5, 16, 24, 1, 1) / 5, "w4": random(6, 32, 8, 3, 3) / 8, "w5": random(7, 32, 10) / 6,
    }  # fmt: skip
    body = """a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) b = Relu(a) c = Conv<strides = [2, 2]>(b, w2, b2) d = Relu(c)
              e = Conv(d, w3) f = Relu(e) g = Conv<group = 2>(f, w4) h = GlobalAveragePool(g) k = Flatten(h)
              y = MatMul(k, w5)"""
    return parsed("(float[N, 3, 12, 12] x) => (float[N, 10] y)", body, **arrays)


@pytest.mark.parametrize("objective", ["output", "fisher", "utilized", "weight"])
def test_a_small_network_keeps_half_of_its_multiplications(objective: Objective) -> None:
    if objective == "fisher":
        pytest.importorskip("torch")
    config = Config(objective=objective, target=Target("keep_macs", 0.5), rank_multiple=1, threads=1)
    report = onnxlr.compress(cnn(), [{"x": x[None]} for x in random(8, 64, 3, 12, 12)], config)
    assert report.after.macs is not None
    assert report.before.macs is not None
    assert report.after.macs <= 0.5 * report.before.macs
    assert {weight.name for weight in report.weights if weight.form != "dense"} >= {"w2"}
    assert not report.refusals
    assert report.validation.error < 0.7

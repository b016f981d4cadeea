"""FusedMatMulActivation, which no CPU runs: what is written for it, and what that computes once its parts are nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from models import random, relative, run
from onnx import TensorProto, helper, numpy_helper

from onnxlr.calibrate import accumulate
from onnxlr.case import prepare
from onnxlr.config import Config
from onnxlr.factors import Factors
from onnxlr.forms import Stored
from onnxlr.model_io import from_proto
from onnxlr.parts import parts_of
from onnxlr.rewrite import rewrite
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes
from onnxlr.sites import take_inventory

if TYPE_CHECKING:
    from onnxlr.model_io import Model

    Array = np.ndarray[Any, Any]

GEMM = random(1, 6, 5)


def pair(matrix: Array, rank: int | None = None) -> Stored:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return Stored.pair(Factors(u[:, :rank] * s[:rank] ** 0.5, s[:rank, None] ** 0.5 * vt[:rank], None))


def unfused(model: Model) -> Model:
    """The same model with every FusedMatMulActivation as the FusedMatMul and the activation that it is."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for node in nodes:
        if node.op_type != "FusedMatMulActivation":
            proto.graph.node.append(node)
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        own = {name.removeprefix("activation_"): given.pop(name) for name in list(given) if "activation_" in name}
        op, inner = given.pop("activation").decode(), f"{node.output[0]}/product"
        proto.graph.node.extend(
            [
                helper.make_node("FusedMatMul", node.input, [inner], domain="com.microsoft", **given),
                helper.make_node(op, [inner], node.output, **own),
            ]
        )
    return from_proto(proto)


ACTIVATIONS: dict[str, dict[str, Any]] = {
    "Relu": {},
    "LeakyRelu": {"activation_alpha": 0.3},
    "Tanh": {},
    "Softmax": {"activation_axis": -1},
}


def activated(activation: str, left: bool = False, flip_w: int = 0, flip_x: int = 0) -> Model:
    stored = GEMM.T.copy() if left != bool(flip_w) else GEMM
    flags = {"transA": flip_w, "transB": flip_x} if left else {"transA": flip_x, "transB": flip_w}
    node = helper.make_node(
        "FusedMatMulActivation", ["w", "x"] if left else ["x", "w"], ["y"], domain="com.microsoft", alpha=-0.5,
        activation=activation, **flags, **ACTIVATIONS[activation],
    )  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["K", "M", "N"]) for name in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [numpy_helper.from_array(stored, "w")])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return from_proto(helper.make_model(graph, ir_version=8, opset_imports=opsets))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("flip_w", "flip_x"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_product_with_an_activation_keeps_the_second_factor(
    activation: str, left: bool, flip_w: int, flip_x: int
) -> None:
    model = activated(activation, left, flip_w, flip_x)
    x = random(3, 3, *((6, 4) if left != bool(flip_x) else (4, 6)))
    shapes = measure_shapes(unfused(model), {"x": x})
    inventory = take_inventory(model, shapes | {"y": shapes["y/product"]})
    (weight,) = inventory.weights
    matrix = inventory.matrix(weight)
    np.testing.assert_allclose(matrix, -0.5 * GEMM.astype(np.float64))
    assert (weight.sites[0].output_rows, weight.sites[0].bias, weight.corrected) == ((), None, False)
    assert not weight.block_sides
    assert (weight.macs, weight.rows) == (12 * 30, (12, 12))
    np.testing.assert_array_equal(weight.sites[0].input_rows[0].of(x)[0], x[0, :, 0] if x.shape[1] == 6 else x[0, 0])
    whole = rewrite(inventory, {"w": pair(matrix)})
    first, second = whole.proto.graph.node
    assert (first.op_type, second.op_type) == ("FusedMatMul" if flip_x else "MatMul", "FusedMatMulActivation")
    assert (second.domain, second.output) == ("com.microsoft", ["y"])
    kept = {a.name: helper.get_attribute_value(a) for a in second.attribute}
    turned = {"alpha": 1.0, "transA": 0, "transB": 0}
    assert kept == pytest.approx({"activation": activation.encode(), **ACTIVATIONS[activation], **turned})
    assert "w" not in {tensor.name for tensor in whole.proto.graph.initializer}
    assert relative(run(unfused(model), x=x)["y"], run(unfused(whole), x=x)["y"]) < 1e-5


def test_what_cannot_be_corrected_is_cut_by_moments_about_nothing() -> None:
    """Least squares on `x W` without a bias, whatever the mean of `x`: Eckart and Young for the product as it is."""
    x = random(3, 3, 4, 6) + 2
    config = Config(objective="output", threads=1)
    model = activated("Relu")
    inventory = take_inventory(model)
    stats = accumulate(unfused(model), inventory, [{"x": x}], Session(unfused(model)).inputs, config)
    case = prepare(unfused(model), [{"x": x}] * 2, config)
    (part,) = parts_of(replace(case, inventory=inventory, weights=inventory.weights), stats, config)
    products = x.reshape(-1, 6).astype(np.float64) @ inventory.matrix(part.weight)
    values = np.linalg.svd(products, compute_uv=False) ** 2
    for rank in (1, 3):
        stored = part.pair(rank)
        assert stored.bias is None
        assert stored.first is not None
        lost = np.sum((x.reshape(-1, 6) @ stored.first @ stored.second - products) ** 2)
        assert abs(lost - values[rank:].sum()) < 1e-5 * values.sum()


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu"])
def test_torch_runs_a_product_with_an_activation(activation: str) -> None:
    pytest.importorskip("torch")
    from onnxlr.torch_graph import to_torch
    from onnxlr.torch_graph.tensors import to_array, to_tensor

    model, x = activated(activation, flip_x=1), random(3, 3, 6, 4)
    small = rewrite(take_inventory(model), {"w": pair(-0.5 * GEMM.astype(np.float64), 3)})
    for each in (model, small):
        found = to_array(to_torch(each)({"x": to_tensor(x)})["y"])
        assert relative(run(unfused(each), x=x)["y"], found) < 1e-5


def test_torch_names_an_activation_that_it_does_not_have() -> None:
    pytest.importorskip("torch")
    from onnxlr.torch_graph import UnsupportedOperatorsError, to_torch

    with pytest.raises(UnsupportedOperatorsError, match=r"FusedMatMulActivation .opset 1, attribute activation_axis"):
        to_torch(activated("Softmax"))

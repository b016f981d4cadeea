"""Functions that hold linear operators are inlined, with their weights; all others stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from conftest import invoke
from models import parsed, random, relative, run

import onnxlr
from onnxlr.config import Config, Target
from onnxlr.model_io import load, save
from onnxlr.sites import take_inventory
from onnxlr.unfold import unfold

if TYPE_CHECKING:
    from pathlib import Path

    from onnxlr.model_io import Model

    Array = np.ndarray[Any, Any]

D = 32
W, V, X = random(1, D, D), random(2, D, D), random(3, 64, D)
LAYER = '<domain: "local", opset_import: ["" : 17]> layer (a, m) => (r) { [held] p = MatMul(a, m) r = Tanh(p) } '
BLOCK = (
    '<domain: "local", opset_import: ["" : 17, "local" : 1]> block (a, m, n) => (r) '
    "{ b = local.layer(a, m) r = local.layer(b, n) } "
)
SHIFT = '<domain: "local", opset_import: ["" : 17]> shift (a) => (r) { r = Relu(a) } '
CALLS = "h = local.block(x, w, v) s = local.shift(h) y = local.layer(s, w)"


def with_functions(layer: str = LAYER) -> Model:
    signature = f"(float[N, {D}] x) => (float[N, {D}] y)"
    return parsed(signature, CALLS, tail=layer + BLOCK + SHIFT, w=W, v=V)


def test_functions_with_linear_operators_are_inlined_and_others_stay() -> None:
    model, notes = unfold(with_functions())
    assert notes == ("the functions 'block', 'layer' hold linear operators and were inlined",)
    assert [function.name for function in model.proto.functions] == ["shift"]
    assert [node.op_type for node in model.proto.graph.node] == [
        "MatMul",
        "Tanh",
        "MatMul",
        "Tanh",
        "shift",
        "MatMul",
        "Tanh",
    ]
    onnx.checker.check_model(model.proto, full_check=True)
    assert np.array_equal(run(model, x=X)["y"], run(with_functions(), x=X)["y"])
    inventory = take_inventory(model)
    assert {weight.name: len(weight.sites) for weight in inventory.weights} == {"w": 2, "v": 1}
    assert not inventory.refusals


def test_a_weight_in_a_function_is_one_however_often_it_is_called() -> None:
    values = ", ".join(map(str, range(36)))
    layer = (
        '<domain: "local", opset_import: ["" : 17]> layer (a) => (r) { '
        f"m = Constant<value = float[6, 6] {{{values}}}>() p = MatMul(a, m) r = Tanh(p) }} "
    )
    text = "(float[N, 6] x) => (float[N, 6] y)", "g = local.layer(x) h = local.layer(g) y = local.layer(h)"
    given = parsed(*text, tail=layer)
    model, _ = unfold(given)
    onnx.checker.check_model(model.proto, full_check=True)
    assert np.array_equal(run(model, x=X[:, :6])["y"], run(given, x=X[:, :6])["y"])
    inventory = take_inventory(model)
    assert [(weight.parameters, len(weight.sites)) for weight in inventory.weights] == [(36, 3)]
    assert inventory.parameters == 36


def test_a_model_without_such_functions_is_returned_itself() -> None:
    model = parsed(f"(float[N, {D}] x) => (float[N, {D}] y)", "s = local.shift(x) y = MatMul(s, w)", tail=SHIFT, w=W)
    assert unfold(model) == (model, ())


def test_external_weights_stay_external_until_they_are_read(tmp_path: Path) -> None:
    save(with_functions(), tmp_path / "model.onnx", size_threshold=0)
    loaded = load(tmp_path / "model.onnx")
    model, _ = unfold(loaded)
    assert list(model.proto.graph.initializer) == list(loaded.proto.graph.initializer)
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.proto.graph.initializer)
    assert (model.path, model.folder, model.nbytes) == (loaded.path, loaded.folder, loaded.nbytes)
    inventory = take_inventory(model)
    assert {weight.name: inventory.matrix(weight).sum() for weight in inventory.weights} == {
        "w": W.astype(np.float64).sum(), "v": V.astype(np.float64).sum()
    }  # fmt: skip

    config = Config(target=Target("keep_params", 0.5), objective="output", threads=1, rank_multiple=1)
    report = onnxlr.compress(tmp_path / "model.onnx", {"x": X}, config, output=tmp_path / "small.onnx")
    note = "the functions 'block', 'layer' hold linear operators and were inlined"
    assert report.warnings[0] == note
    assert report.after.parameters <= report.before.parameters / 2
    assert np.isfinite(relative(*(run(load(tmp_path / name), x=X)["y"] for name in ("model.onnx", "small.onnx"))))
    assert note in " ".join(invoke("inspect", tmp_path / "model.onnx").out.split())


def test_functions_of_another_opset_are_left_with_the_reason() -> None:
    model, notes = unfold(with_functions(LAYER.replace("17", "13")))
    assert len(notes) == 1
    assert notes[0].startswith("the functions 'block', 'layer' hold linear operators but cannot be inlined: ")
    assert "incompatible opset" in notes[0]
    inventory = take_inventory(model)
    assert not inventory.weights
    assert [(r.name, r.reason) for r in inventory.refusals] == [
        ("held", "it is inside the function 'layer': inline it")
    ]


@pytest.mark.parametrize("objective", ["output", "weight"])
def test_a_body_in_a_function_is_a_body_of_the_graph(objective: Any) -> None:
    layer = """<domain: "local", opset_import: ["" : 17]> layer (a, m) => (r) { q = ReduceSum<keepdims = 0>(a)
        z = Constant<value_float = 0.0>() c = Greater(q, z)
        r = If(c) <then_branch = one () => (float[N, 32] t) { [held] t = MatMul(a, m) },
                   else_branch = two () => (float[N, 32] e) { e = Neg(a) }> } """
    model = with_functions(layer)
    inventory = onnxlr.inspect(model).inventory
    assert {weight.name: [len(site.bodies) for site in weight.sites] for weight in inventory.weights} == {
        "w": [1, 1], "v": [1]
    }  # fmt: skip
    config = Config(target=Target("keep_params", 0.9), objective=objective, threads=1, batch=1)
    report = onnxlr.compress(model, {"x": X}, config)
    assert report.after.parameters <= 0.9 * report.before.parameters

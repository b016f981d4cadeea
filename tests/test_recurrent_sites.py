"""LSTM, GRU and RNN: every way to call them, the recurrent weights that stay, and what is refused."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from models import parsed, random, relative, run
from onnx.reference import ReferenceEvaluator

from onnxlr.factors import Factors
from onnxlr.forms import Stored
from onnxlr.rewrite import rewrite
from onnxlr.shapes import measure_shapes
from onnxlr.sites import take_inventory

if TYPE_CHECKING:
    from onnxlr.model_io import Model

    Array = np.ndarray[Any, Any]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, SAMPLES, D_IN, HIDDEN = 4, 3, 6, 5
STAYS = "recurrent weights: every step multiplies by them, after the step before"


def network(
    op: str, direction: str, *, bias: bool, state: str, first: bool, attributes: str = "", opset: int = 17
) -> tuple[Model, Array]:
    """A model and its `W [d_in, directions * gates]`; `state` says which inputs follow the bias."""
    directions, gates = 1 + (direction == "bidirectional"), GATES[op] * HIDDEN
    w, r = random(1, directions, gates, D_IN) / 3, random(2, directions, gates, HIDDEN) / 3
    given: dict[str, Array] = {"w": w, "r": r}
    given["b"] = random(3, directions, 2 * gates) if bias else np.zeros(0, np.float32)
    given["lengths"] = np.array([4, 2, 3], np.int32) if state != "none" else np.zeros(0, np.int32)
    if state == "all":
        given["h0"] = random(4, directions, SAMPLES, HIDDEN)
        if op == "LSTM":
            given |= {"c0": random(5, directions, SAMPLES, HIDDEN), "p": random(6, directions, 3 * HIDDEN)}
    names = [name if array.size else "" for name, array in given.items()]
    while not names[-1]:
        names.pop()
    output = f"float[T, {directions}, N, {HIDDEN}] y" if first else f"float[{directions}, N, {HIDDEN}] y"
    body = (
        f'{"y" if first else ", y"} = {op}<hidden_size = {HIDDEN}, direction = "{direction}"{attributes}>'
        f"({', '.join(['x', *names])})"
    )
    weights = {name: array for name, array in given.items() if array.size}
    model = parsed(f"(float[T, N, {D_IN}] x) => ({output})", body, opset=opset, **weights)
    return model, w.reshape(-1, D_IN).T.astype(np.float64)


def pair(matrix: Array, bias: Array | None = None) -> Stored:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return Stored.pair(Factors(u * s**0.5, s[:, None] ** 0.5 * vt, bias))


def recurrent_node(model: Model) -> onnx.NodeProto:
    (node,) = [node for node in model.proto.graph.node if node.op_type in GATES]
    return node


COMBINATIONS = list(product(
    GATES, ("forward", "reverse", "bidirectional"), (True, False), ("none", "lengths", "all"), (True, False)
))  # fmt: skip


@pytest.mark.parametrize(("op", "direction", "bias", "state", "first"), COMBINATIONS)
def test_full_rank_is_the_dense_network(op: str, direction: str, bias: bool, state: str, first: bool) -> None:
    model, matrix = network(op, direction, bias=bias, state=state, first=first)
    x = random(7, STEPS, SAMPLES, D_IN)
    x[..., -1] = 1.5
    expected = run(model, x=x)["y"]
    inventory = take_inventory(model)
    whole = rewrite(inventory, {"w": pair(matrix)})
    assert relative(expected, run(whole, x=x)["y"]) < 1e-5
    # the last feature is constant, so that what it adds can be a correction
    without = matrix.copy()
    without[-1] = 0
    corrected = rewrite(inventory, {"w": pair(without, 1.5 * matrix[-1])})
    assert relative(expected, run(corrected, x=x)["y"]) < 1e-5
    assert relative(expected, run(rewrite(inventory, {"w": pair(without)}), x=x)["y"]) > 1e-2

    before, after = recurrent_node(model), recurrent_node(corrected)
    assert (after.attribute, after.output, after.name) == (before.attribute, before.output, before.name)
    assert after.input[2] == "r"
    assert list(after.input)[4:] == list(before.input)[4:]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in corrected.proto.graph.initializer}
    old = random(3, *stored[after.input[3]].shape) if bias else np.zeros_like(stored[after.input[3]])
    moved = stored[after.input[3]] - old
    own, recurrence = np.split(moved, 2, axis=1)
    np.testing.assert_allclose(own.ravel(), 1.5 * matrix[-1], atol=1e-6)
    assert not recurrence.any()


@pytest.mark.parametrize(
    ("op", "attributes", "opset"),
    [
        ("LSTM", ', activations = ["Sigmoid", "Tanh", "Relu"], clip = 0.5', 7),
        ("LSTM", ", input_forget = 1", 14),
        ("GRU", ", linear_before_reset = 1", 22),
        ("GRU", ', activations = ["HardSigmoid", "Softsign"], activation_alpha = [0.3], activation_beta = [0.4]', 17),
        ("RNN", ', activations = ["Relu"]', 7),
    ],
)
def test_attributes_stay(op: str, attributes: str, opset: int) -> None:
    model, matrix = network(op, "forward", bias=True, state="none", first=True, attributes=attributes, opset=opset)
    plain, _ = network(op, "forward", bias=True, state="none", first=True, opset=opset)
    x = random(7, STEPS, SAMPLES, D_IN)
    expected = run(model, x=x)["y"]
    assert relative(expected, run(plain, x=x)["y"]) > 1e-3
    assert relative(expected, run(rewrite(take_inventory(model), {"w": pair(matrix)}), x=x)["y"]) < 1e-5


@pytest.mark.parametrize("op", GATES)
def test_samples_may_come_first(op: str) -> None:
    """The reference of onnx runs this layout, which onnxruntime does not on a CPU."""
    model, matrix = network(op, "forward", bias=False, state="none", first=False, attributes=", layout = 1")
    x = random(7, SAMPLES, STEPS, D_IN)
    inventory = take_inventory(model, {"x": x.shape, "w": (1, 5 * GATES[op], 6), "r": (1, 5 * GATES[op], 5)})
    (weight,) = inventory.weights
    assert weight.rows == (STEPS * SAMPLES, STEPS * SAMPLES)
    assert inventory.macs == STEPS * SAMPLES * GATES[op] * HIDDEN * (D_IN + HIDDEN)
    (expected,) = [y for y in ReferenceEvaluator(model.proto).run(None, {"x": x}) if y is not None]
    whole = rewrite(inventory, {"w": pair(matrix)})
    (found,) = [y for y in ReferenceEvaluator(whole.proto).run(None, {"x": x}) if y is not None]
    assert relative(expected, found) < 1e-5


@pytest.mark.parametrize("op", GATES)
def test_what_is_not_known_is_not_counted(op: str) -> None:
    model, _ = network(op, "forward", bias=True, state="none", first=True)
    (weight,) = take_inventory(model).weights
    assert (weight.rows, weight.macs) == ((0, 0), None)


def refusals(body: str, signature: str = "(float[T, N, 6] x) => (float[1, N, 5] h)", **weights: Array) -> Any:
    model = parsed(signature, body, **weights)
    feed = {"x": random(7, STEPS, SAMPLES, D_IN)}
    inventory = take_inventory(model, measure_shapes(model, feed) if len(model.proto.graph.input) == 1 else None)
    return inventory, [(refusal.reason, refusal.sources, refusal.parameters) for refusal in inventory.refusals]


W, R = random(1, 1, 20, 6), random(2, 1, 20, 5)
BODY = ", h = LSTM<hidden_size = 5>(x, w, r)"


def test_recurrent_weights_are_listed_beside_the_site() -> None:
    inventory, listed = refusals(BODY, w=W, r=R)
    assert listed == [(STAYS, ("r",), R.size)]
    assert inventory.refusals[0].macs == STEPS * SAMPLES * R.size
    assert inventory.weights[0].macs == STEPS * SAMPLES * W.size


def test_a_network_that_stays_whole_is_listed_once() -> None:
    signature = "(float[T, N, 6] x) => (float[1, N, 5] h, float[1, 20, 6] z)"
    inventory, listed = refusals(f"{BODY} z = Identity(w)", signature, w=W, r=R)
    assert not inventory.weights
    assert listed == [("its weight 'w' is also an output of the graph", ("r", "w"), W.size + R.size)]


def test_recurrent_weights_alone_are_listed_too() -> None:
    signature = "(float[T, N, 6] x, float[1, 20, 6] w) => (float[1, N, 5] h)"
    assert refusals(BODY, signature, r=R)[1] == [(STAYS, ("r",), R.size)]


def test_recurrent_weights_that_are_data_are_not_listed() -> None:
    signature = "(float[T, N, 6] x, float[1, 20, 5] r) => (float[1, N, 5] h)"
    inventory, listed = refusals(", h = LSTM<hidden_size = 5>(x, v, r)", signature, v=W)
    assert [weight.name for weight in inventory.weights] == ["v"]
    assert listed == []


def test_quantized_input_weights_are_refused() -> None:
    body = "w = DequantizeLinear(q, s) , h = LSTM<hidden_size = 5>(x, w, r)"
    inventory, listed = refusals(body, q=np.ones(W.shape, np.int8), s=np.float32(0.1).reshape(()), r=R)
    assert not inventory.weights
    assert listed == [("its weight is quantized: compress before quantizing", ("q", "r"), W.size + R.size)]

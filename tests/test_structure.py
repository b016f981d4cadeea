"""Which weights make the hidden units of which, and which read one tensor."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from models import parsed, random

from onnxlr.sites import Inventory, take_inventory

Array = np.ndarray[Any, Any]

X = "(float[N, 6] x) => (float[N, 5] y)"
FC: dict[str, Array] = {"w1": random(1, 6, 8), "w2": random(2, 8, 5)}
B1, SCALAR = random(3, 8), np.float32(0.5).reshape(())


def inventory_of(body: str, signature: str = X, *, tail: str = "", opset: int = 20, **weights: Array) -> Inventory:
    """Of a model with those of the weights that the body names."""
    words = re.findall(r"\w+", body)
    used = {name: array for name, array in {**FC, **weights}.items() if name in words}
    return take_inventory(parsed(signature, body, opset=opset, ir=10, tail=tail, **used))


GELU = """d = Div(s, root) e = Erf(d) f = Add(e, one) g = Mul(s, f) h = Mul(g, half)"""
SCALARS = {
    "root": np.float32(2**0.5).reshape(()), "one": np.float32(1).reshape(()), "half": np.float32(0.5).reshape(1)
}  # fmt: skip


def test_a_gelu_in_parts_lies_between() -> None:
    inventory = inventory_of(f"p = MatMul(x, w1) s = Add(p, b1) {GELU} y = MatMul(h, w2)", b1=B1, **SCALARS)
    (chain,) = inventory.chains
    assert (chain.producers, chain.consumer, chain.width) == (("w1",), "w2", 8)
    assert chain.tensors == set("psdefgh")
    assert chain.constants == (("b1", -1),)
    assert inventory.shared == ()


def test_a_gate_and_what_it_opens_make_hidden_units_together() -> None:
    body = "g = MatMul(x, w1) u = Gemm(x, wu, b1) s = Sigmoid(g) a = Mul(g, s) h = Mul(a, u) y = Gemm(h, w2, b2)"
    inventory = inventory_of(body, wu=random(4, 6, 8), b1=B1, b2=random(5, 5))
    (chain,) = inventory.chains
    assert (chain.producers, chain.consumer, chain.constants) == (("w1", "wu"), "w2", ())
    assert chain.tensors == set("gusah")
    assert inventory.shared == (("w1", "wu"),)
    assert all(weight.needs_input for weight in inventory.weights)


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("h = PRelu(p, c)", (8,)),
        ("h = PRelu(p, c)", (1, 8)),
        ("h = Mul(c, p)", (8,)),
        ("h = Max(p, c)", (1, 1, 8)),
        ("h = com.microsoft.BiasGelu(p, c)", (8,)),
        ("h = com.microsoft.FastGelu(p, c)", (8,)),
        ("t = Unsqueeze(c, ax) h = Sub(p, t)", (8,)),
    ],
)
def test_values_a_unit_are_listed(body: str, shape: tuple[int, ...]) -> None:
    dims = "1, " * (len(shape) - 2)
    signature = f"(float[N, 6] x) => (float[{dims}N, 5] y)"
    constants = {"c": random(3, *shape), "ax": np.array([0])}
    inventory = inventory_of(f"p = MatMul(x, w1) {body} y = MatMul(h, w2)", signature, **constants)
    (chain,) = inventory.chains
    assert chain.constants == (("t" if "t =" in body else "c", -1),)


@pytest.mark.parametrize("op", ["Relu", "Gelu", "Tanh", "HardSwish", "com.microsoft.QuickGelu", "Identity"])
def test_operators_of_one_element_lie_between(op: str) -> None:
    (chain,) = inventory_of(f"p = MatMul(x, w1) h = {op}(p) y = MatMul(h, w2)").chains
    assert (chain.producers, chain.consumer, chain.tensors) == (("w1",), "w2", {"p", "h"})


def test_a_layer_may_read_another_at_once() -> None:
    (chain,) = inventory_of("h = MatMul(x, w1) y = MatMul(h, w2)").chains
    assert (chain.producers, chain.consumer, chain.tensors) == (("w1",), "w2", {"h"})


MANY = {"w3": random(6, 8, 8), "wo": random(7, 8, 5), "two": random(8, 8)[None], "b1": B1}


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("(float[N, 6] x) => (float[N, 5] y, float[N, 8] h)", "p = MatMul(x, w1) h = Relu(p) y = MatMul(h, w2)"),
        ("(float[N, 6] x) => (float[N, 5] y, float[N, 8] p)", "p = MatMul(x, w1) h = Relu(p) y = MatMul(h, w2)"),
        ("(float[N, 6] x) => (float[N, 5] y, float[N, 8] z)",
         "p = MatMul(x, w1) h = Relu(p) y = MatMul(h, w2) z = Exp(h)"),
        ("(float[N, 6] x) => (float[N, 5] y, float[N, 8] z)",
         "p = MatMul(x, w1) h = Relu(p) y = MatMul(h, w2) z = Exp(p)"),
        ("(float[N, 6] x) => (float[N, 5] y, float[N, 5] z)",
         "p = MatMul(x, w1) h = Relu(p) y = MatMul(h, w2) z = MatMul(h, wo)"),
        ("(float[N, 6] x, float[N, 8] z) => (float[N, 5] y)", "p = MatMul(x, w1) h = Mul(p, z) y = MatMul(h, w2)"),
        (X, "p = MatMul(x, w1) h = Softmax(p) y = MatMul(h, w2)"),
        (X, "p = MatMul(x, w1) h = LayerNormalization(p, b1) y = MatMul(h, w2)"),
        (X, "p = MatMul(x, w1) s = ReduceMax(p) h = Sub(p, s) y = MatMul(h, w2)"),
        ("(float[8, 6] x) => (float[8, 5] y)", "p = MatMul(x, w1) h = Transpose(p) y = MatMul(h, w2)"),
        ("(float[N, 6] x, bool c) => (float[N, 5] y)",
         """p = MatMul(x, w1) h = Relu(p) y = MatMul(h, w2)
         z = If(c) <then_branch = a () => (float[N, 8] t) { t = Exp(h) },
         else_branch = b () => (float[N, 8] e) { e = Neg(x) }>"""),
    ],
    ids=["graph output", "graph output before", "read by another", "read by another before", "two consumers",
         "an input", "softmax", "normalization", "reduction", "transpose", "read in a body"],
)  # fmt: skip
def test_hidden_units_that_others_see_or_mix_stay(signature: str, body: str) -> None:
    assert inventory_of(body, signature, **MANY).chains == ()


@pytest.mark.parametrize("shape", [(8, 1), (7, 8), (1, 8, 1), (2, 1, 8), (4, 1, 1)])
def test_a_constant_that_is_not_by_unit_refuses(shape: tuple[int, ...]) -> None:
    # (8, 1) is of as many values as there are units, and along another axis
    dims = "A, " * (len(shape) - 2)
    signature = f"(float[{shape[-2]}, 6] x) => (float[{dims}M, 5] y)"
    if shape[-2] == 1:
        signature = signature.replace("[1, 6]", "[N, 6]")
    body = "p = MatMul(x, w1) h = Mul(p, c) y = MatMul(h, w2)"
    if shape == (1, 8, 1):
        signature = "(float[8, 6] x) => (float[1, 8, 5] y)"
    assert inventory_of(body, signature, c=random(3, *shape)).chains == ()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (7, 1)])
def test_a_single_hidden_unit_is_no_trap(shape: tuple[int, ...]) -> None:
    weights = {"w1": random(1, 6, 1), "w2": random(2, 1, 5), "c": random(3, *shape)}
    inventory = inventory_of("p = MatMul(x, w1) h = Mul(p, c) y = MatMul(h, w2)", "(float[7, 6] x) => (float[7, 5] y)",
                             **weights)  # fmt: skip
    assert len(inventory.weights) == 2
    # values a row would be read as values a unit, and the other way round
    assert [chain.constants for chain in inventory.chains] == (
        [] if shape == (7, 1) else [(("c", -1),)] if shape else [()]
    )


def test_a_unit_that_is_spread_over_many_is_not_hidden() -> None:
    weights = {"w1": random(1, 6, 1), "c": B1}
    assert inventory_of("p = MatMul(x, w1) h = Mul(p, c) y = MatMul(h, w2)", **weights).chains == ()
    # a gate of one unit for all
    gate = {"wu": random(4, 6, 1)}
    body = "p = MatMul(x, w1) u = MatMul(x, wu) h = Mul(p, u) y = MatMul(h, w2)"
    assert inventory_of(body, **gate).chains == ()


def test_tied_weights_and_other_layouts_are_in_no_chain() -> None:
    square = {"w1": random(1, 6, 6), "w2": random(2, 6, 5)}
    body = "p = MatMul(x, w1) q = Relu(p) r = MatMul(q, w1) h = Relu(r) y = MatMul(h, w2)"
    assert inventory_of(body, **square).chains == ()
    left = {"v1": random(1, 8, 6), "v2": random(2, 5, 8)}
    body = "p = MatMul(v1, x) h = Relu(p) y = MatMul(v2, h)"
    assert inventory_of(body, "(float[6, N] x) => (float[5, N] y)", **left).chains == ()
    body = "p = MatMul(x, w1) h = Relu(p) y = MatMul(h, w2)"
    signature = "(float[N, 6] x) => (float[1, N, 5] y)"
    assert inventory_of(body, signature, w1=random(1, 6, 8)[None]).chains == ()
    matrix = {"c": random(3, 7, 8)}
    body = "p = Gemm(x, w1, c) h = Relu(p) y = MatMul(h, w2)"
    assert inventory_of(body, "(float[7, 6] x) => (float[7, 5] y)", **matrix).chains == ()


def test_no_weight_is_in_two_chains() -> None:
    weights = {"w3": random(3, 8, 8), "w4": random(4, 8, 8)}
    body = """p = MatMul(x, w1) a = Relu(p) q = MatMul(a, w3) b = Relu(q) r = MatMul(b, w4) h = Relu(r)
    y = MatMul(h, w2)"""
    chains = inventory_of(body, **weights).chains
    assert [(chain.producers, chain.consumer) for chain in chains] == [(("w1",), "w3"), (("w4",), "w2")]


@pytest.mark.parametrize(
    ("body", "signature"),
    [
        ("p = MatMul(x, w1) q = Mul(p, c) h = Relu(q) y = MatMul(h, w2) z = Mul(o, c)",
         "(float[N, 6] x, float[N, 8] o) => (float[N, 5] y, float[N, 8] z)"),
        ("p = MatMul(x, w1) s = Add(p, c) h = Relu(s) y = MatMul(h, w2) z = Mul(o, c)",
         "(float[N, 6] x, float[N, 8] o) => (float[N, 5] y, float[N, 8] z)"),
        ("s = Gemm(x, w1, c) h = Relu(s) y = MatMul(h, w2) z = Mul(o, c)",
         "(float[N, 6] x, float[N, 8] o) => (float[N, 5] y, float[N, 8] z)"),
        ("s = Gemm(x, w1, c) h = PRelu(s, c) y = MatMul(h, w2)", X),
        ("g = Gemm(x, w1, c) u = Gemm(x, wu, c) h = Mul(g, u) y = MatMul(h, w2)", X),
        ("p = MatMul(x, w1) h = Mul(p, c) y = MatMul(h, w2)", "(float[N, 6] x) => (float[N, 5] y, float[8] c)"),
    ],
    ids=["factor", "bias behind", "own bias", "bias and slope", "two biases", "graph output"],
)  # fmt: skip
def test_values_a_unit_that_are_needed_elsewhere_too_stay_whole(body: str, signature: str) -> None:
    # their narrower copy would only add to the model
    assert inventory_of(body, signature, c=B1, wu=random(4, 6, 8)).chains == ()


def test_a_name_in_another_domain_may_mean_anything() -> None:
    tail = '<domain: "local", opset_import: ["" : 20]> Gelu (a) => (b) { b = Softmax(a) }'
    assert inventory_of("p = MatMul(x, w1) h = local.Gelu(p) y = MatMul(h, w2)", tail=tail).chains == ()


QKV = {"wq": random(1, 6, 4), "wk": random(2, 6, 4), "wv": random(3, 6, 5), "b": random(4, 5)}


def test_what_reads_one_tensor_is_listed_together() -> None:
    body = "q = MatMul(x, wq) k = Gemm(x, wk) p = MatMul(x, wv) v = Add(p, b) t = Relu(x) z = MatMul(t, wz)"
    signature = "(float[N, 6] x) => (float[N, 4] q, float[N, 4] k, float[N, 5] v, float[N, 3] z)"
    inventory = inventory_of(body, signature, wz=random(5, 6, 3), **QKV)
    assert inventory.shared == (("wq", "wk", "wv"),)
    assert {weight.name for weight in inventory.weights if weight.needs_input} == {"wq", "wk", "wv"}


def test_tensors_are_not_shared_across_axes_types_or_ties() -> None:
    body = "q = MatMul(x, wq) k = MatMul(vk, x)"
    signature = "(float[6, 6] x) => (float[6, 4] q, float[4, 6] k)"
    assert inventory_of(body, signature, vk=random(2, 4, 6), **QKV).shared == ()
    body = "q = MatMul(x, wq) k = Gemm<transA = 1>(x, wk)"
    signature = "(float[6, 6] x) => (float[6, 4] q, float[6, 4] k)"
    assert inventory_of(body, signature, **QKV).shared == ()
    body = "q = MatMul(x, wq) k = MatMul(x, wk) t = Exp(x) z = MatMul(t, wk)"
    signature = "(float[N, 6] x) => (float[N, 4] q, float[N, 4] k, float[N, 4] z)"
    assert inventory_of(body, signature, **QKV).shared == ()
    body = "q = MatMul(x, wq) k = MatMul(x, wk)"
    signature = "(float[N, 6] x) => (float[N, 4] q, float[1, N, 4] k)"
    assert inventory_of(body, signature, wq=QKV["wq"], wk=QKV["wk"][None]).shared == ()


def test_the_left_side_shares_too() -> None:
    body = "q = MatMul(vq, x) k = MatMul(vk, x)"
    signature = "(float[6, N] x) => (float[4, N] q, float[4, N] k)"
    assert inventory_of(body, signature, vq=random(1, 4, 6), vk=random(2, 4, 6)).shared == (("vq", "vk"),)

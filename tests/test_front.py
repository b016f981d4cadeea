"""Operators that do more than multiply, and onnxruntime's own that multiply: parity, moments, corrections, refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from models import constant, parsed, random, relative, run
from onnx import TensorProto, helper, numpy_helper

import onnxlr
from onnxlr.calibrate import accumulate
from onnxlr.config import Config, Target
from onnxlr.errors import ModelError
from onnxlr.factors import Factors
from onnxlr.forms import Stored, Window, as_block
from onnxlr.layer import Layer, grouped
from onnxlr.model_io import from_proto
from onnxlr.probes import weight_moments
from onnxlr.rewrite import rewrite
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes
from onnxlr.sites import Inventory, take_inventory
from onnxlr.trial import Trial

if TYPE_CHECKING:
    from onnxlr.config import Objective
    from onnxlr.model_io import Model

    Array = np.ndarray[Any, Any]

T = 4 * 3
"""Rows of the data: four steps of three samples, or the other way round."""


@dataclass(frozen=True)
class Case:
    """A model of one such operator, data for it, the `W` that it should be seen as, and its multiplications in all."""

    model: Model
    x: Array
    matrix: Array
    macs: int
    remaining: int = 0
    seen: bool = False


def case(signature: str, body: str, x: Array, matrix: Array, macs: int, remaining: int = 0, **weights: Array) -> Case:
    seen = "FusedMatMul" in body
    return Case(parsed(signature, body, **weights), x, matrix, macs, remaining, seen)


def recurrent(
    op: str, gates: int, attributes: str = "", directions: int = 1, *, bias: bool = True, y: bool = True
) -> Case:
    w, r = random(1, directions, gates * 5, 6) / 3, random(2, directions, gates * 5, 5) / 3
    first = "y, h" if y else ", h"
    last = f"float[{directions}, N, 5] h"
    outputs = f"float[S, {directions}, N, 5] y, {last}" if y else last
    weights = {"w": w, "r": r} | ({"b": random(4, directions, 2 * gates * 5)} if bias else {})
    body = f"{first} = {op}<hidden_size = 5{attributes}>({', '.join(['x', *weights])})"
    model = parsed(f"(float[S, N, 6] x) => ({outputs})", body, **weights)
    return Case(model, random(3, 4, 3, 6), w.reshape(-1, 6).T, T * (w.size + r.size), r.size)


def reordered() -> Case:
    """An LSTM whose gates are put in order from those of torch (input, forget, cell, output), as its exporter does."""
    w, r, b = random(1, 20, 6) / 3, random(2, 1, 20, 5) / 3, random(4, 20)
    body = """i = Slice(w, k0, k5, k0) o = Slice(w, k15, k20, k0) f = Slice(w, k5, k15, k0)
        g = Concat<axis = 0>(i, o, f) u = Unsqueeze(g, k0) d = Concat<axis = 0>(b, c) e = Unsqueeze(d, k0)
        y, h = LSTM<hidden_size = 5>(x, u, r, e)"""
    places = {f"k{place}": np.array([place]) for place in (0, 5, 15, 20)}
    model = parsed(
        "(float[S, N, 6] x) => (float[S, 1, N, 5] y, float[1, N, 5] h)", body, w=w, r=r, b=b, c=b[::-1].copy(), **places
    )
    return Case(model, random(3, 4, 3, 6), np.concatenate([w[:5], w[15:], w[5:15]]).T, T * (w.size + r.size), r.size)


def attention(attributes: str, widths: tuple[int, int, int], *, bias: bool = True, **more: Array) -> Case:
    """`more` are the constants that follow the bias: the mask, the past and what is added to the scores."""
    w = random(1, 6, sum(widths)) / 2
    weights = {"w": w} | ({"b": random(2, sum(widths))} if bias else {}) | more
    names = ["x", "w", "b" if bias else "", *(name if name in more else "" for name in ("mask", "past", "added"))]
    while not names[-1]:
        names.pop()
    past = more["past"].shape[3] if "past" in more else 0
    outputs, present = ("y, present", f", float[2, N, 2, P, {widths[2] // 2}] present") if past else ("y", "")
    body = f"{outputs} = com.microsoft.Attention<num_heads = 2{attributes}>({', '.join(names)})"
    model = parsed(f"(float[N, S, 6] x) => (float[N, S, {widths[2]}] y{present})", body, **weights)
    scores = 3 * 4 * (4 + past) * (widths[0] + widths[2])
    return Case(model, random(3, 3, 4, 6), w, T * w.size + scores)


CONV, GEMM, B = random(1, 5, 6, 3, 3) / 4, random(1, 6, 5), random(2, 5)
IMAGE = random(3, 2, 6, 7, 7)
CONVOLVED = CONV.reshape(5, -1).T
MATRIX, TURNED = "(float[N, 6] x) => (float[N, 5] y)", "(float[B, 6, N] x) => (float[B, N, 5] y)"
CASES = {
    "lstm": recurrent("LSTM", 4),
    "lstm both ways, no bias": recurrent("LSTM", 4, ', direction = "bidirectional"', 2, bias=False),
    "lstm, last state only": recurrent("LSTM", 4, y=False),
    "lstm, its gates put in order": reordered(),
    "gru": recurrent("GRU", 3),
    "gru, other order": recurrent("GRU", 3, ', linear_before_reset = 1, direction = "reverse"'),
    "gru, no bias": recurrent("GRU", 3, bias=False),
    "rnn both ways": recurrent("RNN", 1, ', direction = "bidirectional"', 2),
    "attention": attention("", (4, 4, 4)),
    "attention of other values": attention(", qkv_hidden_sizes = [4, 4, 8]", (4, 4, 8)),
    "attention, no bias": attention(", unidirectional = 1", (6, 6, 6), bias=False),
    "attention of lengths": attention(", scale = 0.3", (4, 4, 4), mask=np.array([4, 2, 3], np.int32)),
    "attention of a mask, no bias": attention("", (4, 4, 4), bias=False, mask=np.tri(3, 4, 1, dtype=np.int32)),
    "attention after a past": attention("", (4, 4, 4), past=random(7, 2, 3, 2, 2, 2)),
    "attention with added scores": attention("", (4, 4, 4), added=random(8, 3, 2, 4, 4)),
    "fused gemm": case(
        MATRIX, 'y = com.microsoft.FusedGemm<activation = "Relu", alpha = 0.5, beta = 2.0>(x, w, b)',
        random(3, T, 6), 0.5 * GEMM, T * 30, w=GEMM, b=B,
    ),
    "fused gemm, turned, no bias": case(
        MATRIX, 'y = com.microsoft.FusedGemm<activation = "Tanh", transB = 1>(x, w)',
        random(3, T, 6), GEMM, T * 30, w=GEMM.T.copy(),
    ),
    "fused gemm of a row": case(
        MATRIX, 'y = com.microsoft.FusedGemm<activation = "LeakyRelu", activation_alpha = 0.3, beta = -1.0>(x, w, b)',
        random(3, T, 6), GEMM, T * 30, w=GEMM, b=B[None],
    ),
    "fused gemm whose beta is 0": case(
        MATRIX, 'y = com.microsoft.FusedGemm<activation = "Sigmoid", beta = 0.0>(x, w, b)',
        random(3, T, 6), GEMM, T * 30, w=GEMM, b=B,
    ),
    "fused gemm, bias from a node": case(
        MATRIX, constant("b", B) + 'y = com.microsoft.FusedGemm<activation = "Relu">(x, w, b)',
        random(3, T, 6), GEMM, T * 30, w=GEMM,
    ),
    "fused conv": case(
        "(float[N, 6, 7, 7] x) => (float[N, 5, 4, 4] y)",
        'y = com.microsoft.FusedConv<activation = "Relu", strides = [2, 2], pads = [1, 1, 1, 1]>(x, w, b)',
        IMAGE, CONVOLVED, 2 * 16 * CONV.size, w=CONV, b=B,
    ),
    "fused conv with an addend": case(
        "(float[N, 6, 7, 7] x) => (float[N, 5, 5, 5] y)",
        'z = Conv(x, v) y = com.microsoft.FusedConv<activation = "Relu">(x, w, b, z)',
        IMAGE, CONVOLVED, 2 * 2 * 25 * CONV.size, w=CONV, b=B, v=np.zeros_like(CONV),
    ),
    "fused matmul": case(
        MATRIX, "y = com.microsoft.FusedMatMul<alpha = 2.0, transB = 1>(x, w)",
        random(3, T, 6), 2 * GEMM, T * 30, w=GEMM.T.copy(),
    ),
    "fused matmul of turned data": case(
        TURNED, "y = com.microsoft.FusedMatMul<transA = 1>(x, w)", random(3, 3, 6, 4), GEMM, T * 30, w=GEMM
    ),
    "fused matmul on the left": case(
        "(float[B, 6, N] x) => (float[B, 5, N] y)", "y = com.microsoft.FusedMatMul<transA = 1, alpha = 0.5>(w, x)",
        random(3, 3, 6, 4), 0.5 * GEMM, T * 30, w=GEMM,
    ),
    "fused matmul on the left of turned data": case(
        "(float[B, N, 6] x) => (float[B, 5, N] y)", "y = com.microsoft.FusedMatMul<transB = 1>(w, x)",
        random(3, 3, 4, 6), GEMM, T * 30, w=GEMM.T.copy(),
    ),
}  # fmt: skip


def inventory_of(given: Case) -> Inventory:
    return take_inventory(given.model, measure_shapes(given.model, {"x": given.x}))


def pair(matrix: Array, rank: int | None = None, bias: Array | None = None) -> Stored:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return Stored.pair(Factors(u[:, :rank] * s[:rank] ** 0.5, s[:rank, None] ** 0.5 * vt[:rank], bias))


@pytest.mark.parametrize("name", CASES)
def test_the_weight_is_laid_out_and_counted(name: str) -> None:
    given = CASES[name]
    inventory = inventory_of(given)
    weight = next(weight for weight in inventory.weights if weight.name == "w")
    np.testing.assert_allclose(inventory.matrix(weight), given.matrix, rtol=1e-6)
    assert bool(weight.sites[0].output_rows) == given.seen
    assert inventory.macs == given.macs
    rows = given.x.shape[0] * 16 if name == "fused conv" else 50 if "addend" in name else T
    assert weight.macs == rows * given.matrix.size
    assert weight.macs_of(((weight.d_in, 2), (2, weight.d_out))) == rows * 2 * sum(given.matrix.shape)
    remaining = [(refusal.parameters, refusal.macs, refusal.sources) for refusal in inventory.refusals]
    assert remaining == ([(given.remaining, T * given.remaining, ("r",))] if given.remaining else [])
    assert sum(weight.parameters for weight in inventory.weights) >= given.matrix.size


@pytest.mark.parametrize("name", CASES)
def test_full_rank_is_the_dense_model_and_corrections_take_what_rows_get(name: str) -> None:
    given = CASES[name]
    inventory = inventory_of(given)
    weight = next(weight for weight in inventory.weights if weight.name == "w")
    dense = run(given.model, x=given.x)
    whole = rewrite(inventory, {"w": pair(given.matrix)})
    onnx.checker.check_model(whole.proto)
    assert "w" not in {tensor.name for tensor in whole.proto.graph.initializer}
    for output, values in run(whole, x=given.x).items():
        assert relative(dense[output], values) < 1e-5
    # what is added to every row by a constant last feature of x comes back as a correction
    rows = given.x.copy()
    if "conv" in name:
        return
    axis = weight.sites[0].input_axis
    last = np.moveaxis(rows, axis, -1)
    last[..., -1] = 1.5
    without = given.matrix.copy()
    without[-1] = 0
    corrected = rewrite(inventory, {"w": pair(without, bias=1.5 * given.matrix[-1])})
    expected = run(given.model, x=rows)
    for output, values in run(corrected, x=rows).items():
        assert relative(expected[output], values) < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_the_moments_are_those_of_the_input(name: str) -> None:
    given = CASES[name]
    inventory = inventory_of(given)
    weight = next(weight for weight in inventory.weights if weight.name == "w")
    config = Config(objective="utilized", threads=1)
    stats = accumulate(given.model, inventory, [{"x": given.x}], Session(given.model).inputs, config)
    (moments,) = weight_moments(stats, inventory, weight, "utilized")
    (place,) = weight.sites[0].input_rows
    rows = place.of(given.x).astype(np.float64)
    np.testing.assert_allclose(moments.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert moments.count == len(rows)


@pytest.mark.parametrize("name", CASES)
def test_ranks_can_be_tried_on_one_graph(name: str) -> None:
    given = CASES[name]
    inventory = inventory_of(given)
    session = Session(given.model)
    weights = [weight for weight in inventory.weights if weight.name == "w"]
    trial = Trial(inventory, weights, session.inputs, Config(threads=1), corrected=True)
    observed = trial.observe([{"x": given.x}])
    assert trial.error({}, observed) < 1e-5
    for rank in (1, 2, 3):  # no rank has to be a multiple of the heads
        cut = pair(given.matrix, rank)
        assert cut.first is not None
        factors = {"w": Factors(cut.first, cut.second, None)}
        small = run(rewrite(inventory, {"w": cut}), x=given.x)
        errors = [relative(values, small[output]) for output, values in session.run({"x": given.x}).items()]
        assert trial.error(factors, observed) == pytest.approx(max(errors), rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_no_pair_with_a_bias_loses_less(name: str) -> None:
    """What is lost at least is the tail of the singular values of the centred product: Eckart and Young."""
    given, config = CASES[name], Config(objective="output", threads=1)
    inventory = inventory_of(given)
    weight = next(weight for weight in inventory.weights if weight.name == "w")
    stats = accumulate(given.model, inventory, [{"x": given.x}], Session(given.model).inputs, config)
    (moments,) = weight_moments(stats, inventory, weight, "output")
    layer = Layer(inventory.matrix(weight), moments, observed_output=weight.observes_output)
    cut = grouped([layer]).decompose().cut(2)
    assert cut.bias is not None
    rows = weight.sites[0].input_rows[0].of(given.x).astype(np.float64)
    products = rows @ given.matrix.astype(np.float64)
    values = np.linalg.svd(products - products.mean(0), compute_uv=False) ** 2
    lost = np.sum((rows @ cut.first @ cut.second + cut.bias - products) ** 2)
    # the ridge turns the basis by a millionth of the energy
    assert abs(lost - values[2:].sum()) < 1e-5 * values.sum()


@pytest.mark.parametrize("name", CASES)
def test_torch_runs_what_is_written(name: str) -> None:
    pytest.importorskip("torch")
    from onnxlr.torch_graph import check_parity, to_torch

    given = CASES[name]
    small = rewrite(inventory_of(given), {"w": pair(given.matrix, 3, random(5, given.matrix.shape[1]) / 10)})
    assert check_parity(to_torch(small), small, [{"x": given.x}]).worst < 1e-5


@pytest.mark.parametrize("op", ["FusedMatMul", "TransposeMatMul"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("flip_w", "flip_x"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("adds", [False, True])
def test_matrices_are_turned_on_either_side(
    op: str, left: bool, flip_w: int, flip_x: int, leading: tuple[int, ...], adds: bool
) -> None:
    stored = GEMM.T.copy() if left != bool(flip_w) else GEMM
    x = random(3, *leading, *((6, 4) if left != bool(flip_x) else (4, 6)))
    flags = f"transA = {flip_w}, transB = {flip_x}" if left else f"transA = {flip_x}, transB = {flip_w}"
    dims = ", ".join([*"KM"[: len(leading)], *(("6", "N") if left != bool(flip_x) else ("N", "6"))])
    out = ", ".join([*"KM"[: len(leading)], *(("5", "N") if left else ("N", "5"))])
    body = f"{'p' if adds else 'y'} = com.microsoft.{op}<alpha = -0.5, {flags}>({'w, x' if left else 'x, w'})"
    weights = {"w": stored} | ({"b": B[:, None] if left else B} if adds else {})
    model = parsed(f"(float[{dims}] x) => (float[{out}] y)", body + (" y = Add(p, b)" if adds else ""), **weights)
    inventory = take_inventory(model, measure_shapes(model, {"x": x}))
    (weight,) = inventory.weights
    np.testing.assert_allclose(inventory.matrix(weight), -0.5 * GEMM.astype(np.float64))
    assert weight.macs == 4 * np.prod(leading, dtype=int) * 30
    dense, whole = run(model, x=x)["y"], rewrite(inventory, {"w": pair(inventory.matrix(weight))})
    assert relative(dense, run(whole, x=x)["y"]) < 1e-5
    # only the product that reads turned data is the operator of onnxruntime
    first = "FusedMatMul" if flip_x else "MatMul"
    assert [node.op_type for node in whole.proto.graph.node] == [first, "MatMul", *["Add"] * adds]
    shift = random(6, 5)
    expected = dense + (shift[:, None] if left else shift)
    shifted = rewrite(inventory, {"w": pair(inventory.matrix(weight), bias=shift)})
    assert relative(expected, run(shifted, x=x)["y"]) < 1e-5
    assert weight.block_sides == {"output"} if flip_x else {"input", "output"}
    thin = pair(inventory.matrix(weight), 2, shift)
    expected = run(rewrite(inventory, {"w": thin}), x=x)["y"]
    for side in sorted(weight.block_sides):
        block = as_block(thin, Window(side, 0, 1.0))
        assert relative(expected, run(rewrite(inventory, {"w": block}), x=x)["y"]) < 1e-4


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("PackedAttention", ["offsets", "lengths"], {"num_heads": 2, "qkv_hidden_sizes": [4, 4, 8]}),
        ("DecoderMaskedSelfAttention", ["mask", "past", "", "length"], {"num_heads": 2}),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_attention_that_a_cpu_cannot_run_is_written_alike(
    op: str, inputs: list[str], attributes: dict[str, Any], bias: bool
) -> None:
    w, b = random(1, 6, 16), random(2, 16)
    given = {"w": w} | ({"b": b} if bias else {})
    node = helper.make_node(
        op, ["x", "w", "b" if bias else "", *inputs], ["y", "present"], "it", domain="com.microsoft", **attributes
    )
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", *filter(None, inputs))]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph(
        [node], "g", values, ends, [numpy_helper.from_array(a, name) for name, a in given.items()]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = from_proto(helper.make_model(graph, ir_version=8, opset_imports=opsets))
    inventory = take_inventory(model, {"x": (7, 6)})
    (weight,) = inventory.weights
    assert (weight.d_in, weight.d_out, weight.rows, inventory.uncounted) == (6, 16, (7, 7), ("it",))
    shift = random(3, 16)
    whole = rewrite(inventory, {"w": pair(w.astype(np.float64), bias=shift)}).proto.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in whole.initializer}
    first, second = whole.node
    assert (first.op_type, first.input[0], first.output[0]) == ("MatMul", "x", second.input[0])
    np.testing.assert_allclose(stored[first.input[1]] @ stored[second.input[1]], w, atol=1e-5)
    np.testing.assert_allclose(stored[second.input[2]], shift + (b if bias else 0), atol=1e-6)
    assert (second.op_type, second.domain, second.attribute, second.output) == (
        op, "com.microsoft", node.attribute, node.output,
    )  # fmt: skip
    assert list(second.input)[3:] == inputs


@pytest.mark.parametrize(
    ("signature", "body", "weights", "reason"),
    [
        (
            "(float[S, N, 6] x, float[1, 40] b) => (float[S, 1, N, 5] y)",
            "y = LSTM<hidden_size = 5>(x, w, r, b)",
            {"w": random(1, 1, 20, 6), "r": random(2, 1, 20, 5)},
            "its bias is not constant: make it an initializer that is no input of the graph",
        ),
        (
            "(float[6, N] x) => (float[N, 5] y)",
            'y = com.microsoft.FusedGemm<transA = 1, activation = "Relu">(x, w, b)',
            {"w": GEMM, "b": B},
            "it transposes its input: compress before fusing",
        ),
        (
            "(float[6, N] x) => (float[5, N] y)",
            'y = com.microsoft.FusedGemm<activation = "Relu">(w, x)',
            {"w": GEMM.T.copy()},
            "its weight is on the left: compress before fusing",
        ),
        (
            MATRIX,
            'y = com.microsoft.FusedGemm<activation = "Relu">(x, w, b)',
            {"w": GEMM, "b": random(1, 1, 1)},
            "what it adds is no vector of 5 numbers: compress before fusing",
        ),
        (
            "(float[5, 6] x) => (float[5, 5] y)",
            'y = com.microsoft.FusedGemm<activation = "Relu">(x, w, b)',
            {"w": GEMM, "b": random(1, 5, 1)},
            "what it adds is no vector of 5 numbers: compress before fusing",
        ),
        (
            MATRIX,
            'y = com.microsoft.FusedGemm<activation = "Relu", alpha = 0.0>(x, w)',
            {"w": GEMM},
            "it multiplies by alpha = 0",
        ),
        (MATRIX, "y = com.microsoft.FusedMatMul<alpha = 0.0>(x, w)", {"w": GEMM}, "it multiplies by alpha = 0"),
        (
            "(float[N, 2, 6] x) => (float[2, N, 5] y)",
            "y = com.microsoft.FusedMatMul<transBatchA = 1>(x, w)",
            {"w": GEMM},
            "it turns the axes of its batch: compress before fusing",
        ),
        (
            "(float[2, N, 6] x) => (float[2, N, 5] y)",
            "y = com.microsoft.FusedMatMul(x, w)",
            {"w": random(1, 2, 6, 5)},
            "its weight has 3 axes, [2, 6, 5]: compress before fusing",
        ),
    ],
)
def test_what_is_refused(signature: str, body: str, weights: dict[str, Array], reason: str) -> None:
    inventory = take_inventory(parsed(signature, body, **weights))
    assert not inventory.weights
    assert reason in {refusal.reason for refusal in inventory.refusals}


def test_the_attention_of_onnx_has_no_weight() -> None:
    signature = "(float[N, S, 8] q, float[N, S, 8] k, float[N, S, 8] v) => (float[N, S, 8] y)"
    body = "y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)"
    inventory = take_inventory(parsed(signature, body, opset=23, ir=11))
    assert not inventory.weights
    assert not inventory.refusals


@pytest.mark.parametrize("objective", ["output", "fisher", "weight"])
def test_a_recurrent_network_keeps_six_tenths(objective: Objective) -> None:
    if objective == "fisher":
        pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    thin = (generator.standard_normal((64, 4)) @ generator.standard_normal((4, 48))).astype(np.float32) / 4
    weights = {
        "w": random(1, 1, 64, 48) / 7, "r": random(2, 1, 64, 16) / 8, "b": random(3, 1, 128), "v": random(4, 16, 3)
    }  # fmt: skip
    body = ", h = LSTM<hidden_size = 16>(x, w, r, b) t = Transpose<perm = [1, 0, 2]>(h) k = Flatten(t) y = MatMul(k, v)"
    model = parsed("(float[8, N, 48] x) => (float[N, 3] y)", body, **weights)
    data = [(random(seed, 8, 1, 64) @ thin).astype(np.float32) for seed in range(64)]
    config = Config(objective=objective, target=Target("keep_params", 0.6), rank_multiple=1, threads=1, batch=1)
    report = onnxlr.compress(model, [{"x": x} for x in data], config)
    (own,) = [weight for weight in report.weights if weight.name == "w"]
    assert own.rank is not None
    assert own.rank < 30
    # the data lie in four dimensions, which a plain decomposition of the weight does not know
    assert (report.validation.error < 1e-3) == (objective != "weight")


GRAPHS = {
    "Attention": (
        "float[N, 8, 48] y", "y = com.microsoft.Attention<num_heads = 2>(x, w, b)",
        {"w": random(1, 48, 48) / 7, "b": random(3, 48)},
    ),
    "GRU": (
        "float[1, 8, 16] y", ", y = GRU<hidden_size = 16>(x, w, r, b)",
        {"w": random(1, 1, 48, 48) / 7, "r": random(2, 1, 48, 16) / 8, "b": random(3, 1, 96)},
    ),
    "RNN": (
        "float[1, 8, 32] y", ", y = RNN<hidden_size = 32>(x, w, r)",
        {"w": random(1, 1, 32, 48) / 7, "r": random(2, 1, 32, 32) / 8},
    ),
    "FusedGemm": (
        "float[M, 40] y", 'f = Flatten<axis = 2>(x) y = com.microsoft.FusedGemm<activation = "Tanh">(f, w, b)',
        {"w": random(1, 48, 40) / 7, "b": random(3, 40)},
    ),
    "FusedMatMul": (
        "float[N, 8, 40] y", "y = com.microsoft.FusedMatMul<alpha = 0.3, transB = 1>(x, w)", {"w": random(1, 40, 48)}
    ),
    "FusedConv": (
        "float[N, 40, 6] y",
        't = Transpose<perm = [0, 2, 1]>(x) y = com.microsoft.FusedConv<activation = "Relu">(t, w, b)',
        {"w": random(1, 40, 48, 3) / 12, "b": random(3, 40)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", GRAPHS)
def test_a_graph_of_one_such_operator_is_compressed(op: str) -> None:
    output, body, weights = GRAPHS[op]
    model = parsed(f"(float[N, 8, 48] x) => ({output})", body, **weights)
    thin = random(7, 4, 48) / 2
    data = [{"x": (random(seed, 1, 8, 4) @ thin + 1).astype(np.float32)} for seed in range(64)]
    config = Config(objective="output", target=Target("keep_params", 0.7), rank_multiple=1, threads=1, batch=1)
    report = onnxlr.compress(model, data, config)
    (own,) = [weight for weight in report.weights if weight.name == "w"]
    assert own.rank is not None
    # the data lie in four dimensions beside their mean, which the bias takes
    assert own.rank < 0.9 * min(own.d_in, own.d_out)
    assert report.validation.error < 1e-3


@pytest.mark.parametrize("op", sorted(GRAPHS.keys() - {"FusedMatMul"}))
def test_what_no_tensor_shows_has_no_gradient(op: str) -> None:
    pytest.importorskip("torch")
    output, body, weights = GRAPHS[op]
    model = parsed(f"(float[N, 8, 48] x) => ({output})", body, **weights)
    data = [{"x": random(seed, 1, 8, 48)} for seed in range(64)]
    config = Config(objective="fisher", target=Target("keep_params", 0.7), rank_multiple=1, threads=1)
    with pytest.raises(ModelError, match="no gradient reaches any weight: use --objective output"):
        onnxlr.compress(model, data, config)
    report = onnxlr.compress(model, data, replace(config, objective="auto"))
    assert (report.config["objective"], report.objective_reason) == ("output", "no gradient reaches any weight")

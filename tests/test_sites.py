"""Linear sites: what is recognised, how its weight is laid out, and what is refused for which reason."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from models import D_IN, D_OUT, FORMS, Form, parsed, random, relative, run
from onnx import TensorProto, helper, numpy_helper

from onnxlr.model_io import from_proto
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes, synthetic_sample
from onnxlr.sites import Inventory, Refusal, Weight, parameter_count, take_inventory
from onnxlr.sites.macs import UNKNOWN, macs
from onnxlr.sites.unsupported import REASONS
from onnxlr.surgery import open_graph

if TYPE_CHECKING:
    from onnxlr.model_io import Model

X2 = f"(float[N, {D_IN}] x) => (float[N, {D_OUT}] y)"
W = random(1, D_IN, D_OUT)
B = random(2, D_OUT)


def only_weight(inventory: Inventory) -> Weight:
    assert not inventory.refusals
    (weight,) = inventory.weights
    return weight


def only_refusal(inventory: Inventory) -> Refusal:
    assert not inventory.weights
    (refusal,) = inventory.refusals
    return refusal


def measured(model: Model, **feed: np.ndarray[Any, Any]) -> Inventory:
    return take_inventory(model, measure_shapes(model, feed))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_is_laid_out_as_the_algebra_says(form: Form) -> None:
    tolerance = 2e-3 if form.x.dtype == np.float16 else 1e-6
    assert relative(form.algebra(form.x, form.matrix), run(form.model, x=form.x)["y"]) < tolerance
    inventory = measured(form.model, x=form.x)
    weight = only_weight(inventory)
    (site,) = weight.sites
    assert np.array_equal(inventory.matrix(weight), form.matrix)
    assert (weight.d_in, weight.d_out) == (site.d_in, site.d_out) == form.matrix.shape
    assert (site.input, weight.name, weight.sources) == ("x", "w", ("w",))
    assert weight.dtype == site.dtype == form.x.dtype.name
    if form.x.ndim > 1:
        assert (site.input_axis, site.output_axis) == form.axes
    else:
        assert (site.input_axis, site.output_axis) == (-1, -1)
    assert site.opaque_addend == form.opaque
    assert (site.bias is not None) == (form.bias is not None)
    if form.bias is not None:
        assert site.bias is not None
        assert (site.bias.tensor in ("b", "c"), site.bias.reader == site.output) == (True, form.own)
        own = inventory.own_bias(site)
        assert np.array_equal(own, form.bias.astype(np.float64).ravel()) if form.own else own is None
    else:
        assert inventory.own_bias(site) is None
    rows = form.x.size // D_IN
    assert weight.parameters == D_IN * D_OUT
    assert weight.macs == inventory.macs == rows * D_IN * D_OUT
    assert inventory.uncounted == ()


@pytest.mark.parametrize("body", ["p = MatMul(x, w) y = Add(p, p)", "p = MatMul(x, w) y = Sub(p, b)"])
def test_what_is_no_bias_is_not_taken_for_one(body: str) -> None:
    weights = {"w": W} | ({"b": B} if "b)" in body else {})
    assert only_weight(take_inventory(parsed(X2, body, **weights))).sites[0].bias is None


def test_a_bias_is_not_taken_where_others_read_the_product() -> None:
    two = f"(float[N, {D_IN}] x) => (float[N, {D_OUT}] y, float[N, {D_OUT}] z)"
    graph_output = two.replace(" z", " p")
    for signature, body in (
        (two, "p = MatMul(x, w) y = Add(p, b) z = Add(b, p)"),
        (graph_output, "p = MatMul(x, w) y = Add(p, b)"),
    ):
        assert only_weight(take_inventory(parsed(signature, body, w=W, b=B))).sites[0].bias is None


def test_a_bias_that_a_caller_may_replace_is_none() -> None:
    signature = f"(float[N, {D_IN}] x, float[{D_OUT}] b) => (float[N, {D_OUT}] y)"
    gemm = only_weight(take_inventory(parsed(signature, "y = Gemm(x, w, b)", w=W, b=B))).sites[0]
    added = only_weight(take_inventory(parsed(signature, "p = MatMul(x, w) y = Add(p, b)", w=W, b=B))).sites[0]
    assert (gemm.bias, gemm.opaque_addend, added.bias, added.opaque_addend) == (None, True, None, False)


def test_a_gemm_with_an_addend_from_data_keeps_it_apart() -> None:
    signature = f"(float[N, {D_IN}] x, float[N, {D_OUT}] c) => (float[N, {D_OUT}] y)"
    site = only_weight(take_inventory(parsed(signature, "y = Gemm(x, w, c)", w=W))).sites[0]
    assert (site.bias, site.opaque_addend) == (None, True)


def test_the_output_is_observed_where_it_is_smaller_and_shows_the_layer_alone() -> None:
    assert D_OUT < D_IN
    observed = [form.name for form in FORMS if only_weight(take_inventory(form.model)).observes_output]
    assert observed == [form.name for form in FORMS if not form.opaque]
    wide = parsed(f"(float[N, {D_OUT}] x) => (float[N, {D_IN}] y)", "y = MatMul(x, w)", w=W.T.copy())
    assert not only_weight(take_inventory(wide)).observes_output


@pytest.mark.parametrize(
    ("signature", "body", "weights", "reason"),
    [
        ("(float[N, 6] x) => (float[N] y)", "y = MatMul(x, w)", {"w": random(0, 6)}, "is a vector"),
        ("(float[6] x) => (float[5] y)", "y = MatMul(w, x)", {"w": random(0, 5, 6)}, "rank of its input"),
        (X2, "y = MatMul(a, w)", {"a": random(0, 4, 6), "w": W}, "both of its operands are constant"),
        (X2, "y = Gemm(a, w)", {"a": random(0, 4, 6), "w": W}, "both of its operands are constant"),
        (X2, "y = Gemm<alpha = 0.0>(x, w)", {"w": W}, "alpha = 0"),
        (X2, "t = Mul(w, s) y = MatMul(x, t)", {"w": W, "s": np.float32(2).reshape(())}, "from constants by Mul"),
        (X2, "t = Concat<axis = 1>(w, s) u = Mul(t, t) y = Gemm(x, u)", {"w": W[:, :2], "s": W[:, 2:]}, "by Mul"),
        (X2, "t = Mul(w, s) u = Concat<axis = 1>(t, s) y = Gemm(x, u)", {"w": W[:, :2], "s": W[:, :2]}, "by Mul"),
        (X2, "e = Add(k, k) t = Slice(w, k, e) y = Gemm(x, t)", {"w": W, "k": np.array([1])}, "by Slice"),
        (X2, "y = MatMul(x, w)", {"w": np.where(W > 1, -np.inf, W)}, "values that are not finite"),
        ("(int32[N, 6] x) => (int32[N, 5] y)", "y = MatMul(x, w)", {"w": np.ones((6, 5), np.int32)}, "type int32"),
        ("(int64[6, 6] x) => (int64[6, 5] y)", "y = Gemm(x, w)", {"w": np.ones((6, 5), np.int64)}, "type int64"),
    ],
)  # fmt: skip
def test_a_site_is_refused_with_its_reason(signature: str, body: str, weights: dict[str, Any], reason: str) -> None:
    assert reason in only_refusal(take_inventory(parsed(signature, body, **weights))).reason


@pytest.mark.parametrize(
    ("opset", "body", "reason"),
    [
        (10, "y = Gemm<transA = 1>(x, w, b)", "transposes its input at opset 10"),
        (9, "y = Gemm<transA = 1>(x, w, b)", "transposes its input at opset 9"),
        (6, "y = Gemm<broadcast = 1>(x, w, b)", "opset 6 broadcasts"),
        (6, "y = MatMul(x, w)", "opset 6 broadcasts"),
    ],
)
def test_older_opsets_are_refused_where_their_rules_differ(opset: int, body: str, reason: str) -> None:
    weights = {"w": W} | ({"b": B} if "b)" in body else {})
    signature = f"(float[{D_IN}, N] x) => (float[N, {D_OUT}] y)" if "transA" in body else X2
    assert reason in only_refusal(take_inventory(parsed(signature, body, opset=opset, **weights))).reason
    if opset > 6:
        site = only_weight(take_inventory(parsed(signature, body, opset=11, **weights))).sites[0]
        assert site.input_axis == -2


def test_products_of_activations_are_no_sites() -> None:
    model = parsed("(float[N, 4] x, float[4, N] z) => (float[N, N] y)", "p = MatMul(x, z) q = Gemm(x, z) y = Add(p, q)")
    inventory = measured(model, x=random(0, 3, 4), z=random(0, 4, 3))
    assert (inventory.weights, inventory.refusals, inventory.macs) == ((), (), 2 * 3 * 3 * 4)


def test_a_weight_that_is_also_an_input_depends_on_the_ir_version() -> None:
    signature = f"(float[N, {D_IN}] x, float[{D_IN}, {D_OUT}] w) => (float[N, {D_OUT}] y)"
    turned = f"(float[N, {D_IN}] x, float[{D_OUT}, {D_IN}] w) => (float[N, {D_OUT}] y)"
    for model in (
        parsed(signature, "y = MatMul(x, w)", w=W),
        parsed(signature, "y = Gemm(x, w)", w=W),
        parsed(turned, "t = Transpose(w) y = MatMul(x, t)", w=W.T.copy()),
    ):
        assert "also an input of the graph" in only_refusal(take_inventory(model)).reason
    assert only_weight(take_inventory(parsed(signature, "y = MatMul(x, w)", ir=3, w=W))).name == "w"


DEQUANTIZED = "t = DequantizeLinear(w, s, z)"
READERS = {
    "MatMul": (X2, "y = MatMul(x, t)", W),
    "Gemm": (X2, "u = Transpose(t) y = Gemm<transB = 1>(x, u)", W),
    "FusedMatMul": (X2, "u = Transpose(t) y = com.microsoft.FusedMatMul<transB = 1>(x, u)", W),
    "FusedGemm": (X2, 'y = com.microsoft.FusedGemm<activation = "Relu">(x, t)', W),
    "Einsum": (X2, 'y = Einsum<equation = "ab,bc->ac">(x, t)', W),
    "Conv": (
        f"(float[N, {D_IN}, 4, 4] x) => (float[N, {D_OUT}, 3, 3] y)", "y = Conv(x, t)",
        random(1, D_OUT, D_IN, 2, 2),
    ),
    "ConvTranspose": (
        f"(float[N, {D_IN}, 4, 4] x) => (float[N, {D_OUT}, 5, 5] y)", "y = ConvTranspose(x, t)",
        random(1, D_IN, D_OUT, 2, 2),
    ),
    "FusedConv": (
        f"(float[N, {D_IN}, 4, 4] x) => (float[N, {D_OUT}, 3, 3] y)",
        'y = com.microsoft.FusedConv<activation = "Relu">(x, t)', random(1, D_OUT, D_IN, 2, 2),
    ),
    "Attention": (
        f"(float[N, S, {D_IN}] x) => (float[N, S, 4] y)", "y = com.microsoft.Attention<num_heads = 2>(x, t)",
        random(1, D_IN, 12),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", READERS)
@pytest.mark.parametrize("quantizing", [False, True])
def test_a_quantized_weight_is_refused(op: str, quantizing: bool) -> None:
    signature, body, weight = READERS[op]
    scale = {"s": np.float32(0.025).reshape(()), "z": np.int8(0).reshape(())}
    if quantizing:  # as quantization-aware training leaves it
        model = parsed(signature, f"w = QuantizeLinear(f, s, z) {DEQUANTIZED} {body}", f=weight, **scale)
    else:
        quantized = np.clip(weight * 40, -127, 127).astype(np.int8)
        model = parsed(signature, f"{DEQUANTIZED} {body}", w=quantized, **scale)
    x = random(
        0, *(2 if dim.dim_param else dim.dim_value for dim in model.proto.graph.input[0].type.tensor_type.shape.dim)
    )
    assert len(run(model, x=x)["y"]) == 2
    refusal = only_refusal(take_inventory(model))
    assert (refusal.op, refusal.reason) == (op, "its weight is quantized: compress before quantizing")
    assert (refusal.sources, refusal.parameters) == (("f" if quantizing else "w",), weight.size)


def test_a_weight_that_others_read_is_refused_with_the_reader_named() -> None:
    signature = f"(float[N, {D_IN}] x, int64[K, 1] i) => (float[N, {D_OUT}] y, float[K, {D_OUT}] z)"
    for body in (
        "y = MatMul(x, w) [look] z = GatherND(w, i)",
        "t = Identity(w) y = MatMul(x, t) [look] z = GatherND(w, i)",
    ):
        model = parsed(signature, body, w=W)
        refusal = only_refusal(measured(model, x=random(0, 3, D_IN), i=np.array([[0], [1]])))
        assert refusal.reason == "its weight 'w' is also read by GatherND 'look', so a pair would only add to it"
        assert (refusal.sources, refusal.parameters, refusal.macs) == (("w",), 30, 3 * 30)


def test_a_weight_that_is_an_output_is_refused() -> None:
    for outputs, body in (("w", "y = MatMul(x, w)"), ("t", "t = Identity(w) y = MatMul(x, t)")):
        signature = f"(float[N, {D_IN}] x) => (float[N, {D_OUT}] y, float[{D_IN}, {D_OUT}] {outputs})"
        assert "also an output of the graph" in only_refusal(take_inventory(parsed(signature, body, w=W))).reason


def test_sparse_weights_are_refused() -> None:
    model = parsed(X2, "y = MatMul(x, w)", w=W)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.initializer[:]
    values, indices = numpy_helper.from_array(np.ones(2, np.float32), "w"), numpy_helper.from_array(np.array([3, 8]))
    sparse = helper.make_sparse_tensor(values, indices, [D_IN, D_OUT])
    stored = onnx.ModelProto()
    stored.CopyFrom(proto)
    stored.graph.sparse_initializer.append(sparse)
    assert "sparse" in only_refusal(take_inventory(from_proto(stored))).reason
    node = helper.make_node("Constant", [], ["w"], sparse_value=sparse)
    proto.graph.node.insert(0, node)
    assert "sparse" in only_refusal(take_inventory(from_proto(proto))).reason


def test_one_weight_of_several_nodes_is_one() -> None:
    body = "a = MatMul(x, w) r = Relu(a) b = Gemm(r, w) y = MatMul(b, w)"
    inventory = measured(parsed("(float[N, 5] x) => (float[N, 5] y)", body, w=random(1, 5, 5)), x=random(0, 3, 5))
    weight = only_weight(inventory)
    assert [site.output for site in weight.sites] == ["a", "b", "y"]
    assert (weight.parameters, weight.macs) == (25, 3 * 3 * 25)


def test_copies_are_found_by_their_content() -> None:
    body = "a = MatMul(x, w) r = Relu(a) b = Gemm<transB = 1>(r, v) t = Transpose(u) s = MatMul(b, t) y = MatMul(s, o)"
    w, other = random(1, 5, 5), random(1, 5, 5)
    other[4, 4] += 1e-6
    model = parsed("(float[N, 5] x) => (float[N, 5] y)", body, w=w, v=w.T.copy(), u=w.T.copy(), o=other)
    copied, apart = measured(model, x=random(0, 3, 5)).weights
    assert [site.output for site in copied.sites] == ["a", "b", "s"]
    assert (copied.name, copied.sources, copied.parameters, copied.macs) == ("u", ("u", "v", "w"), 75, 3 * 75)
    assert (apart.sources, apart.parameters) == (("o",), 25)


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (39, 39), (5, 38)])
def test_large_weights_that_differ_in_one_element_are_two(place: tuple[int, int]) -> None:
    w = random(1, 40, 40)
    other = w.copy()
    other[place] = np.nextafter(w[place], 9, dtype=np.float32)
    body = "a = MatMul(x, w) y = MatMul(a, o)"
    inventory = take_inventory(parsed("(float[N, 40] x) => (float[N, 40] y)", body, w=w, o=other))
    assert [weight.sources for weight in inventory.weights] == [("w",), ("o",)]


def test_a_copy_of_another_type_is_another_weight() -> None:
    body = "a = MatMul(x, w) h = Cast<to = 11>(a) y = MatMul(h, v)"
    w = random(1, 5, 5)
    inventory = take_inventory(parsed("(float[N, 5] x) => (double[N, 5] y)", body, w=w, v=w.astype(np.float64)))
    assert [weight.dtype for weight in inventory.weights] == ["float32", "float64"]


def test_a_weight_is_seen_through_what_puts_its_parts_in_order() -> None:
    body = "a = Slice(w, k, e, k) t = Concat<axis = 0>(a, u) y = Gemm(x, t)"
    inventory = take_inventory(parsed(X2, body, w=W[:3], u=W[1:], k=np.array([0]), e=np.array([1])))
    weight = only_weight(inventory)
    assert (weight.sources, weight.parameters) == (("u", "w"), W[:3].size + W[1:].size)
    np.testing.assert_array_equal(inventory.matrix(weight), W.astype(np.float64))


def test_a_weight_and_its_transpose_are_two_and_neither_can_go() -> None:
    body = "a = MatMul(x, w) y = Gemm<transB = 1>(a, w)"
    inventory = take_inventory(parsed("(float[N, 5] x) => (float[N, 5] y)", body, w=random(1, 5, 5)))
    assert not inventory.weights
    reasons = {refusal.name: refusal.reason for refusal in inventory.refusals}
    assert "also read by Gemm 'y'" in reasons["a"]
    assert "also read by MatMul 'a'" in reasons["y"]


def test_bfloat16() -> None:
    model = parsed("(bfloat16[N, 6] x) => (bfloat16[N, 5] y)", "y = MatMul(x, w)", w=W.astype(ml_dtypes.bfloat16))
    inventory = take_inventory(model)
    weight = only_weight(inventory)
    assert (weight.dtype, weight.parameters) == ("bfloat16", 30)
    assert np.array_equal(inventory.matrix(weight), W.astype(ml_dtypes.bfloat16).astype(np.float64))


def test_products_in_bodies_are_known_to_be_uncounted() -> None:
    signature = f"(float[N, {D_IN}] x, bool c) => (float[N, {D_OUT}] y)"
    body = f"""z = MatMul(x, u) y = If (c) <
        then_branch = one () => (float[N, {D_OUT}] t) {{ [inner] t = MatMul(x, w) }},
        else_branch = two () => (float[N, {D_OUT}] e) {{ e = Identity(z) }}>"""
    inventory = measured(parsed(signature, body, u=W, w=W + 1), x=random(0, 3, D_IN), c=np.array(True))
    assert (inventory.macs, inventory.uncounted) == (3 * 30, ("inner",))


def test_a_node_named_like_a_tensor_is_counted_beside_its_maker() -> None:
    body = "a = MatMul(x, w) [a] y = MatMul(a, v)"
    model = parsed(X2, body, w=random(1, D_IN, 4), v=random(2, 4, D_OUT))
    assert measured(model, x=random(0, 3, D_IN)).macs == 3 * (D_IN * 4 + 4 * D_OUT)


# op -> (text, weights, feed, parameters, multiply-accumulates)
IMAGE = random(0, 2, 4, 8, 8)
STEPS = random(0, 3, 2, 6)
UNSUPPORTED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], int, int | None]] = {
    "MatMulInteger": (
        "(uint8[N, 6] x) => (int32[N, 5] y)", "y = MatMulInteger(x, w)", {"w": np.ones((6, 5), np.int8)},
        {"x": np.ones((3, 6), np.uint8)}, 30, 3 * 30,
    ),
    "ConvInteger": (
        "(uint8[N, 4, 8, 8] x) => (int32[N, 6, 6, 6] y)", "y = ConvInteger(x, w)",
        {"w": np.ones((6, 4, 3, 3), np.uint8)}, {"x": np.ones((2, 4, 8, 8), np.uint8)}, 6 * 4 * 9, 2 * 6 * 36 * 4 * 9,
    ),
    "QLinearMatMul": (
        "(uint8[N, 6] x) => (uint8[N, 5] y)", "y = QLinearMatMul(x, s, z, w, s, z, s, z)",
        {"w": np.ones((6, 5), np.uint8), "s": np.float32(1).reshape(()), "z": np.uint8(0).reshape(())},
        {"x": np.ones((3, 6), np.uint8)}, 30, 3 * 30,
    ),
    "QLinearConv": (
        "(uint8[N, 4, 8, 8] x) => (uint8[N, 6, 6, 6] y)", "y = QLinearConv(x, s, z, w, s, z, s, z)",
        {"w": np.ones((6, 4, 3, 3), np.uint8), "s": np.float32(1).reshape(()), "z": np.uint8(0).reshape(())},
        {"x": np.ones((2, 4, 8, 8), np.uint8)}, 6 * 4 * 9, 2 * 6 * 36 * 4 * 9,
    ),
    "QGemm": (
        "(uint8[N, 6] x) => (float[N, 5] y)", "y = com.microsoft.QGemm(x, s, z, w, s, z)",
        {"w": np.ones((6, 5), np.uint8), "s": np.float32(1).reshape(()), "z": np.uint8(0).reshape(())},
        {"x": np.ones((3, 6), np.uint8)}, 30, 3 * 30,
    ),
    "DynamicQuantizeMatMul": (
        "(float[N, 6] x) => (float[N, 5] y)", "y = com.microsoft.DynamicQuantizeMatMul(x, w, s)",
        {"w": np.ones((6, 5), np.int8), "s": np.float32(1).reshape(())}, {"x": random(0, 3, 6)}, 30, 3 * 30,
    ),
    "MatMulIntegerToFloat": (
        "(uint8[N, 6] x) => (float[N, 5] y)", "y = com.microsoft.MatMulIntegerToFloat(x, w, s, s)",
        {"w": np.ones((6, 5), np.int8), "s": np.float32(1).reshape(())}, {"x": np.ones((3, 6), np.uint8)}, 30, 3 * 30,
    ),
    "MatMulNBits": (
        "(float[N, 32] x) => (float[N, 5] y)",
        "y = com.microsoft.MatMulNBits<K = 32, N = 5, bits = 4, block_size = 16>(x, w, s)",
        {"w": np.ones((5, 2, 8), np.uint8), "s": np.ones(10, np.float32)}, {"x": random(0, 3, 32)}, 80, 3 * 32 * 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", UNSUPPORTED)
def test_unsupported_operators_are_listed_with_their_share(op: str) -> None:
    signature, body, weights, feed, parameters, count = UNSUPPORTED[op]
    inventory = measured(parsed(signature, body, **weights), **feed)
    refusal = only_refusal(inventory)
    assert (refusal.op, refusal.reason) == (op, REASONS[op])
    assert (refusal.parameters, refusal.macs) == (parameters, count)
    assert inventory.macs == count


def test_operators_of_runtimes_are_listed_by_their_names_alone() -> None:
    for op in sorted(REASONS.keys() - UNSUPPORTED.keys()):
        node = helper.make_node(op, ["x", "w"], ["y"], "it", domain="com.microsoft")
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
        graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(W, "w")])
        inventory = take_inventory(from_proto(helper.make_model(graph, ir_version=8)))
        refusal = only_refusal(inventory)
        assert (refusal.name, refusal.reason, refusal.sources, refusal.parameters) == ("it", REASONS[op], ("w",), 30)


def test_a_count_that_is_not_known_is_not_zero() -> None:
    three = parsed(
        "(float[N, 6] x) => (float[N, 6] y)", 'y = Einsum<equation = "ab,bc,cd->ad">(x, w, w)', w=random(1, 6, 6)
    )
    inventory = measured(three, x=random(0, 3, 6))
    assert (only_refusal(inventory).macs, inventory.uncounted) == (None, ("y",))
    assert "QAttention" in UNKNOWN
    node = helper.make_node("QAttention", ["x"], ["y"], domain="com.microsoft")
    proto = helper.make_model(helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", 1, None)]))
    assert macs(open_graph(proto).nodes[0], {"x": (1, 2), "y": (1, 2)}) is None
    model = parsed(X2, "y = MatMul(x, w)", w=W)
    assert take_inventory(model, {"x": (3, 6)}).uncounted == ("y",)
    assert take_inventory(model).macs is None


@pytest.mark.parametrize(("heads", "shape"), [("", (2, 3, 5, 4)), ("<q_num_heads = 3, kv_num_heads = 3>", (2, 5, 12))])
def test_attention_of_onnx_itself_is_counted(heads: str, shape: tuple[int, ...]) -> None:
    dims = ", ".join(map(str, shape))
    keys = (*shape[:-2], 7, shape[-1])
    signature = f"(float[{dims}] q, float[{', '.join(map(str, keys))}] k) => (float[{dims}] y)"
    model = parsed(signature, f"y = Attention{heads}(q, k, k)", opset=23, ir=11)
    inventory = measured(model, q=random(0, *shape), k=random(1, *keys))
    assert inventory.macs == 2 * (2 * 3 * 5 * 7 * 4)
    assert (inventory.weights, inventory.refusals) == ((), ())


def test_parameters_are_all_that_is_no_index() -> None:
    body = f"{constant_text()} t = Reshape(w, shape) p = MatMul(x, t) q = Add(p, b) y = Add(q, k)"
    model = parsed(X2, body, w=W.ravel(), shape=np.array([D_IN, D_OUT]), b=B, unused=np.zeros((2, 2), np.int8))
    assert parameter_count(model) == take_inventory(model).parameters == 30 + 5 + 5 + 4
    values = numpy_helper.from_array(np.ones(3, np.float32), "sparse")
    model.proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 3, 5])), [9])
    )
    assert parameter_count(model) == 30 + 5 + 5 + 4 + 3


def constant_text() -> str:
    return "k = Constant<value = float[5] {1, 2, 3, 4, 5}>()"


def test_modules_of_torch_are_the_labels() -> None:
    model = parsed(
        X2, "[n1] a = MatMul(x, w) [n2] b = Relu(a) [n3] y = MatMul(b, v)", w=random(1, 6, 4), v=random(2, 4, 5)
    )
    first, _, last = model.proto.graph.node
    first.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'blocks.0', 'blocks.0.fc1', 'linear']")
    last.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="not a list")
    one, two = take_inventory(model).weights
    assert (one.sites[0].module, one.labels, one.sites[0].name) == ("blocks.0.fc1", ("blocks.0.fc1",), "n1")
    assert (two.sites[0].module, two.labels) == (None, ("n3",))
    for pattern in ("blocks.*", "blocks.0.fc1", "n1", "n?", "w", "*"):
        assert one.matches(pattern)
    for pattern in ("fc1", "y", "N1", "v", ""):
        assert not one.matches(pattern)


def test_a_name_with_brackets_matches_itself() -> None:
    model = parsed(X2, "y = MatMul(x, w)", w=W)
    model.proto.graph.initializer[0].name = model.proto.graph.node[0].input[1] = "w[0]"
    weight = only_weight(take_inventory(model))
    assert weight.matches("w[0]")
    assert not weight.matches("w[1]")


def test_sites_come_in_the_order_of_the_graph() -> None:
    sizes = [6, 4, 4, 3, 5]
    body = " ".join(f"h{i + 1} = MatMul(h{i}, w{9 - i})" for i in range(4))
    weights = {f"w{9 - i}": random(i, *pair) for i, pair in enumerate(pairwise(sizes))}
    model = parsed("(float[N, 6] h0) => (float[N, 5] h4)", body, **weights)
    assert [weight.name for weight in take_inventory(model).weights] == ["w9", "w8", "w7", "w6"]


def test_shapes_without_data_are_those_of_a_synthetic_sample() -> None:
    model = parsed("(float[N, T, 6] x) => (float[N, T, 5] y)", "p = MatMul(x, w) y = Relu(p)", w=W)
    sample = synthetic_sample(Session(model).inputs)
    assert measure_shapes(model, sample) == {"x": (1, 128, 6), "w": (6, 5), "p": (1, 128, 5)}
    shared = parsed("(float[N, 1, S, 6] x, float[N, S] m) => (float[N, 1, S, 6] y)", "y = Identity(x)")
    lengths = {name: array.shape for name, array in synthetic_sample(Session(shared).inputs).items()}
    assert lengths == {"x": (1, 1, 224, 6), "m": (1, 224)}
    assert measure_shapes(parsed("(float[N] x) => (float[N] y)", "y = Relu(x)"), {"x": random(0, 2)}) == {}

"""Rewritten models: parity with the dense one, corrections where they belong, and nothing else touched."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FORMS, Form, gemm_forms, matmul_forms, parsed, random, relative, run

from onnxlr.costs import Parameters
from onnxlr.errors import OnnxlrError
from onnxlr.factorize import WeightDecomposition
from onnxlr.forms import Stored, pair_products
from onnxlr.model_io import load, save
from onnxlr.rewrite import rewrite
from onnxlr.sites import parameter_count, take_inventory

if TYPE_CHECKING:
    from pathlib import Path

    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory, Weight

# fp16: the factors, the hidden vector and the result are rounded to 11 bits each, and the dense result once
TOLERANCE = {"float16": 5 * 2.0**-11, "float32": 1e-5, "float64": 1e-12}


def full_rank(inventory: Inventory, weight: Weight, bias: np.ndarray[Any, Any] | None = None) -> Stored:
    factors = WeightDecomposition(inventory.matrix(weight)).cut(min(weight.d_in, weight.d_out))
    return Stored(factors.first, factors.second, bias)


def price(inventory: Inventory, weight: Weight, rank: int, *, corrected: bool) -> float:
    products = pair_products(weight.d_in, weight.d_out, rank)
    return Parameters(inventory).form(weight, products, moved=0, corrected=corrected)


def check(model: Model) -> None:
    onnx.checker.check_model(model.proto, full_check=True)


def stored(model: Model) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: model.array(tensor) for tensor in model.proto.graph.initializer}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_full_rank_is_the_dense_model_and_a_correction_is_added_to_it(form: Form) -> None:
    inventory = take_inventory(form.model)
    (weight,) = inventory.weights
    (site,) = weight.sites
    dense = run(form.model, x=form.x)["y"]
    tolerance = TOLERANCE[weight.dtype]
    before = parameter_count(form.model)

    plain = rewrite(inventory, {weight.name: full_rank(inventory, weight)})
    check(plain)
    assert relative(dense, run(plain, x=form.x)["y"]) < tolerance
    idle = _multiplied_by_zero(inventory)
    assert parameter_count(plain) == before - weight.parameters - idle + price(inventory, weight, 5, corrected=False)

    correction = random(9, weight.d_out, dtype=np.float64)
    corrected = rewrite(inventory, {weight.name: full_rank(inventory, weight, correction)})
    check(corrected)
    expected = dense.astype(np.float64) + form.on_output(correction)
    assert relative(expected, run(corrected, x=form.x)["y"]) < tolerance
    assert parameter_count(corrected) == before - weight.parameters - idle + price(inventory, weight, 5, corrected=True)

    for model in (plain, corrected):
        assert model.proto.graph.output == form.model.proto.graph.output
        assert not {"w", *((site.bias.tensor,) if site.bias and model is corrected else ())} & stored(model).keys()
        makers = {node.output[0]: node for node in model.proto.graph.node}
        # a Gemm has room for one addend of its own
        inserted = model is corrected and site.bias is None and (site.op != "Gemm" or site.opaque_addend)
        assert (makers[site.output].op_type == "Add") == inserted
        second = makers[f"{site.output}/product" if inserted else site.output]
        hidden = f"{site.output}.lr_hidden"
        assert set(second.input[:2]) == {"w.lr_second", hidden}
        assert set(makers[hidden].input) == {"w.lr_first", "x"}


def _multiplied_by_zero(inventory: Inventory) -> int:
    """Elements of an addend that a Gemm multiplies by 0: its pair has no need of them."""
    node = inventory.nodes.get("y")
    if node is None or node.op != "Gemm" or len(node.inputs) < 3 or node.attrs.get("beta", 1.0) != 0:
        return 0
    return inventory.view.values(node.inputs[2]).size


@lru_cache
def forms_of(d_in: int, d_out: int) -> list[Form]:
    return [*matmul_forms(d_in, d_out), *gemm_forms(d_in, d_out)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from([(1, 4), (4, 1), (3, 3), (2, 7), (7, 5)]),
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_rewritten_model_computes_x_a_b(
    shape: tuple[int, int], index: int, rank: int, corrected: bool, seed: int
) -> None:
    forms = forms_of(*shape)
    form = forms[index % len(forms)]
    rank = min(rank, *shape)
    a, b = random(seed, shape[0], rank, dtype=np.float64), random(seed + 1, rank, shape[1], dtype=np.float64)
    bias = random(seed + 2, shape[1], dtype=np.float64) if corrected else None
    inventory = take_inventory(form.model)
    model = rewrite(inventory, {"w": Stored(a, b, bias)})
    expected = form.algebra(form.x, a @ b) + (0.0 if bias is None else form.on_output(bias))
    assert relative(expected, run(model, x=form.x)["y"]) < 1e-5


def test_bfloat16_factors_are_stored_as_such() -> None:
    weights = {"w": random(1, 6, 5, dtype=ml_dtypes.bfloat16), "b": random(2, 5, dtype=ml_dtypes.bfloat16)}
    model = parsed("(bfloat16[N, 6] x) => (bfloat16[N, 5] y)", "p = MatMul(x, w) y = Add(p, b)", **weights)
    inventory = take_inventory(model)
    factors = full_rank(inventory, inventory.weights[0], np.ones(5))
    compressed = rewrite(inventory, {"w": factors})
    check(compressed)
    arrays = stored(compressed)
    assert arrays.keys() == {"w.lr_first", "w.lr_second", "p.lr_bias"}
    for name, exact in (("w.lr_first", factors.first), ("w.lr_second", factors.second)):
        assert exact is not None
        assert arrays[name].dtype == ml_dtypes.bfloat16
        assert np.array_equal(arrays[name], exact.astype(ml_dtypes.bfloat16))
    assert np.array_equal(arrays["p.lr_bias"], (weights["b"].astype(np.float64) + 1).astype(ml_dtypes.bfloat16))


def test_everything_else_is_byte_for_byte_the_same() -> None:
    model = parsed(
        "(float[N, 6] x, float[N, 4] z) => (float[N, 5] y, float[N, 4] u)",
        """[one] a = MatMul(x, w) [two] b = Add(a, c) [three] y = Relu(b)
        [four] d = MatMul(z, v) [five] e = Gemm<transB = 1>(d, k, m) [six] u = Tanh(e)""",
        w=random(1, 6, 5), c=random(2, 5), v=random(3, 4, 4), k=random(4, 4, 4), m=random(5, 4), unused=random(6, 3),
    )  # fmt: skip
    graph = model.proto.graph
    model.proto.metadata_props.add(key="author", value="someone")
    model.proto.doc_string, model.proto.producer_name = "about it", "a tool"
    for item in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        item.doc_string = f"about {item.name}"
        item.metadata_props.add(key="of", value=item.name)
    graph.value_info.append(onnx.helper.make_tensor_value_info("d", 1, ["N", 4]))
    before = model.serialize()
    inventory = take_inventory(model)
    assert rewrite(inventory, {}) is model
    result = rewrite(inventory, {"w": full_rank(inventory, inventory.weights[0], np.ones(5))})
    assert model.serialize() == before

    rebuilt = onnx.ModelProto()
    rebuilt.CopyFrom(result.proto)
    old = {node.name: node for node in graph.node}
    new = {node.name: node for node in result.proto.graph.node}
    assert new.keys() == (old.keys() - {"one"}) | {"one/first", "one/second"}
    assert list(new["two"].input) == ["a", "a.lr_bias"]
    assert new["two"].metadata_props == old["two"].metadata_props
    for name in ("three", "four", "five", "six"):
        assert new[name] == old[name]
    kept = {"v", "k", "m", "unused"}
    assert {t.name for t in result.proto.graph.initializer} == kept | {"w.lr_first", "w.lr_second", "a.lr_bias"}
    # with the nodes and initializers of the original put back, nothing distinguishes the two
    for name in ("node", "initializer"):
        rebuilt.graph.ClearField(name)
        getattr(rebuilt.graph, name).extend(getattr(graph, name))
    for tensor in result.proto.graph.initializer:
        if tensor.name in kept:
            assert tensor == next(t for t in graph.initializer if t.name == tensor.name)
    assert rebuilt.SerializeToString(deterministic=True) == before


def test_a_correction_rounds_once() -> None:
    model = parsed(
        "(float[N, 6] x) => (float[N, 5] y)", "y = Gemm<beta = 0.5>(x, w, c)", w=random(1, 6, 5), c=random(2, 5)
    )
    inventory = take_inventory(model)
    correction = random(3, 5, dtype=np.float64)
    arrays = stored(rewrite(inventory, {"w": full_rank(inventory, inventory.weights[0], correction)}))
    assert np.array_equal(arrays["y.lr_bias"], (random(2, 5).astype(np.float64) + 2 * correction).astype(np.float32))


def test_tied_sites_share_one_copy_of_the_factors_in_each_layout() -> None:
    w = random(1, 5, 5)
    model = parsed(
        "(float[N, 5] x) => (float[N, 5] y)",
        """a = MatMul(x, w) b = Gemm<transB = 1>(a, v, k) c = MatMul(b, w) d = Transpose(c) e = MatMul(v, d)
        f = Transpose(e) g = Add(f, k) t = MatMul(g, o) s = Squeeze(t, i) y = Relu(s)""",
        w=w, v=w.T.copy(), o=w[None], k=random(2, 5), i=np.array([0]),
    )  # fmt: skip
    inventory = take_inventory(model)
    (weight,) = inventory.weights
    assert [site.output for site in weight.sites] == ["a", "b", "c", "e", "t"]
    x = random(4, 3, 5)
    dense = run(model, x=x)["y"]
    for corrected in (False, True):
        bias = np.zeros(5) if corrected else None
        result = rewrite(inventory, {weight.name: full_rank(inventory, weight, bias)})
        check(result)
        assert relative(dense, run(result, x=x)["y"]) < 1e-5
        names = [name for name in stored(result) if ".lr_first" in name]
        # right, left, and with a leading axis
        assert len(names) == 3
        predicted = price(inventory, weight, 5, corrected=corrected)
        # k is read by a Gemm and by an Add that is no bias, so it stays
        assert parameter_count(result) == parameter_count(model) - weight.parameters + predicted
        assert predicted == 3 * 5 * 10 + 5 * 5 * corrected


def test_the_pairs_of_one_layout_are_stored_once() -> None:
    w = random(1, 6, 6)
    body = "a = MatMul(x, w) b = Relu(a) y = MatMul(b, w)"
    model = parsed("(float[N, 6] x) => (float[N, 6] y)", body, w=w)
    inventory = take_inventory(model)
    (weight,) = inventory.weights
    result = rewrite(inventory, {"w": Stored.pair(WeightDecomposition(w.astype(np.float64)).cut(2))})
    assert parameter_count(result) == price(inventory, weight, 2, corrected=False) == 2 * 12


def test_a_bias_that_others_read_is_not_changed_for_them() -> None:
    signature = "(float[N, 6] x) => (float[N, 5] y, float[N, 5] z)"
    body = "p = MatMul(x, w) y = Add(p, b) q = Relu(y) z = Add(q, b)"
    model = parsed(signature, body, w=random(1, 6, 5), b=random(2, 5))
    inventory = take_inventory(model)
    (weight,) = inventory.weights
    x, correction = random(3, 4, 6), np.full(5, 10.0)
    result = rewrite(inventory, {"w": full_rank(inventory, weight, correction)})
    dense, outputs = run(model, x=x), run(result, x=x)
    assert relative(dense["y"] + 10, outputs["y"]) < 1e-5
    assert relative(np.maximum(outputs["y"], 0) + random(2, 5), outputs["z"]) < 1e-6
    predicted = price(inventory, weight, 5, corrected=True)
    assert parameter_count(result) == parameter_count(model) - weight.parameters + predicted
    assert predicted == 5 * 11 + 5


def test_weights_that_are_not_named_stay_dense() -> None:
    body = "a = MatMul(x, w) b = Gemm(a, v) y = MatMul(b, u)"
    weights = {"w": random(1, 6, 5), "v": random(2, 5, 5), "u": random(3, 5, 5)}
    model = parsed("(float[N, 6] x) => (float[N, 5] y)", body, **weights)
    inventory = take_inventory(model)
    result = rewrite(inventory, {"v": full_rank(inventory, inventory.weights[1])})
    assert stored(result).keys() == {"w", "u", "v.lr_first", "v.lr_second"}
    for name in ("w", "u"):
        assert np.array_equal(stored(result)[name], weights[name])
    assert [node.op_type for node in result.proto.graph.node] == ["MatMul"] * 4
    assert rewrite(inventory, {"another": full_rank(inventory, inventory.weights[1])}) is model


@pytest.mark.parametrize("which", ["first", "second", "bias"])
def test_what_overflows_fp16_is_an_error_that_names_the_site(which: str) -> None:
    model = parsed(
        "(float16[N, 6] x) => (float16[N, 5] y)", "[layer] y = MatMul(x, w)", w=random(1, 6, 5, dtype=np.float16)
    )
    inventory = take_inventory(model)
    arrays = {"first": np.ones((6, 2)), "second": np.ones((2, 5)), "bias": np.ones(5)}
    rewrite(inventory, {"w": Stored(**arrays)})
    arrays[which][-1] = 65520  # half way above the largest number, 65504, and rounded to infinity
    with pytest.raises(
        OnnxlrError, match=r"a factor of 'layer' overflows float16: leave it out with --exclude 'layer'"
    ):
        rewrite(inventory, {"w": Stored(**arrays)})


@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "y = Gemm<transB = 0>(x, w)", "p = MatMul(x, w) y = Add(p, b)"])
@pytest.mark.parametrize("corrected", [False, True])
def test_a_compressed_model_can_be_compressed_again(body: str, corrected: bool) -> None:
    weights = {"w": random(1, 6, 5)} | ({"b": random(2, 5)} if "b)" in body else {})
    model = parsed("(float[N, 6] x) => (float[N, 5] y)", body, **weights)
    x = random(3, 4, 6)
    expected = run(model, x=x)["y"].astype(np.float64)
    for _ in range(3):
        inventory = take_inventory(model)
        assert not inventory.refusals
        bias = np.ones(5) if corrected else None
        last = inventory.weights[-1]
        factors = {w.name: full_rank(inventory, w, bias if w is last else None) for w in inventory.weights}
        model = rewrite(inventory, factors)
        check(model)
        expected += corrected
        assert relative(expected, run(model, x=x)["y"]) < 1e-5


@pytest.mark.parametrize(
    "taken", ["n/first", "n/second", "n/mean", "a.lr_hidden", "a/product", "w.lr_first", "w.lr_second", "a.lr_bias"]
)
@pytest.mark.parametrize("kind", ["node", "tensor", "constant"])
def test_what_has_a_name_already_keeps_it(taken: str, kind: str) -> None:
    weights = {"w": random(1, 6, 5), "s": random(2, 5)}
    model = parsed("(float[N, 6] x) => (float[N, 5] y)", "a = MatMul(x, w) r = Relu(a) y = Mul(r, s)", **weights)
    product, relu, scaling = model.proto.graph.node
    product.name, relu.name = "n", taken if kind == "node" else "m"
    if kind == "tensor":
        relu.output[0] = scaling.input[0] = taken
    elif kind == "constant":
        model.proto.graph.initializer[1].name = scaling.input[1] = taken
    x = random(3, 4, 6)
    before = run(model, x=x)["y"]
    inventory = take_inventory(model)
    small = rewrite(inventory, {"w": full_rank(inventory, inventory.weights[0], np.zeros(5))})
    check(small)
    assert relative(before, run(small, x=x)["y"]) < 1e-5


def test_a_pair_of_external_data_is_read_from_them(tmp_path: Path) -> None:
    model = parsed("(float[N, 40] x) => (float[N, 30] y)", "y = MatMul(x, w)", w=random(1, 40, 30))
    save(model, tmp_path / "model.onnx", size_threshold=0)
    loaded = load(tmp_path / "model.onnx")
    assert loaded.proto.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL
    inventory = take_inventory(loaded)
    result = rewrite(inventory, {"w": full_rank(inventory, inventory.weights[0])})
    x = random(2, 3, 40)
    assert relative(run(loaded, x=x)["y"], run(result, x=x)["y"]) < 1e-5

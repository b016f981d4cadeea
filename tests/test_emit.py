"""Blocks, shared first factors and narrowed layers in the graph: valid to the checker, and equal to their algebra."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from models import FORMS, Form, matmul_forms, parsed, random, relative, run

from onnxlr.forms import Stored, Window, as_block, as_shared_block
from onnxlr.rewrite import rewrite
from onnxlr.sites import parameter_count, take_inventory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnxlr.forms import Side
    from onnxlr.model_io import Model

    Array = np.ndarray[Any, Any]

RANK = 2
TOLERANCE = {"float16": 5 * 2.0**-11, "float32": 1e-5, "float64": 1e-12}


def check(model: Model) -> Model:
    onnx.checker.check_model(model.proto, full_check=True)
    return model


def arrays(model: Model) -> dict[str, Array]:
    return {tensor.name: model.array(tensor) for tensor in model.proto.graph.initializer}


def well(seed: int, d_in: int, d_out: int, rank: int = RANK) -> Stored:
    """A pair all of whose windows are well conditioned."""
    rng = np.random.default_rng(seed)
    while True:
        first, second = rng.standard_normal((d_in, rank)), rng.standard_normal((rank, d_out))
        squares = [first[:rank], first[-rank:], second[:, :rank], second[:, -rank:]]
        if max(np.linalg.cond(square) for square in squares) < 10:
            return Stored(first, second, None)


def blocks(pair: Stored, sides: frozenset[Side]) -> Iterator[Stored]:
    assert pair.first is not None
    lengths: dict[Side, int] = {"input": len(pair.first), "output": pair.second.shape[1]}
    for side in sorted(sides):
        for start in (0, lengths[side] - RANK):
            yield as_block(pair, Window(side, start, 1.0))


def product(stored: Stored) -> Array:
    assert stored.first is not None
    return stored.first @ stored.second


@pytest.mark.parametrize("form", [form for form in FORMS if take_inventory(form.model).weights[0].block_sides], ids=str)
def test_a_block_computes_x_a_b(form: Form) -> None:
    inventory = take_inventory(form.model)
    (weight,) = inventory.weights
    pair = well(0, weight.d_in, weight.d_out)
    bias = random(9, weight.d_out, dtype=np.float64)
    made = list(blocks(pair, weight.block_sides))
    assert len(made) == 2 * len(weight.block_sides)
    plain = parameter_count(rewrite(inventory, {weight.name: pair}))
    for block in made:
        for correction in (None, bias):
            model = check(
                rewrite(inventory, {weight.name: Stored(block.first, block.second, correction, block.window)})
            )
            expected = form.algebra(form.x, product(pair)) + (0.0 if correction is None else form.on_output(bias))
            assert relative(expected, run(model, x=form.x)["y"]) < 10 * TOLERANCE[weight.dtype]
            assert model.proto.graph.output == form.model.proto.graph.output
            if correction is None:
                assert parameter_count(model) == plain - RANK**2


def test_no_block_is_written_where_nothing_can_hold_it() -> None:
    sides = {form.name: take_inventory(form.model).weights[0].block_sides for form in FORMS}
    for form in FORMS:
        old = form.model.proto.opset_import[0].version < 13
        flipped = form.name.startswith("gemm-") and form.axes[0] != form.axes[1]
        scaled = form.name.startswith("gemm-") and not isinstance(form.rest, float) and form.name.endswith("-0.5")
        scaled = scaled or form.name.endswith("scalar--2.5-0.5")
        assert ("input" in sides[form.name]) == (not old and not flipped)
        assert ("output" in sides[form.name]) == (not old and not scaled)
    assert len(set(sides.values())) == 4


@pytest.mark.parametrize("opset", [7, 12, 13, 18, 21])
def test_split_takes_its_lengths_from_opset_13_on(opset: int) -> None:
    signature = "(float[N, 6] x) => (float[N, 5] y)"
    for body in ("y = MatMul(x, w)", "y = Gemm(x, w, b)"):
        weights = {"w": random(1, 6, 5), "b": random(2, 5)}
        used = {name: array for name, array in weights.items() if f" {name}" in body}
        inventory = take_inventory(parsed(signature, body, opset=opset, **used))
        (weight,) = inventory.weights
        assert bool(weight.block_sides) == (opset >= 13)
        for block in blocks(well(1, 6, 5), weight.block_sides):
            assert run(check(rewrite(inventory, {"w": block})), x=random(3, 4, 6))["y"].shape == (4, 5)


SHARING = {
    "right": (
        "(float[M, N, 6] x) => (float[M, N, 5] q, float[M, N, 5] k, float[M, N, 4] v)",
        "q = MatMul(x, wq) pk = MatMul(x, wk) k = Add(pk, bk) v = MatMul(x, wv)",
    ),
    "gemm": (
        "(float[N, 6] x) => (float[N, 5] q, float[N, 5] k, float[N, 4] v)",
        "q = MatMul(x, wq) k = Gemm<beta = 0.5>(x, wk, bk) v = Gemm<transB = 1, alpha = -2.0>(x, wvt)",
    ),
    "left": (
        "(float[6, N] x) => (float[5, N] q, float[5, N] k, float[4, N] v)",
        "q = MatMul(wqt, x) k = Gemm<transA = 1>(wk, x, bkt) v = Gemm(wvt, x)",
    ),
}


@pytest.mark.parametrize("blocky", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_a_first_factor_is_shared(name: str, corrected: bool, blocky: bool) -> None:
    signature, body = SHARING[name]
    sizes = {"q": 5, "k": 5, "v": 4}
    every: dict[str, Array] = {f"w{key}": random(i, 6, size) for i, (key, size) in enumerate(sizes.items())}
    every |= {f"{key}t": array.T.copy() for key, array in every.items()}
    every |= {"bk": random(8, 5), "bkt": random(8, 5)[:, None]}
    names = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    model = parsed(signature, body, **{key: array for key, array in every.items() if key in names})
    inventory = take_inventory(model)
    (members,) = inventory.shared
    assert len(members) == 3
    by_output = {weight.sites[0].output[-1]: weight for weight in inventory.weights}
    rng = np.random.default_rng(4)
    first = well(2, 6, 5).first
    pairs = [
        Stored(first, rng.standard_normal((RANK, sizes[key])),
               rng.standard_normal(sizes[key]) if corrected else None, shared="+".join(members))
        for key in "qkv"
    ]  # fmt: skip
    products = [product(pair) for pair in pairs]
    starts = (0, 4) if blocky else (None,)
    for start in starts:
        made = pairs if start is None else as_shared_block(pairs, Window("input", start, 1.0))
        stored = {by_output[key].name: one for key, one in zip("qkv", made, strict=True)}
        result = check(rewrite(inventory, stored))
        axis = -2 if name == "left" else -1
        x = random(5, 3, 7, 6) if name == "right" else random(5, 7, 6)
        outputs = run(result, x=np.ascontiguousarray(np.swapaxes(x, -1, -2)) if axis == -2 else x)
        for key, whole, pair in zip("qkv", products, pairs, strict=True):
            expected = x.astype(np.float64) @ whole + (0.0 if pair.bias is None else pair.bias)
            own = 0.5 if name == "gemm" else 1.0
            expected = expected + (own * random(8, 5) if key == "k" else 0.0)
            found = np.swapaxes(outputs[key], -1, -2) if axis == -2 else outputs[key]
            assert relative(expected, found) < 1e-4
        nodes = result.proto.graph.node
        reading = [node for node in nodes if "x" in node.input and node.op_type in ("MatMul", "Gemm")]
        assert len(reading) == (0 if blocky else 1)
        assert sum(node.op_type in ("MatMul", "Gemm") for node in nodes) == 4
        matrices = [a for a in arrays(result).values() if a.ndim == 2 and min(a.shape) > 1]
        assert sum(a.size for a in matrices) == RANK * (6 + 14) - (RANK**2 if blocky else 0)


KEPT = np.array([0, 2, 3, 6, 7])
CHAINS = {
    "matmul": "p = MatMul(x, w1) s = Add(p, b1) h = Relu(s) q = MatMul(h, w2) y = Add(q, b2)",
    "gemm": "s = Gemm(x, w1, b1) h = Tanh(s) y = Gemm<transB = 1>(h, w2t, b2)",
    "scaled": "s = Gemm<transB = 1, alpha = 0.5, beta = 0.25>(x, w1t, b1) h = Relu(s) y = Gemm<beta = 2.0>(h, w2, b2)",
    "bare": "s = MatMul(x, w1) y = Gemm(s, w2)",
    "slope": "p = MatMul(x, w1) h = PRelu(p, c) y = MatMul(h, w2)",
    "row": "p = MatMul(x, w1) m = Mul(p, r) a = Add(m, one) d = Div(a, c) h = Abs(d) y = MatMul(h, w2)",
    "row first": "p = Gemm(x, w1) h = Sub(r, p) y = Gemm(h, w2, b2)",
    "turned": "p = MatMul(x, w1) t = Squeeze(r, ax) h = Mul(p, t) y = MatMul(h, w2)",
    "fused": "p = MatMul(x, w1) h = com.microsoft.BiasGelu(p, c) y = MatMul(h, w2)",
    "fast": "p = MatMul(x, w1) h = com.microsoft.FastGelu(p, c) y = MatMul(h, w2)",
    "two readers": "p = MatMul(x, w1) s = Add(p, c) e = Exp(p) h = Mul(s, e) y = MatMul(h, w2)",
    "gate": "g = MatMul(x, w1) i = Sigmoid(g) a = Mul(g, i) u = Gemm(x, wu, b1) h = Mul(a, u) y = MatMul(h, w2)",
}


def chain(name: str) -> Model:
    """A model whose units outside `KEPT` are not read: their rows of the second weight are zero."""
    second = random(2, 8, 5)
    second[np.setdiff1d(np.arange(8), KEPT)] = 0
    every = {
        "w1": random(1, 6, 8), "w1t": random(1, 6, 8).T.copy(), "wu": random(3, 6, 8), "w2": second,
        "w2t": second.T.copy(), "b1": random(4, 8), "b2": random(5, 5), "c": 1 + random(6, 8) ** 2,
        "r": random(7, 1, 8), "one": np.float32(1).reshape(()), "ax": np.array([0]),
    }  # fmt: skip
    words = CHAINS[name].replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {key: array for key, array in every.items() if key in words}
    return parsed("(float[N, 6] x) => (float[N, 5] y)", CHAINS[name], **used)


def narrowed(model: Model, form: str = "dense", seed: int = 0) -> tuple[dict[str, Stored], dict[str, Array]]:
    """Every weight of its chain on the units kept only, and the products of all features."""
    inventory = take_inventory(model)
    (found,) = inventory.chains
    weights = {weight.name: weight for weight in inventory.weights}
    stored, whole = {}, {}
    for number, name in enumerate((*found.producers, found.consumer)):
        weight, matrix = weights[name], inventory.matrix(weights[name])
        consumes = name == found.consumer
        part = matrix[KEPT] if consumes else matrix[:, KEPT]
        inputs, outputs = (KEPT, None) if consumes else (None, KEPT)
        bias = None if form == "dense" else random(seed + number, part.shape[1], dtype=np.float64)
        if form == "dense":
            one = Stored(None, part, bias, inputs=inputs, outputs=outputs)
        else:
            pair = well(seed + number, *part.shape)
            one = Stored(pair.first, pair.second, bias, inputs=inputs, outputs=outputs)
            if form != "pair":
                side: Side = "input" if form.startswith("input") else "output"
                length = part.shape[0] if side == "input" else part.shape[1]
                one = as_block(one, Window(side, 0 if form.endswith("start") else length - RANK, 1.0))
        stored[name] = one
        factors = one.factors(weight.d_in, weight.d_out)
        whole[name] = factors.first @ factors.second
    return stored, whole


def sizes(model: Model) -> Mapping[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays(model).items()}


@pytest.mark.parametrize("name", CHAINS)
def test_units_that_nobody_reads_can_go(name: str) -> None:
    model = chain(name)
    inventory = take_inventory(model)
    stored, _ = narrowed(model)
    result = check(rewrite(inventory, stored))
    x = random(9, 4, 6)
    assert relative(run(model, x=x)["y"], run(result, x=x)["y"]) < 1e-6
    assert not any(8 in shape for shape in sizes(result).values())
    assert parameter_count(result) == sum(
        array.size * len(KEPT) // 8 if 8 in array.shape else array.size
        for array in arrays(model).values()
        if array.dtype != np.int64
    )
    assert [node.op_type for node in result.proto.graph.node if node.op_type not in ("Gemm", "MatMul")] == [
        node.op_type for node in model.proto.graph.node
        if node.op_type not in ("Gemm", "MatMul") and not (name == "turned" and node.op_type == "Squeeze")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in CHAINS for form in ("pair", "input start", "input end", "output start", "output end")
     if (name, form.split()[0]) != ("scaled", "output")],
)  # fmt: skip
def test_a_narrowed_layer_can_take_every_form(name: str, form: str) -> None:
    model = chain(name)
    inventory = take_inventory(model)
    stored, whole = narrowed(model, form)
    result = check(rewrite(inventory, stored))
    # the same, dense and of all units: what was cut off is read by nobody
    dense = {}
    for weight in inventory.weights:
        bias = stored[weight.name].factors(weight.d_in, weight.d_out).bias
        dense[weight.name] = Stored(None, whole[weight.name], bias)
    x = random(9, 4, 6)
    expected = run(check(rewrite(inventory, dense)), x=x)["y"]
    assert relative(expected, run(result, x=x)["y"]) < 1e-4
    assert not any(8 in shape for shape in sizes(result).values())


def test_a_shared_first_factor_of_narrowed_producers() -> None:
    model = chain("gate")
    inventory = take_inventory(model)
    stored, _ = narrowed(model, "pair")
    first = stored["w1"].first
    for name in ("w1", "wu"):
        stored[name] = Stored(first, stored[name].second, stored[name].bias, shared="w1+wu", outputs=KEPT)
    x = random(9, 4, 6)
    apart = {name: Stored(s.first, s.second, s.bias, inputs=s.inputs, outputs=s.outputs) for name, s in stored.items()}
    result, other = (check(rewrite(inventory, one)) for one in (stored, apart))
    assert relative(run(other, x=x)["y"], run(result, x=x)["y"]) < 1e-6
    assert parameter_count(other) - parameter_count(result) == 6 * RANK


def test_shapes_that_no_longer_hold_are_taken_off() -> None:
    model = chain("row")
    for name, width in (("p", 8), ("m", 8), ("h", 8), ("y", 5)):
        model.proto.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, ["N", width]))
    inventory = take_inventory(model)
    stored, _ = narrowed(model)
    left = {value.name for value in check(rewrite(inventory, stored)).proto.graph.value_info}
    assert left == {"y"}
    pair = well(0, 6, 8)
    assert {value.name for value in rewrite(inventory, {"w1": pair}).proto.graph.value_info} == {"p", "m", "h", "y"}


def test_what_is_narrowed_is_narrow_to_shape_inference() -> None:
    stored, _ = narrowed(chain("row"))
    result = rewrite(take_inventory(chain("row")), stored)
    inferred = onnx.shape_inference.infer_shapes(result.proto, strict_mode=True)
    widths = {v.name: v.type.tensor_type.shape.dim[-1].dim_value for v in inferred.graph.value_info}
    assert {widths[name] for name in ("p", "m", "a", "d", "h")} == {len(KEPT)}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "y = Gemm(x, w, b)", "p = MatMul(x, w) y = Add(p, b)"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_block_can_be_compressed_again(side: Side, body: str, corrected: bool) -> None:
    weights = {"w": random(1, 12, 11)} | ({"b": random(2, 11)} if "b)" in body else {})
    model = parsed("(float[N, 12] x) => (float[N, 11] y)", body, **weights)
    x, rank = random(3, 5, 12), 5
    for _ in range(2):
        inventory = take_inventory(model)
        stored = {}
        for number, weight in enumerate(inventory.weights):
            if min(weight.d_in, weight.d_out) <= RANK:
                continue
            pair = well(number, weight.d_in, weight.d_out, min(rank, weight.d_in - 1, weight.d_out - 1))
            bias = np.ones(weight.d_out) if corrected else None
            stored[weight.name] = as_block(Stored(pair.first, pair.second, bias), Window(side, 0, 1.0))
        assert stored
        dense = rewrite(
            inventory,
            {w.name: Stored(None, f.first @ f.second, f.bias) for w in inventory.weights
             if w.name in stored for f in [stored[w.name].factors(w.d_in, w.d_out)]},
        )  # fmt: skip
        result = check(rewrite(inventory, stored))
        names = [output for node in result.proto.graph.node for output in node.output] + list(arrays(result))
        assert len(names) == len(set(names))
        assert relative(run(check(dense), x=x)["y"], run(result, x=x)["y"]) < 1e-4
        model = result


@pytest.mark.parametrize(
    ("body", "opset"),
    [
        ("Gemm<beta = 0.25>(x, w)", 17),
        ("Gemm<alpha = 2.0>(x, w)", 11),
        *(("Gemm<beta = 0.0>(x, w, c)", v) for v in (7, 17)),
    ],
)
def test_a_gemm_without_an_addend_adds_the_correction_itself(body: str, opset: int) -> None:
    weights = {"w": random(1, 6, 5)} | ({"c": random(2, 4, 5)} if "c)" in body else {})
    model = parsed("(float[N, 6] x) => (float[N, 5] y)", f"y = {body}", opset=opset, **weights)
    inventory, x, bias = take_inventory(model), random(3, 4, 6), random(4, 5, dtype=np.float64)
    pair = replace(well(0, 6, 5), bias=bias)
    dense = Stored(None, product(pair), bias)
    window = Window("output", 0, 1.0)
    expected = {"dense": ["Gemm"], "pair": ["MatMul", "Gemm"], "block": ["MatMul", "MatMul", "Concat", "Add"]}
    for form, stored in (("dense", dense), ("pair", pair), ("block", as_block(pair, window))):
        if form == "block" and opset < 13:
            continue
        result = check(rewrite(inventory, {"w": stored}))
        assert [node.op_type for node in result.proto.graph.node] == expected[form]
        assert relative(x.astype(np.float64) @ product(pair) + bias, run(result, x=x)["y"]) < 1e-5


@pytest.mark.parametrize("name", CHAINS)
def test_a_narrowed_chain_can_be_narrowed_again(name: str) -> None:
    model, x = chain(name), random(9, 4, 6)
    once = rewrite(take_inventory(model), narrowed(model)[0])
    inventory = take_inventory(once)
    (found,) = inventory.chains
    assert found.width == len(KEPT)
    weights = {weight.name: weight for weight in inventory.weights}
    kept = np.array([0, 1, 3])
    stored = {n: Stored(None, inventory.matrix(weights[n])[:, kept], None, outputs=kept) for n in found.producers}
    matrix = inventory.matrix(weights[found.consumer])
    stored[found.consumer] = Stored(None, matrix[kept], None, inputs=kept)
    blank = matrix.copy()
    blank[[2, 4]] = 0
    twice = check(rewrite(inventory, stored))
    expected = run(rewrite(inventory, {found.consumer: Stored(None, blank, None)}), x=x)["y"]
    assert relative(expected, run(twice, x=x)["y"]) < 1e-6
    assert not any(len(KEPT) in shape[:-1] or shape[-1:] == (8,) for shape in sizes(twice).values())


def test_two_chains_keep_their_own_units() -> None:
    body = """p = MatMul(x, w1) h = PRelu(p, c) q = MatMul(h, w2) t = Softmax(q)
    r = MatMul(t, w3) k = PRelu(r, d) y = MatMul(k, w4)"""
    weights = {"w1": random(1, 6, 8), "w2": random(2, 8, 5), "w3": random(3, 5, 8), "w4": random(4, 8, 5),
               "c": random(5, 8), "d": random(6, 8)}  # fmt: skip
    one, other = KEPT, np.array([1, 4, 5])
    for rows, units in (("w2", one), ("w4", other)):
        weights[rows][np.setdiff1d(np.arange(8), units)] = 0
    model = parsed("(float[N, 6] x) => (float[N, 5] y)", body, **weights)
    inventory = take_inventory(model)
    assert [(c.producers, c.consumer) for c in inventory.chains] == [(("w1",), "w2"), (("w3",), "w4")]
    stored = {
        "w1": Stored(None, weights["w1"][:, one], None, outputs=one),
        "w2": Stored(None, weights["w2"][one], None, inputs=one),
        "w3": Stored(None, weights["w3"][:, other], None, outputs=other),
        "w4": Stored(None, weights["w4"][other], None, inputs=other),
    }
    x = random(9, 4, 6)
    for names in (("w1", "w2"), ("w3", "w4"), ("w1", "w2", "w3", "w4")):
        result = check(rewrite(inventory, {name: stored[name] for name in names}))
        assert relative(run(model, x=x)["y"], run(result, x=x)["y"]) < 1e-6


def test_what_is_dense_can_be_put_in_place_of_a_weight() -> None:
    for form in matmul_forms():
        inventory = take_inventory(form.model)
        matrix = random(3, *form.matrix.shape, dtype=np.float64)
        result = check(rewrite(inventory, {inventory.weights[0].name: Stored(None, matrix, None)}))
        assert relative(form.algebra(form.x, matrix), run(result, x=form.x)["y"]) < 1e-5

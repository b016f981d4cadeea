"""Einsum as a linear layer: what its letters mean, what is refused, and its pairs."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TEXT_TYPES, parsed, random, run
from optimum import assert_cut_is_the_optimum, assert_full_rank_is_dense, matrices, only_weight

import onnxlr
from onnxlr.config import Config, Target
from onnxlr.forms import Stored
from onnxlr.rewrite import rewrite
from onnxlr.shapes import measure_shapes
from onnxlr.sites import take_inventory

if TYPE_CHECKING:
    from onnxlr.model_io import Model

    Array = np.ndarray[Any, Any]

LENGTHS = {"a": 2, "b": 3, "c": 4, "d": 5, "g": 2, "h": 3, "i": 6, "j": 3, "k": 4, "l": 2, "o": 5, "s": 7, "B": 3,
           "I": 6, "O": 5}  # fmt: skip
FORMS = [
    # equation, axes that its ellipsis stands for, groups, d_in, d_out
    ("bsi,io->bso", "", 1, 6, 5), ("bsi,oi->bso", "", 1, 6, 5), ("oi,bsi->bso", "", 1, 6, 5), ("i,io->o", "", 1, 6, 5),
    ("BI,OI->BO", "", 1, 6, 5), ("bi,io", "", 1, 6, 5), ("ib,ia", "", 1, 6, 2), ("bsi,ihd->bshd", "", 1, 6, 15),
    ("bshd,hdo->bso", "", 1, 15, 5), ("bshd,odh->bso", "", 1, 15, 5), ("bij,ikjl->bkl", "", 1, 18, 8),
    ("bshi,hio->bsho", "", 3, 6, 5), ("bhsi,hio->bhso", "", 3, 6, 5), (" b h s i , h o i -> b s h o ", "", 3, 6, 5),
    ("bgi,hgio->bhgo", "", 2, 6, 15), ("bhi,hio->boh", "", 3, 6, 5), ("bghi,ohgi->bgho", "", 6, 6, 5),
    ("bsi,io->bos", "", 1, 6, 5), ("bis,io->bso", "", 1, 6, 5), ("ibs,oi->obs", "", 1, 6, 5),
    ("...i,io->...o", "bs", 1, 6, 5), ("...i,io->...o", "", 1, 6, 5), ("...i,iad->...ad", "bs", 1, 6, 10),
    ("i...,io->o...", "bs", 1, 6, 5), ("h...i,hio->...ho", "bs", 3, 6, 5), ("...i,io", "bs", 1, 6, 5),
    ("ij,b...j->b...i", "s", 1, 3, 6),
]  # fmt: skip


def layer(
    equation: str, ellipsis: str = "", *, dtype: Any = np.float64, bias: Array | None = None
) -> tuple[Model, Array]:
    """`y = Einsum(x, w)`, or with the weight first, and an Add behind it; the weight is what has no `b`, `s` or `B`."""
    left, right = equation.replace(" ", "").partition("->")[0].split(",")
    first = is_weight(left) and not is_weight(right)
    weight, data = (left, right) if first else (right, left)
    w = random(1, *(LENGTHS[letter] for letter in weight), dtype=dtype)
    x = random(2, *(LENGTHS[letter] for letter in data.replace("...", ellipsis)), dtype=dtype) + dtype(0.5)
    kind, free = TEXT_TYPES[np.dtype(dtype).name], ", ".join(f"n{axis}" for axis in range(x.ndim))
    y = np.einsum(equation.replace(" ", ""), *((w, x) if first else (x, w)))
    outs = ", ".join(f"m{axis}" for axis in range(y.ndim))
    added = "" if bias is None else " y = Add(p, b)"
    body = f'{"p" if added else "y"} = Einsum<equation = "{equation}">({"w, x" if first else "x, w"}){added}'
    weights = {"w": w} if bias is None else {"w": w, "b": bias.astype(dtype)}
    return parsed(f"({kind}[{free}] x) => ({kind}[{outs}] y)", body, **weights), x


def is_weight(term: str) -> bool:
    return not {"b", "B", "."} & set(term)


@pytest.mark.parametrize(("equation", "ellipsis", "groups", "d_in", "d_out"), FORMS)
def test_the_letters_say_what_is_a_group_a_feature_and_a_row(
    equation: str, ellipsis: str, groups: int, d_in: int, d_out: int
) -> None:
    model, x = layer(equation, ellipsis)
    inventory, weight = only_weight(model, x=x)
    (site,) = weight.sites
    assert (weight.groups, weight.d_in, weight.d_out) == (groups, d_in, d_out)
    y = run(model, x=x)["y"]
    for group, matrix in enumerate(matrices(inventory, weight)):
        rows, made = site.input_rows[group].of(x), site.output_rows[group].of(y)
        assert np.allclose(rows @ matrix, made, rtol=1e-12)
    rows = x.size // (groups * d_in)
    assert weight.macs == inventory.macs == groups * rows * d_in * d_out
    assert weight.rows == (rows, rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(("equation", "ellipsis"), [form[:2] for form in FORMS])
def test_full_rank_is_the_dense_model(equation: str, ellipsis: str, dtype: Any) -> None:
    model, x = layer(equation, ellipsis, dtype=dtype)
    assert_full_rank_is_dense(model, x=x)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(
    ("equation", "ellipsis"), [form[:2] for form in FORMS if {"b", "B", "s"} & {*form[0], *form[1]}]
)
def test_every_group_is_cut_as_least_squares_would(equation: str, ellipsis: str, rank: int) -> None:
    model, x = layer(equation, ellipsis)
    inventory, weight = only_weight(model, x=x)
    (site,) = weight.sites
    rows = [each.of(x) @ matrix for each, matrix in zip(site.input_rows, matrices(inventory, weight), strict=True)]
    assert_cut_is_the_optimum(model, min(rank, weight.d_in, weight.d_out), rows, x=x)


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, dict[str, int]]:
    """Letters of every kind in any order, and their lengths; the data have a letter of the rows."""
    letters = iter("abcdefghi")
    kinds = [[next(letters) for _ in range(draw(st.integers(least, 2)))] for least in (0, 1, 1, 1)]
    groups, contracted, features, rows = kinds
    terms = ["".join(draw(st.permutations(term))) for term in (
        groups + contracted + rows, groups + contracted + features, groups + features + rows,
    )]  # fmt: skip
    lengths = {letter: draw(st.integers(1 if letter in groups else 2, 4)) for kind in kinds for letter in kind}
    data, weight, output = terms
    return f"{data},{weight}->{output}", lengths


@settings(max_examples=25, deadline=None, derandomize=True)
@given(equations(), st.booleans(), st.booleans(), st.integers(1, 3))
def test_any_equation(made: tuple[str, dict[str, int]], first: bool, biased: bool, rank: int) -> None:
    equation, lengths = made
    (data, weight), output = equation.split("->")[0].split(","), equation.split("->")[1]
    w, x = (
        random(seed, *(lengths[letter] for letter in term), dtype=np.float64) for seed, term in ((1, weight), (2, data))
    )
    b = random(3, *(lengths[letter] if letter in weight else 1 for letter in output), dtype=np.float64)
    free, outs = (
        ", ".join(f"{name}{axis}" for axis in range(len(term))) for name, term in (("n", data), ("m", output))
    )
    text = f"{weight},{data}->{output}" if first else equation
    body = f'{"p" if biased else "y"} = Einsum<equation = "{text}">({"w, x" if first else "x, w"})'
    weights = {"w": w, "b": b} if biased else {"w": w}
    model = parsed(f"(double[{free}] x) => (double[{outs}] y)", body + (" y = Add(p, b)" if biased else ""), **weights)
    inventory, found = only_weight(model, x=x)
    (site,) = found.sites
    assert (site.bias is not None) == biased
    assert np.array_equal(np.sort(inventory.matrix(found), axis=None), np.sort(w, axis=None))
    assert_full_rank_is_dense(model, x=x)
    rows = [each.of(x) @ matrix for each, matrix in zip(site.input_rows, matrices(inventory, found), strict=True)]
    assert_cut_is_the_optimum(model, min(rank, found.d_in, found.d_out), rows, x=x)


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("bsi,io->bo", "sums its data alone over 's'"),
        ("bsi,iok->bso", "sums its weight alone over 'k'"),
        ("bbi,io->bo", "repeats 'b' in its data"),
        ("bi,iio->bo", "repeats 'i' in its weight"),
        ("bi,bi->bi", "contracts nothing"),
        ("bi,bi->b", "its weight is a vector for every group"),
        ("bi,i->b", "its weight is a vector for every group"),
        ("bi,...i->b...", "an ellipsis for axes of the weight"),
        ("Bi,ia", "capital and small letters"),
    ],
)
def test_what_is_no_linear_layer_is_refused(equation: str, reason: str) -> None:
    data, weight = equation.partition("->")[0].split(",")
    shape = [2 if letter in "bB" else 3 for letter in weight.replace("...", "")]
    free = ", ".join("2" if letter in "bB" else "3" for letter in data)
    model = parsed(f"(float[{free}] x) => (float y)", f'y = Einsum<equation = "{equation}">(x, w)', w=random(1, *shape))
    model.proto.graph.output[0].type.tensor_type.ClearField("shape")
    (refusal,) = take_inventory(model).refusals
    assert reason in refusal.reason


def test_other_operands_are_refused_or_none_of_ours() -> None:
    def reasons(body: str, kind: str = "float", **weights: Array) -> list[str]:
        model = parsed(f"({kind}[N, 6] x, {kind}[6, M] z) => ({kind}[N, M] y)", body, **weights)
        inventory = take_inventory(model)
        assert not inventory.weights
        return [refusal.reason for refusal in inventory.refusals]

    w = random(1, 6, 6)
    (three,) = reasons('y = Einsum<equation = "ab,bc,cd->ad">(x, w, z)', w=w)
    assert three == "it multiplies 3 operands at once: split it into products of two"
    (folded,) = reasons('y = Einsum<equation = "ab,bc->ac">(w, w)', w=w)
    assert folded == "all of its operands are constant: fold constants first"
    (typed,) = reasons('y = Einsum<equation = "ab,bc->ac">(x, w)', "int32", w=w.astype(np.int32))
    assert typed == "its weight has the type int32"
    (computed,) = reasons('t = Mul(w, w) y = Einsum<equation = "ab,bc->ac">(x, t)', w=w)
    assert computed == "its weight is computed from constants by Mul: fold constants first"
    (unfit,) = reasons('y = Einsum<equation = "ab,bc,cd->ac">(x, w)', w=w)
    assert "is of 3 operands, not of 2" in unfit
    assert reasons('y = Einsum<equation = "ab,bc->ac">(x, z)') == []


def test_an_ellipsis_needs_the_rank_of_the_data() -> None:
    body = 't = Relu(x) y = Einsum<equation = "...i,io->...o">(t, w)'
    signature, w = "(float[N, 6] x) => (float[N, 5] y)", random(1, 6, 5)
    assert len(take_inventory(parsed(signature, body, w=w)).weights) == 1
    # shapes are not inferred through operators of runtimes
    (refusal,) = take_inventory(parsed(signature, body.replace("Relu", "com.microsoft.QuickGelu"), w=w)).refusals
    assert "the rank of its input is unknown: run shape inference first" in refusal.reason
    lettered = body.replace("Relu", "com.microsoft.QuickGelu").replace("...", "b")
    assert len(take_inventory(parsed(signature, lettered, w=w)).weights) == 1


def test_multiply_accumulates_of_an_ellipsis_are_those_of_its_axes() -> None:
    for equation, shapes in (
        ("...i,io->...o", ((2, 3, 4), (4, 5))),
        ("...ij,...jk->...ik", ((2, 1, 3, 4), (1, 7, 4, 5))),
        ("...,...->...", ((2, 3), (1, 3))),
    ):
        x, z = (random(index, *shape) for index, shape in enumerate(shapes))
        dims = [", ".join(f"{name}{axis}" for axis in range(array.ndim)) for name, array in (("n", x), ("k", z))]
        out = np.einsum(equation, x, z)
        outs = ", ".join(f"m{axis}" for axis in range(out.ndim))
        signature = f"(float[{dims[0]}] x, float[{dims[1]}] z) => (float[{outs}] y)"
        model = parsed(signature, f'y = Einsum<equation = "{equation}">(x, z)')
        feed = {"x": x, "z": z}
        inner = 4 if "i" in equation else 1
        assert take_inventory(model, measure_shapes(model, feed)).macs == out.size * inner


def test_a_pair_is_of_matmuls_where_they_are_the_same() -> None:
    def ops(equation: str) -> list[str]:
        model, x = layer(equation, "bs" if "." in equation else "")
        inventory, weight = only_weight(model, x=x)
        groups = (weight.groups,) if weight.groups > 1 else ()
        first, second = random(1, *groups, weight.d_in, 2), random(2, *groups, 2, weight.d_out)
        return [node.op_type for node in rewrite(inventory, {"w": Stored(first, second, None)}).proto.graph.node]

    assert ops("bsi,oi->bso") == ops("...i,io->...o") == ["MatMul", "MatMul"]
    assert ops("bsi,ihd->bshd") == ["MatMul", "Einsum"]
    assert ops("bshd,hdo->bso") == ["Einsum", "MatMul"]
    assert ops("bshi,hio->bsho") == ["Einsum", "Einsum"]


def test_it_shares_a_weight_with_matmul_and_may_be_a_block() -> None:
    w = random(1, 5, 5)
    body = 'a = MatMul(x, w) y = Einsum<equation = "bi,oi->bo">(a, v)'
    (weight,) = take_inventory(parsed("(float[N, 5] x) => (float[N, 5] y)", body, w=w, v=w.T.copy())).weights
    assert [site.op for site in weight.sites] == ["MatMul", "Einsum"]
    assert weight.block_sides == {"input", "output"}
    assert len({site.layout for site in weight.sites}) == 1


def test_hidden_units_between_plain_equations_can_be_dropped() -> None:
    fall = np.float32(0.85) ** np.arange(32)
    weights = {"w": random(1, 32, 16), "b": random(2, 32), "v": random(3, 32, 8) * fall[:, None].astype(np.float32)}
    model = parsed(
        "(float[N, S, 16] x) => (float[N, S, 8] y)",
        """p = Einsum<equation = "bsi,hi->bsh">(x, w) q = Add(p, b) r = Relu(q)
        y = Einsum<equation = "...h,ho->...o">(r, v)""",
        **weights,
    )  # fmt: skip
    assert [(chain.producers, chain.consumer) for chain in take_inventory(model).chains] == [(("w",), "v")]
    target, forms = Target("keep_params", 0.6), frozenset({"width"})
    config = Config(objective="output", target=target, forms=forms, rank_multiple=2, threads=1)
    report = onnxlr.compress(model, [{"x": random(4, 60, 5, 16)}], config)
    # a unit has 16 + 1 + 8 parameters, the new bias 8
    width = int(0.6 * report.before.parameters - 8) // 25 // 2 * 2
    assert {weight.form for weight in report.weights} == {f"dense of {width} hidden units"}
    assert report.after.parameters <= 0.6 * report.before.parameters
    assert report.validation.error < 0.05


def test_attention_with_einsum_is_compressed() -> None:
    heads, width, d = 4, 6, 24
    fall = 0.8 ** np.arange(d, dtype=np.float32)
    weights = {name: random(i, d, heads, width) * fall[:, None, None] for i, name in enumerate(("wq", "wk", "wv"))}
    body = " ".join(f'{n} = Einsum<equation = "bsi,ihd->bhsd">(x, w{n})' for n in "qkv")
    model = parsed(
        f"(float[N, S, {d}] x) => (float[N, S, {d}] y)",
        body + """ r = Einsum<equation = "bhqd,bhkd->bhqk">(q, k) t = Softmax<axis = -1>(r)
        m = Einsum<equation = "bhqk,bhkd->bhqd">(t, v) y = Einsum<equation = "bhqd,hdo->bqo">(m, wo)""",
        **weights, wo=random(9, heads, width, d) * 0.8 ** np.arange(d, dtype=np.float32),
    )  # fmt: skip
    x = random(5, 60, 5, d) * (0.8 ** np.arange(d, dtype=np.float32))[::-1]  # large where the weights are small
    errors = {}
    for objective in ("output", "weight"):
        config = Config(objective=objective, target=Target("keep_params", 0.7), rank_multiple=2, threads=1)  # type: ignore[arg-type]
        report = onnxlr.compress(model, [{"x": x}], config)
        assert len(report.weights) == 4
        assert not report.refusals
        assert report.after.parameters <= 0.7 * report.before.parameters
        assert report.before.macs == 5 * 4 * d * d + 2 * heads * 5 * 5 * width
        errors[objective] = report.validation.error
    assert errors["output"] < errors["weight"]


def test_gradients_reach_it() -> None:
    pytest.importorskip("torch")
    from onnxlr.api import calibrate

    w, v = random(1, 2, 6, 5), random(2, 2, 5, 4)
    model = parsed(
        "(float[N, S, 2, 6] x) => (float[N, 2, S, 4] y)",
        'h = Einsum<equation = "bsgi,gio->bgos">(x, w) y = Einsum<equation = "bgos,gok->bgsk">(h, v)', w=w, v=v,
    )  # fmt: skip
    x = random(3, 1600, 5, 2, 6)
    stats = calibrate(model, [{"x": x}], Config(objective="fisher", threads=1, batch=1600))
    kept = x[np.arange(len(x)) % 8 != 1]
    scale = np.mean(np.einsum("bsgi,gio,gok->bgsk", kept, w, v) ** 2)
    for group in range(2):
        # 7,000 random probes: moments of normal numbers are good to some percent
        found, expected = stats.moments[f"h:rows:-3:{group}/2:gradient"], v[group] @ v[group].T / scale
        assert found.count == 7000
        assert np.linalg.norm(found.second - expected) < 0.08 * np.linalg.norm(expected)


def test_the_pair_passes_the_checker() -> None:
    model, x = layer("bshi,hio->bsho", dtype=np.float32, bias=random(3, 3, 5))
    inventory, weight = only_weight(model, x=x)
    compressed = rewrite(inventory, {"w": Stored(random(1, 3, 6, 2), random(2, 3, 2, 5), np.ones(15))})
    onnx.checker.check_model(compressed.proto, full_check=True)
    assert [node.op_type for node in compressed.proto.graph.node] == ["Einsum", "Einsum", "Add"]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in compressed.proto.graph.initializer}
    assert shapes == {"w.lr_first": (3, 6, 2), "w.lr_second": (3, 2, 5), "p.lr_bias": (3, 5)}
    assert weight.parameters == prod((3, 6, 5))

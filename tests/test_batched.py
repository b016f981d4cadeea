"""MatMul with a batch of matrices: the experts of a layer are groups, cut at one rank."""

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
from onnxlr.costs import Parameters
from onnxlr.forms import Stored, pair_products
from onnxlr.probes import probes
from onnxlr.rewrite import rewrite
from onnxlr.sites import parameter_count, take_inventory

if TYPE_CHECKING:
    from onnxlr.model_io import Model

    Array = np.ndarray[Any, Any]
    Shape = tuple[int, ...]

LEADING: list[tuple[Shape, Shape]] = [
    ((2,), ()), ((2,), (1,)), ((2,), (2,)), ((3,), (4, 3)), ((3,), (4, 1)), ((2, 1), ()), ((2, 1), (2, 4)),
    ((2, 1), (4,)), ((1, 2), (3, 2)), ((1, 2), ()), ((2, 3), (3,)), ((2, 3), (2, 3)), ((2, 3), (2, 1)),
    ((2, 2), (5, 2, 1)),
]  # fmt: skip
"""Leading axes of the weight and of the data."""


def batched(
    leading: Shape, data: Shape, d_in: int, d_out: int, *, left: bool = False, bias: str = "", dtype: Any = np.float64
) -> tuple[Model, Array]:
    """`y = x W` for x [*data, 7, d_in], or its mirror image; a bias for every group or for all."""
    w, x = random(1, *leading, d_in, d_out, dtype=dtype), random(2, *data, 7, d_in, dtype=dtype)
    lengths = {"": (), "own": (*leading, 1, d_out), "common": (d_out,)}[bias]
    b = random(3, *lengths, dtype=dtype)
    out = np.broadcast_shapes(leading, data)
    x += np.linspace(-1, 1, d_in, dtype=dtype)  # a mean, for the bias to correct
    if left:
        w, x = (np.ascontiguousarray(np.swapaxes(array, -1, -2)) for array in (w, x))
        b = b[:, None] if bias == "common" else np.ascontiguousarray(np.swapaxes(b, -1, -2)) if bias else b
    kind = TEXT_TYPES[np.dtype(dtype).name]
    dims = ", ".join([*(f"a{i}" for i in range(len(data))), *(f"{d_in}, N" if left else f"N, {d_in}").split(", ")])
    outs = ", ".join([*map(str, out), "P", "Q"])
    body = (
        ("p" if bias else "y") + (" = MatMul(w, x)" if left else " = MatMul(x, w)") + (" y = Add(p, b)" if bias else "")
    )
    model = parsed(f"({kind}[{dims}] x) => ({kind}[{outs}] y)", body, **({"w": w, "b": b} if bias else {"w": w}))
    return model, x


CASES = st.tuples(
    st.sampled_from(LEADING), st.sampled_from([(6, 5), (4, 7), (3, 3), (1, 4)]), st.booleans(),
    st.sampled_from(["", "own", "common"]),
)  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(CASES, st.sampled_from([np.float16, np.float32, np.float64]))
def test_full_rank_is_the_dense_model(case: Any, dtype: Any) -> None:
    (leading, data), (d_in, d_out), left, bias = case
    model, x = batched(leading, data, d_in, d_out, left=left, bias=bias, dtype=dtype)
    assert_full_rank_is_dense(model, x=x)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(CASES)
def test_the_rows_of_every_group_are_multiplied_by_its_matrix(case: Any) -> None:
    (leading, data), (d_in, d_out), left, _ = case
    model, x = batched(leading, data, d_in, d_out, left=left)
    inventory, weight = only_weight(model, x=x)
    (site,) = weight.sites
    y = run(model, x=x)["y"]
    assert weight.groups == prod(leading)
    every = tuple(np.broadcast_shapes(leading, data))
    whole = np.broadcast_to(x, (*every, *x.shape[-2:]))
    for group, matrix in enumerate(matrices(inventory, weight)):
        given_rows, made = site.input_rows[group].of(x), site.output_rows[group].of(y)
        spread = site.output_rows[group].of(whole)
        assert np.allclose(spread @ matrix, made, rtol=1e-12)
        # where the data serve several groups, or are broadcast themselves, their rows are taken once
        assert {tuple(row) for row in given_rows} == {tuple(row) for row in spread}
    rows = y.size // d_out
    assert weight.macs == rows * d_in * d_out
    assert weight.rows == (rows / weight.groups, rows / weight.groups)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(CASES, st.integers(1, 4))
def test_every_group_is_cut_as_least_squares_would(case: Any, rank: int) -> None:
    (leading, data), (d_in, d_out), left, bias = case
    model, x = batched(leading, data, d_in, d_out, left=left, bias=bias)
    _, weight = only_weight(model, x=x)
    (site,) = weight.sites
    product = np.matmul(*(
        (np.swapaxes(random(1, *leading, d_in, d_out, dtype=np.float64), -1, -2), x) if left
        else (x, random(1, *leading, d_in, d_out, dtype=np.float64))
    ))  # fmt: skip
    rows = [each.of(product) for each in site.output_rows]
    assert_cut_is_the_optimum(model, min(rank, d_in, d_out), rows, x=x)


def test_data_that_serve_all_groups_are_observed_once() -> None:
    # wider than they are deep, so that the input is observed
    w = {"w": random(1, 3, 4, 9)}
    for dims, count in (("N, 4", 1), ("1, N, 4", 1), ("M, N, 4", 3), ("3, N, 4", 3), ("B, 1, N, 4", 1)):
        out = "B, 3, N, 9" if dims.startswith("B") else "3, N, 9"
        inventory = take_inventory(parsed(f"(float[{dims}] x) => (float[{out}] y)", "y = MatMul(x, w)", **w))
        assert len(probes(inventory.weights, "output")) == count
        assert len(probes(inventory.weights, "utilized")) == count
        assert inventory.weights[0].groups == 3


@pytest.mark.parametrize("bias", ["", "own", "common"])
@pytest.mark.parametrize("leading", [(3,), (2, 1, 2)])
def test_parameters_are_those_of_the_rewritten_model(leading: Shape, bias: str) -> None:
    model, x = batched(leading, (), 6, 5, bias=bias)
    inventory, weight = only_weight(model, x=x)
    groups = prod(leading)
    assert (weight.parameters, weight.block_sides) == (groups * 30, frozenset())
    assert (weight.sites[0].bias is not None) == (bias == "own")
    pair = Stored(random(4, groups, 6, 2), random(5, groups, 2, 5), random(6, groups * 5))
    compressed = rewrite(inventory, {"w": pair})
    onnx.checker.check_model(compressed.proto, full_check=True)
    price = Parameters(inventory).form(weight, pair_products(6, 5, 2), moved=0, corrected=True)
    assert price == groups * (2 * 11 + (0 if bias == "own" else 5))
    assert parameter_count(compressed) == parameter_count(model) - weight.parameters + price
    adds = sum(node.op_type == "Add" for node in compressed.proto.graph.node)
    assert adds == {"": 1, "own": 1, "common": 2}[bias]


@pytest.mark.parametrize(
    "body", ["y = MatMul(x, w)", "y = MatMul(w, x)", "t = com.microsoft.QuickGelu(x) y = MatMul(t, w)"]
)
def test_data_that_are_or_may_be_a_vector_are_refused(body: str) -> None:
    model = parsed(f"(float[{'6, 6' if 'Gelu' in body else '6'}] x) => (float[M, N] y)", body, w=random(0, 2, 6, 6))
    model.proto.graph.output[0].type.tensor_type.ClearField("shape")
    (refusal,) = take_inventory(model).refusals
    assert "the rank of its input is unknown or 1: run shape inference first" in refusal.reason


def test_copies_of_a_batch_are_found_by_their_content() -> None:
    w = random(1, 2, 5, 5)
    other = w.copy()
    other[1, 4, 4] += 1e-6
    body = "a = MatMul(x, w) b = MatMul(v, a) c = MatMul(b, o) y = MatMul(c, u)"
    model = parsed(
        "(float[2, N, 5] x) => (float[1, 2, N, 5] y)", body, w=w, v=np.swapaxes(w, 1, 2).copy(), o=other, u=w[None]
    )
    copied, apart = take_inventory(model).weights
    assert ([site.output for site in copied.sites], copied.parameters) == (["a", "b", "y"], 150)
    assert [site.output for site in apart.sites] == ["c"]


def experts() -> Model:
    """Two experts, mixed by a gate; weights of falling spectra."""
    fall = 0.8 ** np.arange(24, dtype=np.float32)
    return parsed(
        "(float[N, 24] x) => (float[N, 24] y)",
        """g = MatMul(x, gate) s = Softmax<axis = -1>(g) t = Transpose<perm = [1, 0]>(s) u = Unsqueeze(t, last)
        a = MatMul(x, up) b = Add(a, bias) h = Relu(b) o = MatMul(h, down) m = Mul(o, u)
        y = ReduceSum<keepdims = 0>(m, zero)""",
        gate=random(1, 24, 2), up=random(2, 2, 24, 48) * fall[:, None], bias=random(3, 2, 1, 48),
        down=random(4, 2, 48, 24) * fall, last=np.array([2]), zero=np.array([0]),
    )  # fmt: skip


def test_two_experts_are_compressed() -> None:
    model = experts()
    config = Config(objective="output", target=Target("keep_params", 0.6), rank_multiple=2, threads=1)
    report = onnxlr.compress(model, [{"x": random(5, 400, 24)}], config)
    by_name = {weight.name: weight for weight in report.weights}
    cut = [name for name in ("up", "down") if by_name[name].form == "pair"]
    assert cut
    assert report.after.parameters <= 0.6 * report.before.parameters
    naive = onnxlr.compress(model, [{"x": random(5, 400, 24)}], Config(
        objective="weight", target=Target("keep_params", 0.6), rank_multiple=2, threads=1,
    ))  # fmt: skip
    assert report.validation.error < naive.validation.error


def test_gradients_are_those_of_every_group() -> None:
    pytest.importorskip("torch")
    from onnxlr.api import calibrate

    w, v = random(1, 2, 6, 5), random(2, 2, 5, 4)
    model = parsed("(float[N, 6] x) => (float[2, N, 4] y)", "h = MatMul(x, w) y = MatMul(h, v)", w=w, v=v)
    x = random(3, 8000, 6)
    stats = calibrate(model, [{"x": x}], Config(objective="fisher", threads=1, batch=8000))
    kept = x[np.arange(len(x)) % 8 != 1]
    scale = np.mean((kept @ w @ v) ** 2)
    for group in range(2):
        # 7,000 random probes: moments of normal numbers are good to some percent
        found, expected = stats.moments[f"h:-3:{group}/2:gradient"], v[group] @ v[group].T / scale
        assert found.count == 7000
        assert np.linalg.norm(found.second - expected) < 0.08 * np.linalg.norm(expected)

"""Embedding tables: one-hot rows that are never formed, pairs that gather, and tables that others read too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TEXT_TYPES, parsed, random, relative, run
from optimum import CONFIG, assert_full_rank_is_dense, only_weight

import onnxlr
from onnxlr.calibrate import accumulate
from onnxlr.case import UNUTILIZED
from onnxlr.config import Config, Target
from onnxlr.costs import Latency, Macs, Parameters
from onnxlr.forms import Stored, as_block, best_window, block_products, pair_products
from onnxlr.layer import Layer
from onnxlr.probes import probes, weight_moments
from onnxlr.rewrite import rewrite
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes
from onnxlr.sites import parameter_count, take_inventory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnxlr.gram import Moments
    from onnxlr.model_io import Model

    Array = np.ndarray[Any, Any]


def table(
    rows: int, width: int, shape: tuple[int, ...], *, dtype: Any = np.float64, index: str = "int64", bias: bool = False
) -> Model:
    """`y = Gather(w, x)` for x of the rank of `shape`, and an Add behind it."""
    free = ", ".join(f"n{axis}" for axis in range(len(shape)))
    outs = ", ".join([free, str(width)] if free else [str(width)])
    source = f"{index}[{free}] x" if free else f"{index}[] x"
    kind, w = TEXT_TYPES[np.dtype(dtype).name], random(1, rows, width, dtype=dtype) + dtype(0.5)
    body = "p = Gather(w, x) y = Add(p, b)" if bias else "y = Gather<axis = 0>(w, x)"
    weights = {"w": w, "b": random(2, width, dtype=dtype)} if bias else {"w": w}
    model = parsed(f"({source.replace('[]', '[1]')}) => ({kind}[{outs}] y)", body, **weights)
    if not shape:
        del model.proto.graph.input[0].type.tensor_type.shape.dim[:]
    return model


def indices(shape: tuple[int, ...], rows: int, index: str = "int64", seed: int = 3) -> Array:
    """From -rows to rows - 1."""
    return np.random.default_rng(seed).integers(-rows, rows, shape).astype(index)


SIZES = st.sampled_from([(9, 4), (4, 9), (6, 6), (30, 7), (2, 5)])
SHAPES = st.sampled_from([(), (3,), (2, 5), (2, 1, 3), (1,)])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    SIZES,
    SHAPES,
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.sampled_from(["int32", "int64"]),
    st.booleans(),
)
def test_full_rank_is_the_dense_model(
    size: tuple[int, int], shape: tuple[int, ...], dtype: Any, index: str, bias: bool
) -> None:
    model = table(*size, shape, dtype=dtype, index=index, bias=bias)
    assert_full_rank_is_dense(model, x=indices(shape, size[0], index))


def frequencies(x: Array, rows: int) -> Array:
    """How often each row is taken to come: as counted, and a tenth of all gathered as if every row came alike."""
    return 0.9 * np.bincount(x.ravel() % rows, minlength=rows) + 0.1 * x.size / rows


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SIZES, st.sampled_from([(3,), (40,), (4, 9), (3, 2, 6)]), st.integers(1, 4), st.booleans())
def test_it_is_cut_as_weighted_least_squares_over_its_rows_would(
    size: tuple[int, int], shape: tuple[int, ...], rank: int, bias: bool
) -> None:
    model, x, rank = table(*size, shape, bias=bias), indices(shape, size[0]), min(rank, *size)
    w, often = random(1, *size, dtype=np.float64) + 0.5, frequencies(x, size[0])
    inventory, _ = only_weight(model, x=x)
    decomposition = Layer(w, moments_of(model, x), observed_output=True).decompose()
    compressed = rewrite(inventory, {"w": Stored.pair(decomposition.cut(rank))})
    every = np.arange(size[0]).reshape(-1, *[1] * (len(shape) - 1))
    lost = (run(compressed, x=every)["y"] - run(model, x=every)["y"]).reshape(size)
    squares = np.linalg.svd(np.sqrt(often)[:, None] * (w - often @ w / often.sum()), compute_uv=False) ** 2
    # the ridge turns the basis by a millionth of the energy
    assert abs(often @ (lost**2).sum(1) - squares[rank:].sum()) < 1e-5 * squares.sum()
    assert abs(decomposition.damage(rank) * x.size - squares[rank:].sum()) < 1e-5 * squares.sum()


def moments_of(model: Model, x: Array) -> Moments:
    """Of the only weight, for the objective output."""
    inventory, weight = only_weight(model, x=x)
    stats = accumulate(model, inventory, [{"x": x}], Session(model).inputs, CONFIG)
    (moments,) = weight_moments(stats, inventory, weight, "output")
    return moments


def test_rows_that_calibration_never_gathered_keep_a_direction_of_their_own() -> None:
    # the first ten rows lie in a plane, and they alone are seen; all others along a third axis
    w = np.zeros((40, 8))
    w[:10, :2], w[10:, 2] = 5 * random(1, 10, 2, dtype=np.float64), np.linspace(1, 3, 30)
    w += 1e-3 * random(2, 40, 8, dtype=np.float64)
    model = table(40, 8, (50,))
    model.proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w, "w"))
    factors = Layer(w, moments_of(model, indices((50,), 40) % 10), observed_output=True).decompose().cut(3)
    assert relative(w, factors.first @ factors.second + factors.bias) < 1e-3


@pytest.mark.parametrize("size", [(9, 4), (4, 9)])
def test_moments_are_those_of_counted_rows(size: tuple[int, int]) -> None:
    model, x = table(*size, (5, 8)), indices((5, 8), size[0])
    inventory, weight = only_weight(model, x=x)
    assert (weight.observes_output, weight.shows_input) == (True, False)
    assert [tensor for tensor, _ in probes(inventory.weights, "fisher")] == ["y"]
    assert probes(inventory.weights, "utilized") == []
    moments, often, w = moments_of(model, x), frequencies(x, size[0]), inventory.matrix(weight)
    assert np.allclose(moments.gram, w.T @ np.diag(often) @ w, rtol=1e-12)
    assert np.allclose(moments.total, often @ w, rtol=1e-12)
    assert moments.count == 40


def test_a_padding_row_of_zeros_stays_one() -> None:
    model = table(9, 4, (5,))
    w = random(1, 9, 4, dtype=np.float64)
    w[0] = 0
    model.proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w, "w"))
    inventory, weight = only_weight(model, x=np.arange(5))
    moments = moments_of(model, indices((50,), 9))
    factors = Layer(inventory.matrix(weight), moments, observed_output=True).decompose().cut(2)
    plain = rewrite(inventory, {"w": Stored(factors.first, factors.second, None)})
    assert np.abs(run(plain, x=np.array([0, -9]))["y"]).max() < 1e-15


def test_only_the_second_product_costs() -> None:
    model, x = table(30, 8, (2, 5), dtype=np.float32), indices((2, 5), 30)
    inventory, weight = only_weight(model, x=x)
    assert (weight.rows, weight.macs, inventory.macs, weight.parameters) == ((0, 10), 0, 0, 240)
    products = pair_products(30, 8, 3)
    assert Macs(inventory).form(weight, products, moved=0, corrected=True) == 10 * 3 * 8
    assert Macs(inventory).dense(weight) == 0
    price = Parameters(inventory).form(weight, products, moved=0, corrected=True)
    compressed = rewrite(inventory, {"w": Stored(random(1, 30, 3), random(2, 3, 8), np.ones(8))})
    onnx.checker.check_model(compressed.proto, full_check=True)
    assert parameter_count(compressed) == price == 3 * 38 + 8
    assert take_inventory(compressed, measure_shapes(compressed, {"x": x})).macs == 10 * 3 * 8
    assert [node.op_type for node in compressed.proto.graph.node] == ["Gather", "MatMul", "Add"]


def test_its_time_is_that_of_the_second_product() -> None:
    asked: list[tuple[int, int, int]] = []

    class Timings:
        """Microseconds that tell what was asked."""

        def measure(self, products: Iterable[tuple[int, int, int]]) -> None:
            asked.extend(products)

        def product(self, rows: int, d_in: int, d_out: int) -> float:
            return rows * d_in * d_out

        def moved(self, rows: int, features: int) -> float:
            return rows * features

    inventory, weight = only_weight(table(5000, 70, (1, 6)), x=indices((1, 6), 5000))
    latency = Latency(inventory, Timings(), 4, 1.0)  # type: ignore[arg-type]
    assert set(asked) == {(24, d, e) for d in (64, 70) for e in (64, 70)}
    assert latency.dense(weight) == 0
    assert latency.form(weight, pair_products(5000, 70, 8), moved=0, corrected=True) == 24 * 8 * 70


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_a_small_table_may_be_a_block(shape: tuple[int, ...]) -> None:
    model, x = table(12, 8, shape), indices(shape, 12)
    inventory, weight = only_weight(model, x=x)
    assert weight.block_sides == {"output"}
    pair = Stored(random(1, 12, 3, dtype=np.float64), random(2, 3, 8, dtype=np.float64), np.ones(8))
    block = as_block(pair, best_window(pair.second, "output"))
    compressed = rewrite(inventory, {"w": block})
    assert relative(run(rewrite(inventory, {"w": pair}), x=x)["y"], run(compressed, x=x)["y"]) < 1e-10
    assert parameter_count(compressed) == 8 + sum(d * e for d, e in block_products(12, 8, 3, "output"))


@pytest.mark.parametrize(
    ("signature", "body", "weights", "reason"),
    [
        ("(int64[N] x) => (float[9, N] y)", "y = Gather<axis = 1>(w, x)", {"w": random(1, 9, 4)}, "along axis 1"),
        ("(int64[N] x) => (float[9, N] y)", "y = Gather<axis = -1>(w, x)", {"w": random(1, 9, 4)}, "along axis -1"),
        ("(int64[N] x) => (float[N, 4, 2] y)", "y = Gather(w, x)", {"w": random(1, 9, 4, 2)}, "3 axes, [9, 4, 2]"),
        ("(int64[N] x) => (float[2, 4] y)", "y = Gather(w, i)", {"w": random(1, 9, 4), "i": np.array([1, 2])},
         "its indices are constant: fold constants first"),
        ("(int64[N] x) => (int8[N, 4] y)", "y = Gather(w, x)", {"w": np.ones((9, 4), np.int8)}, "the type int8"),
        ("(int64[N] x) => (float[N, 4] y)", "t = Mul(w, w) y = Gather(t, x)", {"w": random(1, 9, 4)}, "by Mul"),
        ("(int64[N] x) => (float[N, 4] y)", "t = DequantizeLinear(w, s) y = Gather(t, x)",
         {"w": np.ones((9, 4), np.int8), "s": np.float32(1).reshape(())}, "quantized"),
    ],
)  # fmt: skip
def test_other_tables_are_refused(signature: str, body: str, weights: dict[str, Any], reason: str) -> None:
    inventory = take_inventory(parsed(signature, body, **weights))
    (refusal,) = inventory.refusals
    assert reason in refusal.reason
    assert not inventory.weights


def test_an_older_opset_is_refused() -> None:
    model = parsed("(int64[N] x) => (float[N, 4] y)", "y = Gather(w, x)", opset=6, w=random(1, 9, 4))
    assert "opset 6 broadcasts" in take_inventory(model).refusals[0].reason


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("s = Shape(f) y = Gather(s, x)", {}),
        ("y = Gather(w, x)", {"w": np.arange(9)}),
        ("t = Mul(w, w) y = Gather(t, x)", {"w": np.arange(9)}),
        ("y = Gather(w, x)", {"w": np.ones((9, 4), np.int64)}),
        ("t = Gather(f, x) y = Shape(t)", {}),
        ("t = Gather(w, x) y = Shape(t)", {"w": random(1, 9)}),
    ],
)
def test_what_gathers_no_table_is_passed_over(body: str, weights: dict[str, Any]) -> None:
    model = parsed("(int64[N] x, float[N, 4] f) => (int64[M] y)", body, **weights)
    model.proto.graph.output[0].type.tensor_type.ClearField("shape")
    inventory = take_inventory(model)
    assert (inventory.weights, inventory.refusals) == ((), ())


BOTH = "(int64[N] i, float[N, 9] x) => (float[N, 4] y)"


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Gather(w, i) b = MatMul(x, w) y = Add(a, b)", {"w": random(1, 9, 4)}),
        (
            "a = Gather(w, i) b = Gemm<transB = 1>(x, v) y = Add(a, b)",
            {"w": random(1, 9, 4), "v": random(1, 9, 4).T.copy()},
        ),
    ],
)
def test_it_shares_a_weight_with_a_product(body: str, weights: dict[str, Array]) -> None:
    model = parsed(BOTH, body, **weights)
    feed = {"i": indices((40,), 9), "x": random(4, 40, 9)}
    inventory, weight = only_weight(model, **feed)
    assert [site.op for site in weight.sites] == ["Gather", "MatMul" if "MatMul" in body else "Gemm"]
    assert weight.observes_output
    assert (weight.rows, weight.macs) == ((40, 80), 40 * 36)
    pair = Stored(random(5, 9, 2), random(6, 2, 4), None)
    compressed = rewrite(inventory, {weight.name: pair})
    matrix = pair.first @ pair.second  # type: ignore[operator]
    assert relative(matrix[feed["i"]] + feed["x"] @ matrix, run(compressed, **feed)["y"]) < 1e-5
    # both read one copy of the factors
    assert parameter_count(compressed) == 2 * 13
    stats = accumulate(model, inventory, [feed], Session(model).inputs, CONFIG)
    (moments,) = weight_moments(stats, inventory, weight, "output")
    w = weights["w"].astype(np.float64)
    often, product = frequencies(feed["i"], 9), feed["x"].astype(np.float64) @ w
    assert np.allclose(moments.gram, w.T @ np.diag(often) @ w + product.T @ product, rtol=1e-5, atol=1e-5)


def test_a_wide_product_beside_a_table_is_observed_at_its_output_too() -> None:
    model = parsed("(int64[N] i, float[N, 4] x) => (float[N, 9] y)", "a = Gather(w, i) b = MatMul(x, w) y = Add(a, b)",
                   w=random(1, 4, 9))  # fmt: skip
    (weight,) = take_inventory(model).weights
    assert weight.observes_output
    assert {tensor for tensor, _ in probes([weight], "output")} == {"a", "b"}
    opaque = parsed("(int64[N] i, float[N, 9] x, float[N, 4] c) => (float[N, 4] y)",
                    "[look] a = Gather(w, i) [sum] b = Gemm(x, w, c) y = Add(a, b)", w=random(1, 9, 4))  # fmt: skip
    inventory = take_inventory(opaque)
    assert not inventory.weights
    assert {refusal.reason for refusal in inventory.refusals} == {
        "Gather 'look' shows only its output and Gemm 'sum' of the same weight only its input"
    }


def test_a_head_with_a_copy_of_the_table_is_a_weight_of_its_own() -> None:
    w = random(1, 9, 4)
    model = parsed("(int64[N] i) => (float[N, 9] y)", "a = Gather(w, i) y = MatMul(a, v)", w=w, v=w.T.copy())
    assert [(weight.name, weight.d_in, weight.d_out) for weight in take_inventory(model).weights] == [
        ("w", 9, 4),
        ("v", 4, 9),
    ]


def classifier() -> tuple[Model, list[dict[str, Array]], Array]:
    """Tokens, a table of falling spectrum, their mean, an MLP; Zipf's law for the tokens, and labels."""
    fall = 0.85 ** np.arange(32, dtype=np.float32)
    mix = np.linalg.qr(random(2, 32, 32))[0]
    model = parsed(
        "(int64[N, S] x, int64[N, S] mask) => (float[N, 5] y)",
        """e = Gather(table, x) f = LayerNormalization<axis = -1>(e, one) m = Cast<to = 1>(mask) k = Unsqueeze(m, last)
        g = Mul(f, k) p = ReduceMean<axes = [1], keepdims = 0>(g) h = MatMul(p, up) r = Relu(h) y = MatMul(r, down)""",
        table=(random(1, 300, 32) * fall) @ mix + random(7, 32), one=np.ones(32, np.float32), last=np.array([2]),
        up=random(3, 32, 24), down=random(4, 24, 5),
    )  # fmt: skip
    generator = np.random.default_rng(5)
    x = np.minimum(generator.zipf(1.3, (320, 8)) - 1, 299)
    mask = (np.arange(8) < generator.integers(3, 9, (320, 1))).astype(np.int64)
    return model, [{"x": x, "mask": mask}], run(model, x=x, mask=mask)["y"].argmax(-1)


@pytest.mark.parametrize("objective", ["output", "fisher"])
def test_an_embedding_classifier_is_compressed(objective: Any) -> None:
    if objective == "fisher":
        pytest.importorskip("torch")
    model, feeds, labels = classifier()
    options: dict[str, Any] = {"target": Target("keep_params", 0.5), "rank_multiple": 2, "threads": 1, "mask": "mask"}
    report = onnxlr.compress(model, feeds, Config(objective=objective, **options), labels=labels)
    (own,) = (weight for weight in report.weights if weight.name == "table")
    assert (own.form, own.macs) == ("pair", 0)
    assert "no gradient" not in own.reason
    assert own.macs_after == 8 * own.rank * 32  # type: ignore[operator]
    assert report.after.parameters <= 0.5 * report.before.parameters
    assert report.after.macs == report.before.macs - sum(w.macs - w.macs_after for w in report.weights)  # type: ignore
    assert not report.refusals
    naive = onnxlr.compress(model, feeds, Config(objective="weight", **options))
    assert report.validation.error < naive.validation.error


def test_the_objective_utilized_leaves_it_alone() -> None:
    model, feeds, _ = classifier()
    config = Config(objective="utilized", target=Target("energy", 0.99), threads=1)
    report = onnxlr.compress(model, feeds, config)
    (own,) = (weight for weight in report.weights if weight.name == "table")
    assert (own.form, own.reason) == ("dense", UNUTILIZED)
    analysis = onnxlr.analyze(model, feeds, Config(threads=1))
    assert {weight.name for weight in analysis.weights} == {"up", "down"}


def test_fine_tuning_learns_both_of_its_factors() -> None:
    torch = pytest.importorskip("torch")
    from onnxlr.torch_graph import to_torch

    model, x = table(9, 4, (5,), dtype=np.float32), indices((5,), 9)
    inventory, _ = only_weight(model, x=x)
    compressed = rewrite(inventory, {"w": Stored(random(1, 9, 2), random(2, 2, 4), np.ones(4))})
    graph = to_torch(compressed)
    for _, parameter in graph.named_weights():
        parameter.requires_grad_()
    y = graph({"x": torch.from_numpy(x)})["y"]
    assert relative(run(compressed, x=x)["y"], y.detach().numpy()) < 1e-6
    y.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in graph.named_weights()}
    assert set(gradients) == {"w.lr_first", "w.lr_second", "y.lr_bias"}
    seen = np.unique(x % 9)
    assert np.array_equal(np.flatnonzero(gradients["w.lr_first"].abs().sum(1).numpy()), seen)
    assert gradients["w.lr_second"].abs().min() > 0

"""One weight as a table of embeddings and as the output head: the pair for both, in arrays and in graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import parsed, random, relative, run
from onnx import numpy_helper

import onnxlr
from onnxlr.config import Config, Target
from onnxlr.factorize import OutputDecomposition, WeightDecomposition
from onnxlr.forms import Stored
from onnxlr.gram import Moments
from onnxlr.rewrite import rewrite
from onnxlr.session import Session
from onnxlr.sites import take_inventory
from onnxlr.tied import TiedDecomposition
from onnxlr.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from onnxlr.model_io import Model

    Array = NDArray[Any]

V, D = 40, 8
WORDS = (random(1, V, D) * 0.7 ** np.arange(D, dtype=np.float32)) @ np.linalg.qr(random(2, D, D))[0] + random(3, D)
HEADS = {
    "MatMul of the transpose": "t = Transpose<perm = [1, 0]>(table) y = MatMul(h, t)",
    "Gemm": "y = Gemm<transB = 1, alpha = 2.0>(f, table)",
    "Gemm with a bias": "y = Gemm<transB = 1>(f, table, c)",
    "MatMul and a bias": "t = Transpose<perm = [1, 0]>(table) u = MatMul(h, t) y = Add(u, c)",
}


def language_model(head: str = HEADS["MatMul of the transpose"], gathers: str = "e = Gather(table, i)") -> Model:
    flat = "Gemm" in head
    return parsed(
        f"(int64[N, S] i) => (float[{'M' if flat else 'N, S'}, {V}] y)",
        f"{gathers} n = LayerNormalization<axis = -1>(e, one) m = MatMul(n, w) r = Relu(m) d = MatMul(r, v) "
        f"h = Add(d, e) f = Reshape(h, shape) {head}",
        table=WORDS, one=np.ones(D, np.float32), w=random(4, D, 16), v=random(5, 16, D) / 4, c=random(6, V),
        shape=np.array([-1, D]),
    )  # fmt: skip


def tokens(count: int, seed: int = 7) -> list[dict[str, Array]]:
    drawn = np.minimum(np.random.default_rng(seed).zipf(1.4, (count, 12)) - 1, V - 1)
    return [{"i": row[None]} for row in drawn]


def decomposed(seed: int, weighed: bool) -> tuple[TiedDecomposition, Array, Array, Array, Array]:
    """The decomposition, the table, what was gathered, what was read and the metric."""
    generator = np.random.default_rng(seed)
    table, x = generator.standard_normal((V, D)), generator.standard_normal((70, D)) @ generator.standard_normal((D, D))
    rows = table[np.minimum(generator.zipf(1.3, 90) - 1, V - 1)]
    g = generator.standard_normal((D, D))
    gain = g @ g.T if weighed else np.eye(D)
    made = TiedDecomposition(table, Moments.of(rows), Moments.of(x), gain if weighed else None)
    return made, table, rows, x, gain


def losses(first: Array, second: Array, table: Array, rows: Array, x: Array, gain: Array) -> tuple[float, float]:
    """Of both uses, relative to their whole, from the data; `rows` of the table are found back by their values."""
    left = table - first @ second
    lost = left[[int(np.argmin(np.abs(table - row).sum(1))) for row in rows]]
    return (
        float(np.sum((lost @ gain) * lost) / np.sum((rows @ gain) * rows)),
        float(np.sum((x @ left.T) ** 2) / np.sum((x @ table.T) ** 2)),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), weighed=st.booleans())
def test_damages_are_those_of_both_uses_and_fall_with_the_rank(seed: int, weighed: bool) -> None:
    made, *data = decomposed(seed, weighed)
    assert made.total == pytest.approx(2.0)
    damages = [made.damage(rank) for rank in range(D + 1)]
    assert damages == sorted(damages, reverse=True)
    assert made.damage(D) == made.damage(D + 3) == 0.0
    for rank in range(1, D + 1):
        factors = made.cut(rank)
        assert factors.bias is None
        real = sum(losses(factors.first, factors.second, *data))
        # the damage that is told is the real one, or that of a larger rank that loses more
        assert real <= made.damage(rank) * (1 + 1e-6) + 1e-9
        later = max([sum(losses(c.first, c.second, *data)) for c in map(made.cut, range(rank, D + 1))])
        assert made.damage(rank) == pytest.approx(later, rel=1e-4, abs=1e-8)
        assert made.rank_for(1 - damages[rank] / made.total) <= rank
    np.testing.assert_allclose(factors.first @ factors.second, data[0], atol=1e-8)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_both_uses_together_lose_less_than_by_the_optimum_of_one(seed: int) -> None:
    made, *data = decomposed(seed, weighed=False)
    table, rows, x, _ = data
    for rank in (2, 4, 6):
        ours = sum(losses(made.cut(rank).first, made.cut(rank).second, *data))
        plain = WeightDecomposition(table).cut(rank)
        gathered = OutputDecomposition(table, Moments.of(np.concatenate([rows, -rows])), observed_output=True).cut(rank)
        read = OutputDecomposition(table.T, Moments.of(np.concatenate([x, -x]))).cut(rank)
        for first, second in (
            (plain.first, plain.second), (gathered.first, gathered.second), (read.second.T, read.first.T),
        ):  # fmt: skip
            assert ours <= 1.15 * sum(losses(first, second, *data))


def test_where_both_uses_want_the_same_they_get_it() -> None:
    table = random(1, V, D, dtype=np.float64)
    white = np.eye(D)
    # every row is gathered as often, and what is read goes in all directions alike
    made = TiedDecomposition(table, Moments.of(table), Moments.of(np.concatenate([white, -white])), None)
    squares = np.linalg.svd(table, compute_uv=False) ** 2
    plain = WeightDecomposition(table)
    for rank in range(1, D):
        assert made.damage(rank) == pytest.approx(2 * squares[rank:].sum() / squares.sum(), rel=1e-4)
        found, best = made.cut(rank), plain.cut(rank)
        np.testing.assert_allclose(found.first @ found.second, best.first @ best.second, atol=1e-4)


def test_without_data_and_of_nothing() -> None:
    nothing = Moments.zero(D)
    made = TiedDecomposition(np.zeros((V, D)), nothing, nothing, None)
    assert made.total == 0.0
    assert np.isfinite(made.cut(3).first).all()
    blind = TiedDecomposition(WORDS.astype(np.float64), nothing, nothing, None)
    np.testing.assert_allclose(blind.cut(D).first @ blind.cut(D).second, WORDS, atol=1e-5)


def full_rank(model: Model) -> tuple[Any, dict[str, Stored]]:
    inventory = take_inventory(model)
    mixed = np.linalg.qr(random(9, D, D, dtype=np.float64))[0]
    return inventory, {"table": Stored(WORDS @ mixed, mixed.T, None)}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_one_weight_two_uses_and_each_factor_once(head: str, tmp_path: Path) -> None:
    model = language_model(head)
    if "alpha" in head:  # the head multiplies by twice the table: not the same weight
        assert {w.name for w in take_inventory(model).weights} == {"w", "v"}
        reasons = [refusal.reason for refusal in take_inventory(model).refusals]
        assert all("a copy for each of them pays where both ranks are below half" in reason for reason in reasons)
        assert len(reasons) == 2
        return
    inventory, stored = full_rank(model)
    (weight,) = (weight for weight in inventory.weights if weight.name == "table")
    assert weight.tied
    assert not inventory.refusals
    assert [site.transposed for site in weight.sites] == [False, True]
    assert (weight.d_in, weight.d_out, weight.parameters, weight.groups) == (V, D, V * D, 1)
    assert not weight.block_sides
    result = rewrite(inventory, stored)
    feed = tokens(1)[0]
    assert relative(run(model, **feed)["y"], run(result, **feed)["y"]) < 1e-5
    names = [tensor.name for tensor in result.proto.graph.initializer]
    assert sorted(name for name in names if ".lr_" in name) == ["table.lr_first", "table.lr_second"]
    assert "table" not in names
    onnx.checker.check_model(result.proto, full_check=True)


def test_two_tables_of_one_weight_share_it_with_the_head() -> None:
    model = language_model(gathers="a = Gather(table, i) b = Gather(table, i) e = Add(a, b)")
    inventory, stored = full_rank(model)
    assert [site.transposed for site in inventory.weights[0].sites] == [False, False, True]
    feed = tokens(1)[0]
    assert relative(run(model, **feed)["y"], run(rewrite(inventory, stored), **feed)["y"]) < 1e-5


def test_multiply_accumulates_are_those_of_both_uses() -> None:
    from onnxlr.shapes import measure_shapes

    model = language_model()
    (weight,) = (
        weight
        for weight in take_inventory(model, measure_shapes(model, tokens(1)[0])).weights
        if weight.name == "table"
    )
    assert weight.macs == 12 * V * D
    assert weight.macs_of(((V, 3), (3, D))) == 12 * 3 * D + 12 * (D * 3 + 3 * V)


def test_a_trial_is_what_the_rewritten_model_does() -> None:
    model = language_model()
    inventory = take_inventory(model)
    trial = Trial(inventory, inventory.weights, Session(model).inputs, Config(threads=1), corrected=True)
    feeds = tokens(9)
    observed = trial.observe(feeds)
    assert trial.error({}, observed) == 0.0
    for rank in (2, 5):
        pair = WeightDecomposition(WORDS.astype(np.float64)).cut(rank)
        written = rewrite(inventory, {"table": Stored.pair(pair)})
        outputs = [np.concatenate([run(m, **feed)["y"] for feed in feeds]) for m in (model, written)]
        assert trial.error({"table": pair}, observed) == pytest.approx(relative(*outputs), rel=1e-4)


@pytest.mark.parametrize("objective", ["output", "fisher", "weight"])
def test_a_tied_model_is_compressed(objective: Any, tmp_path: Path) -> None:
    if objective == "fisher":
        pytest.importorskip("torch")
    errors = []
    for share in (0.8, 0.62):
        config = Config(
            objective=objective, target=Target("keep_params", share), rank_multiple=1, threads=1, include=("table",),
        )  # fmt: skip
        report = onnxlr.compress(language_model(), tokens(160), config, output=tmp_path / "small.onnx", force=True)
        (table,) = (weight for weight in report.weights if weight.name == "table")
        assert table.form == "pair"
        assert table.parameters_after == table.rank * (V + D)
        written = onnx.load(tmp_path / "small.onnx")
        sizes = {t.name: numpy_helper.to_array(t).size for t in written.graph.initializer}
        assert sizes["table.lr_first"] + sizes["table.lr_second"] == table.parameters_after
        assert report.after.parameters == sum(sizes[name] for name in sizes if name != "shape")
        errors.append(report.validation.error)
    assert 0 < errors[0] < errors[1] < 1


def test_data_beat_the_plain_decomposition(tmp_path: Path) -> None:
    errors = {}
    for objective in ("weight", "output"):
        config = Config(objective=objective, ranks={"table": 4}, include=("table",), threads=1)  # type: ignore[arg-type]
        errors[objective] = onnxlr.compress(language_model(), tokens(240), config).validation.error
    assert errors["output"] < errors["weight"]


def refused(bodies: Sequence[str], **more: Array) -> set[str]:
    model = parsed(f"(int64[N] i, float[N, {D}] x) => (float[N, {V}] y)", " ".join(bodies), table=WORDS, **more)
    return {weight.name for weight in take_inventory(model).weights}


def test_what_else_reads_the_weight_keeps_it_whole() -> None:
    head = "e = Gather(table, i) t = Transpose(table) u = MatMul(e, t)"
    assert refused([head, "y = Identity(u)"]) == {"table"}
    assert not refused([head, "s = ReduceSum<keepdims = 0>(table) y = Add(u, s)"])
    assert not refused(["t = Transpose(table) a = MatMul(x, t) b = MatMul(a, table) c = MatMul(b, t) y = Identity(c)"])

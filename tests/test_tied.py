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
from onnxlr.gain import SHRINKAGE
from onnxlr.gram import Moments
from onnxlr.probes import read_gradients, weight_gradients
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
def test_damages_are_those_of_the_start_and_a_cut_loses_no_more(seed: int, weighed: bool) -> None:
    made, *data = decomposed(seed, weighed)
    assert made.total == pytest.approx(2.0)
    damages = [made.damage(rank) for rank in range(D + 1)]
    assert damages == sorted(damages, reverse=True)
    assert made.damage(D) == made.damage(D + 3) == 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxlr.tied.SWEEPS", 0)
        start = [0.0, *(sum(losses(c.first, c.second, *data)) for c in map(made.cut, range(1, D + 1)))]
    for rank in range(1, D + 1):
        factors = made.cut(rank)
        assert factors.bias is None
        # what is told is what the start loses, or loses at a larger rank
        assert made.damage(rank) == pytest.approx(max(start[rank:]), rel=1e-4, abs=1e-8)
        assert sum(losses(factors.first, factors.second, *data)) <= start[rank] + 1e-6
        assert made.rank_for(1 - damages[rank] / made.total) <= rank
    np.testing.assert_allclose(factors.first @ factors.second, data[0], atol=1e-8)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_second_factor_is_the_best_beside_the_first(rank: int) -> None:
    """Against the normal equations of both uses as one dense system: a sweep ends with the second factor."""
    made, table, rows, x, gain = decomposed(3, weighed=True)
    cut = made.cut(rank)
    first, reading = np.linalg.lstsq(table, cut.first)[0], cut.first
    lefts = [rows.T @ rows / np.sum((rows @ gain) * rows), table.T @ table / np.sum((x @ table.T) ** 2)]
    rights = [gain, x.T @ x]
    terms = list(zip(lefts, rights, strict=True))
    system = sum(np.kron(first.T @ left @ first, right) for left, right in terms)
    aim = np.asarray(sum(first.T @ left @ right for left, right in terms))
    second = np.linalg.solve(system, aim.ravel()).reshape(rank, D)
    best, ours = (sum(losses(reading, each, table, rows, x, gain)) for each in (second, cut.second))
    assert best <= ours == pytest.approx(best, rel=1e-5)
    np.testing.assert_allclose(cut.second, second, atol=1e-3 * np.abs(second).max())


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
            assert ours < sum(losses(first, second, *data))


def test_neither_use_loses_more_than_by_the_plain_decomposition() -> None:
    """On average: what is best for both can cost one of them a little in a single case."""
    found, plain = np.zeros(2), np.zeros(2)
    for seed in range(10):
        made, *data = decomposed(seed, weighed=False)
        for rank in (2, 4, 6):
            ours, theirs = made.cut(rank), WeightDecomposition(data[0]).cut(rank)
            found += losses(ours.first, ours.second, *data)
            plain += losses(theirs.first, theirs.second, *data)
    assert (found < 0.75 * plain).all()


def test_gradients_put_both_uses_in_one_unit() -> None:
    """The loss that is told is that of a row of either use: `e G e^T` where it was gathered, `e H e^T` where read."""
    _, table, rows, x, gain = decomposed(5, weighed=True)
    gradients = random(6, 200, V, dtype=np.float64) * np.linspace(0.1, 2, V)
    pulled = Moments.of(gradients @ table)
    made = TiedDecomposition(table, Moments.of(rows), Moments.of(x), gain, pulled)
    level = SHRINKAGE * np.trace(pulled.second) / np.sum(table**2)
    metric = gradients.T @ gradients / len(gradients) + level * np.eye(V)

    def lost(left: Array) -> float:
        own = left[[int(np.argmin(np.abs(table - row).sum(1))) for row in rows]]
        errors = x @ left.T
        return float(np.sum((own @ gain) * own) + np.sum((errors @ metric) * errors)) / (len(rows) + len(x))

    assert made.total == pytest.approx(lost(table), rel=1e-6)
    alone = TiedDecomposition(table, Moments.of(rows), Moments.of(x), gain)
    for rank in (2, 4, 6):
        ours, other = (each.cut(rank) for each in (made, alone))
        assert lost(table - ours.first @ ours.second) <= made.damage(rank) * (1 + 1e-6)
        assert lost(table - ours.first @ ours.second) < lost(table - other.first @ other.second)


def test_where_both_uses_want_the_same_they_get_it() -> None:
    table = random(1, V, D, dtype=np.float64)
    white = np.eye(D)
    # every row is gathered as often, and what is read goes in all directions alike
    made = TiedDecomposition(table, Moments.of(table), Moments.of(np.concatenate([white, -white])))
    squares = np.linalg.svd(table, compute_uv=False) ** 2
    plain = WeightDecomposition(table)
    for rank in range(1, D):
        assert made.damage(rank) == pytest.approx(2 * squares[rank:].sum() / squares.sum(), rel=1e-4)
        found, best = made.cut(rank), plain.cut(rank)
        np.testing.assert_allclose(found.first @ found.second, best.first @ best.second, atol=1e-4)


def test_without_data_and_of_nothing() -> None:
    nothing = Moments.zero(D)
    made = TiedDecomposition(np.zeros((V, D)), nothing, nothing)
    assert made.total == 0.0
    assert np.isfinite(made.cut(3).first).all()
    blind = TiedDecomposition(WORDS.astype(np.float64), nothing, nothing)
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


def test_a_head_has_the_gradients_of_what_it_reads() -> None:
    """Where it alone reads what another layer makes, they are the gradients at the output of that layer."""
    pytest.importorskip("torch")
    from onnxlr.fisher import gradient_moments

    body = "e = Gather(table, i) m = MatMul(e, w) r = Relu(m) h = MatMul(r, v) t = Transpose(table) u = MatMul(h, t)"
    model = parsed(
        f"(int64[N, S] i) => (float[N, S, {V}] y, float[N, S, {D}] e)", body + " y = Softmax<axis = -1>(u)",
        table=WORDS, w=random(4, D, 16), v=random(5, 16, D) / 4,
    )  # fmt: skip
    inventory = take_inventory(model)
    config = Config(objective="fisher", threads=1, batch=4)
    stats = gradient_moments(model, inventory, tokens(12), Session(model).inputs, config)
    weights = {weight.name: weight for weight in inventory.weights}
    assert weights["table"].tied
    head, (above,) = read_gradients(stats, weights["table"]), weight_gradients(stats, weights["v"]) or []
    assert head.count == above.count == 12 * 12
    np.testing.assert_allclose(head.gram, above.gram, rtol=1e-4, atol=1e-4 * np.abs(above.gram).max())


def test_torch_runs_a_tied_pair() -> None:
    pytest.importorskip("torch")
    from onnxlr.torch_graph import check_parity, to_torch

    inventory = take_inventory(language_model())
    small = rewrite(inventory, {"table": Stored.pair(WeightDecomposition(WORDS.astype(np.float64)).cut(3))})
    assert check_parity(to_torch(small), small, tokens(3)).worst < 1e-5


def gpt(layers: int = 2, heads: int = 2, words: int = 384, width: int = 16, length: int = 12) -> Model:
    """A language model of the shape of GPT-2, as torch exports it: its table of words is stored once."""
    arrays = {
        "wte": random(1, words, width) * 0.8 ** np.arange(width, dtype=np.float32) @ np.linalg.qr(
            random(2, width, width))[0], "wpe": random(3, length, width) / 9, "flat": np.array([0, -1, width]),
        "parted": np.array([0, 0, heads, width // heads]), "future": np.triu(np.full((length, length), -1e4), 1),
        "zero": np.array(0), "one": np.array(1), "lf": np.ones(width),
    }  # fmt: skip
    body = ["s = Shape(i) n = Gather<axis = 0>(s, one) p = Range(zero, n, one) e = Gather(wte, i) q = Gather(wpe, p)"]
    body.append("h0 = Add(e, q)")
    for k in range(layers):
        arrays |= {f"l{k}": np.ones(width), f"m{k}": np.ones(width)}
        arrays |= {f"{name}{k}": random(10 * k + j, width, width) / 5 for j, name in enumerate("qkvo", 4)}
        arrays |= {f"f{k}": random(10 * k + 8, width, 4 * width) / 4, f"g{k}": random(10 * k + 9, 4 * width, width) / 9}
        body.append(f"x{k} = LayerNormalization<axis = -1>(h{k}, l{k})")
        for name, perm in (("q", "0, 2, 1, 3"), ("k", "0, 2, 3, 1"), ("v", "0, 2, 1, 3")):
            body.append(f"a{name}{k} = MatMul(x{k}, {name}{k}) b{name}{k} = Reshape(a{name}{k}, parted)")
            body.append(f"c{name}{k} = Transpose<perm = [{perm}]>(b{name}{k})")
        body.append(f"d{k} = MatMul(cq{k}, ck{k}) j{k} = Add(d{k}, future) u{k} = Softmax<axis = -1>(j{k})")
        body.append(f"w{k} = MatMul(u{k}, cv{k}) y{k} = Transpose<perm = [0, 2, 1, 3]>(w{k})")
        body.append(f"z{k} = Reshape(y{k}, flat) r{k} = MatMul(z{k}, o{k}) t{k} = Add(h{k}, r{k})")
        body.append(f"n{k} = LayerNormalization<axis = -1>(t{k}, m{k}) aa{k} = MatMul(n{k}, f{k})")
        body.append(f"bb{k} = com.microsoft.Gelu(aa{k}) cc{k} = MatMul(bb{k}, g{k}) h{k + 1} = Add(t{k}, cc{k})")
    body.append(f"hf = LayerNormalization<axis = -1>(h{layers}, lf) turned = Transpose<perm = [1, 0]>(wte)")
    body.append("logits = MatMul(hf, turned)")
    given = {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in arrays.items()}
    return parsed(f"(int64[N, S] i) => (float[N, S, {words}] logits)", " ".join(body), **given)


def test_a_gpt_is_half_as_large_and_the_better_the_more_is_known_of_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    drawn = np.minimum(np.random.default_rng(3).zipf(1.3, (160, 12)) - 1, 383)
    errors = []
    for objective in ("weight", "output", "fisher"):
        config = Config(objective=objective, target=Target("keep_params", 0.5), rank_multiple=1, threads=1)  # type: ignore[arg-type]
        report = onnxlr.compress(gpt(), {"i": drawn}, config, output=tmp_path / "small.onnx", force=True)
        (table,) = (weight for weight in report.weights if weight.name == "wte")
        assert (table.form, len(table.sites)) == ("pair", 2)
        assert report.after.parameters <= 0.5 * report.before.parameters
        written = onnx.load(tmp_path / "small.onnx").graph.initializer
        sizes = {t.name: int(np.prod(t.dims)) for t in written if t.data_type == onnx.TensorProto.FLOAT}
        assert sum(sizes.values()) == report.after.parameters
        assert {name for name in sizes if "wte" in name} == {"wte.lr_first", "wte.lr_second"}
        errors.append(report.validation.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


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

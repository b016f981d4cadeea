"""Linear operators in the bodies of If, Loop and Scan: found, observed, rewritten, and explained in the report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from conftest import decaying, invoke
from models import constant, parsed, random, relative, run
from onnx import AttributeProto, helper

import onnxlr
from onnxlr.calibrate import accumulate
from onnxlr.config import Config, Target, Tuning
from onnxlr.factorize import WeightDecomposition
from onnxlr.forms import Stored, as_block, best_window
from onnxlr.model_io import from_proto
from onnxlr.probes import weight_moments
from onnxlr.protos import graphs
from onnxlr.rewrite import rewrite
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes
from onnxlr.sites import parameter_count, take_inventory
from onnxlr.surgery import close_graph, open_graph
from onnxlr.trial import Trial
from onnxlr.unfold import unfold

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from onnxlr.config import Objective
    from onnxlr.forms import Side
    from onnxlr.gram import Moments, Stats
    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory, Weight

    Array = np.ndarray[Any, Any]
    Feed = Mapping[str, Array]

D = 6
W, V, U, B = random(1, D, D), random(2, D, D), random(3, D, D), random(4, D)
X = random(5, 4, D)
YES, NO = np.array(True), np.array(False)

BRANCHES = """y = If(c) <then_branch = one () => (float[N, 6] t) { [first] p = MatMul(x, w) t = Add(p, b) },
                          else_branch = two () => (float[N, 6] e) { r = Relu(x) [second] e = Gemm(r, v, b) }>"""
STEPS = """y, z = Loop(n, go, x) <
    body = step (int64 i, bool k, float[N, 6] s) => (bool kk, float[N, 6] t, float[N, 6] o) {
        kk = Identity(k) p = MatMul(s, w) t = Tanh(p) o = Identity(p) }>"""
SCANNED = """y, z = Scan<num_scan_inputs = 1, scan_output_axes = [1], body = step (float[6] s, float[6] v) =>
    (float[6] t, float[6] o) { a = Add(s, v) p = MatMul(a, w) t = Tanh(p) o = Identity(p) }>(h, x)"""
GROWING = """y = If(c) <then_branch = run () => (float[K, 6] t) { t = Loop(n, go, x) <
        body = step (int64 i, bool k, float[P, 6] s) => (bool kk, float[Q, 6] r) {
            kk = Identity(k) odd = Mod(i, two) isodd = Cast<to = 9>(odd)
            h = If(isodd) <then_branch = a () => (float[P, 6] m) { m = MatMul(s, w) },
                           else_branch = d () => (float[P, 6] l) { l = Identity(s) }>
            g = MatMul(h, v) f = Tanh(g) r = Concat<axis = 0>(f, x) }> },
    else_branch = stay () => (float[N, 6] e) { e = Gemm(x, u) }>"""


def with_branches(**options: Any) -> Model:
    return parsed("(float[N, 6] x, bool c) => (float[N, 6] y)", BRANCHES, w=W, v=V, b=B, **options)


def with_steps(**options: Any) -> Model:
    signature = "(float[N, 6] x, int64 n, bool go) => (float[N, 6] y, float[T, N, 6] z)"
    return parsed(signature, STEPS, w=W, **options)


def with_scan() -> Model:
    return parsed("(float[T, 6] x, float[6] h) => (float[6] y, float[6, T] z)", SCANNED, w=W)


def growing() -> Model:
    signature = "(float[N, 6] x, bool c, int64 n, bool go) => (float[K, 6] y)"
    return parsed(signature, GROWING, w=W, v=V, u=U, two=np.array(2))


def stored_inside() -> Model:
    """Weights in the bodies: an initializer of one branch, a Constant behind a Transpose in the other."""
    body = BRANCHES.replace("r = Relu(x)", f"r = Relu(x) {constant('vt', V.T)} v = Transpose(vt)")
    model = parsed("(float[N, 6] x, bool c) => (float[N, 6] y)", body, w=W, b=B)
    then = model.proto.graph.node[0].attribute[0].g
    then.initializer.append(model.proto.graph.initializer.pop(0))
    return from_proto(model.proto)


ONE = {"x": X, "go": YES}
MODELS: dict[str, tuple[Model, list[Feed]]] = {
    "if": (with_branches(), [{"x": X, "c": YES}, {"x": X, "c": NO}]),
    "if-opset7": (with_branches(opset=7), [{"x": X, "c": YES}, {"x": X, "c": NO}]),
    "stored-inside": (stored_inside(), [{"x": X, "c": YES}, {"x": X, "c": NO}]),
    "loop": (with_steps(), [{**ONE, "n": np.array(0)}, {**ONE, "n": np.array(3)}]),
    "scan": (with_scan(), [{"x": X, "h": X[0]}]),
    "nested": (growing(), [{**ONE, "n": np.array(4), "c": YES}, {**ONE, "n": np.array(4), "c": NO}]),
}


def pair_of(inventory: Inventory, weight: Weight, rank: int, *, corrected: bool = False) -> Stored:
    factors = WeightDecomposition(inventory.matrix(weight)).cut(rank)
    bias = random(7, weight.d_out, dtype=np.float64) if corrected else None
    return Stored(factors.first, factors.second, bias)


def gather(model: Model, feeds: list[Feed], objective: Objective = "output") -> tuple[Inventory, Stats]:
    inventory, session = take_inventory(model), Session(model, threads=1)
    parts = [accumulate(model, inventory, [feed], session.inputs, Config(objective=objective)) for feed in feeds]
    total = parts[0]
    for part in parts[1:]:
        total += part
    return inventory, total


def moments_of(inventory: Inventory, stats: Stats, name: str, objective: Objective = "output") -> Moments:
    weight = next(weight for weight in inventory.weights if weight.name == name)
    (moments,) = weight_moments(stats, inventory, weight, objective)
    return moments


def assert_same(found: Moments, rows: Array) -> None:
    wide = rows.astype(np.float64)
    assert found.count == len(wide)
    assert np.allclose(found.total, wide.sum(0), rtol=1e-5, atol=1e-5)
    assert np.allclose(found.gram, wide.T @ wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_is_the_dense_model(name: str) -> None:
    model, feeds = MODELS[name]
    inventory = take_inventory(model)
    assert not inventory.refusals
    assert all(site.bodies for weight in inventory.weights for site in weight.sites)
    small = rewrite(inventory, {weight.name: pair_of(inventory, weight, D) for weight in inventory.weights})
    onnx.checker.check_model(small.proto, full_check=True)
    for feed in feeds:
        dense, low_rank = run(model, **feed), run(small, **feed)
        assert all(low_rank[key].shape == dense[key].shape for key in dense)
        assert all(relative(dense[key], low_rank[key]) < 1e-5 for key in dense if dense[key].size)
    names = {tensor.name for scope in graphs(small.proto.graph) for tensor in scope.initializer}
    assert names.isdisjoint(source for weight in inventory.weights for source in weight.sources)


@pytest.mark.parametrize("side", ["input", "output"])
def test_identity_blocks_in_bodies(side: Side) -> None:
    model, feeds = MODELS["nested"]
    inventory = take_inventory(model)
    blocks, pairs = {}, {}
    for weight in inventory.weights:
        pair = pair_of(inventory, weight, 4)
        factor = pair.first if side == "input" else pair.second
        assert factor is not None
        pairs[weight.name], blocks[weight.name] = pair, as_block(pair, best_window(factor, side))
    for feed in feeds:
        expected, found = (run(rewrite(inventory, stored), **feed)["y"] for stored in (pairs, blocks))
        assert relative(expected, found) < 1e-4


def test_a_correction_goes_to_the_bias_in_its_branch() -> None:
    model, feeds = MODELS["if"]
    inventory = take_inventory(model)
    small = rewrite(inventory, {w.name: pair_of(inventory, w, D, corrected=True) for w in inventory.weights})
    for feed in feeds:
        expected = run(model, **feed)["y"] + random(7, D, dtype=np.float64)
        assert relative(expected, run(small, **feed)["y"]) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_an_untouched_model_is_the_same_bytes(name: str) -> None:
    proto = MODELS[name][0].proto
    assert close_graph(open_graph(proto), proto).SerializeToString(True) == proto.SerializeToString(True)
    model, notes = unfold(MODELS[name][0])
    assert (model, notes) == (MODELS[name][0], ())


def test_what_is_beside_a_site_stays_as_it_is() -> None:
    model, _ = MODELS["if"]
    inventory = take_inventory(model)
    (weight,) = (weight for weight in inventory.weights if weight.name == "w")
    small = rewrite(inventory, {"w": pair_of(inventory, weight, 2)}).proto.graph
    (before,), (after,) = model.proto.graph.node, small.node
    assert after.attribute[1] == before.attribute[1]
    then = after.attribute[0].g
    assert [(node.op_type, list(node.output)) for node in then.node] == [
        ("MatMul", ["p.lr_hidden"]), ("MatMul", ["p"]), ("Add", ["t"])
    ]  # fmt: skip
    assert then.node[2] == before.attribute[0].g.node[1]
    assert not then.initializer
    assert [tensor.name for tensor in small.initializer] == ["v", "b", "w.lr_first", "w.lr_second"]
    assert (small.input, small.output) == (model.proto.graph.input, model.proto.graph.output)


def test_a_weight_of_several_graphs_is_one_and_stored_once() -> None:
    body = f"h = MatMul(x, w) {BRANCHES.replace('Relu(x)', 'Relu(h)')}"
    model = parsed("(float[N, 6] x, bool c) => (float[N, 6] y)", body, w=W, v=W.copy(), b=B)
    inventory = take_inventory(model)
    (weight,) = inventory.weights
    assert [len(site.bodies) for site in weight.sites] == [0, 1, 1]
    assert weight.sources == ("v", "w")
    small = rewrite(inventory, {weight.name: pair_of(inventory, weight, 2)})
    assert parameter_count(small) == 2 * 2 * D + D
    assert relative(*(run(m, x=X, c=NO)["y"] for m in (small, rewrite(inventory, {"v": _product(inventory)})))) < 1e-5


def _product(inventory: Inventory) -> Stored:
    (weight,) = inventory.weights
    pair = pair_of(inventory, weight, 2)
    assert pair.first is not None
    return Stored(None, pair.first @ pair.second, None)


def test_a_weight_that_is_used_otherwise_elsewhere_is_refused() -> None:
    body = BRANCHES.replace("r = Relu(x)", "q = Mul(x, w) r = Relu(q)")
    model = parsed("(float[6, 6] x, bool c) => (float[6, 6] y)", body.replace("N", "6"), w=W, v=V, b=B)
    inventory = take_inventory(model)
    assert [(r.name, "also read by Mul 'q'" in r.reason) for r in inventory.refusals] == [("first", True)]


def test_weights_share_a_first_factor_in_one_graph_alone() -> None:
    branches = """y = If(c) <
        then_branch = one () => (float[N, 6] t) { p = MatMul(x, w) q = MatMul(x, v) t = Add(p, q) },
        else_branch = two () => (float[N, 6] e) { e = MatMul(x, u) }>"""
    signature = "(float[N, 6] x, bool c) => (float[N, 6] y)"
    assert take_inventory(parsed(signature, branches, w=W, v=V, u=U)).shared == (("w", "v"),)


def test_hidden_units_are_dropped_within_a_body() -> None:
    generator = np.random.default_rng(0)
    w1, w2 = decaying(generator, 24, 48, 0.9), decaying(generator, 48, 24, 0.9)
    body = """h = If(c) <then_branch = one () => (float[N, 24] t) <float[N, 48] p, float[N, 48] s> {
            p = Gemm(x, w1, b1) s = Relu(p) t = MatMul(s, w2) },
        else_branch = two () => (float[N, 24] e) { e = Identity(x) }> y = Tanh(h)"""
    signature = "(float[N, 24] x, bool c) => (float[N, 24] y)"
    model = parsed(signature, body, w1=w1, w2=w2, b1=random(1, 48))
    (chain,) = take_inventory(model).chains
    assert (chain.producers, chain.consumer) == (("w1",), "w2")
    feeds = [{"x": x[None], "c": YES} for x in random(2, 400, 24)]
    config = Config(forms=frozenset({"width"}), objective="output", target=Target("keep_params", 0.7), threads=1)
    report = onnxlr.compress(model, feeds, replace(config, batch=1))
    assert {weight.form for weight in report.weights} == {"dense of 32 hidden units"}
    assert report.validation.error < 0.5


def test_hidden_units_that_a_body_takes_from_outside_stay() -> None:
    body = """p = MatMul(x, w) y = If(c) <then_branch = one () => (float[N, 6] t) { t = MatMul(p, v) },
        else_branch = two () => (float[N, 6] e) { e = Identity(x) }>"""
    inventory = take_inventory(parsed("(float[N, 6] x, bool c) => (float[N, 6] y)", body, w=W, v=V))
    assert (len(inventory.weights), inventory.chains) == (2, ())


def test_moments_are_those_of_the_branch_that_ran() -> None:
    model = MODELS["if"][0]
    feeds = [{"x": x, "c": np.array(i % 2 == 0)} for i, x in enumerate(random(8, 5, 3, D))]
    inventory, stats = gather(model, feeds)
    assert_same(moments_of(inventory, stats, "w"), np.concatenate([feed["x"] for feed in feeds[::2]]))
    assert_same(moments_of(inventory, stats, "v"), np.maximum(np.concatenate([feed["x"] for feed in feeds[1::2]]), 0))


def test_moments_of_an_output_in_a_branch() -> None:
    body = BRANCHES.replace("6] e", "3] e").replace("6] t", "3] t")
    model = parsed("(float[N, 6] x, bool c) => (float[N, 3] y)", body, w=W[:, :3], v=V[:, :3], b=B[:3])
    inventory, stats = gather(model, [{"x": X, "c": YES}, {"x": X, "c": NO}])
    assert all(weight.observes_output for weight in inventory.weights)
    assert_same(moments_of(inventory, stats, "w"), X @ W[:, :3])
    assert_same(moments_of(inventory, stats, "v"), np.maximum(X, 0) @ V[:, :3])


@pytest.mark.parametrize("opset", [8, 11, 17, 21])
def test_moments_of_a_loop_are_those_of_every_step(opset: int) -> None:
    inventory, stats = gather(with_steps(opset=opset), [{**ONE, "n": np.array(n)} for n in (0, 3, 1)])
    steps = [X, np.tanh(X @ W), np.tanh(np.tanh(X @ W) @ W), X]
    assert_same(moments_of(inventory, stats, "w"), np.concatenate(steps))


def test_moments_of_a_scan_are_those_of_every_step() -> None:
    inventory, stats = gather(*MODELS["scan"])
    state, rows = X[0], []
    for x in X:
        rows.append(state + x)
        state = np.tanh(rows[-1] @ W)
    assert_same(moments_of(inventory, stats, "w"), np.array(rows))


def test_moments_of_bodies_in_bodies_whose_shapes_grow() -> None:
    inventory, stats = gather(*MODELS["nested"])
    state, inner, outer = X, [], []
    for step in range(4):
        if step % 2:
            inner.append(state)
        outer.append(state @ W if step % 2 else state)
        state = np.concatenate([np.tanh(outer[-1] @ V), X])
    assert_same(moments_of(inventory, stats, "w"), np.concatenate(inner))
    assert_same(moments_of(inventory, stats, "v"), np.concatenate(outer))
    assert_same(moments_of(inventory, stats, "u"), X)


def test_a_trial_feeds_factors_to_bodies() -> None:
    model, feeds = MODELS["nested"]
    inventory, inputs = take_inventory(model), Session(model, threads=1).inputs
    trial = Trial(inventory, inventory.weights, inputs, Config(threads=1, batch=1), corrected=False)
    observed = [(feed, run(model, **feed), None) for feed in feeds]
    assert trial.error({}, observed) < 1e-6
    cut = {w.name: WeightDecomposition(inventory.matrix(w)).cut(3) for w in inventory.weights}
    small = rewrite(inventory, {name: Stored(f.first, f.second, None) for name, f in cut.items()})
    outputs = [(run(model, **feed)["y"], run(small, **feed)["y"]) for feed in feeds]
    squares = [sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays) for arrays in
               ([b - a for a, b in outputs], [a for a, _ in outputs])]  # fmt: skip
    assert trial.error(cut, observed) == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)


WIDE = 32


def deciding(generator: np.random.Generator) -> tuple[Model, list[Feed]]:
    """From x through w0, then w1 where the sum of x is positive, else w2; and samples of both kinds in turn."""
    body = """s0 = MatMul(x, w0) s = Tanh(s0) q = ReduceSum<keepdims = 0>(x) c = Greater(q, zero)
        y = If(c) <then_branch = one () => (float[N, 32] t) { t = MatMul(s, w1) },
                   else_branch = two () => (float[N, 32] e) { e = MatMul(s, w2) }>"""
    weights = {name: decaying(generator, WIDE, WIDE, 0.8) for name in ("w0", "w1", "w2")}
    zero = np.float32(0).reshape(())
    model = parsed("(float[N, 32] x) => (float[N, 32] y)", body, **weights, zero=zero)
    rows = generator.standard_normal((480, WIDE)).astype(np.float32)
    rows *= np.sign(rows.sum(1, keepdims=True)) * np.where(np.arange(480) % 2, 1, -1)[:, None]
    return model, [{"x": row[None]} for row in rows]


SETTINGS = Config(batch=1, threads=1, target=Target("keep_params", 0.5), rank_multiple=1, forms=frozenset({"pair"}))


def test_a_branch_that_never_ran_is_cut_by_its_weight_alone_and_said_to_be() -> None:
    model, feeds = deciding(np.random.default_rng(3))
    never = [feed for feed in feeds if feed["x"].sum() > 0]
    report = onnxlr.compress(model, never, replace(SETTINGS, objective="output"))
    by_name = {weight.name: weight for weight in report.weights}
    assert by_name["w1"].rows == 210
    assert "alone" not in by_name["w1"].reason
    cut = by_name["w2"]
    assert cut.rows is None
    assert cut.reason.startswith("calibration never ran else_branch of If 'y', so it is cut by its weight alone; ")
    # its own relative error stands for that of the outputs: or nothing would keep it from the least rank
    assert cut.rank is not None
    values = np.linalg.svd(take_inventory(model).matrix(take_inventory(model).weights[2]), compute_uv=False) ** 2
    assert cut.predicted_error == pytest.approx((values[cut.rank :].sum() / values.sum()) ** 0.5, rel=1e-6)
    assert cut.rank > 3

    analysis = onnxlr.analyze(model, never, replace(SETTINGS, objective="output"))
    assert [weight.name for weight in analysis.weights] == ["w0", "w1"]
    assert analysis.notes == ("w2 is left out: calibration never ran else_branch of If 'y'",)


def test_both_branches_are_cut_by_their_own_data() -> None:
    model, feeds = deciding(np.random.default_rng(3))
    report = onnxlr.compress(model, feeds, replace(SETTINGS, objective="output"))
    kept = [feed["x"].sum() > 0 for i, feed in enumerate(feeds) if i % 8 != 1]
    assert [weight.rows for weight in report.weights] == [420, sum(kept), 420 - sum(kept)]
    assert not any("alone" in weight.reason for weight in report.weights)
    plain = onnxlr.compress(model, feeds, replace(SETTINGS, objective="weight"))
    assert report.validation.error < plain.validation.error
    assert any("unknown" in warning for warning in report.warnings)


def test_factors_in_bodies_are_trained() -> None:
    pytest.importorskip("torch")
    model, feeds = deciding(np.random.default_rng(3))
    inventory = take_inventory(model)
    small = rewrite(inventory, {weight.name: pair_of(inventory, weight, 3) for weight in inventory.weights})
    # the first batch runs one branch alone
    recovery = onnxlr.finetune(model, small, feeds[:64], Tuning(epochs=2, batch=1), Config(batch=1, threads=1))
    assert recovery.trained == 3 * 2 * 3 * WIDE
    assert recovery.error_after < recovery.error_before


def gradient_moments(model: Model, feed: Feed) -> Mapping[str, Moments]:
    fisher = pytest.importorskip("onnxlr.fisher")
    inputs = Session(model, threads=1).inputs
    config = Config(batch=4, threads=1)
    found: Mapping[str, Moments] = fisher.gradient_moments(model, take_inventory(model), [feed], inputs, config).moments
    return found


def test_gradients_in_bodies_are_those_of_the_model_without_them() -> None:
    pytest.importorskip("torch")
    flat = parsed("(float[N, 6] x, bool c) => (float[N, 6] y)", "p = MatMul(x, w) y = Add(p, b)", w=W, b=B)
    found = gradient_moments(MODELS["if"][0], {"x": X, "c": YES})
    assert found.keys() == {"p:gradient"}
    assert_equal(found["p:gradient"], gradient_moments(flat, {"x": X, "c": YES})["p:gradient"])

    body = """p1 = MatMul(x, w) t1 = Tanh(p1) p2 = MatMul(t1, w) y = Tanh(p2)
        u1 = Unsqueeze(p1, first) u2 = Unsqueeze(p2, first) z = Concat<axis = 0>(u1, u2)"""
    unrolled = parsed("(float[N, 6] x) => (float[N, 6] y, float[T, N, 6] z)", body, w=W, first=np.array([0]))
    expected = gradient_moments(unrolled, {"x": X})
    found = gradient_moments(with_steps(), {**ONE, "n": np.array(2)})
    assert_equal(found["p:gradient"], expected["p1:gradient"] + expected["p2:gradient"])


def assert_equal(found: Moments, expected: Moments) -> None:
    assert found.count == expected.count
    assert np.allclose(found.gram, expected.gram, rtol=1e-5, atol=1e-7)


def test_gradients_decide_in_bodies_as_elsewhere() -> None:
    pytest.importorskip("torch")
    model, feeds = deciding(np.random.default_rng(3))
    report = onnxlr.compress(model, feeds[:64], SETTINGS)
    assert report.config["objective"] == "fisher"
    assert not any("no gradient reaches it" in weight.reason for weight in report.weights)


def test_a_body_that_torch_cannot_run_leaves_it_to_the_output_and_that_is_said() -> None:
    pytest.importorskip("torch")
    model = parsed(
        "(float[N, 6] x, bool c) => (float[N, 6] y)",
        BRANCHES.replace("Relu(x)", "com.microsoft.Trilu(x)"),
        w=W,
        v=V,
        b=B,
    )
    feeds = [{"x": x[None], "c": np.array(i % 2 == 0)} for i, x in enumerate(random(9, 64, D))]
    report = onnxlr.compress(model, feeds, replace(SETTINGS, target=Target("keep_params", 0.9)))
    assert report.config["objective"] == "output"
    assert "Trilu" in report.objective_reason


IN_SCAN = """y, z = Scan<num_scan_inputs = 1, body = step (float[6] s, float[6] v) => (float[6] t, float[6] o) {
    p = If(c) <then_branch = one () => (float[6] m) { [deep] m = MatMul(v, w) },
               else_branch = two () => (float[6] l) { l = Identity(v) }> t = Add(s, p) o = Identity(t) }>(h, x)"""


def test_what_a_scan_may_or_may_not_run_is_cut_by_its_weight_alone(tmp_path: Path) -> None:
    signature = "(float[T, 6] x, float[6] h, bool c) => (float[6] y, float[T, 6] z)"
    model = parsed(signature, IN_SCAN, w=W)
    (site,) = take_inventory(model).weights[0].sites
    reason = "no data can be gathered inside then_branch of If 'p', which a Scan runs, so it is cut by its weight alone"
    assert f"{site.unseen}, so it is cut by its weight alone" == reason
    assert onnxlr.inspect(model).notes == (f"deep: {reason}",)
    onnx.save(model.proto, tmp_path / "model.onnx")
    assert reason in " ".join(invoke("inspect", tmp_path / "model.onnx").out.split())
    feeds = [{"x": random(i, 3, D), "h": B, "c": YES} for i in range(16)]
    report = onnxlr.compress(
        model, feeds, replace(SETTINGS, ranks={"w": 2}, target=Target("keep_params", 1), objective="output")
    )
    assert report.weights[0].reason == f"{reason}; its rank was given"
    assert report.validation.error > 0.01


def test_branches_of_an_older_if_give_out_nothing() -> None:
    inventory = take_inventory(MODELS["if-opset7"][0])
    assert {site.unseen for weight in inventory.weights for site in weight.sites} == {
        "no data can be gathered inside an If at opset 7: convert the model to opset 11 or newer"
    }


def test_bodies_of_other_operators_are_refused() -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(MODELS["if"][0].proto)
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "Choose", "local"
    inventory = take_inventory(from_proto(proto))
    assert not inventory.weights
    reason = "it is inside then_branch of Choose 'y': only bodies of If, Loop and Scan can be compressed"
    assert [(r.name, r.parameters) for r in inventory.refusals] == [("first", 36), ("second", 36)]
    assert inventory.refusals[0].reason == reason


def test_names_that_several_bodies_have_are_made_unique() -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(stored_inside().proto)
    branches = [attribute.g for attribute in proto.graph.node[0].attribute]
    for branch, old, new in ((branches[1], "r", "p"), (branches[1], "v", "w")):
        for node in branch.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]
    branches[1].value_info.append(helper.make_tensor_value_info("p", onnx.TensorProto.FLOAT, ["N", D]))
    model, notes = unfold(from_proto(proto))
    assert notes == ("2 tensors of bodies were renamed, for others have their names ('p', 'w')",)
    assert model.proto.graph.node[0].attribute[0] == proto.graph.node[0].attribute[0]
    onnx.checker.check_model(model.proto, full_check=True)
    inventory = take_inventory(model)
    assert sorted(weight.name for weight in inventory.weights) == ["vt", "w"]
    small = rewrite(inventory, {weight.name: pair_of(inventory, weight, D) for weight in inventory.weights})
    for condition in (YES, NO):
        dense = run(stored_inside(), x=X, c=condition)["y"]
        assert np.array_equal(dense, run(model, x=X, c=condition)["y"])
        assert relative(dense, run(small, x=X, c=condition)["y"]) < 1e-5


def test_a_name_of_the_outer_graph_is_left_to_it() -> None:
    body = "y = If(c) <then_branch = one () => (float[N, 6] t) { [in] q = MatMul(x, w) t = Relu(q) }, \
        else_branch = two () => (float[N, 6] e) { e = Identity(x) }> p = MatMul(y, v) z = Tanh(p)"
    proto = parsed("(float[N, 6] x, bool c) => (float[N, 6] z)", body, w=W, v=V).proto
    inner = next(a for a in proto.graph.node[0].attribute if a.type == AttributeProto.GRAPH and a.name == "then_branch")
    inner.g.node[0].output[0] = inner.g.node[1].input[0] = "p"
    model, _ = unfold(from_proto(proto))
    assert [weight.sites[0].output for weight in take_inventory(model).weights] == ["p", "p_1"]


def test_weights_that_a_body_computes_are_listed() -> None:
    body = """y = If(c) <then_branch = one () => (float[N, 6] t) { k = Mul(w, v) t = MatMul(x, k) },
        else_branch = two () => (float[N, 6] e) { k2 = Neg(w) e = FusedMatMul(x, k2) }>"""
    body = body.replace("FusedMatMul", "com.microsoft.FusedMatMul")
    inventory = take_inventory(parsed("(float[N, 6] x, bool c) => (float[N, 6] y)", body, w=W, v=V))
    assert {r.name: (r.sources, r.parameters) for r in inventory.refusals} == {"t": (("v", "w"), 72), "e": (("w",), 36)}


def test_a_weight_of_a_body_too_costs_what_is_known_of_it() -> None:
    body = """p = MatMul(x, w) y = If(c) <then_branch = one () => (float[M, 6] t) { s = Relu(p) t = MatMul(s, w) },
                                       else_branch = two () => (float[M, 6] e) { e = Identity(p) }>"""
    model = parsed("(float[N, 6] x, bool c) => (float[N, 6] y)", body, w=W)
    inventory = take_inventory(model, measure_shapes(model, {"x": X[:1], "c": YES}))
    (weight,) = inventory.weights
    assert len(weight.sites) == 2
    assert weight.macs == weight.macs_of(((D, D),)) == D * D
    assert weight.macs_of(((D, 2), (2, D))) == 4 * D

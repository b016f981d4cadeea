"""Kernels split between their rows and columns: parity, the least-squares optimum, costs, and what is offered."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import parsed, random, relative, run

import onnxlr
from onnxlr import pipeline
from onnxlr.calibrate import accumulate
from onnxlr.case import prepare
from onnxlr.choice import Cut, separable_ranks
from onnxlr.config import FORMS, Config, Target
from onnxlr.errors import ModelError, StatsError
from onnxlr.factorize import WeightDecomposition
from onnxlr.forms import Stored, separable_products
from onnxlr.gain import Gain
from onnxlr.gram import Moments
from onnxlr.parts import parts_of
from onnxlr.plan_file import load_plan, save_plan
from onnxlr.probes import weight_moments
from onnxlr.rewrite import rewrite
from onnxlr.separable import SeparableDecomposition, as_columns, shrunk, strip_moments
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes
from onnxlr.sites import take_inventory
from onnxlr.targets import Plan
from onnxlr.trial import Trial

if TYPE_CHECKING:
    from pathlib import Path

    from onnxlr.config import Objective
    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory, Weight

    Array = np.ndarray[Any, Any]

TOLERANCE = {"float16": 2e-2, "float32": 2e-5}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Model, Array]:
    """A model `y = Conv(x, w)`, and data for it."""
    pair = {"min_size": 2, "max_size": 2}
    groups, c_in, c_out = draw(st.sampled_from([1, 1, 2])), draw(st.integers(2, 4)), draw(st.integers(1, 9))
    kernel, strides = draw(st.lists(st.integers(2, 3), **pair)), draw(st.lists(st.integers(1, 3), **pair))
    dilations, pads = (
        draw(st.lists(st.integers(1, 2), **pair)),
        draw(st.lists(st.integers(0, 2), min_size=4, max_size=4)),
    )
    automatic = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    attributes = [f"strides = {strides}"]
    attributes += [f"pads = {pads}"] if automatic == "NOTSET" else [f'auto_pad = "{automatic}"']
    attributes += [] if automatic.startswith("SAME") else [f"dilations = {dilations}"]  # onnxruntime refuses both
    attributes += [f"group = {groups}"] if groups > 1 else []
    attributes += [f"kernel_shape = {kernel}"] if draw(st.booleans()) else []
    dtype = draw(st.sampled_from([np.float32, np.float32, np.float16]))
    text = {np.float32: "float", np.float16: "float16"}[dtype]
    seed = draw(st.integers(0, 2**31))
    arrays = {"w": random(seed + 1, groups * c_out, c_in, *kernel, dtype=dtype)}
    if draw(st.booleans()):
        arrays["b"] = random(seed + 2, groups * c_out, dtype=dtype)
    model = parsed(
        f"({text}[N, {groups * c_in}, H, W] x) => ({text}[M, C, P, Q] y)",
        f"y = Conv<{', '.join(attributes)}>(x, {', '.join(arrays)})",
        **arrays,
    )
    lengths = draw(st.lists(st.integers(5, 9), **pair))
    return model, random(seed, 3, groups * c_in, *lengths, dtype=dtype) + dtype(0.5)


def inventory_of(model: Model, x: Array) -> Inventory:
    return take_inventory(model, measure_shapes(model, {"x": x}))


def split(inventory: Inventory, weight: Weight, rank: int, correction: Array | None = None) -> Stored:
    """`W` between the rows and the columns of its kernel, by the singular value decomposition."""
    columns = as_columns(inventory.matrix(weight).reshape(-1, weight.d_in, weight.d_out), weight.taps)
    members = [WeightDecomposition(each).cut(rank) for each in columns]
    first, second = np.stack([f.first for f in members]), np.stack([f.second for f in members])
    if weight.groups == 1:
        first, second = first[0], second[0]
    return replace(Stored.separable(replace(members[0], first=first, second=second), weight.taps), bias=correction)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(convolutions(), st.booleans())
def test_full_rank_is_the_convolution_and_a_correction_is_added_to_it(
    given: tuple[Model, Array], corrected: bool
) -> None:
    model, x = given
    try:
        y = run(model, x=x)["y"].astype(np.float64)
    except ModelError:
        assume(False)
    assume(y.size > 0)
    inventory = inventory_of(model, x)
    (weight,) = inventory.weights
    full = min(as_columns(inventory.matrix(weight), weight.taps).shape[-2:])
    correction = random(9, weight.groups * weight.d_out, dtype=np.float64) if corrected else None
    small = rewrite(inventory, {"w": split(inventory, weight, full, correction)})
    onnx.checker.check_model(small.proto, full_check=True)
    expected = y if correction is None else y + correction[:, None, None]
    assert relative(expected, run(small, x=x)["y"]) < TOLERANCE[weight.dtype]
    first, second = small.proto.graph.node
    assert (first.op_type, second.op_type, second.output[0]) == ("Conv", "Conv", "y")
    shapes = {tensor.name: tuple(tensor.dims) for tensor in small.proto.graph.initializer}
    kernel = weight.sites[0].kernel
    assert (shapes[first.input[1]][2:], shapes[second.input[1]][2:]) == ((kernel[0], 1), (1, kernel[1]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions(), st.integers(1, 4))
def test_a_cut_costs_what_the_written_model_takes(given: tuple[Model, Array], rank: int) -> None:
    model, x = given
    try:
        assume(run(model, x=x)["y"].size > 0)
    except ModelError:
        assume(False)
    inventory = inventory_of(model, x)
    (weight,) = inventory.weights
    stored = split(inventory, weight, rank)
    assert stored.rank is not None
    products = separable_products(weight.d_in, weight.d_out, stored.rank, weight.taps)
    assert stored.products == products
    small = rewrite(inventory, {"w": stored})
    assert weight.in_strips.macs_of(products) == inventory_of(small, x).macs
    written = inventory_of(small, x).weights
    if len(written) == 2:  # a rank of 1 leaves groups of a single channel, which are no sites
        halves = (written[0].convolutions[0][0], written[1].convolutions[0][0])
        assert weight.in_strips.convolutions == (halves,)
    kernels = [tensor for tensor in small.proto.graph.initializer if len(tensor.dims) == 4]
    assert weight.groups * sum(d * e for d, e in products) == sum(prod(tensor.dims) for tensor in kernels)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolutions(), st.integers(1, 4), st.booleans())
def test_a_trial_sees_the_kernel_that_is_written(given: tuple[Model, Array], rank: int, corrected: bool) -> None:
    model, x = given
    try:
        y = run(model, x=x)["y"]
    except ModelError:
        assume(False)
    assume(y.size > 0)
    inventory = inventory_of(model, x)
    (weight,) = inventory.weights
    correction = random(9, weight.groups * weight.d_out, dtype=np.float64) if corrected else None
    stored = split(inventory, weight, rank, correction)
    cut = stored.factors(weight.d_in, weight.d_out)
    assert cut.rank == min(weight.d_in, weight.d_out)
    trial = Trial(inventory, [weight], Session(model).inputs, Config(threads=1), corrected=corrected)
    tried = trial.error({"w": cut}, trial.observe([{"x": x}]))
    real = relative(y, run(rewrite(inventory, {"w": stored}), x=x)["y"])
    assert abs(tried - real) < TOLERANCE[weight.dtype] * max(1.0, real)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Array, int, Moments, Gain | None]:
    """A weight, its taps, moments of its patches, and what errors weigh."""
    height, taps, d_out = draw(st.integers(1, 9)), draw(st.integers(2, 4)), draw(st.integers(1, 9))
    d_in, seed = height * taps, draw(st.integers(0, 10_000))
    mixing = random(seed, d_in, d_in, dtype=np.float64) * np.logspace(0, -draw(st.integers(0, 3)), d_in)
    rows = random(seed + 1, draw(st.sampled_from([5, 50, 500])), d_in, dtype=np.float64) @ mixing + 0.7
    weight = random(seed + 2, d_in, d_out, dtype=np.float64)
    gradients = random(seed + 3, 40, d_out, dtype=np.float64) * np.logspace(0, -1, d_out)
    return weight, taps, Moments.of(rows), Gain.of(Moments.of(gradients)) if draw(st.booleans()) else None


def full_rank(weight: Array, taps: int) -> int:
    return min(as_columns(weight, taps).shape)


def lost(weight: Array, taps: int, moments: Moments, gain: Gain | None, cut: Any) -> float:
    """`tr(L^T E^T C E L)`, term by term."""
    error = weight - np.einsum("ar,rjo->ajo", cut.first, cut.second.reshape(cut.rank, taps, -1)).reshape(weight.shape)
    root = np.eye(weight.shape[1]) if gain is None else gain.root
    return float(np.trace(root.T @ error.T @ shrunk(moments) @ error @ root))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layers())
def test_the_damage_is_what_the_patches_show_and_falls_with_the_rank(
    given: tuple[Array, int, Moments, Gain | None],
) -> None:
    weight, taps, moments, gain = given
    full = full_rank(weight, taps)
    decomposition = SeparableDecomposition(weight, taps, full, moments, gain)
    least = decomposition.cut(1)
    whole = lost(weight, taps, moments, gain, replace(least, second=0 * least.second))
    assert decomposition.total == pytest.approx(whole, rel=1e-9)
    damages = [decomposition.damage(rank) for rank in range(1, full + 1)]
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] == 0
    for rank, damage in enumerate(damages, 1):
        for cut in (decomposition.cut(rank), decomposition.unbalanced(rank)):
            assert abs(lost(weight, taps, moments, gain, cut) - damage) < 1e-9 * whole
            error = weight - (cut.first @ cut.second).reshape(weight.shape)
            np.testing.assert_allclose(cut.bias, moments.mean @ error, atol=1e-9 * np.linalg.norm(weight))
    cut = decomposition.cut(full)
    np.testing.assert_allclose((cut.first @ cut.second).reshape(weight.shape), weight, atol=1e-6)
    # with fewer ranks on offer the cuts are the same
    if full > 1:
        fewer = SeparableDecomposition(weight, taps, full - 1, moments, gain)
        np.testing.assert_allclose([fewer.damage(r) for r in range(full)], [whole, *damages[:-1]], rtol=1e-6)
        assert abs(lost(weight, taps, moments, gain, fewer.cut(full - 1)) - damages[-2]) < 1e-9 * whole


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers(), st.integers(1, 4))
def test_the_second_factor_is_the_dense_least_squares_solution(
    given: tuple[Array, int, Moments, Gain | None], rank: int
) -> None:
    weight, taps, moments, gain = given
    cut = SeparableDecomposition(weight, taps, full_rank(weight, taps), moments, gain).unbalanced(
        min(rank, full_rank(weight, taps))
    )
    # rows with the covariance C, and what the first convolution makes of them at every tap
    rows = np.linalg.cholesky(shrunk(moments)).T
    hidden = np.einsum("naj,ar->nrj", rows.reshape(len(rows), -1, taps), cut.first).reshape(len(rows), -1)
    solved, *_ = np.linalg.lstsq(hidden, rows @ weight, rcond=None)
    found = hidden @ Stored.separable(cut, taps).second
    assert np.linalg.norm(found - hidden @ solved) < 1e-7 * np.linalg.norm(rows @ weight)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=st.integers(2, 8), taps=st.integers(2, 4), d_out=st.integers(1, 8), seed=st.integers(0, 1000))
def test_where_strips_do_not_move_together_no_split_is_better(height: int, taps: int, d_out: int, seed: int) -> None:
    """Then the problem is a pair's, and its optimum is known: Eckart and Young."""
    weight = random(seed, height * taps, d_out, dtype=np.float64)
    strip = random(seed + 1, height, height, dtype=np.float64)
    gram = np.einsum("ab,jk->ajbk", strip @ strip.T + np.eye(height), np.eye(taps)).reshape(len(weight), -1)
    # so many rows that next to nothing is shrunk
    moments = Moments(10**12, np.zeros(len(weight)), 10**12 * gram)
    decomposition = SeparableDecomposition(weight, taps, full_rank(weight, taps), moments)
    root = np.linalg.cholesky(strip @ strip.T + np.eye(height)).T
    squares = np.linalg.svd(root @ as_columns(weight, taps), compute_uv=False) ** 2
    for rank in range(full_rank(weight, taps)):
        assert abs(decomposition.damage(rank) - squares[rank:].sum()) < 1e-3 * squares.sum()


def test_moments_of_strips_are_those_of_all_strips() -> None:
    rows = random(1, 40, 5, 3, dtype=np.float64) + 1.0
    found = strip_moments(Moments.of(rows.reshape(40, 15)), 3)
    expected = Moments.of(np.concatenate([rows[:, :, tap] for tap in range(3)]))
    assert found.count == expected.count
    np.testing.assert_allclose(found.total, expected.total)
    np.testing.assert_allclose(found.gram, expected.gram)


def test_few_rows_are_trusted_less() -> None:
    """A shrunk covariance is nearer to the true one, and with many rows the same as the one that they show."""
    scale = np.logspace(0, -2, 30)
    draws = [random(seed, 20, 30, dtype=np.float64) * scale for seed in range(40)]
    errors = [
        [np.linalg.norm(found - np.diag(scale**2)) for found in (shrunk(moments), moments.covariance)]
        for moments in map(Moments.of, draws)
    ]
    nearer, shown = np.mean(errors, axis=0)
    assert nearer < 0.9 * shown
    assert all(np.linalg.eigvalsh(shrunk(Moments.of(rows)))[0] > 0 for rows in draws)
    many = Moments.of(random(1, 100_000, 30, dtype=np.float64) * scale)
    assert np.linalg.norm(shrunk(many) - many.covariance) < 1e-3 * np.linalg.norm(many.covariance)


def test_data_that_never_move_are_cut_by_the_weight_and_damage_nothing() -> None:
    weight = random(1, 12, 4, dtype=np.float64)
    decomposition = SeparableDecomposition(weight, 3, 4, Moments.of(np.full((50, 12), 0.7)))
    assert decomposition.damage(1) < 1e-12
    cut = decomposition.cut(4)
    np.testing.assert_allclose(cut.first @ cut.second, as_columns(weight, 3), atol=1e-9)


@pytest.mark.parametrize("objective", ["output", "fisher"])
def test_what_a_split_loses_in_the_model_is_what_its_patches_predicted(objective: Objective) -> None:
    """The error of a real run, its mean taken off by the bias, is `tr(E^T C E)` of the patches."""
    if objective == "fisher":
        pytest.importorskip("torch")
    arrays = {"w": random(1, 7, 5, 3, 3), "b": random(2, 7)}
    model = parsed(
        "(float[N, 5, H, W] x) => (float[N, 7, P, Q] y)", "y = Conv<pads = [1, 1, 1, 1], strides = [2, 1]>(x, w, b)",
        **arrays,
    )  # fmt: skip
    x = random(3, 8, 5, 20, 20).cumsum(-1) / 5 + 1
    config = Config(objective=objective, rank_multiple=1, threads=1, holdout_every=1000)
    case = prepare(model, [{"x": x}], config)
    stats = pipeline.gather(case, config, lambda *_: None)
    (part,) = parts_of(case, stats, config)
    x = np.concatenate([sample["x"] for sample in case.calibration])
    y = run(model, x=x)["y"].astype(np.float64)
    for rank in (2, 5):
        stored = part.separable(rank)
        error = run(rewrite(case.inventory, {"w": stored}), x=x)["y"] - y
        rows = np.moveaxis(error, 1, -1).reshape(-1, 7)
        assert np.abs(rows.mean(0)).max() < 1e-4 * y.std()
        moments = weight_moments(stats, case.inventory, part.weight.in_strips, objective)[0]
        kernel = stored.factors(45, 7)
        lost_here = case.inventory.matrix(part.weight) - kernel.first @ kernel.second
        predicted = np.trace(lost_here.T @ moments.covariance @ lost_here)
        assert np.mean(np.sum(rows**2, axis=1)) == pytest.approx(predicted, rel=1e-3)
        # what is shrunk adds little to it with so many rows
        if objective == "output":
            assert part.separation.damage(rank) == pytest.approx(predicted, rel=0.02)


def cnn(channels: int = 16) -> Model:
    arrays = {
        "w1": random(1, channels, 3, 3, 3) / 5, "b1": random(2, channels), "b2": random(4, 24), "b3": random(6, 32),
        "w2": random(3, 24, channels, 3, 3) / 12, "w3": random(5, 32, 12, 3, 3) / 10, "w4": random(7, 32, 10) / 6,
    }  # fmt: skip
    body = """a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) b = Relu(a) c = Conv<strides = [2, 2]>(b, w2, b2) d = Relu(c)
              e = Conv<group = 2>(d, w3, b3) f = Relu(e) g = GlobalAveragePool(f) h = Flatten(g) y = MatMul(h, w4)"""
    return parsed("(float[N, 3, 12, 12] x) => (float[N, 10] y)", body, **arrays)


DATA = [{"x": x[None]} for x in random(8, 64, 3, 12, 12).cumsum(-1) / 3]
SETTINGS: dict[str, Any] = {"rank_multiple": 1, "threads": 1, "rounds": 0}


@pytest.mark.parametrize("kind", ["keep_macs", "keep_params"])
@pytest.mark.parametrize("objective", ["output", "fisher", "weight"])
def test_a_budget_is_spent_on_splits_and_the_report_tells_what_is_written(
    tmp_path: Path, objective: Objective, kind: Any
) -> None:
    if objective == "fisher":
        pytest.importorskip("torch")
    target = Target(kind, 0.5)
    config = Config(objective=objective, target=target, forms=frozenset({"separable"}), **SETTINGS)
    report = onnxlr.compress(cnn(), DATA, config, output=tmp_path / "small.onnx")
    written = onnxlr.load(tmp_path / "small.onnx")
    onnx.checker.check_model(written.proto, full_check=True)
    again = inventory_of(written, DATA[0]["x"])
    assert (report.after.macs, report.after.parameters) == (again.macs, again.parameters)
    assert 2 * again.macs <= report.before.macs if kind == "keep_macs" else True
    forms = {weight.name: weight.form for weight in report.weights}
    assert set(forms.values()) == {"dense", "separable"}
    assert forms["w2"] == "separable"
    assert objective == "weight" or forms["w3"] == "separable"
    assert all(0 < weight.energy <= 1 for weight in report.weights)
    assert report.predicted_error is not None
    assert report.predicted_error / 3 < report.validation.error < 3 * report.predicted_error


@pytest.mark.parametrize("objective", ["output", "weight"])
def test_splits_pay_beside_pairs(objective: Objective) -> None:
    errors = {}
    for forms in (frozenset({"pair"}), frozenset(FORMS)):
        config = Config(objective=objective, target=Target("keep_macs", 0.6), forms=forms, **SETTINGS)
        report = onnxlr.compress(cnn(), DATA, config)
        errors[len(forms)] = report.validation.error
    assert errors[len(FORMS)] < errors[1]


def test_only_what_is_asked_for_is_gathered_and_offered() -> None:
    model, x = cnn(), DATA[0]["x"]
    inventory = inventory_of(model, x)
    inputs = Session(model).inputs

    def gathered(**settings: Any) -> set[str]:
        config = Config(objective="output", **SETTINGS | settings)
        return {key for key in accumulate(model, inventory, DATA[:8], inputs, config).moments if ":patches" in key}

    assert {key.partition(":")[0] for key in gathered()} == {"x", "b", "d"}
    assert gathered(forms=frozenset({"pair"})) == set()
    for weight in (weight for weight in inventory.weights if weight.name != "w4"):
        offered = separable_ranks(weight, Config(**SETTINGS))
        column, row = weight.d_in // 3, 3 * weight.d_out
        assert offered == [r for r in range(1, min(column, row)) if r * (column + row) <= 0.85 * column * row]
        assert offered
        assert separable_ranks(weight, Config(forms=frozenset({"pair"}), **SETTINGS)) == []


def test_moments_without_patches_are_refused() -> None:
    config = Config(objective="output", **SETTINGS)
    pairs = replace(config, forms=frozenset({"pair"}))
    stats = onnxlr.calibrate(cnn(), DATA, pairs)
    onnxlr.compress(cnn(), DATA, pairs, stats=stats)
    with pytest.raises(StatsError, match=r"the moments lack tensor '.*:patches:3x3.*', which objective 'output' needs"):
        onnxlr.compress(cnn(), DATA, config, stats=stats)


def test_patches_that_are_too_wide_are_not_gathered_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("probes", "parts"):
        monkeypatch.setattr(f"onnxlr.{module}.WIDEST", 110)
    report = onnxlr.compress(cnn(), DATA, Config(objective="output", target=Target("keep_macs", 0.5), **SETTINGS))
    by_name = {weight.name: weight for weight in report.weights}
    assert by_name["w2"].form != "separable"
    assert by_name["w2"].reason.startswith("its patches of 144 are too wide to split its kernel by; ")
    assert "too wide" not in by_name["w3"].reason


@pytest.mark.parametrize(
    ("signature", "body", "weight"),
    [
        ("(float[N, 4, 9] x) => (float[N, 6, 7] y)", "y = Conv(x, w)", (6, 4, 3)),
        ("(float[N, 4, 9, 9] x) => (float[N, 6, 9, 9] y)", "y = Conv(x, w)", (6, 4, 1, 1)),
        ("(float[N, 4, 9, 9] x) => (float[N, 6, 9, 7] y)", "y = Conv(x, w)", (6, 4, 1, 3)),
        ("(float[N, 4, 9, 9] x) => (float[N, 6, 7, 9] y)", "y = Conv(x, w)", (6, 4, 3, 1)),
        ("(float[N, 4, 5, 5, 5] x) => (float[N, 6, 3, 3, 3] y)", "y = Conv(x, w)", (6, 4, 3, 3, 3)),
        ("(float[N, 4, 9, 9] x) => (float[N, 6, 11, 11] y)", "y = ConvTranspose(x, w)", (4, 6, 3, 3)),
    ],
)
def test_other_kernels_are_not_split(signature: str, body: str, weight: tuple[int, ...]) -> None:
    (found,) = take_inventory(parsed(signature, body, w=random(1, *weight))).weights
    assert found.taps == 1


def test_one_matrix_under_two_kernels_is_not_split() -> None:
    array = random(1, 6, 4, 2, 3)
    model = parsed(
        "(float[N, 4, 9, 9] x) => (float[N, 6, 8, 7] y, float[N, 6, 7, 8] z)", "y = Conv(x, w) z = Conv(x, v)",
        w=array, v=array.reshape(6, 4, 3, 2),
    )  # fmt: skip
    (weight,) = take_inventory(model).weights
    assert len(weight.sites) == 2
    assert weight.taps == 1


def test_one_kernel_of_two_convolutions_is_split_once() -> None:
    body = "a = Conv<pads = [1, 1, 1, 1]>(x, w) t = Tanh(a) y = Conv<strides = [2, 1]>(t, w)"
    model = parsed("(float[N, 5, 9, 9] x) => (float[N, 5, 4, 7] y)", body, w=random(1, 5, 5, 3, 3) / 5)
    x = random(2, 3, 5, 9, 9)
    inventory = inventory_of(model, x)
    (weight,) = inventory.weights
    stored = split(inventory, weight, 15)
    small = rewrite(inventory, {"w": stored})
    assert relative(run(model, x=x)["y"], run(small, x=x)["y"]) < 1e-5
    assert len(small.proto.graph.initializer) == 2
    assert weight.in_strips.macs_of(stored.products) == inventory_of(small, x).macs


@pytest.mark.parametrize("addend", [False, True])
def test_an_activation_that_is_fused_stays_behind_the_second(addend: bool) -> None:
    own = 'com.microsoft.FusedConv<activation = "Relu", strides = [2, 1], pads = [1, 0, 1, 2]>'
    body = f"z = Conv<strides = [2, 1]>(x, v) y = {own}(x, w, b{', z' if addend else ''})"
    arrays = {"w": random(1, 6, 4, 3, 3), "b": random(2, 6), "v": random(3, 6, 4, 1, 1)}
    model = parsed("(float[N, 4, 9, 9] x) => (float[N, 6, 5, 9] y)", body, **arrays)
    x = random(4, 2, 4, 9, 9)
    inventory = inventory_of(model, x)
    weight = next(weight for weight in inventory.weights if weight.name == "w")
    correction = random(5, 6, dtype=np.float64)
    small = rewrite(inventory, {"w": split(inventory, weight, 12, correction)})
    own_bias = {**arrays, "b": (arrays["b"] + correction).astype(np.float32)}
    expected = run(parsed("(float[N, 4, 9, 9] x) => (float[N, 6, 5, 9] y)", body, **own_bias), x=x)["y"]
    assert relative(expected, run(small, x=x)["y"]) < 1e-5


def test_a_plan_comes_back_from_its_files(tmp_path: Path) -> None:
    inventory = inventory_of(cnn(), DATA[0]["x"])
    weight = next(weight for weight in inventory.weights if weight.name == "w2")
    stored = split(inventory, weight, 3)
    save_plan(Plan({"w2": Cut("separable", 3)}, {"w2": stored}, {"w2": 0.9}, None), tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded.cuts["w2"] == Cut("separable", 3)
    assert loaded.stored["w2"].taps == 3
    for read in ("first", "second"):
        assert np.array_equal(getattr(loaded.stored["w2"], read), getattr(stored, read))


def test_a_split_model_is_differentiated_and_both_kernels_are_trained() -> None:
    pytest.importorskip("torch")
    from onnxlr.torch_graph import check_parity, to_torch
    from onnxlr.tuning.trained import trained_weights

    model = cnn()
    inventory = inventory_of(model, DATA[0]["x"])
    cut = {w.name: split(inventory, w, 4) for w in inventory.weights if w.taps > 1}
    small = rewrite(inventory, cut)
    check_parity(to_torch(small), small, DATA[:2])
    kernels = {f"{name}.lr_{which}" for name in cut for which in ("first", "second")}
    assert set(trained_weights(small, model, "factors")) == kernels

"""A trial's figures against those of the model that is really rewritten."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FORMS, Form, parsed, random, relative, run

from onnxlr.config import Config
from onnxlr.factorize import WeightDecomposition
from onnxlr.factors import Factors
from onnxlr.forms import Stored
from onnxlr.rewrite import rewrite as rewritten
from onnxlr.session import Session
from onnxlr.sites import take_inventory
from onnxlr.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory

    Array = np.ndarray[Any, Any]

X, Z = random(10, 21, 6), random(11, 21, 4)
LABELS = np.random.default_rng(12).integers(0, 4, 21)
CONFIG = Config(threads=1, batch=4, metric="top1:y")

MODEL = parsed(
    "(float[N, 6] x, float[N, 4] z) => (float[N, 4] y, float[N, 5] u)",
    """a = MatMul(x, w) b = Add(a, c) d = Relu(b) e = Gemm<transB = 1, alpha = 0.5>(d, v, k) f = MatMul(z, q)
    g = Add(e, f) h = MatMul(g, t) i = Tanh(h) j = Gemm<transB = 1>(i, s) y = Add(j, z) u = Gemm(e, o, c5)""",
    w=random(1, 6, 5), c=random(2, 5), v=random(3, 4, 5), k=random(4, 4), q=random(5, 4, 4), t=random(6, 4, 4),
    s=random(6, 4, 4).T.copy(), o=random(8, 4, 5), c5=random(9, 1, 5),
)  # fmt: skip
INVENTORY = take_inventory(MODEL)
RANKS = {weight.name: min(weight.d_in, weight.d_out) for weight in INVENTORY.weights}


def samples() -> list[dict[str, Array]]:
    return [{"x": X[i : i + 1], "z": Z[i : i + 1]} for i in range(len(X))]


INPUTS = Session(MODEL, threads=1).inputs
TRIALS = {
    corrected: Trial(INVENTORY, INVENTORY.weights, INPUTS, CONFIG, corrected=corrected) for corrected in (False, True)
}
OBSERVED = TRIALS[True].observe(samples(), LABELS)


def factors_of(ranks: Mapping[str, int], corrected: bool, seed: int = 0) -> dict[str, Factors]:
    by_name = {weight.name: weight for weight in INVENTORY.weights}
    found = {}
    for index, (name, rank) in enumerate(ranks.items()):
        pair = WeightDecomposition(INVENTORY.matrix(by_name[name])).cut(rank)
        bias = 0.3 * random(seed + index, by_name[name].d_out, dtype=np.float64) if corrected else None
        found[name] = Factors(pair.first, pair.second, bias)
    return found


def rewrite(inventory: Inventory, factors: Mapping[str, Factors]) -> Model:
    return rewritten(inventory, {name: Stored.pair(pair) for name, pair in factors.items()})


def error_of(candidate: Model, count: int = len(X)) -> float:
    """By hand: the larger of the two outputs' relative errors."""
    dense, other = run(MODEL, x=X[:count], z=Z[:count]), run(candidate, x=X[:count], z=Z[:count])
    errors = [relative(dense[name], other[name]) for name in ("y", "u")]
    return max(map(float, errors))


def test_the_model_has_every_kind_of_site() -> None:
    assert [len(weight.sites) for weight in INVENTORY.weights] == [1, 1, 1, 2, 1]
    assert not INVENTORY.refusals


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries({}, optional={name: st.integers(1, full) for name, full in RANKS.items()}),
    st.booleans(),
    st.integers(0, 1000),
)
def test_the_error_of_a_plan_is_that_of_the_rewritten_model(ranks: dict[str, int], corrected: bool, seed: int) -> None:
    factors = factors_of(ranks, corrected, seed)
    tried, real = TRIALS[corrected].error(factors, OBSERVED), error_of(rewrite(INVENTORY, factors))
    # both are rounded in fp32 in different orders: 1e-5 of the figure, or rounding itself where nothing is lost
    assert tried == pytest.approx(real, rel=1e-5, abs=1e-6)
    assert (real > 1e-3) == ((corrected and bool(ranks)) or any(rank < RANKS[name] for name, rank in ranks.items()))


@pytest.mark.parametrize("corrected", [False, True])
def test_the_dense_plan_loses_nothing(corrected: bool) -> None:
    assert TRIALS[corrected].error({}, OBSERVED) < 1e-6
    full = {name: Factors(f.first, f.second, np.zeros(f.second.shape[1]) if corrected else None)
            for name, f in factors_of(RANKS, False).items()}  # fmt: skip
    assert TRIALS[corrected].error(full, OBSERVED) < 1e-6


def test_only_the_observed_samples_count() -> None:
    factors = factors_of({"w": 1, "o": 2}, False)
    candidate = rewrite(INVENTORY, factors)
    for count in (1, 4, 5, 21):
        observed = TRIALS[False].observe(samples()[:count])
        assert TRIALS[False].error(factors, observed) == pytest.approx(error_of(candidate, count), rel=1e-5)
    assert error_of(candidate, 4) != pytest.approx(error_of(candidate), rel=1e-3)


@pytest.mark.parametrize("ranks", [{}, {"w": 1}, {"w": 1, "v": 1, "q": 1, "s": 1, "o": 1}])
def test_the_metric_is_that_of_the_rewritten_model(ranks: dict[str, int]) -> None:
    factors = factors_of(ranks, True)
    predicted = run(rewrite(INVENTORY, factors), x=X, z=Z)["y"].argmax(-1)
    assert TRIALS[True].metric(factors, OBSERVED) == pytest.approx(float(np.mean(predicted == LABELS)), abs=1e-12)


def test_the_metric_tells_labels_apart() -> None:
    right = run(MODEL, x=X, z=Z)["y"].argmax(-1)

    def metric(labels: Array) -> float:
        return TRIALS[False].metric({}, TRIALS[False].observe(samples(), labels))

    assert metric(right) == 1.0
    assert metric((right + 1) % 4) == 0.0
    # one mistake in the last batch, which is of one sample: batches count by their size
    last = right.copy()
    last[-1] = (last[-1] + 1) % 4
    assert metric(last) == pytest.approx(20 / 21)


def test_weights_that_take_no_part_stay() -> None:
    some = [weight for weight in INVENTORY.weights if weight.name in ("w", "s")]
    few = Trial(INVENTORY, some, INPUTS, CONFIG, corrected=False)
    factors = factors_of({"s": 2}, False)
    assert few.error(factors, OBSERVED) == pytest.approx(error_of(rewrite(INVENTORY, factors)), rel=1e-5)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("form", [form for form in FORMS if "-0.5-0.0" not in form.name], ids=str)
def test_every_form_can_be_tried(form: Form, corrected: bool) -> None:
    inventory = take_inventory(form.model)
    (weight,) = inventory.weights
    tried = Trial(inventory, inventory.weights, Session(form.model).inputs, CONFIG, corrected=corrected)
    observed = tried.observe([{"x": form.x}])
    tolerance = {"float16": 5 * 2.0**-11, "float32": 1e-5, "float64": 1e-12}[weight.dtype]
    assert tried.error({}, observed) < tolerance
    pair = WeightDecomposition(form.matrix).cut(2)
    factors = {"w": Factors(pair.first, pair.second, np.ones(weight.d_out) if corrected else None)}
    real = relative(run(form.model, x=form.x)["y"], run(rewrite(inventory, factors), x=form.x)["y"])
    assert real > 0.05
    assert tried.error(factors, observed) == pytest.approx(real, rel=1e-5 if weight.dtype != "float16" else 1e-2)


def test_padding_does_not_count() -> None:
    model = parsed("(float[N, S, 6] x, int64[N, S] mask) => (float[N, S, 5] y)", "y = MatMul(x, w)", w=random(1, 6, 5))
    inventory = take_inventory(model)
    x = random(2, 5, 4, 6)
    lengths = [4, 2, 3, 1, 4]
    mask = np.array([[1] * n + [0] * (4 - n) for n in lengths])
    x[mask == 0] *= 1000
    feeds = [{"x": x[i : i + 1], "mask": mask[i : i + 1]} for i in range(5)]
    factors = {"w": WeightDecomposition(inventory.matrix(inventory.weights[0])).cut(2)}
    candidate = rewrite(inventory, factors)
    dense, other = (run(m, x=x, mask=mask)["y"] for m in (model, candidate))
    errors = {}
    for name in ("mask", None):
        config = Config(threads=1, batch=2, mask=name)
        tried = Trial(inventory, inventory.weights, Session(model).inputs, config, corrected=False)
        errors[name] = tried.error(factors, tried.observe(feeds))
    assert errors["mask"] == pytest.approx(relative(dense[mask == 1], other[mask == 1]), rel=1e-5)
    assert errors[None] == pytest.approx(relative(dense, other), rel=1e-5)
    assert errors["mask"] != pytest.approx(errors[None], rel=1e-2)


def test_initializers_that_are_inputs_of_an_old_model() -> None:
    model = parsed("(float[N, 6] x, float[6, 5] w) => (float[N, 5] y)", "y = MatMul(x, w)", ir=3, w=random(1, 6, 5))
    inventory = take_inventory(model)
    inputs = [spec for spec in Session(model).inputs if spec.name == "x"]
    trial = Trial(inventory, inventory.weights, inputs, CONFIG, corrected=False)
    observed = trial.observe({"x": X[i : i + 1]} for i in range(len(X)))
    pair = WeightDecomposition(inventory.matrix(inventory.weights[0])).cut(2)
    kept = X @ (pair.first @ pair.second).astype(np.float32)
    assert trial.error({"w": pair}, observed) == pytest.approx(relative(X @ random(1, 6, 5), kept), rel=1e-4)


def test_outputs_that_are_not_finite_any_more_are_an_infinite_error() -> None:
    w = np.abs(random(1, 6, 5))
    model = parsed("(float[N, 6] x) => (float[N, 5] y)", "a = Abs(x) b = MatMul(a, w) y = Log(b)", w=w)
    inventory = take_inventory(model)
    trial = Trial(inventory, inventory.weights, Session(model).inputs, CONFIG, corrected=False)
    observed = trial.observe({"x": X[i : i + 1]} for i in range(len(X)))
    negative = Factors(-np.ones((6, 1)), np.ones((1, 5)), None)
    assert trial.error({"w": negative}, observed) == np.inf
    trial.rest()
    assert trial.error({}, observed) == 0.0


def deep(blocks: int) -> Model:
    """Residual blocks over x [N, 6], with a scale z [N, 1] that all of them read."""
    block = "m{0} = MatMul(x{0}, u{0}) r{0} = Relu(m{0}) p{0} = MatMul(r{0}, v{0}) s{0} = Mul(p{0}, z)"
    block += " x{1} = Add(x{0}, s{0}) "
    body = "".join(block.format(i, i + 1) for i in range(blocks))
    weights = {f"{name}{i}": random(10 * i + k, *shape) for i in range(blocks) for k, (name, shape) in
               enumerate((("u", (6, 12)), ("v", (12, 6))))}  # fmt: skip
    return parsed("(float[N, 6] x0, float[N, 1] z) => (float[N, 6] y)", f"{body} y = Identity(x{blocks})", **weights)


def test_a_run_that_begins_inside_tells_the_same_error() -> None:
    model = deep(16)
    inventory = take_inventory(model)
    assert len(inventory.weights) == 32
    trial = Trial(inventory, inventory.weights, Session(model).inputs, CONFIG, corrected=True)
    samples = [{"x0": X[i : i + 1], "z": np.abs(X[i : i + 1, :1])} for i in range(len(X))]
    observed = trial.observe(samples, inside=True)
    feed = {"x0": X, "z": np.abs(X[:, :1])}
    begun = []
    for weight in inventory.weights:
        pair = WeightDecomposition(inventory.matrix(weight)).cut(2)
        cut = rewritten(inventory, {weight.name: Stored.pair(pair)})
        expected = relative(run(model, **feed)["y"], run(cut, **feed)["y"])
        assert trial.error({weight.name: pair}, observed) == pytest.approx(expected, rel=1e-4)
        assert trial._open is not None
        begun.append(trial._open[0])
    # weights are in the order of the graph: each session is opened once, and the later ones begin inside
    assert len(list(groupby(begun))) == len(set(begun)) == 5
    assert begun[0] is None
    assert begun[-1] not in (None, begun[-10])


def test_labels_stay_with_their_samples_where_a_batch_in_between_is_left_out() -> None:
    model = parsed(
        "(float[2, S, 4] x) => (float[2, 4] y)",
        "h = MatMul(x, w) y = ReduceMax<axes = [1], keepdims = 0>(h)",
        w=5 * np.eye(4, dtype=np.float32),
    )
    lengths, labels = [3, 3, 3, 5, 5, 5, 5, 4, 4], np.array([0, 1, 2, 3, 1, 0, 2, 3, 3])
    samples = [{"x": np.zeros((1, length, 4), np.float32)} for length in lengths]
    for sample, label in zip(samples, labels, strict=True):
        sample["x"][0, :, label] = 1
    inventory = take_inventory(model)
    trial = Trial(inventory, inventory.weights, Session(model, threads=1).inputs, CONFIG, corrected=True)
    with pytest.warns(UserWarning, match="1 samples left out"):
        observed = trial.observe(samples, labels)
    assert trial.metric({}, observed) == 1.0

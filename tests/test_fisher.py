"""Gradient moments against Jacobians, the factors they lead to, and the objective from the command's side."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import decaying, mlp, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from models import parsed, random

import onnxlr
from onnxlr.api import calibrate
from onnxlr.config import Config, Target
from onnxlr.errors import ConfigError, DataError, ModelError, StatsError
from onnxlr.factorize import OutputDecomposition
from onnxlr.gain import SHRINKAGE, Gain
from onnxlr.gathered import resolve
from onnxlr.gram import Moments, Stats
from onnxlr.layer import Layer
from onnxlr.model_io import Model, from_proto
from onnxlr.probes import weight_gradients
from onnxlr.sites import take_inventory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from onnxlr.config import Objective

    Array = np.ndarray[Any, Any]

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

FISHER = Config(objective="fisher", threads=1)


def gradients_of(model: Model, feeds: list[dict[str, Array]], **options: Any) -> Mapping[str, Array]:
    stats = calibrate(model, feeds, Config(objective="fisher", threads=1, **options))
    return {key: value.second for key, value in stats.moments.items() if key.endswith(":gradient")}


def close(found: Array, expected: Array, tolerance: float) -> bool:
    return bool(np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected))


def test_gradient_moments_are_those_of_the_jacobian() -> None:
    w, v = random(1, 6, 5), random(2, 5, 4)
    model = parsed("(float[N, 6] x) => (float[N, 4] y)", "h = MatMul(x, w) y = MatMul(h, v)", w=w, v=v)
    x = random(3, 8000, 6)
    found = gradients_of(model, [{"x": x}], batch=8000)
    kept = x[np.arange(len(x)) % 8 != 1]
    scale = np.mean((kept @ w @ v) ** 2)
    # 7,000 random probes: moments of normal numbers are good to some percent
    assert close(found["h:gradient"], v @ v.T / scale, 0.08)
    assert close(found["y:gradient"], np.eye(4) / scale, 0.08)


def test_a_saturating_output_is_probed_before_it() -> None:
    w = random(1, 6, 4)
    model = parsed("(float[N, 6] x) => (float[N, 4] y)", "h = MatMul(x, w) y = Softmax(h)", w=100 * w)
    found = gradients_of(model, [{"x": random(3, 800, 6)}], batch=800)
    assert np.trace(found["h:gradient"]) > 0
    scale = np.trace(found["h:gradient"]) / 4
    assert close(found["h:gradient"], scale * np.eye(4), 0.3)


def test_padding_has_no_gradient() -> None:
    signature = "(float[N, S, 6] x, int64[N, S] mask) => (float[N, S, 5] y)"
    model = parsed(signature, "h = MatMul(x, w) y = Relu(h)", w=random(1, 6, 5))
    x, mask = random(2, 40, 7, 6), (np.arange(7) < 3).astype(np.int64) * np.ones((40, 1), np.int64)
    stats = calibrate(model, [{"x": x, "mask": mask}], Config(objective="fisher", threads=1, mask="mask"))
    assert stats.moments["h:gradient"].count == 35 * 3


@settings(max_examples=30, deadline=None, derandomize=True)
@given(d_in=st.integers(2, 9), d_out=st.integers(2, 9), observed=st.booleans(), seed=st.integers(0, 1000))
def test_the_damage_is_the_error_that_the_gradients_weigh(d_in: int, d_out: int, observed: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((d_in, d_out))
    x = rng.standard_normal((60, d_in)) * np.logspace(0, -2, d_in) + rng.standard_normal(d_in)
    g = rng.standard_normal((50, d_out)) * np.logspace(0, -2, d_out)
    observed = observed and d_out <= d_in
    moments, gradients = Moments.of(x @ weight if observed else x), Moments.of(g)
    gram = gradients.second
    gram = gram + SHRINKAGE * np.trace(gram) / d_out * np.eye(d_out)
    fisher = Layer(weight, moments, observed_output=observed, gain=Gain.of(gradients)).decompose()
    plain = OutputDecomposition(weight, moments, observed_output=observed)

    def lost(pair: Any) -> float:
        error = x @ weight - (x @ pair.first @ pair.second + pair.bias)
        assert np.abs(error.mean(0)).max() < 1e-8
        return float(np.mean(np.einsum("ni,ij,nj->n", error, gram, error)))

    for rank in range(1, min(d_in, d_out) + 1):
        # the ridge turns the basis by a millionth of the energy
        slack = 1e-5 * fisher.total
        assert lost(fisher.cut(rank)) == pytest.approx(fisher.damage(rank), abs=slack)
        assert lost(fisher.cut(rank)) <= lost(plain.cut(rank)) + slack
    full = fisher.cut(min(d_in, d_out))
    np.testing.assert_allclose(full.first @ full.second, weight, rtol=0, atol=1e-7 * np.abs(weight).max())


def test_it_beats_the_layers_own_error_where_the_network_looks_elsewhere() -> None:
    # the second layer reads the first one's weak directions most
    rng = np.random.default_rng(0)
    w = rng.standard_normal((32, 32)).astype(np.float32) * np.logspace(0, -1.5, 32, dtype=np.float32)
    v = (rng.standard_normal((32, 16)) * np.logspace(-1.5, 0, 32)[:, None]).astype(np.float32)
    model = parsed("(float[N, 32] x) => (float[N, 16] y)", "h = MatMul(x, w) t = Tanh(h) y = MatMul(t, v)", w=w, v=v)
    errors = {}
    for objective in ("output", "fisher"):
        config = Config(
            objective=objective, target=Target("energy", 1.0), ranks={"w": 8}, exclude=("v",), threads=1
        )  # fmt: skip
        report = onnxlr.compress(model, [{"x": random(1, 400, 32)}], config)
        errors[objective] = report.validation.error
    assert errors["fisher"] < 0.7 * errors["output"]


def test_moments_with_gradients_are_reused_and_asked_for() -> None:
    model, feeds = from_proto(mlp()), [{"x": rows(320)}]
    target = Target("keep_params", 0.6)
    stats = calibrate(model, feeds, FISHER)
    config = Config(objective="fisher", target=target, rank_multiple=4, threads=1)
    again, direct = onnxlr.compress(model, feeds, config, stats=stats), onnxlr.compress(model, feeds, config)
    assert [weight.rank for weight in again.weights] == [weight.rank for weight in direct.weights]
    assert again.validation == direct.validation
    without = calibrate(model, feeds, Config(objective="output", threads=1))
    with pytest.raises(StatsError, match=r"hold no gradients: gather them with `onnxlr calibrate --objective fisher`"):
        onnxlr.compress(model, feeds, config, stats=without)


def test_a_weight_that_no_gradient_reaches_says_so() -> None:
    rng = np.random.default_rng(0)
    w, v = decaying(rng, 64, 48), decaying(rng, 64, 48)
    body = "a = MatMul(x, w) y = Relu(a) b = MatMul(x, v) k = ArgMax<axis = 1>(b)"
    model = parsed("(float[N, 64] x) => (float[N, 48] y, int64[N, 1] k)", body, w=w, v=v)
    config = Config(objective="fisher", target=Target("energy", 0.5), rank_multiple=1, threads=1)
    report = onnxlr.compress(model, [{"x": random(1, 400, 64)}], config)
    reasons = {weight.name: weight.reason for weight in report.weights}
    assert reasons["v"].startswith("no gradient reaches it, so its own output's error is minimised; ")
    assert reasons["w"].startswith("chosen for")


LOOSE = {
    "an output of another branch": "b = MatMul(x, v) k = ArgMax<axis = 1>(b) y = Relu(x)",
    "an output without a gradient": "b = MatMul(x, v) k = ArgMax<axis = 1>(b) y = Cast<to = 1>(k)",
}


@pytest.mark.parametrize("body", LOOSE.values(), ids=LOOSE)
def test_where_no_gradient_reaches_any_weight_the_message_says_so(body: str) -> None:
    rng = np.random.default_rng(0)
    model = parsed("(float[N, 64] x) => (float[N, M] y, int64[N, 1] k)", body, v=decaying(rng, 64, 48))
    feeds = [{"x": random(1, 200, 64)}]
    with pytest.raises(ModelError, match="no gradient reaches any weight: use --objective output"):
        calibrate(model, feeds, FISHER)
    config = Config(target=Target("energy", 0.5), rank_multiple=1, threads=1)
    stats = calibrate(model, feeds, config)
    for report in (onnxlr.compress(model, feeds, config), onnxlr.compress(model, feeds, config, stats=stats)):
        assert report.config["objective"] == "output"
        assert report.objective_reason == "no gradient reaches any weight"


def test_an_objective_left_open_takes_what_gradients_there_are() -> None:
    w, feeds = random(1, 12, 8), [{"x": random(2, 64, 12)}]
    signature = "(float[N, 12] x) => (float[N, 8] y)"
    reasons = {
        "h = MatMul(x, w) y = Tanh(h)": ("fisher", "torch has the gradients of the model"),
        "h = MatMul(x, w) y = Sqrt(h)": ("output", "the gradient at 'h' is not finite"),
    }
    for body, expected in reasons.items():
        positive = np.abs(feeds[0]["x"]) * (np.arange(64) > 0)[:, None]
        model, config = parsed(signature, body, w=np.abs(w)), Config(threads=1)
        stats = calibrate(model, [{"x": positive.astype(np.float32)}], config)
        config, why = resolve(config, stats)
        assert (config.objective, why) == expected
    assert resolve(Config(objective="output"), stats) == (Config(objective="output"), "")


def test_gradients_of_tied_sites_add_up() -> None:
    w = random(1, 6, 6)
    model = parsed("(float[N, 6] x) => (float[N, 6] y)", "h = MatMul(x, w) t = Tanh(h) y = MatMul(t, w)", w=w)
    inventory = take_inventory(model)
    stats = calibrate(model, [{"x": random(2, 64, 6)}], FISHER)
    total = weight_gradients(stats, inventory.weights[0])
    assert total is not None
    np.testing.assert_allclose(total[0].gram, stats.moments["h:gradient"].gram + stats.moments["y:gradient"].gram)
    fewer = Stats(stats.model, stats.data, stats.samples, stats.holdout_every,
                  {key: value for key, value in stats.moments.items() if key != "h:gradient"})  # fmt: skip
    assert weight_gradients(fewer, inventory.weights[0]) is None


W, X = 0.3 * random(1, 6, 4), random(2, 80, 6)
LABELS = np.random.default_rng(3).integers(0, 4, 80)
LOSS = Config(objective="fisher", loss="cross-entropy", threads=1)


def classifier(body: str = "h = MatMul(x, w) y = Softmax(h)") -> Model:
    return parsed("(float[N, 6] x) => (float[N, 4] y)", body, w=W)


def of_cross_entropy(labels: Array, every: int = 8) -> Array:
    """`E[(p - t)^T (p - t)]`, `p` the probabilities and `t` the classes, over what is not held out."""
    kept = np.arange(len(X)) % every != 1
    scores = (X.astype(np.float64) @ W)[kept]
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    g = p - np.eye(4)[labels[kept]]
    second: Array = g.T @ g / len(g)
    return second


@pytest.mark.parametrize("batch", [1, 7, 80])
@pytest.mark.parametrize("body", ["h = MatMul(x, w) y = Softmax(h)", "h = MatMul(x, w) y = Identity(h)"])
def test_gradients_of_cross_entropy_are_probabilities_less_classes(body: str, batch: int) -> None:
    stats = calibrate(classifier(body), [{"x": X}], replace(LOSS, batch=batch), labels=LABELS)
    gradients = stats.moments["h:gradient"]
    assert gradients.count == 70
    np.testing.assert_allclose(gradients.second, of_cross_entropy(LABELS), rtol=0, atol=1e-6)
    # labels that are held out stay out, and any other one counts
    for index in range(16):
        changed = LABELS.copy()
        changed[index] = (changed[index] + 1) % 4
        again = calibrate(classifier(body), [{"x": X}], replace(LOSS, batch=batch), labels=changed)
        same = np.array_equal(again.moments["h:gradient"].gram, gradients.gram)
        assert same == (index % 8 == 1)
        np.testing.assert_allclose(again.moments["h:gradient"].second, of_cross_entropy(changed), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint8"])
def test_labels_are_integers_of_any_size(dtype: str) -> None:
    stats = [calibrate(classifier(), [{"x": X}], LOSS, labels=labels) for labels in (LABELS, LABELS.astype(dtype))]
    assert stats[0].fingerprint() == stats[1].fingerprint()


def test_cross_entropy_of_tokens_leaves_out_those_without_a_class() -> None:
    model = parsed("(float[N, S, 6] x) => (float[N, S, 4] y)", "y = MatMul(x, w)", w=W)
    labels = LABELS.reshape(16, 5).copy()
    labels[:, 3:] = -100
    stats = calibrate(model, [{"x": X.reshape(16, 5, 6)}], replace(LOSS, holdout_every=16), labels=labels)
    rows = np.delete(np.arange(80).reshape(16, 5), 1, axis=0)
    scores = (X.astype(np.float64) @ W)[rows[:, :3].ravel()]
    g = np.exp(scores) / np.exp(scores).sum(1, keepdims=True) - np.eye(4)[LABELS[rows[:, :3].ravel()]]
    assert stats.moments["y:gradient"].count == 75
    np.testing.assert_allclose(stats.moments["y:gradient"].gram, g.T @ g, rtol=0, atol=1e-4)


def test_compress_weighs_errors_by_a_loss_on_labels() -> None:
    model, feeds = classifier(), [{"x": X}]
    config = replace(LOSS, target=Target("energy", 1.0), ranks={"w": 2}, objective="auto")
    plain = calibrate(model, feeds, Config(objective="output", threads=1))

    def kept(labels: Array, stats: Stats | None = None) -> tuple[float, float]:
        report = onnxlr.compress(model, feeds, config, labels=labels, stats=stats)
        assert report.config["objective"] == "fisher"
        return report.weights[0].energy, report.validation.error

    def by_hand(labels: Array) -> tuple[float, float]:
        moments = Moments(70, np.zeros(4), 70 * of_cross_entropy(labels))
        return kept(labels, replace(plain, moments={**plain.moments, "h:gradient": moments}, loss=config.loss))

    held_out = LABELS.copy()
    held_out[1::8] = (LABELS[1::8] + 1) % 4
    others = LABELS[::-1].copy()
    assert kept(LABELS) == pytest.approx(by_hand(LABELS), rel=1e-4)
    assert kept(others) == pytest.approx(by_hand(others), rel=1e-4)
    assert kept(LABELS) == kept(held_out)
    assert kept(LABELS) != pytest.approx(kept(others), rel=1e-3)


LOSSES = """
import torch

def squared(outputs, labels):
    return ((outputs["y"].argmax(-1) != labels).float().detach() @ outputs["y"] ** 2).sum()

def apart(outputs, labels):
    return outputs["y"].sum(-1)

def number(outputs, labels):
    return 1.0

def breaks(outputs, labels):
    raise KeyError("scores")

constant = 3
"""


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module `losses_of_a_user`."""
    (tmp_path / "losses_of_a_user.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("losses")
def test_a_loss_of_the_users_own() -> None:
    model = classifier("h = MatMul(x, w) y = Identity(h)")
    stats = calibrate(model, [{"x": X}], replace(LOSS, loss="losses_of_a_user:squared"), labels=LABELS)
    scores = X.astype(np.float64) @ W
    g = (2 * scores * (scores.argmax(1) != LABELS)[:, None])[np.arange(80) % 8 != 1]
    np.testing.assert_allclose(stats.moments["h:gradient"].gram, g.T @ g, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("losses")
@pytest.mark.parametrize("objective", ["fisher", "auto"])
@pytest.mark.parametrize(
    ("loss", "labels", "kind", "message"),
    [
        ("hinge", LABELS, ConfigError, "unknown loss 'hinge': give 'cross-entropy' or 'module:function'"),
        ("losses_of_a_user:missing", LABELS, ConfigError, "the module losses_of_a_user has no 'missing'"),
        ("losses_of_a_user:constant", LABELS, ConfigError, "constant is a int, expected a function"),
        ("no_such_module:f", LABELS, ConfigError, "no_such_module cannot be imported"),
        ("losses_of_a_user:breaks", LABELS, DataError, "fails on a batch: KeyError: 'scores'"),
        ("losses_of_a_user:apart", LABELS, DataError, r"gives a tensor \[8\]: expected a tensor of one number"),
        ("losses_of_a_user:number", LABELS, DataError, "gives a float: expected a tensor of one number"),
        (
            "cross-entropy",
            LABELS + 1,
            DataError,
            "fails on a batch: IndexError: label 4 where there are 4 classes",
        ),
        ("cross-entropy", LABELS - 1, DataError, "'cross-entropy' fails on a batch: IndexError: label -1 where there"),
        (
            "cross-entropy",
            LABELS + 0.5,
            DataError,
            "fails on a batch: TypeError: labels are torch.float64",
        ),
        ("cross-entropy", LABELS[:-1], DataError, "79 labels for 80 samples"),
        ("cross-entropy", None, ConfigError, "--loss cross-entropy needs --labels: one label for every sample"),
    ],
)
def test_what_is_wrong_with_a_loss_is_said(
    objective: Objective, loss: str, labels: Array | None, kind: type[Exception], message: str
) -> None:
    config = replace(LOSS, loss=loss, objective=objective)
    for stage in (calibrate, onnxlr.compress):
        with pytest.raises(kind, match=message):
            stage(classifier(), [{"x": X}], config, labels=labels)


def test_a_loss_or_labels_that_nothing_reads_are_refused() -> None:
    for stage in (calibrate, onnxlr.compress):
        with pytest.raises(ConfigError, match="the objective output uses no gradients: leave --loss cross-entropy out"):
            stage(classifier(), [{"x": X}], replace(LOSS, objective="output"), labels=LABELS)
    with pytest.raises(ConfigError, match="--labels without --loss"):
        calibrate(classifier(), [{"x": X}], FISHER, labels=LABELS)


def test_without_torch_the_message_says_what_to_install() -> None:
    script = "import sys; sys.modules['torch'] = None\ntry: import onnxlr.fisher\nexcept Exception as e: print(e)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "pip install 'onnxlr[torch]'" in printed


def test_padding_does_not_scale_what_probes_find() -> None:
    model = parsed(
        "(float[N, S, 8] x, int64[N, S] mask) => (float[N, S, 8] y)", "y = MatMul(x, w)", w=np.eye(8, dtype=np.float32)
    )
    found = []
    for junk in (0.0, 1e3):
        samples = [{"x": random(seed, 1, 6, 8), "mask": np.array([[1] * 3 + [0] * 3])} for seed in range(9)]
        for sample in samples:
            sample["x"][:, 3:] = junk
        samples[0]["mask"][:] = 0  # in a batch of its own
        stats = calibrate(model, samples, Config(objective="fisher", mask="mask", threads=1, batch=1))
        found.append(stats.moments["y:gradient"].gram)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)

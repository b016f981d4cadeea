"""Gradient moments against Jacobians, the factors they lead to, and the objective from the command's side."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import decaying, mlp, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from models import parsed, random

import onnxlr
from onnxlr.api import calibrate
from onnxlr.calibrate import weight_gradients
from onnxlr.case import resolve
from onnxlr.config import Config, Target
from onnxlr.errors import ModelError, StatsError
from onnxlr.factorize import SHRINKAGE, Gain, OutputDecomposition
from onnxlr.gram import Moments, Stats
from onnxlr.layer import Layer
from onnxlr.model_io import Model, from_proto
from onnxlr.sites import take_inventory

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        assert report.validation is not None
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
    np.testing.assert_allclose(total.gram, stats.moments["h:gradient"].gram + stats.moments["y:gradient"].gram)
    fewer = Stats(stats.model, stats.data, stats.samples, stats.holdout_every,
                  {key: value for key, value in stats.moments.items() if key != "h:gradient"})  # fmt: skip
    assert weight_gradients(fewer, inventory.weights[0]) is None


def test_without_torch_the_message_says_what_to_install() -> None:
    script = "import sys; sys.modules['torch'] = None\ntry: import onnxlr.fisher\nexcept Exception as e: print(e)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "pip install 'onnxlr[torch]'" in printed

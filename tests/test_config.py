"""What a user can ask for, and what is refused with which words."""

from __future__ import annotations

import math
from typing import Any

import pytest

from onnxlr.config import TARGETS, Config, Target, Tuning
from onnxlr.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        ("energy", 0.99, "energy 0.99"),
        ("keep_params", 0.5, "keep-params 0.5"),
        ("keep_macs", 1, "keep-macs 1"),
        ("max_error", 0.05, "max-error 0.05"),
        ("max_error", 2.5, "max-error 2.5"),
        ("min_metric_kept", 0.123456789, "min-metric-kept 0.123457"),
    ],
)
def test_a_target_is_shown_as_its_option(kind: Any, value: float, shown: str) -> None:
    assert str(Target(kind, value)) == shown


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf, -math.inf])
def test_no_target_is_zero_negative_or_not_finite(kind: Any, value: float) -> None:
    bound = "finite" if kind == "max_error" else "at most 1"
    with pytest.raises(ConfigError) as refused:
        Target(kind, value)
    assert str(refused.value) == f"{kind} must be above 0 and {bound}, not {value}"


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind != "max_error"])
def test_a_share_ends_at_1(kind: Any) -> None:
    Target(kind, 1)
    with pytest.raises(ConfigError, match=f"{kind} must be above 0 and at most 1, not 1.001"):
        Target(kind, 1.001)


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as refused:
        Target("keep_size", 0.5)  # type: ignore[arg-type]
    assert str(refused.value) == (
        "unknown target 'keep_size': choose one of energy, keep_params, keep_macs, max_latency, max_error, "
        "min_metric_kept"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"objective": "fast"}, "unknown objective 'fast': choose one of auto, weight, utilized, output, fisher"),
        ({"rank_multiple": 0}, "rank_multiple must be at least 1, not 0"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"batch": -3}, "batch must be at least 1, not -3"),
        ({"rows": "some"}, "unknown rows 'some': choose one of all, auto"),
        ({"holdout_every": 1}, "holdout_every must be at least 2, not 1: some data must be left over"),
        ({"margin": 0.0}, "margin must be above 0 and at most 1, not 0.0"),
        ({"margin": 1.01}, "margin must be above 0 and at most 1, not 1.01"),
        ({"margin": math.nan}, "margin must be above 0 and at most 1, not nan"),
        (
            {"forms": frozenset({"pair", "star"})},
            "unknown form 'star': choose of pair, block, shared, width, separable",
        ),
        ({"allocation": "fair"}, "unknown allocation 'fair': choose one of global, uniform"),
        ({"floor": -0.1}, "floor must be at least 0 and below 1, not -0.1"),
        ({"floor": 1.0}, "floor must be at least 0 and below 1, not 1.0"),
        ({"rounds": -1}, "rounds must be at least 0, not -1"),
        ({"ranks": {"*fc1": 8, "head": 0}}, "the rank for 'head' must be at least 1, not 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Config(**setting)
    assert str(refused.value) == message
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"train": "biases"}, "unknown weights to train 'biases': choose one of factors, all"),
        ({"augment": "twice"}, "unknown augment 'twice': choose one of auto, always, never"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, not 0.0"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0 and finite, not inf"),
    ],
)
def test_tuning_out_of_range_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Tuning(**setting)
    assert str(refused.value) == message


def test_the_ends_of_every_range_are_allowed() -> None:
    config = Config(rank_multiple=1, batch=1, holdout_every=2, margin=1, ranks={"*": 1}, rounds=0, forms=frozenset())
    assert (config.rank_multiple, config.batch, config.holdout_every, config.margin) == (1, 1, 2, 1)
    assert config.target == Target()

"""Importances where a measurement says little: no damage, no change of the outputs, noise, or an error without end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import parsed
from numpy.typing import NDArray

import onnxlr
from onnxlr import Config, Target

Array = NDArray[Any]

WIDTH = 64
ROWS = np.random.default_rng(0).standard_normal((256, WIDTH)).astype(np.float32)


def decaying(d_in: int, d_out: int, rate: float, seed: int) -> Array:
    """A weight whose singular values fall by `rate` from each to the next."""
    u, _, vt = np.linalg.svd(np.random.default_rng(seed).standard_normal((d_in, d_out)), full_matrices=False)
    return ((u * rate ** np.arange(min(d_in, d_out))) @ vt).astype(np.float32)


def compressed(
    signature: str, body: str, dtype: Any = np.float32, /, *, weights: dict[str, Array], **settings: Any
) -> Any:
    model = parsed(signature, body, **{name: array.astype(dtype) for name, array in weights.items()})
    config = Config(**{"objective": "output", "threads": 1, "rank_multiple": 4, **settings})
    return onnxlr.compress(model, [{"x": row[None].astype(dtype)} for row in ROWS], config)


@pytest.mark.parametrize("settings", [{}, {"target": Target("keep_params", 1.0)}, {"rank_multiple": 16}])
def test_units_that_do_nothing_go_and_no_others(settings: dict[str, Any]) -> None:
    second = decaying(WIDTH, 32, 0.99, 2)
    second[24:] = 0
    report = compressed(
        "(float[N, 64] x) => (float[N, 32] y)",
        "h = MatMul(x, w1) s = Relu(h) y = MatMul(s, w2)",
        weights={"w1": decaying(WIDTH, WIDTH, 0.99, 1), "w2": second},
        **settings,
    )
    assert report.validation.error <= (1e-5 if "target" in settings else 0.05)
    assert report.after.parameters < 0.55 * report.before.parameters


def test_what_a_rank_beyond_all_damage_costs_is_read_off_at_a_lower_one() -> None:
    flat = decaying(WIDTH, WIDTH, 0.97, 1)
    flat[:, 12:] = 0
    report = compressed(
        "(float[N, 64] x) => (float[N, 64] p, float[N, 64] q)",
        "p = MatMul(x, a) q = MatMul(x, b)",
        weights={"a": flat, "b": decaying(WIDTH, WIDTH, 0.95, 2)},
        target=Target("keep_params", 0.6),
        forms=frozenset({"pair", "block"}),
    )
    assert {weight.name: weight.rank for weight in report.weights}["a"] >= 12


@pytest.mark.parametrize("multiple", [4, 16])
def test_labels_that_do_not_change_do_not_make_every_cut_free(multiple: int) -> None:
    report = compressed(
        "(float[N, 64] x) => (int64[N] y)",
        "h = MatMul(x, a) s = Relu(h) k = MatMul(s, b) t = Relu(k) l = MatMul(t, c) y = ArgMax<axis=1, keepdims=0>(l)",
        weights={"a": decaying(64, 64, 0.85, 1), "b": decaying(64, 64, 0.85, 2), "c": decaying(64, 10, 0.95, 3)},
        target=Target("keep_params", 1.0),
        rank_multiple=multiple,
    )
    assert report.validation.error == 0
    assert all(weight.form == "dense" for weight in report.weights)


def test_weights_too_narrow_for_a_rank_of_their_own_count_in_a_shared_factor() -> None:
    weights = {"wp": decaying(64, 64, 0.9, 1), "wv": decaying(64, 16, 0.99, 2), "wu": decaying(64, 16, 0.99, 3)}
    with_shared, without = (
        compressed(
            "(float[N, 64] x) => (float[N, 64] p, float[N, 16] v, float[N, 16] u)",
            "p = MatMul(x, wp) v = MatMul(x, wv) u = MatMul(x, wu)",
            weights=weights,
            target=Target("keep_params", 0.7),
            forms=frozenset(forms),
            rank_multiple=16,
        )
        for forms in (("pair", "block", "shared"), ("pair", "block"))
    )
    assert with_shared.validation.error < 1.1 * without.validation.error


def test_rounding_in_half_precision_is_not_taken_for_damage() -> None:
    weights = {"a": decaying(64, 64, 0.5, 1), "b": decaying(64, 64, 0.95, 2)}
    found = [
        compressed(
            f"({kind}[N, 64] x) => ({kind}[N, 64] ya, {kind}[N, 64] yb)",
            "ya = MatMul(x, a) yb = MatMul(x, b)",
            dtype,
            weights=weights,
            target=Target("keep_params", 0.6),
            forms=frozenset({"pair", "block"}),
        )
        for kind, dtype in (("float", np.float32), ("float16", np.float16))
    ]
    assert [[weight.rank for weight in report.weights] for report in found][1:] == [
        [weight.rank for weight in found[0].weights]
    ]


def test_an_error_without_end_still_tells_more_from_less() -> None:
    a = decaying(64, 64, 0.93, 1)
    above = (ROWS @ a).max(0) + np.float32(1e-4)  # z is all zero in the dense model, and nearly never afterwards
    report = compressed(
        "(float[N, 64] x) => (float[N, 64] y, float[N, 64] z)",
        "h = MatMul(x, a) q = MatMul(x, b) y = Add(h, q) e = Sub(h, c) z = Relu(e)",
        weights={"a": a, "b": decaying(64, 64, 0.93, 2), "c": above},
        target=Target("keep_params", 0.5),
    )
    ranks = {weight.name: weight.rank for weight in report.weights}
    assert ranks["a"] is None or ranks["a"] > ranks["b"]
    assert all(np.isfinite(weight.energy) for weight in report.weights)

"""Latency in turn: what is promised of the figures, none of which depends on how fast the machine is."""

from __future__ import annotations

import itertools

import numpy as np
import onnx.parser
import pytest

from onnxlr.bench import MIN_RUNS, Latency, compare_latency
from onnxlr.errors import ConfigError, InstallError, ModelError
from onnxlr.model_io import Model, from_proto

FEED = {"x": np.ones((2, 3), np.float32)}


def doubling(operators: int) -> Model:
    names = ["x", *(f"t{i}" for i in range(1, operators)), "y"]
    nodes = "\n".join(f"{b} = Add({a}, {a})" for a, b in itertools.pairwise(names))
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3] x) => (float[N, 3] y) {{ {nodes} }}'
    return from_proto(onnx.parser.parse_model(text))


def test_every_model_is_timed_as_often_and_against_the_first() -> None:
    first, second = compare_latency([doubling(1), doubling(20)], FEED, runs=7, warmup=0, budget_seconds=60, threads=1)
    assert first.runs == second.runs == 7
    assert first.ratio == first.ratio_p10 == first.ratio_p90 == 1.0
    assert 0 < second.ratio_p10 <= second.ratio <= second.ratio_p90
    for latency in (first, second):
        assert 0 < latency.p10_ms <= latency.median_ms <= latency.p90_ms
        assert latency == Latency(**latency.to_dict())


@pytest.mark.parametrize(("runs", "timed"), [(50, MIN_RUNS), (3, 3)])
def test_without_time_the_least_number_of_rounds_is_run(runs: int, timed: int) -> None:
    (latency,) = compare_latency([doubling(1)], FEED, runs=runs, budget_seconds=0)
    assert latency.runs == timed


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"warmup": -1}, {"budget_seconds": -1.0}])
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least 1, 0 and 0"):
        compare_latency([doubling(1)], FEED, **wrong)


def test_models_that_cannot_be_timed() -> None:
    with pytest.raises(ConfigError, match="no model to time"):
        compare_latency([], FEED)
    with pytest.raises(ModelError, match=r"the model fails on a feed \(x \[2, 4\]\)"):
        compare_latency([doubling(1)], {"x": np.ones((2, 4), np.float32)})
    with pytest.raises(InstallError, match="no Nonsense"):
        compare_latency([doubling(1)], FEED, provider="Nonsense")


def test_twenty_times_the_work_takes_longer_and_threads_do_not_matter() -> None:
    wide = {"x": np.ones((40_000, 3), np.float32)}
    for threads in (1, 2):
        _, second = compare_latency([doubling(1), doubling(20)], wide, runs=9, budget_seconds=20, threads=threads)
        assert second.ratio > 3

"""Dataset, split and batches: every sample exactly once, in order, never across shapes."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxlr.data import Dataset, TensorSpec, batches, fixed_batch, has_batch_axis, open_data, shuffled, split, spread
from onnxlr.errors import ConfigError

FLOAT = np.dtype(np.float32)
FREE = [TensorSpec("x", FLOAT, ("N", None))]


def sequence(number: int, length: int) -> dict[str, np.ndarray]:
    return {"x": np.full((1, length), number, np.float32)}


def numbers(dataset: Dataset) -> list[int]:
    return [int(sample["x"].flat[0]) for sample in dataset]


@pytest.mark.parametrize(
    ("shapes", "batched", "fixed"),
    [
        ([("N", 3), ("N", 5)], True, None),
        ([(None, 3), (None,)], True, None),
        ([(4, 3), (4,)], True, 4),
        ([("N", 3), ("M", 3)], False, None),
        ([("N", 3), (None, 3)], False, None),
        ([(4, 3), (2, 3)], False, None),
        ([("N", 3), ()], False, None),
        ([(4,)], False, None),  # features: four samples of no axis at all would be scrambled
        ([(4,), (4,)], False, None),
        ([("N",)], True, None),
        ([(1,)], True, 1),
        ([], False, None),
    ],
)
def test_batch_axis(shapes: list[tuple[int | str | None, ...]], batched: bool, fixed: int | None) -> None:
    inputs = [TensorSpec(f"i{number}", FLOAT, shape) for number, shape in enumerate(shapes)]
    assert has_batch_axis(inputs) is batched
    assert fixed_batch(inputs) == fixed


@given(count=st.integers(1, 60), every=st.integers(2, 12))
def test_split_is_disjoint_and_complete(count: int, every: int) -> None:
    calibration, held_out = split(open_data([sequence(i, 2) for i in range(count)], FREE), every)
    for _ in range(2):
        assert numbers(held_out) == [i for i in range(count) if i % every == 1]
        assert numbers(calibration) == [i for i in range(count) if i % every != 1]
    for part in (calibration, held_out):
        assert [index for index, _ in part.indexed()] == numbers(part)


def test_split_of_a_part_keeps_the_indices_of_the_whole() -> None:
    _, held_out = split(open_data([sequence(i, 2) for i in range(12)], FREE), 2)
    _, again = split(held_out, 3)
    assert [index for index, _ in again.indexed()] == numbers(again) == [3, 9]


def test_parts_are_named_after_the_whole() -> None:
    calibration, held_out = split(Dataset("photos", lambda: iter(())))
    assert (calibration.name, held_out.name) == ("photos (calibration)", "photos (held out)")


def test_a_part_loads_no_sample_of_the_other() -> None:
    loaded = []

    def load(number: int) -> dict[str, np.ndarray]:
        loaded.append(number)
        return sequence(number, 1)

    whole = Dataset("deferred", lambda: ((i, lambda i=i: load(i)) for i in range(8)))
    assert numbers(split(whole, 4)[1]) == loaded == [1, 5]


@given(count=st.integers(0, 40), wanted=st.integers(1, 12))
def test_spread_takes_distinct_samples_from_end_to_end(count: int, wanted: int) -> None:
    whole = Dataset("whole", lambda: ((i, lambda i=i: sequence(i, 1)) for i in range(count)))
    taken = numbers(spread(whole, wanted))
    assert len(taken) == len(set(taken)) == min(count, wanted)
    assert taken == sorted(taken)
    if min(count, wanted) > 1:
        assert (taken[0], taken[-1]) == (0, count - 1)
        assert max(b - a for a, b in pairwise(taken)) <= -(-(count - 1) // (len(taken) - 1))


@given(lengths=st.lists(st.integers(1, 3), max_size=40), size=st.integers(1, 9))
def test_batches_keep_every_sample_in_order_and_never_mix_shapes(lengths: list[int], size: int) -> None:
    samples = [sequence(number, length) for number, length in enumerate(lengths)]
    feeds = list(batches(samples, size, FREE))
    rows = [(int(row[0]), len(row)) for feed in feeds for row in feed["x"]]
    assert rows == list(enumerate(lengths))
    assert all(len(feed["x"]) <= size for feed in feeds)
    for one, two in pairwise(feeds):
        assert len(one["x"]) == size or one["x"].shape[1] != two["x"].shape[1]


@given(count=st.integers(0, 20), fixed=st.integers(1, 6), size=st.integers(1, 9))
def test_fixed_batches_are_exact_whatever_the_size(count: int, fixed: int, size: int) -> None:
    inputs = [TensorSpec("x", FLOAT, (fixed, None))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        feeds = list(batches([sequence(i, 2) for i in range(count)], size, inputs))
    assert [len(feed["x"]) for feed in feeds] == [fixed] * (count // fixed)
    assert [int(value) for feed in feeds for value in feed["x"][:, 0]] == list(range(count - count % fixed))
    assert len(caught) == (count % fixed > 0)
    if caught:
        assert str(caught[0].message).startswith(f"{count % fixed} samples left out")


def test_fixed_batches_count_incomplete_runs_of_one_shape() -> None:
    inputs = [TensorSpec("x", FLOAT, (2, None))]
    samples = [sequence(0, 2), sequence(1, 3), sequence(2, 3), sequence(3, 4)]
    with pytest.warns(UserWarning, match="2 samples left out: the model's batch axis is fixed to 2"):
        feeds = list(batches(samples, 8, inputs))
    assert [feed["x"].shape for feed in feeds] == [(2, 3)]


def test_without_a_batch_axis_each_sample_is_a_feed() -> None:
    inputs = [TensorSpec("x", FLOAT, ("N", 2)), TensorSpec("scale", FLOAT, ())]
    sample = {"x": np.ones((3, 2), np.float32), "scale": np.float32(2)}
    feeds = list(batches(open_data([sample] * 2, inputs), 8, inputs))
    assert [feed["x"].shape for feed in feeds] == [(3, 2)] * 2
    assert feeds[0]["scale"].shape == ()


def test_senseless_sizes_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="batch size 0: expected 1 or more"):
        batches([], 0, FREE)
    with pytest.raises(ConfigError, match="holdout_every 1: expected 2 or more"):
        split(Dataset("none", lambda: iter(())), 1)


@given(count=st.integers(1, 60), run=st.integers(1, 9))
def test_shuffled_runs_hold_every_sample_once_and_stay_whole(count: int, run: int) -> None:
    whole = open_data([sequence(i, 2) for i in range(count)], FREE)
    order = numbers(shuffled(whole, run))
    assert sorted(order) == list(range(count))
    assert order == numbers(shuffled(whole, run)) == [index for index, _ in shuffled(whole, run).indexed()]
    for one, other in pairwise(order):
        assert other == one + 1 or other % run == 0
    if run == 1 and count > 20:
        assert order != sorted(order)

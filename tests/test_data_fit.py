"""Fitting feeds to a model: what converts, what is cut, and what each refusal says."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnxlr.data import TensorSpec, open_data
from onnxlr.errors import DataError


def spec(dtype: object = np.float32, shape: tuple[int | str | None, ...] = ("N", 3), name: str = "x") -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


def samples(feed: object, *inputs: TensorSpec) -> list[dict[str, np.ndarray]]:
    return [dict(sample) for sample in open_data([feed], inputs or (spec(),))]


def test_feeds_are_cut_along_the_batch_axis_in_order() -> None:
    ids = np.arange(12).reshape(4, 3)
    found = samples({"ids": ids, "mask": ids > 5}, spec(np.int64, name="ids"), spec(bool, name="mask"))
    assert [sample["ids"].shape for sample in found] == [(1, 3)] * 4
    np.testing.assert_array_equal(np.concatenate([sample["ids"] for sample in found]), ids)
    np.testing.assert_array_equal(np.concatenate([sample["mask"] for sample in found]), ids > 5)


def test_one_rank_lower_is_a_single_sample() -> None:
    assert [sample["x"].shape for sample in samples({"x": np.ones(3)})] == [(1, 3)]


def test_samples_do_not_share_memory_with_the_source() -> None:
    buffer = np.zeros((1, 3), np.float32)

    def refill() -> object:
        for number in range(3):
            buffer[:] = number
            yield {"x": buffer}

    assert [sample["x"][0, 0] for sample in open_data(refill(), [spec()])] == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("int32", "int64"),
        ("int64", "int32"),
        ("int64", "uint8"),
        ("int64", "bool"),
        ("bool", "int64"),
        ("bool", "float32"),
        ("uint8", "float32"),
        ("float64", "float32"),
        ("float32", "float16"),
        ("float16", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "float8_e4m3fn"),
    ],
)
def test_dtypes_that_convert(given: str, wanted: str) -> None:
    def dtype(name: str) -> np.dtype:
        return np.dtype(getattr(ml_dtypes, name, None) or name)

    (sample,) = samples({"x": np.array([[0, 1, 1]]).astype(dtype(given))}, spec(dtype(wanted)))
    assert sample["x"].dtype == dtype(wanted)
    assert sample["x"].astype(float).tolist() == [[0, 1, 1]]


def test_text_reaches_a_model_of_text() -> None:
    (sample,) = samples({"x": np.array([["a", "b", "c"]])}, spec(object))
    assert sample["x"].tolist() == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("array", "wanted", "message"),
    [
        (np.ones((1, 3)), np.int64, "float64 does not convert to int64 without loss"),
        (np.ones((1, 3), complex), np.float32, "complex128 does not convert to float32"),
        (np.array([["a", "b", "c"]]), np.float32, "does not convert to float32"),
        (np.array([[None, 1, 2]]), np.float32, "holds Python objects, expected float32"),
        (np.ones((1, 3), "V4"), np.float32, "void32 does not convert to float32"),
        (np.ones((1, 3), "V3"), ml_dtypes.bfloat16, "void24 does not convert to bfloat16"),
        (np.array([[0, 1, 256]]), np.uint8, r"values from 0 to 256 do not fit uint8 \(0 to 255\)"),
        (np.array([[0, 1, 2]]), bool, r"values from 0 to 2 do not fit bool \(0 to 1\)"),
        (np.array([[0, np.nan, 1]]), np.float32, "holds NaN or infinity"),
        (np.array([[0, -np.inf, 1]]), np.float32, "holds NaN or infinity"),
        (np.array([[0, 1e6, 1]]), np.float16, "values too large for float16"),
        (np.array([[0, 1e6, 1]]), ml_dtypes.float8_e4m3fn, "values too large for float8_e4m3fn"),
        (np.array([[0, 10**6, 1]]), np.float16, "values too large for float16"),
    ],
)
def test_dtypes_and_values_that_do_not_fit(array: np.ndarray, wanted: object, message: str) -> None:
    with pytest.raises(DataError, match=f"^list, item 0: input 'x': .*{message}"):
        samples({"x": array}, spec(wanted))


def test_a_bad_value_is_found_in_its_sample() -> None:
    with pytest.raises(DataError, match="list, item 0, sample 2: input 'x': holds NaN"):
        samples({"x": np.array([[0, 0, 0], [1, 1, 1], [2, np.nan, 2]])})


@pytest.mark.parametrize(
    ("shape", "got"), [((1, 4), r"\[1, 4\]"), ((1, 1, 1, 3), r"\[1, 1, 1, 3\]"), ((2,), r"\[1, 2\]"), ((), r"\[\]")]
)
def test_shapes_that_do_not_fit(shape: tuple[int, ...], got: str) -> None:
    with pytest.raises(DataError, match=rf"input 'x' expects shape \[N, 3\], got {got}"):
        samples({"x": np.ones(shape)})


def test_without_a_batch_axis_every_static_dim_counts() -> None:
    inputs = (spec(shape=(2, 3)), spec(shape=(), name="scale"))
    assert samples({"x": np.ones((2, 3)), "scale": 1.0}, *inputs)[0]["x"].shape == (2, 3)
    with pytest.raises(DataError, match=r"expects shape \[2, 3\], got \[1, 3\]"):
        samples({"x": np.ones((1, 3)), "scale": 1.0}, *inputs)
    with pytest.raises(DataError, match=r"input 'scale' expects shape \[\], got \[1\]"):
        samples({"x": np.ones((2, 3)), "scale": [1.0]}, *inputs)


def test_lengths_along_the_batch_axis() -> None:
    with pytest.raises(DataError, match=r"differ in their number of samples \(axis 0\): 'x' 4, 'y' 1"):
        samples({"x": np.ones((4, 3)), "y": np.ones(3)}, spec(), spec(name="y"))
    with pytest.raises(DataError, match="axis 0 is empty"):
        samples({"x": np.ones((0, 3))})


def test_names_that_do_not_fit() -> None:
    with pytest.raises(
        DataError, match=r"no array for input 'x' \(float32 \[N, 3\]\), got 'image'; unknown .* 'image'"
    ):
        samples({"image": np.ones((1, 3))})
    with pytest.raises(DataError, match=r"no array for input 'x' .*got nothing"):
        samples({})
    with pytest.raises(DataError, match="the model has no input 'labels'; its inputs are 'x'"):
        samples({"x": np.ones((1, 3)), "labels": np.ones(1)})


def test_ragged_lists_are_no_arrays() -> None:
    with pytest.raises(DataError, match="input 'x': list is not an array"):
        samples({"x": [[1, 2, 3], [1]]})


def test_unknown_dims_print_as_question_marks() -> None:
    assert str(spec(shape=(None, "seq", 3))) == "float32 [?, seq, 3]"

"""Data given in Python: iterables, a real DataLoader, a real CalibrationDataReader."""

from __future__ import annotations

from collections import UserDict
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from onnxlr.data import TensorSpec, open_data, split
from onnxlr.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

X = TensorSpec("x", np.dtype(np.float32), ("N", 2))
IDS = TensorSpec("ids", np.dtype(np.int64), ("N",))


def rows(*numbers: float) -> np.ndarray:
    return np.array([[number, 0] for number in numbers], np.float32)


def values(source: object, *inputs: TensorSpec) -> list[float]:
    data = open_data(source, inputs or (X,))
    found = [float(sample["x"][0, 0]) for sample in data]
    assert found == [float(sample["x"][0, 0]) for sample in data]
    return found


class Stream:
    """An iterable that starts anew and counts its passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self.passes += 1
        return ({"x": rows(number)} for number in range(3))


def test_iterables_and_iterators() -> None:
    feeds = [{"x": rows(1)}, {"x": rows(2, 3)}]
    assert values(feeds) == [1, 2, 3]
    assert values(iter(feeds)) == [1, 2, 3]
    assert values(feed for feed in feeds) == [1, 2, 3]
    assert values([UserDict(feed) for feed in feeds]) == [1, 2, 3]
    stream = Stream()
    assert values(stream) == [0, 1, 2]
    assert stream.passes == 2


def test_one_feed_one_array_and_tuples() -> None:
    assert values({"x": rows(1, 2)}) == [1, 2]
    assert values(rows(1, 2)) == [1, 2]
    assert values([(rows(1, 2), np.array([7, 8]), "ignored")], X, IDS) == [1, 2]
    assert values([[rows(3), [9]]], X, IDS) == [3]


def test_a_data_set_is_returned_as_it_is() -> None:
    data = open_data([{"x": rows(1)}], [X])
    assert open_data(data, [X]) is data
    assert data.name == "list"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "data of type int cannot be read; give a path, an iterable of feeds"),
        (b"bytes", "data of type bytes cannot be read"),
        (["a.npz"], "list, item 0: is a str, expected a mapping"),
        ([None], "list, item 0: is a NoneType, expected a mapping"),
        ([], "list: gave no samples"),
        (iter([]), "iterator: gave no samples"),
        ([{"x": [object(), object()]}], "list, item 0: input 'x': holds Python objects"),
    ],
)
def test_sources_that_are_none(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(open_data(source, [X]))


def test_too_few_elements() -> None:
    with pytest.raises(DataError, match=r"list, item 0: 1 arrays for 2 inputs \('x', 'ids'\)"):
        list(open_data([(rows(1),)], [X, IDS]))


def test_the_passes_of_an_exhausted_iterable_do_not_end_in_silence() -> None:
    class Exhausted:
        feeds = iter([{"x": rows(1)}])

        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            return self.feeds

    data = open_data(Exhausted(), [X])
    assert len(list(data)) == 1
    with pytest.raises(DataError, match=r"Exhausted: gave no samples; expected .* anew on every pass"):
        list(data)


def test_torch_data_loader() -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data
    x, labels = torch.arange(10, dtype=torch.float64).reshape(5, 2).requires_grad_(), torch.arange(5)
    tuples = data.DataLoader(data.TensorDataset(x.detach(), labels), batch_size=2)
    assert values(tuples) == values(tuples, X, IDS) == [0, 2, 4, 6, 8]
    assert values([x]) == [0, 2, 4, 6, 8]
    dicts = data.DataLoader([{"x": row, "ids": label} for row, label in zip(x.detach(), labels, strict=True)], 3)
    assert values(dicts, X, IDS) == [0, 2, 4, 6, 8]
    assert values(iter(dicts), X, IDS) == [0, 2, 4, 6, 8]
    plain = data.DataLoader(x.detach().float(), batch_size=None)
    assert values(plain) == [0, 2, 4, 6, 8]
    assert [index for index, _ in split(open_data(plain, [X]), 2)[1].indexed()] == [1, 3]
    assert values([{"x": x.to(torch.bfloat16)}], TensorSpec("x", np.dtype(ml_dtypes.bfloat16), (None, 2)))[-1] == 8
    with pytest.raises(DataError, match="DataLoader, item 0: the model has no input 'ids'"):
        values(dicts)
    with pytest.raises(DataError, match=r"draws its samples with a RandomSampler.*shuffle=False"):
        values(data.DataLoader(x.detach(), shuffle=True))
    rows = data.BatchSampler(data.RandomSampler(range(5)), 2, drop_last=False)
    with pytest.raises(DataError, match=r"draws its samples with a RandomSampler.*shuffle=False"):
        values(data.DataLoader(x.detach(), batch_sampler=rows))


def test_onnxruntime_calibration_data_reader() -> None:
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([{"x": rows(1)}, {"x": rows(2, 3)}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    class Again(Once):
        rewound = 0

        def rewind(self) -> None:
            self.rewound += 1
            self.__init__()  # type: ignore[misc]

    assert values(Once()) == [1, 2, 3]
    reader = Again()
    assert values(reader) == [1, 2, 3]
    assert reader.rewound == 2
    assert open_data(reader, [X]).name == "Again"

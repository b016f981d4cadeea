"""Data given in Python: iterables of feeds, torch's DataLoader, onnxruntime's CalibrationDataReader.

All are known by what they can do, so neither library is imported:

    get_next(), and rewind() where the reader has it    a CalibrationDataReader
    __iter__ without __next__                           an iterable, begun anew for every pass
    __next__                                            an iterator, which can be read only once

An item is a mapping from input names to arrays, or a tensor, tuple or list whose elements map onto the inputs in their
order; elements beyond the inputs (labels) are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxlr.data.spec import TensorSpec, names
from onnxlr.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable


def is_one_shot(source: object) -> bool:
    """Whether a source can be read only once: an iterator, or a reader that cannot rewind."""
    if hasattr(source, "get_next"):
        return not hasattr(source, "rewind")
    return isinstance(source, Iterator)


def open_python(
    source: object, inputs: Sequence[TensorSpec]
) -> Callable[[], Iterator[tuple[str, Mapping[str, object]]]]:
    """Return a function that starts a pass over the source and yields `(where, feed)`.

    Raises DataError where the source is no iterable of feeds, or a DataLoader that shuffles; the returned function
    where an item does not map onto the inputs.
    """
    name = type(source).__name__
    if isinstance(source, (str, bytes)) or not (hasattr(source, "get_next") or isinstance(source, Iterable)):
        raise DataError(
            f"data of type {name} cannot be read; give a path, an iterable of feeds ({{input name: array}}), "
            "a DataLoader or a CalibrationDataReader"
        )
    _refuse_shuffling(source)

    def read() -> Iterator[tuple[str, Mapping[str, object]]]:
        for index, item in enumerate(_items(source)):
            where = f"{name}, item {index}"
            yield where, _feed(item, inputs, where)

    return read


def _items(source: Any) -> Iterable[object]:
    """Start a pass."""
    if hasattr(source, "get_next"):
        return _drain(source)
    return [source] if isinstance(source, Mapping) else source


def _drain(reader: Any) -> Iterator[object]:
    if hasattr(reader, "rewind"):
        reader.rewind()
    while (feed := reader.get_next()) is not None:
        yield feed


def _refuse_shuffling(source: object) -> None:
    # Every pass would come in another order: held-out samples would be calibrated on, labels would not match.
    batch_sampler = getattr(source, "batch_sampler", None)
    for sampler in (getattr(source, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if "Random" in type(sampler).__name__:
            raise DataError(
                f"{type(source).__name__} draws its samples with a {type(sampler).__name__}, in another order on every "
                "pass, which mixes held-out samples with calibration; make it with shuffle=False"
            )


def _feed(item: object, inputs: Sequence[TensorSpec], where: str) -> Mapping[str, object]:
    if isinstance(item, Mapping):
        return item
    if isinstance(item, (str, bytes)) or item is None:
        raise DataError(f"{where}: is a {type(item).__name__}, expected a mapping of input names to arrays, or arrays")
    values = item if isinstance(item, (tuple, list)) else (item,)
    if len(values) < len(inputs):
        raise DataError(
            f"{where}: {len(values)} arrays for {len(inputs)} inputs ({names(inputs)}); give one an input, in order"
        )
    return {spec.name: value for spec, value in zip(inputs, values, strict=False)}

"""ONNX test data: folders `test_data_set_0`, `test_data_set_1`, ... of `input_0.pb`, `input_1.pb`, ... TensorProtos.

This is the layout of the ONNX model zoo and of onnx's own backend tests. Tensors that all have the names of inputs are
those, others are in the order of the inputs. The folders' `output_*.pb` are not read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from onnxlr.data.spec import Array, TensorSpec, names
from onnxlr.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_SET = re.compile(r"test_data_set_(\d+)")
_INPUT = re.compile(r"input_(\d+)\.pb")


def find_sets(folder: Path) -> list[Path]:
    """Return the test data sets in a folder by number, the folder itself where it is one, else an empty list."""
    sets = _numbered((path for path in folder.iterdir() if path.is_dir()), _SET)
    if not sets and _numbered(folder.iterdir(), _INPUT):
        return [folder]
    return sets


def read_sets(folders: Iterable[Path], inputs: Sequence[TensorSpec]) -> Iterator[tuple[str, Mapping[str, Array]]]:
    """Yield `(where, feed)` for each test data set.

    Raises DataError where the number of files is not that of the model's inputs, or a file is not a TensorProto.
    """
    for folder in folders:
        files = _numbered(folder.iterdir(), _INPUT)
        if len(files) != len(inputs):
            raise DataError(
                f"{folder}: {len(files)} files input_*.pb, the model has {len(inputs)} inputs ({names(inputs)}); "
                "expected one file an input, in their order"
            )
        read = [_read_tensor(file) for file in files]
        named = dict(read)
        if named.keys() != {spec.name for spec in inputs}:
            named = {spec.name: array for spec, (_, array) in zip(inputs, read, strict=True)}
        yield str(folder), named


def _numbered(paths: Iterable[Path], pattern: re.Pattern[str]) -> list[Path]:
    matched = [(int(match[1]), path) for path in paths if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(matched)]


def _read_tensor(path: Path) -> tuple[str, Array]:
    """Its name, and its values."""
    import onnx
    from onnx import numpy_helper

    try:
        tensor = onnx.TensorProto.FromString(path.read_bytes())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("its values are in another file")
        array = numpy_helper.to_array(tensor)
    except Exception as error:
        # protobuf's decoding error is not an OSError or ValueError, and to_array raises a dozen kinds.
        raise DataError(f"{path}: cannot be read as a TensorProto ({error}); it is damaged or no tensor") from error
    return tensor.name, array

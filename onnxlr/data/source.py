"""Opening data: looks at what it is given, finds the reader, and checks what can be checked before the first sample.

a folder   test_data_set_* or input_*.pb    ONNX test data
           one kind of .npz, .npy, images   one file after another, sorted by path; images recursively
           .json and none of these          Polygraphy inputs, one feed a file
a file     .npz .npy .json .py              arrays, Polygraphy inputs, a script with load_data()
in Python  anything else                    see python_data
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onnxlr.data.arrays import read_npy, read_npz
from onnxlr.data.dataset import Dataset, Deferred
from onnxlr.data.fit import cut
from onnxlr.data.images import SUFFIXES, ImageOptions, ImageReader
from onnxlr.data.onnx_data import find_sets, read_sets
from onnxlr.data.polygraphy_data import load_script, read_json
from onnxlr.data.python_data import is_one_shot, open_python
from onnxlr.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from onnxlr.data.spec import Sample, TensorSpec

_IN_UNIT_RANGE = ImageOptions()


def open_data(source: object, inputs: Sequence[TensorSpec], *, images: ImageOptions = _IN_UNIT_RANGE) -> Dataset:
    """Open calibration data for a model.

    Parameters
    ----------
    source : path or Python object
        A path: a folder of `.npz`, `.npy` or images, a folder of ONNX test data, a `.npz` or `.npy` file, Polygraphy
        inputs (JSON), a Python script that defines `load_data()`. Or an iterable of feeds, a DataLoader, a
        CalibrationDataReader. Feeds with a larger batch are cut into samples. A Dataset is returned as it is.
    inputs : sequence of TensorSpec
        The model's inputs; every sample is checked against them and converted to their dtypes.
    images : ImageOptions
        How images become inputs; by default resized, cropped and scaled to [0, 1].

    Returns
    -------
    Dataset
        Read lazily and anew on every pass. A source that can be read only once is read into memory here.

    Raises
    ------
    DataError
        For data that do not exist or are of no known kind; while iterating, for the first sample that cannot be read
        or does not fit, and for data without any sample.
    ConfigError
        For image options that contradict the model's input.
    """
    if isinstance(source, Dataset):
        return source
    specs = list(inputs)
    if not specs:
        raise DataError("the model has no inputs, so there are no data to read for it")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _dataset(str(path), _open_path(path, specs, images))
    deferred = _cut_all(open_python(source, specs), specs)
    if is_one_shot(source):
        kept = [load() for load in deferred()]
        return _dataset(type(source).__name__, lambda: map(_loaded, kept))
    return _dataset(type(source).__name__, deferred)


def _open_path(path: Path, inputs: list[TensorSpec], images: ImageOptions) -> Callable[[], Iterator[Deferred]]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give calibration data that exist")
    if path.is_dir():
        return _open_folder(path, inputs, images)
    suffix = path.suffix.lower()
    if suffix == ".py":
        return _cut_all(load_script(path), inputs)
    if suffix not in (".npz", ".npy", ".json"):
        raise DataError(
            f"{path}: data of this kind cannot be read; expected .npz, .npy, .json (Polygraphy inputs), .py (a script "
            "with load_data()) or a folder"
        )
    return _open_files([path], suffix, inputs)


def _open_folder(folder: Path, inputs: list[TensorSpec], images: ImageOptions) -> Callable[[], Iterator[Deferred]]:
    if sets := find_sets(folder):
        return _cut_all(partial(read_sets, sets, inputs), inputs)
    found = {".npz": _files(folder.iterdir(), ".npz"), ".npy": _files(folder.iterdir(), ".npy")}
    found["images"] = _files(folder.rglob("*"), *SUFFIXES)
    kinds = {kind: files for kind, files in found.items() if files}
    if not kinds and (files := _files(folder.iterdir(), ".json")):
        kinds = {".json": files}
    if not kinds:
        state = "holds no data of a known kind" if any(folder.iterdir()) else "is an empty folder"
        raise DataError(
            f"{folder}: {state}; expected .npz, .npy, images ({', '.join(sorted(SUFFIXES))}), test_data_set_* "
            "or Polygraphy .json"
        )
    if len(kinds) > 1:
        counted = ", ".join(f"{len(files)} {kind}" for kind, files in kinds.items())
        raise DataError(
            f"{folder}: mixes kinds of data ({counted}); keep one kind, and labels, apart in their own folder"
        )
    kind, files = next(iter(kinds.items()))
    if kind == "images":
        reader = ImageReader(inputs, images)
        return lambda: (partial(reader, file) for file in files)
    return _open_files(files, kind, inputs)


def _open_files(files: list[Path], suffix: str, inputs: list[TensorSpec]) -> Callable[[], Iterator[Deferred]]:
    if suffix == ".json":
        return _cut_all(partial(read_json, files), inputs)
    return _cut_all(partial(read_npz if suffix == ".npz" else read_npy, files, inputs), inputs)


def _files(paths: Iterator[Path], *suffixes: str) -> list[Path]:
    """Return the files with these suffixes, hidden ones left out, sorted by path."""
    return sorted(p for p in paths if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file())


def _cut_all(
    read: Callable[[], Iterator[tuple[str, Mapping[str, object]]]], inputs: list[TensorSpec]
) -> Callable[[], Iterator[Deferred]]:
    return lambda: (_loaded(sample) for where, feed in read() for sample in cut(feed, inputs, where))


def _loaded(sample: Sample) -> Deferred:
    return lambda: sample


def _dataset(name: str, deferred: Callable[[], Iterator[Deferred]]) -> Dataset:
    def read() -> Iterator[tuple[int, Deferred]]:
        index = -1
        for index, load in enumerate(deferred()):
            yield index, load
        if index < 0:
            raise DataError(f"{name}: gave no samples; expected at least one, and anew on every pass over the data")

    return Dataset(name, read)

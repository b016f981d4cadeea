"""numpy files: `.npz` (one array an input, by name), `.npy` (models with one input) and files of labels.

Files written with pickle are refused: loading one can run any code.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxlr.data.fit import check_names
from onnxlr.data.spec import Array, TensorSpec, names
from onnxlr.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_BROKEN = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def read_npz(paths: Iterable[Path], inputs: Sequence[TensorSpec]) -> Iterator[tuple[str, Mapping[str, Array]]]:
    """Yield `(where, feed)` for each file; only the arrays of the model's inputs are read, others (labels) are not.

    Raises DataError for a file that cannot be read, holds pickled objects or lacks an input.
    """
    for path in paths:
        try:
            with _open_npz(path) as archive:
                check_names(archive.files, inputs, str(path), extra_ok=True)
                feed = {spec.name: archive[spec.name] for spec in inputs}
        except _BROKEN as error:
            raise _broken(path, error) from error
        yield str(path), feed


def read_npy(paths: Iterable[Path], inputs: Sequence[TensorSpec]) -> Iterator[tuple[str, Mapping[str, Array]]]:
    """Yield `(where, feed)` for each file, mapped into memory: a file larger than memory is read piece by piece.

    Raises DataError for a file that cannot be read, or where the model has more than one input.
    """
    for path in paths:
        if len(inputs) != 1:
            raise DataError(
                f"{path}: a .npy file holds one array but the model has {len(inputs)} inputs ({names(inputs)}); "
                "save .npz files with one array an input"
            )
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except _BROKEN as error:
            raise _broken(path, error) from error
        yield str(path), {inputs[0].name: array}


def load_labels(path: Path | str) -> Array:
    """Load labels in the order of the samples they belong to.

    Parameters
    ----------
    path : path
        `.npy`; `.npz` with one array; `.txt` or `.csv` with one number a line, an optional header and blank lines.

    Returns
    -------
    numpy.ndarray
        As stored from numpy files; from text `[n]`, int64 where every line is an integer, otherwise float64.

    Raises
    ------
    DataError
        For a file that does not exist, cannot be read, holds no labels or anything but finite numbers.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file of labels; expected .npy, .npz, .txt or .csv")
    suffix = file.suffix.lower()
    if suffix in (".txt", ".csv"):
        labels = _text_labels(file)
    elif suffix in (".npy", ".npz"):
        labels = _array_labels(file)
    else:
        raise DataError(
            f"{file}: labels cannot be read from {suffix or 'a file without suffix'}; expected .npy, .npz, .txt or .csv"
        )
    if labels.size == 0 or labels.ndim == 0:
        raise DataError(f"{file}: holds no labels; expected one for each sample")
    if labels.dtype.kind not in "biuf" or not np.isfinite(labels).all():
        raise DataError(f"{file}: labels must be finite numbers, got {labels.dtype.name}; remove NaN and infinity")
    return labels


def _array_labels(file: Path) -> Array:
    try:
        if file.suffix.lower() == ".npy":
            with file.open("rb") as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
        with _open_npz(file) as archive:
            if len(archive.files) != 1:
                listed = ", ".join(map(repr, archive.files)) or "none"
                raise DataError(f"{file}: expected one array, the labels, got {listed}; save them alone")
            array: Array = archive[archive.files[0]]
            return array
    except _BROKEN as error:
        raise _broken(file, error) from error


def _text_labels(file: Path) -> Array:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text ({error}); expected one number a line") from error
    rows = [(number, line.strip().rstrip(",")) for number, line in enumerate(lines, 1) if line.strip()]
    if rows and _number(rows[0][1]) is None and any(char.isalpha() for char in rows[0][1]):
        del rows[0]
    values: list[int | float] = []
    for number, text in rows:
        value = _number(text)
        if value is None:
            raise DataError(f"{file}, line {number}: {text!r} is not a number; expected one number a line")
        values.append(value)
    return np.array(values, dtype=np.int64 if all(isinstance(value, int) for value in values) else np.float64)


def _number(text: str) -> int | float | None:
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    return None


def _open_npz(path: Path) -> Any:
    # np.load takes a lone array or a pickle for what it is, whatever the suffix says.
    if not zipfile.is_zipfile(path):
        raise ValueError("not a zip archive")
    return np.load(path, allow_pickle=False)


def _broken(path: Path, error: Exception) -> DataError:
    # numpy has no class of error for this: "Object arrays cannot be loaded ...", "... Python objects in dtype".
    if "object" in str(error).lower() and isinstance(error, ValueError):
        return DataError(f"{path}: holds pickled Python objects, which are not loaded; save numeric arrays")
    return DataError(f"{path}: cannot be read as a numpy file ({error}); it is damaged or not what its name says")

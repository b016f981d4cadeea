"""Safetensors files that are written in a stream: one array in memory at a time.

The library writes a file only from all of its arrays at once. The format is eight bytes with the length of a JSON
header, that header, and the arrays one after another (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_ALIGNED = 64


def write_tensors(
    path: Path,
    metadata: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[NDArray[np.float64]],
) -> None:
    """Write float64 arrays of `shapes`, by name; `arrays` come in that order and are taken one at a time."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 8 * prod(shape)
        header[name] = {"dtype": "F64", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for shape, array in zip(shapes.values(), arrays, strict=True):
            assert array.shape == shape
            stream.write(np.ascontiguousarray(array, "<f8").data)


def map_tensors(path: Path) -> dict[str, NDArray[np.float64]]:
    """The arrays that `write_tensors` wrote, read from the file where they are looked at."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: np.memmap(path, "<f8", "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
        if prod(entry["shape"])
        else np.empty(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }

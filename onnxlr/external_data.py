"""Where a tensor's external data are: found, validated, and recognised when they change.

A model file is input from strangers: a reference must name an existing file inside the model's folder (no absolute
path, no `..`, no symbolic link out of it) that is long enough for the tensor's shape.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto

from onnxlr.errors import ExternalDataError, ModelError
from onnxlr.protos import tensors

if TYPE_CHECKING:
    import os

EXTERNAL_FROM = 1024
"""Tensors of at least so many bytes go to the data file, once a model has one."""
_PAGE, _LARGE, _SMALL_ALIGNMENT = 4096, 2**20, 64

Stamp = tuple[int, int, int]
"""What tells that a file is still the same one: inode, size, time of modification."""

PACKED_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in {
        "FLOAT6E2M3": 6,
        "FLOAT6E3M2": 6,
        "FLOAT4E2M1": 4,
        "INT4": 4,
        "UINT4": 4,
        "INT2": 2,
        "UINT2": 2,
    }.items()
    if hasattr(TensorProto, name)
}
"""Data types of less than a byte, as far as the installed onnx knows them: bits of one element."""


def is_external(tensor: TensorProto) -> bool:
    """Whether the tensor's values are in a file of their own."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def reference(tensor: TensorProto) -> dict[str, str]:
    """Location, offset, length and whatever else the tensor's external data come with, as text."""
    return {entry.key: entry.value for entry in tensor.external_data}


def stamp(status: os.stat_result) -> Stamp:
    """What to compare later, to know that a file did not change."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def aligned(offset: int, size: int) -> int:
    """Where a tensor of `size` bytes goes that is written next: large ones begin on a page, to be mapped."""
    return offset + -offset % (_PAGE if size >= _LARGE else _SMALL_ALIGNMENT)


def raw_bytes(tensor: TensorProto, where: str) -> int:
    """Bytes of the tensor's values when stored raw.

    Raises
    ------
    ModelError
        Its data type is unknown, or a dimension is negative.
    """
    count = int(math.prod(tensor.dims))
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"{where}: tensor {tensor.name!r} has a negative dimension: the file is damaged")
    if tensor.data_type in PACKED_BITS:
        return -(-count * int(PACKED_BITS[tensor.data_type]) // 8)
    if tensor.data_type == TensorProto.STRING:
        return sum(len(string) for string in tensor.string_data)
    try:
        return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except KeyError as error:
        raise ModelError(f"{where}: tensor {tensor.name!r} has the unknown data type {tensor.data_type}") from error


def inline_bytes(proto: onnx.ModelProto) -> int:
    """About how many bytes of values are inline: from the shapes, so it is cheap for any size."""
    return sum(raw_bytes(tensor, "the model") for tensor in tensors(proto) if not is_external(tensor))


def locate(folder: Path, tensor: TensorProto, where: str) -> tuple[Path, int, int]:
    """File, offset and length in bytes of a tensor's external data, all validated.

    Parameters
    ----------
    folder
        The model's folder.
    where
        What an error message names as the model.

    Raises
    ------
    ExternalDataError
        The file is missing, outside `folder` or too short, or the reference makes no sense.
    """
    entries = reference(tensor)
    location = entries.get("location", "")
    of = f"{where}: external data of tensor {tensor.name!r}"
    if not location or tensor.data_type == TensorProto.STRING:
        raise ExternalDataError(f"{of} name no file, or hold strings: export the model again")
    for flavour in (PurePosixPath(location), PureWindowsPath(location)):
        if flavour.is_absolute() or flavour.drive or ".." in flavour.parts:
            raise ExternalDataError(f"{of} lie outside its folder, at {location!r}: put all files in one folder")
    file = folder / location
    if not file.is_file():
        raise ExternalDataError(f"{of} are missing: {file} does not exist; it belongs beside the model")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ExternalDataError(f"{of} lie outside its folder: {file} is a symbolic link; copy the file itself there")
    needed = raw_bytes(tensor, where)
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", needed))
    except ValueError as error:
        raise ExternalDataError(f"{of} have an offset or length that is no number: export the model again") from error
    if offset < 0 or length < needed:
        raise ExternalDataError(
            f"{of} claim offset {offset} and {length} bytes, but its shape needs {needed}: export the model again"
        )
    if (size := file.stat().st_size) < offset + length:
        raise ExternalDataError(
            f"{of} are truncated: {file} has {size} bytes, expected at least {offset + length}; copy it again"
        )
    return file, offset, needed

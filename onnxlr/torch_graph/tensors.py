"""Between ONNX's element types, numpy's arrays and torch's tensors, without changing a bit of the values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from onnxlr.errors import DataError

DTYPES: dict[int, Any] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.BOOL: torch.bool,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
}
"""ONNX element types that torch computes with. It has no arithmetic for uint16, uint32 and uint64."""


def type_name(element: int) -> str:
    """ONNX's name of an element type, such as FLOAT8E4M3FN."""
    return str(TensorProto.DataType.Name(element)) if element in TensorProto.DataType.values() else str(element)


def to_tensor(array: Any, device: Any = None) -> torch.Tensor:
    """A copy of a numpy array (or ml_dtypes bfloat16) as a tensor of the same type and shape.

    Raises
    ------
    DataError
        torch has no such element type.
    """
    if isinstance(array, torch.Tensor):
        return array if device is None else array.to(device)
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        bits = torch.from_numpy(array.view(np.int16).copy())
        return bits.view(torch.bfloat16).to(device)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(array.copy()).to(device)
    except TypeError:
        raise DataError(f"a tensor of {array.dtype.name} values has no counterpart in torch") from None


def to_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The values of a tensor as a numpy array; bfloat16 as that of ml_dtypes."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def cast_refusal(to: int) -> str | None:
    """Why nothing can be cast to an element type; None where it can."""
    return None if to in DTYPES else f"to {type_name(to)}"


def ints(tensor: torch.Tensor | None) -> list[int]:
    """The values of a one-dimensional tensor (or a scalar) as integers; none for an input left out."""
    return [] if tensor is None else [int(value) for value in tensor.reshape(-1).tolist()]


def floats(tensor: torch.Tensor | None) -> list[float]:
    """The values of a one-dimensional tensor as floats; none for an input left out."""
    return [] if tensor is None else [float(value) for value in tensor.reshape(-1).tolist()]

"""The float32 self of a half-precision model: the same graph and weights, computed in float32.

What a float16 or bfloat16 model computes is off by its own rounding, whatever is done to it. The float32 self shows by
how much: it has every tensor of a half type as float32 in its place, in weights, constants, inputs, outputs, bodies of
If and Loop, local functions and wherever an operator names a type. Weights keep their values, which float32 holds
exactly; only what is computed from them is rounded less.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from onnxlr.data_file import DataFile
from onnxlr.errors import ModelError, OutputError
from onnxlr.external_data import is_external
from onnxlr.model_io import from_proto
from onnxlr.protos import PAYLOAD, copy_around_tensors, copy_fields, nodes, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from onnxlr.model_io import Model

HALF = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"})
"""Attributes that hold an element type, of Cast, the random operators, the windows and so on."""
BITWISE = frozenset({"BitCast"})
"""Operators whose result hangs on how a number is stored."""


def half_types(model: Model) -> frozenset[str]:
    """The half types, float16 and bfloat16, that any tensor of a model has."""
    stated = {tensor.data_type for tensor in tensors(model.proto)} | {element for element, _ in _types(model.proto)}
    return frozenset(name for element, name in HALF.items() if element in stated)


def widened(model: Model, data: DataFile | None = None) -> Model:
    """The float32 self of a model.

    Parameters
    ----------
    model
        The model.
    data
        Where its external data go, one tensor at a time. Without it those of a half type are in memory, in twice their
        bytes, and others stay where they are.

    Raises
    ------
    ModelError
        An operator reads the bits of half-precision numbers.
    ExternalDataError
        The weights cannot be read.
    """
    for node in nodes(model.proto):
        if node.op_type in BITWISE:
            raise ModelError(
                f"the model has no float32 self: {node.op_type} {node.name or node.output[0]!r} reads numbers by bits"
            )
    proto = onnx.ModelProto()

    def place(source: TensorProto, target: TensorProto) -> None:
        half, moved = source.data_type in HALF, data if is_external(source) else None
        if not half and moved is None:
            target.CopyFrom(source)
            return
        array = model.array(source).astype("<f4") if half else model.array(source)
        if moved is not None:
            target.CopyFrom(moved.put(source.name, array))
            return
        copy_fields(source, target, skip=PAYLOAD)
        target.data_type = TensorProto.FLOAT
        target.raw_data = array.tobytes()

    copy_around_tensors(model.proto, proto, place)
    for element, holder in _types(proto):
        if element in HALF:
            setattr(holder, _FIELDS[type(holder)], TensorProto.FLOAT)
    return from_proto(proto, model.folder if data is None else data.folder)


@contextmanager
def float32_self(model: Model) -> Iterator[Model]:
    """`widened`, for a session: the external data of a model go to a temporary file, until the session has mapped it.

    Raises
    ------
    ModelError, ExternalDataError
        As `widened`.
    OutputError
        The temporary folder cannot be written, or has no room for them.
    """
    if not model.external_files:
        yield widened(model)
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="onnxlr.")
    except OSError as error:
        raise OutputError(f"the temporary folder cannot be written: {error.strerror or error}") from error
    with folder as place, DataFile(Path(place)) as data:
        yield widened(model, data)


def widened_feed(feed: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """A feed of a model as its float32 self takes it."""
    return {
        name: array.astype(np.float32) if array.dtype.name in HALF.values() else array for name, array in feed.items()
    }


_FIELDS = {
    AttributeProto: "i",
    onnx.TypeProto.Tensor: "elem_type",
    onnx.TypeProto.SparseTensor: "elem_type",
}


def _types(proto: onnx.ModelProto) -> Iterator[tuple[int, Any]]:
    """Every element type that a model states outside its tensors, with the message that holds it."""
    scopes = [*_graphs(proto), *proto.functions]
    values = [value for scope in scopes for value in scope.value_info]
    values += [value for scope in _graphs(proto) for value in (*scope.input, *scope.output)]
    for value in values:
        yield from _elements(value.type)
    for node in nodes(proto):
        for attribute in node.attribute:
            if attribute.name in TYPE_ATTRIBUTES and attribute.type == AttributeProto.INT:
                yield attribute.i, attribute
            yield from _elements(attribute.tp)
            for kind in attribute.type_protos:
                yield from _elements(kind)


def _elements(kind: onnx.TypeProto) -> Iterator[tuple[int, Any]]:
    """The element types of a tensor, or of what a sequence, map or optional holds."""
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        holder = getattr(kind, which)
        yield holder.elem_type, holder
    elif which in ("sequence_type", "optional_type"):
        yield from _elements(getattr(kind, which).elem_type)
    elif which == "map_type":
        yield from _elements(kind.map_type.value_type)


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and all bodies, those in local functions too."""
    yield proto.graph
    for node in nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs

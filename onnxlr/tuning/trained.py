"""Which weights are trained, and how they come back into the graph.

"factors" are the initializers that the compressed model does not share with the dense one: factors, corrected biases,
narrowed layers. "all" are, beside them, the constants that operators learn: matrices, kernels, biases, scales of
normalisations, embeddings; not the other numbers of a graph (masks, rotary tables, epsilons).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from onnxlr.errors import ConfigError, ModelError
from onnxlr.metrics import is_floating
from onnxlr.model_io import Model, from_proto

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from numpy.typing import NDArray
    from onnx import TensorProto

    from onnxlr.config import Trained

_ANY = frozenset(range(8))
_LEARNED: dict[str, frozenset[int]] = {
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "TransposeMatMul", "FusedMatMulActivation", "Einsum"), _ANY),
    **dict.fromkeys(("Conv", "ConvTranspose", "LayerNormalization", "GroupNormalization", "InstanceNormalization",
                     "BatchNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), frozenset({1, 2})),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), frozenset({1, 2, 3})),
    "SkipLayerNormalization": frozenset({2, 3, 4}),
    "Attention": frozenset({1, 2}),
    "Gather": frozenset({0}),
    "PRelu": frozenset({1}),
}  # fmt: skip
"""The inputs of an operator that are learned; of Add and Mul it is those that are vectors."""


def trained_weights(student: Model, teacher: Model, which: Trained) -> list[str]:
    """Names of the initializers to train, in the order of the compressed model.

    Raises
    ------
    ConfigError
        There are none.
    """
    theirs = {tensor.name: tensor for tensor in teacher.proto.graph.initializer}
    learned = _learned(student.proto.graph) if which == "all" else set()
    names = [
        tensor.name
        for tensor in student.proto.graph.initializer
        if _floating(tensor)
        and (tensor.name in learned or not _same(student, tensor, teacher, theirs.get(tensor.name)))
    ]
    if not names:
        raise ConfigError(
            "the compressed model has no weight that the dense one does not have, so there is nothing to train: "
            "compress it first, or pass --train all"
        )
    return names


def with_weights(model: Model, arrays: Mapping[str, NDArray[Any]]) -> Model:
    """A copy of `model` with the values of some initializers replaced; shapes and element types stay.

    Raises
    ------
    ModelError
        No such initializer, or an array of another shape.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    places = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, array in arrays.items():
        tensor = places.get(name)
        if tensor is None or tuple(tensor.dims) != array.shape:
            found = "no initializer of this name" if tensor is None else f"one of shape {list(tensor.dims)}"
            raise ModelError(f"weight {name!r} {list(array.shape)} cannot go back into the graph: it has {found}")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, dtype), name))
    return from_proto(proto, model.folder)


def _floating(tensor: TensorProto) -> bool:
    return is_floating(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)) and np.prod(tensor.dims) > 1


def _learned(graph: onnx.GraphProto) -> set[str]:
    ranks = {tensor.name: len([dim for dim in tensor.dims if dim != 1]) for tensor in graph.initializer}
    names: set[str] = set()
    for node in graph.node:
        if node.op_type in ("Add", "Mul"):
            names.update(name for name in node.input if ranks.get(name) == 1)
        else:
            learned = _LEARNED.get(node.op_type, ())
            names.update(name for position, name in enumerate(node.input) if position in learned)
    return names & ranks.keys()


def _same(student: Model, ours: TensorProto, teacher: Model, theirs: TensorProto | None) -> bool:
    if theirs is None or ours.data_type != theirs.data_type or ours.dims != theirs.dims:
        return False
    return student.array(ours).tobytes() == teacher.array(theirs).tobytes()

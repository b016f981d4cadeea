"""The shapes of a model's tensors for one sample, found by running it.

Symbolic inference gives up on many exported graphs; a run never does. Every tensor that a matrix product reads or
writes gets a Shape operator, so that no activation leaves the session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnxlr.model_io import from_proto
from onnxlr.session import Session
from onnxlr.sites.macs import COUNTED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxlr.data import Feed, Sample, TensorSpec
    from onnxlr.model_io import Model

MEASURED = COUNTED | {"Gather"}
"""Operators whose tensors are measured: a Gather multiplies nothing, but the pair in its place does."""
IMAGE_SIDE, SEQUENCE_LENGTH = 224, 128
"""What a free axis is taken for when there is no data: those of an input of four axes for an image's, else a length."""


def measure_shapes(model: Model, sample: Sample, *, provider: str = "cpu") -> dict[str, tuple[int, ...]]:
    """The shapes, for `sample`, of all tensors that the operators `MEASURED` of the main graph read or write.

    Raises
    ------
    ModelError
        The model cannot run on `sample`.
    """
    nodes = [node for node in model.proto.graph.node if node.op_type in MEASURED]
    read = dict.fromkeys(name for node in nodes for name in (*node.input, *node.output) if name)
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.proto.graph.initializer if tensor.name in read}
    # a session that gives out shapes of weights keeps a second copy of them all
    tensors = [name for name in read if name not in stored]
    if not tensors:
        return stored
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    names = {tensor: f"onnxlr.shape/{index}" for index, tensor in enumerate(tensors)}
    del proto.graph.output[:]
    for tensor, name in names.items():
        proto.graph.node.append(onnx.helper.make_node("Shape", [tensor], [name]))
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    probed = from_proto(proto, model.folder)
    found = Session(probed, provider=provider, streaming=True, optimize=False).run(sample)
    return stored | {tensor: tuple(int(length) for length in found[name]) for tensor, name in names.items()}


def synthetic_sample(inputs: Sequence[TensorSpec], batch: int = 1) -> Feed:
    """Samples for want of data: `batch` where that is free, other axes at a usual length; normal numbers or ones."""
    generator = np.random.default_rng(0)
    sample = {}
    symbols: dict[str, int] = {}
    for spec in inputs:
        free = IMAGE_SIDE if len(spec.shape) == 4 else SEQUENCE_LENGTH
        shape = []
        for axis, length in enumerate(spec.shape):
            usual = batch if axis == 0 else free
            if isinstance(length, str):
                shape.append(symbols.setdefault(length, usual))
            else:
                shape.append(length or usual)
        # ones are valid as token ids, masks, lengths and flags alike
        whole = spec.dtype.kind in "iub"
        sample[spec.name] = (np.ones(shape) if whole else generator.standard_normal(shape)).astype(spec.dtype)
    return sample

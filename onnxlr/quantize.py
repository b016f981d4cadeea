"""Fewer bits for what is left: 8-bit integers or half precision, by onnxruntime's own tools.

int8
    Weights of MatMul and Gemm in 8 bits with a scale for every column, activations in 8 bits with a scale found at each
    run. Unsigned weights: with signed ones, processors without VNNI add two products in 16 bits, which saturates.
int8-static
    The same operators and Conv with scales of activations from calibration data, as QuantizeLinear and DequantizeLinear
    (QDQ); weights signed, of 7 bits for the same reason.
fp16
    All weights and operators in half precision; inputs and outputs stay as they are.

Of a pair `h = x A, y = h B` the hidden features can be chosen freely: `(A Q) (Q^T B) = A B` for every orthogonal `Q`.
Where the factors are balanced, the first columns of `h` are far larger than the last, and 8 bits with one scale for all
of them leave the last few steps. A random `Q` makes all alike, and none an outlier, at no cost at run time. So pairs
are turned before they are quantized to 8 bits.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxlr.errors import ConfigError, ModelError, OnnxlrError, OutputError
from onnxlr.model_io import from_proto, load, save
from onnxlr.protos import opset_of
from onnxlr.session import import_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from onnxlr.config import Then
    from onnxlr.data import Feed
    from onnxlr.model_io import Model
    from onnxlr.sites import Weight

QUANTIZED = ("MatMul", "Gemm")
_MADE = frozenset({"DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear", "DequantizeLinear"})


class _Reader:
    """Feeds as onnxruntime's calibrator asks for them."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def quantize(model: Model, then: Then, feeds: Iterable[Feed]) -> Model:
    """`model` with fewer bits, in memory; the model itself is left as it is.

    Parameters
    ----------
    model
        A model of float32 weights.
    then
        "int8", "int8-static" or "fp16".
    feeds
        Calibration data for "int8-static"; the others read none.

    Raises
    ------
    ModelError
        onnxruntime's tools fail on the model, or find nothing in it to do.
    OutputError
        The temporary folder cannot be written.
    """
    import_onnxruntime()
    with tempfile.TemporaryDirectory(prefix="onnxlr.") as folder, _one_line(then):
        given, ready, done = (Path(folder, name) for name in ("given.onnx", "ready.onnx", "done.onnx"))
        if then == "fp16":
            save(model, given, check=False)
            from onnxruntime.transformers.float16 import convert_float_to_float16
            from onnxruntime.transformers.onnx_model import OnnxModel

            proto = convert_float_to_float16(onnx.load(given), keep_io_types=True)
            OnnxModel.graph_topological_sort(proto.graph)  # its Casts come last
        else:
            from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
            from onnxruntime.quantization.shape_inference import quant_pre_process

            save(turned(model), given, check=False)
            static = then == "int8-static"
            quant_pre_process(
                str(given), str(ready), skip_symbolic_shape=True, skip_optimization=not static,
                save_as_external_data=bool(model.external_files),
            )  # fmt: skip
            if static:
                quantize_static(
                    ready, done, _Reader(feeds), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
                    op_types_to_quantize=[*QUANTIZED, "Conv"], activation_type=QuantType.QUInt8,
                )  # fmt: skip
            else:
                quantize_dynamic(
                    ready, done, per_channel=True, weight_type=QuantType.QUInt8, op_types_to_quantize=[*QUANTIZED]
                )
            proto = load(done).proto
        _require_done(proto, then)
        del proto.metadata_props[:]
        proto.metadata_props.extend(model.proto.metadata_props)
        return from_proto(proto)


def require_quantizable(model: Model, weights: Iterable[Weight], then: Then) -> None:
    """Refuse before the work begins what onnxruntime's tools cannot do in the end.

    Raises
    ------
    ConfigError
        8 bits of weights that are not of float32, or by column of a model that is too old for it.
    """
    if then == "fp16":
        return
    others = sorted({weight.dtype for weight in weights} - {"float32"})
    if others:
        raise ConfigError(f"--then {then} takes weights of float32, and there are some of {others[0]}: leave it out")
    opset = opset_of(model.proto)
    if then == "int8-static" and opset < 13:
        raise ConfigError(
            f"--then int8-static needs operators of opset 13, the model has {opset}: convert it with "
            "onnx.version_converter, or use --then int8"
        )


def turned(model: Model) -> Model:
    """The same model with the hidden features of every plain pair turned by a random orthogonal matrix.

    Pairs are MatMuls with a constant, of float32 and of one reader each, whose result only such MatMuls read.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    constants = {
        one.name: one for one in graph.initializer if one.data_type == TensorProto.FLOAT and len(one.dims) == 2
    }
    reads = _reads(graph)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants and reads[node.input[1]] == 1:
            readers.setdefault(node.input[0], []).append(node)
    generator = np.random.default_rng(0)
    for node in graph.node:
        if node not in readers.get(node.input[0] if node.input else "", []):
            continue
        behind = readers.get(node.output[0], [])
        if not behind or len(behind) != reads[node.output[0]]:
            continue
        first = constants[node.input[1]]
        rotation = np.linalg.qr(generator.standard_normal((first.dims[1], first.dims[1])))[0]
        _replace(first, model.array(first) @ rotation)
        for other in behind:
            second = constants[other.input[1]]
            _replace(second, rotation.T @ model.array(second))
    return from_proto(proto, model.folder)


def _reads(graph: onnx.GraphProto) -> Counter[str]:
    """How often each name is read, by bodies of If and Loop and as an output too."""
    reads = Counter(output.name for output in graph.output)
    for node in graph.node:
        reads.update(node.input)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                reads.update(_reads(body))
    return reads


def _replace(tensor: TensorProto, values: np.ndarray[Any, Any]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))


def _require_done(proto: onnx.ModelProto, then: Then) -> None:
    if then == "fp16":
        done = any(one.data_type == TensorProto.FLOAT16 for one in proto.graph.initializer)
    else:
        done = any(node.op_type in _MADE for node in proto.graph.node)
    if not done:
        raise ModelError(f"--then {then}: onnxruntime's tool found nothing to convert: leave it out")


@contextmanager
def _one_line(then: Then) -> Iterator[None]:
    """What onnxruntime's tools raise and warn of, as one error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of every number that half precision rounds to its least
            yield
    except OnnxlrError:
        raise
    except OSError as error:
        raise OutputError(f"the temporary folder cannot be written: {error.strerror or error}") from error
    except Exception as error:  # whatever the tools raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"--then {then} fails on this model: {said}") from error

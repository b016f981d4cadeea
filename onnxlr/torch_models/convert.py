"""From a torch model to an ONNX file: `torch.export`, then torch's own exporter, and names that mean something.

The batch axis, axis 0 where all inputs share its length, is free and named `batch`. So is axis 1 of text, where all
inputs are integers [batch, sequence], if the model allows it; it is named `sequence`. Every other axis is as long as in
the example. A program that `torch.export` made before keeps the axes that it has.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim

from onnxlr.errors import ConfigError, ModelError
from onnxlr.model_io import load
from onnxlr.protos import nodes, opset_of
from onnxlr.torch_models.source import first_line, quietly

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx

    from onnxlr.model_io import Model
    from onnxlr.torch_models.source import TorchModel

Tensors = dict[str, torch.Tensor]

_TRACES = "pkg.torch.onnx.stack_trace"


@dataclass(frozen=True, slots=True)
class Converted:
    """An ONNX model, and feeds on which it is to agree with torch: the example, and others where axes are free."""

    model: Model
    feeds: tuple[Tensors, ...]


def convert(source: TorchModel, folder: Path, *, opset: int | None, fixed_batch: bool, external: bool) -> Converted:
    """Export a model to `folder`/model.onnx.

    Parameters
    ----------
    source
        The model and its example inputs.
    folder
        An empty folder, in which the model's external data stay.
    opset
        The version of ONNX's operators; torch's choice, when None.
    fixed_batch
        Keep the batch axis as long as it is in the example.
    external
        Write the weights as external data, without which a file cannot exceed 2 GB.

    Raises
    ------
    ModelError
        torch cannot export the model, with a free batch or at all, or not in this opset.
    ConfigError
        `fixed_batch` for a program, whose axes are decided.
    """
    if source.program is not None and fixed_batch:
        raise ConfigError(f"{source.name}: a .pt2 file has decided which axes are free: leave --fixed-batch out")
    free = {} if source.program else _free_axes(source.example, fixed_batch=fixed_batch)
    example = {name: resized(tensor, 0, 2) if _is_single(free, name, tensor) else tensor
               for name, tensor in source.example.items()}  # fmt: skip
    outputs = list(source.run(example))
    program = source.program or _trace(source, example, free)
    try:
        with quietly():
            exported = torch.onnx.export(
                program, dynamo=True, input_names=list(example), output_names=outputs, opset_version=opset,
                verbose=False,
            )  # fmt: skip
            assert exported is not None
            exported.save(folder / "model.onnx", external_data=external)
    except Exception as error:  # the exporter raises its own types and those of everything below it
        raise ModelError(f"torch cannot export {source.name} to ONNX: {first_line(error)}") from error
    model = load(folder / "model.onnx")
    written = opset_of(model.proto)
    if opset not in (None, written):
        raise ModelError(f"torch cannot write {source.name} in opset {opset}, only in {written}: leave --opset out")
    found = [value.name for value in model.proto.graph.output]
    if found != outputs:
        raise ModelError(f"{source.name}: torch returns {', '.join(outputs)}, its export {', '.join(found)}")
    limits = {str(symbol): (span.lower, span.upper) for symbol, span in program.range_constraints.items()}
    feeds = tuple(_feeds(model.proto.graph, example, limits if source.program else {}))
    _drop_stack_traces(model.proto)
    _rename_axes(model.proto, free or _free_axes(example, fixed_batch=False))
    return Converted(model, feeds)


def resized(tensor: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """A tensor of another length along one axis: cut off, or repeated from its start."""
    return tensor.index_select(axis, torch.arange(length, device=tensor.device) % tensor.shape[axis])


def _free_axes(example: Mapping[str, torch.Tensor], *, fixed_batch: bool) -> dict[str, dict[int, str]]:
    """The names of the axes that are to be free, by input and axis."""
    tensors = example.values()
    if not all(tensor.ndim for tensor in tensors) or len({len(tensor) for tensor in tensors}) != 1:
        return {}
    text = all(t.ndim == 2 and not t.is_floating_point() for t in tensors) and len({t.shape for t in tensors}) == 1
    axes = ({} if fixed_batch else {0: "batch"}) | ({1: "sequence"} if text else {})
    return dict.fromkeys(example, axes) if axes else {}


def _is_single(free: Mapping[str, Mapping[int, str]], name: str, tensor: torch.Tensor) -> bool:
    return 0 in free.get(name, {}) and len(tensor) == 1  # torch takes an axis of length 1 for a constant


def _trace(source: TorchModel, example: Tensors, free: Mapping[str, Mapping[int, str]]) -> Any:
    values = list(example.values())
    args, kwargs = tuple(values[: len(source.args)]), dict(zip(source.kwargs, values[len(source.args) :], strict=True))
    names = iter(example)
    # the sequence may be bound to a table of positions, the batch to nothing
    hints = {"batch": Dim.DYNAMIC, "sequence": Dim.AUTO}

    def axes(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(axes(item) for item in value)
        if isinstance(value, dict):
            return {key: axes(item) for key, item in value.items()}
        return {axis: hints[name] for axis, name in free.get(next(names), {}).items()}

    bound = inspect.signature(source.module.forward).bind(*args, **kwargs).arguments
    try:
        with quietly():
            return torch.export.export(
                source.module, args, kwargs, dynamic_shapes={name: axes(v) for name, v in bound.items()}, strict=False
            )
    except Exception as error:  # whatever the model's code raises while it is traced
        hint = "" if not free else " (with --fixed-batch the batch axis stays as it is in the example)"
        raise ModelError(f"torch.export cannot trace {source.name}: {first_line(error)}{hint}") from error


def _feeds(graph: onnx.GraphProto, example: Tensors, limits: Mapping[str, tuple[Any, Any]]) -> Iterator[Tensors]:
    """The example; a batch of one; and, where axes are free, one row more and about half the length of all else."""
    yield example
    shapes = {value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    lengths = {
        symbol: (axis, example[name].shape[axis])
        for name, symbols in shapes.items()
        for axis, symbol in enumerate(symbols)
        if symbol
    }
    one = {symbol: 1 if axis == 0 else length for symbol, (axis, length) in lengths.items()}
    other = {symbol: length + 1 if axis == 0 else length // 2 + 1 for symbol, (axis, length) in lengths.items()}
    for sizes in (one, other) if lengths else ():
        if all(low <= sizes[symbol] <= high for symbol, (low, high) in limits.items() if symbol in sizes):
            feed = dict(example)
            for name, symbols in shapes.items():
                for axis, symbol in enumerate(symbols):
                    if symbol:
                        feed[name] = resized(feed[name], axis, sizes[symbol])
            yield feed


def _rename_axes(proto: onnx.ModelProto, names: Mapping[str, Mapping[int, str]]) -> None:
    """Give torch's symbols (s77) the names of the axes that they stand for, wherever they occur."""
    symbols = {
        value.type.tensor_type.shape.dim[axis].dim_param: name
        for value in proto.graph.input
        for axis, name in names.get(value.name, {}).items()
    }
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda match: symbols.get(match[0], match[0]), dim.dim_param)


def _drop_stack_traces(proto: onnx.ModelProto) -> None:
    """They hold the paths of this machine."""
    for node in nodes(proto):
        kept = [entry for entry in node.metadata_props if entry.key != _TRACES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)

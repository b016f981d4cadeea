"""Where a run of a model may begin: at a tensor that the dense model has computed before.

What one weight's cut does to the outputs is measured with all others dense. All that comes before the weight is then as
it was, so a run may begin at the last waist before it (`onnxlr.waists`): on average that leaves half of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from onnxlr.liveness import consumed, initializer_names, needed
from onnxlr.model_io import from_proto
from onnxlr.waists import waists

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from onnx import GraphProto

    from onnxlr.model_io import Model


class Entrances:
    """Some waists of a graph.

    Parameters
    ----------
    graph
        The model's, its nodes in an order in which they can run.
    most
        How many there may be.

    Attributes
    ----------
    tensors
        Their names, in the order of the graph.
    """

    def __init__(self, graph: GraphProto, most: int) -> None:
        self._made = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
        found = [name for name in waists(graph, initializer_names(graph)) if _alone(graph, self._made[name])]
        chosen = np.linspace(0, len(found), most + 2)[1:-1].astype(int) if found and most > 0 else ()
        self.tensors = [found[index] for index in dict.fromkeys(chosen)]

    def before(self, outputs: Iterable[str]) -> str | None:
        """The last one that depends on none of the tensors `outputs`; None where there is none, or one is in a body."""
        first = min((self._made.get(name, -1) for name in outputs), default=-1)
        earlier = [name for name in self.tensors if self._made[name] < first]
        return earlier[-1] if earlier else None


def _alone(graph: GraphProto, place: int) -> bool:
    return len(graph.node[place].output) == 1


def part(model: Model, outputs: Sequence[str], given: str = "", values: Sequence[NDArray[np.generic]] = ()) -> Model:
    """What of a model makes `outputs`, from its inputs and from the tensor `given`, which is then an input.

    `values` are what that will be fed: axes in which they differ are free.
    """
    source = model.proto.graph
    proto = onnx.ModelProto(ir_version=model.proto.ir_version)
    proto.opset_import.extend(model.proto.opset_import)
    proto.functions.extend(model.proto.functions)
    graph = proto.graph
    graph.name = source.name
    rest = onnx.GraphProto()
    rest.node.extend(node for node in source.node if given not in node.output)
    graph.node.extend(needed(rest, outputs))
    known = {value.name: value for value in (*source.value_info, *source.output)}
    graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in outputs)
    read = consumed(graph.node, graph.output)
    graph.initializer.extend(tensor for tensor in source.initializer if tensor.name in read)
    graph.sparse_initializer.extend(tensor for tensor in source.sparse_initializer if tensor.values.name in read)
    graph.input.extend(value for value in source.input if value.name in read)
    if given:
        shapes = zip(*(array.shape for array in values), strict=True)
        axes = [sizes[0] if len(set(sizes)) == 1 else f"{given}.{axis}" for axis, sizes in enumerate(shapes)]
        element = helper.np_dtype_to_tensor_dtype(values[0].dtype)
        graph.input.append(helper.make_tensor_value_info(given, element, axes))
    return from_proto(proto, model.folder)

"""Linear operators in local functions that could not be inlined (`onnxlr.unfold`): they are listed, with the reason."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from onnxlr.protos import tensors, with_bodies
from onnxlr.sites.base import INDEX_TYPES, Refusal
from onnxlr.sites.macs import COUNTED

if TYPE_CHECKING:
    from collections.abc import Collection

    import onnx


def in_functions(model: onnx.ModelProto, operators: Collection[str]) -> tuple[list[Refusal], list[str]]:
    """Refusals for all nodes of a type in `operators` in functions, and the names of those that multiply.

    Every such node is listed, since its weight may be an argument; a matrix counts where it is a constant beside it.
    """
    refusals, multiplying = [], []
    for function in model.functions:
        stored = {
            node.output[0]: t
            for node in with_bodies(function.node)
            if node.op_type == "Constant"
            for t in tensors(node)
        }
        for node in with_bodies(function.node):
            name = node.name or (node.output[0] if node.output else "?")
            if node.op_type in COUNTED:
                multiplying.append(name)
            if node.op_type in operators:
                read = {value: stored[value] for value in node.input if value in stored}
                matrices = {s: t for s, t in read.items() if len(t.dims) > 1 and t.data_type not in INDEX_TYPES}
                parameters = sum(prod(tensor.dims) for tensor in matrices.values())
                reason = f"it is inside the function {function.name!r}: inline it"
                refusals.append(Refusal(name, node.op_type, reason, tuple(sorted(matrices)), parameters))
    return refusals, multiplying

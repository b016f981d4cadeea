"""One model out of many operators, of which an input chooses which run: what `onnxlr.latency` times.

A leaf is some copies of one operator, each with data or weights of its own. A tree of If operators leads to every leaf,
and to the same leaf without its operators, whose time is that of the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxlr.model_io import from_proto

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnx import GraphProto, NodeProto

    from onnxlr.data import Feed
    from onnxlr.model_io import Model

    Sizes = tuple[int, int]

_WORK = 10**8  # multiply-accumulates of one run, for which products are copied
_COPIES, _COPIED_BYTES = 32, 2**21  # at most, of one product
_MOVED, _MOVES = 2 * 10**6, 8  # elements of one run, for which Concats are copied, and how many at most
_MODEL_BYTES = 2**26  # weights of one model


@dataclass(frozen=True, slots=True)
class Leaf:
    """Copies of one operator, whose time goes to `sizes` of the table of `rows`.

    The operator reads data [rows, width] of all `widths`, and weights [widths[0], d_out] where `d_out` is not 0.
    """

    op: str
    rows: int
    sizes: Sizes
    widths: tuple[int, ...]
    d_out: int
    copies: int
    weight_bytes: int

    @classmethod
    def matmul(cls, rows: int, sizes: Sizes, itemsize: int) -> Leaf:
        d_in, d_out = sizes
        nbytes = d_in * d_out * itemsize
        copies = max(1, min(_COPIES, _WORK // (rows * d_in * d_out), _COPIED_BYTES // nbytes))
        return cls("MatMul", rows, sizes, (d_in,), d_out, copies, copies * nbytes)

    @classmethod
    def concat(cls, rows: int, sizes: Sizes) -> Leaf:
        _, features = sizes
        copies = max(1, min(_MOVES, _MOVED // (rows * features)))
        return cls("Concat", rows, sizes, (features - features // 2, features // 2), 0, copies, 0)

    def data(self, copy: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of what a copy reads: products the same, Concats each their own."""
        own = "" if self.d_out else f"/{copy}"
        return {f"x{self.rows}x{width}/{i}{own}": (self.rows, width) for i, width in enumerate(self.widths)}

    def nodes(self, prefix: str) -> tuple[list[NodeProto], list[str]]:
        """The copies and their results' names; their weights are to be called `prefix/w0` and so on."""
        results = [f"{prefix}/y{i}" for i in range(self.copies)]
        nodes = []
        for i, result in enumerate(results):
            if self.d_out:
                nodes.append(helper.make_node("MatMul", [*self.data(i), f"{prefix}/w{i}"], [result]))
            else:
                nodes.append(helper.make_node("Concat", list(self.data(i)), [result], axis=-1))
        return nodes, results


def tree(leaves: Sequence[Leaf], element: int) -> tuple[Model, Feed]:
    """A model that runs what its input `which` says, and a feed for the rest of its inputs.

    2 i are the copies of leaf i, and 2 i + 1 is the same without them. Only shapes leave the model, which cost the same
    in both and need no copies of data.
    """
    rng = np.random.default_rng(0)
    dtype = helper.tensor_dtype_to_np_dtype(element)

    def array(*shape: int, scale: float = 1.0) -> np.ndarray[Any, Any]:
        return (scale * rng.standard_normal(shape, np.float32)).astype(dtype)

    def graph(name: str, nodes: list[NodeProto], weights: Sequence[TensorProto]) -> GraphProto:
        out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.INT64, None)
        return helper.make_graph(nodes, name, [], [out], weights)

    def branch(low: int, high: int) -> GraphProto:
        """What runs where `low <= which < high`."""
        name = f"{low}-{high}"
        if high - low > 1:
            middle = (low + high) // 2
            nodes = [
                helper.make_node("Less", ["which", f"{name}/middle"], [f"{name}/below"]),
                helper.make_node(
                    "If", [f"{name}/below"], [f"{name}/out"],
                    then_branch=branch(low, middle), else_branch=branch(middle, high),
                ),
            ]  # fmt: skip
            return graph(name, nodes, [numpy_helper.from_array(np.asarray(middle, np.int64), f"{name}/middle")])
        leaf = leaves[low // 2]
        nodes, results = (
            leaf.nodes(name) if low % 2 == 0 else ([], [next(iter(leaf.data(i))) for i in range(leaf.copies)])
        )
        weights = [
            numpy_helper.from_array(array(leaf.widths[0], leaf.d_out, scale=leaf.widths[0] ** -0.5), f"{name}/w{i}")
            for i in range(leaf.copies if nodes and leaf.d_out else 0)
        ]
        shapes = [f"{name}/s{i}" for i in range(leaf.copies)]
        nodes += [helper.make_node("Shape", [y], [shape]) for y, shape in zip(results, shapes, strict=True)]
        return graph(name, [*nodes, helper.make_node("Concat", shapes, [f"{name}/out"], axis=0)], weights)

    whole = branch(0, 2 * len(leaves))
    data = {x: shape for leaf in leaves for i in range(leaf.copies) for x, shape in leaf.data(i).items()}
    whole.input.append(helper.make_tensor_value_info("which", TensorProto.INT64, []))
    # with free rows no shape is known before the run, and no product is left out for it
    whole.input.extend(helper.make_tensor_value_info(x, element, [None, width]) for x, (_, width) in data.items())
    proto = helper.make_model(whole, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return from_proto(proto), {x: array(*shape) for x, shape in data.items()}


def groups(leaves: Sequence[Leaf]) -> Iterator[list[Leaf]]:
    """The leaves, as many together as one model may hold."""
    group: list[Leaf] = []
    for leaf in leaves:
        if group and sum(other.weight_bytes for other in group) + leaf.weight_bytes > _MODEL_BYTES:
            yield group
            group = []
        group.append(leaf)
    if group:
        yield group

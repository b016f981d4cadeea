"""One model out of many operators, of which an input chooses which run: what `onnxlr.latency` times.

A leaf is some copies of one operator, each with data or weights of its own. A tree of If operators leads to every leaf,
and to the same leaf without its operators, whose time is that of the call.

Convolutions are timed as in the middle of a network, where onnxruntime hands data from one to the next in the layout of
its kernels, blocks of channels. Within a leaf it does so too, and reorders what enters it and what leaves. So such a
leaf begins with a narrow convolution, for which the data are reordered, and passes a single position of every result
on, by a MaxPool, which knows the layout. Both are there without the copies as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxlr.model_io import from_proto

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from onnx import GraphProto, NodeProto

    from onnxlr.data import Feed
    from onnxlr.model_io import Model
    from onnxlr.sites.convolution import Convolution

    Sizes = tuple[int, int]
    Shapes = dict[str, tuple[int, ...]]

_WORK = 10**8  # multiply-accumulates of one run, for which products are copied
_COPIES, _COPIED_BYTES = 32, 2**21  # at most, of one product
_CONVOLVED, _CONVOLUTIONS, _KERNEL_BYTES = 10**7, 8, 2**19  # the same of convolutions, of which many are timed
_MOVED, _MOVES = 2 * 10**6, 8  # elements of one run, for which Concats are copied, and how many at most
_MODEL_BYTES = 2**26  # weights of one model, and data of convolutions
_NARROW = 16  # channels: one block of any layout


@dataclass(frozen=True, slots=True)
class Body:
    """What is run: nodes, the names of their results, and their weights' shapes."""

    nodes: list[NodeProto]
    results: list[str]
    weights: Shapes


@dataclass(frozen=True, slots=True)
class Leaf:
    """Copies of one operator, whose time goes to `sizes` of the table of `over`: rows, or a convolution.

    Attributes
    ----------
    work
        Multiply-accumulates of a copy, or elements moved.
    nbytes
        What all of them take in a model.
    data
        What they read.
    body
        Makes what is run, under names that begin with the one given: the copies, or what is left without them.
    runs
        How many are made at once, of which the least counts.
    """

    over: int | Convolution
    sizes: Sizes
    copies: int
    work: int
    nbytes: int
    data: Shapes
    body: Callable[[str, bool], Body]
    runs: int = 1


def matmul(rows: int, sizes: Sizes, itemsize: int) -> Leaf:
    """Products of data [rows, d_in] with weights [d_in, d_out]."""
    work, nbytes = rows * prod(sizes), prod(sizes) * itemsize
    copies = max(1, min(_COPIES, _WORK // work, _COPIED_BYTES // nbytes))
    x = f"x{rows}x{sizes[0]}"

    def body(prefix: str, copied: bool) -> Body:
        names = [f"{prefix}/{i}" for i in range(copies)] if copied else []
        nodes = [helper.make_node("MatMul", [x, f"{name}/w"], [f"{name}/y"]) for name in names]
        return Body(nodes, _outputs(nodes) or [x] * copies, {f"{name}/w": sizes for name in names})

    return Leaf(rows, sizes, copies, work, copies * nbytes, {x: (rows, sizes[0])}, body)


def concat(rows: int, sizes: Sizes) -> Leaf:
    """Two halves each of [rows, features] one beside the other; `sizes` end with the features."""
    work = rows * sizes[1]
    copies = max(1, min(_MOVES, _MOVED // work))
    halves = [(f"x{rows}x{sizes[1]}/{i}/0", f"x{rows}x{sizes[1]}/{i}/1") for i in range(copies)]
    data: Shapes = {x: (rows, (sizes[1] + 1 - side) // 2) for pair in halves for side, x in enumerate(pair)}

    def body(prefix: str, copied: bool) -> Body:
        shown = enumerate(halves if copied else [])
        nodes = [helper.make_node("Concat", pair, [f"{prefix}/{i}/y"], axis=-1) for i, pair in shown]
        return Body(nodes, _outputs(nodes) or [x for x, _ in halves], {})

    return Leaf(rows, sizes, copies, work, 0, data, body)


def convolve(convolution: Convolution, sizes: Sizes, itemsize: int) -> Leaf:
    """Convolutions of the same data to weights of their own; `sizes` are the channels of each group."""
    c_in, c_out = sizes
    groups, kernel = convolution.groups, convolution.kernel
    attributes: dict[str, Any] = dict(convolution.attributes)
    transposed = convolution.op == "ConvTranspose"
    weight = ((c_in * groups, c_out) if transposed else (c_out * groups, c_in)) + kernel
    work = convolution.positions * prod(weight)
    copies = max(1, min(_CONVOLUTIONS, _CONVOLVED // work, _KERNEL_BYTES // (prod(weight) * itemsize)))
    shape = (convolution.samples, c_in * groups, *convolution.read)
    x, beyond = "x" + "x".join(map(str, shape)), max(convolution.read + convolution.written)
    ones = [1] * len(kernel)

    def body(prefix: str, copied: bool) -> Body:
        names = [f"{prefix}/{i}" for i in range(copies)] if copied else []
        narrow = f"{prefix}/narrow"
        weights = {f"{narrow}/w": (_NARROW, c_in * groups, *ones), **{f"{name}/w": weight for name in names}}
        nodes = [
            helper.make_node("Conv", [x, f"{narrow}/w"], [f"{narrow}/y"]),
            *(helper.make_node(convolution.op, [x, f"{name}/w"], [f"{name}/y"], **attributes) for name in names),
        ]
        made = [f"{narrow}/y"] * (1 if copied else copies + 1) + [f"{name}/y" for name in names]
        # by strides of their own: several pools of one result, and alike, would be made one
        pools = [
            helper.make_node("MaxPool", [y], [f"{prefix}/p{i}"], kernel_shape=ones, strides=[beyond + i] * len(ones))
            for i, y in enumerate(made)
        ]
        return Body([*nodes, *pools], _outputs(pools), weights)

    nbytes = (copies * prod(weight) + prod(shape)) * itemsize
    # the first brings back into the caches what other leaves put out of them, and a network of such layers keeps there
    return Leaf(convolution, sizes, copies, work, nbytes, {x: shape}, body, runs=2)


def _outputs(nodes: Sequence[NodeProto]) -> list[str]:
    return [node.output[0] for node in nodes]


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
        body = leaf.body(name, low % 2 == 0)
        weights = [
            # so that results are neither large nor small, in half precision too
            numpy_helper.from_array(array(*shape, scale=prod(shape) ** -0.25), weight)
            for weight, shape in body.weights.items()
        ]
        shapes = [f"{name}/s{i}" for i in range(len(body.results))]
        ends = [helper.make_node("Shape", [y], [shape]) for y, shape in zip(body.results, shapes, strict=True)]
        ends.append(helper.make_node("Concat", shapes, [f"{name}/out"], axis=0))
        return graph(name, body.nodes + ends, weights)

    whole = branch(0, 2 * len(leaves))
    data = {x: shape for leaf in leaves for x, shape in leaf.data.items()}
    whole.input.append(helper.make_tensor_value_info("which", TensorProto.INT64, []))
    # with free rows no shape is known before the run, and no product is left out for it
    whole.input.extend(helper.make_tensor_value_info(x, element, [None, *lengths]) for x, (_, *lengths) in data.items())
    ir, opset = (10, 22) if element == TensorProto.BFLOAT16 else (8, 17)  # the first with convolutions of that type
    proto = helper.make_model(whole, ir_version=ir, opset_imports=[helper.make_opsetid("", opset)])
    return from_proto(proto), {x: array(*shape) for x, shape in data.items()}


def groups(leaves: Sequence[Leaf]) -> Iterator[list[Leaf]]:
    """The leaves, as many together as one model may hold."""
    group: list[Leaf] = []
    for leaf in leaves:
        if group and sum(other.nbytes for other in group) + leaf.nbytes > _MODEL_BYTES:
            yield group
            group = []
        group.append(leaf)
    if group:
        yield group

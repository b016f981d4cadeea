"""Times of products and convolutions: what holds by construction, however fast or busy the machine is."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random
from onnx import AttributeProto, helper, numpy_helper

from onnxlr.errors import ConfigError, InstallError
from onnxlr.latency import LARGEST, Timings
from onnxlr.model_io import from_proto
from onnxlr.session import Session
from onnxlr.sites.convolution import Convolution
from onnxlr.timed_graph import convolve, tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnx import GraphProto, NodeProto, TensorProto

    from onnxlr.timed_graph import Leaf

ROWS, WIDTH = 40, 64
SQUARE = Convolution.of("Conv", (2, 0, 6, 7), (2, 0, 3, 4), (3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]})
KINDS = {
    "square": SQUARE,
    "column": SQUARE.halves()[0],
    "row": SQUARE.halves()[1],
    "point": SQUARE.pointwise(),
    "groups": Convolution.of("Conv", (2, 0, 6, 7), (2, 0, 2, 5), (3, 3), {"group": 2, "dilations": [2, 1]}),
    "line": Convolution.of("Conv", (1, 0, 9), (1, 0, 5), (3,), {"auto_pad": "SAME_UPPER", "strides": [2]}),
    "solid": Convolution.of("Conv", (1, 0, 4, 4, 4), (1, 0, 3, 3, 3), (2, 2, 2), {}),
    "transposed": Convolution.of(
        "ConvTranspose", (2, 0, 4, 4), (2, 0, 8, 8), (3, 3),
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1], "group": 2},
    ),
}  # fmt: skip


class Formula(Timings):
    """Times by a formula, which the interpolation has to give back."""

    def _time(self, leaves: Sequence[Leaf], *_: Any) -> list[float]:
        return [3 + leaf.sizes[0] / 2 + leaf.sizes[1] / 4 + leaf.sizes[0] * leaf.sizes[1] / 8 for leaf in leaves]


def nodes_of(graph: GraphProto) -> Iterator[tuple[NodeProto, dict[str, TensorProto]]]:
    """All nodes of a graph and of the bodies in it, with the weights beside them."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        yield node, weights
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


@pytest.fixture(scope="module")
def timings() -> Timings:
    timings = Timings(threads=1)
    timings.measure((ROWS, WIDTH, rank) for rank in range(1, 2 * WIDTH))
    return timings


def test_no_time_falls_as_a_layer_grows(timings: Timings) -> None:
    by_output = [timings.product(ROWS, WIDTH, rank) for rank in range(1, 2 * WIDTH)]
    by_input = [timings.product(ROWS, rank, WIDTH) for rank in range(1, 2 * WIDTH)]
    assert by_output[0] > 0
    assert all(a <= b for a, b in pairwise(by_output))
    assert all(a <= b for a, b in pairwise(by_input))
    moves = [timings.moved(ROWS, features) for features in range(1, 2 * WIDTH)]
    assert moves[0] > 0
    assert all(a <= b for a, b in pairwise(moves))


def test_times_are_in_one_unit_and_interpolated_linearly(timings: Timings) -> None:
    """Between two grid sizes a wider product costs its share of the step; so sums of products are sums of times."""
    narrow, middle, wide = (timings.product(ROWS, WIDTH, width) for width in (64, 80, 96))
    assert middle == (narrow + wide) / 2
    corners = [timings.product(ROWS, d_in, d_out) for d_in in (64, 96) for d_out in (64, 96)]
    assert timings.product(ROWS, 80, 80) == pytest.approx(sum(corners) / 4)


def test_kernels_compute_sixteen_columns_at_a_time(timings: Timings) -> None:
    assert timings.product(ROWS, WIDTH, 65) == timings.product(ROWS, WIDTH, 80)
    other = Timings(provider="CPUExecutionProvider", threads=1)
    assert other.product(ROWS, 16, 1) == other.product(ROWS, 16, 16)


def test_what_was_measured_stays(timings: Timings) -> None:
    sizes = [(ROWS, WIDTH, 48), (ROWS, 48, WIDTH), (ROWS, 17, 33)]
    before = [timings.product(*one) for one in sizes] + [timings.moved(ROWS, WIDTH)]
    timings.product(ROWS, 3 * WIDTH, 3 * WIDTH)
    timings.product(ROWS + 1, WIDTH, WIDTH)
    timings.moved(ROWS, 4 * WIDTH)
    assert [timings.product(*one) for one in sizes] + [timings.moved(ROWS, WIDTH)] == before


def test_beyond_the_grid_time_is_proportional() -> None:
    timings = Timings(threads=1)
    at = timings.product(1, 1, LARGEST)
    assert timings.product(1, 1, 2 * LARGEST) == pytest.approx(2 * at)
    deep = timings.product(1, LARGEST, 16)
    assert timings.product(1, 3 * LARGEST, 16) == pytest.approx(3 * deep)
    tall = timings.product(LARGEST, 16, 16)
    assert timings.product(2 * LARGEST, 16, 16) == pytest.approx(2 * tall)
    assert timings.moved(4 * LARGEST, 16) == pytest.approx(4 * timings.moved(LARGEST, 16))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_element_types(dtype: str) -> None:
    timings = Timings(threads=1, dtype=dtype)
    assert timings.product(ROWS, 16, 16) > 0
    assert timings.moved(ROWS, 16) > 0


def test_what_cannot_be_timed(timings: Timings) -> None:
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        Timings(dtype="int8")
    for sizes in ((0, 16, 16), (16, -1, 16), (16, 16, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            timings.product(*sizes)
    for rows, features in ((0, 16), (16, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            timings.moved(rows, features)
    with pytest.raises(ConfigError, match="at least 1"):
        timings.measure([(ROWS, WIDTH, WIDTH), (ROWS, WIDTH, 0)])
    with pytest.raises(InstallError, match="no Nonsense"):
        Timings(provider="Nonsense").product(1, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_is_timed_with_all_that_it_states(kind: str) -> None:
    convolution, sizes = KINDS[kind], (6, 10)
    leaf = convolve(convolution, sizes, 4)
    model, feed = tree([leaf], 1)
    ((name, shape),) = leaf.data.items()
    assert shape == (convolution.samples, 6 * convolution.groups, *convolution.read)
    assert feed[name].shape == shape
    found = [(node, weights) for node, weights in nodes_of(model.proto.graph) if node.op_type.startswith("Conv")]
    timed = [(node, weights) for node, weights in found if "narrow" not in node.output[0]]
    assert len(timed) == leaf.copies > 1
    assert len(found) == leaf.copies + 2  # a narrow one in the leaf and in what it is compared with
    arrays = []
    for node, weights in timed:
        stated = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        stated = {key: tuple(one) if isinstance(one, list) else one for key, one in stated.items()}
        known = {key: value.encode() if isinstance(value, str) else value for key, value in convolution.attributes}
        assert (node.op_type, node.input[0], stated) == (convolution.op, name, known)
        arrays.append(numpy_helper.to_array(weights[node.input[1]]))
        channels = (10, 6) if convolution.op == "Conv" else (6, 10)
        assert arrays[-1].shape == (channels[0] * convolution.groups, channels[1], *convolution.kernel)
    assert len({array.tobytes() for array in arrays}) == leaf.copies
    # the leaf tells how many samples each result has, and that a single position of it is passed on
    outputs = Session(model, threads=1).run({**feed, "which": np.asarray(0)})
    (ends,) = outputs.values()
    spatial = len(convolution.kernel)
    assert (
        ends.reshape(leaf.copies + 1, 2 + spatial)[1:].tolist()
        == [[convolution.samples, 10 * convolution.groups, *[1] * spatial]] * leaf.copies
    )
    node = helper.make_node(convolution.op, ["x", "w"], ["y"], **dict(convolution.attributes))
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", 1, list(shape))],
        [helper.make_tensor_value_info("y", 1, None)], [numpy_helper.from_array(arrays[0], "w")],
    )  # fmt: skip
    alone = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    assert Session(from_proto(alone), threads=1).run({"x": random(1, *shape)})["y"].shape[2:] == convolution.written


def test_no_time_falls_as_a_convolution_gets_more_channels() -> None:
    timings = Timings(threads=1)
    sizes = range(1, 40)
    timings.measure([(SQUARE, 16, size) for size in sizes] + [(SQUARE, size, 16) for size in sizes])
    by_output = [timings.product(SQUARE, 16, size) for size in sizes]
    by_input = [timings.product(SQUARE, size, 16) for size in sizes]
    assert by_output[0] > 0
    assert all(a <= b for a, b in pairwise(by_output))
    assert all(a <= b for a, b in pairwise(by_input))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 3000), st.integers(1, 3000))
def test_times_that_follow_the_formula_are_interpolated_exactly(kind: str, c_in: int, c_out: int) -> None:
    timings = Formula(threads=1)
    expected = 3 + c_in / 2 + c_out / 4 + c_in * c_out / 8
    assert timings.product(KINDS[kind], c_in, c_out) == pytest.approx(expected, rel=1e-12)
    padded = -(-c_out // 16) * 16
    expected = 3 + max(c_in, 8) / 2 + padded / 4 + max(c_in, 8) * padded / 8
    assert timings.product(ROWS, c_in, c_out) == pytest.approx(expected, rel=1e-12)


def test_many_positions_are_timed_on_fewer_samples() -> None:
    timings = Formula(threads=1)
    large = Convolution.of("Conv", (1, 0, 62, 66), (1, 0, 60, 64), (3, 3), {})  # 3,840 positions each
    assert timings.product(large.times(7), 8, 8) == 7 * timings.product(large, 8, 8)
    assert len(timings.to_dict()["products"]) == 1
    huge = Convolution.of("Conv", (3, 0, 100, 100), (3, 0, 98, 98), (3, 3), {})
    timings.product(huge, 8, 8)
    assert timings.to_dict()["products"][-1][0]["samples"] == 1
    small = Convolution.of("Conv", (1, 0, 10, 10), (1, 0, 8, 8), (3, 3), {})
    timings.product(small.times(8), 8, 8)
    assert timings.to_dict()["products"][-1][0]["samples"] == 8


def test_times_of_convolutions_come_back_from_their_document() -> None:
    timings = Formula(threads=1)
    timings.measure([*((kind, 8, 24) for kind in KINDS.values()), (ROWS, WIDTH, WIDTH)])
    document = timings.to_dict()
    assert json.loads(json.dumps(document)) == document
    assert sum(isinstance(over, dict) for over, *_ in document["products"]) == len(KINDS)
    other = Formula(threads=1)
    assert other.recall(document)
    assert sorted(map(str, other.to_dict()["products"])) == sorted(map(str, document["products"]))
    twice = {**document, "products": [[*entry[:3], 2 * entry[3]] for entry in document["products"]]}
    twice["reference"] = {runs: 2 * one for runs, one in document["reference"].items()}
    slower = Formula(threads=1)
    assert slower.recall(twice)
    assert slower.product(SQUARE, 8, 24) == timings.product(SQUARE, 8, 24)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convolutions_of_other_element_types(dtype: str) -> None:
    assert Timings(threads=1, dtype=dtype).product(SQUARE, 16, 16) > 0


def test_convolutions_between_no_channels_are_refused(timings: Timings) -> None:
    for sizes in ((0, 16), (16, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            timings.product(SQUARE, *sizes)

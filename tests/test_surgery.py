"""Edits of a graph: what was not edited stays byte for byte, what died by the edit goes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from onnxlr.errors import ModelError
from onnxlr.model_io import from_proto, load
from onnxlr.surgery import close_graph, open_graph

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import roundtrip

TEXT = """
<ir_version: 10, opset_import: ["" : 17, "com.example" : 2], domain: "here", model_version: 7, doc_string: "model",
 metadata_props: ["author": "someone"]>
g (float[n, 4] x, bool c) => (float[n, 4] y, float[n, 4] z)
<float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[4] unused = {1, 2, 3, 4},
 float[4] shared = {1, 2, 3, 4}, float[n, 4] h, float[4, 4] t>
{
    t = Transpose <perm = [1, 0]> (w)
    idle = Identity(shared)
    [first] h = MatMul(x, t)
    [second] y = Relu(h)
    z = If (c) <
        then_branch = yes () => (float[n, 4] a) { a = Add(h, shared) }
        , else_branch = no () => (float[n, 4] b) { b = Add(h, h) }
    >
}
"""


def rich() -> ModelProto:
    """A model with something of everything that onnx-graphsurgeon loses."""
    proto = parse_model(TEXT)
    graph = proto.graph
    for item in (graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        item.doc_string = f"about {item.name}"
        item.metadata_props.add(key="of", value=item.name)
    graph.input[0].type.denotation = "IMAGE"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.input.add().CopyFrom(helper.make_tensor_value_info("unused", TensorProto.FLOAT, [4]))
    graph.quantization_annotation.add(tensor_name="h")
    graph.quantization_annotation.add(tensor_name="x")
    packed = numpy_helper.from_array(np.arange(4).astype(ml_dtypes.int4), "packed")
    graph.initializer.append(packed)
    values = numpy_helper.from_array(np.ones(2, np.float32), "sparse")
    graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 3]), "indices"), [6])
    )
    custom = helper.make_node("Custom", ["packed", "", "sparse"], ["custom", ""], "custom", domain="com.example")
    custom.attribute.append(helper.make_attribute("types", helper.make_tensor_type_proto(1, [2])))
    custom.attribute.append(helper.make_attribute("nothing", [], attr_type=onnx.AttributeProto.INTS))
    custom.attribute.append(helper.make_attribute("numbers", [float("nan"), -0.0]))
    custom.attribute.append(helper.make_attribute("table", packed))
    graph.node.append(custom)
    proto.training_info.add().algorithm.name = "training"
    body = helper.make_node("Relu", ["i"], ["o"])
    function = helper.make_function("local", "f", ["i"], ["o"], [body], [helper.make_opsetid("", 17)])
    function.overload = "other"
    proto.functions.append(function)
    return proto


def serialized(proto: ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def node_of(graph: gs.Graph, output: str) -> gs.Node:
    return next(node for node in graph.nodes if node.outputs[0].name == output)


def replace_by_pair(graph: gs.Graph, output: str, dtype: type = np.float32) -> None:
    """MatMul(x, w) becomes MatMul(MatMul(x, A), B), the new nodes appended at the end."""
    node = node_of(graph, output)
    hidden = gs.Variable(f"{output}.hidden", np.dtype(dtype), ["n", 2])
    first = gs.Constant(f"{output}.A", np.ones((4, 2), dtype))
    second = gs.Constant(f"{output}.B", np.ones((2, 4), dtype))
    data, result = node.inputs[0], node.outputs[0]
    node.outputs.clear()
    graph.nodes.append(gs.Node("MatMul", f"{output}/1", inputs=[data, first], outputs=[hidden]))
    graph.nodes.append(gs.Node("MatMul", f"{output}/2", inputs=[hidden, second], outputs=[result]))


def names(items: object) -> list[str]:
    return [item.name for item in items]  # type: ignore[attr-defined]


def test_an_untouched_model_is_the_same_bytes() -> None:
    proto = rich()
    before = serialized(proto)
    graph = open_graph(proto)
    assert serialized(close_graph(graph, proto)) == before
    assert serialized(proto) == before


def test_values_that_were_only_looked_at_are_not_exported() -> None:
    proto = rich()
    graph = open_graph(proto)
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.attrs.values()):
            if isinstance(tensor, gs.Constant):
                assert tensor.values is not None
    assert serialized(close_graph(graph, proto)) == serialized(proto)


def test_replacing_a_matmul_changes_nothing_else() -> None:
    proto = rich()
    graph = open_graph(proto)
    replace_by_pair(graph, "h")
    result = close_graph(graph, proto)

    expected = rich()
    dead = {"t", "h"}
    kept = [node for node in expected.graph.node if node.output[0] not in dead]
    pair = [
        helper.make_node("MatMul", ["x", "h.A"], ["h.hidden"], "h/1"),
        helper.make_node("MatMul", ["h.hidden", "h.B"], ["h"], "h/2"),
    ]
    del expected.graph.node[:]
    expected.graph.node.extend([kept[0], *pair, *kept[1:]])
    weights = [tensor for tensor in expected.graph.initializer if tensor.name != "w"]
    del expected.graph.initializer[:]
    expected.graph.initializer.extend(weights)
    expected.graph.initializer.append(numpy_helper.from_array(np.ones((4, 2), np.float32), "h.A"))
    expected.graph.initializer.append(numpy_helper.from_array(np.ones((2, 4), np.float32), "h.B"))
    infos = [value for value in expected.graph.value_info if value.name != "t"]
    del expected.graph.value_info[:]
    expected.graph.value_info.extend(infos)
    expected.graph.value_info.append(helper.make_tensor_value_info("h.hidden", TensorProto.FLOAT, ["n", 2]))
    assert result == expected
    assert serialized(result) == serialized(expected)


def test_a_removed_node_takes_what_only_fed_it() -> None:
    proto = parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[4] x) => (float[4] y)
        <float[4] a = {1, 2, 3, 4}, float[4] b = {1, 2, 3, 4}, float[4] c = {1, 2, 3, 4}>
        {
            a1 = Identity(a)
            a2 = Neg(a1)
            b1 = Identity(b)
            a3 = Mul(a2, b1)
            never = Neg(c)
            side = Neg(b1)
            y = Add(x, a3)
        }
    """)
    graph = open_graph(proto)
    node_of(graph, "y").inputs.pop()
    node_of(graph, "y").op = "Neg"
    result = close_graph(graph, proto).graph
    # `side` never had a reader: it stays, and with it what it reads.
    assert [node.output[0] for node in result.node] == ["b1", "never", "side", "y"]
    assert names(result.initializer) == ["b", "c"]
    assert result.node[3].op_type == "Neg"


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fnuz, ml_dtypes.int4]
)
def test_new_constants_keep_their_dtype(dtype: type) -> None:
    proto = rich()
    graph = open_graph(proto)
    replace_by_pair(graph, "h", dtype)
    array = numpy_helper.to_array(close_graph(graph, proto).graph.initializer[-1])
    assert array.dtype == dtype
    assert (array.astype(np.float32) == 1).all()


def test_a_weight_that_a_body_reads_stays_outside() -> None:
    proto = rich()
    graph = open_graph(proto)
    graph.nodes.remove(node_of(graph, "idle"))
    result = close_graph(graph, proto).graph
    assert "shared" in names(result.initializer)
    assert result.node[-2] == proto.graph.node[-2]
    assert serialized(proto) == serialized(rich())


def test_a_weight_dies_with_the_body_that_read_it() -> None:
    proto = rich()
    graph = open_graph(proto)
    graph.nodes.remove(node_of(graph, "idle"))
    add = node_of(graph, "z").attrs["then_branch"].nodes[0]
    add.inputs[1] = gs.Constant("fresh", np.arange(4, dtype=np.float32))
    result = close_graph(graph, proto).graph
    assert "shared" not in names(result.initializer)
    assert names(result.initializer)[-1] == "fresh"
    branches = [attribute.g for attribute in result.node[-2].attribute]
    assert not branches[0].initializer
    assert list(branches[0].node[0].input) == ["h", "fresh"]
    assert branches[1] == proto.graph.node[-2].attribute[1].g
    assert result.node[-2].doc_string == proto.graph.node[-2].doc_string


def test_values_of_a_weight_that_only_a_body_reads_can_be_changed() -> None:
    proto = rich()
    graph = open_graph(proto)
    shared = node_of(graph, "z").attrs["then_branch"].nodes[0].inputs[1]
    shared.values = np.full(4, 9, np.float32)
    result = close_graph(graph, proto).graph
    new = result.initializer[2]
    assert names(result.initializer) == names(proto.graph.initializer)
    assert numpy_helper.to_array(new).tolist() == [9, 9, 9, 9]
    assert new.doc_string == "about shared"
    assert not result.node[-2].attribute[0].g.initializer


def test_before_ir_version_4_initializers_are_inputs_too() -> None:
    proto = rich()
    proto.ir_version = 3
    for name in ("w", "shared"):
        proto.graph.input.add().CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]))
    graph = open_graph(proto)
    replace_by_pair(graph, "h")
    result = close_graph(graph, proto).graph
    assert names(result.input) == ["x", "c", "unused", "shared", "h.A", "h.B"]
    assert result.input[0] == proto.graph.input[0]
    assert result.input[4] == helper.make_tensor_value_info("h.A", TensorProto.FLOAT, [4, 2])


def test_edited_nodes_keep_what_was_not_edited() -> None:
    proto = rich()
    graph = open_graph(proto)
    node = graph.nodes[-1]
    node.attrs["numbers"].append(1.5)
    node.attrs["more"] = 3
    node_of(graph, "t").attrs["perm"] = [0, 1]
    del node.attrs["table"]
    result = close_graph(graph, proto).graph
    old, new = proto.graph.node[-1], result.node[-1]
    assert [attribute.name for attribute in new.attribute] == ["types", "nothing", "numbers", "more"]
    assert new.attribute[0] == old.attribute[0]
    assert list(new.attribute[2].floats)[1:] == [0.0, 1.5]
    assert new.metadata_props == old.metadata_props
    assert list(new.input) == list(old.input)
    assert list(result.node[0].attribute[0].ints) == [0, 1]
    assert result.node[1:-1] == proto.graph.node[1:-1]


def test_inputs_and_outputs_can_be_added_and_weights_become_inputs() -> None:
    proto = rich()
    graph = open_graph(proto)
    matmul = node_of(graph, "h")
    weight = gs.Variable("weight", np.float32, [4, 4])
    graph.inputs.append(weight)
    graph.outputs.append(matmul.outputs[0])
    matmul.inputs[1] = weight
    result = close_graph(graph, proto).graph
    assert names(result.input) == ["x", "c", "unused", "weight"]
    assert names(result.output) == ["y", "z", "h"]
    assert result.output[2] == next(value for value in proto.graph.value_info if value.name == "h")
    assert "w" not in names(result.initializer)


def test_new_nodes_stand_where_their_inputs_are_made() -> None:
    proto = rich()
    graph = open_graph(proto)
    relu, h = node_of(graph, "y"), node_of(graph, "h").outputs[0]
    doubled, probe = gs.Variable("doubled"), gs.Variable("probe", np.float32, ["n", 4])
    graph.nodes.insert(0, gs.Node("Neg", inputs=[doubled], outputs=[probe]))
    graph.nodes.append(gs.Node("Add", inputs=[h, h], outputs=[doubled]))
    graph.outputs.append(probe)
    relu.inputs[0] = doubled
    result = close_graph(graph, proto).graph
    assert [node.output[0] for node in result.node] == ["t", "idle", "h", "doubled", "y", "z", "custom", "probe"]


def test_a_cycle_is_an_error() -> None:
    proto = rich()
    graph = open_graph(proto)
    node_of(graph, "h").inputs[0] = node_of(graph, "y").outputs[0]
    with pytest.raises(ModelError, match=r"has a cycle through node 'first' \(MatMul\)"):
        close_graph(graph, proto)


def test_external_weights_stay_references(tmp_path: Path) -> None:
    proto = rich()
    (tmp_path / "w.bin").write_bytes(bytes(64))
    for name in ("w", "shared"):
        weight = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="w.bin")
        weight.external_data.add(key="length", value=str(4 * int(np.prod(weight.dims))))
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    model = load(tmp_path / "model.onnx")
    graph = open_graph(model.proto)
    assert serialized(close_graph(graph, model.proto)) == serialized(proto)
    replace_by_pair(graph, "h")
    node_of(graph, "idle").inputs[0].values = np.ones(4, np.float32)
    result = from_proto(close_graph(graph, model.proto), tmp_path)
    assert names(result.proto.graph.initializer) == ["unused", "shared", "packed", "h.A", "h.B"]
    assert result.array(result.proto.graph.initializer[1]).tolist() == [1, 1, 1, 1]
    assert serialized(model.proto) == serialized(proto)


def test_an_unsorted_graph_keeps_its_order() -> None:
    proto = rich()
    nodes = list(proto.graph.node)[::-1]
    reordered = ModelProto()
    reordered.CopyFrom(proto)
    del reordered.graph.node[:]
    reordered.graph.node.extend(nodes)
    assert serialized(close_graph(open_graph(reordered), reordered)) == serialized(reordered)


def test_time_is_linear_in_the_nodes() -> None:
    nodes = [helper.make_node("Relu", [f"t{index}"], [f"t{index + 1}"], f"n{index}") for index in range(5000)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("t0", "t5000")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    start = time.perf_counter()
    opened = open_graph(proto)
    # The whole chain dies, and a new one stands in its place, written backwards.
    opened.nodes.clear()
    tensors = [opened.inputs[0], *(gs.Variable(f"s{index}") for index in range(4999)), opened.outputs[0]]
    for index in range(5000, 0, -1):
        opened.nodes.append(gs.Node("Neg", inputs=[tensors[index - 1]], outputs=[tensors[index]]))
    result = close_graph(opened, proto)
    assert time.perf_counter() - start < 10
    assert [node.output[0] for node in result.graph.node][:2] == ["s0", "s1"]
    assert len(result.graph.node) == 5000


def test_a_sample_of_real_models_is_lossless(tmp_path: Path) -> None:
    sample = roundtrip.backend_models()[::2][:60]
    assert len(sample) == 60
    assert {str(path): roundtrip.loss(load(path), tmp_path) for path in sample} == dict.fromkeys(map(str, sample))


@pytest.mark.slow
def test_all_of_onnx_own_models_are_lossless(capsys: pytest.CaptureFixture[str]) -> None:
    assert roundtrip.main([]) == 0, capsys.readouterr().out

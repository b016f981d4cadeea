"""An ONNX graph as a torch module: names, weights, inner tensors, gradients, bodies, refusals, parity."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

torch = pytest.importorskip("torch")

from onnxlr.errors import ModelError  # noqa: E402
from onnxlr.model_io import Model, from_proto  # noqa: E402
from onnxlr.torch_graph import (  # noqa: E402
    UnsupportedOperatorsError,
    find,
    float32_products,
    to_torch,
)

torch.set_num_threads(1)


def parsed(
    body: str, *, signature: str = "(float[N, 3] x) => (float[N, 3] y)", tail: str = "", **weights: Any
) -> Model:
    """A model from ONNX text; `tail` holds local functions."""
    text = (
        f'<ir_version: 9, opset_import: ["" : 17, "local" : 1, "com.microsoft" : 1]> g {signature} {{ {body} }} {tail}'
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items())
    return from_proto(proto)


X = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
EYE = np.eye(3, dtype=np.float32)


def test_a_tracked_input_becomes_a_leaf_and_the_feed_is_left_alone() -> None:
    graph = to_torch(parsed("y = Mul(x, x)"))
    found = graph({"x": X}, outputs=["x", "y"], track=["x"])
    (gradient,) = torch.autograd.grad(found["y"].sum(), found["x"])
    assert torch.equal(gradient, 2 * X)
    assert not X.requires_grad


def test_what_cannot_be_tracked() -> None:
    graph = to_torch(parsed("n = Shape(x) y = Expand(x, n)"))
    with pytest.raises(ModelError, match=r"tensor 'n' cannot be tracked, it is int64 \[2\]"):
        graph({"x": X}, track=["n"])
    with pytest.raises(ModelError, match="has no tensors 'z' to track"):
        graph({"x": X}, track=["z"])


def test_only_what_is_asked_for_runs() -> None:
    graph = to_torch(parsed("a = Relu(x) b = Reshape(a, bad) y = Add(b, x)", bad=np.int64([7, 7])))
    assert torch.equal(graph({"x": X}, outputs=["a"])["a"], X.relu())
    with pytest.raises(ModelError, match=r"Reshape of 'b' fails in torch on \(float32 \[2, 3\], int64 \[2\]\): "):
        graph({"x": X})


def test_tensors_are_freed_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = " ".join(f"a{i + 1} = Relu(a{i})" for i in range(20))
    graph = to_torch(parsed(f"a0 = Add(x, x) {chain} y = Add(a20, a20)"))
    alive: list[int] = []
    step = graph._step

    def counted(compiled: Any, scope: dict[str, Any], *rest: Any) -> Any:
        alive.append(len(scope))
        return step(compiled, scope, *rest)

    monkeypatch.setattr(graph, "_step", counted)
    assert torch.equal(graph({"x": X}, outputs=["a5", "y"])["y"], 4 * X.relu())
    assert len(alive) == 22
    assert max(alive) == 2


def test_sequences_inside_the_graph() -> None:
    body = "s = SplitToSequence<axis = 1, keepdims = 1>(x) a = SequenceAt(s, last) b = SequenceInsert(s, a) "
    graph = to_torch(parsed(body + "y = ConcatFromSequence<axis = 1>(b)", last=np.int64(-1)))
    assert torch.equal(graph({"x": X})["y"], torch.cat([X, X[:, 2:]], 1))


def test_weights_keep_their_names_and_are_shared() -> None:
    model = parsed(
        "a = MatMul(x, w) b = MatMul(a, w) c = Add(b, forward) y = Reshape(c, shape)",
        **{"layer.0.weight": 2 * EYE, "forward": np.ones(3, np.float32), "shape": np.int64([-1, 3])},
    )
    for node in model.proto.graph.node[:2]:
        node.input[1] = "layer.0.weight"  # no name that ONNX text can hold
    graph = to_torch(model)
    weights = dict(graph.named_weights())
    assert weights.keys() == {"layer.0.weight", "forward"}
    assert len(list(graph.parameters())) == 2
    assert [tuple(buffer.shape) for buffer in graph.buffers()] == [(2,)]
    assert not any(weight.requires_grad for weight in weights.values())
    assert not graph.training
    assert graph.weight("layer.0.weight") is weights["layer.0.weight"]
    assert torch.equal(graph({"x": X})["y"], 4 * X + 1)
    with torch.no_grad():
        weights["layer.0.weight"].mul_(0.5)
    assert torch.equal(graph({"x": X})["y"], X + 1)
    assert np.array_equal(model.array(model.proto.graph.initializer[0]), 2 * EYE)
    with pytest.raises(ModelError, match="no weight 'gone'"):
        graph.weight("gone")


def test_constant_nodes_are_weights_and_a_copy_is_independent() -> None:
    graph = to_torch(parsed("w = Constant<value = float[3] {1.0, 2.0, 3.0}>() y = Mul(x, w)"))
    twin = copy.deepcopy(graph)
    with torch.no_grad():
        dict(twin.named_weights())["w"].zero_()
    assert torch.equal(graph({"x": X})["y"], X * torch.tensor([1.0, 2.0, 3.0]))
    assert not twin({"x": X})["y"].any()


def test_weights_may_be_called_like_parts_of_the_module() -> None:
    names = ["outputs", "inputs", "training", "_graph", "weight", "eval"]
    body = " ".join(f"a{i + 1} = Add(a{i}, {name})" for i, name in enumerate(names))
    graph = to_torch(parsed(f"a0 = Relu(x) {body} y = Relu(a6)", **dict.fromkeys(names, np.float32(1))))
    assert {name for name, _ in graph.named_weights()} == set(names)
    assert torch.equal(graph({"x": X})["y"], X.relu() + 6)


def test_an_initializer_that_is_an_input_is_a_default() -> None:
    model = parsed("y = Mul(x, s)", signature="(float[N, 3] x, float[1] s) => (float[N, 3] y)", s=np.float32([2]))
    graph = to_torch(model)
    assert graph.inputs == ("x",)
    assert torch.equal(graph({"x": X})["y"], 2 * X)
    assert torch.equal(graph({"x": X, "s": torch.tensor([3.0])})["y"], 3 * X)


def test_feeds_that_do_not_fit() -> None:
    graph = to_torch(parsed("y = Relu(x)"))
    with pytest.raises(ModelError, match="lacks the inputs 'x'"):
        graph({})
    with pytest.raises(ModelError, match="has no inputs 'z'"):
        graph({"x": X, "z": X})
    with pytest.raises(ModelError, match="has no tensor 'z'"):
        graph({"x": X}, outputs=["z"])


def test_all_that_is_unsupported_is_listed_at_once() -> None:
    model = parsed(
        "a = NonMaxSuppression(x, x) b = com.microsoft.MoE(x, x, x) c = com.microsoft.MoE(b, x, x)"
        " d = Cast<to = 17>(x) e = Relu<sharpness = 1>(x) y = local.f(x)",
        tail='<domain: "local", opset_import: ["" : 17]> f (u) => (v) { v = StringNormalizer(u) }',
    )
    with pytest.raises(UnsupportedOperatorsError) as caught:
        to_torch(model)
    found = {(entry.domain, entry.op, entry.opset, entry.count, entry.reason) for entry in caught.value.operators}
    assert found == {
        ("", "NonMaxSuppression", 17, 1, ""),
        ("com.microsoft", "MoE", 1, 2, ""),
        ("", "Cast", 17, 1, "to FLOAT8E4M3FN"),
        ("", "Relu", 17, 1, "attribute sharpness"),
        ("", "StringNormalizer", 17, 1, ""),
    }
    assert "com.microsoft.MoE (opset 1) x 2" in str(caught.value)


def test_values_of_other_kinds_are_refused_too() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (string[N] x) => (bool[N] y) { y = Not(x) }'
    )
    with pytest.raises(UnsupportedOperatorsError, match="STRING: x"):
        to_torch(from_proto(proto))


def test_the_newest_implementation_not_above_the_opset_is_chosen() -> None:
    assert [getattr(find("", "ReduceSum", opset), "since", None) for opset in (9, 12, 13, 99)] == [1, 1, 13, 13]
    assert find("", "Gelu", 19) is None
    assert find("", "NoSuchOperator", 20) is None


BRANCHES = parsed(
    """h = Mul(x, two)  total = ReduceSum<keepdims = 0>(h)  zero = Constant<value = float {0.0}>()
       up = Greater(total, zero)
       y = If (up) <
           then_branch = yes () => (float[N, 3] a) { a = MatMul(h, w) },
           else_branch = no () => (float[N, 3] b) { three = Constant<value = float {3.0}>() b = Mul(x, three) }
       >""",
    two=np.float32(2),
    w=EYE,
)


def test_if_takes_a_branch_by_the_data_and_sees_the_scope_around_it() -> None:
    graph = to_torch(BRANCHES)
    assert torch.equal(graph({"x": X})["y"], 2 * X)
    assert torch.equal(graph({"x": -X})["y"], -3 * X)
    names = [name for name, _ in graph.named_weights()]
    assert {"two", "w", "zero"} < set(names)
    assert any(name.endswith("/else_branch/three") for name in names)
    graph.requires_grad_()
    (gradient,) = torch.autograd.grad(graph({"x": X})["y"].sum(), graph.weight("w"))
    assert torch.equal(gradient, (2 * X).sum(0)[:, None].expand(3, 3))


def test_local_functions_are_inlined_with_their_attributes() -> None:
    tail = """<domain: "local", opset_import: ["" : 11]> twice<p: int = 1> (u) => (v) {
        s = Softmax<axis: int = @p>(u)  v = Add(s, s)
    }"""
    graph = to_torch(parsed("a = local.twice(x) y = local.twice<p = 0>(a)", tail=tail))
    a = 2 * X.softmax(1)
    assert torch.allclose(graph({"x": X})["y"], 2 * a.flatten().softmax(0).reshape(2, 3))


def test_two_names_of_one_value_have_gradients_of_their_own() -> None:
    graph = to_torch(
        parsed(
            "a = Mul(x, two) b = Identity(a) c = Mul(b, three) y = Add(a, c)", two=np.float32(2), three=np.float32(3)
        )
    )
    found = graph({"x": X}, outputs=["a", "b", "y"], track=["a"])
    a, b = torch.autograd.grad(found["y"].sum(), [found["a"], found["b"]])
    assert torch.equal(a, torch.full_like(X, 4))
    assert torch.equal(b, torch.full_like(X, 3))


def test_half_precision_weights_leave_shapes_alone() -> None:
    graph = to_torch(parsed("h = MatMul(x, w) y = Reshape(h, s)", w=EYE, s=np.int64([-1, 3]))).to(torch.bfloat16)
    y = graph({"x": X.bfloat16()})["y"]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, X.bfloat16())


def test_loops_and_scans_differentiate() -> None:
    model = parsed(
        """steps = Constant<value = int64 {3}>()
           go = Constant<value = bool {1}>()
           y = Loop (steps, go, x) <body = step (int64 i, bool c, float[N, 3] s) => (bool k, float[N, 3] t)
               { k = Identity(c) t = MatMul(s, w) }>""",
        w=2 * EYE,
    )
    graph = to_torch(model)
    found = graph({"x": X}, outputs=["x", "y"], track=["x"])
    assert torch.equal(found["y"], 8 * X)
    (gradient,) = torch.autograd.grad(found["y"].sum(), found["x"])
    assert torch.equal(gradient, torch.full_like(X, 8))


def test_a_bad_attribute_type_is_no_crash() -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=99)
    value = helper.make_tensor_value_info("x", 1, [1])
    graph = helper.make_graph([node], "g", [value], [onnx.ValueInfoProto(name="y")])
    with pytest.raises(UnsupportedOperatorsError, match=r"Cast \(opset 17, to 99\) x 1"):
        to_torch(from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)))


def test_precision_is_as_it_was_after_work_in_another() -> None:
    operators = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)

    def now() -> list[str]:
        return [operator.fp32_precision for operator in operators]

    before = now()
    with float32_products():
        assert now() == ["ieee"] * 3
        with float32_products(tf32=True):
            assert now() == ["tf32"] * 3
        assert now() == ["ieee"] * 3
        with pytest.raises(ModelError), float32_products(tf32=True):
            raise ModelError("")
        assert now() == ["ieee"] * 3
    assert now() == before

"""Models that take or give what few models do: each is compressed, or refused in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxlr
from onnxlr.calibrate import accumulate
from onnxlr.config import Config, Target
from onnxlr.data import batches, open_data, split
from onnxlr.errors import DataError, GateError, ModelError, OnnxlrError
from onnxlr.gram import Moments
from onnxlr.metrics import relative_error
from onnxlr.model_io import from_proto, load
from onnxlr.probes import probes
from onnxlr.session import Session
from onnxlr.sites import take_inventory
from onnxlr.validate import compare
from tests.conftest import decaying, parse
from tests.models import parsed, random

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Feeds = list[dict[str, NDArray[Any]]]

D = 32
CONFIG: dict[str, Any] = {"target": Target("keep_params", 0.7), "threads": 1, "rank_multiple": 4}
TWO_LAYERS = "p = MatMul(x, w1) h = Relu(p) y = MatMul(h, w2)"


def weight(seed: int) -> NDArray[np.float32]:
    return decaying(np.random.default_rng(seed), D, D, 0.85)


W = {"w1": weight(1), "w2": weight(2)}


def normal(*shape: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole(high: int, *shape: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, high, shape)


@dataclass(frozen=True)
class Unusual:
    """A model and its data; `gradients` where torch can run it and an output has them."""

    name: str
    model: onnx.ModelProto
    feeds: Feeds
    gradients: bool = True

    def __str__(self) -> str:
        return self.name


def of_text() -> onnx.ModelProto:
    nodes = [
        helper.make_node("LabelEncoder", ["s"], ["i"], domain="ai.onnx.ml", keys_strings=["a", "b", "c", "d"],
                         values_int64s=[0, 1, 2, 3], default_int64=0),
        helper.make_node("Gather", ["e", "i"], ["x"]),
        helper.make_node("MatMul", ["x", "w1"], ["p"]),
        helper.make_node("Relu", ["p"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["y"]),
    ]  # fmt: skip
    stored = [numpy_helper.from_array(array, name) for name, array in {**W, "e": normal(4, D, seed=0)}.items()]
    inputs = [helper.make_tensor_value_info("s", TensorProto.STRING, ["N"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", D])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, stored), ir_version=8, opset_imports=opsets)


def unusual() -> list[Unusual]:
    found = f"{TWO_LAYERS} b = Greater({{0}}, t) at = NonZero(b) r = Gather<axis = 0>(at, o) g = Gather(y, r)"
    found += " z = MatMul(g, w3)"
    picked = W | {"w3": weight(3), "o": np.array(0)}
    embedded = W | {"e": normal(50, D, seed=0)}
    default = "g (float[N, 32] x, float[1] s) => (float[N, 32] y) { q = Mul(x, s) p = MatMul(q, w1) h = Relu(p)"
    flat = [{"x": normal(4, D, seed=i)} for i in range(20)]
    return [
        Unusual(
            "lengths that differ",
            parse(f"g (float[N, S, 32] x) => (float[N, S, 32] y) {{ {TWO_LAYERS} }}", W),
            [{"x": normal(1, 5 + i % 4, D, seed=i)} for i in range(32)],
        ),
        Unusual(
            "no name for any axis",
            parse(f"g (float[?, ?, 32] x) => (float[?, ?, 32] y) {{ {TWO_LAYERS} }}", W),
            [{"x": normal(2, 5 + i % 4, D, seed=i)} for i in range(20)],
        ),
        Unusual(
            "image sides that differ",
            parse(
                "g (float[N, 3, H, V] images) => (float[N, 32] y) { c = Conv<pads = [1, 1, 1, 1]>(images, k)"
                f" r = Relu(c) m = GlobalAveragePool(r) x = Flatten(m) {TWO_LAYERS} }}",
                W | {"k": normal(32, 3, 3, 3, seed=9)},
            ),
            [{"images": normal(1, 3, 6 + i % 3, 9 - i % 2, seed=i)} for i in range(32)],
        ),
        Unusual(
            "no tokens in some samples",
            parse(f"g (float[N, S, 32] x) => (float[N, S, 32] y) {{ {TWO_LAYERS} }}", W),
            [{"x": normal(1, i % 3 * 4, D, seed=i)} for i in range(40)],
        ),
        Unusual(
            "several inputs",
            parse(
                "g (float[N, 32] a, float[N, 32] b, int64[N] i) => (float[N, 32] s, float[N, 32] z) {"
                " t = Gather(e, i) p = MatMul(a, w1) q = MatMul(b, w2) u = Add(p, q) s = Add(u, t) z = MatMul(s, w3) }",
                embedded | {"w3": weight(3)},
            ),
            [{"a": normal(2, D, seed=i), "b": normal(2, D, seed=50 + i), "i": whole(50, 2, seed=i)} for i in range(20)],
        ),
        Unusual(
            "int32 ids",
            parse(f"g (int32[N, S] ids) => (float[N, S, 32] y) {{ x = Gather(e, ids) {TWO_LAYERS} }}", embedded),
            [{"ids": whole(50, 1, 4 + i % 3, seed=i)} for i in range(32)],
        ),
        Unusual(
            "bytes",
            parse(f"g (uint8[N, 32] u) => (float[N, 32] y) {{ x = Cast<to = 1>(u) {TWO_LAYERS} }}", W),
            [{"u": whole(255, 4, D, seed=i).astype(np.uint8)} for i in range(20)],
        ),
        Unusual(
            "flags",
            parse(f"g (bool[N, 32] f) => (float[N, 32] y) {{ x = Cast<to = 1>(f) {TWO_LAYERS} }}", W),
            [{"f": whole(2, 4, D, seed=i).astype(bool)} for i in range(20)],
        ),
        Unusual("text", of_text(), [{"s": np.array(list("abcd"))[whole(4, 2, seed=i)]} for i in range(20)], False),
        Unusual(
            "a scalar",
            parse(f"g (float[N, 32] a, float c) => (float[N, 32] y) {{ x = Mul(a, c) {TWO_LAYERS} }}", W),
            [{"a": normal(3, D, seed=i), "c": np.float32(1 + i / 10)} for i in range(20)],
        ),
        Unusual("a default", parse(f"{default} y = MatMul(h, w2) }}", W | {"s": np.ones(1, np.float32)}), flat),
        Unusual(
            "weights listed as inputs",
            parse(
                f"g (float[N, 32] x, float[32, 32] w1, float[32, 32] w2) => (float[N, 32] y) {{ {TWO_LAYERS} }}",
                W,
                opset=8,
                ir_version=3,
            ),
            flat,
        ),
        Unusual(
            "an input that nothing reads",
            parse(f"g (float[N, 32] x, int64[N] n) => (float[N, 32] y) {{ {TWO_LAYERS} }}", W),
            [feed | {"n": np.zeros(4, np.int64)} for feed in flat],
        ),
        Unusual(
            "nothing is ever found",
            parse(
                f"g (float[N, 32] x) => (float[N, 32] y, float[K, 32] z) {{ {found.format('y')} }}",
                picked | {"t": np.float32(9e9).reshape(())},
            ),
            flat,
        ),
        Unusual(
            "sometimes nothing is found",
            parse(
                f"g (float[N, 32] x) => (float[N, 32] y, float[K, 32] z) {{ {found.format('x')} }}",
                picked | {"t": np.float32(2.2).reshape(())},
            ),
            [{"x": normal(1, D, seed=i)} for i in range(40)],
        ),
        Unusual(
            "integers alone",
            parse(
                f"g (float[N, 32] x) => (int64[N] top) {{ {TWO_LAYERS} top = ArgMax<axis = 1, keepdims = 0>(y) }}", W
            ),
            flat,
            False,
        ),
        Unusual(
            "one number",
            parse(f"g (float[N, 32] x) => (float sum) {{ {TWO_LAYERS} sum = ReduceSum<keepdims = 0>(y) }}", W),
            flat,
        ),
        Unusual(
            "a vector",
            parse(f"g (float[32] x) => (float[32] y) {{ {TWO_LAYERS} }}", W),
            [{"x": normal(D, seed=i)} for i in range(20)],
        ),
        *(
            Unusual(
                f"batches of {size}",
                parse(f"g (float[{size}, 32] x) => (float[{size}, 32] y) {{ {TWO_LAYERS} }}", W),
                [{"x": normal(4, D, seed=i)} for i in range(32)],
            )
            for size in (1, 8)
        ),
    ]


UNUSUAL = unusual()


@pytest.mark.parametrize("case", UNUSUAL, ids=str)
@pytest.mark.parametrize("objective", ["weight", "output", "fisher"])
def test_it_is_compressed(case: Unusual, objective: Any, tmp_path: Path) -> None:
    if objective == "fisher":
        pytest.importorskip("torch")
    config = Config(objective=objective, **CONFIG)
    if objective == "fisher" and not case.gradients:
        with pytest.raises(ModelError, match=r"no output of the model is floating|cannot run in torch"):
            onnxlr.compress(case.model, case.feeds, config)
        return
    report = onnxlr.compress(case.model, case.feeds, config, output=tmp_path / "small.onnx")
    assert 0 < report.after.parameters <= 0.7 * report.before.parameters
    dense, small = Session(from_proto(case.model), threads=1), Session(load(tmp_path / "small.onnx"), threads=1)
    _, held_out = split(open_data(case.feeds, dense.inputs))
    runs = [(feed, dense.run(feed), small.run(feed)) for feed in batches(held_out, config.batch, dense.inputs)]
    assert report.validation.error == pytest.approx(relative_error(compare(runs)), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", UNUSUAL, ids=str)
def test_it_is_inspected(case: Unusual) -> None:
    inspection = onnxlr.inspect(case.model)
    assert inspection.problem is None
    assert len(inspection.inventory.weights) >= 2
    assert inspection.inventory.macs


def test_an_empty_batch_adds_no_rows() -> None:
    case = next(case for case in UNUSUAL if case.name == "no tokens in some samples")
    model = from_proto(case.model)
    inventory, inputs = take_inventory(model), Session(model).inputs
    config = Config(objective="output", batch=1, threads=1)
    all_of_them, filled = (
        accumulate(model, inventory, feeds, inputs, config)
        for feeds in (case.feeds, [feed for feed in case.feeds if feed["x"].size])
    )
    assert all_of_them.samples > filled.samples
    for key, moments in all_of_them.moments.items():
        assert moments.count == sum(feed["x"].shape[1] for feed in case.feeds)
        np.testing.assert_array_equal(moments.gram, filled.moments[key].gram)
        np.testing.assert_array_equal(moments.total, filled.moments[key].total)


def test_a_layer_that_never_saw_a_row_has_moments_and_a_warning() -> None:
    case = next(case for case in UNUSUAL if case.name == "nothing is ever found")
    config = Config(objective="output", **CONFIG)
    stats = onnxlr.calibrate(case.model, case.feeds, config)
    unseen = stats.moments["g"]
    assert unseen.count == 0
    np.testing.assert_array_equal(unseen.covariance, Moments.zero(D).covariance)
    assert len(stats.moments) == len(probes(take_inventory(from_proto(case.model)).weights, "output"))
    report = onnxlr.compress(case.model, case.feeds, config, stats=stats)
    assert any("w3: 0 calibration rows for 32 dimensions" in warning for warning in report.warnings)


def test_a_vector_is_one_sample_and_stays_whole() -> None:
    case = next(case for case in UNUSUAL if case.name == "a vector")
    stats = onnxlr.calibrate(case.model, case.feeds, Config(objective="output", **CONFIG))
    calibrated = np.stack([feed["x"] for i, feed in enumerate(case.feeds) if i % 8 != 1])
    assert (stats.samples, stats.moments["x"].count) == (len(calibrated), len(calibrated))
    np.testing.assert_allclose(stats.moments["x"].gram, Moments.of(calibrated).gram, rtol=1e-5, atol=1e-5)


def plain() -> onnx.ModelProto:
    return parse(f"g (float[N, 32] x) => (float[N, 32] y) {{ {TWO_LAYERS} }}", W, opset=18)


def listing_outputs() -> list[tuple[str, onnx.NodeProto, onnx.ValueInfoProto]]:
    dense = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 32])
    maps = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    zipped = helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=list(range(32)))
    return [
        ("seq(tensor(float))", helper.make_node("SequenceConstruct", ["p", "y"], ["z"]),
         helper.make_value_info("z", helper.make_sequence_type_proto(dense))),
        ("optional(tensor(float))", helper.make_node("Optional", ["y"], ["z"]),
         helper.make_value_info("z", helper.make_optional_type_proto(dense))),
        ("seq(map(int64,tensor(float)))", zipped,
         helper.make_value_info("z", helper.make_sequence_type_proto(maps))),
    ]  # fmt: skip


def refused(model: onnx.ModelProto, feeds: Feeds, kind: type[OnnxlrError], *words: str) -> None:
    """All of `compress`, `calibrate` and `validate` say so in one line."""
    for run in (
        lambda: onnxlr.compress(model, feeds, Config(objective="output", **CONFIG)),
        lambda: onnxlr.calibrate(model, feeds, Config(objective="output", **CONFIG)),
        lambda: onnxlr.validate(model, model, feeds),
    ):
        with pytest.raises(kind) as error:
            run()
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("kind", "node", "value"), listing_outputs(), ids=lambda value: str(value)[:10])
def test_outputs_that_are_no_tensors(kind: str, node: onnx.NodeProto, value: onnx.ValueInfoProto) -> None:
    model = plain()
    model.graph.node.append(node)
    model.graph.output.append(value)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    refused(model, [{"x": normal(4, D, seed=0)}], ModelError, "output 'z'", kind[:12], "take it off")
    inspection = onnxlr.inspect(model)
    assert len(inspection.inventory.weights) == 2
    assert inspection.problem is not None
    assert "output 'z'" in inspection.problem


def test_an_input_that_may_be_missing() -> None:
    model = plain()
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 32]))
    model.graph.input.append(helper.make_value_info("maybe", kind))
    model.graph.node.append(helper.make_node("OptionalHasElement", ["maybe"], ["has"]))
    model.graph.output.append(helper.make_tensor_value_info("has", TensorProto.BOOL, []))
    refused(model, [{"x": normal(4, D, seed=0)}], ModelError, "input 'maybe'", "optional(tensor(float))")


def test_a_default_cannot_be_fed() -> None:
    case = next(case for case in UNUSUAL if case.name == "a default")
    feeds = [feed | {"s": np.full(1, 2, np.float32)} for feed in case.feeds]
    refused(case.model, feeds, DataError, "no input 's'", "leave out the rest")


def test_no_input_at_all() -> None:
    model = parse("g () => (float[4, 32] y) { x = RandomNormal<shape = [4, 32]>() y = MatMul(x, w1) }", {"w1": W["w1"]})
    refused(model, [{}], DataError, "no inputs")


def test_outputs_whose_number_the_values_decide() -> None:
    model = parse(
        "g (float[N, 32] x) => (int64[2, K] z) { p = MatMul(x, w1) b = Greater(p, t) z = NonZero(b) }",
        {"w1": W["w1"], "t": np.float32(0.3).reshape(())},
    )
    with pytest.raises(
        DataError, match=r"output 'z': .*\[2, \d+\].*\(NonZero, NonMaxSuppression\), end the graph before"
    ):
        onnxlr.compress(model, [{"x": normal(4, D, seed=i)} for i in range(20)], Config(objective="output", **CONFIG))


def test_outputs_that_are_always_empty() -> None:
    model = parse(
        "g (float[N, 32] x) => (int64[2, K] z) { p = MatMul(x, w1) b = Greater(p, t) z = NonZero(b) }",
        {"w1": W["w1"], "t": np.float32(9e9).reshape(())},
    )
    with pytest.raises(DataError, match="no output holds a value"):
        onnxlr.compress(model, [{"x": normal(4, D, seed=i)} for i in range(20)], Config(objective="output", **CONFIG))


def test_nothing_to_compress() -> None:
    model = parse("g (float[N, 32] x) => (float[N, 32] y) { h = Relu(x) y = Add(h, x) }", {})
    feeds: Feeds = [{"x": normal(4, D, seed=i)} for i in range(20)]
    for kind, lacking in (("keep_params", "no parameters"), ("keep_macs", "no MACs")):
        with pytest.raises(GateError, match=lacking):
            onnxlr.compress(model, feeds, Config(target=Target(kind, 0.7)))  # type: ignore[arg-type]
    report = onnxlr.compress(model, feeds, Config(objective="output", target=Target("max_error", 0.05)))
    assert report.validation.error == 0


def test_what_onnx_would_refuse_from_the_start_is_written_all_the_same(tmp_path: Path) -> None:
    proto = parsed("(float[N, 32] x) => (float[N, 24] y)", "y = MatMul(x, w)", w=random(1, 32, 24)).proto
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(proto)
    config = Config(objective="output", target=Target("keep_params", 0.7), threads=1, rank_multiple=1)
    report = onnxlr.compress(proto, {"x": random(2, 64, 32)}, config, output=tmp_path / "small.onnx")
    assert report.after.parameters < report.before.parameters

"""Fewer bits after low rank: the same function within rounding, whole files, and one line where it cannot be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from conftest import Result, decaying, mlp, parse, rows, run

import onnxlr
from onnxlr.config import THENS, Config, Target
from onnxlr.errors import ConfigError, GateError, ModelError
from onnxlr.model_io import from_proto
from onnxlr.quantize import quantize, turned

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FEED = {"x": rows(32)}
LOSS = {"int8": 0.05, "int8-static": 0.05, "fp16": 2e-3}


def pairs() -> onnx.ModelProto:
    """A chain of factors that hides h1, of falling columns, and h2; a pair whose h an If reads too; a shared one."""
    generator = np.random.default_rng(0)
    names = {"a": (64, 16), "b": (16, 24), "c": (24, 64), "p": (64, 8), "q": (8, 64), "s": (64, 8), "t": (8, 64)}
    weights = {name: decaying(generator, *shape, 0.7) for name, shape in names.items()}
    weights["a"] *= 0.5 ** np.arange(16, dtype=np.float32)
    return parse(
        """pairs (float[N, 64] x) => (float[N, 64] y, float[N, 64] z, float[N, 64] u) {
            h1 = MatMul(x, a)  h2 = MatMul(h1, b)  y = MatMul(h2, c)
            g = MatMul(x, p)  w = MatMul(g, q)
            k = If (yes) <
                then_branch = then () => (float[N, 8] o1) { o1 = Relu(g) },
                else_branch = other () => (float[N, 8] o2) { o2 = Identity(g) }
            >
            kk = MatMul(k, q2)  z = Add(w, kk)
            j = MatMul(x, s)  j1 = MatMul(j, t)  j2 = MatMul(j, t2)  u = Add(j1, j2)
        }""",
        weights | {"yes": np.array(True), "q2": decaying(generator, 8, 64, 0.7), "t2": decaying(generator, 8, 64, 0.7)},
    )


def relative(found: dict[str, Any], expected: dict[str, Any]) -> float:
    return max(float(np.linalg.norm(found[k] - v) / np.linalg.norm(v)) for k, v in expected.items())


def test_turning_changes_hidden_features_alone() -> None:
    before = pairs()
    after = turned(from_proto(before)).proto
    old, new = ({one.name: one for one in model.graph.initializer} for model in (before, after))
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"a", "b", "c", "s", "t", "t2"}  # what an If reads is left alone
    assert relative(run(after, FEED), run(before, FEED)) < 1e-5
    hidden = onnx.helper.make_tensor_value_info("h1", onnx.TensorProto.FLOAT, None)
    sizes = []
    for model in (before, after):
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        shown.graph.output.append(hidden)
        spread = run(shown, FEED)["h1"].std(axis=0)
        sizes.append(spread.max() / spread.min())
    assert sizes[1] < sizes[0] / 100


@pytest.mark.parametrize("then", THENS)
def test_fewer_bits_compute_the_same_in_less(then: Any) -> None:
    model = from_proto(mlp())
    before = model.proto.SerializeToString()
    model.proto.metadata_props.add(key="mine", value="kept")
    small = quantize(model, then, [FEED])
    assert relative(run(small.proto, FEED), run(mlp(), FEED)) < LOSS[then]
    assert small.nbytes < (0.6 if then == "fp16" else 0.5) * model.nbytes
    assert [(entry.key, entry.value) for entry in small.proto.metadata_props] == [("mine", "kept")]
    del model.proto.metadata_props[:]
    assert model.proto.SerializeToString() == before
    assert [value.name for value in small.proto.graph.output] == ["logits"]
    assert small.proto.graph.input[0].type == model.proto.graph.input[0].type


@pytest.mark.parametrize("then", THENS)
def test_nothing_to_convert_is_one_line(then: Any) -> None:
    relu = parse("g (float[N, 64] x) => (float[N, 64] y) { y = Relu(x) }", {})
    with pytest.raises(ModelError, match=f"--then {then}") as refusal:
        quantize(from_proto(relu), then, [FEED])
    assert "\n" not in str(refusal.value)


def test_a_tool_that_fails_is_one_line() -> None:
    with pytest.raises(ModelError, match="--then int8-static fails on this model: ") as refusal:
        quantize(from_proto(mlp()), "int8-static", [])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("then", THENS)
def test_compress_then(compress: Callable[..., Result], tmp_path: Path, then: str) -> None:
    result = compress("--keep-params", 0.7, "--objective", "output", "--then", then, "--json")
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    quantized = document["quantized"]
    assert quantized["then"] == document["config"]["then"] == then
    assert quantized["file_bytes"] == (tmp_path / "out.onnx").stat().st_size < document["after"]["file_bytes"]
    errors = quantized["validation"]["error"], document["validation"]["error"]
    assert errors[0] != errors[1]
    assert abs(errors[0] ** 2 - errors[1] ** 2) < LOSS[then] ** 2
    assert quantized["latency_ratio"] > 0
    assert ("block" in document["config"]["forms"]) == (then == "fp16")
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    table = compress("--keep-params", 0.7, "--objective", "output", "--then", then, "--force")
    assert f"then {then}" in table.out


def test_a_bound_holds_for_the_result(compress: Callable[..., Result]) -> None:
    result = compress("--max-error", 0.1, "--objective", "output", "--then", "int8", "--json")
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    assert 0.05 < document["quantized"]["validation"]["error"] <= 0.1


def test_low_rank_makes_room_for_what_bits_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits that add six tenths of the bound leave low rank the rest, in squares."""
    noisy = 0.06

    def disturbed(model: onnxlr.Model, *_: Any) -> onnxlr.Model:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        proto.graph.node[-1].output[0] = "before"
        proto.graph.node.append(onnx.helper.make_node("Mul", ["before", "disturbance"], ["logits"]))
        signs = 1 + noisy * np.where(np.arange(10) % 2, 1, -1)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(signs.astype(np.float32), "disturbance"))
        return from_proto(proto)

    monkeypatch.setattr("onnxlr.search.quantize", disturbed)
    config = Config(target=Target("max_error", 0.1), objective="output", then="int8", threads=1)
    report = onnxlr.compress(mlp(), [{"x": rows(256)}], config)
    assert report.quantized is not None
    assert report.validation.error < 0.09
    assert noisy < report.quantized.validation.error <= 0.1


def test_a_bound_that_bits_alone_exceed_is_refused(tmp_path: Path) -> None:
    config = Config(target=Target("max_error", 1e-4), objective="output", then="int8", threads=1)
    with pytest.raises(GateError, match=r"--max-error 0\.0001 cannot be reached with --then int8, which adds"):
        onnxlr.compress(mlp(), [{"x": rows(256)}], config, output=tmp_path / "o.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_step() -> None:
    with pytest.raises(ConfigError, match="unknown step 'int4' after compression"):
        Config(then="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("then", ["int8", "int8-static"])
def test_weights_of_another_type_are_refused_before_the_work(then: Any) -> None:
    config = Config(target=Target("keep_params", 0.6), then=then, threads=1)
    with pytest.raises(ConfigError, match=f"--then {then} takes weights of float32, and there are some of float16"):
        onnxlr.compress(half(), [{"x": row[None].astype(np.float16)} for row in rows(16)], config)


def half() -> onnx.ModelProto:
    weight = decaying(np.random.default_rng(0), 64, 64, 0.9).astype(np.float16)
    return parse("half (float16[N, 64] x) => (float16[N, 64] y) { y = MatMul(x, w) }", {"w": weight})


def test_scales_by_column_need_opset_13() -> None:
    model = parse(
        "old (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }",
        {"w": decaying(np.random.default_rng(0), 64, 64, 0.9)},
        opset=11,
    )
    config = Config(target=Target("keep_params", 0.6), then="int8-static", threads=1)
    with pytest.raises(ConfigError, match="--then int8-static needs operators of opset 13, the model has 11"):
        onnxlr.compress(model, [{"x": row[None]} for row in rows(16)], config)


@pytest.mark.parametrize("then", THENS)
def test_a_model_with_external_data(tmp_path: Path, then: Any) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(mlp(), model, save_as_external_data=True, location="model.data", size_threshold=0)
    feeds = [{"x": row[None]} for row in rows(8)]
    after = quantize(onnxlr.load(model), then, feeds)
    feed = {"x": rows(32)}
    assert relative(run(after.proto, feed), run(mlp(), feed)) < LOSS[then]

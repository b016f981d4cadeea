"""Half precision: the float32 self of a model, its noise, and compression in float16 and bfloat16."""

from __future__ import annotations

import importlib
import tempfile
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnxlr
from onnxlr.calibrate import accumulate
from onnxlr.case import prepare
from onnxlr.config import Config, Target
from onnxlr.errors import ModelError, RangeError
from onnxlr.factors import Factors
from onnxlr.forms import LARGEST, Stored, Window, holds
from onnxlr.gram import Moments
from onnxlr.latency import Timings
from onnxlr.model_io import from_proto, load, save
from onnxlr.precision import float32_self, half_types, widened, widened_feed
from onnxlr.report.terminal import render_report, render_validation
from onnxlr.search import _costs
from onnxlr.session import Session
from onnxlr.sites import take_inventory
from onnxlr.timing_cache import recalled
from onnxlr.trial import Trial
from tests.conftest import decaying, invoke, parse, rows
from tests.models import parsed, random, relative

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

HALVES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ELEMENTS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
SMALL: dict[str, Any] = {"threads": 1, "rank_multiple": 4}


def two_layers(dtype: str, scale: float = 1.0, largest: float | None = None) -> onnx.ModelProto:
    """`y = relu(x w1) s w2` with x [N, 64]; `largest` is the largest number of both weights, which `s` makes up for."""
    generator = np.random.default_rng(0)
    w1, w2 = decaying(generator, 64, 96, 0.9) * scale, decaying(generator, 96, 64, 0.9) * scale
    if largest is not None:
        w1, w2 = (w * (largest / np.abs(w).max()) for w in (w1, w2))
    stored = {"w1": w1, "w2": w2, "s": np.asarray(1.0 if largest is None else 2 / largest)}
    text = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float"}[dtype]
    kind = HALVES.get(dtype, np.float32)
    return parse(
        f"g ({text}[N, 64] x) => ({text}[N, 64] y) {{ p = MatMul(x, w1) h = Relu(p) q = Mul(h, s) y = MatMul(q, w2) }}",
        {name: array.astype(kind) for name, array in stored.items()},
    )


def data(dtype: str, scale: float = 1.0) -> NDArray[Any]:
    return (scale * rows(160)).astype(HALVES.get(dtype, np.float32))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_float32_self_has_no_half_type_anywhere(dtype: str) -> None:
    element, kind = ELEMENTS[dtype], HALVES[dtype]
    weights = {name: random(i, 4, 4).astype(kind) for i, name in enumerate(("w", "v", "u"), 1)}
    c = np.asarray([0.5, 1.0, -2.0, 0.25], np.float32)

    def bits(*values: float) -> str:  # as ONNX's text has numbers of half types
        return ", ".join(map(str, np.asarray(values).astype(kind).view(np.uint16)))

    model = parsed(
        f"(float[N, 4] x, {dtype}[N, 4] z, bool t) => ({dtype}[N, 4] y, float[N, 4] o, {dtype}[N, 4] e)",
        f"""
        a = Cast<to = {element}>(x)  p = MatMul(a, w)  c = Constant<value = {dtype}[4] {{{bits(*c)}}}>()  q = Add(p, c)
        b = If(t) <
            then_branch = then () => ({dtype}[N, 4] m) {{ k = Cast<to = {element}>(x) m = MatMul(k, v) }},
            else_branch = else () => ({dtype}[N, 4] n) {{ n = Mul(q, u0) }}
        >
        f = local.twice(b)  l = SequenceConstruct(f, z)  i = Constant<value_int = 0>()  g = SequenceAt(l, i)
        s = Shape(g)  ones = ConstantOfShape<value = {dtype}[1] {{{bits(1.5)}}}>(s)  y = Add(g, ones)
        e = Identity(z)  o = Cast<to = 1>(y)
        """,
        tail=f"""
        <domain: "local", opset_import: ["" : 17]>
        twice (r) => (d) {{ k = Constant<value = {dtype} {{{bits(2.0)}}}>() j = Cast<to = {element}>(r) d = Mul(j, k) }}
        """,
        w=weights["w"],
        v=weights["v"],
        u0=weights["u"][0],
    )
    model.proto.graph.value_info.append(helper.make_tensor_value_info("p", element, ["N", 4]))
    model.proto.graph.value_info.append(helper.make_tensor_sequence_value_info("l", element, None))
    assert half_types(model) == {dtype}
    self_of_it = widened(model)
    assert half_types(self_of_it) == frozenset()
    assert half_types(model) == {dtype}
    x, z = random(7, 3, 4), random(8, 3, 4).astype(kind)
    for t in (False, True):
        w, v, u = (weights[name].astype(np.float32) for name in ("w", "v", "u"))
        expected = 2 * (x @ v if t else (x @ w + c) * u[0]) + 1.5
        found = Session(self_of_it).run(widened_feed({"x": x, "z": z, "t": np.asarray(t)}))
        assert {array.dtype.name for array in found.values()} == {"float32"}
        np.testing.assert_allclose(found["y"], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found["o"], found["y"])
        np.testing.assert_array_equal(found["e"], z.astype(np.float32))


def test_a_float32_model_is_its_own_self() -> None:
    model = from_proto(two_layers("float32"))
    assert half_types(model) == frozenset()
    assert widened(model).proto == model.proto


def test_external_weights_are_read_and_nothing_is_written(tmp_path: Path) -> None:
    weights = {"w": random(1, 40, 30, dtype=np.float16), "v": random(2, 30, 20)}
    body = "p = MatMul(x, w) q = Cast<to = 1>(p) y = MatMul(q, v)"
    model = parsed("(float16[N, 40] x) => (float[N, 20] y)", body, **weights)
    save(model, tmp_path / "model.onnx", size_threshold=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = load(tmp_path / "model.onnx")
    self_of_it = widened(loaded)
    stored = {tensor.name: tensor for tensor in self_of_it.proto.graph.initializer}
    assert stored["v"].data_location == TensorProto.EXTERNAL
    np.testing.assert_array_equal(numpy_helper.to_array(stored["w"]), weights["w"].astype(np.float32))
    x = random(3, 5, 40, dtype=np.float16)
    found = Session(self_of_it).run(widened_feed({"x": x}))["y"]
    assert relative(x.astype(float) @ weights["w"].astype(float) @ weights["v"].astype(float), found) < 1e-6
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_float32_self_of_a_model_with_external_data_is_on_disk_until_a_session_has_it(tmp_path: Path) -> None:
    weights = {"w": random(1, 40, 30, dtype=np.float16), "v": random(2, 30, 20), "b": random(3, 20, dtype=np.float16)}
    body = "p = MatMul(x, w) q = Cast<to = 1>(p) r = MatMul(q, v) k = Cast<to = 1>(b) y = Add(r, k)"
    save(parsed("(float16[N, 40] x) => (float[N, 20] y)", body, **weights), tmp_path / "model.onnx", size_threshold=0)
    model, x = load(tmp_path / "model.onnx"), random(3, 5, 40, dtype=np.float16)
    with float32_self(model) as wide:
        assert half_types(wide) == frozenset()
        assert wide.folder != model.folder
        stored = {tensor.name: tensor for tensor in wide.proto.graph.initializer}
        assert [stored[name].data_location for name in "wvb"] == [TensorProto.EXTERNAL] * 2 + [TensorProto.DEFAULT]
        session, place = Session(wide), wide.folder
    assert not place.exists()
    found, expected = (own.run(widened_feed({"x": x}))["y"] for own in (session, Session(widened(model))))
    np.testing.assert_array_equal(found, expected)


def test_without_room_for_the_float32_self_there_is_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(from_proto(two_layers("float16")), tmp_path / "model.onnx", size_threshold=0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    validation = onnxlr.validate(tmp_path / "model.onnx", tmp_path / "model.onnx", {"x": data("float16")})
    assert validation.error == 0
    assert (validation.noise, validation.no_noise) == (
        None,
        "the temporary folder cannot be written: No such file or directory",
    )


def test_noise_is_that_of_the_first_batches_where_outputs_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = two_layers("float16"), data("float16")
    y = Session(from_proto(model)).run({"x": x})["y"]
    noise = onnxlr.validate(model, model, {"x": x[:80]}, batch=40).noise
    monkeypatch.setattr(importlib.import_module("onnxlr.validate"), "KEPT", x[:80].nbytes + y[:80].nbytes)
    validation = onnxlr.validate(model, model, {"x": x}, batch=40)
    assert (validation.samples, validation.noise) == (160, noise)


def test_numbers_read_bit_by_bit_have_no_self() -> None:
    model = from_proto(two_layers("float16"))
    model.proto.graph.node.append(helper.make_node("BitCast", ["y"], ["bits"], to=TensorProto.INT16))
    with pytest.raises(ModelError, match=r"no float32 self: BitCast 'bits' reads numbers by bits"):
        widened(model)


def test_noise_is_the_error_beside_the_float32_self() -> None:
    model, x = two_layers("float16"), data("float16")
    half = Session(from_proto(model)).run({"x": x})["y"]
    single = Session(widened(from_proto(model))).run({"x": x.astype(np.float32)})["y"]
    validation = onnxlr.validate(model, model, {"x": x}, batch=160)
    assert validation.error == 0
    assert validation.noise == pytest.approx(relative(single, half), rel=1e-6)
    assert 2.0**-14 < validation.noise < 2.0**-10
    assert validation.no_noise == ""
    assert any(f"half-precision noise {validation.noise:.6g}" in str(line) for line in render_validation(validation))
    plain = onnxlr.validate(two_layers("float32"), two_layers("float32"), {"x": data("float32")})
    assert (plain.noise, plain.no_noise) == (None, "")
    assert not any("noise" in str(line) for line in render_validation(plain))


def test_why_there_is_no_noise_is_said() -> None:
    # in float16 what is small is lost beside 1000, so that fewer elements are found than in float32; onnxruntime's CPU
    # computes in float32 from one operator to the next, but what leaves a body has its own type
    model = parsed(
        "(float16[N, 4] x, bool t) => (float16[N, 4] d, int64[2, K] y)",
        """a = If(t) <
            then_branch = then () => (float16[N, 4] m) { m = Add(x, c) },
            else_branch = else () => (float16[N, 4] n) { n = Sub(x, c) }
        > d = Sub(a, c) y = NonZero(d)""",
        c=np.float16(1000).reshape(()),
    )
    x = np.asarray([[0.01, 100, 0.02, 200]], np.float16)
    validation = onnxlr.validate(model, model, [{"x": x, "t": np.asarray(True)}])
    assert validation.noise is None
    assert validation.no_noise.startswith("the model's float32 self cannot be compared with it: output 'y'")
    assert any(validation.no_noise in str(line) for line in render_validation(validation))


def test_a_report_tells_the_noise(tmp_path: Path) -> None:
    from rich.console import Console

    config = Config(objective="output", target=Target("keep_params", 0.7), **SMALL)
    report = onnxlr.compress(two_layers("float16"), {"x": data("float16")}, config, output=tmp_path / "half.onnx")
    assert report.validation.noise is not None
    assert report.to_dict()["validation"]["noise"] == report.validation.noise
    console = Console(width=120, file=(tmp_path / "text").open("w"))
    console.print(*render_report(report, verbose=False))
    console.file.close()
    assert f"{report.validation.noise:.4f}" in (tmp_path / "text").read_text().split("half-precision noise")[1]


def test_bfloat16_tensors_pass_through_a_session() -> None:
    model = parsed(
        "(bfloat16[N, 3] x, float[N] f) => (bfloat16[3, N] y, float[N] g)", "y = Transpose(x) g = Identity(f)"
    )
    session = Session(model)
    assert session.computes == ""
    for count in (4, 0):
        x, f = random(1, count, 3).astype(ml_dtypes.bfloat16), random(2, count)
        found = session.run({"x": x, "f": f})
        assert found["y"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found["y"], x.T)
        np.testing.assert_array_equal(found["g"], f)


def test_what_the_cpu_cannot_compute_in_bfloat16_is_computed_in_float32(capfd: pytest.CaptureFixture[str]) -> None:
    model, x = from_proto(two_layers("bfloat16")), data("bfloat16")
    session = Session(model)
    assert capfd.readouterr() == ("", "")
    assert session.computes == "float32"
    assert [str(spec) for spec in session.inputs] == ["bfloat16 [N, 64]"]
    expected = Session(widened(model)).run({"x": x.astype(np.float32)})["y"]
    np.testing.assert_array_equal(session.run({"x": x})["y"], expected)
    # an operator that nobody has is no matter of bfloat16
    model.proto.graph.node[1].op_type = "Unheard"
    with pytest.raises(ModelError, match="Unheard"):
        Session(model)


@pytest.mark.parametrize("objective", ["output", "weight", "fisher"])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_cut_as_well_as_float32(dtype: str, objective: Any, tmp_path: Path) -> None:
    if objective == "fisher":
        pytest.importorskip("torch")
    config = Config(objective=objective, target=Target("keep_params", 0.7), forms=frozenset({"pair"}), **SMALL)
    half = onnxlr.compress(two_layers(dtype), {"x": data(dtype)}, config, output=tmp_path / "half.onnx")
    single = onnxlr.compress(two_layers("float32"), {"x": data("float32")}, config)
    written = onnx.load(tmp_path / "half.onnx")
    assert {tensor.data_type for tensor in written.graph.initializer} == {ELEMENTS[dtype]}
    steps = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert half.validation.error == pytest.approx(single.validation.error, rel=0.05, abs=2 * steps)
    if dtype == "bfloat16":
        assert half.validation.noise is None
        assert any("no kernels for bfloat16" in warning for warning in half.warnings)


@pytest.mark.parametrize("objective", ["output", "weight", "fisher"])
@pytest.mark.parametrize(
    ("largest", "scale"), [(6e4, 0.02), (1.0, 2e3), (1e-4, 2e2), (1e-3, 1e-2)], ids=lambda value: f"{value:g}"
)
def test_large_and_small_numbers_in_float16(largest: float, scale: float, objective: Any, tmp_path: Path) -> None:
    if objective == "fisher":
        pytest.importorskip("torch")
    config = Config(objective=objective, target=Target("keep_params", 0.6), **SMALL)
    model, x = two_layers("float16", largest=largest), data("float16", scale)
    report = onnxlr.compress(model, {"x": x}, config, output=tmp_path / "small.onnx")
    assert report.after.parameters <= 0.6 * report.before.parameters
    assert report.validation.error < 0.2
    assert report.validation.error == pytest.approx(report.predicted_error, rel=0.5)


@given(st.sampled_from(sorted(HALVES)), st.integers(0, 40), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None)
def test_moments_of_half_precision_rows_are_those_of_float64(dtype: str, count: int, width: int, seed: int) -> None:
    x = np.random.default_rng(seed).uniform(-6e4, 6e4, (count, width)).astype(HALVES[dtype])
    wide = x.astype(np.float64)
    found = Moments.of(x)
    assert (found.count, found.gram.dtype, found.total.dtype) == (count, np.float64, np.float64)
    np.testing.assert_array_equal(found.gram, wide.T @ wide)
    np.testing.assert_array_equal(found.total, wide.sum(0))


@pytest.mark.parametrize("dtype", HALVES)
def test_calibration_does_not_overflow(dtype: str) -> None:
    x = np.random.default_rng(0).uniform(3e4, 6e4, (300, 6)).astype(HALVES[dtype])
    w = (1e-3 * random(1, 6, 5)).astype(HALVES[dtype])
    model = parsed(f"({dtype}[N, 6] x) => ({dtype}[N, 5] y)", "y = MatMul(x, w)", w=w)
    samples = [{"x": row[None]} for row in x]
    config = Config(objective="utilized", batch=100)
    stats = accumulate(model, take_inventory(model), samples, Session(model).inputs, config)
    wide = x.astype(np.float64)
    # products of a batch are of float32, less its mean
    np.testing.assert_allclose(stats.moments["x"].gram, wide.T @ wide, rtol=1e-7)
    np.testing.assert_allclose(stats.moments["x"].mean, wide.mean(0), rtol=1e-12)


def test_gradients_that_float16_cannot_hold() -> None:
    pytest.importorskip("torch")
    # the outputs are near 3e4, so gradients of their relative error are near 1e-7: 0 or a few steps in float16
    model = from_proto(two_layers("float16", largest=0.05))
    x = data("float16", 1e2)
    config = Config(objective="fisher", batch=20)
    single = onnxlr.calibrate(widened(model), {"x": x.astype(np.float32)}, config)
    half = onnxlr.calibrate(model, {"x": x}, config)
    keys = [key for key in single.moments if key.endswith(":gradient")]
    assert len(keys) == 2
    for key in keys:
        np.testing.assert_array_equal(half.moments[key].gram, single.moments[key].gram)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_block_is_held_where_its_numbers_and_its_window_are(dtype: str) -> None:
    block = Stored(np.ones((4, 2)), np.ones((2, 3)), None, Window("output", 0, 9.0))
    assert holds(dtype, block)
    for which in ("first", "second"):
        arrays = {"first": np.ones((4, 2)), "second": np.ones((2, 3))}
        arrays[which][1, 1] = -LARGEST["float16"]
        assert holds(dtype, Stored(**arrays, bias=None, window=block.window))
        arrays[which][1, 1] -= 100
        assert holds(dtype, Stored(**arrays, bias=None, window=block.window)) is (dtype != "float16")
    assert not holds(dtype, Stored(block.first, block.second, None, Window("output", 0, 1e5)))


def test_what_float16_cannot_hold_is_an_infinite_error_to_a_trial() -> None:
    model = from_proto(two_layers("float16"))
    inventory, inputs = take_inventory(model), Session(model).inputs
    trial = Trial(inventory, inventory.weights, inputs, Config(), corrected=False)
    observed = trial.observe([{"x": data("float16")[:4]}])
    first, second = np.ones((64, 2)), np.ones((2, 96))
    assert np.isfinite(trial.error({"w1": Factors(first, second, None)}, observed))
    assert trial.error({"w1": Factors(1e5 * first, second, None)}, observed) == np.inf
    assert issubclass(RangeError, onnxlr.OnnxlrError)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latency_is_planned_in_the_type_of_the_model(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(**options: Any) -> Any:
        asked.append(options["dtype"])
        return recalled(**options)

    monkeypatch.setattr(onnxlr.search, "recalled", spy)
    config = Config(target=Target("max_latency", 0.9), **SMALL)
    _costs(prepare(two_layers(dtype), {"x": data(dtype)}, config), config)
    assert asked == [dtype]


def test_the_command_line_goes_all_the_way_in_bfloat16(tmp_path: Path) -> None:
    onnx.save(two_layers("bfloat16"), tmp_path / "dense.onnx")
    np.savez(tmp_path / "data.npz", x=data("bfloat16").astype(np.float32))
    dense, small, given = tmp_path / "dense.onnx", tmp_path / "small.onnx", tmp_path / "data.npz"
    options = ("--objective", "output", "--keep-params", 0.8, "--rank-multiple", 4, "--threads", 1)
    done = invoke("compress", dense, "--calib", given, "-o", small, *options)
    assert done.code == 0
    assert "has no kernels for bfloat16 and computes the model in float32" in " ".join(done.out.split())
    checked = invoke("validate", dense, small, "--data", given, "--max-error", 0.2)
    assert checked.code == 0
    assert "polygraphy is left out" in checked.out
    refused = invoke("validate", dense, small, "--data", given, "--polygraphy", tmp_path / "check")
    assert refused.code == 2
    assert "polygraphy is left out" in refused.err
    assert not (tmp_path / "check").exists()


@pytest.mark.parametrize("dtype", HALVES)
def test_products_are_timed_in_half_precision(dtype: str) -> None:
    timings = Timings(threads=1, dtype=dtype)
    assert timings.product(64, 32, 256) > timings.product(64, 32, 16) > 0
    assert timings.moved(64, 256) > 0

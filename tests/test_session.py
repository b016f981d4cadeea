"""The door to onnxruntime: installation, providers, models that it refuses, feeds that it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import pytest
from models import parsed, random

from onnxlr.errors import InstallError, ModelError
from onnxlr.fusion import fused_operators
from onnxlr.model_io import Model, from_proto, load, save
from onnxlr.nvidia import CUDA, TENSORRT, TF32, not_started, with_options
from onnxlr.session import PROVIDERS, Session, import_onnxruntime

if TYPE_CHECKING:
    from pathlib import Path


def model(body: str = "y = Relu(x)") -> Model:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, 2] x) => (float[N, 2] y) {{ {body} }}'
    return from_proto(onnx.parser.parse_model(text))


def test_a_session_knows_its_interface_and_runs() -> None:
    session = Session(model(), threads=1)
    assert [(spec.name, spec.dtype, spec.shape) for spec in session.inputs] == [("x", np.float32, ("N", 2))]
    outputs = session.run({"x": np.float32([[-1, 2]])})
    assert outputs["y"].tolist() == [[0, 2]]


def test_streaming_order_gives_the_same_numbers() -> None:
    feed = {"x": np.random.default_rng(0).standard_normal((5, 2), np.float32)}
    plain, streaming = (Session(model("h = Exp(x) y = Softmax(h)"), streaming=s).run(feed)["y"] for s in (False, True))
    assert np.array_equal(plain, streaming)


def test_weights_beyond_one_protobuf_go_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    w, v = random(1, 300, 200), random(2, 200, 3).astype(np.float16)
    signature = "(float[N, 300] x) => (float16[N, 3] y)"
    large = parsed(signature, "h = MatMul(x, w) k = Relu(h) c = Cast<to = 10>(k) y = MatMul(c, v)", w=w, v=v)
    feed = {"x": random(3, 5, 300)}
    expected = Session(large, threads=1).run(feed)["y"]
    monkeypatch.setattr("onnxlr.session.INLINE_BYTES", 0)
    for least in (1, 2000, 10**6):
        monkeypatch.setattr("onnxlr.session.LARGE_WEIGHT", least)
        assert np.array_equal(Session(large, threads=1).run(feed)["y"], expected)
    content, apart = large.apart(2000)
    assert apart.keys() == {"w"}
    assert len(content) < w.nbytes / 50


def test_a_provider_that_this_build_lacks_is_an_error_and_no_fallback() -> None:
    with pytest.raises(InstallError, match=r"this onnxruntime build has no NoSuchProvider: available are .*CPU"):
        Session(model(), provider="NoSuchProvider")


@pytest.mark.parametrize(("short", "name"), [("tensorrt", TENSORRT), ("cuda", CUDA)])
def test_a_gpu_that_this_build_lacks_is_an_error_that_says_what_to_install(short: str, name: str) -> None:
    if name in import_onnxruntime().get_available_providers():
        pytest.skip(f"this onnxruntime is built with {name}")
    with pytest.raises(InstallError, match=rf"this onnxruntime build has no {name}: .*'onnxlr\[gpu\]'"):
        Session(model(), provider=short)


def test_products_on_a_gpu_are_never_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TF32, "")  # so that it is put back afterwards
    monkeypatch.delenv(TF32)
    exact = (CUDA, {"use_tf32": "0"})
    assert with_options(CUDA) == [exact]
    assert (with_options("OtherProvider"), TF32 in os.environ) == (["OtherProvider"], False)
    # what TensorRT does not take does not end up on the CPU
    assert with_options(TENSORRT) == [TENSORRT, exact]
    assert os.environ[TF32] == "0"
    monkeypatch.setenv(TF32, "1")
    with_options(TENSORRT)
    assert os.environ[TF32] == "1"


def test_what_did_not_start_says_what_to_look_for() -> None:
    assert "the driver, and for CUDA and cuDNN: `pip install" in not_started(CUDA)
    assert "CUDA, cuDNN and TensorRT in the versions" in not_started(TENSORRT)
    assert "start DmlExecutionProvider on this machine: look for the driver; or choose" in not_started(PROVIDERS["dml"])


@pytest.mark.parametrize("kind", ["float", "double", "bfloat16"])
def test_tensors_stay_in_place_from_run_to_run(kind: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g ({kind}[N, 2] x, double[2] before) => (double[2] after, {kind}[N, 2] y)
        {{ y = Identity(x) w = Cast<to = 11>(x) s = ReduceSum<keepdims = 0>(w, zero) after = Add(before, s) }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "zero"))
    session = Session(from_proto(proto), threads=1)
    kept = {("before", "after"): session.placed(np.array([0.5, 0]))}
    x = np.arange(8, dtype=session.inputs[0].dtype).reshape(4, 2)
    for part in (x[:3], x[3:]):
        found = session.run_in_place({"x": part}, ["y"], kept)
        assert list(found) == ["y"]
        assert np.array_equal(found["y"], part)
    assert kept["before", "after"].numpy().tolist() == [12.5, 16]
    with pytest.raises(ModelError, match=r"fails on a feed \(x \[1, 3\]\): "):
        session.run_in_place({"x": np.zeros((1, 3), x.dtype)}, [], kept)


def test_a_model_that_onnxruntime_refuses() -> None:
    with pytest.raises(ModelError, match=r"onnxruntime cannot load the model: .*NoSuchOperator"):
        Session(model("y = NoSuchOperator(x)"))


def test_a_feed_that_does_not_fit_names_the_shapes() -> None:
    with pytest.raises(ModelError, match=r"the model fails on a feed \(x \[1, 3\]\): "):
        Session(model()).run({"x": np.zeros((1, 3), np.float32)})


def test_without_onnxruntime_the_message_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from onnxlr.session import import_onnxruntime\n"
        "try: import_onnxruntime()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("InstallError onnxruntime cannot be imported")
    assert "pip install 'onnxlr[cpu]'" in printed


def test_two_builds_of_onnxruntime_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        metadata = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InstallError, match="onnxruntime and onnxruntime-gpu are both installed"):
        import_onnxruntime()


LAYER_NORM = """
    m = ReduceMean<axes = [-1]>(t) c = Sub(t, m) q = Pow(c, two) v = ReduceMean<axes = [-1]>(q)
    e = Add(v, small) d = Sqrt(e) n = Div(c, d) s = Mul(n, gamma) y = Add(s, beta)
"""
GELU = "p = MatMul(x, w) h = Add(p, beta) f = Div(h, root) e = Erf(f) o = Add(e, one) k = Mul(h, o) y = Mul(k, half)"


def layer(body: str, tail: str = "") -> Model:
    """From x [N, S, 8] to y [N, S, 8], with the weights that the bodies here need; `up` and `down` are above 1 kB."""
    scalars = {"two": 2, "small": 1e-5, "root": 2**0.5, "one": 1, "half": 0.5}
    weights = {name: np.float32(value).reshape(()) for name, value in scalars.items()}
    weights |= {"gamma": random(1, 8), "beta": random(2, 8), "w": random(3, 8, 8)}
    weights |= {"up": random(4, 8, 64), "down": random(5, 64, 8)}
    return parsed("(float[N, S, 8] x) => (float[N, S, 8] y)", body, tail=tail, **weights)


@pytest.mark.parametrize(
    ("body", "fused"),
    [
        ("y = MatMul(x, w)", {}),
        ("y = LayerNormalization(x, gamma, beta)", {}),
        ("p = MatMul(x, w) h = Add(p, beta) y = Relu(h)", {}),
        ("p = MatMul(x, w) y = Mul(p, half)", {"FusedMatMul": 1}),
        (GELU, {"BiasGelu": 1}),
        (f"t = MatMul(x, w) {LAYER_NORM}", {"LayerNormalization": 1}),
        (f"p = MatMul(x, w) t = Add(p, x) {LAYER_NORM}", {"SkipLayerNormalization": 1}),
        ("p = MatMul(x, w) t = Add(p, x) y = LayerNormalization(t, gamma, beta)", {"SkipLayerNormalization": 1}),
        (f"top = ReduceMax<keepdims = 0>(x) high = Greater(top, one) "
         f"y = If(high) <then_branch = a () => (float[N, S, 8] y) {{ {GELU} }}, "
         "else_branch = b () => (float[N, S, 8] z) { z = Identity(x) }>", {"BiasGelu": 1}),
    ],
)  # fmt: skip
def test_operators_that_onnxruntime_fuses(body: str, fused: dict[str, int]) -> None:
    original = layer(body)
    before = original.serialize()
    assert fused_operators(original, threads=1) == fused
    assert original.serialize() == before


def test_operators_of_a_local_function_are_not_taken_for_fused_ones() -> None:
    norm = "f (a, g, b) => (z) { z = LayerNormalization(a, g, b) }"
    calls = layer(
        "u = local.f(x, gamma, beta) t = MatMul(u, w) y = local.f(t, gamma, beta)",
        f'<domain: "local", opset_import: ["" : 17]> {norm}',
    )
    assert fused_operators(calls, threads=1) == {}


def test_fused_operators_of_a_model_with_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save(layer(f"h = MatMul(x, up) p = MatMul(h, down) t = Add(p, x) {LAYER_NORM}"), path, size_threshold=0)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(files) == {"model.onnx", "model.onnx.data"}
    assert fused_operators(load(path), threads=1) == {"SkipLayerNormalization": 1}
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_the_weights_of_an_optimized_model_are_not_in_its_graph(tmp_path: Path) -> None:
    path = tmp_path / "optimized.onnx"
    original = layer("h = MatMul(x, up) y = MatMul(h, down)")
    Session(original, threads=1, save_optimized=path)
    saved = load(path)
    stored = {tensor.name: tensor for tensor in saved.proto.graph.initializer}
    assert not stored["up"].raw_data
    assert np.array_equal(saved.array(stored["up"]), random(4, 8, 64))

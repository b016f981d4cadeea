"""What only a GPU can show. Every test says what it lacks where it is skipped.

`pip install 'onnxruntime-gpu[cuda,cudnn]'` in place of onnxruntime, and `tensorrt` besides, are what they need.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import conftest
import numpy as np
import onnx
import pytest
from models import parsed, random

import onnxlr
from onnxlr.api import calibrate
from onnxlr.config import Config, Target
from onnxlr.errors import InstallError, ModelError
from onnxlr.in_graph import SUMS, with_moments
from onnxlr.model_io import Model, from_proto, save
from onnxlr.nvidia import CUDA, TENSORRT, load_libraries, with_options
from onnxlr.rows import Rows
from onnxlr.running import RunningMoments
from onnxlr.session import Session, import_onnxruntime

if TYPE_CHECKING:
    from onnxlr.gram import Stats

    Array = np.ndarray[Any, Any]

CONFIG = Config(objective="output", threads=1)


def product(kind: str = "float", width: int = 256) -> Model:
    return parsed(f"({kind}[N, {width}] x) => ({kind}[N, 8] y)", "y = MatMul(x, w)", w=random(1, width, 8))


def missing(provider: str) -> str:
    """Why onnxruntime cannot run on a GPU here; "" where it can."""
    try:
        Session(product(), provider=provider)
    except (InstallError, ModelError) as error:
        return str(error)
    return ""


def without_tensorrt() -> str:
    """Why no engine can be built here; "" where one can."""
    try:
        import tensorrt

        tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))
    except Exception as error:  # without a driver it raises a type of its own
        return f"TensorRT: {' '.join(str(error).split())}"
    return ""


def without_torch_gpu() -> str:
    """Why torch cannot run on a GPU here; "" where it can."""
    try:
        import torch
    except ImportError as error:
        return str(error)
    return "" if torch.cuda.is_available() else "torch sees no GPU"


NO_TORCH_GPU = without_torch_gpu()
NO_CUDA, NO_TENSORRT_PROVIDER, NO_TENSORRT = missing("cuda"), missing("tensorrt"), without_tensorrt()
cuda = pytest.mark.skipif(bool(NO_CUDA), reason=NO_CUDA or "-")
tensorrt_provider = pytest.mark.skipif(bool(NO_TENSORRT_PROVIDER), reason=NO_TENSORRT_PROVIDER or "-")
either = [pytest.param("cuda", marks=cuda), pytest.param("tensorrt", marks=tensorrt_provider)]


@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_a_build_for_gpus_on_a_machine_without_one_is_an_error_and_no_fallback(
    provider: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if provider not in import_onnxruntime().get_available_providers():
        pytest.skip(f"onnxruntime is built without {provider}")
    if not missing(provider):
        pytest.skip(f"{provider} runs on this machine")
    capfd.readouterr()
    with pytest.raises(InstallError, match=f"onnxruntime could not start {provider} on this machine: look for the"):
        Session(product(), provider=provider)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("provider", either)
def test_products_are_of_single_precision(provider: str) -> None:
    x = random(2, 64, 256)
    y = Session(product(), provider=provider).run({"x": x})["y"]
    exact = x.astype(np.float64) @ random(1, 256, 8).astype(np.float64)
    # operands rounded to TF32 leave some 1e-4
    assert np.linalg.norm(y - exact) <= 2e-6 * np.linalg.norm(exact)


def assert_close(a: Stats, b: Stats, tolerance: float = 1e-5) -> None:
    assert dict(a.sizes) == dict(b.sizes)
    assert replace(a, moments={}) == replace(b, moments={})
    for key, left in a.moments.items():
        right = b.moments[key]
        assert np.linalg.norm(left.gram - right.gram) <= tolerance * np.linalg.norm(left.gram), key
        assert np.linalg.norm(left.total - right.total) <= tolerance * (left.count * left.gram.trace()) ** 0.5, key


@pytest.mark.parametrize("provider", either)
@pytest.mark.parametrize("mask", [None, "mask"])
def test_moments_of_a_transformer_are_those_of_the_cpu(
    provider: str, mask: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # samples of two lengths, and a batch that is smaller than the others
    model, samples = from_proto(conftest.attention()), conftest.sequences(45)
    config = replace(CONFIG, objective="utilized", batch=4, mask=mask)
    on_cpu = calibrate(model, samples, config)
    fetched: list[list[str]] = []
    run = Session.run_in_place
    monkeypatch.setattr(
        Session, "run_in_place", lambda self, feed, names, kept: fetched.append(names) or run(self, feed, names, kept)
    )
    assert_close(on_cpu, calibrate(model, samples, replace(config, provider=provider)))
    assert len(fetched) > 5
    assert all(names == [SUMS] for names in fetched)


@cuda
@pytest.mark.parametrize("rows", ["all", "auto"])
def test_moments_of_a_convolution_are_those_of_the_cpu(rows: Any) -> None:
    model = parsed(
        "(float[N, 4, H, W] x) => (float[N, 6, H, W] y)",
        "h = Conv<pads = [1, 1, 1, 1]>(x, w1) i = Relu(h) y = Conv<group = 2>(i, w2)",
        w1=random(1, 8, 4, 3, 3), w2=random(2, 6, 4, 1, 1),
    )  # fmt: skip
    data = {"x": random(4, 20, 4, 130, 70)}  # more rows a batch than are multiplied at once
    config = replace(CONFIG, batch=3, rows=rows)
    assert_close(calibrate(model, data, config), calibrate(model, data, replace(config, provider="cuda")))


@cuda
@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 1e-5), ("bfloat16", 1e-5), ("double", 1e-12)])
def test_moments_of_other_types_are_those_of_the_cpu(kind: str, tolerance: float) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g ({kind}[N, 6] x) => ({kind}[N, 6] y)
        {{ a = Relu(x) y = MatMul(a, w) }}"""
    proto = onnx.parser.parse_model(text)
    element = proto.graph.input[0].type.tensor_type.elem_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(random(1, 6, 6).astype(dtype), "w"))
    data = {"x": random(2, 100, 6).astype(dtype)}
    config = replace(CONFIG, objective="utilized")
    on_cpu, on_gpu = (calibrate(from_proto(proto), data, replace(config, provider=name)) for name in ("cpu", "cuda"))
    assert_close(on_cpu, on_gpu, tolerance)


@pytest.mark.skipif(bool(NO_TORCH_GPU), reason=NO_TORCH_GPU or "-")
def test_moments_of_gradients_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    config = replace(CONFIG, objective="fisher", loss="cross-entropy", batch=50)
    labels = np.random.default_rng(1).integers(0, 10, 640)
    stats = {}
    for name in ("gpu", "cpu"):
        stats[name] = calibrate(from_proto(conftest.mlp()), {"x": conftest.rows(640)}, config, labels=labels)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert any(key.endswith(":gradient") for key in stats["gpu"].moments)
    assert_close(stats["cpu"], stats["gpu"])


@pytest.mark.skipif(bool(NO_TORCH_GPU), reason=NO_TORCH_GPU or "-")
def test_torch_convolves_in_single_precision_where_it_is_compared() -> None:
    from onnxlr.torch_graph import check_parity, to_torch

    text = "(float[N, 16, 9, 9] x) => (float[N, 32, 7, 7] y)"
    model = parsed(text, "y = Conv(x, w)", w=random(1, 32, 16, 3, 3))
    parity = check_parity(to_torch(model).to("cuda"), model, [{"x": random(2, 8, 16, 9, 9)}])
    # operands rounded to TF32 leave some 3e-4
    assert max(parity.errors.values()) < 1e-5


@cuda
def test_the_products_of_moments_run_on_the_gpu(tmp_path: Path) -> None:
    running = RunningMoments(64)
    running.add(random(1, 9, 64))
    made = with_moments(product(width=64), {("x", Rows()): running}, {"x": 2}, [], None)
    ort = import_onnxruntime()
    load_libraries(ort)
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(made.serialize(), options, providers=with_options(CUDA), enable_fallback=0)
    session.run(None, {"x": random(2, 9, 64), "x:gram": np.zeros((64, 64))})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran_on = {event["args"]["op_name"]: event["args"]["provider"] for event in events if "provider" in event["args"]}
    products = {op: name for op, name in ran_on.items() if "MatMul" in op or "Gemm" in op}
    assert products
    assert {*products.values(), ran_on["Add"]} == {CUDA}


@cuda
def test_a_model_compressed_on_the_gpu_is_as_good_as_one_compressed_on_the_cpu(tmp_path: Path) -> None:
    data, errors = {"x": conftest.rows(640)}, {}
    for provider in ("cpu", "cuda"):
        config = replace(CONFIG, provider=provider, target=Target("keep_params", 0.5), rank_multiple=8)
        report = onnxlr.compress(from_proto(conftest.mlp()), data, config, output=tmp_path / f"{provider}.onnx")
        errors[provider] = report.validation.error
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=1e-2)
    bench = onnxlr.bench([tmp_path / "cpu.onnx", tmp_path / "cuda.onnx"], provider="cuda", runs=5)
    assert bench.provider == "cuda"


@pytest.mark.skipif(bool(NO_TENSORRT), reason=NO_TENSORRT or "-")
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_a_pair_adds_at_most_one_layer_to_an_engine(keep: float, tmp_path: Path) -> None:
    model, paths = from_proto(conftest.mlp()), [tmp_path / "dense.onnx", tmp_path / "cut.onnx"]
    save(model, paths[0])
    config = replace(CONFIG, target=Target("keep_params", keep), rank_multiple=8, forms=frozenset({"pair"}))
    report = onnxlr.compress(model, {"x": conftest.rows(640)}, config, output=paths[1])
    pairs = sum(weight.form == "pair" for weight in report.weights)
    assert pairs
    dense, cut = (layers(path) for path in paths)
    # biases and activations stay with the second product of a pair
    assert len(cut) <= len(dense) + pairs, "\n".join(cut)


def layers(path: Path) -> list[str]:
    """The layers of the engine that TensorRT makes of a model of `x [N, 64]`."""
    import tensorrt
    from polygraphy.backend.trt import CreateConfig, EngineFromNetwork, NetworkFromOnnxPath, Profile

    profile = Profile().add("x", (1, 64), (8, 64), (64, 64))
    engine = EngineFromNetwork(NetworkFromOnnxPath(str(path)), CreateConfig(profiles=[profile]))()
    described = engine.create_engine_inspector().get_engine_information(tensorrt.LayerInformationFormat.JSON)
    return [str(layer) for layer in json.loads(described)["Layers"]]

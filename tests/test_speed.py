"""Models in turn and layers as products: what the commands say, and what becomes of times kept between processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import invoke, mlp, parse, rows
from models import parsed, random
from onnx import numpy_helper
from test_latency import Formula

import onnxlr
from onnxlr.errors import ConfigError, DataError, ModelError
from onnxlr.latency import Timings
from onnxlr.memory import peak_memory
from onnxlr.model_io import from_proto
from onnxlr.timing_cache import recalled, remember


def figures(*arguments: Any) -> Any:
    result = invoke(*arguments, "--json")
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


def test_bench_times_every_model_at_every_size(shelf: Path) -> None:
    model = shelf / "mlp.onnx"
    common = ("--threads", 1, "--runs", 3)
    document = figures("bench", model, model, "--batch", "1,5", "--calib", shelf / "calib", *common)
    assert document["format"] == "onnxlr-benchmark/1"
    assert document["models"] == [str(model)] * 2
    assert document["file_bytes"] == [model.stat().st_size] * 2
    assert set(document["latencies"]) == {"1", "5"}
    for first, second in document["latencies"].values():
        assert first["runs"] == second["runs"] == 3
        assert first["ratio"] == 1
        assert 0 < second["ratio_p10"] <= second["ratio"] <= second["ratio_p90"]
    table = invoke("bench", model, "--batch", 2, *common)
    assert (table.code, table.err) == (0, "")
    assert str(model) in table.out


def test_bench_without_data_runs_the_batch_that_is_asked_for(shelf: Path) -> None:
    done = onnxlr.bench([shelf / "mlp.onnx"], batch_sizes=(3, 7), runs=2, threads=1)
    assert set(done.latencies) == {3, 7}
    fixed = onnxlr.bench([mlp(batch="4")], batch_sizes=(1, 8), runs=2, threads=1)
    assert set(fixed.latencies) == {4}


def test_what_cannot_be_timed_is_one_line(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to time"):
        onnxlr.bench([])
    with pytest.raises(ConfigError, match="batch size 0"):
        onnxlr.bench([mlp()], batch_sizes=(0,))
    with pytest.raises(DataError, match="no sample"):
        onnxlr.bench([mlp()], [])
    for wrong in ("0", "1,,2", "few"):
        assert invoke("bench", shelf / "mlp.onnx", "--batch", wrong).code == 2
    other = invoke("bench", shelf / "mlp.onnx", shelf / "attention.onnx", "--runs", 1)
    assert (other.code, other.out) == (1, "")
    assert other.err.startswith("onnxlr: error: ")
    assert other.err.count("\n") == 1
    gone = invoke("bench", tmp_path / "gone.onnx")
    assert (gone.code, gone.err.count("\n")) == (1, 1)


def test_memory_grows_with_the_weights_and_is_of_the_model_alone() -> None:
    """16 MB of weights take at least 16 MB, whatever this process holds itself."""
    ballast = np.ones(2 * 10**7)
    feed = {"x": rows(4)}
    wide = np.full((64, 60_000), 0.5, np.float32)
    text = "wide (float[N, 64] x) => (float[N, 1] y) { h = MatMul(x, w)  y = MatMul(h, v) }"
    model = from_proto(parse(text, {"w": wide, "v": np.ones((60_000, 1), np.float32)}))
    small = peak_memory(from_proto(mlp()), feed, threads=1)
    assert small + wide.nbytes < peak_memory(model, feed, threads=1) < small + 8 * wide.nbytes < ballast.nbytes
    with pytest.raises(ModelError, match="could not be measured: "):
        peak_memory(from_proto(mlp()), {"x": rows(4, 32)})


def test_profile_prices_layers_as_the_plan_does_and_keeps_the_times(shelf: Path) -> None:
    command = ("profile", shelf / "mlp.onnx", "--batch", 64, "--threads", 1)
    document = figures(*command, "--rank-multiple", 8)
    assert document["format"] == "onnxlr-profile/1"
    assert (document["batch"], document["dtype"], document["refused"]) == (64, "float32", 0)
    shapes = [(layer["d_in"], layer["d_out"], layer["rows"], layer["weights"]) for layer in document["layers"]]
    assert shapes == [(64, 96, 64, 1), (96, 96, 64, 1), (96, 10, 64, 1)]
    square = document["layers"][1]
    assert (square["break_even"], square["half_rank"]) == (48, 24)
    assert square["half_us"] > 0
    narrow = document["layers"][2]
    assert (narrow["half_rank"], narrow["half_us"]) == (None, None)
    kept = json.loads(Path(document["cache"]).read_text())
    assert kept["made_on"]["threads"] == 1
    assert {tuple(entry[:1]) for entry in kept["products"]} == {(64,)}
    table = invoke(*command)
    assert (table.code, table.err) == (0, "")
    assert document["cache"] in table.out


def test_rows_of_a_fixed_batch_are_those_of_the_batch() -> None:
    fixed, free = (onnxlr.profile(mlp(batch=batch), batch=16, threads=1) for batch in ("16", "N"))
    assert fixed.batch == free.batch == 16
    assert [layer.rows for layer in fixed.layers] == [layer.rows for layer in free.layers] == [16] * 3


def test_layers_in_functions_are_timed_too() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[N, 32] x) => (float[N, 8] y) { h = own.layer(x, w) y = MatMul(h, v) }
        <domain: "own", opset_import: ["" : 17]> layer (x, w) => (y) { p = MatMul(x, w) y = Relu(p) }"""
    proto = onnx.parser.parse_model(text)
    for name, array in (("w", random(1, 32, 24)), ("v", random(2, 24, 8))):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    found = onnxlr.profile(proto, threads=1)
    assert [(layer.d_in, layer.d_out) for layer in found.layers] == [(32, 24), (24, 8)]


def test_what_can_be_read_once_is_timed_at_every_size() -> None:
    model = from_proto(mlp())
    found = onnxlr.bench([model], iter([{"x": row[None]} for row in rows(12)]), batch_sizes=(1, 4), runs=2, threads=1)
    assert set(found.latencies) == {1, 4}
    assert onnxlr.profile(model, iter([{"x": row[None]} for row in rows(12)]), batch=4, threads=1).batch == 4


def test_profile_times_convolutions_as_such_and_an_older_cache_is_not_believed() -> None:
    arrays = {"w": random(1, 16, 8, 3, 3), "v": random(2, 16, 8, 3, 3), "u": random(3, 16, 8, 3, 3)}
    body = "a = Conv<pads = [1, 1, 1, 1]>(x, w) b = Conv<strides = [2, 2]>(x, v) c = Conv<pads = [1, 1, 1, 1]>(x, u)"
    outputs = ", ".join(f"float[N, 16, {size}, {size}] {name}" for name, size in (("a", 9), ("b", 4), ("c", 9)))
    model = parsed(f"(float[N, 8, 9, 9] x) => ({outputs})", body, **arrays)
    done = onnxlr.profile(model, batch=2, threads=1, rank_multiple=4)
    assert [(layer.d_in, layer.d_out, layer.rows, layer.weights) for layer in done.layers] == [
        (72, 16, 162, 2), (72, 16, 32, 1)]  # fmt: skip
    assert all(layer.dense_us > 0 for layer in done.layers)
    kept = json.loads(Path(done.cache).read_text())
    strides = {tuple(over["attributes"]["strides"]) for over, *_ in kept["products"] if isinstance(over, dict)}
    assert strides == {(1, 1), (1, 2), (2, 1), (2, 2)}
    Path(done.cache).write_text(json.dumps({**kept, "format": "onnxlr-timings/1"}))
    assert not recalled(threads=1)[1]


def test_times_are_scaled_to_the_pace_of_now_and_refused_out_of_proportion() -> None:
    timings = Formula(threads=1)
    sizes = [(128, d, e) for d in (64, 128, 256, 512) for e in (64, 128, 256, 512)]
    timings.measure(sizes)
    timings.moved(128, 256)
    document = timings.to_dict()
    assert json.loads(json.dumps(document)) == document

    slow = {
        "reference": {runs: 50 * one for runs, one in document["reference"].items()},
        **{key: [[*entry[:3], 50 * entry[3]] for entry in document[key]] for key in ("products", "moves")},
    }
    other = Formula(threads=1)
    assert other.recall(slow)
    for one in sizes:
        assert other.product(*one) == pytest.approx(timings.product(*one), rel=2**-9)
    skewed = {**document, "products": [[r, d, e, t * (1000 if d > e else 1)] for r, d, e, t in document["products"]]}
    fresh = Formula(threads=1)
    assert not fresh.recall(skewed)
    assert fresh.to_dict()["products"] == []
    assert not fresh.recall({"reference": None, "products": [], "moves": []})


def test_a_cache_for_another_setting_or_a_damaged_one_is_as_good_as_none(cache: Path) -> None:
    timings = Timings(threads=1, dtype="float64")
    timings.product(128, 64, 64)
    settings: dict[str, Any] = {"threads": 1, "dtype": "float64"}
    path = remember(timings, **settings)
    assert path.is_relative_to(cache)
    assert remember(timings, threads=2, dtype="float64") != path
    assert not recalled(threads=3, dtype="float64")[1]
    for damage in ("", "{}", "[]", '{"format": 3}', path.read_text()[:-20], path.read_text().replace("128,", '"x",')):
        path.write_text(damage)
        found, held = recalled(**settings)
        assert not held
        assert found.to_dict()["products"] == []


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(onnxlr.OnnxlrError, match="set XDG_CACHE_HOME to another"):
        remember(Timings(threads=1), threads=1)


@pytest.mark.parametrize(("given", "provider", "multiple"), [("auto", "cpu", 16), ("8", "cpu", 8), ("auto", "cuda", 8)])
def test_ranks_are_multiples_of_what_the_provider_likes(
    shelf: Path, tmp_path: Path, given: str, provider: str, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("onnxlr.pipeline.compress", lambda *args, **_: seen.append(args[2].rank_multiple) or stop())

    def stop() -> None:
        raise ConfigError("enough")

    fixed = ("--calib", shelf / "calib", "-o", tmp_path / "o.onnx", "--provider", provider)
    assert invoke("compress", shelf / "mlp.onnx", *fixed, "--rank-multiple", given).err == "onnxlr: error: enough\n"
    assert seen == [multiple]
    assert invoke("compress", shelf / "mlp.onnx", *fixed, "--rank-multiple", "0").code == 2


def test_half_precision_weights_are_timed_in_half_precision() -> None:
    half = mlp()
    for tensor in half.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    assert onnxlr.profile(half, threads=1, batch=2).dtype == "float16"

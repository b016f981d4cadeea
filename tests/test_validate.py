"""Parity over a data set against numpy on whole arrays, and Polygraphy's verdict against its own command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from conftest import invoke
from models import random
from onnx import numpy_helper

import onnxlr
from onnxlr.data import Dataset, Feed, TensorSpec, open_data, split
from onnxlr.errors import ConfigError, DataError, ModelError, OutputError
from onnxlr.model_io import Model, from_proto
from onnxlr.polygraphy_files import Tolerance, run_comparator, tolerances, write_polygraphy
from onnxlr.task_metrics import top1
from onnxlr.validate import compare, validate

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((4, 3)).astype(np.float32)
NOISE = RNG.standard_normal((4, 3)).astype(np.float32)
SAMPLES = RNG.standard_normal((11, 4)).astype(np.float32)
LABELS = (SAMPLES @ (WEIGHT + 0.8 * NOISE)).argmax(axis=-1)
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def parsed(signature: str, body: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f"{HEADER} g {signature} {{ {body} }}")
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return from_proto(proto)


def classifier(weight: np.ndarray, rows: str = "N") -> Model:
    signature = f"(float[{rows}, 4] x) => (float[{rows}, 3] logits, int64[{rows}] label, bool[{rows}, 4] positive)"
    body = "logits = MatMul(x, w)  label = ArgMax<axis = 1, keepdims = 0>(logits)  positive = Greater(x, zero)"
    return parsed(signature, body, w=weight, zero=np.float32(0).reshape(()))


def linear(weight: np.ndarray, signature: str = "(float[N, 4] x) => (float[N, 3] y)") -> Model:
    return parsed(signature, "y = MatMul(x, w)", w=weight)


def dataset(samples: np.ndarray = SAMPLES, rows: int | str = "N") -> Dataset:
    spec = TensorSpec("x", np.dtype(np.float32), (rows, *samples.shape[1:]))
    return open_data([{"x": sample[None]} for sample in samples], [spec])


def relative(reference: np.ndarray, candidate: np.ndarray) -> float:
    return float(np.linalg.norm(reference - candidate) / np.linalg.norm(reference))


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_parity_and_metric_are_those_of_the_whole_set(batch: int) -> None:
    progress: list[int] = []
    a, b = classifier(WEIGHT), classifier(WEIGHT + 0.2 * NOISE)
    validation = validate(
        a, b, dataset(), batch=batch, labels=LABELS, max_error=0.5, threads=1, progress=progress.append
    )
    reference, candidate = SAMPLES @ WEIGHT, SAMPLES @ (WEIGHT + 0.2 * NOISE)
    logits, label, positive = validation.outputs
    assert (logits.name, label.name, positive.name) == ("logits", "label", "positive")
    assert logits.relative_l2 == pytest.approx(relative(reference, candidate), rel=1e-5)
    agreement = (reference.argmax(-1) == candidate.argmax(-1)).mean()
    assert logits.top1_agreement == label.agreement == pytest.approx(agreement)
    assert positive.agreement == 1.0
    assert validation.error == logits.relative_l2
    assert validation.metric_name == "top1"
    assert validation.metric_a == pytest.approx(top1({"logits": reference}, LABELS))
    assert validation.metric_b == pytest.approx(top1({"logits": candidate}, LABELS))
    assert validation.samples == sum(progress) == 11
    assert validation.passed is True
    document = json.loads(json.dumps(validation.to_dict(), allow_nan=False))
    assert document["outputs"][0]["relative_l2"] == logits.relative_l2
    assert document["max_error"] == 0.5


def test_the_gate() -> None:
    a, b = linear(WEIGHT), linear(WEIGHT + 0.2 * NOISE)
    assert validate(a, b, dataset(), threads=1).passed is None
    assert validate(a, b, dataset(), threads=1, max_error=0.001).passed is False
    same = validate(a, a, dataset(), threads=1, max_error=0.0)
    assert (same.passed, same.error, same.metric_name, same.metric_a) == (True, 0.0, None, None)


def test_a_part_of_the_data_keeps_its_labels() -> None:
    _, held_out = split(dataset(), holdout_every=3)
    kept = np.array([1, 4, 7, 10])
    validation = validate(classifier(WEIGHT), classifier(WEIGHT), held_out, labels=LABELS, threads=1)
    assert validation.samples == 4
    assert validation.metric_a == pytest.approx(top1({"logits": SAMPLES[kept] @ WEIGHT}, LABELS[kept]))


def test_a_fixed_batch_drops_the_rest_with_its_labels() -> None:
    model = classifier(WEIGHT, rows="4")
    with pytest.warns(UserWarning, match="3 samples left out"):
        validation = validate(model, model, dataset(rows=4), labels=LABELS, threads=1)
    assert validation.samples == 8
    assert validation.metric_a == pytest.approx(top1({"logits": SAMPLES[:8] @ WEIGHT}, LABELS[:8]))


def test_without_a_batch_axis_a_feed_is_a_sample() -> None:
    signature = "(float[N, 4] x, float scale) => (float[N, 3] y)"
    a, b = (parsed(signature, "h = MatMul(x, w)  y = Mul(h, scale)", w=w) for w in (WEIGHT, WEIGHT + NOISE))
    specs = [TensorSpec("x", np.dtype(np.float32), ("N", 4)), TensorSpec("scale", np.dtype(np.float32), ())]
    data = open_data([{"x": SAMPLES[:5], "scale": np.float32(2)}, {"x": SAMPLES[5:], "scale": np.float32(2)}], specs)
    validation = validate(a, b, data, threads=1)
    assert validation.samples == 2
    assert validation.error == pytest.approx(relative(SAMPLES @ WEIGHT, SAMPLES @ (WEIGHT + NOISE)), rel=1e-5)


def test_padding_does_not_count() -> None:
    signature = "(float[N, S, 4] x, int64[N, S] mask) => (float[N, S, 3] y, int64[N, S] same)"
    a, b = (parsed(signature, "y = MatMul(x, w)  same = Identity(mask)", w=w) for w in (WEIGHT, WEIGHT + 0.2 * NOISE))
    x = RNG.standard_normal((3, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    specs = [TensorSpec("x", np.dtype(np.float32), ("N", "S", 4)), TensorSpec("mask", np.dtype(np.int64), ("N", "S"))]
    data = open_data([{"x": x, "mask": mask}], specs)
    validation = validate(a, b, data, mask="mask", batch=2, threads=1)
    real = x[mask != 0]
    assert validation.error == pytest.approx(relative(real @ WEIGHT, real @ (WEIGHT + 0.2 * NOISE)), rel=1e-5)
    assert validation.outputs[0].count == 9 * 3
    with pytest.raises(DataError, match="'padding' is none of the model's inputs: 'x', 'mask'"):
        validate(a, b, data, mask="padding", threads=1)


def test_a_candidate_of_half_precision_is_compared() -> None:
    half = parsed("(float[N, 4] x) => (float16[N, 3] y)", "h = MatMul(x, w)  y = Cast<to = 10>(h)", w=WEIGHT)
    assert 0 < validate(linear(WEIGHT), half, dataset(), threads=1).error < 1e-3


def test_stored_references_are_compared() -> None:
    feeds: list[Feed] = [{"x": SAMPLES[:6]}, {"x": SAMPLES[6:]}]
    runs = [(feed, {"y": feed["x"] @ WEIGHT}, {"y": feed["x"] @ (WEIGHT + NOISE)}) for feed in feeds]
    (parity,) = compare(runs)
    assert parity.relative_l2 == pytest.approx(relative(SAMPLES @ WEIGHT, SAMPLES @ (WEIGHT + NOISE)), rel=1e-6)
    assert compare([]) == ()


@pytest.mark.parametrize(
    ("signature", "body", "message"),
    [
        (
            "(float[N, 4] z) => (float[N, 3] y)",
            "y = MatMul(z, w)",
            "input 'x' of the first model is missing in the second",
        ),
        (
            "(float[N, 4] x, float[N, 4] z) => (float[N, 3] y)",
            "y = MatMul(x, w)",
            "input 'z' of the second model is missing in the first",
        ),
        (
            "(float[N, 4] x) => (float[N, 3] z)",
            "z = MatMul(x, w)",
            "output 'y' of the first model is missing in the second",
        ),
        (
            "(double[N, 4] x) => (float[N, 3] y)",
            "h = Cast<to = 1>(x)  y = MatMul(h, w)",
            r"input 'x' is float32 \[N, 4\] in the first model, float64 \[N, 4\] in the second",
        ),
        (
            "(float[N, 2, 4] x) => (float[N, 2, 3] y)",
            "y = MatMul(x, w)",
            r"input 'x' is float32 \[N, 4\] in the first model, float32 \[N, 2, 4\] in the second",
        ),
        (
            "(float[N, 4] x) => (int64[N, 3] y)",
            "h = MatMul(x, w)  y = Cast<to = 7>(h)",
            r"output 'y' is float32 \[N, 3\] in the first model, int64 \[N, 3\] in the second",
        ),
        (
            "(float[N, 4] x) => (float[N, 6] y)",
            "h = MatMul(x, w)  y = Concat<axis = 1>(h, h)",
            r"output 'y' is float32 \[N, 3\] in the first model, float32 \[N, 6\] in the second",
        ),
    ],
)
def test_models_that_cannot_stand_in_for_each_other(signature: str, body: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        validate(linear(WEIGHT), parsed(signature, body, w=WEIGHT), dataset(), threads=1)


def test_labels_have_to_fit_the_samples() -> None:
    model = classifier(WEIGHT)
    with pytest.raises(DataError, match="list: 10 labels for 11 samples; give one a sample"):
        validate(model, model, dataset(), labels=LABELS[:10], threads=1)
    _, held_out = split(dataset(), holdout_every=3)
    with pytest.raises(DataError, match="8 labels for samples numbered up to 10"):
        validate(model, model, held_out, labels=LABELS[:8], threads=1)


def test_messages_of_validate() -> None:
    model = linear(WEIGHT)
    with pytest.raises(ConfigError, match="metric 'my:metric' needs labels"):
        validate(model, model, dataset(), metric="my:metric")
    with pytest.raises(ConfigError, match="max_error nan: expected a finite number, 0 or more"):
        validate(model, model, dataset(), max_error=float("nan"))
    with pytest.raises(DataError, match=r"list \(held out\): no samples to validate on"):
        validate(model, model, Dataset("list (held out)", lambda: iter(())), threads=1)
    with pytest.raises(DataError, match="output 'y' of the candidate model holds NaN"):
        validate(model, linear(np.full_like(WEIGHT, np.nan)), dataset(), threads=1)


def saved(model: Model, path: Path) -> Path:
    onnx.save(model.proto, path)
    return path


def renamed(model: Model, old: str, new: str) -> Model:
    for node in model.proto.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in model.proto.graph.output:
        value.name = new if value.name == old else value.name
    return model


FEEDS: list[Feed] = [{"x": SAMPLES[:4]}, {"x": SAMPLES[4:]}]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A classifier and a worse one, whose output has a colon in its name, as TensorFlow gives them."""
    a, b = (renamed(classifier(w), "logits", "logits:0") for w in (WEIGHT, WEIGHT + 0.05 * NOISE))
    return saved(a, tmp_path / "a.onnx"), saved(b, tmp_path / "b.onnx")


@pytest.mark.parametrize(("max_error", "passed"), [(0.5, True), (0.001, False)])
def test_polygraphys_command_line_gives_the_same_verdict(
    pair: tuple[Path, Path], tmp_path: Path, max_error: float, passed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "polygraphy files"
    verdicts = write_polygraphy(folder, *pair, FEEDS, max_error=max_error)
    assert capfd.readouterr() == ("", "")
    assert all(verdict.passed for verdict in verdicts) is passed
    assert [verdict.name for verdict in verdicts] == ["logits:0", "label", "positive"]
    assert sorted(path.name for path in folder.iterdir()) == ["inputs.json", "outputs_a.json", "run.sh"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run = subprocess.run(
        [folder / "run.sh"], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert (run.returncode == 0) is passed, run.stdout + run.stderr
    assert f"Passed: {2 if passed else 0}/2 iterations" in run.stdout


def test_verdicts_are_those_of_the_documented_statistics(pair: tuple[Path, Path]) -> None:
    verdicts = {verdict.name: verdict for verdict in run_comparator(*pair, FEEDS, max_error=0.05)}
    reference, candidate = SAMPLES @ WEIGHT, SAMPLES @ (WEIGHT + 0.05 * NOISE)
    difference = np.abs(reference - candidate)
    logits = verdicts["logits:0"]
    assert logits.tolerance.atol == pytest.approx(0.05 * np.sqrt(np.mean(reference**2)), rel=1e-6)
    assert logits.value == pytest.approx(max(difference[:4].mean(), difference[4:].mean()), rel=1e-4)
    assert logits.passed is (logits.value <= logits.tolerance.atol)
    assert verdicts["label"].tolerance == Tolerance("quantile", 0.0, 0.95)
    assert verdicts["positive"].tolerance == Tolerance("mean", 0.05)


def test_integer_and_bool_outputs_may_differ_in_a_share(tmp_path: Path) -> None:
    signature, body = "(int64[N] x) => (int64[N] y, bool[N] z)", "y = Min(x, most)  z = Greater(x, least)"
    a = saved(parsed(signature, body, most=np.array(9), least=np.array(1)), tmp_path / "a.onnx")
    b = saved(parsed(signature, body, most=np.array(4), least=np.array(2)), tmp_path / "b.onnx")
    feeds: list[Feed] = [{"x": np.array([-1, 0, 1, 2, 5])}]  # the models differ in y for 5, in z for 2
    y, z = run_comparator(a, b, feeds, max_error=0.25)
    assert (y.passed, y.value, z.passed, z.value) == (True, 0.0, True, pytest.approx(0.2))
    y, z = run_comparator(a, b, feeds, max_error=0.15)
    assert (y.passed, z.passed) == (False, False)


def test_empty_outputs_pass(tmp_path: Path) -> None:
    body = "y = Slice(x, zero, zero, axis)"
    model = parsed("(float[N, 4] x) => (float[N, 0] y)", body, zero=np.array([0]), axis=np.array([1]))
    path = saved(model, tmp_path / "a.onnx")
    (verdict,) = run_comparator(path, path, FEEDS, max_error=0.1)
    assert (verdict.passed, verdict.tolerance) == (True, Tolerance("elemwise", 0.0))


def test_outputs_of_other_shapes_fail(tmp_path: Path) -> None:
    signature = "(float[N, 4] x) => (float[N, M] y)"
    a, b = (
        saved(linear(WEIGHT, signature), tmp_path / "a.onnx"),
        saved(linear(WEIGHT[:, :2], signature), tmp_path / "b"),
    )
    (verdict,) = run_comparator(a, b, FEEDS, max_error=0.1)
    assert (verdict.passed, verdict.value) == (False, None)


def test_polygraphys_files_are_not_overwritten(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_polygraphy(tmp_path / "p", *pair, FEEDS, max_error=0.1)
    with pytest.raises(OutputError, match=r"inputs\.json exists already: pass --force"):
        write_polygraphy(tmp_path / "p", *pair, FEEDS, max_error=0.1)
    before = (tmp_path / "p" / "run.sh").read_text()
    write_polygraphy(tmp_path / "p", *pair, FEEDS, max_error=0.2, force=True)
    assert (tmp_path / "p" / "run.sh").read_text() != before
    with pytest.raises(OutputError, match=r"a\.onnx cannot be created"):
        write_polygraphy(pair[0], *pair, FEEDS, max_error=0.1)


def test_messages_of_the_comparator(pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no feed to compare on"):
        run_comparator(*pair, [], max_error=0.1)
    with pytest.raises(ConfigError, match="max_error inf: expected a finite number, 0 or more"):
        run_comparator(*pair, FEEDS, max_error=float("inf"))
    with pytest.raises(ConfigError, match=r"max_error -1\.0"):
        run_comparator(*pair, FEEDS, max_error=-1.0)
    with pytest.raises(ModelError, match=r"Polygraphy cannot run a\.onnx and nothing\.onnx"):
        run_comparator(pair[0], tmp_path / "nothing.onnx", FEEDS, max_error=0.1)
    with pytest.raises(ModelError, match=r"Polygraphy cannot run a\.onnx and b\.onnx"):
        run_comparator(*pair, [{"x": np.ones((2, 5), np.float32)}], max_error=0.1)
    other = saved(linear(WEIGHT, "(float[N, 4] x) => (float[N, 3] y)"), tmp_path / "other.onnx")
    with pytest.raises(
        ModelError, match=r"a\.onnx has the outputs 'logits:0', 'label', 'positive', other\.onnx has 'y'"
    ):
        run_comparator(pair[0], other, FEEDS, max_error=0.1)
    infinite = saved(linear(np.full_like(WEIGHT, np.inf)), tmp_path / "infinite.onnx")
    with pytest.raises(DataError, match="output 'y' of the reference model holds NaN or infinity"):
        run_comparator(infinite, other, FEEDS, max_error=0.1)
    signature, texts = "(float[N, 4] x) => (string[N, 4] y)", tmp_path / "texts.onnx"
    saved(parsed(signature, "y = Cast<to = 8>(x)"), texts)
    with pytest.raises(ModelError, match="Polygraphy cannot compare the outputs"):
        run_comparator(texts, texts, FEEDS, max_error=0.1)
    assert capfd.readouterr() == ("", "")


def test_a_model_of_text_is_validated_without_polygraphy(tmp_path: Path) -> None:
    signature, texts = "(float[N, 4] x) => (string[N, 4] y)", tmp_path / "texts.onnx"
    saved(parsed(signature, "y = Cast<to = 8>(x)"), texts)
    np.save(tmp_path / "x.npy", FEEDS[0]["x"])
    found = invoke("validate", texts, texts, "--data", tmp_path / "x.npy", "--json")
    assert (found.code, found.err) == (0, "")
    document = json.loads(found.out)
    assert (document["error"], document["polygraphy"]) == (0, [])


def test_an_integer_output_counts_beside_a_floating_one(tmp_path: Path) -> None:
    signature = "(float[N, 4] x) => (int64[N] label, float[N, 4] y)"
    body = "s = MatMul(x, w) label = ArgMax<axis = 1, keepdims = 0>(s) y = Identity(x)"
    one, other = (parsed(signature, body, w=random(seed, 4, 5)) for seed in (1, 2))
    x = random(3, 64, 4)
    found = onnxlr.validate(one, other, {"x": x}, max_error=0.05)
    wrong = np.mean((x @ random(1, 4, 5)).argmax(1) != (x @ random(2, 4, 5)).argmax(1))
    assert found.error == pytest.approx(wrong)
    assert not found.passed


def test_labels_may_be_a_list() -> None:
    model = parsed("(float[N, 4] x) => (float[N, 4] y)", "y = Identity(x)")
    assert onnxlr.validate(model, model, {"x": np.eye(4, dtype=np.float32)}, labels=[0, 1, 2, 0]).metric_a == 0.75


def test_tolerances_of_narrow_floats_do_not_overflow() -> None:
    outputs = [{"y": np.full((2, 2), 60000, np.float16)}]
    assert tolerances(outputs, 0.5) == {"y": Tolerance("mean", 30000.0)}

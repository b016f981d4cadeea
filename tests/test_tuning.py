"""Fine-tuning: what is compared and trained, that it helps, never harms, and goes on where it was stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from conftest import attention, invoke, mlp, parse, rows, sequences, shell
from hypothesis import given, settings
from hypothesis import strategies as st
from models import constant, parsed, random

import onnxlr
from onnxlr.case import prepare
from onnxlr.config import Config, Target, Tuning
from onnxlr.data import ImageOptions, TensorSpec, open_data
from onnxlr.errors import ConfigError, DataError, ModelError
from onnxlr.model_io import Model, from_proto

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, Any]

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from onnxlr.tuning import recover  # noqa: E402
from onnxlr.tuning.augment import SHIFT, augment, takes_images  # noqa: E402
from onnxlr.tuning.distill import INNER, plan_lesson  # noqa: E402
from onnxlr.tuning.stream import Stream  # noqa: E402
from onnxlr.tuning.trained import trained_weights, with_weights  # noqa: E402
from onnxlr.tuning.training import WARM_UP, schedule  # noqa: E402
from onnxlr.waists import waists  # noqa: E402

ONE = Config(threads=1)
PAIRS = replace(ONE, target=Target("keep_params", 0.4), rank_multiple=4, forms=frozenset({"pair"}), objective="output")
MANY = [{"x": rows(4000)}]
FEW = [{"x": rows(48)}]


def arrays(model: Model | onnx.ModelProto) -> dict[str, Array]:
    proto = model.proto if isinstance(model, Model) else model
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model `mlp` at 40% of its parameters."""
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    onnxlr.compress(mlp(), [{"x": rows(640)}], PAIRS, output=path)
    return path


# what is compared


def test_the_waists_of_residual_blocks_are_their_ends() -> None:
    block = "n{0} = Tanh({1}) m{0} = MatMul(n{0}, w{0}) r{0} = Add({1}, m{0}) "
    weights = {f"w{i}": random(i, 4, 4) for i in range(3)}
    body = block.format(0, "x") + block.format(1, "r0") + block.format(2, "r1") + "y = Tanh(r2)"
    model = parsed("(float[N, 4] x) => (float[N, 4] y)", body, **weights)
    assert waists(model.proto.graph, weights) == ["r0", "r1", "r2"]
    # the first block, left as it was, gives what it always gave
    assert waists(model.proto.graph, {"w1", "w2"}) == ["r1", "r2"]


def test_the_waists_of_a_chain_are_what_its_layers_hand_on() -> None:
    assert waists(mlp().graph, {"w1", "b1", "w2", "b2", "w3"}) == ["h1", "h2"]


def test_masks_and_shapes_may_go_past_a_waist() -> None:
    body = """h = MatMul(x, w) s = Shape(h) masked = Mul(h, m) g = MatMul(masked, v)
              flat = Reshape(g, s) again = Mul(flat, m) y = Tanh(again)"""
    model = parsed("(float[N, 4] x, float[N, 4] m) => (float[N, 4] y)", body, w=random(1, 4, 4), v=random(2, 4, 4))
    assert waists(model.proto.graph, {"w", "v"}) == ["masked", "again"]


def test_the_loss_is_the_relative_square_over_real_tokens() -> None:
    dense = from_proto(attention())
    changed = {"wq": 0.5, "wo": 0.9, "wt": 1.1}
    small = with_weights(dense, {n: a * changed[n] for n, a in arrays(dense).items() if n in changed})
    graphs = [onnxlr_torch(model) for model in (small, dense)]
    x, mask = np.stack([rows(10, 48, seed=s) for s in (1, 2, 3)]), np.ones((3, 10), np.int64)
    mask[1, 6:] = mask[2, 3:] = 0
    feed = {"x": torch.from_numpy(x), "mask": torch.from_numpy(mask)}
    lesson = plan_lesson((small, graphs[0]), (dense, graphs[1]), [*changed], [(feed, mask)], None)
    assert set(lesson.scores) == {"hidden", "pooled"}
    assert lesson.inner, "attention has a waist"
    ours, theirs = lesson.asked
    s, t = (graph(feed, outputs=names) for graph, names in zip(graphs, (ours, theirs), strict=True))

    def part(name: str, *, centred: bool = False) -> float:
        a, b = (tensors[name].detach().numpy().astype(np.float64) for tensors in (s, t))
        real = mask.astype(bool) if a.ndim == 3 else np.ones(3, bool)
        return float(((a - b)[real] ** 2).mean() / ((b - b.mean(0) if centred else b)[real] ** 2).mean())

    expected = (part("hidden") + part("pooled")) / 2
    expected += INNER * np.mean([part(name, centred=True) for name in lesson.inner])
    assert float(lesson.loss(s, t, mask, None)) == pytest.approx(expected, rel=1e-4)
    assert float(lesson.loss(t, t, mask, None)) == 0


def onnxlr_torch(model: Model) -> Any:
    from onnxlr.torch_graph import to_torch

    return to_torch(model)


# what is trained


def test_factors_are_what_the_dense_model_has_not(small: Path) -> None:
    dense, ours = from_proto(mlp()), onnxlr.load(small)
    names = trained_weights(ours, dense, "factors")
    theirs = arrays(dense)
    assert names
    for name, array in arrays(ours).items():
        same = name in theirs and np.array_equal(array, theirs[name])
        assert (name in names) != same or array.dtype != np.float32


def test_all_are_what_operators_learn_and_nothing_else() -> None:
    body = f"""{constant("eps", random(5, 4))} h = MatMul(x, w) s = Add(h, b) a = Mul(s, far) c = Add(a, table)
               y = LayerNormalization(c, g)"""
    weights = {"w": random(1, 4, 4), "b": random(2, 4), "g": random(3, 4)}
    others = {"far": np.float32(-1e4).reshape(1), "table": random(4, 3, 4)}
    model = parsed("(float[3, 4] x) => (float[3, 4] y)", body, **weights, **others)
    assert trained_weights(model, model, "all") == [*weights]
    with pytest.raises(ConfigError, match="nothing to train: compress it first, or pass --train all"):
        trained_weights(model, model, "factors")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_go_back_by_name_and_leave_all_else(dtype: Any) -> None:
    kind = {"float32": "float", "float16": "float16"}[np.dtype(dtype).name]
    model = parsed(
        f"({kind}[N, 4] x) => ({kind}[N, 4] y)", "h = MatMul(x, w) y = Add(h, b)",
        w=random(1, 4, 4, dtype=dtype), b=random(2, 4, dtype=dtype),
    )  # fmt: skip
    before = model.proto.SerializeToString(deterministic=True)
    w = random(3, 4, 4)
    again = with_weights(model, {"w": w})
    np.testing.assert_array_equal(arrays(again)["w"], w.astype(dtype))
    assert model.proto.SerializeToString(deterministic=True) == before
    assert with_weights(again, {"w": arrays(model)["w"]}).proto.SerializeToString(deterministic=True) == before
    with pytest.raises(ModelError, match=r"weight 'w' \[2, 4\] cannot go back into the graph: it has one of shape"):
        with_weights(model, {"w": random(1, 2, 4)})
    with pytest.raises(ModelError, match=r"weight 'v' .* no initializer of this name"):
        with_weights(model, {"v": random(1, 2, 4)})


def test_steps_rise_and_fall_once() -> None:
    rates = [schedule(step / 1000) for step in range(1001)]
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(1, abs=1e-3)
    assert top == pytest.approx(1000 * WARM_UP, abs=1)
    assert rates[0] > 0
    assert rates[-1] == pytest.approx(0, abs=1e-6)
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()


# the order of samples


def stream(lengths: Sequence[int], batch: int, *, first: int | str = "N", **options: Any) -> Stream:
    inputs = [TensorSpec("x", np.dtype(np.float32), (first, None))]
    feeds = [{"x": np.full((1, length), index, np.float32)} for index, length in enumerate(lengths)]
    return Stream(open_data(feeds, inputs), inputs, batch, options.pop("seed", 0), **options)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=30), st.integers(1, 7), st.integers(0, 3))
def test_an_epoch_shows_every_sample_once_but_for_what_fills_no_batch(
    lengths: list[int], batch: int, epoch: int
) -> None:
    samples = stream(lengths, batch)
    seen: list[int] = []
    for step in range(epoch * samples.steps, (epoch + 1) * samples.steps):
        feed, chosen, share = samples[step]
        assert share == 1
        assert feed["x"][:, 0].tolist() == chosen
        assert {lengths[index] for index in chosen} == {feed["x"].shape[1]}
        seen += chosen
    assert len(seen) == len(set(seen))
    for length in set(lengths):
        alike = [index for index, other in enumerate(lengths) if other == length]
        size = min(batch, len(alike))
        assert len([index for index in seen if index in alike]) == len(alike) // size * size


def test_processes_share_each_batch_and_epochs_differ() -> None:
    whole, parts = stream([2] * 40, 8), [stream([2] * 40, 8, rank=rank, size=3) for rank in range(3)]
    for step in range(2 * whole.steps):
        shares = [part[step] for part in parts]
        assert sorted(index for _, chosen, _ in shares for index in chosen) == sorted(whole[step][1])
        assert sum(share for *_, share in shares) == pytest.approx(1)
    first, second = ([whole[epoch * whole.steps + step][1] for step in range(whole.steps)] for epoch in (0, 1))
    assert first != second
    assert whole[0][1] == stream([2] * 40, 8)[0][1]
    assert whole[0][1] != stream([2] * 40, 8, seed=1)[0][1]


def test_samples_that_make_no_batch_are_refused() -> None:
    with pytest.raises(DataError, match="3 samples make no batch of 4: give more data"):
        stream([2] * 3, 99, first=4)
    with pytest.raises(DataError, match="make no batch of 8 that 3 processes can share"):
        stream([1, 1, 2, 2], 8, rank=0, size=3)
    with pytest.raises(ConfigError, match="cannot share batches of a fixed size, 4"):
        stream([2] * 8, 8, first=4, rank=0, size=2)


# images


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 30), st.integers(8, 30), st.sampled_from([1, 3]), st.integers(0, 1000))
def test_an_augmented_image_is_a_part_of_its_reflection(height: int, width: int, channels: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (6, channels, height, width)).astype(np.uint8)
    found = augment(torch.from_numpy(images), torch.Generator().manual_seed(seed), mix=False)
    assert found.dtype == torch.uint8
    up, left = height // SHIFT, width // SHIFT
    padded = np.pad(images, ((0, 0), (0, 0), (up, up), (left, left)), mode="reflect")
    for wide, image in zip(padded, found.numpy(), strict=True):
        windows = [wide[:, i : i + height, j : j + width] for i in range(2 * up + 1) for j in range(2 * left + 1)]
        assert any(np.array_equal(image, w) or np.array_equal(image, w[..., ::-1]) for w in windows)


def test_blends_stay_within_the_range_of_the_batch() -> None:
    images = (
        torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + torch.arange(64.0)[:, None, None, None]
    )
    found = augment(images, torch.Generator().manual_seed(2), mix=True)
    assert found.dtype == images.dtype
    assert images.min() <= found.min() <= found.max() <= images.max()
    spans = found.amax((1, 2, 3)) - found.amin((1, 2, 3))
    own = [(found[i].mean() - (images.mean((1, 2, 3)))).abs().min() for i in range(64)]
    assert 16 < sum(float(distance) > 0.02 for distance in own) < 48, "about half are blends"
    assert spans.max() < 1.0 + 1e-5, "a blend of images of one value each, plus noise below 1"


def test_images_are_known_by_their_shape() -> None:
    def spec(*shape: int | str) -> list[TensorSpec]:
        return [TensorSpec("x", np.dtype(np.float32), shape)]

    assert takes_images(spec("N", 3, 8, 8))
    assert takes_images(spec("N", 1, "H", "W"))
    assert not takes_images(spec("N", 8, 8, 3))
    assert not takes_images(spec("N", 3, 8))
    assert not takes_images(spec("N", 3, 8, 8) * 2)


# the whole of it


def tuned(small: Path, data: Any, **settings: Any) -> tuple[Model, Any]:
    case = prepare(mlp(), data, ONE, ImageOptions())
    options = {name: settings.pop(name) for name in ("checkpoint", "progress", "labels") if name in settings}
    return recover(
        onnxlr.load(small), case.model, case.calibration, case.held_out, case.inputs, ONE, Tuning(**settings), **options
    )


def test_data_bring_back_what_was_lost(small: Path) -> None:
    # long enough to watch all held-out samples
    model, found = tuned(small, MANY, epochs=10)
    assert found.kept
    assert found.error_after < 0.9 * found.error_before
    # what torch watches is what onnxruntime validates
    assert found.history[0][2] == pytest.approx(found.error_before, rel=1e-4)
    assert min(error for *_, error in found.history) == pytest.approx(found.error_after, rel=1e-4)
    assert found.steps == found.steps_planned == 10 * (3500 // 32)
    ours = arrays(onnxlr.load(small))
    changed = [name for name, array in arrays(model).items() if not np.array_equal(array, ours[name])]
    assert sorted(changed) == sorted(trained_weights(onnxlr.load(small), from_proto(mlp()), "factors"))
    assert found.trained == sum(ours[name].size for name in changed)


def test_few_data_never_make_it_worse(small: Path, tmp_path: Path) -> None:
    given = onnxlr.load(small)
    case = prepare(mlp(), FEW, ONE, ImageOptions())
    model, found = recover(
        given, case.model, case.calibration, case.held_out, case.inputs, ONE, Tuning(epochs=300, learning_rate=0.05)
    )
    assert found.history[-1][1] < 0.75 * found.history[1][1], "it does learn the samples"
    assert found.error_after >= found.error_before
    assert not found.kept
    assert model is given
    assert found.ended.startswith("stopped at step")


def test_a_rate_out_of_all_bounds_ends_the_run_and_harms_nothing(small: Path) -> None:
    _, found = tuned(small, FEW, epochs=40, learning_rate=1e30)
    assert not found.kept
    assert "lower the learning rate" in found.ended


def test_labels_guide_and_guard(small: Path) -> None:
    x = rows(4000)
    labels = np.random.default_rng(0).permutation(np.arange(4000) % 10)
    truth = np.asarray(onnx_run(mlp(), x).argmax(-1))
    _, found = tuned(small, [{"x": x}], labels=truth, epochs=4)
    assert found.kept
    assert found.metric_dense == 1
    assert found.metric_after > found.metric_before
    # noise for labels: whatever is learned of it, the metric on held-out data must not fall
    _, noise = tuned(small, [{"x": x}], labels=labels, epochs=1)
    assert noise.kept == ((noise.metric_after, -noise.error_after) > (noise.metric_before, -noise.error_before))


def onnx_run(model: onnx.ModelProto, x: Array) -> Array:
    from conftest import run

    return run(model, {"x": x})["logits"]


def test_padding_is_no_lesson() -> None:
    data = sequences(64)
    masked = replace(PAIRS, mask="mask", target=Target("keep_params", 0.5))
    report = onnxlr.compress(attention(), data, masked, tuning=Tuning(epochs=20))
    found = report.recovery
    assert found is not None
    assert found.history[0][2] == pytest.approx(found.error_before, rel=1e-4)
    assert report.validation.error == min(found.error_before, found.error_after)


def test_half_precision_is_trained_in_single() -> None:
    w, v = random(1, 32, 24, dtype=np.float16) / 6, random(2, 24, 24, dtype=np.float16) / 5
    body = "h = MatMul(x, w) t = Tanh(h) y = MatMul(t, v)"
    dense = parsed("(float16[N, 32] x) => (float16[N, 24] y)", body, w=w.astype(np.float16), v=v.astype(np.float16))
    data = [{"x": random(3, 1000, 32, dtype=np.float16)}]
    case = prepare(dense, data, ONE, ImageOptions())
    start = with_weights(dense, {"v": (v + 0.05 * random(4, 24, 24)).astype(np.float16)})
    model, found = recover(
        start, dense, case.calibration, case.held_out, case.inputs, ONE, Tuning(epochs=20, learning_rate=5e-3)
    )
    assert found.kept
    assert found.error_after < 0.5 * found.error_before
    assert arrays(model)["v"].dtype == np.float16


class StoppedError(Exception):
    """Somebody pulled the plug."""


def test_a_run_that_was_stopped_ends_as_one_that_was_not(small: Path, tmp_path: Path) -> None:
    whole, unbroken = tuned(small, MANY, epochs=2)
    checkpoint = tmp_path / "state"

    def stop(done: int, total: int, note: str) -> None:
        nonlocal steps
        steps += done
        if steps == 100:
            raise StoppedError

    steps = 0
    with pytest.raises(StoppedError):
        tuned(small, MANY, epochs=2, checkpoint=checkpoint, progress=stop)
    assert checkpoint.exists()
    with pytest.raises(ConfigError, match="is the checkpoint of another run"):
        tuned(small, MANY, epochs=2, seed=1, checkpoint=checkpoint)
    with pytest.raises(ConfigError, match="is the checkpoint of another run"):
        tuned(small, [{"x": rows(4000, seed=9)}], epochs=2, checkpoint=checkpoint)
    notes: list[tuple[int, str]] = []
    again, resumed = tuned(
        small, MANY, epochs=2, checkpoint=checkpoint, progress=lambda done, _, note: notes.append((done, note))
    )
    assert 0 < notes[0][0] <= 100
    assert notes[0][1] == "resumed"
    assert resumed.history[1:] == unbroken.history[1:]
    for name, array in arrays(whole).items():
        np.testing.assert_array_equal(arrays(again)[name], array)
    checkpoint.write_text("something else")
    with pytest.raises(ConfigError, match="is not a checkpoint of onnxlr: name another file, or delete it"):
        tuned(small, MANY, epochs=2, checkpoint=checkpoint)


# from the command's side


@pytest.fixture
def files(shelf: Path, small: Path, tmp_path: Path) -> list[Any]:
    return [shelf / "mlp.onnx", small, "--calib", shelf / "calib", "-o", tmp_path / "tuned.onnx", "--threads", 1]


def test_the_command_writes_the_better_model(files: list[Any], shelf: Path, tmp_path: Path) -> None:
    done = invoke("finetune", *files, "--epochs", 30, "--labels", shelf / "labels.npy", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["format"] == "onnxlr-recovery/1"
    assert found["kept"]
    checked = invoke(
        "validate", shelf / "mlp.onnx", tmp_path / "tuned.onnx", "--data", shelf / "calib", "--json", "--max-error", 9
    )
    assert json.loads(checked.out)["error"] < found["error_before"]
    assert found["metric_after"] >= 0.9
    again = invoke("finetune", *files)
    assert again.code == 1
    assert "exists already: pass --force" in again.err


def test_the_command_says_what_it_did(files: list[Any]) -> None:
    done = invoke("finetune", *files, "--epochs", 30, "-v")
    assert done.code == 0, done.err
    assert "held-out error" in done.out
    assert "written to" in done.out
    assert done.out.count("\n") > 20, "a line for each look at the held-out samples"


def test_a_log_gets_lines_in_place_of_bars(files: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlr.cli.output.LINE_EVERY", 0.0)
    done = invoke("finetune", *files, "--epochs", 1)
    assert re.search(r"^onnxlr: finetune 17/17: loss [0-9.e-]+, held-out error 0\.\d+$", done.err, re.MULTILINE)
    assert re.search(r"^onnxlr: finetune 9/17: .* \d+ s left$", done.err, re.MULTILINE)
    assert not invoke("finetune", *files, "--epochs", 1, "--force", "-q").err


def test_compress_tunes_what_it_made(compress: Any, tmp_path: Path) -> None:
    options = ("--keep-params", 0.4, "--rank-multiple", 4, "--objective", "output", "--forms", "pair")
    assert compress(*options, "--finetune", "--epochs", 30).code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["recovery"]["kept"]
    assert report["validation"]["error"] == report["recovery"]["error_after"] < report["recovery"]["error_before"]
    assert report["seconds"]["finetune"] > 0


@pytest.mark.parametrize("options", [(), ("--finetune",)])
def test_compress_is_done_once(compress: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = compress("--keep-params", 0.4, *options)
    assert done.code == 2
    assert "only fine-tuning is shared by several processes: compress without torchrun" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss", "cross-entropy"), "--loss cross-entropy needs --labels"),
        (("--learning-rate", "nan"), "learning_rate must be above 0 and finite"),
        (("--metric", "no_such_module:f"), "--metric no_such_module:f needs --labels"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(files: list[Any], options: tuple[str, ...], message: str) -> None:
    done = invoke("finetune", *files, *options)
    assert done.code == 2
    assert message in done.err


def test_a_metric_that_is_none_is_said_at_once(files: list[Any], shelf: Path) -> None:
    done = invoke(
        "finetune", *files, "--labels", shelf / "labels.npy", "--metric", "no_such_module:f", "--epochs", 9999
    )
    assert done.code == 2
    assert "no_such_module cannot be imported" in done.err


def test_the_state_of_a_run_is_not_its_result(files: list[Any], tmp_path: Path) -> None:
    done = invoke("finetune", *files, "--checkpoint", tmp_path / "tuned.onnx")
    assert done.code == 2
    assert "tuned.onnx: the state of the run needs a file of its own" in done.err


def test_the_dense_model_itself_has_nothing_to_learn(shelf: Path, tmp_path: Path) -> None:
    done = invoke("finetune", *[shelf / "mlp.onnx"] * 2, "--calib", shelf / "calib", "-o", tmp_path / "out.onnx")
    assert done.code == 2
    assert "nothing to train" in done.err
    assert not (tmp_path / "out.onnx").exists()


def command(files: list[Any], *options: Any) -> list[str]:
    return [str(part) for part in (Path(sys.executable).with_name("onnxlr"), "finetune", *files, *options)]


def test_a_killed_command_goes_on(files: list[Any], tmp_path: Path) -> None:
    options = ("--epochs", 30, "--checkpoint", tmp_path / "state", "--json")
    running = subprocess.Popen(command(files, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (tmp_path / "state").exists():
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it was still running"
    assert not (tmp_path / "tuned.onnx").exists()
    resumed = invoke("finetune", *files, *options)
    assert resumed.code == 0, resumed.err
    files[5] = tmp_path / "unbroken.onnx"
    unbroken = invoke("finetune", *files, *options)
    assert json.loads(unbroken.out)["history"][1:] == json.loads(resumed.out)["history"][1:]
    assert (tmp_path / "unbroken.onnx").read_bytes() == (tmp_path / "tuned.onnx").read_bytes()
    assert not (tmp_path / "state").exists()


def test_two_processes_do_what_one_does(files: list[Any], tmp_path: Path) -> None:
    options = ("--epochs", 3, "--json")
    alone = invoke("finetune", *files, *options)
    alone_weights = arrays(onnxlr.load(files[5]))
    files[5] = tmp_path / "together.onnx"
    words = " ".join(command(files, *options))
    together = shell(f"torchrun --nproc-per-node 2 --no-python {words}", OMP_NUM_THREADS="1")
    assert together.code == 0, together.err
    assert "deprecated" not in together.err
    one, two = (json.loads(done.out) for done in (alone, together))
    assert (one["processes"], two["processes"]) == (1, 2)
    # the same batches, summed in another order
    np.testing.assert_allclose([h[2] for h in two["history"]], [h[2] for h in one["history"]], rtol=1e-4)
    for name, array in arrays(onnxlr.load(files[5])).items():
        if array.dtype == np.float32:
            assert np.linalg.norm(array - alone_weights[name]) <= 1e-3 * np.linalg.norm(array)


def test_outputs_of_any_size_are_learned() -> None:
    config = Config(objective="output", target=Target("keep_params", 0.3), rank_multiple=2, threads=1)
    gained = []
    for scale in (1.0, 1e6, 1e-6, 1e-12):
        proto = mlp()
        for tensor in proto.graph.initializer:
            if tensor.name in ("w3", "b3"):
                array = onnx.numpy_helper.to_array(tensor) * np.float32(scale)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        recovery = onnxlr.compress(proto, {"x": rows(320)}, config, tuning=Tuning(epochs=20)).recovery
        assert recovery is not None
        assert recovery.kept
        gained.append(1 - recovery.error_after / recovery.error_before)
    # a tiny layer has large gradients, which are clipped together with those of the others
    assert min(gained) > 0.25 * gained[0] > 0.02


def test_a_bound_that_tuning_would_miss_keeps_what_met_it() -> None:
    generator = np.random.default_rng(0)
    weights = {"w": generator.normal(size=(32, 48)) / 6, "v": generator.normal(size=(48, 4))}
    model = parse(
        "g (float[N, 32] x) => (float[N, 4] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }",
        {name: array.astype(np.float32) for name, array in weights.items()},
    )
    x = generator.normal(size=(400, 32)).astype(np.float32)
    labels = (x @ generator.normal(size=(32, 4))).argmax(1)  # not what the dense model says
    config = Config(target=Target("max_error", 0.1), rank_multiple=1, threads=1)
    report = onnxlr.compress(model, {"x": x}, config, labels=labels, tuning=Tuning(epochs=20))
    assert report.validation.error <= 0.1
    assert report.recovery is not None
    assert not report.recovery.kept
    assert "misses --max-error 0.1" in report.recovery.ended


def test_a_batch_of_padding_alone_teaches_nothing_and_breaks_nothing() -> None:
    weights = {"w1": random(1, 64, 128) / 8, "w2": random(2, 128, 48) / 8, "axis": np.array([2])}
    model = parse(
        """g (float[N, S, 64] x, int64[N, S] mask) => (float[N, S, 48] y) {
            a = MatMul(x, w1) b = Relu(a) q = MatMul(b, w2) f = Cast<to = 1>(mask) u = Unsqueeze(f, axis) y = Mul(q, u)
        }""",
        weights,
    )
    mask = np.ones((64, 6), np.int64)
    mask[8:24] = 0
    config = Config(objective="output", mask="mask", threads=1, target=Target("keep_params", 0.5))
    report = onnxlr.compress(model, {"x": random(3, 64, 6, 64), "mask": mask}, config, tuning=Tuning(epochs=3, batch=8))
    assert report.recovery is not None
    assert report.recovery.ended == "all 21 steps"
    assert all(np.isfinite(error) for _, _, error in report.recovery.history)


def test_a_loss_without_labels_is_refused_where_one_tunes_too() -> None:
    with pytest.raises(ConfigError, match="--loss cross-entropy needs --labels"):
        onnxlr.compress(mlp(), FEW, Config(loss="cross-entropy", threads=1), tuning=Tuning(epochs=1))


def test_a_run_that_has_ended_has_ended_when_resumed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"epochs": 30, "batch": 16, "learning_rate": 1e30, "checkpoint": tmp_path / "state"}
    with monkeypatch.context() as patched:
        patched.setattr("onnxlr.tuning.recovery._rebuilt", lambda *_: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            tuned(small, FEW, **settings)
    _, resumed = tuned(small, FEW, **settings)
    assert "it diverges, lower the learning rate" in resumed.ended
    assert resumed.steps < resumed.steps_planned

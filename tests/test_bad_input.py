"""Bad input of every kind: one line that says what is wrong, the documented exit code, and not one file left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from conftest import SAMPLE, Result, decaying, invoke, listing, mlp, parse, rows, shell

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def refused(result: Result, code: int, *parts: str) -> None:
    """One line of an error, in this form, with these parts in it."""
    assert result.code == code
    assert result.out == ""
    assert result.err.endswith("\n")
    (line,) = result.err.splitlines()
    assert line.startswith("onnxlr: error: ")
    for part in parts:
        assert part in line


def misused(result: Result, *parts: str) -> None:
    """The usage form of click, with these parts in its last line."""
    assert (result.code, result.out) == (2, "")
    first, *_, last = result.err.splitlines()
    assert first.startswith("Usage: onnxlr ")
    assert last.startswith("Error: ")
    for part in parts:
        assert part in last


@pytest.fixture
def attempt(shelf: Path, tmp_path: Path) -> Callable[..., Result]:
    """`onnxlr compress` into tmp_path, that must leave every file there as it is."""

    def call(
        *options: Any, model: Path = shelf / "mlp.onnx", calib: Path = shelf / "calib", output: str = "out.onnx"
    ) -> Result:
        before = listing(tmp_path)
        result = invoke("compress", model, "--calib", calib, "-o", tmp_path / output, *options)
        assert listing(tmp_path) == before
        return result

    return call


def external(folder: Path, location: str | None = None) -> Path:
    """A model with external data, whose files claim to lie at `location`."""
    model = parse("g (float[N, 64] x) => (float[N, 96] y) { y = MatMul(x, w) }", {"w": np.ones((64, 96), np.float32)})
    path = folder / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location="external.data", size_threshold=0)
    if location is not None:
        model = onnx.load(path, load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = location
        path.write_bytes(model.SerializeToString())
    return path


def test_not_a_model(attempt: Callable[..., Result], shelf: Path, tmp_path: Path) -> None:
    whole = (shelf / "mlp.onnx").read_bytes()
    contents = {
        "text.onnx": b"hello, world\n" * 9,
        "cut.onnx": whole[:9000],
        "head.onnx": whole[:40],
        "empty.onnx": b"",
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        refused(attempt(model=path), 1, str(path))
        refused(invoke("inspect", path), 1, str(path))
    refused(attempt(model=tmp_path / "none.onnx"), 1, "none.onnx does not exist")
    refused(attempt(model=tmp_path), 1, f"{tmp_path} is a folder")


def test_external_data(attempt: Callable[..., Result], shelf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.data").write_bytes(bytes(64 * 96 * 4))
    for location in ("../outside.data", str(tmp_path / "outside.data")):
        refused(attempt(model=external(folder, location)), 1, "'w'", "outside its folder", location)
    path = external(folder)
    (folder / "external.data").write_bytes(bytes(100))
    refused(attempt(model=path), 1, "'w'", "external.data has 100 bytes")
    (folder / "external.data").unlink()
    refused(attempt(model=path), 1, "'w'", "external.data does not exist")
    (folder / "external.data").symlink_to(tmp_path / "outside.data")
    refused(attempt(model=path), 1, "'w'", "symbolic link")


BAD_DATA: dict[str, tuple[dict[str, NDArray[Any]], str]] = {
    "names": ({"y": rows(16)}, "no array for input 'x'"),
    "shape": ({"x": rows(16, 32)}, "input 'x' expects shape [N, 64], got [1, 32]"),
    "rank": ({"x": rows(16)[:, None]}, "input 'x' expects shape [N, 64], got [16, 1, 64]"),
    "dtype": ({"x": np.full((16, 64), "a")}, "input 'x': str32 does not convert to float32"),
    "complex": ({"x": rows(16) * 1j}, "input 'x': complex64 does not convert to float32"),
    "NaN": ({"x": np.where(np.arange(16)[:, None] == 7, np.nan, rows(16))}, "sample 7: input 'x': holds NaN"),
    "Inf": ({"x": np.where(np.arange(16)[:, None] == 9, np.inf, rows(16))}, "sample 9: input 'x': holds NaN or inf"),
    "none": ({"x": rows(16)[:0]}, "axis 0 is empty"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_data_that_do_not_fit(attempt: Callable[..., Result], tmp_path: Path, kind: str) -> None:
    arrays, message = BAD_DATA[kind]
    np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]
    refused(attempt(calib=tmp_path / "bad.npz"), 1, "bad.npz", message)
    refused(invoke("analyze", SAMPLE.parent / "none.onnx", "--calib", tmp_path / "bad.npz"), 1, "none.onnx")


def test_no_data(attempt: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(attempt(calib=tmp_path / "empty"), 1, f"{tmp_path / 'empty'}: is an empty folder", ".npz")
    refused(attempt(calib=tmp_path / "none"), 1, f"{tmp_path / 'none'}: no such file or folder")
    np.save(tmp_path / "one.npy", rows(1))
    refused(attempt(calib=tmp_path / "one.npy"), 1, "one.npy", "0 samples to validate on", "give more data")
    onnx.save(mlp("8"), tmp_path / "fixed.onnx")
    np.save(tmp_path / "few.npy", rows(24))
    refused(
        attempt(model=tmp_path / "fixed.onnx", calib=tmp_path / "few.npy"), 1, "3 samples to validate on", "at least 8"
    )


@pytest.mark.parametrize("objective", ["output", "weight"])
def test_nan_in_activations_names_the_tensor(attempt: Callable[..., Result], tmp_path: Path, objective: str) -> None:
    body = "nothing = Sub(x, x)  broken = Div(x, nothing)  y = MatMul(broken, w)"
    weight = decaying(np.random.default_rng(0), 64, 96)
    onnx.save(parse(f"g (float[N, 64] x) => (float[N, 96] y) {{ {body} }}", {"w": weight}), tmp_path / "nan.onnx")
    named = "'broken'" if objective == "output" else "'y'"
    refused(attempt("--objective", objective, model=tmp_path / "nan.onnx"), 1, f"{named}", "NaN")


def test_few_rows_still_work_and_warn(compress: Callable[..., Result], tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", rows(16))
    result = compress("--calib", tmp_path / "few.npy", "--keep-params", 0.7)
    assert (result.code, result.err) == (0, "")
    for name in ("w1", "w2"):
        assert re.search(rf"^warning: {name}: 14 calibration rows for \d+ dimensions", result.out, re.MULTILINE)


def test_outputs_that_cannot_be(attempt: Callable[..., Result], shelf: Path, tmp_path: Path) -> None:
    refused(attempt(output="none/out.onnx"), 1, f"the folder {tmp_path / 'none'} does not exist: create it")
    refused(attempt(output="."), 1, "is a folder: name a file in it")
    refused(attempt("--report", tmp_path / "none" / "r.json"), 1, f"the folder {tmp_path / 'none'} does not exist")
    misused(attempt("--report", tmp_path / "out.onnx"), "--output and --report are the same file")
    for command in (("calibrate", shelf / "mlp.onnx", "--calib", shelf / "calib"), ("merge", "x")):
        refused(invoke(*command, "-o", tmp_path / "none" / "m"), 1, "does not exist: create it first")


def read_only_folder() -> str | None:
    mounts = Path("/proc/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        folder = line.split()[1]
        if Path(folder).is_dir() and os.statvfs(folder).f_flag & os.ST_RDONLY:
            return folder
    return None


def test_a_read_only_folder(shelf: Path, tmp_path: Path) -> None:
    folder: Path | str | None = tmp_path
    if os.geteuid() == 0:
        folder = read_only_folder()
        if folder is None:
            pytest.skip("permissions do not bind this user, and no file system is mounted read-only")
    else:
        tmp_path.chmod(0o500)
    common = (shelf / "mlp.onnx", "--calib", shelf / "calib")
    refused(invoke("compress", *common, "-o", f"{folder}/out.onnx"), 1, f"the folder {folder} is read-only")
    refused(invoke("calibrate", *common, "-o", f"{folder}/m"), 1, f"the folder {folder} is read-only")


@pytest.mark.parametrize(
    ("limit", "name"), [(32, "out.onnx"), (1, "r.json")], ids=["the model does not fit", "the report does not fit"]
)
def test_a_full_disk(shelf: Path, tmp_path: Path, limit: int, name: str) -> None:
    # a limit on the size of files fails as a full disk does, in the middle of a write
    model = tmp_path / "tiny.onnx" if name == "r.json" else shelf / "mlp.onnx"
    if name == "r.json":
        onnx.save(parse("g (float[N, 64] x) => (float[N, 64] y) { y = Relu(x) }", {}), model)
    before = listing(tmp_path)
    options = f"--calib {shelf}/calib -o {tmp_path}/out.onnx --report {tmp_path}/r.json --max-error 0.01"
    result = shell(f"trap '' XFSZ; ulimit -f {limit}; onnxlr compress {model} {options}")
    refused(result, 1, f"{tmp_path / name} cannot be written: File too large")
    after = listing(tmp_path)
    after.pop("out.onnx" if name == "r.json" else "", None)
    assert after == before


def test_a_full_device_as_stdout(shelf: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is a device of Linux")
    for option in ("", "--json"):
        result = shell(f"onnxlr inspect {shelf}/mlp.onnx {option} > /dev/full")
        refused(result, 1, "the result cannot be printed: No space left on device")


def test_an_output_that_exists(attempt: Callable[..., Result], tmp_path: Path) -> None:
    for name in ("out.onnx", "r.json"):
        (tmp_path / name).write_bytes(b"old")
        # a model that does not exist: what is refused is refused before anything is read
        result = attempt("--report", tmp_path / "r.json", model=tmp_path / "none.onnx")
        refused(result, 1, f"{name} exists already", "--force")
        (tmp_path / name).unlink()


def test_force_replaces(compress: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes(b"old")
    (tmp_path / "report.json").write_bytes(b"old")
    assert compress("--force", "--keep-params", 0.7).code == 0
    onnx.checker.check_model(tmp_path / "out.onnx")
    assert sorted(listing(tmp_path)) == ["out.onnx", "report.json"]


def test_a_failure_under_force_leaves_the_old_file(attempt: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes(b"old")
    refused(attempt("--force", "--keep-params", 0.01), 3)


def test_targets_that_cannot_be_reached(
    attempt: Callable[..., Result], compress: Callable[..., Result], tmp_path: Path
) -> None:
    for target in ("--keep-params", "--keep-macs"):
        result = attempt(target, 0.05)
        refused(result, 3, f"{target} 0.05 cannot be reached")
        said = re.search(r"keep (0\.\d+) of the model", result.err)
        assert said is not None
        # what the message says can be reached can be
        assert attempt(target, float(said[1]) - 0.002).code == 3
        assert compress(target, said[1]).code == 0
        for path in tmp_path.iterdir():
            path.unlink()
    ranks = ("--rank", "w1=2", "--rank", "w2=2", "--rank", "w3=1")
    refused(attempt("--max-error", 0.01, *ranks), 3, "--max-error 0.01 cannot be reached", "--rank")


def test_two_targets(attempt: Callable[..., Result]) -> None:
    misused(attempt("--keep-params", 0.5, "--energy", 0.9), "--energy and --keep-params", "one target at a time")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            (f"--{name}", value)
            for name in ("energy", "keep-params", "keep-macs", "min-metric-kept")
            for value in (0, 1.1)
        ),
        *(("--max-error", value) for value in (0, -1)),
        *(("--margin", value) for value in (0, 2)),
        ("--rank-multiple", 0),
        ("--batch", 0),
        ("--threads", -1),
        ("--holdout-every", 1),
        ("--objective", "magic"),
        ("--keep-params", "half"),
        ("--images", "keras"),
    ],
)
def test_values_out_of_range(attempt: Callable[..., Result], option: str, value: Any) -> None:
    misused(attempt(option, value), f"Invalid value for '{option}'", str(value))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_targets_that_are_no_number(attempt: Callable[..., Result], value: str) -> None:
    refused(attempt("--max-error", value), 2, f"not {value}")


def test_labels_and_metrics(attempt: Callable[..., Result], shelf: Path, tmp_path: Path) -> None:
    refused(attempt("--min-metric-kept", 0.9), 2, "--min-metric-kept needs --labels")
    for count in (12, 639, 641):
        np.save(tmp_path / "labels.npy", np.zeros(count, np.int64))
        result = attempt("--min-metric-kept", 0.9, "--labels", tmp_path / "labels.npy")
        refused(result, 1, f"{count} labels for 640 samples")
    refused(attempt("--labels", tmp_path / "none.npy"), 1, "none.npy: no such file of labels")
    labels = ("--labels", shelf / "labels.npy")
    refused(attempt(*labels, "--metric", "top5"), 2, "'top5'", "module:function")
    refused(attempt(*labels, "--metric", "nowhere:f"), 2, "nowhere cannot be imported")
    refused(attempt("--metric", "json:dumps"), 2, "--metric json:dumps needs --labels")


def test_weights_and_ranks(attempt: Callable[..., Result]) -> None:
    for malformed in ("w1", "w1=", "=3", "w1=x", "w1=-3"):
        misused(attempt("--rank", malformed), f"--rank {malformed!r}", "PATTERN=R")
    refused(attempt("--rank", "w1=0"), 2, "'w1' must be at least 1")
    refused(attempt("--rank", "w1=65"), 2, "'w1' is above its full rank 64")
    for option in (("--include", "q*"), ("--exclude", "q*"), ("--rank", "q*=4")):
        refused(attempt(*option), 2, "'q*' matches no weight or site", "onnxlr inspect")


def test_masks_and_providers(attempt: Callable[..., Result]) -> None:
    refused(attempt("--mask", "m"), 1, "--mask 'm' is none of the inputs 'x'")
    refused(attempt("--provider", "abacus"), 1, "abacus", "CPUExecutionProvider")
    misused(attempt("--mean", "0.5,x"), "'0.5,x'")


def test_stats_that_do_not_fit(attempt: Callable[..., Result], shelf: Path, tmp_path: Path) -> None:
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    calib = ("--calib", shelf / "calib")
    onnx.save(mlp("8"), tmp_path / "other.onnx")
    assert invoke("calibrate", shelf / "mlp.onnx", *calib, "-o", own).code == 0
    assert invoke("calibrate", tmp_path / "other.onnx", *calib, "-o", other).code == 0
    refused(attempt("--stats", other), 1, "another model", "onnxlr calibrate")
    lacking = ("lack", "'h2'", "onnxlr calibrate --objective utilized")
    refused(attempt("--stats", own, "--objective", "utilized"), 1, *lacking)
    refused(invoke("analyze", shelf / "mlp.onnx", *calib, "--stats", own), 1, *lacking)
    refused(attempt("--stats", own, "--holdout-every", 4), 1, "one sample of 8", "give --holdout-every 8")
    refused(attempt("--stats", own, "--objective", "weight"), 2, "leave --stats out")
    refused(attempt("--stats", shelf / "mlp.onnx"), 1, "mlp.onnx", "moments file")
    refused(attempt("--stats", tmp_path / "none"), 1, "none does not exist")
    refused(invoke("merge", own, other, "-o", tmp_path / "sum"), 1, "different models")
    quarters = tmp_path / "quarters.safetensors"
    assert invoke("calibrate", shelf / "mlp.onnx", *calib, "-o", quarters, "--holdout-every", 4).code == 0
    refused(invoke("merge", own, quarters, "-o", tmp_path / "sum"), 1, "one sample of 8 and one of 4")
    refused(invoke("merge", own, own, "-o", own), 1, "exists already")
    assert not (tmp_path / "sum").exists()


def test_analyze_and_validate(shelf: Path, tmp_path: Path) -> None:
    analyze = ("analyze", shelf / "mlp.onnx", "--calib", shelf / "calib")
    misused(invoke(*analyze, "--energy", "0.9,much"), "'0.9,much'")
    misused(invoke(*analyze, "--csv", "--json"), "--csv and --json")
    refused(invoke(*analyze, "--energy", "1.5"), 2, "1.5")
    validate = ("validate", shelf / "mlp.onnx", shelf / "mlp.onnx", "--data", shelf / "calib")
    misused(invoke(*validate, "--max-error", -1), "'--max-error'")
    misused(invoke(*validate, "--polygraphy-samples", 0), "'--polygraphy-samples'")
    np.save(tmp_path / "labels.npy", np.zeros(5, np.int64))
    refused(invoke(*validate, "--labels", tmp_path / "labels.npy"), 1, "5 labels for 640 samples")
    refused(invoke(*validate, "--metric", "top5"), 2, "'top5' needs labels")
    both = ("validate", shelf / "mlp.onnx", shelf / "attention.onnx", "--data", shelf / "calib")
    refused(invoke(*both), 1, "input 'x' is float32 [N, 64] in the first model, float32 [N, S, 48] in the second")
    misused(invoke("compress", shelf / "mlp.onnx", "-o", tmp_path / "o"), "Missing option '--calib'")
    misused(invoke("squeeze"), "No such command 'squeeze'")


# both touch a file once their stage is reached and wait there, so that the signal arrives in its middle
SLOW_DATA = """
import pathlib, time
import numpy as np

def load_data():
    x = np.load({calib!r})["x"]
    for index, row in enumerate(x):
        if index == 40:
            pathlib.Path({ready!r}).touch()
            time.sleep(60)
        yield {{"x": row[None]}}
"""
SLOW_METRIC = """
import pathlib, time

def score(outputs, labels):
    pathlib.Path({ready!r}).touch()
    time.sleep(60)
"""


@pytest.mark.parametrize("stage", ["calibrating", "searching", "validating"])
def test_an_interrupt_in_a_stage(shelf: Path, tmp_path: Path, stage: str) -> None:
    work, ready = tmp_path / "work", tmp_path / "ready"
    work.mkdir()
    (work / "out.onnx").write_bytes(b"old")
    before = listing(work)
    names = {"calib": str(shelf / "calib" / "x.npz"), "ready": str(ready)}
    (tmp_path / "slow_data.py").write_text(SLOW_DATA.format(**names))
    (tmp_path / "slow_metric.py").write_text(SLOW_METRIC.format(**names))
    options: list[Any] = ["--calib", tmp_path / "slow_data.py"]
    if stage != "calibrating":
        target = ["--min-metric-kept", "0.9"] if stage == "searching" else ["--energy", "0.9"]
        labels = ["--labels", shelf / "labels.npy", "--metric", "slow_metric:score"]
        options = ["--calib", shelf / "calib", *labels, *target]
    program = Path(sys.executable).parent / "onnxlr"
    command = [program, "compress", shelf / "mlp.onnx", "-o", work / "out.onnx", "--force", *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert ready.exists()
    assert (process.returncode, out) == (130, "")
    assert err == "onnxlr: interrupted; no half-written file is left\n"
    assert listing(work) == before


@pytest.mark.parametrize("reader", ["head -1", "true"])
@pytest.mark.parametrize("command", ["inspect {0}/mlp.onnx", "inspect {0}/mlp.onnx --json",
                                     "analyze {0}/mlp.onnx --calib {0}/calib --csv"])  # fmt: skip
def test_a_reader_that_closes_early_sees_no_traceback(shelf: Path, command: str, reader: str) -> None:
    result = shell(f"onnxlr {command.format(shelf)} | {reader}")
    assert result.err == ""
    assert len(result.out.splitlines()) == (1 if reader == "head -1" else 0)


def test_a_closed_stdout(shelf: Path) -> None:
    result = shell(f"onnxlr analyze {shelf}/mlp.onnx --calib {shelf}/calib --csv >&-")
    assert "Traceback" not in result.err
    result = shell(f"onnxlr inspect {shelf}/mlp.onnx >&-")
    assert "Traceback" not in result.err
    assert "AttributeError" not in result.err


def test_labels_as_text_are_checked(attempt: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("1\n2\nthree\n")
    refused(attempt("--labels", tmp_path / "labels.txt"), 1, "labels.txt, line 3: 'three' is not a number")


def test_a_stray_data_file_is_found_before_the_work(attempt: Callable[..., Result], tmp_path: Path) -> None:
    model = external(tmp_path)
    (tmp_path / "out.onnx.data").write_bytes(b"of an earlier run")
    refused(attempt("--keep-params", 0.5, model=model), 1, "out.onnx.data exists already: pass --force")


def test_a_model_with_external_data_is_replaced_by_its_own_result(shelf: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(mlp(), model, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    report = tmp_path / "report.json"
    options = ("--objective", "output", "--keep-params", 0.6, "--rounds", 0, "--threads", 1, "--report", report)
    done = invoke("compress", model, "--calib", shelf / "calib", "-o", model, "--force", *options)
    assert (done.code, report.exists()) == (0, True), done.err


def test_a_loss_for_moments_that_are_there(attempt: Callable[..., Result], shelf: Path, tmp_path: Path) -> None:
    moments = tmp_path / "m.safetensors"
    common = ("--calib", shelf / "calib", "--objective", "output", "--threads", 1)
    assert invoke("calibrate", shelf / "mlp.onnx", *common, "-o", moments).code == 0
    loss = ("--loss", "cross-entropy", "--labels", shelf / "labels.npy")
    refused(
        attempt("--keep-params", 0.5, "--stats", moments, *loss),
        1,
        "the gradients of these moments are missing: give --loss cross-entropy",
    )


def test_forms_that_settings_leave_nothing_of(attempt: Callable[..., Result]) -> None:
    refused(attempt("--energy", 0.9, "--forms", "width,shared"), 2, "--forms shared,width none is of use with --energy")
    refused(attempt("--rank", "w1=8", "--forms", "block,width"), 2, "not among --forms block,width: add pair")
    refused(attempt("--forms", "shared"), 2, "--forms shared none is of use with objective auto: add pair")
    refused(attempt("--then", "int8", "--forms", "block"), 2, "--forms block none is of use with --then int8: add pair")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--mean", "0.5", "--std", "x"), ("--std 'x' is no number",)),
        (("--resize", "16x16x99"), ("--resize '16x16x99' is neither a side nor height and width",)),
        (("--rank-multiple", "\u00b2"), ("neither auto nor a number",)),
        (("--rank", "w1=\u00b2"), ("is not of the form PATTERN=R",)),
    ],
)
def test_the_option_that_is_wrong_is_named(
    attempt: Callable[..., Result], options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    misused(attempt("--keep-params", 0.5, *options), *parts)


def test_test_data_from_other_files(attempt: Callable[..., Result], tmp_path: Path) -> None:
    tensor = onnx.numpy_helper.from_array(rows(1), "x")
    onnx.external_data_helper.set_external_data(tensor, "elsewhere")
    tensor.ClearField("raw_data")
    (tmp_path / "test_data_set_0").mkdir()
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(tensor.SerializeToString())
    refused(attempt(calib=tmp_path / "test_data_set_0"), 1, "input_0.pb", "its values are in another file")


def test_a_rank_for_what_is_kept_out(attempt: Callable[..., Result]) -> None:
    refused(
        attempt("--rank", "w1=3", "--exclude", "w1"), 2, "--rank 'w1' is only for weights that are kept out: excluded"
    )


def test_options_of_training_need_training(attempt: Callable[..., Result]) -> None:
    misused(attempt("--keep-params", 0.5, "--epochs", 3), "options of training are given without --finetune")

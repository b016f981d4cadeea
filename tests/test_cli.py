"""Every subcommand as a user runs it: exit code, what goes to stdout and to stderr, and the files that are left."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx
import pytest
from conftest import SAMPLE, Result, attention, elements, invoke, mlp, rows, run, shell
from onnx import numpy_helper

from onnxlr.cli import cli
from onnxlr.gram import Stats

if TYPE_CHECKING:
    from collections.abc import Callable


def strict(text: str) -> Any:
    """JSON as its standard has it: no NaN, no Infinity, nothing before it or after it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def figures(result: Result) -> Any:
    """The JSON on stdout of a run that succeeded in silence."""
    assert (result.code, result.err) == (0, "")
    return strict(result.out)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_lists_every_option_and_its_default(name: str) -> None:
    result = invoke(name, "--help")
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    for parameter in cli.commands[name].params:
        if not isinstance(parameter, click.Option):
            continue
        assert parameter.help
        entry = text[text.index(f" {parameter.opts[-1]} ") :]
        default = parameter.default
        if not parameter.is_flag and isinstance(default, str | int | float):
            stated = re.search(r"\[default: ([^\];]*)", entry)
            assert stated is not None
            assert stated[1] == str(default)


def test_the_default_target_is_stated_and_is_the_default(compress: Callable[..., Result]) -> None:
    stated = re.search(r"--max-error.*?\[default: ([\d.]+)", invoke("compress", "--help").out, re.DOTALL)
    assert stated is not None
    document = figures(compress("--json"))
    assert document["config"]["target"] == {"kind": "max_error", "value": float(stated[1])}


def test_the_group_names_every_command_in_full() -> None:
    text = invoke("--help").out.split("Commands:")[1]
    for name, command in cli.commands.items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert command.help is not None
        assert line.split(maxsplit=1)[1] == command.help.split("\n")[0]
    assert "..." not in text


def test_version() -> None:
    assert re.fullmatch(r"onnxlr, version \d+\.\d+\S*\n", invoke("--version").out)


def test_shell_completion() -> None:
    script = shell("onnxlr", _ONNXLR_COMPLETE="bash_source")
    assert script.code == 0
    assert "_ONNXLR_COMPLETE=bash_complete" in script.out
    offered = shell("onnxlr", _ONNXLR_COMPLETE="bash_complete", COMP_WORDS="onnxlr compress --obj", COMP_CWORD="2")
    assert offered.out.strip() == "plain,--objective"


def test_inspect(shelf: Path) -> None:
    document = figures(invoke("inspect", shelf / "mlp.onnx", "--json"))
    assert document["format"] == "onnxlr-inspection/1"
    assert {w["name"]: (w["d_in"], w["d_out"]) for w in document["weights"]} == {
        "w1": (64, 96),
        "w2": (96, 96),
        "w3": (96, 10),
    }
    assert document["parameters"] == elements(mlp())
    assert document["macs"] == 64 * 96 + 96 * 96 + 96 * 10
    assert all(w["sites"][0]["block_sides"] == ["input", "output"] for w in document["weights"])
    assert document["refusals"] == []
    table = invoke("inspect", shelf / "mlp.onnx")
    assert (table.code, table.err) == (0, "")
    assert re.search(r"w2 +s2 +96 x 96 +float32 +55.8% +56.5%", table.out)
    assert "Cannot" not in table.out


def test_inspect_says_why_not(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4, 8, 8] x) => (float[N, 4, 6, 6] y) '
        "{ y = Conv<group = 4>(x, w) }"
    )
    kernel = np.ones((4, 1, 3, 3), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(kernel, "w"))
    onnx.save(model, tmp_path / "conv.onnx")
    (refusal,) = figures(invoke("inspect", tmp_path / "conv.onnx", "--json"))["refusals"]
    assert (refusal["op"], refusal["parameters"], refusal["macs"]) == ("Conv", kernel.size, 36 * kernel.size)
    assert refusal["reason"] in invoke("inspect", tmp_path / "conv.onnx").out


def test_inspect_without_anything_linear(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 64] x) => (float[N, 64] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "relu.onnx")
    result = invoke("inspect", tmp_path / "relu.onnx")
    assert result.code == 0
    assert "nothing to compress" in result.out
    assert "unknown" not in result.out


def test_analyze_as_json_csv_and_table(shelf: Path) -> None:
    command = ("analyze", shelf / "mlp.onnx", "--calib", shelf / "calib", "--energy", "0.9,0.99")
    document = figures(invoke(*command, "--json"))
    assert set(document["mlu"]) == {"0.9", "0.99"}
    for place, energy in enumerate(document["mlu"]):
        used = [weight["at"][place]["utilization"] for weight in document["weights"]]
        assert document["mlu"][energy] == pytest.approx(np.mean(used))
    for weight in document["weights"]:
        less, more = weight["at"]
        assert less["rank"] < more["rank"] == min(more["k_input"], more["k_output"])
        assert more["utilization"] == pytest.approx(more["rank"] / min(weight["d_in"], weight["d_out"]))
    table = list(csv.DictReader(io.StringIO(invoke(*command, "--csv").out)))
    assert [(row["weight"], row["energy"], int(row["utilized rank"])) for row in table] == [
        (weight["name"], f"{at['energy']:g}", at["rank"]) for weight in document["weights"] for at in weight["at"]
    ]
    text = invoke(*command)
    assert (text.code, text.err) == (0, "")
    assert f"mean layer utilization at 0.99 of the energy: {document['mlu']['0.99']:.4f}" in text.out


def test_analyze_finds_the_rank_that_was_put_in(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    low = generator.standard_normal((32, 5)) @ generator.standard_normal((5, 32))
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 32] x) => (float[N, 32] y) { y = MatMul(x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(low.astype(np.float32), "w"))
    onnx.save(model, tmp_path / "low.onnx")
    np.save(tmp_path / "x.npy", generator.standard_normal((400, 32)).astype(np.float32))
    command = ("analyze", tmp_path / "low.onnx", "--calib", tmp_path / "x.npy", "--energy", "0.999999", "--json")
    (weight,) = figures(invoke(*command))["weights"]
    assert weight["at"][0]["rank"] == 5


def test_analyze_with_stats_is_analyze(shelf: Path, tmp_path: Path) -> None:
    common = (shelf / "mlp.onnx", "--calib", shelf / "calib")
    moments = tmp_path / "m.safetensors"
    assert invoke("calibrate", *common, "-o", moments, "--objective", "utilized").code == 0
    assert invoke("analyze", *common, "--stats", moments, "--json") == invoke("analyze", *common, "--json")


def test_merged_shards_are_the_whole(shelf: Path, tmp_path: Path) -> None:
    x = np.load(shelf / "calib" / "x.npz")["x"]
    paths = []
    for name, part in {"whole": x, "a": x[:320], "b": x[320:]}.items():
        np.save(tmp_path / f"{name}.npy", part)
        paths.append(tmp_path / f"{name}.safetensors")
        common = (shelf / "mlp.onnx", "--calib", tmp_path / f"{name}.npy", "--objective", "output")
        command = ("calibrate", *common, "-o", paths[-1], "--json")
        document = figures(invoke(*command))
        assert document["samples"] == len(part) * 7 // 8
        assert {tensor["rows"] for tensor in document["tensors"].values()} == {document["samples"]}
    merged = tmp_path / "merged.safetensors"
    result = invoke("merge", *paths[1:], "-o", merged)
    assert result.code == 0
    assert result.out.startswith("560 samples, moments of 3 tensors")
    whole, total = Stats.load(paths[0]), Stats.load(merged)
    for key, moments in whole.moments.items():
        assert total.moments[key].count == moments.count
        # products are those of float32, and every shard shifts its rows by a mean of its own
        single = 4 * np.finfo(np.float32).eps * moments.gram.max()
        np.testing.assert_allclose(total.moments[key].gram, moments.gram, rtol=0, atol=single)
        np.testing.assert_allclose(total.moments[key].total, moments.total, rtol=0, atol=1e-12 * moments.gram.max())


@pytest.mark.parametrize("objective", ["utilized", "output"])
def test_compress_with_stats_is_compress_bit_for_bit(
    compress: Callable[..., Result], shelf: Path, tmp_path: Path, objective: str
) -> None:
    common = (shelf / "mlp.onnx", "--calib", shelf / "calib", "--objective", objective, "--threads", 1)
    moments = tmp_path / "m.safetensors"
    assert invoke("calibrate", *common, "-o", moments).code == 0
    options = ("--objective", objective, "--keep-params", 0.7)
    first = figures(compress(*options, "--json"))
    direct = (tmp_path / "out.onnx").read_bytes()
    second = figures(compress(*options, "--json", "--force", "--stats", moments))
    assert (tmp_path / "out.onnx").read_bytes() == direct
    assert first["weights"] == second["weights"]
    assert "calibrate" in first["seconds"]
    assert "calibrate" not in second["seconds"]


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch were not installed."""
    needing = ("onnxlr.fisher", "onnxlr.torch_graph", "onnxlr.tuning")
    for name in [name for name in sys.modules if name.startswith(needing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.usefixtures("without_torch")
def test_why_there_are_no_gradients_is_said_wherever_they_are_missed(
    compress: Callable[..., Result], shelf: Path, tmp_path: Path
) -> None:
    moments, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    command = ("calibrate", shelf / "mlp.onnx", "--calib", shelf / "calib", "--threads", 1, "--force")
    document = figures(invoke(*command, "-o", moments, "--json"))
    why = document["objective_reason"]
    assert document["objective"] == "output"
    assert "pip install 'onnxlr[torch]'" in why
    assert f"objective output: {why}\n" in invoke(*command, "-o", moments).out
    assert invoke(*command, "-o", other, "--objective", "output").out.endswith("objective output\n")
    for options, expected in (
        ((), why),
        (("--stats", moments), why),
        (("--stats", other), "the moments hold no gradients"),
    ):
        result = compress("--energy", 0.9, "--force", *options)
        assert f"objective output: {expected}\n" in result.out
        assert strict((tmp_path / "report.json").read_text())["objective_reason"] == expected
    refused = compress("--energy", 0.9, "--force", "--objective", "fisher")
    assert (refused.code, refused.out) == (1, "")
    assert "pip install 'onnxlr[torch]'" in refused.err


@pytest.mark.usefixtures("without_torch")
def test_what_fine_tuning_lacks_is_said(compress: Callable[..., Result], shelf: Path, tmp_path: Path) -> None:
    small = (shelf / "mlp.onnx", shelf / "mlp.onnx", "--calib", shelf / "calib", "-o", tmp_path / "tuned.onnx")
    for done in (compress("--energy", 0.9, "--finetune"), invoke("finetune", *small)):
        assert (done.code, done.out) == (1, "")
        assert "pip install 'onnxlr[torch]'" in done.err


def test_gradients_of_a_loss_from_the_command_line(
    compress: Callable[..., Result], shelf: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    moments, loss = tmp_path / "m.safetensors", ("--loss", "cross-entropy", "--labels", shelf / "labels.npy")
    common = ("calibrate", shelf / "mlp.onnx", "--calib", shelf / "calib", "--threads", 1)
    assert figures(invoke(*common, *loss, "-o", moments, "--json"))["objective"] == "fisher"
    classes = np.load(shelf / "labels.npy")
    kept = np.arange(640) % 8 != 1
    logits = run(mlp(), {"x": np.load(shelf / "calib" / "x.npz")["x"]})["logits"][kept].astype(np.float64)
    g = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(10)[classes[kept]]
    np.testing.assert_allclose(Stats.load(moments).moments["logits:gradient"].gram, g.T @ g, rtol=0, atol=1e-3)
    target = ("--keep-params", 0.7, "--json", "--force")
    direct = figures(compress(*target, *loss))
    assert direct["config"]["loss"] == "cross-entropy"
    assert figures(compress(*target, "--stats", moments))["weights"] == direct["weights"]
    assert figures(compress(*target))["weights"] != direct["weights"]
    for command in ((*common, "-o", tmp_path / "x"), None):
        for options, said in (
            (loss[:2], "--loss cross-entropy needs --labels"),
            (("--loss", "hinge", *loss[2:]), "unknown loss 'hinge'"),
            (("--loss", "json:hinge", *loss[2:]), "the module json has no 'hinge'"),
        ):
            refused = compress("--force", *options) if command is None else invoke(*command, *options)
            assert (refused.code, refused.out) == (2, "")
            assert said in refused.err


METRIC = """
import numpy as np

def worst(outputs, labels):
    return float((np.asarray(outputs["logits"]).argmax(-1) == labels).mean())
"""


@pytest.mark.parametrize(
    "options",
    [
        "--energy 0.95",
        "--keep-params 0.7",
        "--keep-macs 0.7",
        "--max-error 0.2",
        "--max-error 0.2 --rank-multiple 1 --margin 1",
        "--min-metric-kept 0.97",
        "--min-metric-kept 0.97 --metric measures:worst",
        "--objective weight --keep-params 0.7",
        "--objective utilized --energy 0.9",
    ],
)
def test_compress_meets_each_target(
    compress: Callable[..., Result], shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    (tmp_path / "measures.py").write_text(METRIC)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = options.split()
    if "metric" in options:
        arguments += ["--labels", str(shelf / "labels.npy")]
    result = compress(*arguments, "--rank-multiple", 4, "--json")
    document = figures(result)
    assert document == strict((tmp_path / "report.json").read_text())
    written = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(written, full_check=True)
    before, after = document["before"], document["after"]
    assert after["parameters"] == elements(written) < before["parameters"] == elements(mlp())
    assert after["file_bytes"] == (tmp_path / "out.onnx").stat().st_size < before["file_bytes"]
    held_out = np.load(shelf / "calib" / "x.npz")["x"][1::8]
    dense, small = (run(model, {"x": held_out})["logits"] for model in (mlp(), written))
    error = np.linalg.norm(dense - small) / np.linalg.norm(dense)
    assert document["validation"]["samples"] == len(held_out)
    assert document["validation"]["error"] == pytest.approx(error, rel=1e-3)
    match document["config"]["target"]:
        case {"kind": "keep_params", "value": share}:
            assert after["parameters"] <= share * before["parameters"]
        case {"kind": "keep_macs", "value": share}:
            assert after["macs"] <= share * before["macs"]
        case {"kind": "max_error", "value": bound}:
            assert error <= bound
        case {"kind": "min_metric_kept", "value": share}:
            labels = np.load(shelf / "labels.npy")[1::8]
            kept = [(logits.argmax(-1) == labels).mean() for logits in (dense, small)]
            assert kept[1] >= share * kept[0]
            assert [before["metric"], after["metric"]] == pytest.approx(kept)
        case {"kind": "energy", "value": share}:
            cut = [weight for weight in document["weights"] if weight["rank"] is not None]
            assert cut
            if document["config"]["objective"] == "output":
                assert all(weight["energy"] >= share for weight in cut)


def test_compress_prints_a_table_and_nothing_else(compress: Callable[..., Result], tmp_path: Path) -> None:
    plain = compress("--keep-params", 0.7)
    assert (plain.code, plain.err) == (0, "")
    document = strict((tmp_path / "report.json").read_text())
    share = 100 * document["after"]["parameters"] / document["before"]["parameters"]
    assert re.search(rf"^parameters .* {share:.1f}%$", plain.out, re.MULTILINE)
    assert plain.out.endswith(f"written to {tmp_path / 'out.onnx'}\n")
    assert not re.search(r"^w1 ", plain.out, re.MULTILINE)
    verbose = compress("--keep-params", 0.7, "--force", "-v")
    for weight in document["weights"]:
        line = re.search(rf"^{weight['name']} .*$", verbose.out, re.MULTILINE)
        assert line is not None
        assert line[0].rstrip().endswith(weight["reason"])


def test_piped_lines_are_whole_however_long(shelf: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 120) / ("b" * 120)
    folder.mkdir(parents=True)
    common = (shelf / "mlp.onnx", "--calib", shelf / "calib")
    result = invoke("compress", *common, "-o", folder / "o.onnx", "--keep-params", 0.7)
    assert f"written to {folder / 'o.onnx'}" in result.out.splitlines()


def in_terminal(command: str) -> str:
    """What 80 columns of terminal show of a command: both streams, without escapes."""
    # `script` gives the command a terminal; only one of 80 columns makes tables wrap
    seen = shell(f"script -qec {json.dumps('stty cols 80; ' + command)} /dev/null")
    assert seen.code == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.out).replace("\r", "")


@pytest.mark.skipif(shutil.which("script") is None, reason="`script` gives commands a terminal")
def test_progress_is_shown_in_a_terminal_unless_quiet(shelf: Path, tmp_path: Path) -> None:
    options = f"-o {tmp_path}/o.onnx --force --keep-params 0.7 --objective output"
    command = f"onnxlr compress {shelf}/mlp.onnx --calib {shelf}/calib {options}"
    loud, quiet = in_terminal(command), in_terminal(f"{command} -q")
    assert "calibrate" in loud.split("objective")[0]
    assert quiet.startswith("output objective")
    assert f"written to {tmp_path}/o.onnx" in quiet.splitlines()


def test_json_is_alone_on_stdout_of_a_real_process(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "fixed").mkdir()
    onnx.save(mlp("8"), tmp_path / "fixed" / "m.onnx")
    np.save(tmp_path / "x.npy", rows(70))
    command = f"onnxlr compress {tmp_path}/fixed/m.onnx --calib {tmp_path}/x.npy -o {tmp_path}/o.onnx --max-error 0.5"
    result = shell(f"{command} --json")
    assert result.code == 0
    assert strict(result.out)["output"] == f"{tmp_path}/o.onnx"
    assert "onnxlr: warning: " in result.err
    assert "fixed to 8" in result.err


@pytest.fixture(scope="module")
def small(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shelf/mlp.onnx at an error of about 0.1."""
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    assert invoke("compress", shelf / "mlp.onnx", "--calib", shelf / "calib", "-o", path, "--max-error", 0.15).code == 0
    return path


def test_validate_passes_and_fails(shelf: Path, small: Path) -> None:
    command = ("validate", shelf / "mlp.onnx", small, "--data", shelf / "calib")
    passed = invoke(*command, "--max-error", 0.3)
    assert (passed.code, passed.err) == (0, "")
    assert "passed" in passed.out
    assert "FAILED" not in passed.out
    failed = invoke(*command, "--max-error", 0.01)
    assert (failed.code, failed.err) == (3, "")
    assert failed.out.count("FAILED") == 2
    document = strict(invoke(*command, "--max-error", 0.01, "--json").out)
    assert document["passed"] is False
    assert [verdict["passed"] for verdict in document["polygraphy"]] == [False]
    x = np.load(shelf / "calib" / "x.npz")["x"]
    dense, other = (run(onnx.load(path), {"x": x})["logits"] for path in (shelf / "mlp.onnx", small))
    assert document["error"] == pytest.approx(np.linalg.norm(dense - other) / np.linalg.norm(dense), rel=1e-3)


def test_validate_measures_the_metric(shelf: Path, small: Path) -> None:
    command = ("validate", shelf / "mlp.onnx", small, "--data", shelf / "calib", "--labels", shelf / "labels.npy")
    document = figures(invoke(*command, "--max-error", 0.3, "--json"))
    labels, x = np.load(shelf / "labels.npy"), np.load(shelf / "calib" / "x.npz")["x"]
    share = (run(onnx.load(small), {"x": x})["logits"].argmax(-1) == labels).mean()
    assert document["metric_a"] == 1.0
    assert document["metric_b"] == pytest.approx(share)
    assert f"top1: 1.0000 before, {share:.4f} after" in invoke(*command, "--max-error", 0.3).out


@pytest.mark.parametrize(("bound", "code"), [(0.3, 0), (0.01, 1)])
def test_the_polygraphy_files_repeat_the_verdict(
    shelf: Path, small: Path, tmp_path: Path, bound: float, code: int
) -> None:
    folder = tmp_path / "polygraphy"
    command = ("validate", shelf / "mlp.onnx", small, "--data", shelf / "calib", "--max-error", bound)
    result = invoke(*command, "--polygraphy", folder)
    assert result.code == (0 if code == 0 else 3)
    script = folder / "run.sh"
    assert result.out.splitlines()[-1] == f"repeat with: sh {script}"
    assert script.stat().st_mode & stat.S_IXUSR
    assert shell(f"sh {script}").code == code
    again = invoke(*command, "--polygraphy", folder)
    assert again.code == 1
    assert "--force" in again.err


def test_a_verdict_on_equal_models(shelf: Path) -> None:
    command = ("validate", shelf / "mlp.onnx", shelf / "mlp.onnx", "--data", shelf / "calib", "--max-error", 0)
    document = figures(invoke(*command, "--json"))
    assert (document["error"], document["passed"]) == (0, True)


def test_an_infinite_error_is_a_string_in_json(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Mul(x, c) }'
    for name, factor in (("zero", 0), ("one", 1)):
        model = onnx.parser.parse_model(text)
        model.graph.initializer.append(numpy_helper.from_array(np.float32(factor).reshape(()), "c"))
        onnx.save(model, tmp_path / f"{name}.onnx")
    np.save(tmp_path / "x.npy", rows(4, 4))
    command = ("validate", tmp_path / "zero.onnx", tmp_path / "one.onnx", "--data", tmp_path / "x.npy", "--json")
    result = invoke(*command)
    assert result.code == 3
    assert strict(result.out)["error"] == "Infinity"


def test_what_polygraphy_finds_in_padding_is_no_failure(tmp_path: Path) -> None:
    for name, factor in (("a", 0.0), ("b", 100.0)):
        model = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[N, S, 4] x, int64[N, S] m) => (float[N, S, 4] y) '
            "{ w = Unsqueeze(m, last) p = Cast<to = 1>(w) q = Sub(one, p) e = Mul(q, c) y = Add(x, e) }"
        )
        for tensor, value in (("one", np.float32(1)), ("c", np.float32(factor)), ("last", np.array([2], np.int64))):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), tensor))
        onnx.save(model, tmp_path / f"{name}.onnx")
    mask = np.tile(np.array([1, 1, 0], np.int64), (4, 1))
    np.savez(tmp_path / "d.npz", x=rows(12, 4).reshape(4, 3, 4), m=mask)
    command = ("validate", tmp_path / "a.onnx", tmp_path / "b.onnx", "--data", tmp_path / "d.npz")
    masked = invoke(*command, "--mask", "m")
    assert masked.code == 0
    assert "padding included (it does not count)" in masked.out
    assert "FAILED" in masked.out
    assert invoke(*command).code == 3


def test_a_mask_keeps_padding_out(shelf: Path, tmp_path: Path) -> None:
    command = ("compress", shelf / "attention.onnx", "--calib", shelf / "seq", "--keep-params", 0.7, "--json")
    masked = figures(invoke(*command, "-o", tmp_path / "m.onnx", "--mask", "mask"))
    plain = figures(invoke(*command, "-o", tmp_path / "p.onnx"))
    real, padded = (next(w["rows"] for w in d["weights"] if w["name"] == "wq") for d in (masked, plain))
    kept = [index for index in range(48) if index % 8 != 1]
    assert real == sum(9 if index % 3 == 0 else 10 for index in kept)
    assert padded == sum(12 if index % 3 == 0 else 10 for index in kept)
    assert masked["validation"]["error"] < plain["validation"]["error"]
    assert onnx.load(tmp_path / "m.onnx").graph.output == attention().graph.output
    moments = tmp_path / "m.safetensors"
    gathered = ("calibrate", shelf / "attention.onnx", "--calib", shelf / "seq", "-o", moments, "--objective", "output")
    assert invoke(*gathered, "--mask", "mask").code == 0
    objective = ("--objective", "output", "--stats", moments)
    refused = invoke(*command, "-o", tmp_path / "s.onnx", *objective)
    assert refused.code == 1
    assert "these moments were gathered with --mask mask, and this run is without --mask" in refused.err
    assert invoke(*command, "-o", tmp_path / "s.onnx", *objective, "--mask", "mask").code == 0


@pytest.mark.slow
def test_the_sample_from_calibration_to_polygraphy(tmp_path: Path) -> None:
    model, moments, small = SAMPLE / "model.onnx", tmp_path / "m.safetensors", tmp_path / "small.onnx"
    np.save(tmp_path / "calib.npy", np.load(SAMPLE / "calib" / "images.npz")["images"][:256])
    np.save(tmp_path / "test.npy", np.load(SAMPLE / "test" / "images.npz")["images"][:500])
    np.save(tmp_path / "labels.npy", np.load(SAMPLE / "test_labels.npy")[:500])
    data = f"--calib {tmp_path}/calib.npy --threads 1"
    assert shell(f"onnxlr calibrate {model} {data} -o {moments}").code == 0
    document = figures(shell(f"onnxlr compress {model} {data} -o {small} --stats {moments} --keep-params 0.5 --json"))
    assert document["after"]["parameters"] == elements(onnx.load(small)) <= 0.5 * document["before"]["parameters"]
    verdict = shell(
        f"onnxlr validate {model} {small} --data {tmp_path}/test.npy --labels {tmp_path}/labels.npy --batch 100 "
        f"--threads 1 --max-error 0.3 --polygraphy {tmp_path}/p --json && sh {tmp_path}/p/run.sh 1>&2"
    )
    assert verdict.code == 0
    validation = strict(verdict.out)
    assert validation["metric_b"] > 0.95 * validation["metric_a"] > 0.75


@pytest.mark.slow
def test_demo() -> None:
    result = shell("onnxlr demo --json", timeout=400)
    document = figures(result)
    shares = [row["report"]["config"]["target"]["value"] for row in document["rows"]]
    assert shares == sorted(shares, reverse=True)
    for share, row in zip(shares, document["rows"], strict=True):
        report = row["report"]
        assert report["after"]["parameters"] <= share * report["before"]["parameters"]
        assert report["after"]["file_bytes"] < report["before"]["file_bytes"]
        assert row["test"]["metric_a"] > 0.8
        assert [verdict["name"] for verdict in row["polygraphy"]] == [
            output["name"] for output in row["test"]["outputs"]
        ]
        assert report["before"]["latency_ms"] > 0
    errors = [row["test"]["error"] for row in document["rows"]]
    assert errors == sorted(errors)


def test_the_console_script_is_main() -> None:
    program = Path(sys.executable).parent / "onnxlr"
    assert shell(f"{program} --version").out == invoke("--version").out

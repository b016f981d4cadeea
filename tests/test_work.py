"""Runs that were cut off and go on, and runs for which memory is scarce: both end as any other run does."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from conftest import attention, invoke, mlp, rows, sequences

import onnxlr
from onnxlr import Config, Target
from onnxlr.choice import Cut
from onnxlr.errors import ConfigError, OutputError
from onnxlr.forms import Stored, Window
from onnxlr.gram import Stats
from onnxlr.model_io import from_proto, load, save
from onnxlr.plan_file import load_plan, save_plan
from onnxlr.search import _settings
from onnxlr.targets import Plan
from onnxlr.tensor_file import map_tensors, write_tensors
from onnxlr.work import Work, working

if TYPE_CHECKING:
    from pathlib import Path

    from onnxlr.report import Report

FINE: dict[str, Any] = {"rank_multiple": 4, "threads": 1, "mask": "mask"}
DATA = sequences(48)
BUDGET = Target("keep_params", 0.6)


class KilledError(Exception):
    """Stands for a kill: nothing catches it."""


class Stages:
    """Progress that lists the stages that ran, and is cut off at the first step of one of them."""

    def __init__(self, until: str = "") -> None:
        self.until, self.seen = until, set()

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        self.seen.add(stage)
        if stage == self.until:
            raise KilledError


def shrink(path: Path, progress: Any = lambda *_: None, work: Path | None = None, **settings: Any) -> Report:
    config = Config(**{**FINE, "target": BUDGET, "objective": "output", **settings})
    return onnxlr.compress(
        attention(), DATA, config, output=path / "out.onnx", work=work, force=True, progress=progress
    )


def same(a: Report, b: Report) -> None:
    assert [(w.name, w.form, w.rank) for w in a.weights] == [(w.name, w.form, w.rank) for w in b.weights]
    assert a.validation.error == pytest.approx(b.validation.error, rel=1e-5)
    predicted = [[w.predicted_error or 0.0 for w in report.weights] for report in (a, b)]
    assert predicted[0] == pytest.approx(predicted[1], rel=1e-4)
    assert a.after.parameters == b.after.parameters


STAGES = ["calibrate", "importance", "validate"]
TIMED = (Target("keep_params", 0.5), Target("max_latency", 0.5))


@pytest.mark.parametrize("until", STAGES)
def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, until: str) -> None:
    work = tmp_path / "deep" / "work"
    with pytest.raises(KilledError):
        shrink(tmp_path, Stages(until), work)
    assert not (tmp_path / "out.onnx").exists()
    assert not list(work.glob("scratch.*"))
    second = Stages()
    report = shrink(tmp_path, second, work)
    assert not second.seen & set(STAGES[: STAGES.index(until)])
    assert until in second.seen
    same(report, shrink(tmp_path))


def test_gradients_are_kept_too(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    first, second = Stages("calibrate"), Stages()
    with pytest.raises(KilledError):
        shrink(tmp_path, first, tmp_path / "work", objective="fisher")
    assert "gradients" in first.seen
    report = shrink(tmp_path, second, tmp_path / "work", objective="fisher")
    assert "gradients" not in second.seen
    same(report, shrink(tmp_path, objective="fisher"))


def test_another_target_finds_the_moments_and_other_data_find_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    shrink(tmp_path, work=work)
    for target in (Target("keep_params", 0.5), Target("keep_macs", 0.7)):
        again = Stages()
        shrink(tmp_path, again, work, target=target)
        assert not again.seen & {"calibrate", "importance"}
    other = Stages()
    config = Config(**{**FINE, "target": BUDGET, "objective": "output"})
    onnxlr.compress(attention(), sequences(40), config, work=work, progress=other)
    assert {"calibrate", "importance"} <= other.seen


def test_other_moments_of_as_many_rows_are_not_mistaken_for_those_of_before(tmp_path: Path) -> None:
    config = Config(**{**FINE, "target": BUDGET, "objective": "output"})
    louder = [{**feed, "x": 2 * feed["x"]} for feed in DATA]
    shards = [onnxlr.calibrate(attention(), data, config) for data in (DATA, louder)]
    assert shards[0].sizes == shards[1].sizes
    seen = []
    for stats in (*shards, shards[0]):
        stages = Stages()
        onnxlr.compress(attention(), DATA, config, stats=stats, work=tmp_path / "work", progress=stages)
        seen.append("importance" in stages.seen)
    assert seen == [True, True, False]


@pytest.mark.parametrize("objective", ["output", "utilized", "fisher"])
@pytest.mark.parametrize("memory", [1, 20_000])
def test_scarce_memory_changes_nothing(tmp_path: Path, objective: Any, memory: int) -> None:
    if objective == "fisher":
        pytest.importorskip("torch")
    plain, passes = Stages(), []
    whole = shrink(tmp_path, plain, objective=objective)
    scarce = shrink(
        tmp_path,
        lambda stage, done, *_: passes.append(done) if stage == "calibrate" else None,
        objective=objective,
        memory=memory,
    )
    same(whole, scarce)
    assert sum(passes) >= 2 * scarce.samples  # of all passes together


@pytest.mark.parametrize("first", ["calibrate", "importance"])
def test_two_runs_may_do_the_same_at_once(tmp_path: Path, first: str) -> None:
    others = []

    def progress(stage: str, done: int, total: int | None, note: str = "") -> None:
        if stage == first and not others:
            others.append(tmp_path / "other")
            others[0].mkdir()
            shrink(others[0], work=tmp_path / "work")  # has written the stage when this run comes to write it

    same(shrink(tmp_path, progress, tmp_path / "work"), shrink(tmp_path))
    assert others


def test_energy_takes_no_importance_and_can_be_resumed(tmp_path: Path) -> None:
    settings = {"target": Target("energy", 0.9), "memory": 1}
    with pytest.raises(KilledError):
        shrink(tmp_path, Stages("validate"), tmp_path / "work", **settings)
    second = Stages()
    same(shrink(tmp_path, second, tmp_path / "work", **settings), shrink(tmp_path, target=Target("energy", 0.9)))
    assert second.seen == {"validate"}


def test_a_model_with_external_data_is_rewritten_in_files(tmp_path: Path) -> None:
    save(from_proto(mlp()), tmp_path / "inline.onnx")
    save(from_proto(mlp()), tmp_path / "model.onnx", size_threshold=0)
    assert load(tmp_path / "model.onnx").external_files == ("model.onnx.data",)
    data = [{"x": x[None]} for x in rows(160)]
    config = Config(objective="output", target=BUDGET, rank_multiple=4, threads=1)
    reports = [
        onnxlr.compress(
            tmp_path / f"{name}.onnx", data, config, output=tmp_path / f"{name}-small.onnx", work=tmp_path / "work"
        )
        for name in ("inline", "model")
    ]
    same(*reports)
    assert not list((tmp_path / "work").glob("scratch.*"))
    inline, external = (onnx.load(tmp_path / f"{name}-small.onnx") for name in ("inline", "model"))
    tensors = [{t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer} for m in (inline, external)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, array in tensors[0].items():
        np.testing.assert_allclose(tensors[1][name], array, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "model-small.onnx.data").exists()


def test_moments_that_do_not_fit_are_the_same_moments(tmp_path: Path) -> None:
    config = Config(**FINE, objective="output")
    whole = onnxlr.calibrate(attention(), DATA, config)
    parts = onnxlr.calibrate(attention(), DATA, replace(config, memory=1), output=tmp_path / "moments.safetensors")
    assert parts.moments.keys() == whole.moments.keys()
    assert (parts.samples, parts.data, parts.sizes) == (whole.samples, whole.data, whole.sizes)
    for key, moments in whole.moments.items():
        np.testing.assert_array_equal(parts.moments[key].gram, moments.gram)
    with pytest.raises(ConfigError, match="need a file: give output, or work"):
        onnxlr.calibrate(attention(), DATA, replace(config, memory=1))


def test_a_file_that_is_gone_is_said(tmp_path: Path) -> None:
    stats = onnxlr.calibrate(attention(), DATA, Config(**FINE, objective="output"), output=tmp_path / "moments")
    (tmp_path / "moments").unlink()
    with pytest.raises(onnxlr.errors.StatsError, match="cannot be read any more"):
        stats.moments[next(iter(stats.moments))]
    with pytest.raises(KeyError):
        stats.moments["no such tensor"]


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("500M", 500 * 2**20), ("2.5g", 5 * 2**29), ("1T", 2**40)])
def test_sizes_in_memory(text: str, size: int) -> None:
    from onnxlr.cli.options import Bytes

    assert Bytes().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "G", "2X", "-1G", "0", "nan", "inf", "1e400"])
def test_what_is_no_size_is_refused(tmp_path: Path, text: str) -> None:
    done = invoke("calibrate", tmp_path / "m.onnx", "--calib", tmp_path, "-o", tmp_path / "o", "--memory", text)
    assert done.code == 2
    assert "is no size in memory: give bytes, or a number with K, M, G or T, such as 2G" in done.err
    with pytest.raises(ConfigError, match="memory must be at least 1 byte"):
        Config(memory=0)


def test_the_command_resumes(tmp_path: Path) -> None:
    save(from_proto(mlp()), tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", rows(160))
    command = [
        tmp_path / "model.onnx", "--calib", tmp_path / "x.npy", "--objective", "output", "--work", tmp_path / "work",
        "--memory", "1K", "--force", "--json", "-q",
    ]  # fmt: skip
    assert invoke("calibrate", *command, "-o", tmp_path / "moments").code == 0
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert len(stamps) >= 2
    done = invoke("compress", *command, "-o", tmp_path / "out.onnx", "--keep-params", "0.6")
    assert done.code == 0, done.err
    assert stamps.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}.items()
    assert "importance" in json.loads(done.out)["seconds"]
    again = invoke("compress", *command, "-o", tmp_path / "out.onnx", "--keep-params", "0.6")
    assert "importance" not in json.loads(again.out)["seconds"]


def test_a_work_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="file/work cannot be made"),
        working(tmp_path / "file" / "work", lambda: ""),
    ):
        raise AssertionError("unreachable")


def test_results_are_told_apart_by_all_that_they_follow_from(tmp_path: Path) -> None:
    paths = {
        Work(tmp_path, source).path(stage, settings, ".json")
        for source in ("a", "b")
        for stage in ("importance", "plan")
        for settings in ("x", ("x", 1))
    }
    assert len(paths) == 8


def test_plans_of_other_threads_are_others_where_time_counts() -> None:
    one, two = ([_settings(Config(target=target, threads=n), [], None) for n in (1, 2)] for target in TIMED)
    assert one[0] == one[1]
    assert two[0] != two[1]


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    a, b, c = generator.standard_normal((6, 2)), generator.standard_normal((2, 5)), generator.standard_normal(5)
    stored = {
        "pair": Stored(a, b, c),
        "block": Stored(a, b, None, Window("input", 3, 12.5), shared="both"),
        "narrow": Stored(None, b, c, inputs=np.array([0, 4]), outputs=np.arange(5)),
        "groups": Stored(np.stack([a, a]), np.stack([b, b]), None),
    }
    cuts = {name: Cut("pair", 2, width=None, shared=name == "block") for name in stored} | {"dense": Cut()}
    plan = Plan(cuts, stored, dict.fromkeys(cuts, 0.5), {"pair": 0.1})
    save_plan(plan, tmp_path / "plan.json")
    found = load_plan(tmp_path / "plan.json")
    assert (found.cuts, found.energy, found.predicted) == (plan.cuts, plan.energy, plan.predicted)
    assert found.stored.keys() == stored.keys()
    for name, one in stored.items():
        other = found.stored[name]
        assert (other.window, other.shared, other.products) == (one.window, one.shared, one.products)
        for field in ("first", "second", "bias", "inputs", "outputs"):
            np.testing.assert_equal(getattr(other, field), getattr(one, field))


def test_tensor_files_are_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    arrays = {"a/b": np.arange(6.0).reshape(2, 3), "none": np.empty((0, 4)), "number": np.array(3.5)}
    write_tensors(tmp_path / "t", {"k": "v"}, {name: array.shape for name, array in arrays.items()}, arrays.values())
    for found in (load_file(tmp_path / "t"), map_tensors(tmp_path / "t")):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    Stats("m", (), 1, 8, {}).save(tmp_path / "s")
    assert map_tensors(tmp_path / "s") == {}


@pytest.mark.parametrize("stage", ["importance", "plan"])
def test_a_damaged_result_is_named(tmp_path: Path, stage: str) -> None:
    shrink(tmp_path, work=tmp_path / "work")
    (damaged,) = (tmp_path / "work").glob(f"{stage}-*.json")
    damaged.write_text("{")
    if stage == "importance":
        next((tmp_path / "work").glob("plan-*.json")).unlink()
    with pytest.raises(OutputError, match=rf"{damaged.name} is damaged .*: delete it"):
        shrink(tmp_path, work=tmp_path / "work")

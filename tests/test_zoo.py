"""The zoo: what is drawn for a model's inputs, rows of models that go through and of those that do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from models import parsed, random

from onnxlr.errors import GateError
from onnxlr.session import Session
from onnxlr.sites import take_inventory
from tools.zoo import COLUMNS, line, refused, row_of, visit
from tools.zoo_shelf import TOKENS, Entry, entries, known, samples

if TYPE_CHECKING:
    from pathlib import Path


def test_inputs_are_drawn_as_they_are_known() -> None:
    signature = (
        "(float[N, 3] x, int64[N, T] ids, int64[N, T] attention_mask, int64[N, T] places, int64 rate) => (int64 y)"
    )
    specs = Session(parsed(signature, "y = Identity(rate)")).inputs
    drawn = samples(specs, {"x": (2, 3), "places": range(5, 7), "rate": 16000}, 20)
    assert len(drawn) == 20
    assert drawn[0]["x"].shape == (2, 3)
    assert drawn[0]["x"].dtype == np.float32
    assert {int(sample["rate"]) for sample in drawn} == {16000}
    assert set(np.unique([sample["places"] for sample in drawn])) == {5, 6}
    assert set(np.unique([sample["attention_mask"] for sample in drawn])) == {1}
    ids = np.unique([sample["ids"] for sample in drawn])
    assert TOKENS.start <= ids.min() < ids.max() < TOKENS.stop
    assert not np.array_equal(drawn[0]["x"], drawn[1]["x"])


def test_names_are_unique_and_what_is_known_belongs_to_some_model() -> None:
    names = [entry.name for entry in entries()]
    assert len(set(names)) == len(names)
    assert {"input", "state", "sr"} == known("silero-vad: silero_vad").keys()
    assert not known("BERT")


def test_a_weight_counts_once_for_a_reason() -> None:
    body = "a = MatMul(x, w) b = MatMul(a, w) c = Relu(w) y = MatMul(b, v)"
    model = parsed("(float[N, 6] x) => (float[N, 6] y, float[6, 6] c)", body, w=random(1, 6, 6), v=random(2, 6, 6))
    ((reason, share),) = refused(take_inventory(model))
    assert reason.startswith("MatMul: its weight is also read by Relu")
    assert share == 0.5


def test_a_model_goes_all_the_way() -> None:
    model = parsed(
        "(float[N, 4, 8, 8] x) => (float[N, 6] y)",
        "c = Conv<pads = [1, 1, 1, 1]>(x, k) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) y = MatMul(f, w)",
        k=random(1, 32, 4, 3, 3),
        w=random(2, 32, 6),
    )
    parts = list(visit(model, {}))
    row: dict[str, Any] = {key: value for part in parts for key, value in part.items()}
    assert (row["nodes"], row["sites"], row["parameters"], row["macs"], row["refused"]) == (5, 2, 1.0, 1.0, [])
    assert row["exact"]
    assert 0 < row["full_rank"] < 1e-5
    assert row["kept"] <= 0.7
    assert 0 < row["error"] < 1
    assert row["latency"] > 0


def test_whatever_ends_a_process_is_a_row(tmp_path: Path) -> None:
    crashed = row_of(Entry("none of the zoo", "onnx"), tmp_path, 60)
    assert crashed["failure"].startswith("crashed: ValueError")
    late = row_of(next(entries()), tmp_path, 0.01)
    assert late["failure"] == "not done within 0.01 s"
    cells = line(late | {"sites": 7, "refused": [("Conv: depthwise", 0.125)]}).split("|")[1:-1]
    assert len(cells) == len(COLUMNS)
    assert cells[4].strip() == "7"
    assert cells[-1].strip() == "**not done within 0.01 s**; Conv: depthwise (12.5%)"


def test_a_missing_library_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    entry = next(entry for entry in entries() if entry.source.startswith("timm:"))
    assert row_of(entry, tmp_path, 60)["failure"] == "left out: pip install torch timm"


def test_what_was_found_before_a_failure_is_kept() -> None:
    found = visit(parsed("(float[N, 6] x) => (float[N, 1] y)", "y = MatMul(x, w)", w=random(1, 6, 1)), {})
    assert next(found)["sites"] == 1
    assert next(found)["exact"]
    with pytest.raises(GateError, match="cannot be reached"):
        next(found)

"""Streamed metrics against the same formulas on whole arrays."""

from __future__ import annotations

import itertools
import math
import sys
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlr import metrics
from onnxlr.errors import ConfigError, DataError
from onnxlr.metrics import OutputComparison, relative_error, token_rows
from onnxlr.task_metrics import MeanMetric, load_metric, top1

if TYPE_CHECKING:
    from pathlib import Path

    from onnxlr.metrics import Array, OutputParity


def compared(reference: Array, candidate: Array, rows: Array | None = None) -> OutputParity:
    comparison = OutputComparison("y")
    comparison.update(reference, candidate, rows)
    return comparison.result()


def noisy(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(shape).astype(np.float32)
    return reference, reference + 0.3 * rng.standard_normal(shape).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(9, 4), (9,), (9, 3, 5), (9, 2, 1200), (9, 1)]),
    cuts=st.sets(st.integers(0, 9), max_size=5),
)
def test_any_batches_give_what_the_whole_gives(seed: int, shape: tuple[int, ...], cuts: set[int]) -> None:
    reference, candidate = noisy(shape, seed)
    comparison = OutputComparison("y")
    edges = [0, *sorted(cuts), 9]
    for start, stop in itertools.pairwise(edges):
        comparison.update(reference[start:stop], candidate[start:stop])
    parity = comparison.result()
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    assert parity.count == a.size
    assert parity.relative_l2 == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    assert parity.max_abs == np.abs(a - b).max()
    assert parity.mean_abs == pytest.approx(np.abs(a - b).mean(), rel=1e-12)
    assert parity.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert parity.agreement is None
    if shape in ((9, 4), (9, 2, 1200)):
        assert parity.top1_agreement == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean(), rel=1e-12)
    else:
        assert parity.top1_agreement is None


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate = noisy((7, 5))
    whole = compared(reference, candidate)
    monkeypatch.setattr(metrics, "BLOCK", 10)
    blocks = compared(reference, candidate)
    assert blocks.top1_agreement == whole.top1_agreement
    assert blocks.relative_l2 == pytest.approx(whole.relative_l2, rel=1e-12)
    assert blocks.count == whole.count


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_narrow_floats_are_widened_before_they_are_subtracted(dtype: type) -> None:
    reference = np.full((2, 3), 60000.0).astype(dtype)
    candidate = np.full((2, 3), -60000.0).astype(dtype)
    parity = compared(reference, candidate)
    assert parity.relative_l2 == 2.0
    assert parity.cosine == pytest.approx(-1.0)
    assert parity.max_abs == 2 * float(reference[0, 0])


def test_a_candidate_in_another_precision_is_compared() -> None:
    reference, _ = noisy((4, 3))
    parity = compared(reference, reference.astype(np.float16))
    assert 0 < parity.relative_l2 < 1e-3


def test_equal_outputs_err_by_nothing() -> None:
    reference, _ = noisy((4, 3))
    parity = compared(reference, reference)
    assert (parity.relative_l2, parity.max_abs, parity.mean_abs, parity.top1_agreement) == (0.0, 0.0, 0.0, 1.0)
    assert parity.cosine == pytest.approx(1.0)


def test_zero_references() -> None:
    zero, one = np.zeros((2, 1), np.float32), np.ones((2, 1), np.float32)
    assert (compared(zero, zero).relative_l2, compared(zero, zero).cosine) == (0.0, 1.0)
    assert (compared(zero, one).relative_l2, compared(zero, one).cosine) == (math.inf, 0.0)
    assert (compared(one, zero).relative_l2, compared(one, zero).cosine) == (1.0, 0.0)


def test_scalars_have_an_error_too() -> None:
    assert compared(np.float32(4.0).reshape(()), np.float32(3.0).reshape(())).relative_l2 == 0.25


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 5]])),
        (np.array([True, True, False, False]), np.array([True, True, False, True])),
        (np.array(["a", "b", "c", "d"], object), np.array(["a", "b", "c", "e"], object)),
    ],
)
def test_outputs_that_are_not_floating_agree_by_share(reference: Array, candidate: Array) -> None:
    parity = compared(reference, candidate)
    assert parity.agreement == 0.75
    assert parity.count == 4
    assert parity.relative_l2 is parity.cosine is parity.max_abs is parity.top1_agreement is None


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_empty_outputs_count_nothing(dtype: type) -> None:
    parity = compared(np.zeros((0, 3), dtype), np.zeros((0, 3), dtype))
    assert parity.count == 0
    assert parity.relative_l2 is parity.cosine is parity.agreement is parity.top1_agreement is None
    assert compared(np.zeros((3, 0), dtype), np.zeros((3, 0), dtype)).count == 0
    assert OutputComparison("y").result().count == 0


def test_rows_that_do_not_count_are_not_looked_at() -> None:
    reference, candidate = noisy((2, 3, 4))
    reference[1, 2] = np.nan
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    parity = compared(reference, candidate, token_rows(mask, reference.shape))
    kept = mask != 0
    wanted = np.linalg.norm(reference[kept] - candidate[kept]) / np.linalg.norm(reference[kept])
    assert parity.relative_l2 == pytest.approx(wanted, rel=1e-6)
    assert parity.count == 20
    assert compared(reference, candidate, np.zeros(6, bool)).count == 0


def test_messages_of_outputs_that_cannot_be_compared() -> None:
    good = np.ones((2, 3), np.float32)
    bad = good.copy()
    bad[1, 1] = np.inf
    with pytest.raises(DataError, match=r"output 'y' of the reference model holds NaN or infinity \(1 of 6"):
        compared(bad, bad)
    with pytest.raises(DataError, match="output 'y' of the candidate model holds NaN"):
        compared(good, np.full_like(good, np.nan))
    with pytest.raises(DataError, match=r"the reference gives the shape \[2, 3\], the candidate \[3, 2\]"):
        compared(good, good.reshape(3, 2))
    with pytest.raises(DataError, match="the reference gives float32, the candidate int64"):
        compared(good, good.astype(np.int64))
    with pytest.raises(DataError, match=r"2 rows, but a selection of \[3\]"):
        compared(good, good, np.ones(3, bool))


def test_the_error_of_a_model_is_that_of_its_worst_output() -> None:
    one = np.ones((1, 1), np.float32)
    labels = np.zeros((4, 1), np.int64)
    off = [compared(one, one - 0.5), compared(one, one), compared(one[:0], one[:0])]
    assert relative_error(off) == 0.5
    wrong = compared(labels, np.array([[0], [1], [1], [1]]))
    assert relative_error([*off, wrong]) == 0.75
    assert relative_error([*off, wrong], floating=True) == 0.5
    assert relative_error([wrong], floating=True) == 0.75
    beyond = np.full((1, 1), 1e200)
    assert relative_error([compared(beyond, beyond * 2)]) == math.inf
    assert relative_error([compared(np.arange(4), np.array([0, 1, 2, 4]))]) == 0.25
    assert relative_error([compared(one * 0, one)]) == math.inf


@pytest.mark.parametrize("shape", [(0, 3), None])
def test_nothing_compared_is_no_parity(shape: tuple[int, ...] | None) -> None:
    parities = [] if shape is None else [compared(np.zeros(shape, np.float32), np.zeros(shape, np.float32))]
    with pytest.raises(DataError, match="nothing to compare"):
        relative_error(parities)


MASK = np.array([[1, 1, 0], [2, 0, 0]])
REAL = MASK != 0


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((2, 3, 8), REAL),
        ((6, 8), REAL),
        ((2, 4, 3, 8), np.broadcast_to(REAL[:, None, :], (2, 4, 3))),
        ((2, 3, 4, 8), np.broadcast_to(REAL[:, :, None], (2, 3, 4))),
        ((2, 4, 5, 3, 8), np.broadcast_to(REAL[:, None, None, :], (2, 4, 5, 3))),
        ((2, 3, 3, 8), np.broadcast_to(REAL[:, :, None], (2, 3, 3))),
        ((2, 8), None),
        ((2, 3), None),
        ((8, 3, 3), None),
        ((2, 4, 8), None),
        ((2,), None),
        ((), None),
    ],
)
def test_token_rows(shape: tuple[int, ...], wanted: Array | None) -> None:
    rows = token_rows(MASK, shape)
    if wanted is None:
        assert rows is None
    else:
        assert rows is not None
        assert rows.dtype == bool
        np.testing.assert_array_equal(rows, wanted.ravel())


def test_a_padding_mask_has_two_axes() -> None:
    with pytest.raises(DataError, match=r"the padding mask has the shape \[2, 1, 3\]: expected \[samples, tokens\]"):
        token_rows(MASK[:, None], (2, 3, 8))


def test_top1_takes_the_output_of_class_scores() -> None:
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], np.float32)
    outputs = {"hidden": np.zeros((4, 2, 2), np.float32), "ids": np.zeros((4, 2), np.int64), "logits": scores}
    labels = np.array([1, 0, 0, 0], np.uint8)
    assert top1(outputs, labels) == 0.75
    several = {"features": -scores, **outputs}
    with pytest.raises(
        DataError, match=r"top1 needs one floating output .*: name the right one: --metric top1:features"
    ):
        top1(several, labels)
    assert load_metric("top1:logits")(several, labels) == 0.75
    with pytest.raises(DataError, match=r"the model gives 'features' .*: pass one of your own"):
        load_metric("top1:other")(several, labels)


def test_messages_of_top1() -> None:
    scores = {"logits": np.zeros((2, 3), np.float32)}
    with pytest.raises(DataError, match=r"top1 needs one floating output \[2, classes\].*'z' float32 \[2\]"):
        top1({"z": np.zeros(2, np.float32)}, np.array([0, 1]))
    with pytest.raises(DataError, match=r"one integer label a sample, got float64 labels \[2\]"):
        top1(scores, np.array([0.0, 1.0]))
    with pytest.raises(DataError, match=r"one integer label a sample, got int64 labels \[2, 1\]"):
        top1(scores, np.array([[0], [1]]))
    with pytest.raises(DataError, match=r"labels from 1 to 3 are not classes of output 'logits', which has 3"):
        top1(scores, np.array([1, 3]))


def test_metrics_are_weighted_by_the_size_of_a_batch() -> None:
    mean = MeanMetric("top1", top1)
    assert mean.value is None
    scores = np.eye(5, 3, dtype=np.float32)
    labels = np.array([0, 1, 2, 0, 1])
    mean.update({"y": scores[:3]}, labels[:3])
    mean.update({"y": scores[3:]}, labels[3:])
    assert mean.value == pytest.approx(0.8)


def test_metrics_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metric_of_a_user.py").write_text(
        "class Group:\n"
        "    @staticmethod\n"
        "    def first(outputs, labels):\n"
        "        return outputs['y'][0]\n"
        "def broken(outputs, labels):\n"
        "    raise ValueError('two\\nlines')\n"
        "def text(outputs, labels):\n"
        "    return 'good'\n"
        "number = 3\n"
    )
    (tmp_path / "broken_module_of_a_user.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    mean = MeanMetric("first", load_metric("own_metric_of_a_user:Group.first"))
    mean.update({"y": np.array([0.5, 9.0])}, np.array([0, 0]))
    assert mean.value == 0.5
    with pytest.raises(DataError, match=r"metric 'first' gives .*nan.*: expected one finite number"):
        mean.update({"y": np.array([np.nan])}, np.array([0]))
    with pytest.raises(DataError, match="metric 'm' fails on a batch: ValueError: two lines"):
        MeanMetric("m", load_metric("own_metric_of_a_user:broken")).update({}, np.array([0]))
    with pytest.raises(DataError, match="metric 'm' gives 'good': expected one finite number"):
        MeanMetric("m", load_metric("own_metric_of_a_user:text")).update({}, np.array([0]))
    with pytest.raises(ConfigError, match="the module own_metric_of_a_user has no 'missing'"):
        load_metric("own_metric_of_a_user:missing")
    with pytest.raises(ConfigError, match="number is a int, expected a function"):
        load_metric("own_metric_of_a_user:number")
    with pytest.raises(ConfigError, match="broken_module_of_a_user cannot be imported: ModuleNotFoundError: No module"):
        load_metric("broken_module_of_a_user:f")
    assert sys.path == before


@pytest.mark.parametrize("spec", ["top5", "module:", ":function", ""])
def test_unknown_metrics(spec: str) -> None:
    with pytest.raises(ConfigError, match="give 'top1' or 'module:function'"):
        load_metric(spec)


def test_top1_is_built_in() -> None:
    assert load_metric("top1") is top1

"""Moments against numpy on whole arrays; sums of shards; the file they are kept in."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from onnxlr import gram
from onnxlr.errors import OutputError, StatsError
from onnxlr.gram import Moments, Stats

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

EPS = np.finfo(np.float64).eps


def data(rows: int, dim: int, seed: int, *, mean: float = 0.0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return mean + rng.standard_normal((rows, dim)) @ rng.standard_normal((dim, dim))


def stats(seed: int = 0, **changes: Any) -> Stats:
    moments = {"input:x": Moments.of(data(9, 4, seed)), "output:h/0:rows": Moments.of(data(7, 3, seed + 1))}
    return replace(Stats("a" * 64, (f"shard-{seed}",), 9, 8, moments), **changes)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 60),
    dim=st.integers(1, 8),
    seed=st.integers(0, 999),
    mean=st.sampled_from([0.0, 3.0, -100.0]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_moments_are_those_of_numpy(rows: int, dim: int, seed: int, mean: float, dtype: type[np.floating[Any]]) -> None:
    x = data(rows, dim, seed, mean=mean).astype(dtype)
    wide = x.astype(np.float64)
    moments = Moments.of(x)
    assert (moments.count, moments.dim) == (rows, dim)
    assert moments.total.dtype == moments.gram.dtype == np.float64
    np.testing.assert_allclose(moments.mean, wide.mean(0), rtol=1e-13, atol=1e-13 * np.abs(wide).max())
    squared = np.square(wide).max()
    np.testing.assert_allclose(
        moments.second, np.einsum("ni,nj->ij", wide, wide) / rows, rtol=1e-13, atol=1e-13 * squared
    )
    expected = np.cov(wide, rowvar=False, bias=True).reshape(dim, dim)
    np.testing.assert_allclose(moments.covariance, expected, rtol=0, atol=8 * (rows + dim) * EPS * squared)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), dim=st.integers(1, 6), seed=st.integers(0, 999))
def test_shifted_moments_are_those_of_shifted_rows(rows: int, dim: int, seed: int) -> None:
    x, offset = data(rows, dim, seed), np.random.default_rng(seed).standard_normal(dim)
    shifted, direct = Moments.of(x).shifted(offset), Moments.of(x + offset)
    assert shifted.count == rows
    np.testing.assert_allclose(shifted.total, direct.total, rtol=0, atol=1e-12 * rows * np.abs(x).max())
    np.testing.assert_allclose(shifted.gram, direct.gram, rtol=0, atol=1e-12 * max(1.0, np.abs(direct.gram).max()))


@settings(max_examples=20, deadline=None)
@given(dim=st.integers(1, 12), seed=st.integers(0, 999), mean=st.sampled_from([0.0, 50.0]))
def test_eight_shards_add_up_to_the_single_pass(dim: int, seed: int, mean: float) -> None:
    x = data(200, dim, seed, mean=mean)
    shards = sum((Moments.of(part) for part in np.array_split(x, 8)), Moments.zero(dim))
    whole = Moments.of(x)
    assert shards.count == whole.count == 200
    # relative to the sums of absolute values, which bound what rounding can do to each sum
    np.testing.assert_array_less(np.abs(shards.total - whole.total), 1e-12 * np.abs(x).sum(0))
    np.testing.assert_array_less(np.abs(shards.gram - whole.gram), 1e-12 * (np.abs(x).T @ np.abs(x)))


def test_zero_moments_have_a_mean_and_no_nan() -> None:
    nothing = Moments.zero(3)
    for array in (nothing.mean, nothing.second, nothing.covariance):
        assert not array.any()


def test_stats_add_by_tensor() -> None:
    a, b = stats(0), stats(5, samples=4)
    both = a + b
    assert (both.model, both.holdout_every, both.samples) == (a.model, 8, 13)
    assert both.data == ("shard-0", "shard-5")
    assert both.no_gradients == ""
    assert [(a + replace(b, no_gradients="why")).no_gradients, (replace(a, no_gradients="why") + b).no_gradients] == [
        "why", "why"]  # fmt: skip
    for key in a.moments:
        assert both.moments[key].count == a.moments[key].count + b.moments[key].count
        np.testing.assert_array_equal(both.moments[key].gram, a.moments[key].gram + b.moments[key].gram)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": "b" * 64}, "moments of different models do not add: aaaaaaaaaaaa and bbbbbbbbbbbb"),
        ({"moments": {"input:x": Moments.zero(4)}}, "only one of the files has 'output:h/0:rows'"),
        ({"holdout_every": 4}, "one sample of 8 and one of 4"),
        ({"mask": "real"}, "those with no --mask and --mask real"),
    ],
)
def test_stats_that_do_not_add_are_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(StatsError, match=message):
        stats() + stats(1, **other)


@pytest.mark.parametrize("empty", [False, True])
def test_what_is_saved_is_loaded_bit_by_bit(tmp_path: Path, empty: bool) -> None:
    saved = stats(3, moments={}) if empty else stats(3, data=("a", 'b "quoted" ü'), no_gradients="no 'torch'")
    saved.save(tmp_path / "moments")
    loaded = Stats.load(tmp_path / "moments")
    assert replace(loaded, moments={}) == replace(saved, moments={})
    assert list(loaded.moments) == list(saved.moments)
    for key, value in saved.moments.items():
        assert loaded.moments[key].count == value.count
        assert loaded.moments[key].total.tobytes() == value.total.tobytes()
        assert loaded.moments[key].gram.tobytes() == value.gram.tobytes()


def test_moments_in_another_memory_order_are_saved_as_they_are(tmp_path: Path) -> None:
    lopsided = np.arange(9.0).reshape(3, 3)
    saved = stats(moments={"input:x": Moments(1, np.arange(6.0)[::2], np.asfortranarray(lopsided))})
    saved.save(tmp_path / "moments")
    loaded = Stats.load(tmp_path / "moments").moments["input:x"]
    np.testing.assert_array_equal(loaded.gram, lopsided)
    np.testing.assert_array_equal(loaded.total, [0, 2, 4])


def test_a_file_is_replaced_only_by_force_and_then_whole(tmp_path: Path) -> None:
    path = tmp_path / "moments"
    stats(0).save(path)
    with pytest.raises(OutputError, match="exists already: pass --force"):
        stats(1).save(path)
    assert Stats.load(path).data == ("shard-0",)
    stats(1).save(path, force=True)
    assert Stats.load(path).data == ("shard-1",)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "moments"
    stats(0).save(path)

    def interrupted(target: Path, *rest: object) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gram, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stats(1).save(path, force=True)
    assert Stats.load(path).data == ("shard-0",)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    # a limit on the size of files stands in for the full disk; it can only be set for a whole process
    script = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from onnxlr.errors import OutputError
from onnxlr.gram import Moments, Stats
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    Stats("m", (), 1, 8, {"input:x": Moments.zero(100)}).save(Path(sys.argv[1]))
except OutputError as error:
    print(error)
"""
    path = tmp_path / "moments"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True, timeout=60)
    assert f"{path} cannot be written" in done.stdout
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_moments_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "moments"
    with pytest.raises(StatsError, match="does not exist: write it with `onnxlr calibrate`"):
        Stats.load(path)
    with pytest.raises(StatsError, match="cannot be read as a moments file"):
        Stats.load(tmp_path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(StatsError, match="cannot be read as a moments file"):
        Stats.load(path)
    stats().save(path, force=True)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StatsError, match="cannot be read as a moments file"):
        Stats.load(path)


HEADER = {"format": gram.FORMAT, "model": "m", "data": "[]", "samples": "1", "holdout_every": "8", "rows": "{}"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, r"is no moments file \(onnxlr-moments/1\)"),
        (HEADER | {"format": "onnxlr-moments/0"}, r"is no moments file \(onnxlr-moments/1\)"),
        ({key: value for key, value in HEADER.items() if key != "rows"}, r"damaged, its header gives KeyError\('rows'"),
        (HEADER | {"data": "["}, "damaged, its header gives JSONDecodeError"),
        (HEADER | {"samples": "many"}, "damaged, its header gives ValueError"),
        (HEADER | {"rows": '{"input:x": 3}'}, "cannot be read as a moments file"),
    ],
)
def test_a_file_with_another_header_is_refused(tmp_path: Path, header: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "moments"
    save_file({"a": np.zeros(2)}, path, metadata=header)
    with pytest.raises(StatsError, match=message):
        Stats.load(path)
    save_file({}, path, metadata=HEADER)
    assert Stats.load(path) == Stats("m", (), 1, 8, {})

"""Moments that the graph computes, on the CPU: those of activations that come out, whatever the tensors' rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import conftest
import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import FORMS, TEXT_TYPES, Form, parsed, random

from onnxlr.calibrate import accumulate
from onnxlr.config import Config
from onnxlr.errors import DataError
from onnxlr.gram import Moments, Stats
from onnxlr.in_graph import SUMS, InGraph, gram_bytes, taken, with_moments
from onnxlr.model_io import from_proto
from onnxlr.rows import Part, Patches, Rows
from onnxlr.running import PIECE, RunningMoments
from onnxlr.session import DEVICES, Session
from onnxlr.sites import take_inventory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxlr.config import Objective
    from onnxlr.model_io import Model

    Array = np.ndarray[Any, Any]
    Batch = tuple[Array, Array | None]

EPS = float(np.finfo(np.float32).eps)
CONFIG = Config(threads=1)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a provider with a memory of its own."""
    monkeypatch.setitem(DEVICES, "CPUExecutionProvider", "cpu")


def copying(ndim: int, dtype: str, *, masked: bool, opset: int = 17) -> Model:
    """From x to the same as t; its axes are free, and so are those of an input `mask` that nothing reads."""
    axes = ", ".join(f"n{axis}" for axis in range(ndim))
    mask = ", int64[samples, tokens] mask" if masked else ""
    kind = TEXT_TYPES[dtype]
    return parsed(f"({kind}[{axes}] x{mask}) => ({kind}[{axes}] t)", "t = Identity(x)", opset=opset)


def both_ways(rows: Rows, batches: Sequence[Batch], **options: Any) -> tuple[RunningMoments, RunningMoments]:
    """The moments of the rows of batches, outside of a graph and in it; options are those of `copying`."""
    (x, mask), *rest = batches
    first = rows.of(x, mask)
    outside, inside = RunningMoments(first.shape[1]), RunningMoments(first.shape[1])
    for running in (outside, inside):
        running.add(first)
    model = copying(x.ndim, x.dtype.name, masked=mask is not None, **options)
    config = replace(CONFIG, mask=None if mask is None else "mask")
    graph = InGraph(model, [("t", rows)], {"t": x.ndim}, {("t", rows): inside}, [], config, provider="cpu")
    for array, real in rest:
        outside.add(rows.of(array, real))
        assert graph.run({"x": array} | ({} if real is None else {"mask": real}), [], 0) == {}
    graph.finish()
    return outside, inside


def assert_same(outside: RunningMoments, inside: RunningMoments, tolerance: float = EPS) -> None:
    """Sums over rows less the shift agree to a precision of `tolerance`, and what is added back to that of float64."""
    assert outside.count == inside.count
    assert outside.shift is not None
    shift = outside.shift.astype(np.float64)
    a, b = outside.moments(), inside.moments()
    x, z = a.gram.trace(), a.shifted(-shift).gram.trace()
    assert np.linalg.norm(a.total - b.total) <= (4 * tolerance * z**0.5 + 1e-15 * x**0.5) * a.count**0.5
    apart = a.shifted(-shift).gram - b.shifted(-shift).gram
    assert np.linalg.norm(apart) <= 4 * tolerance * z + 1e-14 * x


@dataclass(frozen=True)
class Laid:
    """Rows of a tensor, with batches of it."""

    rows: Rows
    batches: list[Batch]


@st.composite
def laid(draw: st.DrawFn) -> Laid:
    """Any axes and parts, batches of any size, axes that change their length; a mask that fits somewhere or nowhere."""
    ndim = draw(st.integers(1, 4))
    order = draw(st.permutations(range(ndim)))
    features = tuple(order[: draw(st.integers(1, 1 if ndim == 1 else 2))])
    if len(features) == 1 and draw(st.booleans()):
        features = (features[0] - ndim,)
    fixed = {axis % ndim for axis in features}
    parts = []
    divided: dict[int, int] = {}
    for axis in range(ndim):
        if draw(st.integers(0, 3)) == 0:
            divided[axis] = draw(st.integers(1, 3))
            named = axis - ndim if draw(st.booleans()) else axis
            parts.append(Part(named, draw(st.integers(0, divided[axis] - 1)), divided[axis]))
    if draw(st.booleans()):
        parts.append(Part(-ndim - 1, 1, 2))  # an axis that this tensor lacks
    lengths = {axis: draw(st.integers(1, 3)) * divided.get(axis, 1) for axis in range(ndim)}
    dtype = draw(st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.float64]))
    masks = draw(st.sampled_from(["none", "second", "last", "flat", "elsewhere"]))
    mean = draw(st.sampled_from([0.0, 1.0, 100.0]))
    rows = Rows(features, tuple(parts))
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    batches: list[Batch] = []
    for _ in range(draw(st.integers(1, 4))):
        shape = [lengths[axis] if axis in fixed or axis in divided else draw(st.integers(1, 4)) for axis in range(ndim)]
        if divided and draw(st.booleans()):
            free = [axis for axis in divided if axis not in fixed]
            shape = [1 if axis in free else length for axis, length in enumerate(shape)]
        x = (mean + generator.standard_normal(shape)).astype(dtype)
        leading = x[rows.chunk(x.shape)].transpose(rows.order(ndim)).shape[: -len(features)]
        size: tuple[int, ...] = {
            "second": leading[:2], "last": (*leading[:1], *leading[-1:]), "flat": (prod(leading), 1),
        }.get(masks, (7, 5))  # fmt: skip
        real = generator.integers(0, 2, size if len(size) == 2 else (7, 5))
        batches.append((x, None if masks == "none" else real))
    return Laid(rows, batches)


@settings(max_examples=100, deadline=None)
@given(laid(), st.sampled_from([10, 12, 17]), st.sampled_from([1, 3, PIECE]))
def test_moments_are_those_of_the_same_rows_outside(made: Laid, opset: int, piece: int) -> None:
    x, mask = made.batches[0]
    assume(len(made.rows.of(x, mask)))
    assume(opset >= 13 or x.dtype != ml_dtypes.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxlr.in_graph.PIECE", piece)
        outside, inside = both_ways(made.rows, made.batches, opset=opset)
    assert_same(outside, inside, 1e-15 if x.dtype == np.float64 else EPS)


def test_of_two_axes_that_a_mask_fits_the_first_is_that_of_the_tokens() -> None:
    lengths = ((3, 4), (3, 3), (4, 3), (2, 2))
    batches: list[Batch] = [(random(i, 2, *own, 5), np.array([[1, 0, 1], [1, 1, 0]])) for i, own in enumerate(lengths)]
    outside, inside = both_ways(Rows(), batches)
    assert_same(outside, inside)
    assert outside.count == 12 + 16 + 16 + 8


def test_the_error_does_not_grow_with_the_number_of_rows_of_a_batch_or_of_all() -> None:
    mix = random(1, 6, 6, dtype=np.float64)
    x = (random(2, 40 * PIECE + 5, 6, dtype=np.float64) @ mix).astype(np.float32)
    errors = []
    for batches in (np.split(x[:PIECE], [256]), np.split(x, [PIECE + 1]), np.array_split(x, 60)):
        _, inside = both_ways(Rows(), [(part, None) for part in batches])
        moments, exact = inside.moments(), Moments.of(x[: inside.count])
        errors.append(np.linalg.norm(moments.gram - exact.gram) / np.linalg.norm(exact.gram))
    assert max(errors[1:]) <= max(errors[0], 5e-8)


@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_the_covariance_survives_a_mean_far_beyond_the_spread(mean: float) -> None:
    x = (mean + random(1, 3000, 12) / 4).astype(np.float32)
    _, inside = both_ways(Rows(), [(part, None) for part in np.array_split(x, 7)])
    exact = np.cov(x.astype(np.float64), rowvar=False, bias=True)
    assert np.linalg.norm(inside.moments().covariance - exact) <= 4 * EPS * np.linalg.norm(exact)


def test_moments_of_shards_add_up_whichever_way_they_were_gathered() -> None:
    x = random(1, 60, 5, dtype=np.float64) + 3
    one, other = ([(part, None) for part in np.array_split(half, 3)] for half in (x[:40], x[40:]))
    outside, inside = (running.moments() for running in both_ways(Rows(), one))
    assert inside.count == outside.count == 40
    exact = Moments.of(x)
    for moments in (inside, outside):
        whole = moments + both_ways(Rows(), other)[1].moments()
        np.testing.assert_allclose(whole.gram, exact.gram, rtol=0, atol=1e-12 * np.abs(exact.gram).max())
        assert whole.count == 60


def test_no_activation_comes_out_of_the_graph_and_nothing_idle_stays_in_it() -> None:
    w = random(1, 6, 8)
    model = parsed("(float[N, 6] x) => (float[N, 8] y, float[N, 8] z)", "y = MatMul(x, w) z = Relu(y)", w=w)
    running = RunningMoments(6)
    running.add(random(2, 9, 6))
    made = with_moments(model, {("x", Rows()): running}, {"x": 2}, [], None)
    assert [value.name for value in made.proto.graph.output] == ["x:gram/added", SUMS]
    assert not made.proto.graph.initializer
    assert "MatMul(x" not in onnx.printer.to_text(made.proto)
    assert [value.name for value in model.proto.graph.output] == ["y", "z"]


SUMMED = "a = MatMul(x, w1) b = Relu(a) d = MatMul(b, w2) e = Mul(d, s) y = MatMul(e, w3)"


def scaled(opset: int = 17) -> Model:
    return parsed(
        "(float[N, 6] x, float[N, 4] s) => (float[N, 7] y)", SUMMED, opset=opset,
        w1=random(1, 6, 8), w2=random(2, 8, 4), w3=random(3, 4, 7),
    )  # fmt: skip


def gather(model: Model, samples: Sequence[dict[str, Array]], **options: Any) -> Stats:
    config = replace(CONFIG, **{"objective": "output", **options})
    return accumulate(model, take_inventory(model), samples, Session(model).inputs, config)


def scales(count: int = 24) -> list[dict[str, Array]]:
    return [{"x": x[None], "s": np.ones((1, 4), np.float32)} for x in random(4, count, 6)]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("sample", [3, 13])
def test_a_tensor_that_is_not_finite_is_named_with_its_batch(bad: float, sample: int) -> None:
    samples = scales()
    samples[sample]["s"][0, 2] = bad
    first = sample // 5 * 5
    with pytest.raises(DataError, match=f"tensor 'e' holds NaN or infinite values in the batch from sample {first}:"):
        gather(scaled(), samples, batch=5)


@pytest.mark.usefixtures("device")
def test_squares_beyond_single_precision_are_no_moments() -> None:
    samples = scales()
    gather(scaled(), samples, batch=5)
    samples[13]["s"][:] = 1e25
    with pytest.raises(DataError, match=r"tensor 'e' holds values whose squares leave the range of float32: .* cpu,"):
        gather(scaled(), samples, batch=5)


@pytest.mark.usefixtures("device")
def test_what_is_out_of_range_from_the_first_batch_on_is_squared_outside() -> None:
    samples = scales()
    for sample in samples:
        sample["s"] *= np.float32(1e25)
    stats = gather(scaled(), samples, batch=5)
    assert stats.moments["e"].count == 24
    assert np.isfinite(stats.moments["e"].gram).all()


@pytest.mark.usefixtures("device")
def test_infinity_in_padding_is_no_harm() -> None:
    model = parsed("(float[N, S, 6] x, int64[N, S] mask) => (float[N, S, 8] y)", "y = MatMul(x, w)", w=random(1, 6, 8))
    x = random(2, 3, 4, 6)
    x[1:, 3] = np.inf
    samples = [{"x": a[None], "mask": np.array([m])} for a, m in zip(x, [[1] * 4, *[[1] * 3 + [0]] * 2], strict=True)]
    stats = gather(model, samples, mask="mask", batch=1)
    assert stats.moments["x"].count == 10
    np.testing.assert_allclose(stats.moments["x"].total, x[np.isfinite(x)].reshape(10, 6).sum(0), rtol=1e-5)
    with pytest.raises(DataError, match="tensor 'x' holds NaN or infinite values in the batch from sample 1"):
        gather(model, samples, batch=1)


def test_what_the_graph_does_not_add_up() -> None:
    model, probe = scaled(), ("x", Rows())
    inputs = Session(model).inputs
    running, empty, huge, constant = (RunningMoments(6) for _ in range(4))
    running.add(random(1, 5, 6))
    huge.add(1e25 * random(1, 5, 6))
    constant.add(np.ones((5, 6), np.float32))
    patches = ("x", Rows((1,), patches=Patches((1,), (1,), (1,), (0, 0))))
    sums = {probe: running, ("e", Rows()): running, patches: running}
    assert taken(model, inputs, sums, {"e"}, sums) == [probe]
    assert taken(scaled(9), inputs, [probe], {}, sums) == []
    assert taken(scaled(10), inputs, [probe], {}, sums) == [probe]
    strings = [replace(inputs[0], dtype=np.dtype(object)), *inputs[1:]]
    assert taken(model, strings, [probe], {}, sums) == []
    assert [taken(model, inputs, [probe], {}, {probe: each}) for each in (empty, huge, constant)] == [[]] * 3


def test_the_accumulators_of_a_device_count_as_its_memory() -> None:
    assert gram_bytes(100) == np.zeros((100, 100)).nbytes


def assert_both_ways_equal(
    model: Model, samples: Sequence[dict[str, Array]], patch: pytest.MonkeyPatch, tolerance: float = 4 * EPS,
    **options: Any
) -> None:  # fmt: skip
    """Calibration gives the same with and without a device."""
    outside = gather(model, samples, **options)
    with patch.context() as inner:
        inner.setitem(DEVICES, "CPUExecutionProvider", "cpu")
        inside = gather(model, samples, **options)
    assert replace(outside, moments={}) == replace(inside, moments={})
    assert dict(outside.sizes) == dict(inside.sizes)
    for key, a in outside.moments.items():
        b = inside.moments[key]
        assert np.linalg.norm(a.gram - b.gram) <= tolerance * np.linalg.norm(a.gram), key
        assert np.linalg.norm(a.total - b.total) <= tolerance * (a.count * np.linalg.norm(a.gram)) ** 0.5, key


KINDS = {(form.axes, form.x.ndim, form.x.dtype, form.opaque): form for form in FORMS}
"""A form for each way in which the rows lie in its tensors."""


@pytest.mark.parametrize("objective", ["output", "utilized"])
@pytest.mark.parametrize("form", KINDS.values(), ids=str)
def test_every_kind_of_form_both_ways(form: Form, objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [{"x": form.x}, {"x": (3 - 2 * form.x).astype(form.x.dtype)}]
    # onnxruntime may round products of half precision otherwise where their sum has another reader
    tolerance = 1e-3 if form.x.dtype == np.float16 else 4 * EPS
    assert_both_ways_equal(form.model, samples, monkeypatch, tolerance, objective=objective)


@pytest.mark.parametrize("mask", [None, "mask"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("memory", [None, 30_000])
def test_a_transformer_both_ways(
    batch: int, mask: str | None, memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_proto(conftest.attention())
    assert_both_ways_equal(
        model, conftest.sequences(17), monkeypatch, 1e-6, objective="utilized", mask=mask, batch=batch, memory=memory
    )


CONVOLUTIONS = """h = Conv<pads = [1, 1, 1, 1]>(x, w1) i = Relu(h) j = Conv<group = 2>(i, w2) k = Relu(j)
    p = GlobalAveragePool(k) f = Flatten(p) y = MatMul(f, w3)"""


def test_patches_come_out_beside_what_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parsed(
        "(float[N, 4, H, W] x) => (float[N, 3] y)", CONVOLUTIONS,
        w1=random(1, 6, 4, 3, 3), w2=random(2, 8, 3, 1, 1), w3=random(3, 8, 3),
    )  # fmt: skip
    samples = [{"x": x[None]} for x in random(4, 10, 4, 6, 5)]
    assert_both_ways_equal(model, samples, monkeypatch, 1e-6, batch=4)
    outputs = []
    run = Session.run_in_place
    monkeypatch.setitem(DEVICES, "CPUExecutionProvider", "cpu")
    monkeypatch.setattr(
        Session, "run_in_place", lambda self, feed, names, kept: outputs.append(names) or run(self, feed, names, kept)
    )
    stats = gather(model, samples, batch=4)
    assert any("patches" in key for key in stats.moments)
    # x is an input, and its patches are made of it; of what is inside nothing but sums comes out
    assert outputs == [[SUMS]] * 2


BRANCHES = """m = ReduceMean<keepdims = 0>(x) c = Less(m, zero)
    h = If(c) <then_branch = a () => (float[N, 5] s) { s = MatMul(x, w) },
               else_branch = b () => (float[N, 5] t) { t = Gemm(x, v) }>
    y = MatMul(h, u)"""


def test_what_is_in_branches_comes_out_beside_what_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parsed(
        "(float[N, 6] x) => (float[N, 4] y)", BRANCHES, zero=np.float32(0).reshape(()),
        w=random(1, 6, 5), v=random(2, 6, 5), u=random(3, 5, 4),
    )  # fmt: skip
    samples = [{"x": x[None]} for x in random(4, 30, 6)]
    assert_both_ways_equal(model, samples, monkeypatch, 1e-6, batch=1)


def test_moments_that_are_watched_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_both_ways_equal(scaled(), scales(), monkeypatch, rows="auto")


def test_an_old_model_is_calibrated_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_both_ways_equal(scaled(9), scales(), monkeypatch)

"""Moments gathered through onnxruntime against numpy on whole activations, and the errors on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from models import FORMS, Form, parsed, random, run
from safetensors.numpy import save_file

from onnxlr.api import calibrate
from onnxlr.calibrate import accumulate, mask_of, with_outputs
from onnxlr.config import Config
from onnxlr.data import open_data, split
from onnxlr.errors import DataError, StatsError
from onnxlr.gathered import require_same_model
from onnxlr.gram import Moments, Stats
from onnxlr.probes import probes, site_probes
from onnxlr.probes import weight_moments as moments_of_groups
from onnxlr.rows import Rows
from onnxlr.session import Session
from onnxlr.sites import Inventory, Weight, take_inventory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from onnxlr.config import Objective
    from onnxlr.model_io import Model

    Array = np.ndarray[Any, Any]

CONFIG = Config(threads=1)
CHAIN = """a = MatMul(x, w1) b = Add(a, b1) c = Relu(b) d = Gemm<transB = 1, beta = 0.5>(c, w2, b2) y = MatMul(d, w3)"""
WEIGHTS = {
    "w1": random(1, 6, 8), "b1": random(2, 8), "w2": random(3, 5, 8), "b2": random(4, 5), "w3": random(5, 5, 7),
}  # fmt: skip
X = random(6, 24, 6)
SINGLE = 4 * float(np.finfo(np.float32).eps)
LAST = Rows()


def chain(dtype: str = "float") -> Model:
    # c is given out, so that w1 does not make hidden units for w2 alone
    weights = {name: array.astype(np.float64 if dtype == "double" else np.float32) for name, array in WEIGHTS.items()}
    return parsed(f"({dtype}[N, 6] x) => ({dtype}[N, 7] y, {dtype}[N, 8] c)", CHAIN, **weights)


def gather(model: Model, samples: Sequence[dict[str, Array]], objective: Objective = "output", **options: Any) -> Stats:
    config = replace(CONFIG, objective=objective, **options)
    return accumulate(model, take_inventory(model), samples, Session(model).inputs, config)


def weight_moments(stats: Stats, inventory: Inventory, weight: Weight, objective: Objective) -> Moments:
    (moments,) = moments_of_groups(stats, inventory, weight, objective)
    return moments


def cut(array: Array, name: str = "x") -> list[dict[str, Array]]:
    return [{name: sample[None]} for sample in array]


def direct(rows: Array) -> Moments:
    wide = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
    return Moments(len(wide), wide.sum(0), np.einsum("ni,nj->ij", wide, wide))


def assert_same(left: Moments, right: Moments, tolerance: float | None = None) -> None:
    """Without a tolerance: what sums in float64 and products in float32 leave."""
    assert left.count == right.count
    assert np.linalg.norm(left.total - right.total) <= (tolerance or 1e-12) * np.linalg.norm(right.total)
    assert np.linalg.norm(left.gram - right.gram) <= (tolerance or SINGLE) * np.linalg.norm(right.gram)


@pytest.mark.parametrize("objective", ["output", "utilized"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_moments_of_every_form_are_those_of_its_rows(form: Form, objective: Objective) -> None:
    # without a free leading axis, as on the left, a sample is one whole feed
    stats = gather(form.model, [{"x": form.x}], objective)
    inventory = take_inventory(form.model)
    (weight,) = inventory.weights
    moments = weight_moments(stats, inventory, weight, objective)
    rows = form.x if form.x.ndim == 1 else np.moveaxis(form.x, form.axes[0], -1)
    observed = objective == "output" and not form.opaque
    product = rows.astype(np.float64) @ form.matrix
    # the output comes out of onnxruntime rounded to the precision of its type
    tolerance = {"float16": 4e-3, "float32": 2e-6, "float64": 1e-12}[form.x.dtype.name]
    unrounded = None if form.x.dtype != np.float64 else 1e-12
    assert_same(moments, direct(product if observed else rows), tolerance if observed else unrounded)


def test_each_tensor_is_observed_once_on_the_side_that_the_objective_needs() -> None:
    inventory = take_inventory(chain())
    first, second, third = inventory.weights
    probed = [site_probes(weight, weight.sites[0], "output") for weight in (first, second, third)]
    assert probed == [[("x", LAST)], [("d", LAST)], [("d", LAST)]]
    assert probes(inventory.weights, "output") == [("x", LAST), ("d", LAST)]
    assert probes(inventory.weights, "utilized") == [("x", LAST), ("c", LAST), ("d", LAST)]
    assert probes(inventory.weights, "weight") == []
    stats = gather(chain(), cut(X))
    assert stats.moments.keys() == {"x", "d"}
    assert (stats.samples, stats.holdout_every, stats.model) == (24, CONFIG.holdout_every, chain().fingerprint())


@pytest.mark.parametrize(
    "body",
    ["a = MatMul(x, w1) c = Relu(a) d = MatMul(c, w2) y = MatMul(d, w3)",
     "a = MatMul(x, w1) c = Softmax(a) d = MatMul(c, w2) f = MatMul(c, w4) e = Add(d, f) y = MatMul(e, w3)"],
    ids=["hidden units", "a shared input"],
)  # fmt: skip
def test_an_input_that_others_share_or_that_may_be_narrowed_is_observed(body: str) -> None:
    weights = {"w1": random(1, 6, 8), "w2": random(2, 8, 5), "w4": random(3, 8, 5), "w3": random(4, 5, 7)}
    used = {name: array for name, array in weights.items() if name in body}
    inventory = take_inventory(parsed("(float[N, 6] x) => (float[N, 7] y)", body, **used))
    probed = {weight.name: site_probes(weight, weight.sites[0], "output") for weight in inventory.weights}
    assert all(probed[name] == [("c", LAST)] for name in {"w2", "w4"} & used.keys())
    assert all(weight.observes_output is False for weight in inventory.weights)


def test_activations_inside_the_model_are_those_of_numpy() -> None:
    inventory = take_inventory(chain())
    b = np.maximum(X.astype(np.float64) @ WEIGHTS["w1"] + WEIGHTS["b1"], 0)
    product = b @ WEIGHTS["w2"].T.astype(np.float64)
    stats = gather(chain(), cut(X))
    assert_same(weight_moments(stats, inventory, inventory.weights[0], "output"), direct(X))
    # the Gemm's own 0.5 b2 is taken off where its output is observed, and is there where the next layer reads it
    assert_same(weight_moments(stats, inventory, inventory.weights[1], "output"), direct(product), 1e-5)
    with_bias = direct(product + 0.5 * WEIGHTS["b2"])
    assert_same(weight_moments(stats, inventory, inventory.weights[2], "output"), with_bias, 1e-5)
    assert np.abs(with_bias.mean - direct(product).mean).max() > 0.1


def test_probing_leaves_the_model_alone() -> None:
    model = chain()
    before = model.serialize()
    probed = with_outputs(model, ["x", "d", "y"])
    assert [value.name for value in probed.proto.graph.output] == ["y", "c", "d"]
    assert np.array_equal(run(probed, x=X)["y"], run(model, x=X)["y"])
    assert model.serialize() == before


def tied(inventory: Inventory, stats: Stats, objective: Objective) -> Moments:
    (weight,) = inventory.weights
    return weight_moments(stats, inventory, weight, objective)


def test_moments_of_tied_sites_add_up() -> None:
    w, b, k = random(1, 6, 5), random(2, 5), random(3, 6)
    body = "p = Gemm(x, w, b) q = Gemm<transB = 1, alpha = 1.0>(z, v) y = Add(p, q)"
    model = parsed("(float[N, 6] x, float[N, 6] z) => (float[N, 5] y)", body, w=w, v=w.T.copy(), b=b)
    x, z = X, X[::-1] * 3 + k
    samples = [{"x": x[i : i + 1], "z": z[i : i + 1]} for i in range(len(x))]
    inventory = take_inventory(model)
    both = np.concatenate([x, z]).astype(np.float64)
    assert_same(tied(inventory, gather(model, samples, "utilized"), "utilized"), direct(both))
    # the bias is that of one of the two sites
    assert_same(tied(inventory, gather(model, samples, "output"), "output"), direct(both @ w), 1e-5)


def test_rows_that_tied_sites_share_count_for_each() -> None:
    w = random(1, 6, 8)
    model = parsed("(float[N, 6] x) => (float[N, 8] y)", "p = MatMul(x, w) q = Gemm(x, w) y = Add(p, q)", w=w)
    inventory = take_inventory(model)
    assert len(inventory.weights[0].sites) == 2
    assert_same(tied(inventory, gather(model, cut(X)), "output"), direct(np.concatenate([X, X])))


@pytest.mark.parametrize("batch", [1, 5, 8, 100])
def test_batches_do_not_matter(batch: int) -> None:
    whole = gather(chain(), cut(X), batch=24)
    stats = gather(chain(), cut(X), batch=batch)
    assert (stats.samples, stats.data) == (whole.samples, whole.data)
    assert_same(stats.moments["x"], whole.moments["x"])
    # onnxruntime may sum a product in another order for another batch
    assert_same(stats.moments["d"], whole.moments["d"], 1e-6)


def test_threads_do_not_matter() -> None:
    one, many = (gather(chain(), cut(X), threads=threads) for threads in (1, 5))
    assert list(one.moments) == list(many.moments)
    for key, moments in one.moments.items():
        assert moments.count == many.moments[key].count
        np.testing.assert_array_equal(moments.gram, many.moments[key].gram)


@pytest.mark.parametrize(("dtype", "tolerance"), [("double", 1e-12), ("float", SINGLE)])
def test_shards_merge_to_the_single_pass(tmp_path: Path, dtype: str, tolerance: float) -> None:
    # one row a run in both, so that onnxruntime gives the same activations
    model, x = chain(dtype), X.astype(np.float64 if dtype == "double" else np.float32)
    whole = gather(model, cut(x), "utilized", batch=1)
    merged: Stats | None = None
    for index in range(8):
        path = tmp_path / f"{index}.safetensors"
        gather(model, cut(x[3 * index : 3 * index + 3]), "utilized", batch=1).save(path)
        shard = Stats.load(path)
        merged = shard if merged is None else merged + shard
    assert merged is not None
    assert (merged.samples, len(set(merged.data))) == (24, 8)
    assert merged.moments.keys() == whole.moments.keys() == {"x", "c", "d"}
    for key, moments in merged.moments.items():
        assert_same(moments, whole.moments[key], tolerance)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    stats = gather(chain(), cut(X))
    stats.save(tmp_path / "m.safetensors")
    loaded = Stats.load(tmp_path / "m.safetensors")
    assert replace(loaded, moments={}) == replace(stats, moments={})
    assert loaded.moments.keys() == stats.moments.keys()
    for key, moments in stats.moments.items():
        assert loaded.moments[key].count == moments.count
        assert loaded.moments[key].total.tobytes() == moments.total.tobytes()
        assert loaded.moments[key].gram.tobytes() == moments.gram.tobytes()


MASKED = "(float[N, S, 6] x, int64[N, S] mask) => (float[N, S, 5] y, float[M, 5] z, float[N, 8] u, float[N, S, 5, 2] t)"
MASKED_BODY = """y = MatMul(x, w)  f = Reshape(x, flat)  z = MatMul(f, v)
    p = ReduceSum<keepdims = 0>(x, one)  u = MatMul(p, o)
    g = Unsqueeze(x, last)  h = Concat<axis = 3>(g, g)  i = Transpose<perm = [0, 1, 3, 2]>(h)
    k = MatMul(i, m)  t = Transpose<perm = [0, 1, 3, 2]>(k)"""


def masked() -> Model:
    return parsed(
        MASKED, MASKED_BODY, w=random(1, 6, 5), v=random(2, 6, 5), o=random(3, 6, 8), m=random(4, 6, 5),
        flat=np.array([-1, 6]), one=np.array([1]), last=np.array([3]),
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["output", "utilized"])
def test_padding_does_not_count(objective: Objective) -> None:
    model, lengths = masked(), [7, 3, 5, 1, 6, 4]
    sequences = [random(10 + index, length, 6) for index, length in enumerate(lengths)]
    unpadded = [{"x": x[None], "mask": np.ones((1, len(x)), np.int64)} for x in sequences]
    padded = []
    for index, x in enumerate(sequences):
        # a pooling sum over the padding must not change, so the junk adds up to 0
        junk = 100 * random(index, 7 - len(x), 6)
        junk = junk - junk.mean(0) if len(junk) else junk
        padded.append({"x": np.concatenate([x, junk])[None], "mask": np.array([[1] * len(x) + [0] * len(junk)])})
    expected = gather(model, unpadded, objective, batch=1)
    stats = gather(model, padded, objective, batch=4, mask="mask")
    ignored = gather(model, padded, objective, batch=4)
    tokens = {"output": {"y", "z", "k"}, "utilized": {"x", "f", "i"}}[objective]
    assert stats.moments.keys() == tokens | {"p"}
    for key in tokens:
        rows = 2 * sum(lengths) if key in ("i", "k") else sum(lengths)
        assert stats.moments[key].count == rows
        assert_same(stats.moments[key], expected.moments[key], 1e-6)
        assert np.linalg.norm(ignored.moments[key].gram) > 10 * np.linalg.norm(stats.moments[key].gram)
    assert stats.moments["p"].count == len(lengths)
    assert_same(stats.moments["p"], expected.moments["p"], 1e-4)


def test_rows_lie_on_either_axis() -> None:
    array = random(1, 2, 3, 4)
    mask = np.array([[1, 0, 1], [0, 0, 1]])
    assert np.array_equal(Rows().of(array), array.reshape(6, 4))
    assert np.array_equal(Rows((-2,)).of(array), array.transpose(0, 2, 1).reshape(8, 3))
    assert np.array_equal(Rows().of(array, mask), array.reshape(6, 4)[[0, 2, 5]])
    turned = array.transpose(0, 2, 1)
    assert np.array_equal(Rows((-2,)).of(turned, mask), array.reshape(6, 4)[[0, 2, 5]])
    assert np.array_equal(Rows().of(array[0, 0]), array[0, :1])


def test_a_mask_has_to_be_an_input() -> None:
    feed = {"x": X, "mask": np.ones((24, 1))}
    assert mask_of(feed, None) is None
    assert mask_of(feed, "mask") is feed["mask"]
    with pytest.raises(DataError, match="--mask 'musk' is none of the model's inputs: 'x', 'mask'"):
        mask_of(feed, "musk")
    with pytest.raises(DataError, match="--mask 'musk' is none of the model's inputs: 'x'"):
        gather(chain(), cut(X), mask="musk")


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("objective", "tensor"), [("output", "d"), ("utilized", "c")])
def test_activations_that_are_not_finite_are_named(bad: float, objective: Objective, tensor: str) -> None:
    model = parsed(
        "(float[N, 6] x, float[N, 8] e) => (float[N, 7] y)", CHAIN.replace("Relu(b)", "Mul(b, e)"), **WEIGHTS
    )
    samples = [{"x": x[None], "e": np.ones((1, 8), np.float32)} for x in X]
    gather(model, samples, objective)
    samples[13]["e"][0, 2] = bad
    with pytest.raises(DataError, match=f"tensor '{tensor}' holds NaN or infinite values in the batch from sample 10"):
        gather(model, samples, objective, batch=5)


def test_infinity_in_padding_is_no_harm() -> None:
    model = parsed("(float[N, S, 6] x, int64[N, S] mask) => (float[N, S, 8] y)", "y = MatMul(x, w)", w=random(1, 6, 8))
    x = random(2, 2, 4, 6)
    x[1, 3] = np.inf
    samples = [{"x": a[None], "mask": np.array([m])} for a, m in zip(x, ([1, 1, 1, 1], [1, 1, 1, 0]), strict=True)]
    assert_same(gather(model, samples, mask="mask").moments["x"], direct(x.reshape(-1, 6)[:7]))
    with pytest.raises(DataError, match="tensor 'x'"):
        gather(model, samples)


def test_without_samples_there_are_no_moments() -> None:
    with pytest.raises(DataError, match="no samples to calibrate on"):
        gather(chain(), [])


def test_a_sample_without_a_batch_axis_counts_once() -> None:
    model = parsed(
        "(float[K] s, float[N, 6] x) => (float[N, 8] y)", "p = MatMul(x, w) y = Mul(p, s)", w=random(1, 6, 8)
    )
    seen: list[int] = []
    samples = [{"s": np.ones(1, np.float32), "x": X[:3]}, {"s": np.ones(1, np.float32), "x": X[3:10]}]
    inputs = Session(model).inputs
    stats = accumulate(model, take_inventory(model), samples, inputs, CONFIG, progress=seen.append)
    assert (stats.samples, seen, stats.moments["x"].count) == (2, [1, 1], 10)
    scalar = parsed("(float s, float[N, 6] x) => (float[N, 8] y)", "p = MatMul(x, w) y = Mul(p, s)", w=random(1, 6, 8))
    assert gather(scalar, [{"s": np.float32(1).reshape(()), "x": X}]).samples == 1


def test_progress_counts_samples() -> None:
    seen: list[int] = []
    model = chain()
    accumulate(model, take_inventory(model), cut(X), Session(model).inputs, CONFIG, progress=seen.append)
    assert seen == [8, 8, 8]


def test_fingerprints_tell_data_apart() -> None:
    def digest(samples: Sequence[dict[str, Array]]) -> str:
        (result,) = gather(chain(), samples).data
        return result

    base = digest(cut(X))
    assert digest(cut(X.copy())) == base
    changed = X.copy()
    changed[23, 5] = np.nextafter(changed[23, 5], 9, dtype=np.float32)
    others = [digest(cut(array)) for array in (changed, X[:23], X[::-1], np.concatenate([X, X[:1]]))]
    others.append(digest([{"x": X}]))
    assert len({base, *others}) == 6


def test_a_model_that_differs_is_told_apart() -> None:
    stats, model = gather(chain(), cut(X)), chain()
    assert require_same_model(stats, chain()) is stats
    model.proto.graph.initializer[0].raw_data = (WEIGHTS["w1"] + 1).tobytes()
    with pytest.raises(StatsError, match="gathered on another model: run `onnxlr calibrate` on this one"):
        require_same_model(stats, model)


def test_what_does_not_add_says_why() -> None:
    stats = gather(chain(), cut(X))
    with pytest.raises(StatsError, match="moments of different models do not add: "):
        stats + replace(stats, model="0" * 64)
    with pytest.raises(StatsError, match="moments of different tensors do not add: only one of the files has 'c'"):
        stats + gather(chain(), cut(X), "utilized")
    with pytest.raises(StatsError, match="one sample of 8 and one of 5"):
        stats + gather(chain(), cut(X[1:]), holdout_every=5)
    with pytest.raises(StatsError, match=r"two of the shards are of the same data .* leave one out"):
        (stats + gather(chain(), cut(X[1:]))) + stats


def test_files_that_are_no_moments_say_so(tmp_path: Path) -> None:
    with pytest.raises(StatsError, match=r"absent does not exist: write it with `onnxlr calibrate`"):
        Stats.load(tmp_path / "absent")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(StatsError, match="text cannot be read as a moments file: "):
        Stats.load(tmp_path / "text")
    save_file({"a": np.ones(2)}, tmp_path / "tensors")
    with pytest.raises(StatsError, match=r"tensors is no moments file \(onnxlr-moments/1\)"):
        Stats.load(tmp_path / "tensors")
    gather(chain(), cut(X)).save(tmp_path / "whole")
    (tmp_path / "part").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    with pytest.raises(StatsError, match="part cannot be read as a moments file: "):
        Stats.load(tmp_path / "part")


def test_moments_of_another_objective_are_missed_by_name() -> None:
    stats, inventory = gather(chain(), cut(X)), take_inventory(chain())
    with pytest.raises(
        StatsError,
        match=r"lack tensor 'c', which objective 'utilized' needs at 'd': .*`onnxlr calibrate --objective utilized`",
    ):
        weight_moments(stats, inventory, inventory.weights[1], "utilized")


def test_left_hand_features_have_a_key_of_their_own() -> None:
    model = parsed(
        "(float[6, 6] x) => (float[6, 8] y, float[8, 6] z)",
        "y = MatMul(x, w) z = MatMul(v, x)",
        w=random(1, 6, 8),
        v=random(2, 8, 6),
    )
    stats = gather(model, [{"x": X[:6]}])
    assert stats.moments.keys() == {"x", "x:rows"}
    assert_same(stats.moments["x"], direct(X[:6]))
    assert_same(stats.moments["x:rows"], direct(X[:6].T))


def test_held_out_samples_never_influence_moments() -> None:
    def stats_of(array: Array) -> Stats:
        return calibrate(chain(), {"x": array}, replace(CONFIG, holdout_every=5))

    clean = stats_of(X)
    held_out = np.arange(len(X)) % 5 == 1
    assert clean.samples == np.count_nonzero(~held_out)
    assert_same(clean.moments["x"], direct(X[~held_out]))
    poisoned = X.copy()
    poisoned[held_out] = 1e30
    again = stats_of(poisoned)
    assert again.data == clean.data
    for key, moments in clean.moments.items():
        assert again.moments[key].gram.tobytes() == moments.gram.tobytes()
        assert again.moments[key].total.tobytes() == moments.total.tobytes()
    poisoned[0] = 1e3
    assert stats_of(poisoned).data != clean.data


def test_what_is_held_out_is_what_validation_sees() -> None:
    data = open_data({"x": X}, Session(chain()).inputs)
    calibration, held_out = split(data, 5)
    stats = accumulate(chain(), take_inventory(chain()), calibration, Session(chain()).inputs, CONFIG)
    rest = direct(np.concatenate([sample["x"] for sample in held_out]))
    assert_same(stats.moments["x"] + rest, direct(X))


TIED = "p = MatMul(x, w) q = MatMul(z, w) s = MatMul(z, v) a = Add(p, q) y = Concat<axis = 1>(a, s)"


def test_a_tensor_that_has_settled_takes_no_more_rows_and_the_pass_ends_with_the_last() -> None:
    model = parsed(
        "(float[N, 6] x, float[N, 6] z) => (float[N, 16] y)",
        TIED.replace("MatMul(z, w)", "MatMul(z, u)"),
        **{name: random(i, 6, 8) for i, name in enumerate("wuv")},
    )
    x, z = random(1, 2000, 6), np.repeat(random(2, 250, 6), 8, axis=0)  # batches of eight equal rows
    samples = [{"x": x[i : i + 1], "z": z[i : i + 1]} for i in range(2000)]
    seen: list[int] = []
    config = replace(CONFIG, objective="output", rows="auto")
    stats = accumulate(model, take_inventory(model), samples, Session(model).inputs, config, progress=seen.append)
    counts = {key: moments.count for key, moments in stats.moments.items()}
    assert 48 <= counts["x"] < stats.samples / 4
    assert stats.samples == sum(seen) < 2000
    np.testing.assert_allclose(stats.moments["x"].covariance, np.eye(6), atol=0.6)
    # where a batch is one row eight times, not much more than that one is taken
    assert stats.samples / 8 <= counts["z"] < stats.samples / 2
    np.testing.assert_allclose(stats.moments["z"].covariance, np.cov(z[: stats.samples].T, bias=True), atol=0.2)
    assert stats.data != gather(model, samples).data
    assert {moments.count for moments in gather(model, samples).moments.values()} == {2000}


def test_tensors_whose_moments_are_added_up_settle_together() -> None:
    model = parsed("(float[N, 6] x, float[N, 6] z) => (float[N, 16] y)", TIED, w=random(1, 6, 8), v=random(2, 6, 8))
    x, z = random(1, 2000, 6), np.repeat(random(2, 250, 6), 8, axis=0)
    stats = gather(model, [{"x": x[i : i + 1], "z": z[i : i + 1]} for i in range(2000)], rows="auto")
    assert stats.moments["x"].count == stats.moments["z"].count <= stats.samples < 2000


def test_rows_come_from_all_of_the_data_however_it_is_sorted() -> None:
    x = np.concatenate([random(1, 3000, 6), 5 + random(2, 3000, 6)])
    whole = calibrate(chain(), {"x": x}, replace(CONFIG, objective="output"))
    stats = calibrate(chain(), {"x": x}, replace(CONFIG, objective="output", rows="auto"))
    assert stats.samples < whole.samples / 4
    # the first quarter alone would have a mean of 0 where the whole has 2.5
    np.testing.assert_allclose(stats.moments["x"].mean, whole.moments["x"].mean, rtol=0, atol=1)


def test_what_a_pass_does_not_need_is_not_there_also_in_an_old_model() -> None:
    # before IR version 4 onnxruntime knows of an initializer by the nodes that read it
    body = "a = MatMul(x, w) b = Relu(a) y = MatMul(b, v)"
    weights = {"w": random(1, 6, 8), "v": random(2, 8, 9)}
    listed = ", float[6, 8] w, float[8, 9] v"
    for ir, more in ((3, listed), (3, ""), (8, listed), (8, "")):
        model = parsed(f"(float[N, 6] x{more}) => (float[N, 9] y)", body, ir=8, **weights)
        model.proto.ir_version = ir
        inputs = [spec for spec in Session(model).inputs if spec.name == "x"]
        stats = accumulate(model, take_inventory(model), cut(X), inputs, CONFIG)
        assert stats.moments.keys() == (set() if ir == 8 and more else {"x", "b"})


def test_padding_does_not_enter_the_patches_of_a_convolution_as_long_as_its_input() -> None:
    model = parsed(
        "(float[N, 4, S] x, int64[N, S] mask) => (float[N, 16, S] y)",
        "y = Conv<kernel_shape = [3], pads = [1, 1]>(x, w)",
        w=random(1, 16, 4, 3),
    )
    found = []
    for junk in (0.0, 100.0):
        samples = [{"x": random(seed, 1, 4, 10), "mask": np.array([[1] * 4 + [0] * 6])} for seed in range(9)]
        for sample in samples:
            sample["x"][:, :, 5:] = junk
        stats = calibrate(model, samples, Config(objective="output", mask="mask", threads=1, holdout_every=9))
        found.append(next(iter(stats.moments.values())))
    assert found[0].count == found[1].count == 8 * 4
    np.testing.assert_array_equal(found[0].gram, found[1].gram)

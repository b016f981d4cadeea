"""What groups of weights offer: costs that the rewritten model has, and damages that the rows show."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import parsed, random, relative, run

from onnxlr.choice import ANY_RANK, BadlyConditionedError, Cut, Part, Terms, width_key
from onnxlr.config import Config, Target
from onnxlr.costs import Latency, Macs, Parameters
from onnxlr.forms import MAX_CONDITION
from onnxlr.gain import Gain
from onnxlr.gram import Moments
from onnxlr.groups import Chained, decompose, group
from onnxlr.importance import factors, measure_alone
from onnxlr.layer import Layer
from onnxlr.offers import Shared, Single
from onnxlr.plan import Option, joined, lower_hull
from onnxlr.rewrite import rewrite
from onnxlr.session import Session
from onnxlr.sites import parameter_count, take_inventory
from onnxlr.targets import Chooser, Planner
from onnxlr.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from onnxlr.choice import Choice
    from onnxlr.config import Form, Objective
    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory

    Array = np.ndarray[Any, Any]

ROWS = random(0, 300, 12, dtype=np.float64) @ (random(1, 12, 12, dtype=np.float64) * 0.8 ** np.arange(12)) + 0.3
SETTINGS: dict[str, Any] = {"rank_multiple": 2, "margin": 0.95, "rounds": 0, "threads": 1}

WIDE = {"w1": random(2, 12, 16), "wu": random(3, 12, 16), "w2": random(4, 16, 10), "b1": random(5, 16),
        "c": random(6, 16), "b2": random(7, 10)}  # fmt: skip
BODIES = {
    "alone": "y = MatMul(x, w)",
    "alone with bias": "y = Gemm(x, w, b)",
    "two sites": "a = MatMul(x, tied) t = Tanh(a) y = MatMul(t, tied)",
    "three": "q = MatMul(x, wq) k = MatMul(x, wk) pv = MatMul(x, wv) v = Add(pv, b) s = Concat<axis = -1>(q, k, v) "
             "y = Softmax(s)",
    "chain": "p = MatMul(x, w1) s = Add(p, b1) h = PRelu(s, c) y = MatMul(h, w2)",
    "chain of gemms": "s = Gemm(x, w1, b1) h = Relu(s) y = Gemm(h, w2, b2)",
    "gate": "g = MatMul(x, w1) u = MatMul(x, wu) a = Sigmoid(g) h = Mul(a, u) q = MatMul(h, w2) y = Add(q, b2)",
}  # fmt: skip
SINGLES = {"w": random(8, 12, 10), "b": random(9, 10), "tied": random(10, 12, 12), "wq": random(11, 12, 8),
           "wk": random(12, 12, 8), "wv": random(13, 12, 10)}  # fmt: skip


@lru_cache
def model_of(name: str) -> Model:
    words = BODIES[name].replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {key: array for key, array in (WIDE | SINGLES).items() if key in words}
    outputs = {"two sites": 12, "three": 26}.get(name, 10)
    return parsed(f"(float[N, 12] x) => (float[N, {outputs}] y)", BODIES[name], **used)


@lru_cache
def inventory_of(name: str) -> Inventory:
    return take_inventory(model_of(name))


@lru_cache
def observed(name: str) -> Mapping[str, Array]:
    """The rows that every weight reads, from the model itself."""
    model, inventory = model_of(name), inventory_of(name)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    inputs = {site.input for weight in inventory.weights for site in weight.sites} - {"x"}
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(tensor, 1, None) for tensor in sorted(inputs))
    x = ROWS.astype(np.float32)
    seen = {**run(replace(model, proto=proto), x=x), "x": x}
    return {w.name: np.concatenate([seen[s.input] for s in w.sites]).astype(np.float64) for w in inventory.weights}


def parts_of(name: str, objective: Objective = "output") -> list[Part]:
    inventory = inventory_of(name)
    parts = []
    for number, weight in enumerate(inventory.weights):
        matrix = inventory.matrix(weight)
        if objective == "weight":
            parts.append(Part(weight, Layer(matrix)))
            continue
        gradients = random(20 + number, 60, weight.d_out, dtype=np.float64) * np.logspace(0, -1, weight.d_out)
        gain = Gain.of(Moments.of(gradients)) if objective == "fisher" else None
        parts.append(Part(weight, Layer(matrix, Moments.of(observed(name)[weight.name]), gain=gain)))
    return parts


def ones(parts: Sequence[Part]) -> dict[str, float]:
    """Damages as they are."""
    return {key: 1.0 for part in parts for key in (part.name, width_key(part.name))}


def offers(
    name: str,
    objective: Objective = "output",
    forms: Sequence[Form] = ("pair", "block", "shared", "width"),
    **more: Any,
) -> tuple[list[Part], list[Option[Choice]]]:
    """Of all groups of the model, every importance 1."""
    config = Config(objective=objective, forms=frozenset(forms), **{**SETTINGS, **more})
    inventory, parts = inventory_of(name), parts_of(name, objective)
    terms = Terms(config, Parameters(inventory), ones(parts))
    return parts, [option for one in group(parts, inventory, config) for option in one.options(terms)]


@pytest.mark.parametrize("objective", ["weight", "output", "fisher"])
@pytest.mark.parametrize("name", BODIES)
def test_what_is_decomposed_ahead_is_what_would_be_when_it_is_needed(name: str, objective: Objective) -> None:
    config = Config(objective=objective, **SETTINGS | {"threads": 3})
    inventory, seen = inventory_of(name), []
    found = []
    for ahead in (False, True):
        parts = parts_of(name, objective)
        groups = group(parts, inventory, config)
        if ahead:
            decompose(groups, config, seen.append)
            assert all("decomposition" in vars(part) for part in parts)
        terms = Terms(config, Parameters(inventory), ones(parts))
        found.append([(o.cost, o.damage, o.choice.cuts) for one in groups for o in one.options(terms)])
    assert sum(seen) == len(parts)
    assert [(cost, cuts) for cost, _, cuts in found[0]] == [(cost, cuts) for cost, _, cuts in found[1]]
    np.testing.assert_allclose(*([damage for _, damage, _ in own] for own in found), rtol=1e-9, atol=1e-12)


def test_where_memory_is_scarce_nothing_is_decomposed_ahead() -> None:
    config, parts, seen = Config(memory=10**6, **SETTINGS), parts_of("three"), []
    decompose(group(parts, inventory_of("three"), config), config, seen.append)
    assert seen == []
    assert not any("decomposition" in vars(part) for part in parts)


@pytest.mark.parametrize("objective", ["weight", "output"])
@pytest.mark.parametrize("name", BODIES)
def test_an_option_costs_what_the_rewritten_model_stores(name: str, objective: Objective) -> None:
    inventory = inventory_of(name)
    before = parameter_count(inventory.model)
    # a pair is offered in a group only where no block is better at its cost
    parts, options = offers(name, objective)
    options += offers(name, objective, ("pair", "shared", "width"))[1]
    assert len(options) > 5
    seen = set()
    for option in options:
        stored = option.choice.store(True)
        assert stored.keys() == {name for name, cut in option.choice.cuts.items() if cut != Cut()}
        model = rewrite(inventory, stored)
        onnx.checker.check_model(model.proto, full_check=True)
        promised = option.cost - sum(part.weight.parameters for part in parts if part.name in option.choice.cuts)
        saved_vectors = 0
        for part in parts:
            cut = option.choice.cuts.get(part.name)
            if cut is not None and cut.width is not None and part.name != "w2":
                # what acts on hidden units that are gone; new corrections of them are counted as if they were there
                gone = 16 - cut.width
                bias = part.weight.sites[0].bias is not None
                saved_vectors += gone * (bias or (objective == "output" and cut.rank is not None))
                saved_vectors += gone * (name == "chain")
            if cut is not None:
                seen.add(cut.form + " shared" * cut.shared + " narrowed" * (cut.width is not None))
        assert parameter_count(model) - before == promised - saved_vectors
    expected = {"dense", "pair", "block"}
    expected |= {"pair shared", "block shared"} if name == "three" else set()
    expected |= {"dense narrowed", "pair narrowed", "block narrowed"} if name in ("chain", "chain of gemms") else set()
    expected |= {"dense narrowed", "pair shared narrowed"} if name == "gate" else set()
    assert expected <= seen


@pytest.mark.parametrize("name", BODIES)
def test_multiply_accumulates_are_the_elements_of_the_matrices(name: str) -> None:
    shapes = {value: (1, width) for value, width in (("x", 12), ("h", 16), ("t", 12))}
    outputs = {"q": 10 if name == "gate" else 8, "k": 8, "pv": 10, "p": 16, "s": 16, "g": 16, "u": 16, "a": 12}
    outputs["y"] = 12 if name == "two sites" else 10
    shapes |= {value: (1, width) for value, width in outputs.items()}
    inventory = take_inventory(model_of(name), shapes)
    config = Config(objective="output", **SETTINGS)
    parts = [replace(part, weight=weight) for part, weight in zip(parts_of(name), inventory.weights, strict=True)]
    terms = Terms(config, Macs(inventory), ones(parts))
    for one in group(parts, inventory, config):
        for option in one.options(terms):
            model = rewrite(inventory, option.choice.store(True))
            tensors = {tensor.name: math.prod(tensor.dims) for tensor in model.proto.graph.initializer}
            multiplied = [tensors[i] for node in model.proto.graph.node if node.op_type in ("MatMul", "Gemm")
                          for i in node.input[:2] if i in tensors]  # fmt: skip
            others = sum(w.macs or 0 for w in inventory.weights if w.name not in option.choice.cuts)
            assert option.cost == pytest.approx(sum(multiplied) - others, rel=1e-12)


class Clockwork:
    """Stands in for measured times: any that are not proportional to the work."""

    def measure(self, products: Iterable[tuple[int, int, int]]) -> None:
        pass

    def product(self, rows: int, d_in: int, d_out: int) -> float:
        return 1.0 + rows * (0.5 * d_in + 0.25 * d_out + d_in * d_out)

    def moved(self, rows: int, features: int) -> float:
        return 0.125 * rows * features


@pytest.mark.parametrize("name", BODIES)
def test_latency_is_the_sum_over_the_operators_of_the_rewritten_model(name: str) -> None:
    shapes = {value: (1, width) for value, width in (("x", 12), ("h", 16), ("t", 12))}
    outputs = {"q": 10 if name == "gate" else 8, "k": 8, "pv": 10, "p": 16, "s": 16, "g": 16, "u": 16, "a": 12}
    outputs["y"] = 12 if name == "two sites" else 10
    shapes |= {value: (1, width) for value, width in outputs.items()}
    inventory = take_inventory(model_of(name), shapes)
    parts = [replace(part, weight=weight) for part, weight in zip(parts_of(name), inventory.weights, strict=True)]
    clockwork: Any = Clockwork()
    costs = Latency(inventory, clockwork, 3, 1e6)
    terms = Terms(Config(objective="output", **SETTINGS), costs, ones(parts))
    # the rows of two sites are multiplied one after the other, and timed as if at once
    rows, ends = (6, 2) if name == "two sites" else (3, 1)
    seen = set()
    for one in group(parts, inventory, terms.config):
        for option in one.options(terms):
            model = rewrite(inventory, option.choice.store(True))
            inferred = onnx.shape_inference.infer_shapes(model.proto, strict_mode=True).graph
            values = (*inferred.value_info, *inferred.output, *inferred.input)
            widths = {v.name: v.type.tensor_type.shape.dim[-1].dim_value for v in values}
            tensors = {tensor.name: tuple(tensor.dims) for tensor in model.proto.graph.initializer}
            time = 0.0
            for node in model.proto.graph.node:
                if node.op_type in ("MatMul", "Gemm"):
                    (weight,) = (tensors[i] for i in node.input[:2] if i in tensors)
                    time += clockwork.product(rows, *weight) / ends
                elif node.op_type == "Split" or node.name.endswith("/concat"):
                    time += (
                        clockwork.moved(rows, widths[(node.input if node.op_type == "Split" else node.output)[0]])
                        / ends
                    )
                    seen.add(node.op_type)
            others = sum(costs.dense(w) for w in inventory.weights if w.name not in option.choice.cuts)
            assert option.cost == pytest.approx(time - others, rel=1e-12)
    assert seen


def weighed(part: Part, error: Array) -> float:
    root = np.eye(part.layer.d_out) if part.layer.gain is None else part.layer.gain.root
    return float(np.mean(np.sum((error @ root) ** 2, axis=1)))


@pytest.mark.parametrize("objective", ["weight", "output", "fisher"])
@pytest.mark.parametrize("name", [name for name in BODIES if not name.startswith(("chain", "gate"))])
def test_the_damage_is_what_the_rows_show(name: str, objective: Objective) -> None:
    parts, options = offers(name, objective)
    for option in options:
        stored = option.choice.store(True)
        real, total = 0.0, 0.0
        for part in parts:
            if part.name not in option.choice.cuts:
                continue
            rows, matrix = observed(name)[part.name], part.layer.matrix
            rows = np.eye(part.layer.d_in) * math.sqrt(part.layer.d_in) if objective == "weight" else rows
            total += part.decomposition.total
            if part.name in stored:
                factors = stored[part.name].factors(*matrix.shape)
                error = rows @ (matrix - factors.first @ factors.second)
                real += weighed(part, error - (0.0 if factors.bias is None else factors.bias))
        assert option.damage == pytest.approx(real, rel=1e-4, abs=1e-5 * total)
        assert option.damage == pytest.approx(sum(option.choice.damages.values()), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("objective", ["output", "fisher"])
@pytest.mark.parametrize("name", ["chain", "chain of gemms", "gate"])
def test_the_damage_of_a_narrowed_layer_is_what_the_rows_show(name: str, objective: Objective) -> None:
    parts, options = offers(name, objective)
    consumer = parts[-1]
    rows = observed(name)["w2"]
    widths = set()
    for option in options:
        stored = option.choice.store(True)
        if "w2" not in stored:
            continue
        cut = option.choice.cuts["w2"]
        widths.add(cut.width)
        factors = stored["w2"].factors(16, 10)
        error = rows @ (consumer.layer.matrix - factors.first @ factors.second) - factors.bias
        real = weighed(consumer, error)
        # the ridge of the covariance counts too, and what it adds is at most this
        ridge = 1e-3 * consumer.decomposition.total
        assert real * (1 - 1e-6) - 1e-5 * consumer.decomposition.total <= option.choice.damages["w2"] <= real + ridge
        if cut.width is not None:
            kept = stored["w2"].inputs
            assert kept is not None
            assert len(kept) == cut.width
            assert all(np.array_equal(kept, s.outputs) for n, s in stored.items() if n != "w2")
    assert widths == {None, *range(2, 16, 2)}


@pytest.mark.parametrize("objective", ["weight", "output"])
@pytest.mark.parametrize("name", ["chain", "chain of gemms", "gate", "three"])
def test_a_trial_of_an_option_errs_as_the_rewritten_model(name: str, objective: Objective) -> None:
    inventory, config = inventory_of(name), Config(objective=objective, **SETTINGS)
    parts, options = offers(name, objective)
    inputs = Session(inventory.model, threads=1).inputs
    trial = Trial(inventory, inventory.weights, inputs, config, corrected=config.corrects_bias)
    x = ROWS[:64].astype(np.float32)
    probed = trial.observe([{"x": row[None]} for row in x])
    dense = run(inventory.model, x=x)["y"]
    for option in options[:: max(1, len(options) // 25)]:
        tried = trial.error(factors(parts, option.choice.store(False)), probed)
        found = run(rewrite(inventory, option.choice.store(True)), x=x)["y"]
        assert tried == pytest.approx(relative(dense, found), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["chain", "gate"])
def test_dropping_units_has_an_importance_of_its_own(name: str) -> None:
    inventory, config = inventory_of(name), Config(objective="output", **SETTINGS)
    parts = parts_of(name)
    (one,) = group(parts, inventory, config)
    assert isinstance(one, Chained)
    trial = Trial(inventory, inventory.weights, Session(inventory.model, threads=1).inputs, config, corrected=True)
    x = ROWS[:64].astype(np.float32)
    probed = trial.observe([{"x": row[None]} for row in x])
    done: list[int] = []
    importance = measure_alone([one], trial, probed, config, done.append)
    assert importance.keys() == {*(part.name for part in parts), width_key("w2")}
    assert sum(done) == len(parts)
    dense = run(inventory.model, x=x)["y"]
    width = one.elimination.widths[len(one.elimination.widths) // 2]
    narrowed = run(rewrite(inventory, one.store_narrowed(width)), x=x)["y"]
    expected = relative(dense, narrowed) ** 2 / one.elimination.damage(width)
    assert importance[width_key("w2")] == pytest.approx(expected, rel=1e-3)
    # and the options of that width alone are weighed by it
    options = one.options(Terms(config, Parameters(inventory), {width_key("w2"): 5.0}))
    lost = {o.choice.cuts["w2"].width: o.damage for o in options}
    assert lost[width] == pytest.approx(5.0 * one.elimination.damage(width))
    assert lost[None] == 0


def test_a_chain_computes_what_its_parts_say() -> None:
    # no activation in between: the narrowed model's error is that of the narrowed product
    body = {"w1": random(2, 12, 16), "w2": random(4, 16, 10)}
    model = parsed("(float[N, 12] x) => (float[N, 10] y)", "h = MatMul(x, w1) y = MatMul(h, w2)", **body)
    inventory = take_inventory(model)
    rows = {"w1": ROWS, "w2": ROWS @ body["w1"]}
    parts = [Part(w, Layer(inventory.matrix(w), Moments.of(rows[w.name]))) for w in inventory.weights]
    config = Config(objective="output", **SETTINGS)
    terms = Terms(config, Parameters(inventory), ones(parts))
    dense = ROWS @ body["w1"] @ body["w2"]
    x = ROWS.astype(np.float32)
    tried = 0
    for option in Chained(parts[:1], parts[1], config).options(terms):
        if option.choice.cuts["w1"].rank is None:
            found = run(rewrite(inventory, option.choice.store(True)), x=x)["y"]
            real = float(np.mean(np.sum((found - dense) ** 2, axis=1)))
            total = parts[1].decomposition.total
            assert real == pytest.approx(option.damage, rel=1e-2, abs=2e-4 * total)
            tried += 1
    assert tried > 7
    # 12 numbers go in, so four of the sixteen units say nothing new
    best = min(o.damage for o in Chained(parts[:1], parts[1], config).options(terms) if o.choice.cuts["w2"].width == 12)
    assert best < 1e-3 * parts[1].decomposition.total


@pytest.mark.parametrize("objective", ["output", "fisher"])
def test_a_shared_first_factor_is_the_best_of_all(objective: Objective) -> None:
    parts, options = offers("three", objective, ("pair", "shared"))
    rng = np.random.default_rng(0)
    centred = ROWS - ROWS.mean(0)

    def least(first: Array) -> float:
        """The damage with this first factor and the best second ones."""
        hidden = centred @ first
        lost = [centred @ p.layer.matrix - hidden @ np.linalg.lstsq(hidden, centred @ p.layer.matrix)[0] for p in parts]
        return sum(weighed(part, error) for part, error in zip(parts, lost, strict=True))

    total = sum(part.decomposition.total for part in parts)
    together = [option for option in options if all(cut.shared for cut in option.choice.cuts.values())]
    assert [option.choice.cuts["wq"].rank for option in together] == [2, 4, 6]
    for option in together:
        rank = option.choice.cuts["wq"].rank
        assert rank is not None
        own = [part.decomposition.cut(min(rank, part.layer.d_out)).first for part in parts]
        others = [*own, *(rng.standard_normal((12, rank)) for _ in range(20))]
        others += [np.linalg.svd(np.hstack([part.layer.matrix for part in parts]))[0][:, :rank]]
        others += [np.linalg.svd(np.hstack(own))[0][:, :rank]]
        shared = option.choice.store(False)["wq"].first
        assert shared is not None
        assert option.damage == pytest.approx(least(shared), rel=1e-4, abs=1e-5 * total)
        assert all(option.damage <= least(first) + 1e-5 * total for first in others)
        # and never better than each with one of its own
        assert option.damage >= sum(part.decomposition.damage(rank) for part in parts) - 1e-5 * total


def test_importances_weigh_what_is_shared() -> None:
    inventory, parts, config = inventory_of("three"), parts_of("three"), Config(objective="output", **SETTINGS)
    costs = Parameters(inventory)

    def lost(importance: Mapping[str, float]) -> dict[str, float]:
        options = Shared(parts).options(Terms(config, costs, importance))
        (choice,) = (o.choice for o in options if set(o.choice.cuts.values()) == {Cut("pair", 4, shared=True)})
        stored, result = choice.store(True), {}
        for part in parts:
            factors = stored[part.name].factors(*part.layer.matrix.shape)
            result[part.name] = weighed(
                part, ROWS @ (part.layer.matrix - factors.first @ factors.second) - factors.bias
            )
        predicted = sum(importance.get(name, 0.0) * error for name, error in result.items())
        assert sum(choice.damages.values()) == pytest.approx(predicted, rel=1e-3)
        return result

    even, first = lost({"wq": 1.0, "wk": 1.0, "wv": 1.0}), lost({"wq": 100.0, "wk": 1.0, "wv": 0.01})
    best = parts[0].decomposition.damage(4)
    assert best * 0.999 < first["wq"] < 1.05 * best < even["wq"]
    assert first["wv"] > even["wv"]
    # a weight that does not count at all has a first factor too
    assert lost({"wq": 1.0})["wq"] < first["wq"] * 1.01
    for importance in ({}, {"wq": math.inf, "wk": 1.0}):
        options = Shared(parts).options(Terms(config, costs, importance))
        assert not any(cut.shared for option in options for cut in option.choice.cuts.values())


@pytest.mark.parametrize(
    "forms", [(), ("pair",), ("block",), ("shared",), ("width",), ("pair", "width"), ("block", "shared")]
)
def test_only_what_is_asked_for_is_offered(forms: tuple[Form, ...]) -> None:
    for name in ("three", "gate", "alone"):
        _, options = offers(name, forms=forms)
        cuts = {cut for option in options for cut in option.choice.cuts.values()}
        assert Cut() in cuts
        assert {cut.form for cut in cuts} <= {"dense", *forms}
        assert all(cut.width is None for cut in cuts) or "width" in forms
        assert not any(cut.shared for cut in cuts) or "shared" in forms
        if name == "alone":
            assert {cut.form for cut in cuts} == {"dense", *(form for form in forms if form in ("pair", "block"))}
        if name == "gate" and "width" in forms:
            assert any(cut.width is not None for cut in cuts)


def test_a_demanded_rank_keeps_a_weight_to_itself() -> None:
    for name, fixed in (("three", "wk"), ("gate", "w1"), ("chain", "w2")):
        inventory, config = inventory_of(name), Config(objective="output", **SETTINGS)
        parts = [replace(part, fixed=3) if part.name == fixed else part for part in parts_of(name)]
        groups = group(parts, inventory, config)
        assert sorted(part.name for one in groups for part in one.parts) == sorted(part.name for part in parts)
        (own,) = (one for one in groups if any(part.name == fixed for part in one.parts))
        terms = Terms(config, Parameters(inventory), {})
        assert [option.choice.cuts for option in own.options(terms)] == [{fixed: Cut("pair", 3)}]
        assert not any(isinstance(one, Chained) for one in groups)


def singular(dtype: type = np.float32) -> Model:
    """A weight of rank 4 whose outputs 0 and 1, and 10 and 11, are alike: no window of two or more is regular."""
    w = random(1, 14, 4) @ random(2, 4, 12)
    w[:, 1], w[:, 10] = w[:, 0], w[:, 11]
    kind = {np.float32: "float", np.float64: "double"}[dtype]
    return parsed(f"({kind}[N, 14] x) => ({kind}[N, 12] y)", "y = MatMul(x, w)", w=w.astype(dtype))


class Errors:
    """Stands in for a trial: errors by energy."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = {part.name: part for part in parts}

    def error(self, factors: Mapping[str, Any], observed: object) -> float:
        lost = [
            np.sum((self.parts[name].layer.matrix - pair.first @ pair.second) ** 2) for name, pair in factors.items()
        ]
        return float(np.sqrt(sum(lost)) / 100)


@pytest.mark.parametrize("floor", [0.0, 0.3, 0.5, 0.9])
def test_nothing_is_offered_below_the_floor(floor: float) -> None:
    weights = {"w": random(1, 16, 32), "v": random(2, 32, 16)}
    model = parsed("(float[N, 16] x) => (float[N, 16] y)", "h = MatMul(x, w) t = Relu(h) y = MatMul(t, v)", **weights)
    inventory = take_inventory(model)
    config = Config(objective="weight", floor=floor, **SETTINGS)
    parts = [Part(weight, Layer(inventory.matrix(weight))) for weight in inventory.weights]
    (chain,) = group(parts, inventory, config)
    terms = Terms(config, Parameters(inventory), dict.fromkeys(["w", "v", width_key("v")], 1.0))
    cuts = [cut for option in chain.options(terms) for cut in option.choice.cuts.values()]
    kept = [cut.width for cut in cuts if cut.width is not None]
    assert all(width >= floor * 32 for width in kept)
    assert all(cut.rank >= floor * min(16, cut.width or 32) for cut in cuts if cut.rank is not None)
    # and the lowest that it allows is there
    assert min(kept) == math.ceil(max(floor * 32, 1) / config.rank_multiple) * config.rank_multiple


def test_a_block_that_would_amplify_rounding_is_refused() -> None:
    inventory = take_inventory(singular())
    part = Part(inventory.weights[0], Layer(inventory.matrix(inventory.weights[0])))
    config = Config(objective="weight", **SETTINGS)
    terms = Terms(config, Parameters(inventory), {"w": 1.0})
    options = [option for option in Single(part).options(terms) if option.choice.cuts["w"].form == "block"]
    assert options
    for option in options:
        # until it is final, the block is a pair: the product is the same
        (pair,) = option.choice.store(False).values()
        assert pair.window is None
        with pytest.raises(BadlyConditionedError, match="w") as refused:
            option.choice.store(True)
        rank = option.choice.cuts["w"].rank
        assert refused.value.blocks == {("w", None, rank)}
        left = Single(part).options(replace(terms, no_blocks=refused.value.blocks))
        assert {o.choice.cuts["w"] for o in options} - {o.choice.cuts["w"] for o in left} == {Cut("block", rank)}
    left = Single(part).options(replace(terms, no_blocks=frozenset({("w", None, ANY_RANK)})))
    assert {option.choice.cuts["w"].form for option in left} == {"dense", "pair"}


@pytest.mark.parametrize("share", [0.5, 0.7, 0.8])
def test_a_plan_does_without_blocks_that_are_badly_conditioned(share: float) -> None:
    inventory = take_inventory(singular())
    parts = [Part(weight, Layer(inventory.matrix(weight))) for weight in inventory.weights]
    trial: Any = Errors(parts)
    plans = {}
    for forms in (("pair", "block"), ("pair",)):
        config = Config(
            objective="weight", forms=frozenset(forms), target=Target("keep_params", share), **SETTINGS
        )  # fmt: skip
        groups = group(parts, inventory, config)
        chooser = Chooser(groups, trial, [], [], Parameters(inventory), config, lambda *_: None)
        plans[forms] = chooser.plan(share)
    first, second = plans.values()
    assert first.cuts == second.cuts
    assert first.cuts["w"].form == "pair"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_the_limit_follows_the_precision(dtype: str) -> None:
    inventory = take_inventory(parsed("(float[N, 8] x) => (float[N, 8] y)", "y = MatMul(x, w)", w=random(1, 8, 8)))
    config = Config(objective="weight", **{**SETTINGS, "rank_multiple": 4})
    terms = Terms(config, Parameters(inventory), {"w": 1.0})
    (weight,) = inventory.weights
    for factor, fine in ((0.9, True), (1.1, False)):
        # balanced factors take the roots of the singular values, so both windows of B are diagonal with this condition
        square = np.diag(np.geomspace(1, (factor * MAX_CONDITION[dtype]) ** -2.0, 4))
        columns = np.linalg.qr(random(1, 8, 4, dtype=np.float64))[0]
        part = Part(replace(weight, dtype=dtype), Layer(columns @ np.hstack([square, square])))
        (option,) = (o for o in Single(part).options(terms) if o.choice.cuts["w"] == Cut("block", 4))
        if fine:
            assert option.choice.store(True)["w"].window is not None
        else:
            with pytest.raises(BadlyConditionedError):
                option.choice.store(True)


def test_half_precision_survives_its_blocks() -> None:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((32, 24)) @ np.diag(0.9 ** np.arange(24))).astype(np.float16)
    model = parsed("(float16[N, 32] x) => (float16[N, 24] y)", "y = MatMul(x, w)", w=w)
    inventory = take_inventory(model)
    x = rng.standard_normal((50, 32)).astype(np.float16)
    part = Part(inventory.weights[0], Layer(inventory.matrix(inventory.weights[0])))
    terms = Terms(Config(objective="weight", **SETTINGS), Parameters(inventory), {"w": 1.0})
    made = 0
    for option in Single(part).options(terms):
        if option.choice.cuts["w"].form != "block":
            continue
        try:
            stored = option.choice.store(True)
        except BadlyConditionedError:
            continue
        factors = stored["w"].factors(32, 24)
        exact = x.astype(np.float64) @ factors.first @ factors.second
        assert relative(exact, run(rewrite(inventory, stored), x=x)["y"]) < 30 * 2.0**-11
        made += 1
    assert made > 2


option_lists = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=1, max_size=6).map(
    lambda pairs: [Option(number, cost, damage) for number, (cost, damage) in enumerate(pairs)]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lists=st.lists(option_lists, min_size=1, max_size=3))
def test_joined_options_are_the_hull_of_all_sums(lists: list[list[Option[int]]]) -> None:
    every = [
        Option(None, sum(o.cost for o in chosen), sum(o.damage for o in chosen)) for chosen in itertools.product(*lists)
    ]
    expected = lower_hull(every)
    found = joined(lists)
    for option in found:
        chosen = [options[index] for options, index in zip(lists, option.choice, strict=True)]
        assert (sum(o.cost for o in chosen), sum(o.damage for o in chosen)) == (option.cost, option.damage)
    # both walk along the hull, and all its corners are there
    assert [o.cost for o in found] == sorted(o.cost for o in found)
    corners = [
        b for a, b, c in zip(expected, expected[1:], expected[2:], strict=False)
        if (b.damage - a.damage) * (c.cost - b.cost) != (c.damage - b.damage) * (b.cost - a.cost)
    ]  # fmt: skip
    points = {(o.cost, o.damage) for o in found}
    assert {(o.cost, o.damage) for o in (expected[0], *corners, expected[-1])} <= points
    for option in found:
        below = [o for o in expected if o.cost <= option.cost][-1]
        above = next((o for o in expected if o.cost >= option.cost), below)
        if above.cost > below.cost:
            chord = below.damage * (above.cost - option.cost) + above.damage * (option.cost - below.cost)
            assert option.damage * (above.cost - below.cost) == chord
        else:
            assert option.damage == below.damage


def reachable(options: list[Option[Choice]]) -> list[Option[Choice]]:
    """The options, and whatever steps lead to from them."""
    found: dict[tuple[float, float], Option[Choice]] = {}
    pending = list(options)
    while pending:
        option = pending.pop()
        if (option.cost, option.damage) not in found:
            found[option.cost, option.damage] = option
            pending += option.steps(math.inf)
    return list(found.values())


@pytest.mark.parametrize("name", ["chain", "three", "two chains"])
@pytest.mark.parametrize("share", [0.55, 0.7, 0.85])
def test_allocation_over_groups_is_nearly_the_best_of_all(name: str, share: float) -> None:
    config = Config(objective="output", **{**SETTINGS, "rank_multiple": 4})
    if name == "two chains":
        body = """p = MatMul(x, w1) h = Relu(p) q = MatMul(h, w2) t = Softmax(q) r = MatMul(t, w3) k = Relu(r)
        y = MatMul(k, w4)"""
        weights = {"w1": random(1, 12, 16), "w2": random(2, 16, 10), "w3": random(3, 10, 16), "w4": random(4, 16, 10)}
        inventory = take_inventory(parsed("(float[N, 12] x) => (float[N, 10] y)", body, **weights))
        parts = [
            Part(w, Layer(inventory.matrix(w), Moments.of(random(30 + i, 200, w.d_in) * 0.8 ** np.arange(w.d_in))))
            for i, w in enumerate(inventory.weights)
        ]
    else:
        inventory, parts = inventory_of(name), parts_of(name)
    importance = {part.name: 1 / part.decomposition.total for part in parts}
    importance |= {width_key(name): value for name, value in importance.items()}
    terms = Terms(config, Parameters(inventory), importance)
    groups = group(parts, inventory, config)
    offered = [reachable(one.options(terms)) for one in groups]
    assert len(groups) == (2 if name == "two chains" else 1)
    planner = Planner(groups, terms)
    budget = share * planner.whole
    choice = planner.fits(budget)
    assert choice.cost <= budget
    rest = planner.whole - sum(part.weight.parameters for part in parts)
    best = min(
        sum(o.damage for o in chosen)
        for chosen in itertools.product(*offered)
        if rest + sum(o.cost for o in chosen) <= budget
    )
    steps = [a.damage - b.damage for one in groups for a, b in itertools.pairwise(lower_hull(one.options(terms)))]
    found = sum(choice.damages.values())
    assert best * (1 - 1e-9) <= found <= best + max(steps)
    stored = rewrite(inventory, choice.store(True))
    assert parameter_count(stored) <= budget

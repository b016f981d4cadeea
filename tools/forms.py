"""Objectives, allocations and forms side by side, at equal parameters, on data that calibration never saw.

    python tools/forms.py fashion
    python tools/forms.py minilm --folder minilm [--scatter samples/fashion_vit/predicted.svg]

Every cell compresses the model to a share of the parameters of its linear layers and prints the relative error of the
outputs and, in parentheses, top-1 (fashion: 1,000 labelled images) or the mean cosine of sentence embeddings (minilm,
made by tools/minilm.py: 192 English sentences). Forms: plain pairs; pairs with a shared first factor; pairs and
identity blocks; pairs and fewer hidden units; all of these. Objective "utilized" is arXiv 2407.04797 at a fixed rank:
it has no least squares to share a factor or narrow a layer by. `--scatter` draws the error that was predicted beside
the one that was measured, for the global cells. Needs torch.
"""

from __future__ import annotations

import argparse
import dataclasses
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from minilm import sentence_embeddings

import onnxlr
from onnxlr.case import prepare
from onnxlr.choice import Choice, Terms
from onnxlr.costs import Parameters
from onnxlr.data import batches, open_data, spread
from onnxlr.gathered import gather
from onnxlr.groups import group
from onnxlr.importance import factors, measure_again, measure_alone
from onnxlr.metrics import relative_error
from onnxlr.parts import parts_of
from onnxlr.rewrite import rewrite
from onnxlr.search import IMPORTANCE_SAMPLES
from onnxlr.session import Session
from onnxlr.targets import Planner, well_conditioned
from onnxlr.trial import Trial
from onnxlr.validate import compare

SAMPLE = Path(__file__).parent.parent / "samples" / "fashion_vit"
FORMS = {
    "pair": frozenset({"pair"}),
    "shared": frozenset({"pair", "shared"}),
    "block": frozenset({"pair", "block"}),
    "width": frozenset({"pair", "width"}),
    "all": frozenset({"pair", "shared", "block", "width"}),
}
COLOURS = {"weight": "#b0b0b0", "utilized": "#e08a2e", "output": "#1f6fb4", "fisher": "#2a9d5c"}


class Bench:
    """One model with its data, its moments, and a measure of what is left of it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.minilm = arguments.model == "minilm"
        folder = arguments.folder if self.minilm else SAMPLE
        self.path = folder / ("minilm.onnx" if self.minilm else "model.onnx")
        self.base = onnxlr.Config(
            rank_multiple=arguments.rank_multiple,
            mask="attention_mask" if self.minilm else None,
            threads=arguments.threads,
        )
        self.case = prepare(self.path, folder / "calib", self.base, onnxlr.ImageOptions())
        test = open_data(folder / "test", self.case.inputs, images=onnxlr.ImageOptions())
        size = 16 if self.minilm else 100
        self.test = list(batches(islice(test, 192 if self.minilm else 1000), size, self.case.inputs))
        self.labels = None if self.minilm else np.load(folder / "test_labels.npy")
        self.dense = self._outputs(self.case.model)
        self.linear = sum(weight.parameters for weight in self.case.weights)
        self.rest = self.case.inventory.parameters - self.linear
        wanted = arguments.objectives.split(",")
        self.stats: dict[str, Any] = {"weight": None}
        if {"output", "fisher"} & set(wanted):  # the moments of one are those of the other, and gradients
            self.stats["output"] = self.stats["fisher"] = self._gather("fisher" if "fisher" in wanted else "output")
        if "utilized" in wanted:
            self.stats["utilized"] = self._gather("utilized")

    def _gather(self, objective: Any) -> onnxlr.Stats:
        return gather(self.case, dataclasses.replace(self.base, objective=objective), lambda *_: None)

    def _outputs(self, model: onnxlr.Model) -> list[dict[str, np.ndarray]]:
        session = Session(model, threads=self.base.threads)
        return [session.run(feed) for feed in self.test]

    def measure(self, model: onnxlr.Model) -> tuple[float, float]:
        """The relative error of the outputs and the task's metric on the test data."""
        found = self._outputs(model)
        error = relative_error(compare(zip(self.test, self.dense, found, strict=True), mask=self.base.mask))
        if self.labels is not None:
            given = np.concatenate([outputs["logits"] for outputs in found])
            return error, float(np.mean(given.argmax(axis=1) == self.labels[: len(given)]))
        pairs = [
            [sentence_embeddings(outputs["last_hidden_state"], feed["attention_mask"]) for outputs in (before, after)]
            for feed, before, after in zip(self.test, self.dense, found, strict=True)
        ]
        return error, float(np.mean(np.concatenate([(before * after).sum(axis=1) for before, after in pairs])))


class Objective:
    """A model under one objective, with the importance of its weights."""

    def __init__(self, bench: Bench, objective: Any) -> None:
        self.bench, case = bench, bench.case
        forms = FORMS["block" if objective == "utilized" else "all"]
        self.config = dataclasses.replace(bench.base, objective=objective, forms=forms)
        self.parts = parts_of(case, bench.stats[objective], self.config)
        self.trial = Trial(case.inventory, case.weights, case.inputs, self.config, corrected=self.config.corrects_bias)
        self.probed = self.trial.observe(spread(case.calibration, IMPORTANCE_SAMPLES))
        every = group(self.parts, case.inventory, self.config)
        self.groups = {forms: every}
        self.alone = measure_alone(every, self.trial, self.probed, self.config, lambda _: None)

    def plan(self, share: float, allocation: Any, forms: Any, rounds: int) -> tuple[Choice, Any]:
        """The choice for a share of the linear layers' parameters, and its arrays."""
        bench = self.bench
        config = dataclasses.replace(self.config, allocation=allocation, forms=forms)
        groups = self.groups.setdefault(forms, group(self.parts, bench.case.inventory, config))
        importance: Any = self.alone
        budget = bench.rest + share * bench.linear

        def fits(refused: Any = frozenset()) -> Choice:
            terms = Terms(config, Parameters(bench.case.inventory), importance, refused)
            return Planner(groups, terms).fits(budget)

        for _ in range(rounds):
            choice = fits()
            cut = factors(self.parts, choice.store(False))
            whole = self.trial.error(cut, self.probed) ** 2
            importance = measure_again(choice, cut, whole, groups, importance, self.trial, self.probed, lambda _: None)
        return well_conditioned(fits(), fits)


def predicted(choice: Choice) -> float:
    """The relative error of the outputs that a choice predicts."""
    return sum(choice.damages.values()) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["fashion", "minilm"])
    parser.add_argument("--folder", type=Path, default=Path("minilm"))
    parser.add_argument("--rank-multiple", type=int, default=8)
    parser.add_argument("--shares", default="0.75,0.5,0.25")
    parser.add_argument("--objectives", default="weight,utilized,output,fisher")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--scatter", type=Path, help="draw predicted beside measured errors")
    parser.add_argument("--figure", type=Path, help="draw errors and metric over the share")
    arguments = parser.parse_args()

    bench = Bench(arguments)
    shares = [float(share) for share in arguments.shares.split(",")]
    points: list[tuple[str, float, float]] = []
    curves: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    print("| share | objective | allocation | " + " | ".join(FORMS) + " |")
    print("|---|---|---|" + "---|" * len(FORMS), flush=True)
    for name in arguments.objectives.split(","):
        objective = Objective(bench, name)
        for share, allocation in product(shares, ("uniform", "global")):
            cells = []
            for label, forms in FORMS.items():
                if name == "utilized" and forms & {"shared", "width"}:
                    cells.append("-")
                    continue
                try:
                    choice, stored = objective.plan(share, allocation, forms, arguments.rounds)
                except onnxlr.OnnxlrError as refusal:
                    cells.append(f"not within it ({str(refusal)[:40]})")
                    continue
                error, metric = bench.measure(rewrite(bench.case.inventory, stored))
                cells.append(f"{error:.4f} ({100 * metric:.2f})")
                if allocation == "global":
                    points.append((name, predicted(choice), error))
                    curves.setdefault((name, label), []).append((share, error, metric))
            print(f"| {share:.0%} | {name} | {allocation} | " + " | ".join(cells) + " |", flush=True)
    if arguments.scatter:
        draw_scatter(points, arguments.scatter)
    if arguments.figure:
        draw_curves(curves, arguments.figure)


def draw_curves(curves: dict[tuple[str, str], list[tuple[float, float, float]]], path: Path) -> None:
    """Error and metric over the share of the linear layers' parameters kept, ranks allocated globally."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "onnxlr"  # the same figures give the same file
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, label in [*((name, "pair") for name in COLOURS), ("output", "all"), ("fisher", "all")]:
        if (name, label) in curves:
            shares, errors, metrics = zip(*sorted(curves[name, label]), strict=True)
            style = "o-" if label == "all" else "o--"
            legend = f"{name}, {'all forms' if label == 'all' else 'pairs'}"
            left.plot([100 * share for share in shares], errors, style, color=COLOURS[name], label=legend)
            right.plot([100 * share for share in shares], [100 * m for m in metrics], style, color=COLOURS[name])
    left.set(xlabel="linear parameters kept, %", ylabel="relative error of the outputs", yscale="log")
    right.set(xlabel="linear parameters kept, %", ylabel="task metric on test data, %")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def draw_scatter(points: list[tuple[str, float, float]], path: Path) -> None:
    """Predicted beside measured error."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "onnxlr"  # the same figures give the same file
    figure, axes = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
    for name, colour in COLOURS.items():
        own = [(x, y) for objective, x, y in points if objective == name]
        if own:
            axes.plot(*zip(*own, strict=True), "o", color=colour, label=name, alpha=0.8)
    low, high = min(min(p[1:]) for p in points), max(max(p[1:]) for p in points)
    axes.plot([low, high], [low, high], color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="predicted error of the outputs", ylabel="measured on unseen data", xscale="log", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""Claim 3: half and a quarter of the parameters do, with less than 0.2 points of accuracy lost.

    python -m samples.paper.compression [--seeds 0,1,2] [--shares 0.75,0.5,0.25,0.12]

The paper cuts the parameters of ViT-B/16 to 50% and those of ViT-L/16 to 25% and loses less than 0.2% of accuracy after
fine-tuning. Here transformers trained on Fashion-MNIST are compressed to shares of the parameters of their linear
layers, by these methods, and top-1 is measured on 10,000 test images:

    paper, energy     the paper's rule: every layer keeps the same share of energy, `W' = P_T W P_S`, as two factors
                      where that is smaller; the share of energy is the largest that the parameters allow
    paper, uniform    the same projections, with every layer keeping the same share of its parameters
    output            least squares on the layers' outputs, with all forms and ranks allocated over the whole model
    fisher            least squares on the network's output, likewise

1,024 training images calibrate, their labels are not used. The work folder keeps moments, compressed models and
`compression.jsonl`, one line a result, so a run that was cut off goes on; two runs may share it, for different seeds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import onnxlr
from onnxlr.metrics import relative_error
from onnxlr.session import Session
from onnxlr.validate import compare
from samples.paper.figures import BLUE, GREEN, GREY, ORANGE, panels, save
from samples.paper.training import Bench, Recipe, parser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    Row = dict[str, Any]

CONFIG = onnxlr.Config(rank_multiple=1, threads=1)
PAPER = replace(CONFIG, objective="utilized", forms=frozenset({"pair"}), allocation="uniform", margin=1.0)
METHODS = {
    "paper, energy": PAPER,
    "paper, uniform": replace(PAPER, exclude=("head",)),  # half of its rank would be half of the classes
    "output": replace(CONFIG, objective="output"),
    "fisher": replace(CONFIG, objective="fisher"),
}
COLOURS = {"paper, energy": GREY, "paper, uniform": ORANGE, "output": BLUE, "fisher": GREEN}
ENERGIES = tuple(float(1 - lost) for lost in np.geomspace(1e-4, 0.5, 400))
"""That the energy rule is tried at, from much to little."""
LOSS = 0.2
"""Points of top-1 that may be lost."""


class Subject:
    """One trained model: its data and moments, and what becomes of it at any share by any method."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self._work, self._calibration = bench.work, bench.calibration
        recipe = Recipe(seed=seed)
        self.name, self.path = recipe.name, bench.onnx(recipe)
        inspection = onnxlr.inspect(self.path)
        self._whole = inspection.inventory.parameters
        self._weights = inspection.inventory.weights
        self._linear = sum(weight.parameters for weight in self._weights)
        images = bench.test_feeds[0]["images"]
        self._feeds = [{"images": images[at : at + 100]} for at in range(0, len(images), 100)]
        self._labels = bench.test_labels
        self._dense = self._outputs(self.path)

    def _outputs(self, model: Path) -> list[Mapping[str, np.ndarray]]:
        session = Session(onnxlr.load(model), threads=CONFIG.threads)
        return [session.run(feed) for feed in self._feeds]

    def _stats(self, config: onnxlr.Config) -> onnxlr.Stats:
        """The moments for an objective; those of "fisher" hold those of "output"."""
        config = replace(config, objective="utilized" if config.objective == "utilized" else "fisher")
        file = self._work / f"{self.name}.{config.objective}.safetensors"
        if not file.exists():
            onnxlr.calibrate(self.path, self._calibration, config).save(file)
        return onnxlr.Stats.load(file)

    def compressed(self, method: str, share: float) -> Row:
        """Compress to a share of the linear layers' parameters and measure what is left."""
        config = METHODS[method]
        stats = self._stats(config)
        if method == "paper, energy":
            target = onnxlr.Target("energy", self._energy(stats, share))
        else:
            target = onnxlr.Target("keep_params", 1 - (1 - share) * self._linear / self._whole)
        file = self._work / f"{self.name}-{method.replace(', ', '-')}-{100 * share:g}.onnx"
        config = replace(config, target=target)
        report = onnxlr.compress(self.path, self._calibration, config, output=file, stats=stats, force=True)
        left = 1 - (self._whole - report.after.parameters) / self._linear
        return {"target": str(target), "linear": left, **self.judged(file)}

    def judged(self, model: Path) -> Row:
        """Top-1 of the dense model and of another, in percent, and the relative error of its scores."""
        found = self._outputs(model)
        error = relative_error(compare(zip(self._feeds, self._dense, found, strict=True)))
        return {"dense": self._top1(self._dense), "top1": self._top1(found), "error": error}

    def _top1(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> float:
        guesses = np.concatenate([each["logits"].argmax(1) for each in outputs])
        return 100 * float(np.mean(guesses == self._labels))

    def _energy(self, stats: onnxlr.Stats, share: float) -> float:
        """The largest share of energy that leaves at most `share` of the linear layers' parameters."""
        analysis = onnxlr.analyze(self.path, self._calibration, PAPER, energies=ENERGIES, stats=stats)
        for number, energy in enumerate(ENERGIES):
            pairs = ((w.at[number].rank * (w.d_in + w.d_out), w.d_in * w.d_out) for w in analysis.weights)
            if sum(min(pair, dense) for pair, dense in pairs) <= share * self._linear:
                return energy
        raise onnxlr.OnnxlrError(f"{share:.0%} is less than the energy {ENERGIES[-1]} leaves: ask for more")


class Results:
    """What was measured already, one JSON line each."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: list[Row] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def find(self, **key: object) -> list[Row]:
        """The rows that hold all of `key`."""
        return [row for row in self.rows if key.items() <= row.items()]

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def table(results: Results, shares: Sequence[float], stage: str) -> str:
    """Top-1 by method and share: the mean over the seeds and their standard deviation."""
    lines = [f"| {stage} |" + "".join(f" {share:.0%} |" for share in shares), "|---" * (1 + len(shares)) + "|"]
    for method in METHODS:
        cells = []
        for share in shares:
            tops = [row["top1"] for row in results.find(method=method, share=share, stage=stage)]
            spread = f" ± {np.std(tops, ddof=1):.2f}" if len(tops) > 1 else ""
            cells.append(f"{np.mean(tops):.2f}{spread}" if tops else "-")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def least_share(results: Results, shares: Sequence[float], method: str, stage: str) -> float | None:
    """The smallest share at which, as at all larger ones, at most `LOSS` points are lost in the mean over the seeds."""
    least = None
    for share in sorted(shares, reverse=True):
        rows = results.find(method=method, share=share, stage=stage)
        if not rows or np.mean([row["dense"] - row["top1"] for row in rows]) > LOSS:
            break
        least = share
    return least


def drawn(results: Results, shares: Sequence[float], stages: Sequence[str]) -> Figure:
    """Top-1 over the share of linear parameters kept, a line a method and stage; means over the seeds."""
    figure, ((axis,),) = panels(1, 1, (6, 3.6))
    for method, (stage, style) in product(METHODS, zip(stages, ("o-", "o--"), strict=False)):
        known = [(share, rows) for share in shares if (rows := results.find(method=method, share=share, stage=stage))]
        places = [100 * share for share, _ in known]
        tops = [np.mean([row["top1"] for row in rows]) for _, rows in known]
        axis.plot(places, tops, style, color=COLOURS[method], markersize=4, label=f"{method}, {stage}")
    dense = np.mean([row["dense"] for row in results.rows])
    axis.axhspan(dense - LOSS, dense, color="black", alpha=0.15, linewidth=0, label=f"dense, and {LOSS} points less")
    axis.set(xlabel="linear parameters kept, %", ylabel="top-1 on 10,000 test images, %", ylim=(dense - 8, dense + 1))
    axis.invert_xaxis()
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--shares", default="0.75,0.6,0.5,0.4,0.35,0.3,0.25,0.2,0.16,0.12,0.1,0.08")
    options.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    options.add_argument("--figure", type=Path, default=Path(__file__).with_suffix(".svg"))
    given = options.parse_args()

    bench = Bench(given.data, given.work)
    shares = [float(share) for share in given.shares.split(",")]
    methods = given.methods.split(";")
    results = Results(given.work / "compression.jsonl")
    for seed in map(int, given.seeds.split(",")):
        subject = Subject(bench, seed)
        for method, share in product(methods, shares):
            key = {"seed": seed, "method": method, "share": share, "stage": "one shot"}
            if not results.find(**key):
                results.add(key | subject.compressed(method, share))
                print(results.rows[-1], flush=True)
    print(table(results, shares, "one shot"))
    for method in methods:
        least = least_share(results, shares, method, "one shot")
        reached = "no share tried" if least is None else f"{least:.0%}"
        print(f"{method}, one shot: within {LOSS} points down to {reached}")
    save(drawn(results, shares, ["one shot"]), given.figure)


if __name__ == "__main__":
    main()

"""Claim 2: the larger the model, the smaller the share of its rank that the same data use.

    python -m samples.paper.utilization [--models 64x2,96x4,96x8,192x4] [--seeds 0]

The paper finds a mean layer utilization (MLU) of 35% for ViT-B/16 and of 20% for ViT-L/16. Here transformers of
several widths and depths (WIDTHxDEPTH) are trained alike on Fashion-MNIST, and the MLU of the layers of their blocks is
measured on 1,024 training images at three shares of energy; with several seeds the table gives means.

Found at 99% of the energy: 32% for 64x2, 19% for 96x4. A 64x2 takes 8 minutes on one core, a 96x4 some 20.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import onnxlr
from samples.fashion_vit.train import top1
from samples.paper.figures import BLUE, GREEN, GREY, ORANGE, RED, panels, save
from samples.paper.subject import ENERGIES, HEAD
from samples.paper.training import Bench, Recipe, parser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

SHOWN = ENERGIES.index(0.99)
COLOURS = (GREY, BLUE, ORANGE, GREEN, RED, "#7a5fb0", "black")


def analysed(model: Path, feeds: object) -> onnxlr.Analysis:
    """The utilization of the layers in the blocks."""
    return onnxlr.analyze(model, feeds, onnxlr.Config(exclude=HEAD, threads=1), energies=ENERGIES)


def by_block(analysis: onnxlr.Analysis) -> list[float]:
    """The mean utilization of each block's layers at 99% of the energy, from the first to the last."""
    blocks: dict[int, list[float]] = {}
    for weight in analysis.weights:
        blocks.setdefault(int(weight.sites[0].split(".")[1]), []).append(weight.at[SHOWN].utilization)
    return [float(np.mean(blocks[block])) for block in sorted(blocks)]


def drawn(analyses: Mapping[str, Sequence[onnxlr.Analysis]]) -> Figure:
    """MLU by model, in groups of bars by share of energy, beside the course through the blocks; means over seeds."""
    figure, ((left, right),) = panels(1, 2, (9, 3.3))
    width = 0.8 / len(analyses)
    for number, (name, seeds) in enumerate(analyses.items()):
        mlu = [100 * np.mean([each.mlu[energy] for each in seeds]) for energy in ENERGIES]
        colour = COLOURS[number % len(COLOURS)]
        bars = left.bar(np.arange(len(ENERGIES)) + (number + 0.5) * width - 0.4, mlu, width, color=colour, label=name)
        left.bar_label(bars, fmt="%.0f", fontsize=7)
        course = 100 * np.mean([by_block(each) for each in seeds], axis=0)
        right.plot((np.arange(len(course)) + 0.5) / len(course), course, "o-", color=colour, markersize=4)
    left.set_xticks(range(len(ENERGIES)), [f"{100 * energy:g}%" for energy in ENERGIES])
    left.set(xlabel="share of energy", ylabel="mean layer utilization, %")
    left.legend(frameon=False, fontsize=8)
    right.set(
        xlabel="place in the network (first block to last)", ylabel="utilization at 99% of energy, %", ylim=(0, None)
    )
    return figure


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", default="64x2,96x4")
    options.add_argument("--seeds", default="0")
    options.add_argument("--figure", type=Path, default=Path(__file__).with_suffix(".svg"))
    given = options.parse_args()

    bench = Bench(given.data, given.work)
    analyses: dict[str, list[onnxlr.Analysis]] = {}
    print("| width x depth | parameters | top-1 |" + "".join(f" MLU at {100 * energy:g}% |" for energy in ENERGIES))
    print("|---" * (3 + len(ENERGIES)) + "|")
    for name in given.models.split(","):
        width, depth = map(int, name.split("x"))
        tops = []
        for seed in map(int, given.seeds.split(",")):
            recipe = Recipe(width, depth, seed)
            model = bench.trained(recipe)
            tops.append(top1(model.to(bench.device), *bench.test))
            analyses.setdefault(name, []).append(analysed(bench.onnx(recipe), bench.calibration))
        parameters = sum(p.numel() for p in model.parameters())
        mlu = (np.mean([each.mlu[energy] for each in analyses[name]]) for energy in ENERGIES)
        cells = " | ".join(f"{100 * value:.1f}%" for value in mlu)
        print(f"| {width} x {depth} | {parameters:,} | {100 * np.mean(tops):.2f}% | {cells} |", flush=True)
    save(drawn(analyses), given.figure)


if __name__ == "__main__":
    main()

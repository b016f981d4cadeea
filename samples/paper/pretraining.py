"""Claim 4: self-supervised pre-training makes a model use more of its rank.

    python -m samples.paper.pretraining [--seed 0] [--epochs 6] [--control]

The paper finds a mean layer utilization (MLU) of up to 70% for transformers that were pre-trained without labels. Here
the transformer is pre-trained by masked image modelling (`samples/paper/masked.py`) on the 60,000 training images, then
trained with labels by the same recipe as the others. Compared are the MLU of the layers of the blocks of

    supervised              trained with labels from random weights
    masked, supervised      pre-trained, then trained with labels
    supervised, longer      (--control) trained with labels alone for as many epochs as both stages together
    masked, masked images   pre-trained only, measured on images masked as in its training
    masked, whole images    pre-trained only, measured on whole images

Found at 99% of the energy, after 6 epochs of pre-training: 18.8% supervised, 21.0% supervised after pre-training (and a
top-1 of 92.1% in place of 91.5%), 26% masked on masked images and 24% on whole ones. The control was not run.
Pre-training takes some 12 minutes on one core, each training with labels some 20.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from samples.fashion_vit.train import top1
from samples.paper.figures import save
from samples.paper.masked import drawn_masks, painted, pretrain
from samples.paper.subject import ENERGIES
from samples.paper.training import Bench, Recipe, parser
from samples.paper.utilization import analysed, drawn

if TYPE_CHECKING:
    import numpy as np


def masked_feeds(feeds: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The same images, masked as in pre-training."""
    torch.manual_seed(0)
    images = [torch.from_numpy(feed["images"]) for feed in feeds]
    return [{"images": painted(each, drawn_masks(len(each), each.device)).numpy()} for each in images]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--epochs", type=int, default=6, help="of pre-training")
    options.add_argument("--control", action="store_true", help="train with labels alone for as long, too")
    options.add_argument("--figure", type=Path, default=Path(__file__).with_suffix(".svg"))
    given = options.parse_args()

    bench = Bench(given.data, given.work)
    start = f"masked-{given.epochs}epochs-seed{given.seed}"
    usual = Recipe(seed=given.seed)
    encoder = bench.kept(
        start,
        usual.untrained(),
        lambda model, state: pretrain(model, bench.train[0], bench.test[0], given.epochs, state),
    )
    whole, masked = bench.calibration, masked_feeds(bench.calibration)
    recipes = {
        "supervised": usual,
        "masked, supervised": Recipe(seed=given.seed, start=start),
    }
    if given.control:
        recipes["supervised, longer"] = Recipe(seed=given.seed, epochs=usual.epochs + given.epochs)
    tops = {name: top1(bench.trained(recipe).to(bench.device), *bench.test) for name, recipe in recipes.items()}
    analyses = {name: [analysed(bench.onnx(recipe), whole)] for name, recipe in recipes.items()}
    file = bench.exported(start, encoder)
    analyses |= {"masked, masked images": [analysed(file, masked)], "masked, whole images": [analysed(file, whole)]}
    print("| training | top-1 |" + "".join(f" MLU at {100 * energy:g}% |" for energy in ENERGIES))
    print("|---" * (2 + len(ENERGIES)) + "|")
    for name, (analysis,) in analyses.items():
        top = f"{100 * tops[name]:.2f}%" if name in tops else "-"
        cells = " | ".join(f"{100 * analysis.mlu[energy]:.1f}%" for energy in ENERGIES)
        print(f"| {name} | {top} | {cells} |")
    save(drawn(analyses), given.figure)


if __name__ == "__main__":
    main()

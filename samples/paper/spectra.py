"""Claim 1: learned weights look as if they had full rank; projected onto what the data use, they do not.

    python -m samples.paper.spectra [--seed 0] [--energy 0.99]

For every linear layer `y = x W` of the trained transformer: the singular values of `W` and of `W' = P_T W P_S`, where
`P_T` and `P_S` project on the leading eigenvectors of the second moments of `x` and of `y` that hold a share of the
energy, and the square roots of the eigenvalues of the moments of `x`. "rank at 99%" is how many leading values hold 99%
of the sum of squares. To show that the projections take away nothing that is used, all layers are replaced by `W'` at
once, and the accuracy on 10,000 test images is measured. A minute on one core, once the model is trained.

Found at 99% of the energy: 79% of the full rank for W, 22% for W'; the same top-1 with all layers projected, 91.49%.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import onnxlr
from onnxlr.case import gather, prepare, quiet
from onnxlr.parts import parts_of
from onnxlr.probes import weight_moments
from onnxlr.rewrite import rewrite
from onnxlr.spectrum import eigen, rank_for_energy
from samples.paper.figures import BLUE, GREY, ORANGE, panels, save
from samples.paper.subject import ENERGIES
from samples.paper.training import Bench, Recipe, parser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from onnxlr.choice import Part
    from onnxlr.gram import Stats

    Array = NDArray[np.float64]

KINDS = ("query", "key", "value", "proj", "fc1", "fc2")


@dataclass(frozen=True, slots=True)
class Spectra:
    """Of one layer: the singular values of its weight and of the projected one, and those of its data; descending."""

    layer: str
    shape: tuple[int, ...]
    weight: Array
    projected: Array
    data: Array

    @property
    def used(self) -> int:
        """The rank of the projected weight."""
        return int(np.linalg.matrix_rank(np.diag(self.projected), tol=1e-6 * self.projected[0]))


class Projections:
    """A model whose linear layers can be projected on what its data use."""

    def __init__(self, model: Path, bench: Bench) -> None:
        self._bench, self._config = bench, onnxlr.Config(objective="utilized", threads=1)
        self._case = prepare(model, bench.calibration, self._config, onnxlr.ImageOptions())
        self._stats: Stats = gather(self._case, self._config, quiet)
        self._parts = parts_of(self._case, self._stats, self._config)

    def spectra(self, energy: float) -> list[Spectra]:
        """Those of every layer, in the order of the model."""
        return [self._of(part, energy) for part in self._parts]

    def _of(self, part: Part, energy: float) -> Spectra:
        matrix = part.layer.matrix
        factors, _ = part.decomposition.cut_by_energy(energy, part.decomposition.rank_for(energy))
        (moments,) = weight_moments(self._stats, self._case.inventory, part.weight, "utilized")
        return Spectra(
            part.weight.labels[0],
            matrix.shape,
            np.linalg.svd(matrix, compute_uv=False),
            np.linalg.svd(factors.first @ factors.second, compute_uv=False),
            np.sqrt(eigen(moments.second).values),
        )

    def accuracy(self, energy: float) -> onnxlr.Validation:
        """The model with every layer projected, whether that makes it smaller or not, beside the dense one."""
        stored = {}
        for part in self._parts:
            factors, _ = part.decomposition.cut_by_energy(energy, part.decomposition.rank_for(energy))
            stored[part.name] = part.put(factors)
        projected = rewrite(self._case.inventory, stored)
        feeds, labels = self._bench.test_feeds, self._bench.test_labels
        return onnxlr.validate(self._case.model, projected, feeds, labels=labels, batch=100, threads=1)


def table(spectra: Sequence[Spectra], energy: float) -> str:
    """One line a layer."""
    share = f"at {100 * energy:g}%"
    lines = [
        f"| layer | shape | full rank | rank of W | of W {share} | of the data {share} | of W' |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in spectra:
        at = [rank_for_energy(values**2, energy) for values in (each.weight, each.data)]
        full, rank = min(each.shape), np.linalg.matrix_rank(np.diag(each.weight))
        shape = " x ".join(map(str, each.shape))
        lines.append(f"| {each.layer} | {shape} | {full} | {rank} | {at[0]} | {at[1]} | {each.used} |")
    return "\n".join(lines)


def summary(spectra: Sequence[Spectra], energy: float) -> str:
    """Means over the layers of rank over full rank."""
    full = np.array([min(each.shape) for each in spectra])
    weights = np.array([rank_for_energy(each.weight**2, energy) for each in spectra])
    used = np.array([each.used for each in spectra])
    return (
        f"mean over layers of rank over full rank: W at {100 * energy:g}% {np.mean(weights / full):.1%}, "
        f"W' {np.mean(used / full):.1%}"
    )


def draw(spectra: Sequence[Spectra], energy: float, path: Path) -> None:
    """One panel a kind of layer, one line a block, the lines of a layer scaled to begin at 1."""
    figure, axes = panels(2, 3, (9, 5), sharey=True)
    for axis, kind in zip(axes.flat, KINDS, strict=True):
        layers = [each for each in spectra if each.layer.endswith(f".{kind}")]
        for number, each in enumerate(layers):
            full = min(each.shape)
            for values, colour, label in (
                (each.weight, GREY, "learned weight W"),
                (each.data, BLUE, "inputs x"),
                (each.projected, ORANGE, "projected weight W'"),
            ):
                place = np.arange(1, len(values[:full]) + 1)
                name = label if number == 0 else None
                shown = np.maximum(values[:full] / values[0], 1e-6)  # a rank ends in a fall to the lower edge
                axis.plot(place, shown, color=colour, linewidth=1, alpha=0.8, label=name)
        axis.set(title=f"{kind}, {' x '.join(map(str, layers[0].shape))}", yscale="log", ylim=(1e-3, 1.3))
    for axis in axes[1]:
        axis.set_xlabel("number of the singular value")
    for axis in axes[:, 0]:
        axis.set_ylabel("singular value / largest")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"One line a block; W' keeps {100 * energy:g}% of the energy on both sides", fontsize=10)
    save(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--energy", type=float, default=0.99)
    options.add_argument("--figure", type=Path, default=Path(__file__).with_suffix(".svg"))
    given = options.parse_args()

    bench = Bench(given.data, given.work)
    projections = Projections(bench.onnx(Recipe(seed=given.seed)), bench)
    spectra = projections.spectra(given.energy)
    print(table(spectra, given.energy))
    print(summary(spectra, given.energy))
    for energy in ENERGIES:
        found = projections.accuracy(energy)
        assert found.metric_a is not None
        assert found.metric_b is not None
        tops = f"top-1 {100 * found.metric_b:.2f}% (dense {100 * found.metric_a:.2f}%)"
        print(f"all layers projected at {100 * energy:g}%: {tops}, relative error of the scores {found.error:.4f}")
    draw(spectra, given.energy, given.figure)


if __name__ == "__main__":
    main()

"""A model that is to be compressed to shares of its linear layers' parameters, by the paper's methods and by onnxlr's.

paper, energy     the paper's rule: every layer keeps the same share of energy, `W' = P_T W P_S`, as two factors
                  where that is smaller; the share of energy is the largest that the parameters allow
paper, uniform    the same projections, with every layer but the head keeping the same share of its parameters
output            least squares on the layers' outputs, with all forms and ranks allocated over the whole model
fisher            least squares on the network's output, likewise
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

import onnxlr

if TYPE_CHECKING:
    from pathlib import Path

    from onnxlr.analyze import WeightAnalysis

ENERGIES = (0.9, 0.99, 0.999)
"""At which utilization is shown."""
HEAD = ("*head*",)
"""Kept out of figures that compare models: its rank is the number of classes."""
PAPER = onnxlr.Config(
    objective="utilized", forms=frozenset({"pair"}), allocation="uniform", margin=1.0, rank_multiple=1
)
METHODS = {
    "paper, energy": PAPER,
    "paper, uniform": replace(PAPER, exclude=HEAD),  # half of its rank would be half of the classes
    "output": onnxlr.Config(objective="output", rank_multiple=1),
    "fisher": onnxlr.Config(objective="fisher", rank_multiple=1),
}
TRIED = tuple(float(1 - lost) for lost in np.geomspace(1e-4, 0.5, 400))
"""That the energy rule is tried at, from much to little."""


@dataclass(frozen=True)
class Subject:
    """A model file, the data that calibrate it, and the folder for its moments and what becomes of it.

    `settings` are those of `onnxlr.Config` that say where and how onnxruntime runs.
    """

    path: Path
    calibration: Any
    work: Path
    settings: dict[str, Any]

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """The parameters of the whole model and of its linear layers."""
        inventory = onnxlr.inspect(self.path).inventory
        return inventory.parameters, sum(weight.parameters for weight in inventory.weights)

    def stats(self, objective: str) -> onnxlr.Stats:
        """The moments for an objective; those of "fisher" hold those of "output"."""
        gathered = "utilized" if objective == "utilized" else "fisher"
        file = self.work / f"{self.path.stem}.{gathered}.safetensors"
        if not file.exists():
            config = onnxlr.Config(objective=gathered, **self.settings)
            onnxlr.calibrate(self.path, self.calibration, config).save(file)
        return onnxlr.Stats.load(file)

    def compressed(self, method: str, share: float) -> tuple[Path, dict[str, Any]]:
        """The file of the model at a share of its linear parameters, the target it was given, and the share it has."""
        config = replace(METHODS[method], **self.settings)
        whole, linear = self._sizes
        if method == "paper, energy":
            target = onnxlr.Target("energy", self._energy(share))
        else:
            target = onnxlr.Target("keep_params", 1 - (1 - share) * linear / whole)
        file = self.work / f"{self.path.stem}-{method.replace(', ', '-')}-{100 * share:g}.onnx"
        stats = self.stats(config.objective)
        config = replace(config, target=target)
        report = onnxlr.compress(self.path, self.calibration, config, output=file, stats=stats, force=True)
        return file, {"target": str(target), "kept": 1 - (whole - report.after.parameters) / linear}

    @cached_property
    def _weights(self) -> tuple[WeightAnalysis, ...]:
        """The utilization of all layers at all energies."""
        config, energies = onnxlr.Config(**self.settings), ENERGIES + TRIED
        stats = self.stats("utilized")
        return onnxlr.analyze(self.path, self.calibration, config, energies=energies, stats=stats).weights

    def mlu(self) -> dict[float, float]:
        """The mean layer utilization of the blocks at the energies that are shown."""
        blocks = [weight for weight in self._weights if not any("head" in site for site in weight.sites)]
        return {energy: float(np.mean([w.at[n].utilization for w in blocks])) for n, energy in enumerate(ENERGIES)}

    def _energy(self, share: float) -> float:
        """The largest share of energy that leaves at most `share` of the linear layers' parameters."""
        for number, energy in enumerate(TRIED, start=len(ENERGIES)):
            pairs = ((w.at[number].rank * (w.d_in + w.d_out), w.d_in * w.d_out) for w in self._weights)
            if sum(min(pair, dense) for pair, dense in pairs) <= share * self._sizes[1]:
                return energy
        raise onnxlr.OnnxlrError(f"{share:.0%} is less than the energy {TRIED[-1]} leaves: ask for more")

"""How much of its rank every layer uses, as arXiv 2407.04797 measures it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onnxlr.case import prepare, quiet
from onnxlr.config import Config
from onnxlr.errors import ConfigError
from onnxlr.gathered import gather, require_same_model
from onnxlr.probes import weight_moments, without_rows
from onnxlr.spectrum import Utilization, eigen, output_spectrum, utilization
from onnxlr.threads import AT_ONCE, sharing_out

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnxlr.case import ModelLike, Progress
    from onnxlr.data import ImageOptions
    from onnxlr.gram import Stats
    from onnxlr.sites import Weight


@dataclass(frozen=True, slots=True)
class WeightAnalysis:
    """The utilization of one weight `W [d_in, d_out]`, at every threshold asked for."""

    name: str
    sites: tuple[str, ...]
    d_in: int
    d_out: int
    rows: int
    at: tuple[Utilization, ...]


@dataclass(frozen=True, slots=True)
class Analysis:
    """Utilization of every linear layer, and the mean layer utilization `mlu`, by energy threshold.

    `notes` say what is not as in the model that was given, and of which weights no data were seen: they are left out.
    """

    weights: tuple[WeightAnalysis, ...]
    mlu: Mapping[float, float]
    notes: tuple[str, ...] = ()


def analyze(
    model: ModelLike,
    calib: object,
    config: Config | None = None,
    *,
    energies: Sequence[float] = (0.99,),
    stats: Stats | None = None,
    images: ImageOptions | None = None,
    progress: Progress = quiet,
) -> Analysis:
    """The measure of arXiv 2407.04797: utilized rank and utilization of every layer, and their mean.

    Parameters
    ----------
    energies
        Shares of energy, each in (0, 1].
    stats
        Moments to reuse; gathered with the objective "utilized".

    Raises
    ------
    OnnxlrError
        As `calibrate`.
    """
    config = replace(config or Config(), objective="utilized")
    for energy in energies:
        if not 0 < energy <= 1:
            raise ConfigError(f"energy must be above 0 and at most 1, not {energy}")
    case = prepare(model, calib, config, images)
    stats = require_same_model(stats, case.model) if stats else gather(case, config, progress)

    def analyzed(weight: Weight) -> tuple[list[WeightAnalysis], list[str]]:
        matrices = case.inventory.matrix(weight).reshape(-1, weight.d_in, weight.d_out)
        moments_of_groups = weight_moments(stats, case.inventory, weight, "utilized")
        if why := without_rows(weight, min((own.count for own in moments_of_groups), default=0)):
            return [], [f"{weight.name} is left out: {why}"]
        rows = []
        for group, moments in enumerate(moments_of_groups):
            inputs = eigen(moments.second)
            outputs = output_spectrum(matrices[group], inputs)
            at = tuple(utilization(matrices[group], inputs, outputs, energy) for energy in energies)
            name = weight.name if weight.groups == 1 else f"{weight.name}[{group}]"
            rows.append(WeightAnalysis(name, weight.labels, weight.d_in, weight.d_out, moments.count, at))
        return rows, []

    found: list[WeightAnalysis] = []
    notes = [*case.notes]
    with sharing_out(config.threads, most=AT_ONCE if config.memory is None else 1) as pool:
        for rows, left_out in pool.map(analyzed, case.weights):
            found += rows
            notes += left_out
            progress("analyze", 1, len(case.weights))
    mlu = {e: float(np.mean([row.at[i].utilization for row in found])) for i, e in enumerate(energies)} if found else {}
    return Analysis(tuple(found), mlu, tuple(notes))

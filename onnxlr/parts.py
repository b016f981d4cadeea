"""The weights that take part, as the objective sees them: with their moments, and what their errors weigh."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from onnxlr.choice import Part
from onnxlr.errors import ConfigError
from onnxlr.factorize import Gain
from onnxlr.layer import Layer, Unread, grouped
from onnxlr.probes import gradients_reach, moments_size, read_moments, weight_gradients, weight_moments, without_rows
from onnxlr.recent import Recent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from onnxlr.case import Case
    from onnxlr.config import Config
    from onnxlr.gram import Stats
    from onnxlr.sites import Weight


def parts_of(case: Case, stats: Stats | None, config: Config) -> list[Part]:
    """The weights that take part, with their moments, as `config.objective` sees them.

    Nothing is read of them yet. With `config.memory` their decompositions are not all in memory at a time either.

    Raises
    ------
    ConfigError
        A rank that is demanded is above the full one.
    StatsError
        `stats` lacks the moments that the objective needs.
    """
    recent = None if config.memory is None else Recent()
    return [replace(_part(case, weight, stats, config), memory=recent) for weight in case.weights]


def _part(case: Case, weight: Weight, stats: Stats | None, config: Config) -> Part:
    matching = [rank for pattern, rank in config.ranks.items() if weight.matches(pattern)]
    fixed = matching[-1] if matching else None
    if fixed is not None and fixed > min(weight.d_in, weight.d_out):
        raise ConfigError(
            f"--rank {fixed} for {weight.name!r} is above its full rank {min(weight.d_in, weight.d_out)}: lower it"
        )

    def alone() -> Layer:
        return grouped([Layer(each) for each in _matrices(case.inventory.matrix(weight))])

    if stats is None or config.objective == "weight":
        return Part(weight, Unread(weight.d_in, weight.d_out, alone), fixed)
    rows, dim = moments_size(stats, weight, config.objective)
    why = without_rows(weight, rows)
    if why:
        note = f"{why}, so it is cut by its weight alone; "
        return Part(weight, Unread(weight.d_in, weight.d_out, alone), fixed, note=note)
    fisher = config.objective == "fisher"
    unreached = fisher and not gradients_reach(stats, weight)
    note = "no gradient reaches it, so its own output's error is minimised; " if unreached else ""

    def with_data() -> Layer:
        projected = config.objective == "utilized"
        moments = weight_moments(stats, case.inventory, weight, config.objective)
        gradients = weight_gradients(stats, weight) if fisher else None
        if weight.tied:
            (matrix,) = _matrices(case.inventory.matrix(weight))
            gain = None if gradients is None else Gain.of(gradients[0])
            return Layer(matrix, moments[0], True, gain, read=read_moments(stats, weight, config.objective))
        return grouped(
            [
                Layer(
                    each,
                    moments[group],
                    observed_output=weight.observes_output and not projected,
                    gain=None if gradients is None else Gain.of(gradients[group]),
                    projected=projected,
                )
                for group, each in enumerate(_matrices(case.inventory.matrix(weight)))
            ]
        )

    return Part(weight, Unread(weight.d_in, weight.d_out, with_data), fixed, rows, dim, note)


def _matrices(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """One or several matrices as [groups, d_in, d_out]."""
    return matrix.reshape(-1, *matrix.shape[-2:])

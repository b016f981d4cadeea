"""The weights that take part, as the objective sees them: with their moments, and what their errors weigh."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from onnxlr.choice import Part, separable_ranks
from onnxlr.errors import ConfigError
from onnxlr.factorize import GroupedDecomposition, WeightDecomposition
from onnxlr.gain import Gain
from onnxlr.layer import Layer, Unread, grouped
from onnxlr.probes import (
    WIDEST,
    gradients_reach,
    moments_size,
    read_gradients,
    read_moments,
    splits,
    weight_gradients,
    weight_moments,
    without_rows,
)
from onnxlr.recent import Recent
from onnxlr.separable import SeparableDecomposition, as_columns
from onnxlr.threads import AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from onnxlr.case import Case
    from onnxlr.config import Config
    from onnxlr.factors import Decomposition
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
    recent: Recent[Decomposition] | None = None if config.memory is None else Recent()
    layers: Recent[Layer] = Recent(1 if config.memory is not None else AT_ONCE)
    parts = (_part(case, weight, stats, config, layers) for weight in case.weights)
    return [replace(_with_split(part, case, stats, config), memory=recent) for part in parts]


def _part(case: Case, weight: Weight, stats: Stats | None, config: Config, layers: Recent[Layer]) -> Part:
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
        moments = moments if weight.corrected else [each.uncentred for each in moments]
        gradients = weight_gradients(stats, weight) if fisher else None
        if weight.tied:
            (matrix,) = _matrices(case.inventory.matrix(weight))
            read = read_moments(stats, weight, config.objective)
            if gradients is None:
                return Layer(matrix, moments[0], True, read=read)
            gain, pulled = Gain.of(gradients[0]), read_gradients(stats, weight)
            return Layer(matrix, moments[0], True, gain, read=read, pulled=pulled)
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

    # what was asked of a layer is seldom all that will be: the last one stays
    read = partial(layers.get, weight, with_data)
    return Part(weight, Unread(weight.d_in, weight.d_out, read), fixed, rows, dim, note)


def _with_split(part: Part, case: Case, stats: Stats | None, config: Config) -> Part:
    """A part that may have its kernel split, where it can."""
    weight, inventory = part.weight, case.inventory
    offered = separable_ranks(weight, config)
    if not offered or not splits(weight, config) or part.fixed is not None:
        return part

    def alone() -> Decomposition:
        columns = as_columns(_matrices(inventory.matrix(weight)), weight.taps)
        return _side_by_side([WeightDecomposition(each) for each in columns])

    if stats is None or part.rows is None:
        return replace(part, split=alone)
    if weight.d_in > WIDEST:
        return replace(part, note=f"{part.note}its patches of {weight.d_in} are too wide to split its kernel by; ")
    moments_size(stats, weight.in_strips, config.objective)

    def with_data() -> Decomposition:
        moments = weight_moments(stats, inventory, weight.in_strips, config.objective)
        gradients = weight_gradients(stats, weight) if config.objective == "fisher" else None
        gains = [None] * weight.groups if gradients is None else [Gain.of(own) for own in gradients]
        members = zip(_matrices(inventory.matrix(weight)), moments, gains, strict=True)
        return _side_by_side(
            [SeparableDecomposition(each, weight.taps, max(offered), own, gain) for each, own, gain in members]
        )

    return replace(part, split=with_data)


def _side_by_side(members: Sequence[Decomposition]) -> Decomposition:
    return members[0] if len(members) == 1 else GroupedDecomposition(members)


def _matrices(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """One or several matrices as [groups, d_in, d_out]."""
    return matrix.reshape(-1, *matrix.shape[-2:])

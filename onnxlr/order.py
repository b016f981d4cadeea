"""An order of the hidden units of a chain that gives blocks well conditioned windows.

In `y = act(x W_1 + b_1) W_2` the hidden units may stand in any order, as long as the columns of `W_1`, `b_1`, whatever
acts on single units in between, and the rows of `W_2` all follow it. So a block of `W_1` on the output side, or of
`W_2` on the input side, can have any `r` units in its window: those that QR with column pivoting takes first are much
better conditioned than what happens to lie at an end. One block takes the start, a second one the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from onnxlr.forms import Stored, Window, as_block

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from onnxlr.forms import Side

    Index = NDArray[np.intp]


def reordered(stored: Stored, order: Index, side: Side) -> Stored:
    """The same with the features of one side, where it is no block, in another order."""
    if side == "output":
        kept = np.arange(len(order)) if stored.outputs is None else stored.outputs
        bias = None if stored.bias is None else stored.bias[order]
        return replace(stored, second=stored.second[:, order], bias=bias, outputs=kept[order])
    kept = np.arange(len(order)) if stored.inputs is None else stored.inputs
    if stored.first is None:
        return replace(stored, second=stored.second[order], inputs=kept[order])
    return replace(stored, first=stored.first[order], inputs=kept[order])


def blocks_among_units(
    stored: Mapping[str, Stored], sides: Mapping[str, Side], blocks: Sequence[str], units: int
) -> dict[str, Stored]:
    """All weights of a chain in an order of its `units` that suits the one or two pairs that become `blocks`.

    `sides` are those on which the units lie. Two blocks may together have no higher rank than there are units.
    """
    free = np.arange(units)
    windows: list[Index] = []
    for name in blocks:
        pair = stored[name]
        assert pair.first is not None
        factor = pair.second if sides[name] == "output" else pair.first.T
        pivots = scipy.linalg.qr(factor[:, free], mode="r", pivoting=True, check_finite=False)[1][: len(factor)]
        windows.append(free[pivots])
        free = np.delete(free, pivots)
    order = np.concatenate([*windows[:1], free, *windows[1:]])
    result = {name: reordered(one, order, sides[name]) for name, one in stored.items()}
    for name, inside, start in zip(blocks, windows, (0, units - len(windows[-1])), strict=False):
        pair = stored[name]
        assert pair.first is not None
        square = pair.second[:, inside] if sides[name] == "output" else pair.first[inside]
        result[name] = as_block(result[name], Window(sides[name], start, float(np.linalg.cond(square))))
    return result

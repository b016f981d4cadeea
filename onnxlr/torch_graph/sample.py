"""Sampling of images at given places, and columns back to images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxlr.torch_graph.registry import RefusedError, operator
from onnxlr.torch_graph.tensors import DTYPES, ints

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


def _grid_refusal(attributes: Mapping[str, Any]) -> str | None:
    mode = attributes.get("mode", "bilinear")
    return None if mode in _MODES else f"mode {mode}"


_MODES = {"bilinear": "bilinear", "linear": "bilinear", "nearest": "nearest", "bicubic": "bicubic", "cubic": "bicubic"}


@operator("GridSample", since=16, refuse=_grid_refusal)
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "bilinear", padding_mode: str = "zeros"
) -> Tensor:
    """Values of x [n, c, ..] at places [n, .., 2 or 3] in [-1, 1]."""
    return F.grid_sample(x, grid.to(x.dtype), _MODES[mode], padding_mode, bool(align_corners))


@operator("AffineGrid", since=20, host=(1,))
def affine_grid(theta: Tensor, size: Tensor, *, align_corners: int = 0) -> Tensor:
    """The places that affine maps [n, 2, 3] or [n, 3, 4] give for outputs of a size."""
    return F.affine_grid(theta, ints(size), bool(align_corners))


@operator("Col2Im", since=18, host=(1, 2), refuse=lambda a: "pads" if _uneven(a.get("pads", ())) else None)
def col2im(
    x: Tensor,
    image: Tensor,
    block: Tensor,
    *,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """Columns [n, c k k, l] added up to images [n, c, h, w]."""
    if len(ints(image)) != 2:
        raise RefusedError("other than two spatial axes")
    one = (1, 1)
    return F.fold(
        x, ints(image), ints(block), tuple(dilations) or one, tuple(pads[:2]) or (0, 0), tuple(strides) or one
    )


def _uneven(pads: Sequence[int]) -> bool:
    half = len(pads) // 2
    return list(pads[:half]) != list(pads[half:])


@operator("MelWeightMatrix", since=17, host=(0, 1, 2, 3, 4))
def mel_weight_matrix(
    bins: Tensor, length: Tensor, rate: Tensor, lower: Tensor, upper: Tensor, *, output_datatype: int = 1
) -> Tensor:
    """Triangular filters [length / 2 + 1, bins], evenly spaced on the mel scale (HTK's)."""
    rows = int(length) // 2 + 1
    low, high = (2595 * torch.log10(1 + edge.double() / 700) for edge in (lower, upper))
    mels = low + torch.arange(int(bins) + 2) * (high - low) / (int(bins) + 2)
    edges = torch.floor((int(length) + 1) * 700 * (10 ** (mels / 2595) - 1) / int(rate)).long()
    start, peak, end = edges[:-2], edges[1:-1], edges[2:]
    place = torch.arange(rows)[:, None]
    rising = torch.where(peak == start, place == peak, (place - start) / (peak - start).clamp(min=1))
    falling = (end - place) / (end - peak).clamp(min=1)
    inside_left, inside_right = (place >= start) & (place <= peak), (place >= peak) & (place < end)
    filters = torch.where(inside_right & (end != peak), falling, torch.zeros(()).double())
    return torch.where(inside_left, rising.double(), filters).to(DTYPES[output_datatype])

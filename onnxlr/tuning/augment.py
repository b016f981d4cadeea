"""More images from few: shifted, mirrored and mixed, since the dense model says what is right for any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from onnxlr.data import TensorSpec

SHIFT = 8
"""An image is shifted by up to one part in so many of its height and width."""


def takes_images(inputs: Sequence[TensorSpec]) -> bool:
    """Whether a model's one input is a batch of images [N, 1 or 3, H, W]."""
    return len(inputs) == 1 and len(inputs[0].shape) == 4 and inputs[0].shape[1] in (1, 3)


def augment(images: Tensor, generator: torch.Generator, *, mix: bool) -> Tensor:
    """Images [N, C, H, W] shifted with their borders reflected, half of them mirrored, and, with `mix`, half blended.

    A blend is `t a + (1 - t) b` of two images of the batch, `t` uniform (Zhang et al. 2018, "mixup"). Element type and
    shape stay.
    """
    n, _, height, width = images.shape
    draw = torch.rand(4, n, generator=generator).to(images.device)
    up, left = height // SHIFT, width // SHIFT
    values = F.pad(images.float(), (left, left, up, up), mode="reflect")
    rows = (draw[0, :, None] * (2 * up + 1)).long() + torch.arange(height, device=images.device)
    columns = (draw[1, :, None] * (2 * left + 1)).long() + torch.arange(width, device=images.device)
    columns = torch.where(draw[2, :, None] < 0.5, columns, columns.flip(1))
    values = values.gather(2, rows[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))
    values = values.gather(3, columns[:, None, None, :].expand(-1, values.shape[1], height, -1))
    if mix:
        share = torch.where(draw[3] < 0.5, 2 * draw[3], 1.0)[:, None, None, None]
        values = share * values + (1 - share) * values[torch.randperm(n, generator=generator).to(images.device)]
    if not images.dtype.is_floating_point:
        values = values.round()
    return values.to(images.dtype)

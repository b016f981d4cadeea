"""Masked image modelling: a transformer learns without labels, by giving back pixels that it was not shown.

As in SimMIM (Xie et al. 2022, "SimMIM: A Simple Framework for Masked Image Modeling"): patches of 7 x 7 pixels are
painted over before the stem, so that no convolution can look behind them, a linear head makes each token of the last
layer into the pixels of the patch in its place, and the loss is the mean absolute error over the masked patches alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samples.fashion_vit.train import PIXEL_MEAN, augment, fit, normalised
from samples.paper.training import RATE, SHIFT

if TYPE_CHECKING:
    from pathlib import Path

    from samples.paper.model import PaperViT

PATCH, GRID = 7, 4
MASKED = 10
"""Of 16 patches."""
PAINT = round(255 * PIXEL_MEAN)
"""The mean pixel."""


def patches(images: Tensor) -> Tensor:
    """[N, 1, 28, 28] -> [N, 16, 49], patches in the order of the tokens."""
    cells = images.reshape(-1, GRID, PATCH, GRID, PATCH).transpose(2, 3)
    return cells.reshape(-1, GRID * GRID, PATCH * PATCH)


def images_of(patched: Tensor) -> Tensor:
    """The inverse of `patches`."""
    cells = patched.reshape(-1, GRID, GRID, PATCH, PATCH).transpose(2, 3)
    return cells.reshape(-1, 1, GRID * PATCH, GRID * PATCH)


def drawn_masks(count: int, device: torch.device) -> Tensor:
    """For each image which patches are masked, bool [count, 16]: always `MASKED` of them."""
    return torch.rand(count, GRID * GRID, device=device).argsort(1) < MASKED


def painted(images: Tensor, masks: Tensor) -> Tensor:
    """The images with their masked patches painted over, uint8 as before."""
    return images_of(patches(images).masked_fill(masks[:, :, None], PAINT))


class Masked(nn.Module):
    """A transformer with a head that gives back the pixels of every patch."""

    def __init__(self, encoder: PaperViT) -> None:
        super().__init__()
        self.encoder = encoder
        self.pixels = nn.Linear(encoder.norm.normalized_shape[0], PATCH * PATCH)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images [N, 1, 28, 28] -> normalised pixels [N, 16, 49]."""
        return self.pixels(self.encoder.features(images))

    def loss(self, images: Tensor, masks: Tensor) -> Tensor:
        """The mean absolute error of the normalised pixels of masked patches."""
        found = self(painted(images, masks))
        return (found - patches(normalised(images)))[masks].abs().mean()


@torch.no_grad()
def unseen_loss(model: Masked, images: Tensor) -> float:
    """The loss on images, with masks that are always the same."""
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        masks = drawn_masks(len(images), images.device)
    losses = [float(model.loss(*batch)) for batch in zip(images.split(500), masks.split(500), strict=True)]
    return sum(losses) / len(losses)


def pretrain(encoder: PaperViT, images: Tensor, test: Tensor, epochs: int, state: Path) -> None:
    """Fit a transformer to augmented images without labels, as `samples.fashion_vit.train.fit` does."""
    model = Masked(encoder).to(images.device)

    def loss(chosen: Tensor) -> Tensor:
        return model.loss(augment(images[chosen], SHIFT), drawn_masks(len(chosen), images.device))

    def judge() -> str:
        return f"loss on test images {unseen_loss(model, test):.4f}"

    fit(model, loss, len(images), epochs, judge, rate=RATE, state=state)

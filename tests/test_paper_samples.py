"""Masked modelling sees and answers for the right pixels; a training that was cut off goes on as if it had not been."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch")

from samples.fashion_vit.train import train  # noqa: E402
from samples.paper.masked import MASKED, Masked, drawn_masks, images_of, painted, patches  # noqa: E402
from samples.paper.model import PaperViT  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (256, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def small() -> PaperViT:
    torch.manual_seed(0)
    return PaperViT(width=16, depth=1, heads=2)


def test_patches_come_in_the_order_of_the_tokens(images: torch.Tensor) -> None:
    patched = patches(images)
    for row in range(4):
        for column in range(4):
            square = images[:, 0, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7]
            assert torch.equal(patched[:, 4 * row + column], square.flatten(1))
    assert torch.equal(images_of(patched), images)


def test_masked_pixels_do_not_reach_the_model_and_all_others_do(images: torch.Tensor) -> None:
    masks = drawn_masks(len(images), images.device)
    assert (masks.sum(1) == MASKED).all()
    assert not torch.equal(masks[0], masks[1])
    shown = painted(images, masks)
    assert torch.equal(patches(shown)[~masks], patches(images)[~masks])
    elsewhere = images_of(torch.where(masks[:, :, None], 255 - patches(images), patches(images)))
    assert torch.equal(painted(elsewhere, masks), shown)


def test_the_loss_is_that_of_masked_patches(images: torch.Tensor) -> None:
    model = Masked(small())
    masks = drawn_masks(len(images), images.device)
    outputs: list[torch.Tensor] = []
    model.pixels.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    (gradient,) = torch.autograd.grad(model.loss(images, masks), outputs)
    assert not gradient[~masks].any()
    assert (gradient[masks] != 0).all()


class CutOffError(Exception):
    """In place of a power cut."""


def test_a_training_that_was_cut_off_goes_on_as_if_it_had_not_been(images: torch.Tensor, tmp_path: Path) -> None:
    labels = torch.arange(len(images)) % 10

    def trained(state: Path, runs: int | None = None) -> dict[str, torch.Tensor]:
        model = small()
        left = iter(range(runs)) if runs else None

        def count(*_: object) -> None:
            if left is not None and next(left, None) is None:
                raise CutOffError

        model.register_forward_pre_hook(count)
        train(model, images, labels, (images, labels), 3, state=state)
        return model.state_dict()

    whole = trained(tmp_path / "whole.state")
    with pytest.raises(CutOffError):
        trained(tmp_path / "cut.state", runs=4)  # two steps and one look at the test images an epoch
    again = trained(tmp_path / "cut.state")
    assert all(torch.equal(whole[name], again[name]) for name in whole)

"""Train the vision transformers that the paper's claims are tried on, or take them from the work folder.

    python -m samples.paper.training --seed 0 --width 96 --depth 4

The recipe is that of `samples/fashion_vit/train.py` with twice the rate and smaller shifts, on all 60,000 training
images. The work folder keeps `NAME.pt`, the trained weights, and `NAME.onnx`; while a training runs, `NAME.state` lets
it go on where it was cut off. Every other script here takes its models from that folder and trains those that are
missing. About 20 minutes on one core at depth 4.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from samples.fashion_vit.train import export, load_split, train
from samples.paper.model import PaperViT

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

RATE, SHIFT = 2e-3, 1
HEAD_WIDTH = 32
CALIBRATION_IMAGES = 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which transformer, and how it is trained; `start` names the kept weights that it begins with, if any."""

    width: int = 96
    depth: int = 4
    seed: int = 0
    epochs: int = 10
    start: str = ""

    @property
    def name(self) -> str:
        """What its files are called."""
        start = f"-from-{self.start}" if self.start else ""
        return f"vit-{self.width}x{self.depth}-{self.epochs}epochs-seed{self.seed}{start}"

    def untrained(self) -> PaperViT:
        """The transformer with the random weights of its seed."""
        torch.manual_seed(self.seed)
        return PaperViT(self.width, self.depth, self.width // HEAD_WIDTH)


class Bench:
    """The data, and the folder that trained models are kept in.

    Parameters
    ----------
    data
        Folder of the four IDX files of Fashion-MNIST.
    work
        Where models are kept.
    """

    def __init__(self, data: Path, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._data = data

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        """Images uint8 [60000, 1, 28, 28] and their labels, on the device."""
        images, labels = load_split(self._data, "train")
        return images.to(self.device), labels.to(self.device)

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """10,000 images and their labels, on the device."""
        images, labels = load_split(self._data, "t10k")
        return images.to(self.device), labels.to(self.device)

    @property
    def calibration(self) -> list[dict[str, np.ndarray]]:
        """1,024 training images, without their labels."""
        images = self.train[0]
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
        return [{"images": images.cpu()[chosen].numpy()}]

    @property
    def lessons(self) -> list[dict[str, np.ndarray]]:
        """Every second training image, without its label."""
        return [{"images": self.train[0][::2].cpu().numpy()}]

    @property
    def test_feeds(self) -> list[dict[str, np.ndarray]]:
        """All test images."""
        return [{"images": self.test[0].cpu().numpy()}]

    @property
    def test_labels(self) -> np.ndarray:
        """Their labels, int64 [10000]."""
        return self.test[1].cpu().numpy()

    def trained(self, recipe: Recipe) -> PaperViT:
        """The trained transformer on the CPU."""

        def fitted(model: PaperViT, state: Path) -> None:
            if recipe.start:
                model.load_state_dict(self._weights(recipe.start))
            model.to(self.device)
            train(model, *self.train, self.test, recipe.epochs, rate=RATE, shift=SHIFT, state=state)

        return self.kept(recipe.name, recipe.untrained(), fitted)

    def kept(self, name: str, model: PaperViT, fitted: Callable[[PaperViT, Path], None]) -> PaperViT:
        """The model with the weights kept under `name`; those are first fitted, where there are none.

        `fitted` takes the model and the file in which it may keep its state; it leaves the model anywhere.
        """
        file = self.work / f"{name}.pt"
        if not file.exists():
            print(f"training {name}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
            state = file.with_suffix(".state")
            fitted(model, state)
            torch.save(model.cpu().state_dict(), file)
            state.unlink()
        model.load_state_dict(self._weights(name))
        return model.eval()

    def _weights(self, name: str) -> dict[str, Tensor]:
        return torch.load(self.work / f"{name}.pt", map_location="cpu", weights_only=True)

    def exported(self, name: str, model: PaperViT) -> Path:
        """The ONNX file of a model whose weights are kept under `name`."""
        weights, file = self.work / f"{name}.pt", self.work / f"{name}.onnx"
        if not file.exists() or file.stat().st_mtime < weights.stat().st_mtime:
            export(model, file)
        return file

    def onnx(self, recipe: Recipe) -> Path:
        """The ONNX file of the trained transformer."""
        return self.exported(recipe.name, self.trained(recipe))


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    """The option that all scripts have: where models are kept."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    return result


def parser(description: str | None) -> argparse.ArgumentParser:
    """The same, and where Fashion-MNIST lies."""
    result = plain_parser(description)
    result.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    return result


def main() -> None:
    options, usual = parser(__doc__), Recipe()
    options.add_argument("--width", type=int, default=usual.width)
    options.add_argument("--depth", type=int, default=usual.depth)
    options.add_argument("--seed", type=int, default=usual.seed)
    options.add_argument("--epochs", type=int, default=usual.epochs)
    given = options.parse_args()
    recipe = Recipe(given.width, given.depth, given.seed, given.epochs)
    print(Bench(given.data, given.work).onnx(recipe))


if __name__ == "__main__":
    main()

"""Train the sample's vision transformer on Fashion-MNIST and write all files of the sample.

    python samples/fashion_vit/train.py [--data FOLDER] [--epochs 8]

A ViT of 1.2 million parameters (width 128, depth 6, 49 tokens) behind an early-convolution stem (Xiao et al. 2021,
"Early Convolutions Help Transformers See Better"). The data are the four IDX files of Fashion-MNIST; Debian installs
them with `apt-get install dataset-fashion-mnist`. Written beside this script:

    model.onnx                the trained model: `images` uint8 [N, 1, 28, 28] -> `logits` float32 [N, 10]
    calib/images.npz          1,024 training images, never labelled
    test/images.npz           2,000 test images
    test_labels.npy           their labels, int64 [2000]

About an hour on one CPU core; 88.93% of all 10,000 test images after 8 epochs.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530
BATCH = 128
CALIBRATION_IMAGES, TEST_IMAGES = 1024, 2000


class Block(nn.Module):
    """One pre-norm transformer block: attention, then a two-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm1(x)

        def split(y: Tensor) -> Tensor:
            return y.unflatten(2, (self.heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            split(self.query(tokens)), split(self.key(tokens)), split(self.value(tokens))
        )
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class FashionViT(nn.Module):
    """uint8 images [N, 1, 28, 28] -> class scores [N, 10]; normalisation is a part of the model."""

    def __init__(self, width: int = 128, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 4, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(width // 4, width // 2, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(width // 2, width, 1),
        )  # fmt: skip
        self.position = nn.Parameter(0.02 * torch.randn(1, 49, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def features(self, images: Tensor) -> Tensor:
        """The tokens [N, T, width] behind the last block, normalised."""
        tokens = self.stem(normalised(images)).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean(1))


def normalised(images: Tensor) -> Tensor:
    """Pixels of mean 0 and standard deviation 1."""
    return (images.float() / 255 - PIXEL_MEAN) / PIXEL_STD


def read_idx(file: Path) -> np.ndarray:
    """The array of one gzipped IDX file: uint8 [n, 28, 28] images or uint8 [n] labels."""
    raw = gzip.decompress(file.read_bytes())
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i]) for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 1, 28, 28] and labels int64 [n] of the split "train" or "t10k"."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")[:, None]
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz").astype(np.int64)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)


def augment(images: Tensor, shift: int = 2) -> Tensor:
    """A horizontal flip of every second image and a shift by up to `shift` pixels, drawn for each image."""
    n = len(images)
    padded = F.pad(images, (shift,) * 4)
    span = torch.arange(28, device=images.device)
    rows = torch.randint(0, 2 * shift + 1, (n, 1), device=images.device) + span
    columns = torch.randint(0, 2 * shift + 1, (n, 1), device=images.device) + span
    flip = torch.rand(n, 1, device=images.device) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(n, device=images.device)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][
        :, None
    ]


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(batch).argmax(1) == target).sum())
        for batch, target in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    test: tuple[Tensor, Tensor],
    epochs: int,
    *,
    rate: float = 1e-3,
    shift: int = 2,
    state: Path | None = None,
) -> None:
    """Fit a classifier to augmented images; `test` are images and labels that top-1 is printed for; else as `fit`."""

    def loss(chosen: Tensor) -> Tensor:
        return F.cross_entropy(model(augment(images[chosen], shift)), labels[chosen], label_smoothing=0.05)

    fit(model, loss, len(images), epochs, lambda: f"top-1 {100 * top1(model, *test):.2f}%", rate=rate, state=state)


def fit(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    samples: int,
    epochs: int,
    judge: Callable[[], str],
    *,
    rate: float = 1e-3,
    state: Path | None = None,
) -> None:
    """AdamW with warm-up to `rate` and a cosine schedule.

    `loss` takes the numbers of the samples in a batch [128]; `judge` says after each epoch how good the model is. A
    training that was cut off goes on from the file `state`, which every epoch renews: on a CPU to the same weights.
    """
    device = next(model.parameters()).device
    steps_each = samples // BATCH
    steps = epochs * steps_each
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}])
    warmup = max(1, steps // 20)
    first, start = 0, time.monotonic()
    if state is not None and state.exists():
        saved = torch.load(state, map_location="cpu", weights_only=True)
        first = saved["epoch"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
    for epoch in range(first, epochs):
        model.train()
        order = torch.randperm(samples, device=device).split(BATCH)[:steps_each]
        for step, chosen in enumerate(order, start=epoch * steps_each):
            progress = max(0.0, (step - warmup) / (steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))
            value = loss(chosen)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        minutes = (time.monotonic() - start) / 60
        print(f"epoch {epoch + 1:2d}/{epochs}  {judge()}  {minutes:.1f} min", flush=True)
        if state is not None:
            whole = {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            partial = state.with_suffix(".writing")
            torch.save(whole | {"random": torch.get_rng_state()}, partial)
            partial.replace(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = (t.to(device) for t in load_split(arguments.data, "train"))
    test_images, test_labels = (t.to(device) for t in load_split(arguments.data, "t10k"))

    model = FashionViT().to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, images, labels, (test_images, test_labels), arguments.epochs)
    model.cpu().eval()

    arguments.out.mkdir(parents=True, exist_ok=True)
    export(model, arguments.out / "model.onnx")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    for name in ("calib", "test"):
        (arguments.out / name).mkdir(exist_ok=True)
    np.savez_compressed(arguments.out / "calib/images.npz", images=images.cpu()[chosen].numpy())
    np.savez_compressed(arguments.out / "test/images.npz", images=test_images.cpu()[:TEST_IMAGES].numpy())
    np.save(arguments.out / "test_labels.npy", test_labels.cpu()[:TEST_IMAGES].numpy())


def export(model: nn.Module, file: Path) -> None:
    """Write `model` as one self-contained ONNX file with a dynamic batch axis."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("N", min=1, max=65536)}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    program.save(file)
    graph = onnx.load(file)
    for node in graph.graph.node:  # the stack traces that the exporter leaves hold the paths of this machine
        kept = [entry for entry in node.metadata_props if entry.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(graph, file)


if __name__ == "__main__":
    main()

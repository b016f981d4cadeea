"""Claim 5: the paper's own models, ViT-B/16 and ViT-L/16 on ImageNet, for those who have weights and images.

    python -m samples.paper.imagenet timm:vit_base_patch16_224 --images IMAGENET --work FOLDER
    python -m samples.paper.imagenet torchvision:vit_l_16 --images IMAGENET --work FOLDER --provider cuda

IMAGENET holds `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`, one folder a class, whose sorted names give the numbers of
the classes. The library has to be installed, and gets its weights from a hub; `@random` after the name makes random
ones, to try the way. Images are prepared as the library says. The dense model teaches the compressed ones on
`--tuning-images` training images, without their labels.

Printed are the mean layer utilization of the layers in the blocks (the paper: 35% for ViT-B/16, 20% for ViT-L/16), and
top-1 of the dense and of the compressed models at shares of the linear layers' parameters, by the methods of
`samples/paper/subject.py` (the paper, after fine-tuning: ViT-B/16 at 50% and ViT-L/16 at 25% lose less than 0.2%).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import onnxlr
from onnxlr.case import images_for
from onnxlr.data import Dataset
from onnxlr.data.images import SUFFIXES, ImageReader
from onnxlr.session import Session
from samples.paper.subject import METHODS, Subject
from samples.paper.training import plain_parser


def pictures(folder: Path, count: int, model: Path, options: onnxlr.ImageOptions) -> tuple[Dataset, np.ndarray]:
    """At most `count` images, evenly spaced over a folder that has a folder for each class, and their classes."""
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir())
    files = sorted(each for each in folder.glob("*/*") if each.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"{folder}: expected images in one folder a class")
    chosen = [files[at] for at in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)]
    reader = ImageReader(list(Session(onnxlr.load(model), optimize=False).inputs), options)
    labels = np.array([classes.index(each.parent.name) for each in chosen])
    return Dataset(str(folder), lambda: enumerate(partial(reader, each) for each in chosen)), labels


def main() -> None:
    options = plain_parser(__doc__)
    options.add_argument("model", help="timm:NAME or torchvision:NAME")
    options.add_argument("--images", type=Path, required=True, help="the folder of train/ and val/")
    options.add_argument("--calibration-images", type=int, default=1024)
    options.add_argument("--tuning-images", type=int, default=100000)
    options.add_argument("--epochs", type=int, help="of fine-tuning")
    options.add_argument("--test-images", type=int, default=50000)
    options.add_argument("--shares", default="0.5,0.25")
    options.add_argument("--methods", default="paper, energy;fisher", help=f"of {'; '.join(METHODS)}")
    options.add_argument("--provider", default="cpu")
    given = options.parse_args()

    given.work.mkdir(parents=True, exist_ok=True)
    file = given.work / f"{given.model.replace(':', '-').replace('@', '-')}.onnx"
    if not file.exists():
        onnxlr.export(given.model, file)
    prepared = images_for(onnxlr.load(file), None)
    calibration, _ = pictures(given.images / "train", given.calibration_images, file, prepared)
    lessons, _ = pictures(given.images / "train", given.tuning_images, file, prepared)
    test, labels = pictures(given.images / "val", given.test_images, file, prepared)

    settings: dict[str, Any] = {"provider": given.provider}
    subject = Subject(file, calibration, given.work, settings)
    for energy, mlu in subject.mlu().items():
        print(f"mean layer utilization at {100 * energy:g}%: {mlu:.1%}", flush=True)
    config, tuning = onnxlr.Config(**settings), onnxlr.Tuning(epochs=given.epochs)
    print("| method | share of linear parameters | dense top-1 | one shot | tuned |")
    print("|---|---|---|---|---|")
    for method in given.methods.split(";"):
        for share in map(float, given.shares.split(",")):
            smaller, kept = subject.compressed(method, share)
            better = smaller.with_stem(f"{smaller.stem}-tuned")
            onnxlr.finetune(file, smaller, lessons, tuning, config, output=better, force=True)
            found = [onnxlr.validate(file, each, test, labels=labels, **settings) for each in (smaller, better)]
            tops = (found[0].metric_a, found[0].metric_b, found[1].metric_b)
            shown = " | ".join("-" if top is None else f"{100 * top:.2f}%" for top in tops)
            print(f"| {method} | {kept['kept']:.1%} | {shown} |", flush=True)


if __name__ == "__main__":
    main()

"""A residual convolutional network for Fashion-MNIST, compressed to half of its multiply-accumulates.

    python -m samples.fashion_cnn [--epochs 3] [--keep-macs 0.5,0.35]

0.7 million parameters: a stem and three stages of two residual blocks, 3 x 3 throughout, normalised behind every
convolution. Trained on 60,000 images, compressed without labels from 1,024 of them, by the least squares of each layer
(`output`) and by what its errors do to the scores (`fisher`), as pairs alone and in every form. Top-1 is of 10,000 test
images, error that of the scores relative to the dense ones, latency beside the dense model on one thread, 16 images at
a time. The trained model is kept in `--work`. Some ten minutes on one core.

Found, top-1 of the dense network 91.04%, nothing tuned; time and error are relative to it:

    MACs    fisher, pairs                 fisher, all forms             output, pairs    output, all forms
    50%     90.79%, time 0.58, err 0.080  90.95%, time 0.64, err 0.034  90.58%, 0.101    90.84%, 0.040
    35%     90.09%, time 0.50, err 0.173  90.78%, time 0.47, err 0.075  89.54%, 0.233    90.61%, 0.089

With all forms 10 or 11 of its 13 convolutions of 3 x 3 are separable: a column of the kernel, then a row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

import onnxlr
from onnxlr.bench import compare_latency
from onnxlr.config import FORMS, Form
from onnxlr.metrics import relative_error
from onnxlr.session import Session
from onnxlr.validate import compare
from samples.fashion_vit.train import export, normalised, train
from samples.paper.training import Bench, parser

WIDTHS = (32, 64, 128)
RATE, SHIFT = 3e-3, 2
PAIRS: frozenset[Form] = frozenset({"pair"})


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class FashionCNN(nn.Module):
    """Images uint8 [N, 1, 28, 28] to scores [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.stages = nn.Sequential(
            Residual(first, first, 1), Residual(first, first, 1),
            Residual(first, second, 2), Residual(second, second, 1),
            Residual(second, third, 2), Residual(third, third, 1),
        )  # fmt: skip
        self.head = nn.Linear(third, 10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.stages(self.stem(normalised(images))).mean((2, 3)))
        return scores


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--keep-macs", default="0.5,0.35")
    given = options.parse_args()
    bench = Bench(given.data, given.work)
    file = given.work / f"cnn-{given.epochs}epochs.onnx"
    if not file.exists():
        torch.manual_seed(0)
        model = FashionCNN().to(bench.device)
        train(model, *bench.train, bench.test, given.epochs, rate=RATE, shift=SHIFT)
        export(model.cpu().eval(), file)
    images, labels = bench.test_feeds[0]["images"], bench.test_labels
    feeds = [{"images": images[at : at + 100]} for at in range(0, len(images), 100)]
    dense = onnxlr.load(file)
    reference = [Session(dense, threads=1).run(feed) for feed in feeds]

    def top1(outputs: list[dict[str, np.ndarray]]) -> float:
        chosen = np.concatenate([next(iter(output.values())).argmax(1) for output in outputs])
        return 100 * float((chosen == labels).mean())

    print("| MACs kept | objective | top-1 | predicted | error | latency | weights as |\n|---|---|---|---|---|---|---|")
    print(f"| 100% | dense | {top1(reference):.2f}% | | | 1 | |")
    settings = onnxlr.Config(threads=1, batch=16, rank_multiple=8)
    for share in map(float, given.keep_macs.split(",")):
        for objective, forms in product(("output", "fisher"), (PAIRS, frozenset(FORMS))):
            small = given.work / f"cnn-{objective}-{share:g}{'-pairs' if forms == PAIRS else ''}.onnx"
            target = onnxlr.Target("keep_macs", share)
            config = replace(settings, objective=objective, target=target, forms=forms)
            report = onnxlr.compress(file, bench.calibration, config, output=small, force=True)
            session = Session(onnxlr.load(small), threads=1)
            outputs = [session.run(feed) for feed in feeds]
            error = relative_error(compare(zip(feeds, reference, outputs, strict=True)))
            one = {"images": images[:16]}
            _, low_rank = compare_latency([dense, onnxlr.load(small)], one, threads=1)
            made = Counter(weight.form for weight in report.weights)
            assert report.after.macs is not None
            assert report.before.macs is not None
            kept = report.after.macs / report.before.macs
            print(f"| {kept:.0%} | {objective} | {top1(outputs):.2f}% | {report.predicted_error:.3f} |", end="")
            print(f" {error:.3f} | {low_rank.ratio:.2f} |", end="")
            print(f" {', '.join(f'{number} {form}' for form, number in made.most_common())} |", flush=True)


if __name__ == "__main__":
    main()

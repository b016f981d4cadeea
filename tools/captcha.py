"""A convolutional network with trained weights, compressed by its multiply-accumulates, and what it then reads.

    python -m tools.captcha [--keep-macs 0.7,0.5,0.35] [--work zoo] [--test 500]

The reader of captchas in the package ddddocr 1.6.1: convolutions, an LSTM in both directions and a classifier of 8,210
characters, 13.5 million parameters. What it was trained on is not there, so captchas are drawn here: four letters or
digits in the fonts that matplotlib brings, turned, crossed by lines, with noise. 192 of them, without what they
say, are the calibration data; `read` is the share of `--test` others of which every character is right (case aside),
error that of the scores relative to the dense ones, latency beside the dense model's, in turn, on one thread.
`pip install matplotlib`, and torch for the objective fisher, without which its rows are left out.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import string
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import onnxlr
from onnxlr.bench import compare_latency
from onnxlr.metrics import relative_error
from onnxlr.session import Session
from onnxlr.validate import compare
from tools.zoo_shelf import entries, fetched, wheel

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, Any]

CALIBRATION = 192
WIDTH, HEIGHT, LENGTH = 160, 64, 4
CHARACTERS = sorted(set(string.ascii_lowercase + string.digits) - set("0o1lij"))


def drawn(count: int, seed: int) -> tuple[list[dict[str, Array]], list[str]]:
    """Feeds of one captcha each, float32 [1, 1, 64, 160] from 0 to 1, and what they say."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    fonts = [
        ImageFont.truetype(str(path), 42) for path in sorted(folder.glob("DejaVuSans*.ttf")) if "Disp" not in path.stem
    ]
    random = np.random.default_rng(seed)
    feeds, texts = [], []
    for _ in range(count):
        text = "".join(random.choice(CHARACTERS, LENGTH))
        image = Image.new("L", (WIDTH, HEIGHT), int(random.integers(200, 256)))
        for place, character in enumerate(text):
            glyph = Image.new("L", (60, 60))
            font = fonts[random.integers(len(fonts))]
            ImageDraw.Draw(glyph).text((30, 30), character, fill=255, font=font, anchor="mm")
            at = (6 + 36 * place + int(random.integers(-3, 4)), int(random.integers(-4, 8)))
            image.paste(int(random.integers(0, 100)), (at[0] - 10, at[1]), glyph.rotate(random.uniform(-20, 20)))
        draw = ImageDraw.Draw(image)
        for _ in range(2):
            ends = [(int(random.integers(WIDTH)), int(random.integers(HEIGHT))) for _ in range(2)]
            draw.line(ends, fill=int(random.integers(60, 180)))
        pixels = np.asarray(image, np.float32) + random.normal(0, 12, (HEIGHT, WIDTH))
        feeds.append({"input1": np.clip(pixels / 255, 0, 1).astype(np.float32)[None, None]})
        texts.append(text)
    return feeds, texts


def characters(package: Path) -> list[str]:
    """What the model's classes stand for; the first is the blank between characters."""
    with zipfile.ZipFile(package) as archive:
        module = ast.parse(archive.read("ddddocr/charsets.py"))
    named = {node.targets[0].id: node.value for node in module.body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    return list(ast.literal_eval(named["CHARSET_BETA"]))


def read(scores: Array, classes: Sequence[str]) -> str:
    """The text of scores [time, 1, classes]: the best class of each step, repetitions and blanks left out."""
    best = scores[:, 0].argmax(1)
    changed = np.concatenate([[True], best[1:] != best[:-1]])
    return "".join(classes[index] for index in best[changed] if index).lower()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--keep-macs", default="0.7,0.5,0.35")
    options.add_argument("--work", type=Path, default=Path("zoo"), help="where the package is kept")
    options.add_argument("--test", type=int, default=500, help="captchas to read")
    given = options.parse_args()
    (entry,) = (entry for entry in entries() if entry.name == "ddddocr: common")
    dense = onnxlr.load(fetched(entry, given.work))
    classes = characters(wheel(entry.source, given.work))
    calibration, _ = drawn(CALIBRATION, seed=0)
    feeds, texts = drawn(given.test, seed=1)
    session = Session(dense, threads=1)
    reference = [session.run(feed) for feed in feeds]

    def share(outputs: Sequence[dict[str, Array]]) -> float:
        texts_read = [read(next(iter(output.values())), classes) for output in outputs]
        return float(np.mean([found == text for found, text in zip(texts_read, texts, strict=True)]))

    print("| MACs kept | objective | read | error | latency |\n|---|---|---|---|---|")
    print(f"| 100% | dense | {share(reference):.1%} | | 1 |", flush=True)
    settings = onnxlr.Config(threads=1, batch=1)
    for kept in map(float, given.keep_macs.split(",")):
        for objective in ("weight", "output", "fisher") if importlib.util.find_spec("torch") else ("weight", "output"):
            file = given.work / f"captcha-{objective}-{kept:g}.onnx"
            config = replace(settings, objective=objective, target=onnxlr.Target("keep_macs", kept))
            report = onnxlr.compress(dense, calibration, config, output=file, force=True)
            small = onnxlr.load(file)
            session = Session(small, threads=1)
            outputs = [session.run(feed) for feed in feeds]
            error = relative_error(compare(zip(feeds, reference, outputs, strict=True)))
            _, low_rank = compare_latency([dense, small], feeds[0], threads=1)
            macs = (report.after.macs or 0) / (report.before.macs or 1)
            print(
                f"| {macs:.0%} | {objective} | {share(outputs):.1%} | {error:.3f} | {low_rank.ratio:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()

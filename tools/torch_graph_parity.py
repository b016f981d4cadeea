"""Does torch compute what onnxruntime computes, on whole real models? `onnxlr.torch_graph` against onnxruntime.

    python tools/minilm.py make -o minilm
    python tools/torch_graph_parity.py [--minilm minilm/minilm.onnx] [--only NAME]

A row for each model: its opset, its operators (those in bodies of If and Loop too), the largest relative error of any
output on two feeds (`check_parity`, which allows 1e-4), and the seconds that took. The sample and MiniLM are trained;
timm's and torchvision's models have random weights and are exported here by torch's dynamo exporter; Silero VAD and
Basic Pitch are ONNX files that come in packages, of which only the files are read. A package that is missing makes a
row that says what to install. Exit code 1 if a model fails.

Silero VAD's errors above 1e-5 are onnxruntime's sigmoid: 3e-8, in probabilities of speech below 0.001.

    pip install timm torchvision && pip install --no-deps silero-vad basic-pitch
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxlr.errors import OnnxlrError
from onnxlr.model_io import load
from onnxlr.torch_graph import check_parity, to_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import onnx

    Feed = dict[str, np.ndarray[Any, Any]]

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "samples" / "fashion_vit"
OPSETS = (20, 23)  # the exporter's default, and the first with an Attention of ONNX's own
SILERO = {
    "silero_vad.onnx": "16k",
    "silero_vad_16k_op15.onnx": "16k",
    "silero_vad_half.onnx": "16k",
    "silero_vad_openvino_16k.onnx": "16k",
    "silero_vad_op18_ifless.onnx": "16k",
    "silero_vad_16k_sequence.onnx": "sequence",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One model: how to get its file and feeds, and what that needs."""

    name: str
    make: Callable[[Path], tuple[Path, list[Feed]]]
    packages: tuple[str, ...] = ()


def sample(_: Path) -> tuple[Path, list[Feed]]:
    """The fashion ViT and images of its test set."""
    with np.load(SAMPLE / "test" / "images.npz") as arrays:
        ((name, images),) = arrays.items()
    return SAMPLE / "model.onnx", [{name: images[:8]}, {name: images[8:9]}]


def minilm(path: Path, _: Path) -> tuple[Path, list[Feed]]:
    """MiniLM and sentences, as tools/minilm.py wrote them."""
    return path, [dict(np.load(file)) for file in sorted((path.parent / "test").glob("*.npz"))[:2]]


def exported(library: str, name: str, opset: int, folder: Path) -> tuple[Path, list[Feed]]:
    """An image classifier with random weights, and random images."""
    import torch

    torch.manual_seed(0)
    if library == "timm":
        import timm

        model = timm.create_model(name, pretrained=False)
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None)
    path = folder / "model.onnx"
    torch.onnx.export(
        model.eval(), (torch.zeros(2, 3, 224, 224),), path, dynamo=True, opset_version=opset, verbose=False,
        input_names=["x"], dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), external_data=False,
    )  # fmt: skip
    generator = np.random.default_rng(0)
    return path, [{"x": generator.standard_normal((n, 3, 224, 224), np.float32)} for n in (2, 1)]


def packaged(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / file


def silero(file: str, _: Path) -> tuple[Path, list[Feed]]:
    """Silero VAD, and noise of 32 ms at 16 kHz behind the 4 ms that it keeps of the last chunk."""
    path = packaged("silero_vad", f"data/{file}")
    names = {value.name for value in load(path).proto.graph.input}
    generator = np.random.default_rng(0)
    feeds = []
    for count in (1, 5 if SILERO[file] == "sequence" else 1):
        sound = 0.1 * generator.standard_normal((count, 576), np.float32)
        every = {"input": sound, "sr": np.array(16000), "state": generator.standard_normal((2, 1, 128), np.float32)}
        every |= {name: generator.standard_normal((1, 1, 128), np.float32) for name in "hc"}
        feeds.append({name: array for name, array in every.items() if name in names})
    return path, feeds


def basic_pitch(_: Path) -> tuple[Path, list[Feed]]:
    """Basic Pitch, and noise and a tone of 2 s at 22 kHz."""
    path = packaged("basic_pitch", "saved_models/icassp_2022/nmp.onnx")
    name = load(path).proto.graph.input[0].name
    noise = 0.1 * np.random.default_rng(0).standard_normal((1, 43844, 1), np.float32)
    tone = np.sin(2 * np.pi * 440 / 22050 * np.arange(43844, dtype=np.float32)).reshape(1, -1, 1)
    return path, [{name: noise}, {name: tone + noise}]


def cases(minilm_path: Path) -> Iterator[Case]:
    """All of them."""
    yield Case("fashion ViT", sample)
    yield Case("MiniLM", partial(minilm, minilm_path))
    for library, name in (("timm", "vit_base_patch16_224"), ("torchvision", "resnet50"), ("timm", "convnext_tiny")):
        for opset in OPSETS:
            yield Case(f"{library} {name}", partial(exported, library, name, opset), (library, "onnxscript"))
    for file in SILERO:
        yield Case(f"silero-vad {file}", partial(silero, file), ("silero-vad",))
    yield Case("basic-pitch nmp.onnx", basic_pitch, ("basic-pitch",))


def operators(nodes: Iterable[onnx.NodeProto]) -> int:
    """How many, those in bodies too."""
    return sum(
        1 + sum(operators(body.node) for attribute in node.attribute for body in (attribute.g, *attribute.graphs))
        for node in nodes
    )


def row(case: Case, folder: Path) -> tuple[str, bool]:
    """The cells behind the name, and whether that is a failure."""
    missing = [name for name in case.packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        return f"not installed: pip install {' '.join(missing)} | | | |", False
    path, feeds = case.make(folder)
    if not path.exists():
        return f"not made: python tools/minilm.py make -o {path.parent} | | | |", False
    model = load(path)
    opset = max(entry.version for entry in model.proto.opset_import if entry.domain in ("", "ai.onnx"))
    figures = f"{opset} | {operators(model.proto.graph.node)}"
    start = time.perf_counter()
    try:
        parity = check_parity(to_torch(model), model, feeds)
    except OnnxlrError as error:
        return f"{figures} | FAILED: {error} | {time.perf_counter() - start:.1f} |", True
    return f"{figures} | {parity.worst:.1e} | {time.perf_counter() - start:.1f} |", False


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, default=Path("minilm/minilm.onnx"), help="what tools/minilm.py made")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    options = parser.parse_args(arguments)
    print("| model | opset | operators | worst relative error | seconds |\n|---|---|---|---|---|")
    failed = False
    for case in cases(options.minilm):
        if options.only in case.name:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cells, failure = row(case, Path(folder))
            failed |= failure
            print(f"| {case.name} | {cells}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

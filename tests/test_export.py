"""Torch models by reference: exported, held against torch, and compressed as if they were files."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from conftest import invoke, mlp, run

import onnxlr
from onnxlr.case import images_for
from onnxlr.data import IMAGES_KEY, ImageOptions
from onnxlr.errors import ConfigError, InstallError, ModelError
from onnxlr.model_io import from_proto
from onnxlr.reference import Reference, find_reference
from onnxlr.task_metrics import load_function

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
torch.set_num_threads(1)

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 24)
        self.drop = nn.Dropout(0.5)

    def forward(self, features):
        return self.second(self.drop(torch.relu(self.first(features))))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        hidden = hidden + torch.tanh(self.mix(hidden.cumsum(1)))
        return {"hidden": hidden, "logits": self.head(hidden), "cache": None}


class Moody(Net):
    def forward(self, features):
        return {"scores": super().forward(features) * (1.1 if torch.compiler.is_exporting() else 1.0)}


class Pairs(Net):
    def forward(self, features):
        return super().forward(features.reshape(2, -1, 16)).flatten(0, 1)


class Counting(Net):
    def forward(self, features):
        return super().forward(features), 3


def seeded(kind):
    torch.manual_seed(0)
    return kind()


def net():
    return seeded(Net), (torch.randn(1, 16),)


def tagger():
    ids = torch.arange(12).reshape(2, 6)
    return seeded(Tagger), {"attention_mask": (ids > 3).long(), "input_ids": ids}


def moody():
    return seeded(Moody), torch.randn(3, 16)


def pairs():
    return seeded(Pairs), torch.randn(4, 16)


def counting():
    return seeded(Counting), torch.randn(4, 16)


def broken():
    raise OSError("the checkpoint is not there")


def bare():
    return seeded(Net)


def no_tensors():
    return seeded(Net), ([1, 2],)


def misnamed():
    return seeded(Net), {"pixels": torch.randn(1, 16)}


def too_narrow():
    return seeded(Net), torch.randn(2, 15)


answer = 42
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the module `own`."""
    (tmp_path / "own.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)


def features(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 16)).astype(np.float32)


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def own(name: str) -> Any:
    return load_function("reference", f"own:{name}", {})()[0].eval()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("timm:vit_tiny_patch16_224", ("timm", "vit_tiny_patch16_224", False)),
        ("timm:vit_base_patch16_224.mae@random", ("timm", "vit_base_patch16_224.mae", True)),
        ("torchvision:resnet18@random", ("torchvision", "resnet18", True)),
        ("hf:org/name", ("hf", "org/name", False)),
        ("hf:models/mine@random", ("hf", "models/mine", True)),
        ("package.module:make", ("callable", "package.module:make", False)),
        ("folder/model.pt2", ("program", "folder/model.pt2", False)),
        ("model.onnx", None),
        ("C:model.onnx", None),
        (r"C:\models\model", None),
        ("./own:make", None),
        ("timm", None),
        ("keras:resnet/50", None),
    ],
)
def test_what_is_a_reference(text: str, expected: tuple[str, str, bool] | None) -> None:
    assert find_reference(text) == (None if expected is None else Reference(text, *expected))


def test_an_existing_file_is_no_reference() -> None:
    onnx.save(mlp(), "own:net")
    assert find_reference("own:net") is None
    assert {weight.name for weight in onnxlr.inspect("own:net").inventory.weights} == {"w1", "w2", "w3"}
    Path("timm:folder").mkdir()
    with pytest.raises(ModelError, match="is a folder"):
        onnxlr.inspect("timm:folder")
    with pytest.raises(ConfigError, match="'own:net' is a file or folder: expected timm:NAME"):
        onnxlr.export("own:net", "out.onnx")


def test_a_callable_becomes_a_file_that_computes_the_same() -> None:
    result = invoke("export", "own:net", "-o", "net.onnx", "--opset", 18, "--json")
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    assert document["inputs"] == {"features": "float32 [batch, 16]"}
    assert document["outputs"] == {"output": "float32 [batch, 24]"}
    assert (document["opset"], document["feeds"], document["parameters"]) == (18, 3, 16 * 32 + 32 + 32 * 24 + 24)
    assert document["errors"]["output"] <= document["tolerance"] == 1e-4
    assert document["nbytes"] == Path("net.onnx").stat().st_size
    assert [p.name for p in Path().iterdir() if p.name.startswith((".", "net"))] == ["net.onnx"]
    onnx.checker.check_model("net.onnx", full_check=True)
    model = onnx.load("net.onnx")
    assert str(Path.cwd()).encode() not in model.SerializeToString()
    assert b"site-packages" not in model.SerializeToString()
    assert {"first", "second"} <= {label for w in onnxlr.inspect("net.onnx").inventory.weights for label in names(w)}
    x = features(7)
    with torch.inference_mode():
        expected = own("net")(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(model, {"features": x})["output"], expected, rtol=1e-4, atol=1e-6)


def names(weight: Any) -> set[str]:
    return {label for label in ("first", "second") if weight.matches(f"*{label}*")}


def test_a_dict_of_text_has_two_free_axes_and_a_tied_weight_is_counted_once() -> None:
    done = onnxlr.export("own:tagger", "tagger.onnx")
    proto = onnx.load("tagger.onnx").graph
    assert {value.name: axes(value) for value in (*proto.input, *proto.output)} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "hidden": ["batch", "sequence", 16],
        "logits": ["batch", "sequence", 50],
    }
    assert done.parameters == 50 * 16 + 16 * 16 + 16
    assert set(done.errors) == {"hidden", "logits"}
    ids = np.arange(33).reshape(3, 11)
    feed = {"input_ids": ids, "attention_mask": (ids % 2)}
    with torch.inference_mode():
        expected = own("tagger")(**{name: torch.from_numpy(array) for name, array in feed.items()})
    found = run(onnx.load("tagger.onnx"), feed)
    for name in ("hidden", "logits"):
        np.testing.assert_allclose(found[name], expected[name].numpy(), rtol=1e-4, atol=1e-5)


def test_an_export_that_computes_something_else_is_not_written() -> None:
    result = invoke("export", "own:moody", "-o", "moody.onnx")
    assert result.code == 3
    assert re.search(r"own:moody is not the torch model: output 'scores' differs by 1.0e-01 on inputs \(features "
                     r"\[3, 16\]\), 1e-04 is allowed", result.err)  # fmt: skip
    assert result.err.count("\n") == 1
    assert not Path("moody.onnx").exists()


def test_a_batch_that_cannot_be_free_is_refused_and_can_be_fixed() -> None:
    result = invoke("export", "own:pairs", "-o", "pairs.onnx")
    assert result.code == 1
    assert "own:pairs" in result.err
    assert "--fixed-batch" in result.err
    assert result.err.count("\n") == 1
    assert invoke("export", "own:pairs", "-o", "pairs.onnx", "--fixed-batch", "--external-data").code == 0
    assert Path("pairs.onnx.data").exists()
    assert axes(onnx.load("pairs.onnx").graph.input[0]) == [4, 16]
    with torch.inference_mode():
        expected = own("pairs")(torch.from_numpy(features(4))).numpy()
    np.testing.assert_allclose(run(onnx.load("pairs.onnx"), {"features": features(4)})["output"], expected, atol=1e-5)


def test_a_program_keeps_its_axes_and_their_limits() -> None:
    rows = torch.export.Dim("rows", min=3, max=64)
    program = torch.export.export(own("net"), (torch.from_numpy(features(4)),), dynamic_shapes=({0: rows},))
    torch.export.save(program, "net.pt2")
    done = onnxlr.export("net.pt2", "net.onnx")
    assert (done.inputs, done.feeds) == ({"features": "float32 [batch, 16]"}, 2)
    with pytest.raises(ConfigError, match="leave --fixed-batch out"):
        onnxlr.export("net.pt2", "other.onnx", fixed_batch=True)
    with pytest.raises(ConfigError, match="both the reference and the output"):
        onnxlr.export("net.pt2", "net.pt2", force=True)


@pytest.mark.parametrize(
    ("reference", "code", "message"),
    [
        ("own:missing", 2, "the module own has no 'missing'"),
        ("own:answer", 2, "'own:answer'"),
        ("keras:resnet50", 2, r"keras cannot be imported.*models of libraries are timm:NAME"),
        ("jax:resnet/50", 2, "no reference to a torch model: expected timm:NAME, torchvision:NAME"),
        ("timm:", 2, "'timm:' names no model: give timm:NAME"),
        ("own:broken", 1, "own:broken fails: OSError: the checkpoint is not there"),
        ("own:bare", 1, r"own:bare returns a Net; expected \(model, example_inputs\)"),
        ("own:no_tensors", 1, "the example inputs are a tuple of list; expected a tuple of tensors, or a dict"),
        ("own:misnamed", 1, r"Net.forward\(features\) does not take the example inputs"),
        ("own:too_narrow", 1, r"own:too_narrow fails in torch on inputs \(features \[2, 15\]\)"),
        ("own:counting", 1, "its output 'output_1' is a int; expected tensors"),
        ("nowhere.pt2", 1, "nowhere.pt2 does not exist"),
        ("own.pt2", 1, "own.pt2 is no program that torch.export.save wrote"),
    ],
)
def test_every_error_is_one_clear_line(reference: str, code: int, message: str) -> None:
    Path("own.pt2").write_bytes(b"not a zip")
    result = invoke("export", reference, "-o", "out.onnx")
    assert result.code == code
    assert re.search(message, result.err)
    assert result.err.startswith("onnxlr: error: ")
    assert result.err.count("\n") == 1
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize("reference", ["timm:resnet18", "torchvision:resnet18", "hf:org/name"])
def test_a_missing_library_is_named(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"hf": "transformers"}.get(reference.partition(":")[0], reference.partition(":")[0])
    for module in (package, f"{package}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InstallError, match=rf"{reference} needs {package}, .*: `pip install {package}`"):
        onnxlr.export(reference, "out.onnx")


def test_torch_is_imported_for_references_alone() -> None:
    onnx.save(mlp(), "mlp.onnx")
    script = """
import sys
import onnxlr
onnxlr.inspect("mlp.onnx")
assert "torch" not in sys.modules
sys.modules["torch"] = None
try:
    onnxlr.inspect("own:net")
except onnxlr.OnnxlrError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert "export needs torch and onnxscript" in done.stdout
    assert "pip install 'onnxlr[torch]'" in done.stdout


def test_nothing_is_replaced_without_force() -> None:
    Path("net.onnx").write_bytes(b"precious")
    result = invoke("export", "own:net", "-o", "net.onnx")
    assert result.code == 1
    assert "exists already: pass --force" in result.err
    assert Path("net.onnx").read_bytes() == b"precious"


def test_a_reference_stands_where_a_model_file_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    np.save("x.npy", features(128))
    command = ("compress", "own:net", "--calib", "x.npy", "-o", "small.onnx", "--keep-params", 0.6)
    result = invoke(*command, "--objective", "output", "--rank-multiple", 1, "--threads", 1, "--json")
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    assert document["model"] == "own:net"
    assert document["after"]["parameters"] <= 0.6 * document["before"]["parameters"]
    with torch.inference_mode():
        dense = own("net")(torch.from_numpy(features(128))).numpy()
    found = run(onnx.load("small.onnx"), {"features": features(128)})["output"]
    assert 0 < np.linalg.norm(found - dense) / np.linalg.norm(dense) < 0.5
    # moments belong to one model: a reference is the same one every time
    assert onnxlr.calibrate("own:net", "x.npy", onnxlr.Config(objective="output")).model == document["fingerprint"]
    gc.collect()
    assert list(scratch.iterdir()) == []


def test_polygraphy_needs_a_file_to_run() -> None:
    np.save("x.npy", features(16))
    result = invoke("validate", "own:net", "own:net", "--data", "x.npy", "--polygraphy", "check")
    assert result.code == 2
    assert "own:net is no file: export it first" in result.err


def test_a_model_states_how_its_images_are_prepared() -> None:
    stated = ImageOptions(mean=(0.5,), std=(0.25,), resize=(8, 9), interpolation="bicubic")
    model = from_proto(mlp())
    assert images_for(model, None) == ImageOptions()
    model.proto.metadata_props.add(key=IMAGES_KEY, value=stated.to_json())
    assert images_for(model, None) == stated
    assert images_for(model, ImageOptions(std=(2.0,))) == ImageOptions((0.5,), (2.0,), (8, 9), None, None, "bicubic")
    unit = ImageOptions.convention("unit")
    assert images_for(model, unit) == unit
    model.proto.metadata_props[0].value = '{"mean": [0.5], "gamma": 2}'
    with pytest.raises(ModelError, match=r"in memory: its metadata 'onnxlr.images' are no image options .*gamma"):
        images_for(model, None)


def test_a_model_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
    config = transformers.BertConfig(num_hidden_layers=1, architectures=["BertForSequenceClassification"], **sizes)
    config.save_pretrained("bert")
    result = invoke("export", "hf:bert", "-o", "bert.onnx")
    assert result.code == 1
    assert re.search(r"weights of hf:bert cannot be had \(.*\): .* random weights: hf:bert@random\n", result.err)
    done = onnxlr.export("hf:bert@random", "bert.onnx")
    assert done.inputs == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), "int64 [batch, sequence]")
    assert done.outputs == {"logits": "float32 [batch, 2]"}
    assert done.feeds == 3
    transformers.T5Config(architectures=["T5Model"]).save_pretrained("t5")
    with pytest.raises(ConfigError, match="an encoder and a decoder in one"):
        onnxlr.export("hf:t5@random", "t5.onnx")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"the config of hf:org/name cannot be had \(.*\): give a folder"):
        onnxlr.export("hf:org/name", "out.onnx")


def test_a_model_of_timm() -> None:
    pytest.importorskip("timm")
    done = onnxlr.export("timm:vit_tiny_patch16_224@random", "vit.onnx")
    assert done.inputs == {"images": "float32 [batch, 3, 224, 224]"}
    assert done.outputs == {"logits": "float32 [batch, 1000]"}
    expected = ImageOptions((0.5,) * 3, (0.5,) * 3, None, None, 0.9, "bicubic")
    assert done.images == images_for(onnxlr.load("vit.onnx"), None) == expected
    with pytest.raises(ConfigError, match=r"timm has no model 'vit_tiny_patch16': did you mean .*vit_tiny_patch16_224"):
        onnxlr.export("timm:vit_tiny_patch16", "out.onnx")


def test_a_model_of_torchvision() -> None:
    pytest.importorskip("torchvision")
    done = onnxlr.export("torchvision:squeezenet1_1@random", "net.onnx")
    assert done.inputs == {"images": "float32 [batch, 3, 224, 224]"}
    assert done.outputs == {"logits": "float32 [batch, 1000]"}
    assert done.images == images_for(onnxlr.load("net.onnx"), None)
    assert done.images.resize == 256
    with pytest.raises(ConfigError, match=r"torchvision has no model 'resnet19': did you mean .*resnet18"):
        onnxlr.export("torchvision:resnet19", "out.onnx")
    with pytest.raises(ConfigError, match="detection models, which do not take a batch of images"):
        onnxlr.export("torchvision:fasterrcnn_resnet50_fpn", "out.onnx")

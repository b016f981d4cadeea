"""Model files: what is read, what is refused, and that a write is whole or does not happen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from onnxlr import model_io
from onnxlr.errors import ExternalDataError, ModelError, OutputError
from onnxlr.model_io import check, from_proto, load, save

TEXT = """
<ir_version: 8, opset_import: ["" : 17], producer_name: "test">
g (float[n, 32] x) => (float[n, 64] y)
<float[2] small = {1, 2}>
{
    s = Identity(small)
    h = MatMul(x, w)
    y = Relu(h)
}
"""


def small_model(seed: int = 0, scale: int = 1) -> onnx.ModelProto:
    """A model with one weight of 8 kB (times `scale`), inline."""
    proto = parse_model(TEXT)
    weight = np.random.default_rng(seed).standard_normal((32, 64 * scale)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return proto


def write_external(folder: Path, name: str = "model.onnx", offset: int = 128) -> Path:
    """The same model with its weight at an offset of `weights.bin`."""
    proto = small_model()
    tensor = proto.graph.initializer[1]
    (folder / "weights.bin").write_bytes(b"\xff" * offset + tensor.raw_data)
    refer(tensor, "weights.bin", offset=offset, length=len(tensor.raw_data))
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def refer(tensor: TensorProto, location: str, **entries: object) -> None:
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


def weight_of(model: model_io.Model) -> np.ndarray:
    return model.array(next(tensor for tensor in model.proto.graph.initializer if tensor.name == "w"))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("external", [False, True])
def test_a_model_survives_load_and_save(tmp_path: Path, external: bool) -> None:
    source = tmp_path / "source"
    target = tmp_path / "target"
    source.mkdir()
    target.mkdir()
    if external:
        write_external(source)
    else:
        (source / "model.onnx").write_bytes(small_model().SerializeToString())
    model = load(source / "model.onnx")
    before = model.proto.SerializeToString(deterministic=True)
    save(model, target / "new.onnx")
    again = load(target / "new.onnx")

    assert model.proto.SerializeToString(deterministic=True) == before
    np.testing.assert_array_equal(weight_of(again), numpy_helper.to_array(small_model().graph.initializer[1]))
    assert sorted(listing(target)) == (["new.onnx", "new.onnx.data"] if external else ["new.onnx"])
    assert model.nbytes == sum(map(len, listing(source).values()))
    assert again.nbytes == sum(map(len, listing(target).values()))
    if not external:
        assert (target / "new.onnx").read_bytes() == (source / "model.onnx").read_bytes()


def test_a_model_above_the_threshold_gets_a_data_file_with_aligned_offsets(tmp_path: Path) -> None:
    proto = small_model(scale=256)
    typed = helper.make_tensor("typed", TensorProto.FLOAT16, [30, 30], np.ones((30, 30)).ravel())
    packed = numpy_helper.from_array(np.arange(4096).astype(np.int8).astype(ml_dtypes.int4), "packed")
    strings = helper.make_tensor("strings", TensorProto.STRING, [2000], [b"word"] * 2000)
    proto.graph.initializer.extend([typed, packed, strings])
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(999), "v")))
    model = from_proto(proto)
    save(model, tmp_path / "model.onnx", size_threshold=1000, check=False)
    again = load(tmp_path / "model.onnx")

    offsets = {}
    for old, new in zip(model_io.tensors(proto), model_io.tensors(again.proto), strict=True):
        assert old.name == new.name
        np.testing.assert_array_equal(again.array(new), model.array(old))
        offsets[new.name] = {entry.key: entry.value for entry in new.external_data}.get("offset")
    assert int(offsets["w"]) % 4096 == 0
    assert int(offsets["packed"]) % 64 == 0
    assert offsets["v"] is not None
    assert offsets["small"] is offsets["strings"] is None


@pytest.mark.parametrize(
    "dtype", [np.float16, np.bool_, np.int64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4]
)
@pytest.mark.parametrize("shape", [(), (3, 5), (0, 4)])
def test_external_values_of_every_kind_are_read(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    proto = small_model()
    tensor = numpy_helper.from_array(values, "t")
    (tmp_path / "t.bin").write_bytes(b"12345" + tensor.raw_data)
    refer(tensor, "t.bin", offset=5)
    proto.graph.initializer.append(tensor)
    read = from_proto(proto, tmp_path).array(proto.graph.initializer[-1])
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read.astype(np.float32), values.astype(np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"this is no model, but a text\n" * 40, "not an ONNX model, or"),
        (np.random.default_rng(0).bytes(4096), "not an ONNX model, or"),
        (small_model().SerializeToString()[:-500], "truncated"),
        (numpy_helper.from_array(np.ones((2, 2), np.float32), "t").SerializeToString(), "not an ONNX model, or"),
        (numpy_helper.from_array(np.arange(9), "t").SerializeToString(), "not an ONNX model, or"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph and no opset"),
        (onnx.ModelProto(graph=small_model().graph, ir_version=8).SerializeToString(), "it has no opset"),
        (onnx.ModelProto(graph=small_model().graph).SerializeToString(), "no IR version and no opset"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match=r"is a folder: name the \.onnx file in it"):
        load(tmp_path)
    with pytest.raises(ModelError, match="the model is not an ONNX model"):
        from_proto(onnx.ModelProto())


def test_files_and_tensors_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "huge.onnx").touch()
    os.truncate(tmp_path / "huge.onnx", 2**31)
    with pytest.raises(ModelError, match=r"exceeds the 2 GB that protobuf can read: save it with external data"):
        load(tmp_path / "huge.onnx")
    proto = small_model()
    proto.graph.initializer[1].dims[0] = 31
    with pytest.raises(ModelError, match="tensor 'w' cannot be read"):
        weight_of(from_proto(proto))


def test_more_than_protobuf_can_hold_is_not_serialized() -> None:
    proto = small_model()
    # The size is judged by the shapes: nothing is allocated.
    proto.graph.initializer[1].dims[:] = [2**15, 2**15]
    with pytest.raises(ModelError, match="the model exceeds the 2 GB that protobuf can serialize: save it with"):
        from_proto(proto).serialize()


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("none.bin", {}, "are missing: .*none.bin does not exist"),
        ("", {}, "name no file"),
        ("../weights.bin", {}, "lie outside its folder, at '../weights.bin'"),
        ("sub/../../weights.bin", {}, "lie outside"),
        ("..\\weights.bin", {}, "lie outside"),
        ("/etc/hostname", {}, "lie outside"),
        ("C:\\weights.bin", {}, "lie outside"),
        ("link.bin", {}, "link.bin is a symbolic link"),
        ("weights.bin", {"offset": 129}, "are truncated: .* has 8320 bytes, expected at least 8321"),
        ("weights.bin", {"length": 9000}, "are truncated"),
        ("weights.bin", {"length": 100}, "100 bytes, but its shape needs 8192"),
        ("weights.bin", {"offset": -1}, "claim offset -1"),
        ("weights.bin", {"offset": "x"}, "no number"),
    ],
)
def test_external_data_are_validated_when_loaded(
    tmp_path: Path, location: str, entries: dict[str, object], message: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write_external(folder)
    (tmp_path / "weights.bin").write_bytes(bytes(8320))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    proto = onnx.ModelProto.FromString(path.read_bytes())
    refer(proto.graph.initializer[1], location, **entries)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ExternalDataError, match=message) as caught:
        load(path)
    assert "'w'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_references_are_refused(tmp_path: Path) -> None:
    proto = onnx.ModelProto.FromString(write_external(tmp_path).read_bytes())
    proto.graph.initializer[1].data_type = 99
    with pytest.raises(ModelError, match="unknown data type 99"):
        from_proto(proto, tmp_path)
    proto.graph.initializer[1].data_type = TensorProto.FLOAT
    proto.graph.initializer[1].dims[:] = [-4, -2]
    with pytest.raises(ModelError, match="negative dimension"):
        from_proto(proto, tmp_path)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    first = load(path).fingerprint()
    assert load(path).fingerprint() == first
    content = bytearray((tmp_path / "weights.bin").read_bytes())
    content[-1] ^= 1
    (tmp_path / "weights.bin").write_bytes(content)
    assert load(path).fingerprint() != first
    assert from_proto(small_model(1)).fingerprint() != from_proto(small_model(2)).fingerprint()
    assert from_proto(small_model(1)).fingerprint() == from_proto(small_model(1)).fingerprint()


def test_data_that_changed_since_loading_are_not_read(tmp_path: Path) -> None:
    model = load(write_external(tmp_path))
    with (tmp_path / "weights.bin").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ExternalDataError, match=r"was changed since .* was loaded: load the model again"):
        weight_of(model)


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    target = tmp_path / "new.onnx"
    data = tmp_path / "new.onnx.data"
    save(from_proto(small_model(1)), target)
    before = listing(tmp_path)
    with pytest.raises(OutputError, match="--force"):
        save(from_proto(small_model(2)), target)
    assert listing(tmp_path) == before
    save(from_proto(small_model(2)), target, force=True)
    assert load(target).fingerprint() == from_proto(small_model(2)).fingerprint()

    target.unlink()
    data.write_bytes(b"someone's")
    with pytest.raises(OutputError, match=r"new\.onnx\.data exists already: .*--force"):
        save(from_proto(small_model(2)), target, size_threshold=0)
    assert listing(tmp_path) == {"new.onnx.data": b"someone's"}
    save(from_proto(small_model(2)), target, size_threshold=0, force=True)
    assert weight_of(load(target)).shape == (32, 64)


def test_targets_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    model = from_proto(small_model())
    with pytest.raises(OutputError, match="is a folder"):
        save(model, tmp_path, force=True)
    with pytest.raises(OutputError, match="does not exist"):
        save(model, tmp_path / "none" / "model.onnx")


def test_a_model_can_replace_its_own_files(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    save(load(path), tmp_path / "own.onnx")
    model = load(tmp_path / "own.onnx")
    expected = weight_of(model)
    model.proto.graph.initializer.insert(0, numpy_helper.from_array(np.ones(5000, np.float32), "first"))
    save(model, tmp_path / "own.onnx", force=True)
    np.testing.assert_array_equal(weight_of(load(tmp_path / "own.onnx")), expected)
    with pytest.raises(ExternalDataError, match="load the model again"):
        weight_of(model)
    assert not [name for name in listing(tmp_path) if name.startswith(".")]


def test_the_checker_decides_unless_told_otherwise(tmp_path: Path) -> None:
    proto = small_model()
    proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match=r"onnx's checker refuses the model to be written to .*NoSuchOperator"):
        save(from_proto(proto), tmp_path / "model.onnx")
    assert not listing(tmp_path)
    save(from_proto(proto), tmp_path / "model.onnx", check=False)
    with pytest.raises(ModelError, match=r"onnx's checker refuses .*model.onnx: .*NoSuchOperator"):
        check(tmp_path / "model.onnx")
    proto.graph.node[0].domain = "com.example"
    proto.opset_import.add(domain="com.example", version=1)
    save(from_proto(proto), tmp_path / "custom.onnx")
    check(tmp_path / "custom.onnx")


@pytest.mark.parametrize("threshold", [0, 2**30])
def test_a_full_disk_leaves_the_old_files(tmp_path: Path, threshold: int) -> None:
    pytest.importorskip("resource")
    save(from_proto(small_model(1)), tmp_path / "model.onnx", size_threshold=threshold)
    (tmp_path / "big.onnx").write_bytes(small_model(2, scale=100).SerializeToString())
    before = listing(tmp_path)
    script = f"""
import resource
from onnxlr.errors import OutputError
from onnxlr.model_io import load, save
model = load({str(tmp_path / "big.onnx")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(model, {str(tmp_path / "model.onnx")!r}, force=True, size_threshold={threshold})
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "model.onnx cannot be written: File too large" in done.stdout
    assert listing(tmp_path) == before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupt_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The moves into place: the old data aside, the new data in, the new model in."""
    path = tmp_path / "model.onnx"
    save(from_proto(small_model(1)), path, size_threshold=0)
    before = listing(tmp_path)
    replace, calls = Path.replace, iter(range(1, 10))

    def interrupted(self: Path, target: Path) -> Path:
        if next(calls) == call:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(from_proto(small_model(2)), path, force=True, size_threshold=0)
    monkeypatch.undo()
    assert listing(tmp_path) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(from_proto(small_model()), tmp_path / "model.onnx", size_threshold=0)
    assert not list(tmp_path.iterdir())

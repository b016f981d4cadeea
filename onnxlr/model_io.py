"""Read and write model files: the only module that touches them.

A model is one protobuf, and often a second file with the weights ("external data": each tensor names a file, an
offset and a length). Such weights stay on disk: validated when the model is loaded, read one tensor at a time when
asked for, and streamed from file to file when the model is saved. A model larger than the memory passes through.

Saving is whole or not at all: everything is written and checked inside a temporary folder beside the target, then
moved into place. That also makes it safe to replace the very files that are being read.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto, numpy_helper

from onnxlr.errors import ExternalDataError, ModelError, OutputError
from onnxlr.external_data import (
    EXTERNAL_FROM,
    PACKED_BITS,
    Stamp,
    aligned,
    inline_bytes,
    is_external,
    locate,
    raw_bytes,
    reference,
    stamp,
)
from onnxlr.files import require_writable
from onnxlr.protos import PAYLOAD, copy_around_tensors, copy_fields, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

PROTOBUF_LIMIT = 2**31 - 1

_CHUNK = 2**24


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Model:
    """A model in memory, its external data on disk.

    Attributes
    ----------
    proto
        The model; weights are inline where the file had them inline.
    path
        The file it came from; None for a model built in memory.
    folder
        What the locations of external data are relative to.
    """

    proto: onnx.ModelProto
    path: Path | None
    folder: Path
    _stamps: dict[str, Stamp] = field(repr=False)

    @property
    def external_files(self) -> tuple[str, ...]:
        """Where its external data are, relative to `folder`."""
        return tuple(self._stamps)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: the model file and its external data. In memory: the serialized size and external data."""
        own = self.path.stat().st_size if self.path else inline_bytes(self.proto)
        if self.path is None and own <= PROTOBUF_LIMIT // 2:
            own = int(self.proto.ByteSize())
        return own + sum((self.folder / location).stat().st_size for location in self._stamps)

    def array(self, tensor: TensorProto) -> np.ndarray[Any, Any]:
        """One tensor's values, inline or read from its range of the external file.

        Parameters
        ----------
        tensor
            A tensor of this model: an initializer or the value of an attribute.

        Returns
        -------
        np.ndarray
            Of the tensor's own shape and dtype (`ml_dtypes` where numpy has none). Possibly read-only.

        Raises
        ------
        ExternalDataError
            The file is gone, too short, or was changed since the model was loaded.
        ModelError
            The values do not fit the tensor's shape, or its type is unknown.
        """
        try:
            if not is_external(tensor):
                return numpy_helper.to_array(tensor)
            if tensor.data_type in PACKED_BITS:
                return numpy_helper.to_array(self._inline(tensor))
            raw = np.empty(raw_bytes(tensor, self._where), np.uint8)
            filled = 0
            for chunk in self._chunks(tensor):
                raw[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
                filled += len(chunk)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            return raw.view(dtype).reshape(tuple(tensor.dims))
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{self._where}: tensor {tensor.name!r} cannot be read: {error}") from error

    def serialize(self) -> bytes:
        """The protobuf's bytes, for a session; external data stay references.

        Raises
        ------
        ModelError
            It would exceed the 2 GB that protobuf can serialize.
        """
        try:
            if inline_bytes(self.proto) <= PROTOBUF_LIMIT:
                return bytes(self.proto.SerializeToString(deterministic=True))
        except (EncodeError, ValueError):
            pass
        raise ModelError(f"{self._where} exceeds the 2 GB that protobuf can serialize: save it with external data")

    def apart(self, least: int) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
        """The protobuf's bytes without the main graph's large weights, and those beside them, for a session.

        Parameters
        ----------
        least
            Bytes from which on an inline initializer is left out; the bytes then refer to it by its name alone.

        Raises
        ------
        ModelError
            What is left would still exceed the 2 GB that protobuf can serialize.
        """
        large = {t.name: t for t in self.proto.graph.initializer if not is_external(t) and t.ByteSize() >= least}
        own = {id(tensor) for tensor in large.values()}
        outline = onnx.ModelProto()

        def place(source: TensorProto, target: TensorProto) -> None:
            if id(source) not in own:
                target.CopyFrom(source)
                return
            copy_fields(source, target, skip=PAYLOAD)
            target.data_location = TensorProto.EXTERNAL
            target.external_data.add(key="location", value=source.name)

        copy_around_tensors(self.proto, outline, place)
        rest = Model(outline, self.path, self.folder, self._stamps)
        return rest.serialize(), {name: self.array(tensor) for name, tensor in large.items()}

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the protobuf and the external data: equal for models loaded from equal files."""
        digest = hashlib.sha256()
        outline = onnx.ModelProto()
        copy_around_tensors(
            self.proto, outline, lambda source, target: copy_fields(source, target, skip=PAYLOAD - {"external_data"})
        )
        digest.update(outline.SerializeToString(deterministic=True))
        for tensor in tensors(self.proto):
            if is_external(tensor):
                for chunk in self._chunks(tensor):
                    digest.update(chunk)
            else:
                # of most weights the bytes are all that is left to tell, and less work than a message of them
                digest.update(tensor.raw_data or tensor.SerializeToString(deterministic=True))
        return digest.hexdigest()

    @property
    def _where(self) -> str:
        return "the model" if self.path is None else str(self.path)

    def _chunks(self, tensor: TensorProto) -> Iterator[bytes]:
        """The external bytes of `tensor`, piece by piece."""
        file, offset, length = locate(self.folder, tensor, self._where)
        try:
            with file.open("rb") as stream:
                if stamp(os.fstat(stream.fileno())) != self._stamps.get(reference(tensor)["location"]):
                    raise ExternalDataError(f"{file} was changed since {self._where} was loaded: load the model again")
                stream.seek(offset)
                while length:
                    chunk = stream.read(min(length, _CHUNK))
                    if not chunk:
                        raise ExternalDataError(f"{file} ended while tensor {tensor.name!r} was read: is it changing?")
                    length -= len(chunk)
                    yield chunk
        except OSError as error:
            raise ExternalDataError(f"{file} cannot be read: {error.strerror or error}") from error

    def _inline(self, tensor: TensorProto) -> TensorProto:
        """A copy of `tensor` with its values in `raw_data`."""
        copy = TensorProto()
        copy_fields(tensor, copy, skip=PAYLOAD)
        if is_external(tensor):
            copy.raw_data = b"".join(self._chunks(tensor))
        elif tensor.HasField("raw_data"):
            copy.raw_data = tensor.raw_data
        else:
            copy.raw_data = numpy_helper.from_array(self.array(tensor)).raw_data
        return copy


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model; its external data stay on disk, but every reference to them is validated.

    Raises
    ------
    ModelError
        No such file, or it is not an ONNX model, or truncated.
    ExternalDataError
        External data that are missing, too short, or outside the model's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(
            f"{path} is a folder: name the .onnx file in it" if path.is_dir() else f"{path} does not exist"
        )
    try:
        if path.stat().st_size > PROTOBUF_LIMIT:
            raise ModelError(f"{path} exceeds the 2 GB that protobuf can read: save it with external data")
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content:
        raise ModelError(f"{path} is empty: was its download or export interrupted?")
    try:
        proto = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise ModelError(f"{path} is not an ONNX model, or is truncated: protobuf cannot parse it") from error
    return _validated(proto, path, path.parent)


def from_proto(proto: onnx.ModelProto, folder: Path | None = None) -> Model:
    """Wrap a model built in memory; `folder` (default: the working folder) is where its external data lie.

    Raises as `load` does where the protobuf lacks a graph, IR version or opset, or refers to bad external data.
    """
    return _validated(proto, None, Path() if folder is None else folder)


def require_room(model: Model, path: Path, *, force: bool) -> None:
    """Refuse the files that `save` would write, before the work begins, as far as they can be foreseen.

    Raises
    ------
    OutputError
        As `save`.
    """
    require_writable(path, force=force)
    if model.external_files:
        require_writable(_data_path(path), force=force)


def _data_path(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def save(
    model: Model,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    size_threshold: int = PROTOBUF_LIMIT - 2**20,
    check: bool = True,
) -> None:
    """Write a model, whole or not at all; `model` itself is left as it is.

    A model that has external data, or that serializes to more than `size_threshold` bytes, is written as two files:
    tensors of at least `EXTERNAL_FROM` bytes go to `<name>.onnx.data`, one at a time. When the files of `model` itself
    are replaced, it refuses to read their external data afterwards: load it again.

    Parameters
    ----------
    check
        Run onnx's checker on the result before it is put in place. Not for models that it refuses unedited (`check`).

    Raises
    ------
    OutputError
        The target exists and `force` is not set, or it cannot be written.
    ModelError
        The checker refuses the result.
    ExternalDataError
        The model's own external data cannot be read any more.
    """
    path = Path(path)
    data = _data_path(path)
    require_writable(path, force=force)
    content = None
    if not model._stamps and inline_bytes(model.proto) <= min(size_threshold, PROTOBUF_LIMIT):
        content = model.serialize()
    if content is None or len(content) > size_threshold:
        content = None
        require_writable(data, force=force)
    try:
        with tempfile.TemporaryDirectory(prefix=".onnxlr.", dir=path.parent) as folder:
            new, new_data = Path(folder, path.name), Path(folder, data.name)
            if content is None:
                content = _write_data(model, new_data)
            with new.open("wb") as stream:
                stream.write(content)
                _sync(stream)
            if check and (reason := _refusal(new)):
                raise ModelError(f"onnx's checker refuses the model to be written to {path}: {reason}")
            _put(new, path, new_data, data, Path(folder, "previous"))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def check(path: str | os.PathLike[str]) -> None:
    """Run onnx's checker on a model file, external data included.

    Raises
    ------
    ModelError
        The checker refuses the model.
    """
    if reason := _refusal(Path(path)):
        raise ModelError(f"onnx's checker refuses {path}: {reason}")


def _validated(proto: onnx.ModelProto, path: Path | None, folder: Path) -> Model:
    where = "the model" if path is None else str(path)
    lacking = [
        name
        for name, present in {
            "graph": proto.HasField("graph") and (proto.graph.node or proto.graph.output),
            "IR version": proto.ir_version > 0,
            # The IR named no opset before version 3.
            "opset": 0 < proto.ir_version < 3 or any(entry.version > 0 for entry in proto.opset_import),
        }.items()
        if not present
    ]
    if lacking:
        raise ModelError(f"{where} is not an ONNX model, or is damaged: it has no {' and no '.join(lacking)}")
    stamps = {}
    for tensor in tensors(proto):
        if is_external(tensor):
            file, _, _ = locate(folder, tensor, where)
            stamps[reference(tensor)["location"]] = stamp(file.stat())
    return Model(proto, path, folder, stamps)


def _write_data(model: Model, path: Path) -> bytes:
    """Stream the large tensors to `path`; return the serialized rest, which refers to them."""
    proto = onnx.ModelProto()
    with path.open("wb") as stream:

        def place(source: TensorProto, target: TensorProto) -> None:
            size = raw_bytes(source, model._where)
            if size < EXTERNAL_FROM or source.data_type == TensorProto.STRING:
                target.CopyFrom(model._inline(source) if is_external(source) else source)
                return
            stream.seek(aligned(stream.tell(), size))
            copy_fields(source, target, skip=PAYLOAD)
            target.data_location = TensorProto.EXTERNAL
            for key, value in {"location": path.name, "offset": stream.tell(), "length": size}.items():
                target.external_data.add(key=key, value=str(value))
            for chunk in model._chunks(source) if is_external(source) else (model._inline(source).raw_data,):
                stream.write(chunk)

        copy_around_tensors(model.proto, proto, place)
        _sync(stream)
    if not path.stat().st_size:
        path.unlink()
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (EncodeError, ValueError) as error:
        raise ModelError(
            f"{model._where} exceeds 2 GB even without its tensors: protobuf cannot serialize it"
        ) from error


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _refusal(path: Path) -> str | None:
    """The first line of what onnx's checker has against a model file; None where it has nothing."""
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        return str(error).strip().partition("\n")[0]
    return None


def _put(new: Path, path: Path, new_data: Path, data: Path, previous: Path) -> None:
    """Move the model, and its data first where there are any, into place; undo the one if the other fails."""
    with_data = new_data.exists()
    try:
        if with_data:
            if data.exists():
                data.replace(previous)
            new_data.replace(data)
        new.replace(path)
    except BaseException:
        if new.exists() and previous.exists():
            previous.replace(data)
        elif new.exists() and with_data and not new_data.exists():
            data.unlink(missing_ok=True)
        raise

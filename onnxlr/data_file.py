"""A file of weights that grows while a model is made: tensors go to it one at a time and are known by their places.

A model that is made of another one often needs the other's weights too, and all external data of a model lie in one
folder. So that folder is a new one, and the other's files are linked into it, or copied where the disk is another.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxlr.errors import OutputError
from onnxlr.external_data import aligned

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from onnxlr.model_io import Model

NAME = "onnxlr.data"


class DataFile:
    """External data of a model, in a new folder in `folder`.

    Parameters
    ----------
    folder
        Where the new folder is made.
    beside
        A model whose own external data are to be there too.

    Raises
    ------
    OutputError
        It cannot be written.
    """

    def __init__(self, folder: Path, *, beside: Model | None = None) -> None:
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="model.", dir=folder))
            if beside is not None:
                for location in beside.external_files:
                    place = self.folder / location
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _link(beside.folder / location, place)
            self._name = NAME
            while (self.folder / self._name).exists():
                self._name += "_"
            self._stream = (self.folder / self._name).open("wb")
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error

    def put(self, name: str, array: NDArray[Any]) -> onnx.TensorProto:
        """Write an array; the tensor that refers to it."""
        element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        proto = onnx.TensorProto(name=name, data_type=element, dims=array.shape)
        proto.data_location = onnx.TensorProto.EXTERNAL
        try:
            self._stream.seek(aligned(self._stream.tell(), array.nbytes))
            places = {"location": self._name, "offset": self._stream.tell(), "length": array.nbytes}
            self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._stream.flush()  # whoever makes a model of these tensors looks at the file
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        for key, value in places.items():
            proto.external_data.add(key=key, value=str(value))
        return proto

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if error is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)

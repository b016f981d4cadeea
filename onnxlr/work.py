"""What a long run has finished, kept in a folder: a run that was cut off goes on where it stopped.

Every result has a file of its own, named after the stage and after all that it follows from: the model, the data and
the settings. So whoever runs the same again finds it, whoever changes the target finds the moments, and nobody finds
what is not his. Files appear whole or not at all.

A run that is not to be resumed has a folder too, a temporary one: there goes what does not fit into memory.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxlr.errors import OutputError
from onnxlr.files import replacing
from onnxlr.gram import Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

DIGITS = 16


class Work:
    """Results in files.

    Parameters
    ----------
    folder
        Where they are; a temporary folder, made when it is needed first, when None.
    source
        What tells the model and the data from others.

    Attributes
    ----------
    resumable
        Whether the folder was given, and will be there for another run.
    """

    def __init__(self, folder: Path | None, source: str) -> None:
        self._folder, self._source = folder, source
        self.resumable = folder is not None
        self._numbers = count()
        self._inner: Path | None = None
        self._temporary = ExitStack()

    @property
    def folder(self) -> Path:
        """Where results go.

        Raises
        ------
        OutputError
            The temporary folder cannot be made.
        """
        if self._folder is None:
            try:
                self._folder = Path(self._temporary.enter_context(tempfile.TemporaryDirectory(prefix="onnxlr.")))
            except OSError as error:
                raise OutputError(f"the temporary folder cannot be made: {error.strerror or error}") from error
        return self._folder

    @property
    def scratch(self) -> Path:
        """A folder in it that goes with the run.

        Raises
        ------
        OutputError
            It cannot be made.
        """
        if self._inner is None:
            try:
                folder = tempfile.TemporaryDirectory(prefix="scratch.", dir=self.folder)
                self._inner = Path(self._temporary.enter_context(folder))
            except OSError as error:
                raise OutputError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        return self._inner

    def array(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same array in a file that goes with the run, and read from there."""
        if not array.size:
            return array
        path = self.scratch / f"{next(self._numbers)}.f64"
        try:
            with path.open("wb") as stream:
                stream.write(np.ascontiguousarray(array).data)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
        return np.memmap(path, np.float64, "r", 0, array.shape)

    def close(self) -> None:
        """Remove what goes with the run."""
        self._temporary.close()

    def path(self, stage: str, settings: object, ending: str) -> Path:
        """The file of a stage's result; `settings` are what it follows from beside model and data."""
        digest = hashlib.sha256(f"{self._source}\0{settings}".encode()).hexdigest()
        return self.folder / f"{stage}-{digest[:DIGITS]}{ending}"

    def stats(self, stage: str, settings: object, make: Callable[[], Stats]) -> Stats:
        """Moments, made unless there is a file of them, and read from there."""
        path = self.path(stage, settings, ".safetensors")
        if not path.exists():
            make().save(path, force=True)  # another run of the same may have come first
        return Stats.load(path)

    def values(self, stage: str, settings: object, make: Callable[[], Any]) -> Any:
        """Plain values, likewise."""
        path = self.path(stage, settings, ".json")
        if not path.exists():
            made = json.dumps(make())
            with replacing(path, force=True) as temporary:
                temporary.write_text(made)
        return read_json(path)


def read_json(path: Path) -> Any:
    """What a file of results holds.

    Raises
    ------
    OutputError
        It is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is damaged ({error}): delete it, and what it held is made again") from error


@contextmanager
def working(folder: str | Path | None, source: Callable[[], str]) -> Iterator[Work]:
    """The work in a folder, which is made where there is none, or in a temporary one that goes with the run.

    `source` gives what tells the model and the data from others; it is asked only where a folder is given.

    Raises
    ------
    OutputError
        The folder cannot be made.
    """
    if folder is None:
        with closing(Work(None, "")) as temporary:
            yield temporary
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be made: {error.strerror or error}") from error
    with closing(Work(Path(folder), source())) as work:
        yield work

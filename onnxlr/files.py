"""Output files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from onnxlr.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator


def require_writable(path: Path, *, force: bool) -> None:
    """Refuse a target before the work for it begins.

    Raises
    ------
    OutputError
        `path` exists and `force` is not set, is a folder or a device, cannot be looked at, or its folder is missing or
        read-only.
    """
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder: name a file in it")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is no ordinary file, and would be one afterwards: choose another name")
        if path.exists() and not force:
            raise OutputError(f"{path} exists already: pass --force to replace it, or choose another name")
        if not path.parent.is_dir():
            raise OutputError(f"the folder {path.parent} does not exist: create it first")
        if not os.access(path.parent, os.W_OK):
            raise OutputError(f"the folder {path.parent} is read-only: choose another one")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    Raises
    ------
    OutputError
        As `require_writable`, or the disk refuses the write.
    """
    require_writable(path, force=force)
    try:
        with tempfile.TemporaryDirectory(prefix=".onnxlr.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error

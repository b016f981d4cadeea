"""Output files appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from onnxlr.errors import OutputError
from onnxlr.files import replacing, require_writable

if TYPE_CHECKING:
    from pathlib import Path


def test_a_new_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with replacing(path) as temporary:
        temporary.write_bytes(b"contents")
        assert not path.exists()
        # a rename is atomic only within one file system
        assert temporary.is_relative_to(tmp_path)
        assert temporary.name == path.name
    assert path.read_bytes() == b"contents"
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")
    with replacing(path, force=True) as temporary:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        temporary.write_bytes(b"the whole")
    assert path.read_bytes() == b"the whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [True, False])
def test_an_interruption_leaves_all_as_it_was(tmp_path: Path, error: type[BaseException], old: bool) -> None:
    path = tmp_path / "file"
    if old:
        path.write_bytes(b"old")

    def interrupted() -> None:
        with replacing(path, force=True) as temporary:
            temporary.write_bytes(b"half")
            temporary.with_suffix(".more").write_bytes(b"half of another")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        interrupted()
    assert list(tmp_path.iterdir()) == ([path] if old else [])
    assert not old or path.read_bytes() == b"old"


def test_a_block_that_writes_nothing_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="file cannot be written: No such file"), replacing(path, force=True):
        pass
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def refusal(path: Path, *, force: bool = False) -> str:
    with pytest.raises(OutputError) as refused:
        require_writable(path, force=force)
    with pytest.raises(OutputError) as again, replacing(path, force=force):
        pytest.fail("the block of a refused file was run")
    assert str(again.value) == str(refused.value)
    return str(refused.value)


def test_every_refusal_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    assert refusal(file) == f"{file} exists already: pass --force to replace it, or choose another name"
    for force in (True, False):
        assert refusal(tmp_path, force=force) == f"{tmp_path} is a folder: name a file in it"
    missing = tmp_path / "none" / "file"
    assert refusal(missing) == f"the folder {tmp_path / 'none'} does not exist: create it first"
    assert refusal(file / "below") == f"the folder {file} does not exist: create it first"
    long = tmp_path / ("x" * 300)
    assert refusal(long) == f"{long} cannot be written: File name too long"
    # the superuser may write anywhere, so the answer of the system is stood in for
    monkeypatch.setattr(os, "access", lambda folder, mode: not (folder == tmp_path and mode == os.W_OK))
    assert refusal(tmp_path / "new") == f"the folder {tmp_path} is read-only: choose another one"
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == b"old"


def test_what_can_be_written_is_not_refused(tmp_path: Path) -> None:
    require_writable(tmp_path / "new", force=False)
    (tmp_path / "old").write_bytes(b"")
    require_writable(tmp_path / "old", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_leaves_all_as_it_was(tmp_path: Path, old: bool) -> None:
    # a limit on the size of files stands in for the full disk; it can only be set for a whole process
    script = """
import resource, signal, sys
from pathlib import Path
from onnxlr.errors import OutputError
from onnxlr.files import replacing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with replacing(Path(sys.argv[1]), force=True) as temporary:
        temporary.write_bytes(bytes(10_000))
except OutputError as error:
    print(error)
"""
    path = tmp_path / "file"
    if old:
        path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{path} cannot be written: File too large\n"
    assert list(tmp_path.iterdir()) == ([path] if old else [])
    assert not old or path.read_bytes() == b"old"


def test_what_is_no_ordinary_file_is_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for force in (False, True):
        with pytest.raises(OutputError, match="pipe is no ordinary file"):
            require_writable(pipe, force=force)
    assert pipe.is_fifo()

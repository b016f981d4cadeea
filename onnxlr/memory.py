"""The memory that a model takes while it runs, measured in a process of its own.

What one process has taken once it seldom gives back, so a second model there would seem to need nothing. The process
below imports onnxruntime, notes its largest resident size so far, loads the model from its file and runs it; what the
largest resident size has grown by is the model's: weights, onnxruntime's copies of them, activations. Memory of a GPU
is not in it.
"""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from onnxlr.errors import ModelError
from onnxlr.model_io import save
from onnxlr.session import Session, import_onnxruntime

if TYPE_CHECKING:
    from onnxlr.data import Feed
    from onnxlr.model_io import Model

RUNS = 2
"""The second run takes what the first left to be taken."""

_STATUS = Path("/proc/self/status")


def peak_memory(model: Model, feed: Feed, *, provider: str = "cpu", threads: int = 0) -> int:
    """Bytes that loading a model and running it on one feed add to a fresh process.

    Parameters
    ----------
    model
        What is run; one that has no file is written to the temporary folder first.
    feed
        What every run gets.
    provider, threads
        As of `Session`.

    Raises
    ------
    ModelError
        The process fails: what it said last is in the message.
    OutputError
        The temporary folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="onnxlr.") as folder:
        path = model.path
        if path is None:
            path = Path(folder, "model.onnx")
            save(model, path, check=False)
        done = subprocess.run(
            # -P: whatever lies in the folder that one happens to be in is not imported
            [sys.executable, "-P", "-c", "from onnxlr.memory import answer; answer()"],
            input=pickle.dumps((path, feed, provider, threads)),
            capture_output=True,
            check=False,
        )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise ModelError(f"the memory of {path} could not be measured: {said[-1]}")
    return int(done.stdout)


def answer() -> None:
    """In the fresh process: read what to run from stdin, write the bytes to stdout."""
    path, feed, provider, threads = pickle.load(sys.stdin.buffer)
    import_onnxruntime()
    before = largest_resident()
    session = Session(path, provider=provider, threads=threads)
    for _ in range(RUNS):
        session.run(feed)
    sys.stdout.write(str(largest_resident() - before))


def largest_resident() -> int:
    """Bytes; `getrusage` would on Linux begin with what the parent had when it started this process."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Times of operators kept between processes, one file for each machine, onnxruntime, provider, threads and dtype.

A cache under `XDG_CACHE_HOME` (`~/.cache` where that is not set), written by `onnxlr profile` and read by
`onnxlr compress --max-latency`. It saves time and is never trusted: see `onnxlr.latency.Timings.recall`. A file that is
missing, damaged or out of proportion is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

from onnxlr.errors import OutputError
from onnxlr.files import replacing
from onnxlr.latency import Timings
from onnxlr.session import import_onnxruntime, provider_name
from onnxlr.threads import cores

FORMAT = "onnxlr-timings/2"


def recalled(*, provider: str = "cpu", threads: int = 0, dtype: str = "float32") -> tuple[Timings, bool]:
    """Timings with what an earlier process measured, as far as that still holds, and whether it does.

    Raises
    ------
    ConfigError, InstallError, ModelError
        As `Timings`.
    """
    timings, made_on = Timings(provider=provider, threads=threads, dtype=dtype), _made_on(provider, threads, dtype)
    try:
        document = json.loads(_path(made_on).read_text())
        held = document["format"] == FORMAT and document["made_on"] == made_on and timings.recall(document)
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        held = False
    return timings, held


def remember(timings: Timings, *, provider: str = "cpu", threads: int = 0, dtype: str = "float32") -> Path:
    """Keep what was measured for other processes, in the place of what an earlier one left; the file's path.

    Raises
    ------
    OutputError
        The cache folder cannot be made or written.
    """
    made_on = _made_on(provider, threads, dtype)
    path = _path(made_on)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache folder {path.parent} cannot be made: {error.strerror or error}; set XDG_CACHE_HOME to another"
        ) from error
    with replacing(path, force=True) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, "made_on": made_on, **timings.to_dict()}) + "\n")
    return path


def _path(made_on: dict[str, Any]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(json.dumps(made_on, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "onnxlr" / f"timings-{name}.json"


def _made_on(provider: str, threads: int, dtype: str) -> dict[str, Any]:
    """All that times depend on, but for the machine's pace."""
    runtime = import_onnxruntime()
    return {
        "machine": platform.node(),
        "processor": _processor(),
        "cores": cores(),
        "onnxruntime": f"{runtime.__version__} {runtime.get_build_info()}",
        "provider": provider_name(provider),
        "threads": threads,
        "dtype": dtype,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor()

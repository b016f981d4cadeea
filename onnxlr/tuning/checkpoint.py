"""Where a run stands, on disk: enough to go on as if it had never been stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from onnxlr.errors import ConfigError
from onnxlr.files import replacing

if TYPE_CHECKING:
    from pathlib import Path

    from onnxlr.config import Tuning
    from onnxlr.model_io import Model

_FORMAT = "onnxlr-checkpoint/1"


def run_identity(student: Model, teacher: Model, tuning: Tuning, **others: Any) -> str:
    """One string for all that decides a run: models, settings, and `others` in JSON types."""
    parts = [student.fingerprint(), teacher.fingerprint(), asdict(tuning), others]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def save_checkpoint(path: Path, identity: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint, whole or not at all.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    with replacing(path, force=True) as temporary:
        torch.save({"format": _FORMAT, "identity": identity, **state}, temporary)


def load_checkpoint(path: Path, identity: str) -> dict[str, Any] | None:
    """The state that was saved; None where there is no file yet.

    Raises
    ------
    ConfigError
        The file is no checkpoint, or that of another run.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"], state["identity"]
    except Exception as error:  # a file of another kind makes torch raise whatever it comes to
        raise ConfigError(f"{path} is not a checkpoint of onnxlr: name another file, or delete it") from error
    if found != (_FORMAT, identity):
        raise ConfigError(
            f"{path} is the checkpoint of another run (other models, data or settings): give the same ones to go on "
            "with it, name another file, or delete it"
        )
    return dict(state)

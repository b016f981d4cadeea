"""A plan in two files: what becomes of every weight as JSON, its arrays as safetensors that are mapped, not read."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxlr.choice import Cut
from onnxlr.files import replacing
from onnxlr.forms import Stored, Window
from onnxlr.targets import Plan
from onnxlr.tensor_file import map_tensors, write_tensors
from onnxlr.work import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ARRAYS = ("first", "second", "bias")
INDICES = ("inputs", "outputs")


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan to `path` (JSON) and its arrays beside it; `path` comes last, and whole.

    Raises
    ------
    OutputError
        They cannot be written.
    """
    arrays = {
        f"{name}/{field}": array
        for name, stored in plan.stored.items()
        for field in ARRAYS
        if (array := getattr(stored, field)) is not None
    }
    with replacing(_beside(path), force=True) as temporary:
        write_tensors(temporary, {}, {name: array.shape for name, array in arrays.items()}, arrays.values())
    document = {
        "cuts": {name: asdict(cut) for name, cut in plan.cuts.items()},
        "stored": {name: _described(stored) for name, stored in plan.stored.items()},
        "energy": plan.energy,
        "predicted": plan.predicted,
    }
    with replacing(path, force=True) as temporary:
        temporary.write_text(json.dumps(document))


def load_plan(path: Path) -> Plan:
    """What `save_plan` wrote."""
    document, arrays = read_json(path), map_tensors(_beside(path))
    return Plan(
        {name: Cut(**cut) for name, cut in document["cuts"].items()},
        {name: _stored(name, described, arrays) for name, described in document["stored"].items()},
        document["energy"],
        document["predicted"],
    )


def _beside(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _described(stored: Stored) -> dict[str, Any]:
    """All but the arrays."""
    indices = {field: getattr(stored, field) for field in INDICES}
    return {
        "window": None if stored.window is None else asdict(stored.window),
        "shared": stored.shared,
        "taps": stored.taps,
        **{field: None if index is None else index.tolist() for field, index in indices.items()},
    }


def _stored(name: str, described: dict[str, Any], arrays: dict[str, NDArray[np.float64]]) -> Stored:
    inputs, outputs = (None if described[field] is None else np.array(described[field]) for field in INDICES)
    return Stored(
        arrays.get(f"{name}/first"),
        arrays[f"{name}/second"],
        arrays.get(f"{name}/bias"),
        None if described["window"] is None else Window(**described["window"]),
        described["shared"],
        inputs,
        outputs,
        described["taps"],
    )

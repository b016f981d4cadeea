"""How the figures of the paper's claims look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path

GREY, ORANGE, BLUE, GREEN, RED = "#8c8c8c", "#e08a2e", "#1f6fb4", "#2a9d5c", "#c2403d"


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of `size` in inches and its axes [rows, columns]."""
    mpl.rcParams["svg.hashsalt"] = "onnxlr"  # the same figures give the same file
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.3)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write an SVG file."""
    figure.savefig(path, metadata={"Date": None})
    print(f"drawn: {path}")

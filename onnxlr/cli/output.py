"""Results on stdout, as tables or JSON; progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from onnxlr.gram import FORMAT
from onnxlr.report import plain, terminal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from onnxlr.case import Progress as ReportProgress
    from onnxlr.gram import Stats
    from onnxlr.polygraphy_files import Verdict


LINE_EVERY = 30.0
"""Seconds between lines of progress in a log."""


def show(renderables: Iterable[Any]) -> None:
    """Print tables and lines."""
    if sys.stdout is None:
        return
    # piped output is read by programs and logs: no line of it may depend on a terminal's width
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 100_000)
    for renderable in renderables:
        # a path or command broken into two lines cannot be copied: the terminal itself wraps lines of text
        console.print(renderable, soft_wrap=isinstance(renderable, str))


def show_json(document: Any) -> None:
    """Print as strict JSON: numbers that it does not have become strings."""
    click.echo(json.dumps(plain(document), indent=1, allow_nan=False))


def show_stats(stats: Stats, output: Path, as_json: bool, *, objective: str = "", reason: str = "") -> None:
    """Print what a moments file holds, and for which objective and why where that is known."""
    document = {
        "format": FORMAT,
        "output": str(output),
        "model": stats.model,
        "data": stats.data,
        "samples": stats.samples,
        "tensors": {key: {"rows": rows, "dim": dim} for key, (rows, dim) in stats.sizes.items()},
    }
    if objective:
        document |= {"objective": objective, "objective_reason": reason}
    if as_json:
        show_json(document)
    else:
        size = terminal.megabytes(output.stat().st_size)
        rows = sorted(count for count, _ in stats.sizes.values())
        taken = f" over {rows[0]:,} to {rows[-1]:,} rows" if rows else ""
        show([f"{stats.samples} samples, moments of {len(stats.moments)} tensors{taken}, {size}, written to {output}"])
        if objective:
            show([terminal.objective(objective, reason)])


def describe_verdict(verdict: Verdict) -> str:
    """One line on what Polygraphy's comparator found for an output."""
    limit, value = verdict.tolerance, "no figure" if verdict.value is None else f"{verdict.value:.4g}"
    statistic = {"mean": "mean", "elemwise": "largest", "quantile": f"{limit.quantile or 0:g} quantile of the"}
    return (
        f"output {verdict.name!r} {'passed' if verdict.passed else 'FAILED'} "
        f"({statistic[limit.statistic]} difference {value}, at most {limit.atol:.4g})"
    )


@contextmanager
def progress_bars(quiet: bool) -> Iterator[ReportProgress]:
    """Bars on stderr, one a stage; none where `quiet` is set.

    Where stderr is no terminal there are lines in place of bars, and those only for a stage that says how it stands.
    """
    console = Console(stderr=True)
    lines = not (quiet or console.is_terminal)
    spoken = time.monotonic()
    bars = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=console, transient=True, disable=quiet or not console.is_terminal,
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    with bars:

        def report(stage: str, done: int, total: int | None, note: str = "") -> None:
            if stage not in tasks:
                for task in bars.tasks:
                    bars.update(task.id, total=task.completed)
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], advance=done, note=note)
            nonlocal spoken
            if lines and note and time.monotonic() - spoken >= LINE_EVERY:
                spoken = time.monotonic()
                task = next(task for task in bars.tasks if task.id == tasks[stage])
                left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
                click.echo(f"onnxlr: {stage} {task.completed:.0f}/{total}: {note}{left}", err=True)

        yield report

"""The command that trains a compressed model."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from onnxlr.cli.group import cli
from onnxlr.cli.options import DATA, FILE, metric, reported, running, training
from onnxlr.cli.output import progress_bars, show, show_json
from onnxlr.config import Config
from onnxlr.report import terminal

if TYPE_CHECKING:
    from pathlib import Path

    from onnxlr.config import Tuning
    from onnxlr.data import ImageOptions


@cli.command()
@click.argument("dense", type=FILE)
@click.argument("small", type=FILE)
@click.option("--calib", required=True, help=f"The data that SMALL was calibrated on, or more of them: {DATA}")
@click.option("-o", "--output", required=True, type=FILE, help="Where to write the tuned model.")
@click.option("--labels", type=FILE, help="Labels, one a sample of --calib: .npy, .npz, .txt or .csv.")
@click.option("--loss", help="What labels are for: cross-entropy (the default with --metric top1), or module:function.")
@metric
@click.option("--checkpoint", type=FILE, help="Keep the state here while it runs; run again to go on from it.")
@click.option("--holdout-every", default=8, type=click.IntRange(min=2),
              help="One sample of so many is held out for validation, never trained on.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing file.")
@training
@running
@reported
def finetune(
    dense: Path, small: Path, calib: str, output: Path, labels: Path | None, loss: str | None,
    checkpoint: Path | None, force: bool, tuning: Tuning, images: ImageOptions,
    as_json: bool, quiet: bool, verbose: bool, **settings: Any,
) -> None:  # fmt: skip
    """Train SMALL to do what DENSE does.

    A part of the data is held out and watched: the result is never worse on it than SMALL.

    With several processes: torchrun --nproc-per-node 2 --no-python onnxlr finetune ...
    """
    from onnxlr.api import finetune as api

    with progress_bars(quiet) as progress:
        recovery = api(
            dense, small, calib, replace(tuning, loss=loss), Config(**settings), output=output, labels=labels,
            checkpoint=checkpoint, images=images, force=force, progress=progress,
        )  # fmt: skip
    if recovery is None:
        return
    if as_json:
        show_json({"format": "onnxlr-recovery/1", "output": str(output), **asdict(recovery)})
    else:
        show([*terminal.render_recovery(recovery, verbose=verbose), f"written to {output}"])

"""The commands that time models and their layers on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxlr.cli.group import cli
from onnxlr.cli.options import DATA, FILE, POSITIVE, common, parse_sizes, pictured, placed, rank_multiple
from onnxlr.cli.output import show, show_json
from onnxlr.report import terminal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from onnxlr.data import ImageOptions


@cli.command()
@click.argument("models", nargs=-1, required=True, type=FILE)
@click.option("--calib", help=f"Data to run, else made-up values: {DATA}")
@click.option("--batch", default="1,8", help="Samples in a run, or several sizes, separated by commas.")
@click.option("--runs", default=100, type=POSITIVE, help="Runs of every model at every size, at most.")
@click.option("--seconds", default=10.0, type=click.FloatRange(min=0), help="For all runs at one size, at most.")
@pictured
@placed
@common
def bench(
    models: Sequence[Path], calib: str | None, batch: str, runs: int, seconds: float, images: ImageOptions,
    as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Time MODELS against the first of them.

    In turn, run by run, so that the machine's other load and pace meet all alike; and the memory of each, in a process
    of its own.
    """
    from onnxlr.speed import bench as api

    done = api(models, calib, batch_sizes=parse_sizes(batch), runs=runs, seconds=seconds, images=images, **settings)
    if as_json:
        return show_json(done.to_dict())
    columns = ["model", "file", "memory", "batch", "median", "p10", "p90", "of the first", "p10", "p90", "runs"]
    rows = [
        (name, terminal.megabytes(done.file_bytes[i]), terminal.megabytes(done.peak_memory_bytes[i]), str(size),
         terminal.milliseconds(one.median_ms), terminal.milliseconds(one.p10_ms), terminal.milliseconds(one.p90_ms),
         f"{one.ratio:.3f}", f"{one.ratio_p10:.3f}", f"{one.ratio_p90:.3f}", str(one.runs))
        for size, latencies in done.latencies.items()
        for i, (name, one) in enumerate(zip(done.models, latencies, strict=True))
    ]  # fmt: skip
    return show([terminal.render_rows("Latency in turn, and memory at the largest batch", columns, rows)])


@cli.command()
@click.argument("model", type=FILE)
@click.option("--calib", help=f"Data whose first samples give the shapes, else made-up values: {DATA}")
@click.option("--batch", default=8, type=POSITIVE, help="Samples in a run, where the model leaves it free.")
@rank_multiple
@pictured
@placed
@common
def profile(model: Path, calib: str | None, images: ImageOptions, as_json: bool, **settings: Any) -> None:
    """Time the layers of MODEL, dense and as pairs.

    The times are kept for `compress --max-latency`, which measures some of them again before it believes the rest.
    """
    from onnxlr.speed import profile as api

    done = api(model, calib, images=images, **settings)
    if as_json:
        return show_json(done.to_dict())
    columns = ["shape", "rows", "weights", "dense", "break-even rank", "by time", "rank at half", "at half", "of dense"]
    rows = [
        (f"{one.d_in} x {one.d_out}" if one.groups == 1 else f"{one.groups} x {one.d_in} x {one.d_out}",
         str(one.rows), str(one.weights), f"{one.dense_us:.1f} us", f"{one.break_even:.1f}",
         str(one.break_even_by_time or "-"), terminal.number(one.half_rank, "d"),
         "-" if one.half_us is None else f"{one.half_us:.1f} us", terminal.percent(one.half_us, one.dense_us))
        for one in done.layers
    ]  # fmt: skip
    total = sum(one.weights * one.dense_us for one in done.layers)
    lines: list[Any] = [terminal.render_rows(f"Products of a batch of {done.batch}, {done.dtype}", columns, rows), ""]
    lines.append(
        f"all together {total / 1e3:.2f} ms dense; a run of the model takes {done.model_us / 1e3:.2f} ms"
        + (f"; {done.refused} weights have unknown rows" if done.refused else "")
    )
    since = "some measured again, the rest from an earlier profile" if done.recalled else "all measured now"
    lines.append(f"{since}; kept in {done.cache}")
    return show(lines)

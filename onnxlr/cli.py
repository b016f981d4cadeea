"""The command line: options in, API calls, tables or JSON out. No work is done here.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 an error of the tool or its input, 2 wrong
usage, 3 a target or gate was not met, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from onnxlr.config import OBJECTIVES, Config, Target
from onnxlr.data import ImageOptions
from onnxlr.errors import OnnxlrError
from onnxlr.report import terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from onnxlr.case import Progress as ReportProgress

FILE = click.Path(path_type=Path)
AXES = {"metavar": "H[xW]"}


def main() -> None:
    """Run the command line and end the process with its exit code."""
    warnings.showwarning = _show_warning
    try:
        code = cli.main(standalone_mode=False)
    except OnnxlrError as error:
        click.echo(f"onnxlr: error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("onnxlr: interrupted; no output was written", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"onnxlr: warning: {message}", err=True)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
    @click.option("-v", "--verbose", is_flag=True, help="Every weight and operator, with reasons.")
    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    return wrapped


def running(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of commands that run a model."""

    @click.option("--provider", default="cpu", show_default=True,
                  help="Execution provider: cpu, cuda, tensorrt, ... or onnxruntime's own name.")  # fmt: skip
    @click.option("--threads", default=0, show_default=True, help="Threads of an operator; 0 is one a core.")
    @click.option("--batch", default=8, show_default=True, help="Samples in a batch, where the model leaves it free.")
    @click.option("--mask", metavar="INPUT", help="Input that is nonzero where a token is real, for padded batches.")
    @click.option("--images", "convention", default="unit", show_default=True,
                  type=click.Choice(["unit", "torchvision", "timm"]),
                  help="How images become inputs: values in [0, 1], or a library's convention.")  # fmt: skip
    @click.option("--mean", metavar="V[,V,V]", help="Image mean by channel, in place of the convention's.")
    @click.option("--std", metavar="V[,V,V]", help="Image standard deviation by channel.")
    @click.option("--resize", metavar="H[xW]", help="Resize images: the shorter side, or height and width.")
    @wraps(command)
    def wrapped(
        *args: Any, convention: str, mean: str | None, std: str | None, resize: str | None, **kwargs: Any
    ) -> Any:
        return command(*args, images=_image_options(convention, mean, std, resize), **kwargs)

    return wrapped


def selecting(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of commands that choose weights and gather moments of them."""

    @click.option("--include", multiple=True, metavar="PATTERN", help="Only weights or sites that match; repeatable.")
    @click.option("--exclude", multiple=True, metavar="PATTERN", help="No weights or sites that match; repeatable.")
    @click.option("--holdout-every", default=8, show_default=True,
                  help="One sample of so many is held out for validation, never calibrated on.")  # fmt: skip
    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    return wrapped


def _image_options(convention: str, mean: str | None, std: str | None, resize: str | None) -> ImageOptions:
    from dataclasses import replace

    options = ImageOptions.convention(convention)
    try:
        if mean is not None:
            options = replace(options, mean=tuple(float(value) for value in mean.split(",")))
        if std is not None:
            options = replace(options, std=tuple(float(value) for value in std.split(",")))
        if resize is not None:
            sides = tuple(int(side) for side in resize.lower().split("x"))
            options = replace(options, resize=sides[0] if len(sides) == 1 else (sides[0], sides[1]))
    except (ValueError, IndexError):
        given = next(v for v in (mean, std, resize) if v is not None)
        raise click.UsageError(
            f"not a number, or a list of them: {given!r} (--mean 0.5,0.5,0.5, --resize 256x256)"
        ) from None
    return options


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="onnxlr")
def cli() -> None:
    """Low-rank compression of ONNX models: smaller and faster, with evidence.

    Exit codes: 0 done, 1 error, 2 wrong usage, 3 a target or gate was not met, 130 interrupted.
    """


@cli.command()
@common
def demo(as_json: bool, quiet: bool, verbose: bool) -> None:
    """Compress the vision transformer that comes with onnxlr, and show what it costs."""
    from onnxlr.demo import run_demo

    with _progress(quiet) as progress:
        result = run_demo(progress)
    if as_json:
        _print_json(result.to_dict())
    else:
        _print(result.render(verbose=verbose))


@cli.command()
@click.argument("model", type=FILE)
@click.option("--provider", default="cpu", help="Execution provider that the shapes are measured with.")
@common
def inspect(model: Path, provider: str, as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the linear operators of MODEL: what can be compressed, what cannot, why, and how much of it they are."""
    from onnxlr.case import inspect as api

    found = api(model, provider=provider)
    inventory = found.inventory
    if as_json:
        return _print_json(found.to_dict())
    total, macs = inventory.parameters, inventory.macs
    weights = [
        (w.name, ", ".join(w.labels), f"{w.d_in} x {w.d_out}", w.dtype, terminal.percent(w.parameters, total),
         terminal.percent(w.macs, macs))
        for w in inventory.weights
    ]  # fmt: skip
    refusals = [
        (r.name, r.op, terminal.percent(r.parameters, total), terminal.percent(r.macs, macs), r.reason)
        for r in inventory.refusals
    ]
    covered = sum(weight.parameters for weight in inventory.weights)
    covered_macs = sum(weight.macs or 0 for weight in inventory.weights)
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in found.shapes_of.items())
    return _print(
        [
            terminal.render_rows(
                "Can be compressed", ["weight", "sites", "shape", "dtype", "parameters", "MACs"], weights
            ),
            "",
            terminal.render_rows("Cannot", ["operator", "op", "parameters", "MACs", "why"], refusals),
            "",
            f"{terminal.count(total)} parameters, {terminal.percent(covered, total)} of them in "
            f"{len(weights)} weights that can be compressed",
            f"{terminal.count(macs)} MACs, {terminal.percent(covered_macs, macs)} of them there"
            if found.problem is None
            else f"MACs are unknown: {found.problem}",
            f"MACs are those of one sample: {shapes}" if found.problem is None else "",
        ]
    )


@cli.command()
@click.argument("model", type=FILE)
@click.option("--calib", required=True, help="Calibration data: a folder or file, see the README.")
@click.option("--energy", default="0.99", help="Share of energy, or several, separated by commas.")
@click.option("--stats", type=FILE, help="Moments gathered with `calibrate --objective utilized`.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the result as CSV.")
@selecting
@running
@common
def analyze(
    model: Path, calib: str, energy: str, stats: Path | None, as_csv: bool, images: ImageOptions,
    as_json: bool, quiet: bool, verbose: bool, **settings: Any,
) -> None:  # fmt: skip
    """How much of its rank every layer of MODEL uses on the data (arXiv 2407.04797), and their mean (MLU)."""
    from onnxlr.analyze import analyze as api
    from onnxlr.gram import Stats

    try:
        energies = [float(value) for value in energy.split(",")]
    except ValueError:
        raise click.UsageError(f"--energy {energy!r} is not a number, or several separated by commas") from None
    config = _config(Target(), settings)
    moments = None if stats is None else Stats.load(stats)
    with _progress(quiet) as progress:
        analysis = api(model, calib, config, energies=energies, stats=moments, images=images, progress=progress)
    if as_json:
        return _print_json(asdict(analysis))
    columns = ["weight", "sites", "shape", "energy", "k_T", "k_S", "utilized rank", "utilization"]
    rows = [
        (w.name, " ".join(w.sites), f"{w.d_in} x {w.d_out}", f"{u.energy:g}", str(u.k_input), str(u.k_output),
         str(u.rank), f"{u.utilization:.4f}")
        for w in analysis.weights
        for u in w.at
    ]  # fmt: skip
    if as_csv:
        import csv

        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        return writer.writerows(rows)
    means = [f"mean layer utilization at {e:g} of the energy: {mlu:.4f}" for e, mlu in analysis.mlu.items()]
    return _print([terminal.render_rows("Utilization", columns, rows), *means])


@cli.command()
@click.argument("model", type=FILE)
@click.option("--calib", required=True, help="Calibration data: a folder or file, see the README.")
@click.option("-o", "--output", required=True, type=FILE, help="Where to write the moments (.safetensors).")
@click.option("--objective", type=click.Choice(OBJECTIVES), default="output", help="What the moments are for.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@selecting
@running
@common
def calibrate(
    model: Path, calib: str, output: Path, objective: Any, force: bool, images: ImageOptions,
    as_json: bool, quiet: bool, verbose: bool, **settings: Any,
) -> None:  # fmt: skip
    """Gather the second moments of MODEL on the data, for `compress --stats` and `merge`."""
    from onnxlr.case import calibrate as api
    from onnxlr.files import require_writable

    require_writable(output, force=force)
    with _progress(quiet) as progress:
        stats = api(model, calib, _config(Target(), settings, objective=objective), images=images, progress=progress)
    stats.save(output, force=force)
    _print_stats(stats, output, as_json)


@cli.command()
@click.argument("stats", nargs=-1, required=True, type=FILE)
@click.option("-o", "--output", required=True, type=FILE, help="Where to write the sum (.safetensors).")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@common
def merge(stats: Sequence[Path], output: Path, force: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Add up the moments of shards: exactly those of one pass over all their data."""
    from onnxlr.files import require_writable
    from onnxlr.gram import Stats

    require_writable(output, force=force)
    total, *rest = (Stats.load(path) for path in stats)
    for shard in rest:
        total = total + shard
    total.save(output, force=force)
    _print_stats(total, output, as_json)


@cli.command()
@click.argument("model", type=FILE)
@click.option("--calib", required=True, help="Calibration data: a folder or file, see the README.")
@click.option("-o", "--output", required=True, type=FILE, help="Where to write the compressed model.")
@click.option("--objective", type=click.Choice(OBJECTIVES), default="output", help="What a factorization minimises.")
@click.option("--energy", type=float, help="Target: the share of the energy that every weight keeps.")
@click.option("--keep-params", type=float, help="Target: the share of the whole model's parameters to keep.")
@click.option("--keep-macs", type=float, help="Target: the share of the whole model's MACs to keep.")
@click.option("--max-error", type=float,
              help="Target: the relative error of the outputs on held-out data.  [default: 0.05]")  # fmt: skip
@click.option("--min-metric-kept", type=float, help="Target: the share of the task metric to keep, with --labels.")
@click.option("--labels", type=FILE, help="Labels, one a sample of --calib: .npy, .npz, .txt or .csv.")
@click.option("--metric", default="top1", help="Task metric: top1, or module:function.")
@click.option(
    "--rank", "ranks", multiple=True, metavar="PATTERN=R", help="Give matching weights this rank; repeatable."
)
@click.option("--rank-multiple", default=16, help="Ranks are multiples of this: hardware runs them faster.")
@click.option("--margin", default=0.85, help="No rank above this share of the break-even rank.")
@click.option("--stats", type=FILE, help="Moments to use in place of calibration, from `calibrate` or `merge`.")
@click.option("--report", type=FILE, help="Write the whole report here, as JSON.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@selecting
@running
@common
def compress(
    model: Path, calib: str, output: Path, objective: Any, labels: Path | None, ranks: Sequence[str],
    stats: Path | None, report: Path | None, force: bool, images: ImageOptions,
    as_json: bool, quiet: bool, verbose: bool, **settings: Any,
) -> None:  # fmt: skip
    """Compress MODEL with the data, check it on held-out data, and report.

    One target at a time; without any, the smallest model within --max-error 0.05 is searched.
    """
    from onnxlr.files import require_writable
    from onnxlr.gram import Stats
    from onnxlr.pipeline import compress as api

    kinds = ("energy", "keep_params", "keep_macs", "max_error", "min_metric_kept")
    targets = {kind: value for kind in kinds if (value := settings.pop(kind)) is not None}
    if len(targets) > 1:
        given = " and ".join(f"--{kind.replace('_', '-')}" for kind in targets)
        raise click.UsageError(f"{given} are given, one target at a time: keep one")
    target = Target(*next(iter(targets.items()))) if targets else Target()  # type: ignore[arg-type]
    config = _config(target, settings, objective=objective, ranks=_ranks(ranks))
    if report is not None:
        require_writable(report, force=force)
    moments = None if stats is None else Stats.load(stats)
    with _progress(quiet) as progress:
        done = api(
            model, calib, config, output=output, labels=labels, stats=moments, images=images, force=force,
            progress=progress,
        )  # fmt: skip
    if report is not None:
        done.save(report, force=force)
    if as_json:
        _print_json(done.to_dict())
    else:
        _print(terminal.render_report(done, verbose=verbose))


@cli.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--data", required=True, help="Validation data: a folder or file, as --calib elsewhere.")
@click.option("--labels", type=FILE, help="Labels, one a sample of --data: .npy, .npz, .txt or .csv.")
@click.option("--metric", default="top1", help="Task metric: top1, or module:function.")
@click.option("--max-error", type=float, default=0.05, help="Gate: the relative error of B's outputs.")
@click.option("--polygraphy", "folder", type=FILE, help="Write what `polygraphy run` needs to repeat the verdict.")
@click.option("--polygraphy-samples", default=8, help="Samples that Polygraphy compares.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@running
@common
def validate(
    a: Path, b: Path, data: str, labels: Path | None, max_error: float, folder: Path | None, polygraphy_samples: int,
    force: bool, images: ImageOptions, as_json: bool, quiet: bool, verbose: bool, **settings: Any,
) -> int:  # fmt: skip
    """Compare model B with model A on data: parity by output, the task metric, and Polygraphy's verdict.

    Exit code 3 when B's relative error is above --max-error, or Polygraphy's comparator fails.
    """
    from itertools import islice

    from onnxlr.data import batches, load_labels, open_data
    from onnxlr.model_io import load
    from onnxlr.polygraphy_files import run_comparator, write_polygraphy
    from onnxlr.session import Session
    from onnxlr.validate import validate as api

    first, second = load(a), load(b)
    inputs = Session(first, provider=settings["provider"], optimize=False).inputs
    samples = open_data(data, inputs, images=images)
    with _progress(quiet) as progress:
        result = api(
            first, second, samples, labels=None if labels is None else load_labels(labels), max_error=max_error,
            progress=lambda done: progress("validate", done, None), **settings,
        )  # fmt: skip
    feeds = list(batches(islice(samples, polygraphy_samples), settings["batch"], inputs))
    gate = {"max_error": max_error, "provider": settings["provider"]}
    if folder is None:
        verdicts = run_comparator(a, b, feeds, **gate)
    else:
        verdicts = write_polygraphy(folder, a, b, feeds, force=force, **gate)
    if as_json:
        _print_json({**result.to_dict(), "polygraphy": [asdict(verdict) for verdict in verdicts]})
    else:
        _print(terminal.render_validation(result))
        _print(f"polygraphy on {len(feeds)} feeds: {v.name} {'passed' if v.passed else 'FAILED'}" for v in verdicts)
        if folder is not None:
            _print([f"repeat with: sh {folder / 'run.sh'}"])
    return 0 if result.passed and all(verdict.passed for verdict in verdicts) else 3


def _ranks(pairs: Iterable[str]) -> dict[str, int]:
    ranks = {}
    for pair in pairs:
        pattern, separator, rank = pair.rpartition("=")
        if not separator or not pattern or not rank.isdigit():
            raise click.UsageError(f"--rank {pair!r} is not of the form PATTERN=R, such as --rank '*.fc1*=64'")
        ranks[pattern] = int(rank)
    return ranks


def _config(target: Target, settings: dict[str, Any], **more: Any) -> Config:
    return Config(target=target, **settings, **more)


def _print(renderables: Iterable[Any]) -> None:
    # piped output is read by programs and logs: no line of it may depend on a terminal's width
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    for renderable in renderables:
        console.print(renderable)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=1, default=str))


def _print_stats(stats: Any, output: Path, as_json: bool) -> None:
    document = {
        "output": str(output),
        "model": stats.model,
        "data": stats.data,
        "samples": stats.samples,
        "tensors": {key: {"rows": value.count, "dim": value.dim} for key, value in stats.moments.items()},
    }
    if as_json:
        _print_json(document)
    else:
        size = terminal.megabytes(os.path.getsize(output))  # noqa: PTH202
        _print([f"{stats.samples} samples, moments of {len(stats.moments)} tensors, {size}, written to {output}"])


@contextmanager
def _progress(quiet: bool) -> Iterator[ReportProgress]:
    console = Console(stderr=True)
    bars = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=quiet or not console.is_terminal,
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    with bars:

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.advance(tasks[stage], done)

        yield report

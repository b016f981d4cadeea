"""The command line: options in, API calls, tables or JSON out. No work is done here.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 an error of the tool or its input, 2 wrong
usage, 3 a target or gate was not met, 130 interrupted.
"""

from __future__ import annotations

import json
import math
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
    from onnxlr.polygraphy_files import Verdict

FILE = click.Path(path_type=Path)
SHARE = click.FloatRange(0, 1, min_open=True)
POSITIVE = click.IntRange(min=1)
DATA = (
    "a folder of .npz, .npy, images or test_data_set_*, or a file: .npz, .npy, .json (Polygraphy inputs), "
    ".py (a script with load_data())."
)


def main() -> None:
    """Run the command line and end the process with its exit code."""
    warnings.showwarning = _show_warning
    try:
        code = cli.main(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OnnxlrError as error:
        click.echo(f"onnxlr: error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("onnxlr: interrupted; no half-written file is left", err=True)
        sys.exit(130)
    except BrokenPipeError:
        _discard_stdout()
        sys.exit(1)
    except OSError as error:
        # every file that a stage reads or writes has an error of its own: what is left is stdout
        click.echo(f"onnxlr: error: the result cannot be printed: {error.strerror or error}", err=True)
        _discard_stdout()
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _discard_stdout() -> None:
    # what is still buffered would fail again, with a traceback, when the interpreter closes the stream
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Group(click.Group):
    """Commands whose interruption reaches `main` as it is: click would print an empty line first."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None


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

    @click.option("--provider", default="cpu",
                  help="Execution provider: cpu, cuda, tensorrt, ... or onnxruntime's own name.")  # fmt: skip
    @click.option("--threads", default=0, type=click.IntRange(min=0), help="Threads of an operator; 0 is one a core.")
    @click.option("--batch", default=8, type=POSITIVE, help="Samples in a batch, where the model leaves it free.")
    @click.option("--mask", metavar="INPUT", help="Input that is nonzero where a token is real, for padded batches.")
    @click.option("--images", "convention", default="unit",
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
    @click.option("--holdout-every", default=8, type=click.IntRange(min=2),
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


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="onnxlr")
def cli() -> None:
    """Low-rank compression of ONNX models: smaller and faster, with evidence.

    Exit codes: 0 done, 1 error, 2 wrong usage, 3 a target or gate was not met, 130 interrupted.
    """


@cli.command()
@common
def demo(as_json: bool, quiet: bool, verbose: bool) -> None:
    """Compress the model that comes with onnxlr.

    A vision transformer for Fashion-MNIST, at several sizes: accuracy, parity and latency on images it never saw.
    """
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
    """List what can be compressed in MODEL.

    Every linear operator, those that cannot be compressed with the reason, and how much of the model they are.
    """
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
    lines: list[Any] = []
    if weights:
        columns = ["weight", "sites", "shape", "dtype", "parameters", "MACs"]
        lines += [terminal.render_rows("Can be compressed", columns, weights), ""]
    if refusals:
        columns = ["operator", "op", "parameters", "MACs", "why"]
        lines += [terminal.render_rows("Cannot be compressed", columns, refusals), ""]
    if not (weights or refusals):
        lines.append("no linear operator with a constant weight: there is nothing to compress")
    covered = terminal.percent(sum(weight.parameters for weight in inventory.weights), total)
    covered_macs = terminal.percent(sum(weight.macs or 0 for weight in inventory.weights), macs)
    share = f", {covered} of them in {len(weights)} weights that can be compressed" if weights else ""
    lines.append(f"{terminal.count(total)} parameters{share}")
    if found.problem is not None:
        lines.append(f"MACs are unknown: {found.problem}")
    elif macs is not None:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in found.shapes_of.items())
        share = f", {covered_macs} of them there" if weights else ""
        lines.append(f"{terminal.count(macs)} MACs{share}, for one sample: {shapes}")
    return _print(lines)


@cli.command()
@click.argument("model", type=FILE)
@click.option("--calib", required=True, help=f"Calibration data: {DATA}")
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
    """Measure how much of its rank a layer uses.

    By layer of MODEL, on the data: the ranks that hold the energy of its inputs and outputs, its utilization, and
    their mean (MLU); see arXiv 2407.04797.
    """
    from onnxlr.analyze import analyze as api
    from onnxlr.gram import Stats

    if as_csv and as_json:
        raise click.UsageError("--csv and --json are given: keep one")
    try:
        energies = [float(value) for value in energy.split(",")]
    except ValueError:
        raise click.UsageError(f"--energy {energy!r} is not a number, or several separated by commas") from None
    config = _config(Target(), settings)
    moments = None if stats is None else Stats.load(stats)
    with _progress(quiet) as progress:
        analysis = api(model, calib, config, energies=energies, stats=moments, images=images, progress=progress)
    if as_json:
        return _print_json({"format": "onnxlr-analysis/1", **asdict(analysis)})
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
    if not rows:
        means = ["no weight to analyze: `onnxlr inspect` lists what can be compressed and what cannot, and why"]
    return _print([*([terminal.render_rows("Utilization", columns, rows)] if rows else []), *means])


@cli.command()
@click.argument("model", type=FILE)
@click.option("--calib", required=True, help=f"Calibration data: {DATA}")
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
    """Gather the moments of MODEL on data.

    A file for `compress --stats`, `analyze --stats` and `merge`.
    """
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
    """Add up the moments of several shards.

    They are exactly those of one pass over the data of all.
    """
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
@click.option("--calib", required=True, help=f"Calibration data: {DATA}")
@click.option("-o", "--output", required=True, type=FILE, help="Where to write the compressed model.")
@click.option("--objective", type=click.Choice(OBJECTIVES), default="output", help="What a factorization minimises.")
@click.option("--energy", type=SHARE, help="Target: the share of the energy that every weight keeps.")
@click.option("--keep-params", type=SHARE, help="Target: the share of the whole model's parameters to keep.")
@click.option("--keep-macs", type=SHARE, help="Target: the share of the whole model's MACs to keep.")
@click.option("--max-error", type=click.FloatRange(min=0, min_open=True),
              help="Target: the relative error of the outputs on held-out data.  [default: 0.05]")  # fmt: skip
@click.option("--min-metric-kept", type=SHARE, help="Target: the share of the task metric to keep, with --labels.")
@click.option("--labels", type=FILE, help="Labels, one a sample of --calib: .npy, .npz, .txt or .csv.")
@click.option("--metric", default="top1", help="Task metric: top1, or module:function.")
@click.option(
    "--rank", "ranks", multiple=True, metavar="PATTERN=R", help="Give matching weights this rank; repeatable."
)
@click.option("--rank-multiple", default=16, type=POSITIVE, help="Ranks are multiples of it, as hardware likes them.")
@click.option("--margin", default=0.85, type=SHARE, help="No rank above this share of the break-even rank.")
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
    """Compress MODEL, check it, and report.

    A part of the data is held out: nothing is calibrated on it, and the result is validated on it.

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
        if report.resolve() == output.resolve():
            raise click.UsageError(f"--output and --report are the same file, {output}: name two")
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
@click.option("--data", required=True, help=f"Validation data: {DATA}")
@click.option("--labels", type=FILE, help="Labels, one a sample of --data: .npy, .npz, .txt or .csv.")
@click.option("--metric", default="top1", help="Task metric: top1, or module:function.")
@click.option("--max-error", type=click.FloatRange(min=0), default=0.05, help="Gate: relative error of B's outputs.")
@click.option("--polygraphy", "folder", type=FILE, help="Write what `polygraphy run` needs to repeat the verdict.")
@click.option("--polygraphy-samples", default=8, type=POSITIVE, help="Samples that Polygraphy compares.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@running
@common
def validate(
    a: Path, b: Path, data: str, labels: Path | None, max_error: float, folder: Path | None, polygraphy_samples: int,
    force: bool, images: ImageOptions, as_json: bool, quiet: bool, verbose: bool, **settings: Any,
) -> int:  # fmt: skip
    """Compare model B with model A on data.

    Parity by output, the task metric where there are labels, and Polygraphy's verdict.

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
    sampled = list(islice(samples, polygraphy_samples))
    feeds = list(batches(sampled, settings["batch"], inputs))
    gate = {"max_error": max_error, "provider": settings["provider"]}
    if folder is None:
        verdicts = run_comparator(a, b, feeds, **gate)
    else:
        verdicts = write_polygraphy(folder, a, b, feeds, force=force, **gate)
    if as_json:
        opinions = [asdict(verdict) for verdict in verdicts]
        _print_json({"format": "onnxlr-validation/1", **result.to_dict(), "polygraphy": opinions})
    else:
        _print(terminal.render_validation(result))
        _print(f"polygraphy on {len(sampled)} samples: {_verdict(verdict)}" for verdict in verdicts)
        if folder is not None:
            _print([f"repeat with: sh {folder / 'run.sh'}"])
    return 0 if result.passed and all(verdict.passed for verdict in verdicts) else 3


def _verdict(verdict: Verdict) -> str:
    limit, value = verdict.tolerance, "no figure" if verdict.value is None else f"{verdict.value:.4g}"
    statistic = {"mean": "mean", "elemwise": "largest", "quantile": f"{limit.quantile or 0:g} quantile of the"}
    return (
        f"output {verdict.name!r} {'passed' if verdict.passed else 'FAILED'} "
        f"({statistic[limit.statistic]} difference {value}, at most {limit.atol:.4g})"
    )


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
    if sys.stdout is None:
        return
    # piped output is read by programs and logs: no line of it may depend on a terminal's width
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 100_000)
    for renderable in renderables:
        # a path or command broken into two lines cannot be copied: the terminal itself wraps lines of text
        console.print(renderable, soft_wrap=isinstance(renderable, str))


def _print_json(document: Any) -> None:
    click.echo(json.dumps(_strict(document), indent=1, allow_nan=False))


def _strict(document: Any) -> Any:
    """The document with null for NaN and infinity, which JSON does not have."""
    if isinstance(document, dict):
        return {key: _strict(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_strict(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def _print_stats(stats: Any, output: Path, as_json: bool) -> None:
    document = {
        "format": "onnxlr-moments/1",
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
                for task in bars.tasks:
                    bars.update(task.id, total=task.completed)
                tasks[stage] = bars.add_task(stage, total=total)
            bars.advance(tasks[stage], done)

        yield report

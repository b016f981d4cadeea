"""The commands that run a model on data. Each imports the stages that it needs when it runs."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from onnxlr.cli.group import cli
from onnxlr.cli.options import (
    DATA,
    FILE,
    POSITIVE,
    SHARE,
    common,
    metric,
    parse_forms,
    parse_ranks,
    rank_multiple,
    reported,
    resumed,
    running,
    selecting,
    training,
    watched,
)
from onnxlr.cli.output import describe_verdict, progress_bars, show, show_json, show_stats
from onnxlr.config import ALLOCATIONS, FORMS, OBJECTIVES, TARGETS, THENS, Config, Target, Tuning
from onnxlr.report import terminal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from onnxlr.data import ImageOptions
    from onnxlr.polygraphy_files import Verdict
    from onnxlr.session import Session


NO_POLYGRAPHY = "polygraphy is left out: it compares numbers that numpy has a type for, neither text nor bfloat16"


@cli.command()
@reported
def demo(as_json: bool, quiet: bool, verbose: bool) -> None:
    """Compress the model that comes with onnxlr.

    A vision transformer for Fashion-MNIST, at several sizes: accuracy, parity and latency on images it never saw.
    """
    from onnxlr.demo import run_demo

    with progress_bars(quiet) as progress:
        result = run_demo(progress)
    if as_json:
        show_json(result.to_dict())
    else:
        show(result.render(verbose=verbose))


@cli.command()
@click.argument("model", type=FILE)
@click.option("--calib", required=True, help=f"Calibration data: {DATA}")
@click.option("--energy", default="0.99", help="Share of energy, or several, separated by commas.")
@click.option("--stats", type=FILE, help="Moments gathered with `calibrate --objective utilized`.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the result as CSV.")
@selecting
@running
@watched
def analyze(
    model: Path, calib: str, energy: str, stats: Path | None, as_csv: bool, images: ImageOptions,
    as_json: bool, quiet: bool, **settings: Any,
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
    config = Config(**settings)
    moments = None if stats is None else Stats.load(stats)
    with progress_bars(quiet) as progress:
        analysis = api(model, calib, config, energies=energies, stats=moments, images=images, progress=progress)
    if as_json:
        return show_json({"format": "onnxlr-analysis/1", **asdict(analysis)})
    columns = ["weight", "sites", "shape", "energy", "k_T", "k_S", "utilized rank", "utilization"]
    rows = [
        (w.name, " ".join(w.sites), f"{w.d_in} x {w.d_out}", f"{u.energy:g}", str(u.k_input), str(u.k_output),
         str(u.rank), f"{u.utilization:.4f}")
        for w in analysis.weights
        for u in w.at
    ]  # fmt: skip
    if as_csv:
        import csv

        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        return click.echo(text.getvalue(), nl=False)
    means = [f"mean layer utilization at {e:g} of the energy: {mlu:.4f}" for e, mlu in analysis.mlu.items()]
    if not rows:
        means = ["no weight to analyze: `onnxlr inspect` lists what can be compressed and what cannot, and why"]
    table = [terminal.render_rows("Utilization", columns, rows)] if rows else []
    return show([*table, *means, *analysis.notes])


@cli.command()
@click.argument("model", type=FILE)
@click.option("--calib", required=True, help=f"Calibration data: {DATA}")
@click.option("-o", "--output", required=True, type=FILE, help="Where to write the moments (.safetensors).")
@click.option("--objective", type=click.Choice(OBJECTIVES), default="auto", help="What the moments are for.")
@click.option("--forms", default=",".join(FORMS), help="What they are for: without width they are gathered sooner.")
@click.option("--labels", type=FILE, help="Labels for --loss, one a sample of --calib: .npy, .npz, .txt or .csv.")
@click.option("--loss", help="Gradients of a loss on --labels: cross-entropy, or module:function.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@resumed
@selecting
@running
@watched
def calibrate(
    model: Path, calib: str, output: Path, objective: Any, forms: str, labels: Path | None, force: bool,
    work: Path | None,
    images: ImageOptions,
    as_json: bool, quiet: bool, **settings: Any,
) -> None:  # fmt: skip
    """Gather the moments of MODEL on data.

    A file for `compress --stats`, `analyze --stats` and `merge`.
    """
    from onnxlr.api import calibrate as api
    from onnxlr.files import require_writable
    from onnxlr.gathered import resolve

    require_writable(output, force=force)
    config = Config(objective=objective, forms=parse_forms(forms), **settings)
    with progress_bars(quiet) as progress:
        stats = api(
            model, calib, config, labels=labels, images=images, work=work, output=output, force=force, progress=progress
        )
    resolved, why = resolve(config, stats)
    show_stats(stats, output, as_json, objective=resolved.objective, reason=why)


@cli.command()
@click.argument("stats", nargs=-1, required=True, type=FILE)
@click.option("-o", "--output", required=True, type=FILE, help="Where to write the sum (.safetensors).")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@common
def merge(stats: Sequence[Path], output: Path, force: bool, as_json: bool) -> None:
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
    show_stats(total, output, as_json)


@cli.command()
@click.argument("model", type=FILE)
@click.option("--calib", required=True, help=f"Calibration data: {DATA}")
@click.option("-o", "--output", required=True, type=FILE, help="Where to write the compressed model.")
@click.option("--objective", type=click.Choice(OBJECTIVES), default="auto",
              help="What a factorization minimises; auto: fisher where there are gradients, else output.")  # fmt: skip
@click.option("--energy", type=SHARE, help="Target: the share of the energy that every weight keeps.")
@click.option("--keep-params", type=SHARE, help="Target: the share of the whole model's parameters to keep.")
@click.option("--keep-macs", type=SHARE, help="Target: the share of the whole model's MACs to keep.")
@click.option("--max-latency", type=SHARE, help="Target: the share of the dense model's latency, measured.")
@click.option("--max-error", type=click.FloatRange(min=0, min_open=True),
              help="Target: the relative error of the outputs on held-out data.  [default: 0.05]")  # fmt: skip
@click.option("--min-metric-kept", type=SHARE, help="Target: the share of the task metric to keep, with --labels.")
@click.option("--labels", type=FILE, help="Labels, one a sample of --calib: .npy, .npz, .txt or .csv.")
@click.option("--loss", help="Gradients of a loss on --labels: cross-entropy, or module:function.")
@metric
@click.option(
    "--rank", "ranks", multiple=True, metavar="PATTERN=R", help="Give matching weights this rank; repeatable."
)
@rank_multiple
@click.option("--margin", default=0.85, type=SHARE, help="No factors that keep more than this share of a weight.")
@click.option("--floor", default=0.0, type=click.FloatRange(0, 1, max_open=True),
              help="No rank or hidden width below this share of the full one.")  # fmt: skip
@click.option("--forms", default=",".join(FORMS), help="What may be made of weights, separated by commas.")
@click.option("--allocation", default="global", type=click.Choice(ALLOCATIONS),
              help="One budget for the whole model, or the same share for every weight.")  # fmt: skip
@click.option("--rounds", default=1, type=click.IntRange(min=0),
              help="How often importances are measured again at the plan that was found.")  # fmt: skip
@click.option("--stats", type=FILE, help="Moments to use in place of calibration, from `calibrate` or `merge`.")
@click.option("--finetune", is_flag=True, help="Train the compressed model to do what MODEL does; needs torch.")
@click.option("--then", type=click.Choice(THENS),
              help="Store the result in fewer bits: 8-bit weights, activations too, or half precision.")  # fmt: skip
@click.option("--report", type=FILE, help="Write the whole report here, as JSON.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@resumed
@training
@selecting
@running
@reported
def compress(
    model: Path, calib: str, output: Path, objective: Any, forms: str, labels: Path | None, ranks: Sequence[str],
    stats: Path | None, finetune: bool, tuning: Tuning, report: Path | None, force: bool, work: Path | None,
    images: ImageOptions, as_json: bool, quiet: bool, verbose: bool, **settings: Any,
) -> None:  # fmt: skip
    """Compress MODEL, check it, and report.

    A part of the data is held out: nothing is calibrated on it, and the result is validated on it.

    One target at a time; without any, the smallest model within --max-error 0.05 is searched.
    """
    from onnxlr.files import require_writable
    from onnxlr.gram import Stats
    from onnxlr.pipeline import compress as api

    targets = {kind: value for kind in TARGETS if (value := settings.pop(kind)) is not None}
    if len(targets) > 1:
        given = " and ".join(f"--{kind.replace('_', '-')}" for kind in targets)
        raise click.UsageError(f"{given} are given, one target at a time: keep one")
    if not finetune and tuning != Tuning():
        raise click.UsageError("options of training are given without --finetune: add it, or leave them out")
    target = Target(*next(iter(targets.items()))) if targets else Target()
    config = Config(objective=objective, target=target, ranks=parse_ranks(ranks), forms=parse_forms(forms), **settings)
    if report is not None:
        require_writable(report, force=force)
        if report.resolve() == output.resolve():
            raise click.UsageError(f"--output and --report are the same file, {output}: name two")
    moments = None if stats is None else Stats.load(stats)
    with progress_bars(quiet) as progress:
        done = api(
            model, calib, config, output=output, labels=labels, stats=moments,
            tuning=replace(tuning, loss=config.loss) if finetune else None, images=images, work=work, force=force,
            progress=progress,
        )  # fmt: skip
    if report is not None:
        done.save(report, force=force)
    if as_json:
        show_json(done.to_dict())
    else:
        show(terminal.render_report(done, verbose=verbose))


@cli.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--data", required=True, help=f"Validation data: {DATA}")
@click.option("--labels", type=FILE, help="Labels, one a sample of --data: .npy, .npz, .txt or .csv.")
@metric
@click.option("--max-error", type=click.FloatRange(min=0), default=0.05, help="Gate: relative error of B's outputs.")
@click.option("--polygraphy", "folder", type=FILE, help="Write what `polygraphy run` needs to repeat the verdict.")
@click.option("--polygraphy-samples", default=8, type=POSITIVE, help="Samples that Polygraphy compares.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@running
@watched
def validate(
    a: Path, b: Path, data: str, labels: Path | None, max_error: float, folder: Path | None, polygraphy_samples: int,
    force: bool, images: ImageOptions, as_json: bool, quiet: bool, **settings: Any,
) -> int:  # fmt: skip
    """Compare model B with model A on data.

    Parity by output, the task metric where there are labels, and Polygraphy's verdict.

    Exit code 3 when B's relative error is above --max-error, or, without --mask, Polygraphy's comparator fails.
    """
    from itertools import islice

    from onnxlr.case import as_model, images_for
    from onnxlr.data import batches, load_labels, open_data
    from onnxlr.polygraphy_files import require_room, run_comparator, write_polygraphy
    from onnxlr.reference import find_reference
    from onnxlr.session import Session
    from onnxlr.validate import validate as api

    if folder is not None and find_reference(str(b)) is not None:
        raise click.UsageError(f"--polygraphy writes a script that runs B, but {b} is no file: export it first")
    first, second = as_model(a), as_model(b)
    assert first.path is not None
    assert second.path is not None
    sessions = (Session(model, provider=settings["provider"], optimize=False) for model in (first, second))
    inputs, native = zip(*((session.inputs, _is_numeric(session)) for session in sessions), strict=True)
    polygraphy = all(native)
    if folder is not None:
        if not polygraphy:
            raise click.UsageError(f"--polygraphy: {NO_POLYGRAPHY}")
        require_room(folder, force=force)
    samples = open_data(data, inputs[0], images=images_for(first, images))
    with progress_bars(quiet) as progress:
        result = api(
            first, second, samples, labels=None if labels is None else load_labels(labels), max_error=max_error,
            progress=lambda done: progress("validate", done, None), **settings,
        )  # fmt: skip
    sampled = list(islice(samples, polygraphy_samples))
    feeds = list(batches(sampled, settings["batch"], inputs[0]))
    gate = {"max_error": max_error, "provider": settings["provider"]}
    if not polygraphy:
        verdicts: tuple[Verdict, ...] = ()
    elif folder is None:
        verdicts = run_comparator(first.path, second.path, feeds, **gate)
    else:
        verdicts = write_polygraphy(folder, first.path, second.path, feeds, force=force, **gate)
    if as_json:
        opinions = [asdict(verdict) for verdict in verdicts]
        show_json({"format": "onnxlr-validation/1", **result.to_dict(), "polygraphy": opinions})
    else:
        show(terminal.render_validation(result))
        seen = "samples" if settings["mask"] is None else "samples, padding included (it does not count)"
        show(f"polygraphy on {len(sampled)} {seen}: {describe_verdict(verdict)}" for verdict in verdicts)
        if not polygraphy:
            show([NO_POLYGRAPHY])
        if folder is not None:
            show([f"repeat with: sh {folder / 'run.sh'}"])
    # Polygraphy has no mask: what it finds in padding is no failure
    agreed = settings["mask"] is not None or all(verdict.passed for verdict in verdicts)
    return 0 if result.passed and agreed else 3


def _is_numeric(session: Session) -> bool:
    """Whether Polygraphy can run the model and compare its outputs."""
    return session.native and all(spec.dtype.kind != "O" for spec in session.outputs)

"""The commands that make a model and look at one, without data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxlr.cli.group import cli
from onnxlr.cli.options import FILE, POSITIVE, common
from onnxlr.cli.output import show, show_json
from onnxlr.report import terminal

if TYPE_CHECKING:
    from pathlib import Path

    from onnxlr.sites import Site


@cli.command()
@click.argument("reference")
@click.option("-o", "--output", required=True, type=FILE, help="Where to write the model (.onnx).")
@click.option("--opset", type=POSITIVE, help="Version of ONNX's operators.  [default: torch's choice]")
@click.option("--fixed-batch", is_flag=True, help="Keep the batch axis as long as it is in the example inputs.")
@click.option("--external-data", is_flag=True, help="Write the weights to a second file, as above 2 GB in any case.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@common
def export(
    reference: str, output: Path, opset: int | None, fixed_batch: bool, external_data: bool, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Export a torch model to ONNX, checked against torch.

    REFERENCE is timm:NAME, torchvision:NAME, hf:NAME_OR_FOLDER, module:callable or a .pt2 file; module:callable returns
    (model, example_inputs). NAME@random has random weights.

    Exit code 3 when onnxruntime computes something else than torch.
    """
    from onnxlr.export import export as api

    done = api(
        reference, output, opset=opset, fixed_batch=fixed_batch, external_data=external_data, force=force
    )  # fmt: skip
    if as_json:
        return show_json(done.to_dict())
    rows = [("input", name, spec, "") for name, spec in done.inputs.items()]
    rows += [("output", name, spec, f"{done.errors[name]:.1e}") for name, spec in done.outputs.items()]
    lines: list[Any] = [terminal.render_rows(done.reference, ["", "name", "shape", "relative error"], rows), ""]
    size = f"{terminal.count(done.parameters)} parameters, {terminal.megabytes(done.nbytes)}, opset {done.opset}"
    lines.append(f"{size}, written to {done.output} in {done.seconds:.0f} s")
    lines.append(f"onnxruntime agrees with torch on {done.feeds} feeds: at most {done.tolerance:g} is allowed")
    if done.images is not None:
        lines.append(f"images are prepared as the model's metadata say: {done.images.to_json()}")
    return show(lines)


@cli.command()
@click.argument("model", type=FILE)
@click.option("--provider", default="cpu", help="Execution provider that the shapes are measured with.")
@common
def inspect(model: Path, provider: str, as_json: bool) -> None:
    """List what can be compressed in MODEL.

    Every linear operator, those that cannot be compressed with the reason, and how much of the model they are.
    """
    from onnxlr.api import inspect as api

    found = api(model, provider=provider)
    inventory = found.inventory
    if as_json:
        return show_json(found.to_dict())
    total, macs = inventory.parameters, inventory.macs
    weights = [
        (w.name, ", ".join(map(_where, w.sites)), f"{w.d_in} x {w.d_out}", w.dtype,
         terminal.percent(w.parameters, total), terminal.percent(w.macs, macs))
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
    lines += [*found.notes, *([""] if found.notes else [])]
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
    return show(lines)


def _where(site: Site) -> str:
    return f"{site.label} (in {site.bodies[-1]})" if site.bodies else site.label

"""What onnxlr does with models of every kind.

    python -m tools.zoo [PATTERN ...] [--work zoo] [--limit SECONDS] [--json FILE] [--list]

The models are those of `tools/zoo_shelf.py`: files that packages ship with trained weights, and architectures with
random weights, exported here. Those need `pip install 'onnxlr[torch]' timm torchvision transformers`; where a package
is missing, its models are rows that say so.

Every model goes through three things, in a process of its own:

    inspect     linear weights found, their share of all parameters and multiply-accumulates, what was refused and why
    rewrite     every weight as a pair of full rank, `(W H) H` with a reflection `H`: the error against the model as it
                was, at most 1e-4, or 1e-2 in half precision
    compress    `--keep-macs 0.7 --objective output` (`--keep-params` where all weights lie in bodies, whose MACs are
                not counted), ranks in steps of 1 where steps of 16 cannot reach that: the error on samples that were
                held out, and the latency beside the dense model's, measured in turn on one thread

What is found is a row of a Markdown table; a model that fails or takes too long keeps what was found before that, with
the reason.
Random weights use all of their rank and say nothing about quality: those errors show only that it works. The data are
random too (noise for images and sounds, any tokens for texts), so no error in the table is that of a user of the model.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import json
import signal
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.zoo_shelf import Entry, entries, fetched, known, samples

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from onnxlr import Model, Report
    from onnxlr.data import Feed
    from onnxlr.forms import Stored
    from onnxlr.sites import Inventory

    Row = dict[str, Any]

HERE = Path(__file__).parents[1]
KEPT = 0.7
FULL_RANK, FULL_RANK_HALF = 1e-4, 1e-2
"""The most that a rewrite of full rank may err, in float32 and above and in half precision."""
FEWEST, MOST, WORK = 4, 24, 2e11
"""Samples: as many as make so many multiply-accumulates when every weight is tried alone on each of them."""
HOLDOUT_EVERY = 4
COLUMNS = {
    "model": "model", "source": "source", "weights": "weights", "nodes": "nodes", "sites": "linear weights",
    "parameters": "of parameters", "macs": "of MACs", "full_rank": "full rank", "kept": "kept", "error": "error",
    "latency": "latency", "seconds": "s", "refused": "what stays, and why",
}  # fmt: skip
FORMATS = {
    "parameters": "{:.0%}", "macs": "{:.0%}", "kept": "{:.0%}", "full_rank": "{:.1e}", "error": "{:.3f}",
    "latency": "{:.2f}", "seconds": "{:.0f}",
}  # fmt: skip


def visit(model: Model, feeds: Mapping[str, Any]) -> Iterator[Row]:
    """What is found of one model, part by part; `feeds` as in `tools.zoo_shelf.FEEDS`."""
    from onnxlr.metrics import relative_error
    from onnxlr.rewrite import rewrite
    from onnxlr.session import Session
    from onnxlr.shapes import measure_shapes
    from onnxlr.sites import take_inventory
    from onnxlr.validate import compare

    session = Session(model, threads=1)
    (first,) = samples(session.inputs, feeds, 1)
    inventory = take_inventory(model, measure_shapes(model, first))
    covered = sum(weight.macs or 0 for weight in inventory.weights)
    yield {
        "nodes": len(model.proto.graph.node),
        "sites": len(inventory.weights),
        "parameters": sum(weight.parameters for weight in inventory.weights) / max(inventory.parameters, 1),
        "macs": covered / (inventory.macs or 1),
        "refused": refused(inventory),
    }
    if not inventory.weights:
        return
    pairs = {weight.name: reflected(inventory.matrix(weight)) for weight in inventory.weights}
    whole = Session(rewrite(inventory, pairs), threads=1)
    error = relative_error(compare(iter([(first, session.run(first), whole.run(first))])))
    half = any("16" in weight.dtype for weight in inventory.weights)
    yield {"full_rank": error, "exact": error <= (FULL_RANK_HALF if half else FULL_RANK)}
    del pairs, whole
    each = (inventory.macs or 0) * len(inventory.weights)
    count = int(np.clip(WORK / max(each, 1), FEWEST, MOST))
    report = compressed(model, samples(session.inputs, feeds, count), by_macs=covered > 0)
    before, after = report.before, report.after
    yield {
        "kept": (after.macs or 0) / (before.macs or 1) if covered else after.parameters / before.parameters,
        "error": report.validation.error,
        "latency": report.latency_ratio,
    }


def compressed(model: Model, data: Sequence[Feed], *, by_macs: bool) -> Report:
    """Of a compression to the share `KEPT`, with ranks in steps that can reach it."""
    from onnxlr import Config, Target, compress
    from onnxlr.errors import GateError

    def attempt(**finer: int) -> Report:
        target = Target("keep_macs" if by_macs else "keep_params", KEPT)
        config = Config(target=target, objective="output", batch=1, threads=1, holdout_every=HOLDOUT_EVERY, **finer)
        return compress(model, data, config)

    try:
        return attempt()
    except GateError:  # small layers have few multiples of 16
        return attempt(rank_multiple=1)


def reflected(matrix: np.ndarray[Any, Any]) -> Stored:
    """`W` as `(W H) H` or `H (H W)` with a reflection `H` of the smaller side: exact, and cheap for large weights."""
    from onnxlr.forms import Stored

    d_in, d_out = matrix.shape[-2:]
    size = min(d_in, d_out)
    normal = np.random.default_rng(0).standard_normal(size)
    normal /= np.linalg.norm(normal)
    mirror = np.broadcast_to(np.eye(size) - 2 * np.outer(normal, normal), (*matrix.shape[:-2], size, size))
    if d_out <= d_in:
        return Stored(matrix - 2 * (matrix @ normal)[..., None] * normal, mirror, None)
    return Stored(mirror, matrix - 2 * normal[:, None] * (normal @ matrix)[..., None, :], None)


def refused(inventory: Inventory, most: int = 3) -> list[tuple[str, float]]:
    """Reasons why weights stay and the share of all parameters that each is about, the largest first.

    A weight that several operators read counts once for a reason.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    for refusal in inventory.refusals:
        reason = refusal.reason
        for name in sorted(refusal.sources, key=len, reverse=True):  # names tell apart what is the same reason
            reason = reason.replace(f" {name!r}", "")
        sources[f"{refusal.op}: {reason.partition(': ')[0]}"] |= set(refusal.sources)
    stored, total = inventory.view.sources, max(inventory.parameters, 1)
    shares = {reason: sum(prod(stored[name].dims) for name in names) / total for reason, names in sources.items()}
    return sorted(shares.items(), key=lambda pair: -pair[1])[:most]


def one(entry: Entry, work: Path) -> Iterator[Row]:
    """What is found of one model, in this process, and at last why there is no more where something went wrong."""
    from onnxlr import load

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield from visit(load(fetched(entry, work)), known(entry.name))
        except Exception as error:  # one model's failure is a row, whatever it is
            yield {"failure": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


def row_of(entry: Entry, work: Path, limit: float) -> Row:
    """`one` in a process of its own; whatever becomes of that."""
    row: Row = {"model": entry.name, "source": entry.source, "weights": "trained" if entry.trained else "random"}
    if entry.missing:
        return row | {"failure": f"left out: pip install {' '.join(entry.missing)}", "seconds": 0.0}
    start = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-m", "tools.zoo", "--one", entry.name, "--work", str(work.resolve())]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            found, said = process.communicate(timeout=limit)
            ended = "" if process.returncode == 0 else _ending(process.returncode, said)
        except subprocess.TimeoutExpired:
            process.kill()
            found, _ = process.communicate()
            ended = f"not done within {limit:g} s"
    for printed in found.splitlines():
        if printed.startswith('{"'):  # what libraries print is none of ours
            row |= json.loads(printed)
    if ended:
        row["failure"] = ended
    return row | {"seconds": time.perf_counter() - start}


def _ending(code: int, said: str) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"crashed: {(said.strip().splitlines() or ['no message'])[-1]}"


def line(row: Row) -> str:
    """A row of the Markdown table."""
    cells = {key: FORMATS.get(key, "{}").format(row[key]) for key in COLUMNS if key in row}
    reasons = [f"{reason} ({share:.1%})" for reason, share in row.get("refused", ())]
    cells["refused"] = "; ".join(([f"**{row['failure']}**"] if "failure" in row else []) + reasons)
    if not row.get("exact", True):
        cells["full_rank"] = f"**{cells['full_rank']}**"
    return f"| {' | '.join(cells.get(key, '').replace('|', '/') for key in COLUMNS)} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("patterns", nargs="*", default=["*"], help="shell patterns of names")
    options.add_argument("--work", type=Path, default=Path("zoo"), help="where downloads and exports are kept")
    options.add_argument("--limit", type=float, default=600.0, help="seconds for one model")
    options.add_argument("--json", type=Path, help="write the rows there")
    options.add_argument("--list", action="store_true", help="only list the names")
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        (entry,) = (entry for entry in entries() if entry.name == given.one)
        for found in one(entry, given.work):
            print(json.dumps(found), file=sys.__stdout__, flush=True)
        return
    chosen = [e for e in entries() if any(fnmatch.fnmatchcase(e.name.lower(), p.lower()) for p in given.patterns)]
    if not chosen:
        options.error("no model has such a name: see --list")
    if given.list:
        print("\n".join(entry.name for entry in chosen))
        return
    rows = []
    print(f"| {' | '.join(COLUMNS.values())} |\n{'|---' * len(COLUMNS)}|")
    for entry in chosen:
        rows.append(row_of(entry, given.work, given.limit))
        print(line(rows[-1]), flush=True)
        if given.json:  # after each, so that what was found is there whatever comes
            given.json.write_text(json.dumps(rows, indent=1))
    failed = sum("failure" in row for row in rows)
    inexact = sum(not row.get("exact", True) for row in rows)
    print(f"\n{len(rows)} models, {failed} not taken all the way, {inexact} not exact at full rank")


if __name__ == "__main__":
    main()

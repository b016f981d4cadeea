"""What every stage of `compress` takes: seconds, processor seconds and peak memory.

    python tools/stages.py --model vit_b --samples 64 --json stages.json
    python tools/stages.py --model vit_l --blocks 2 --set objective=output --set memory=1000000000

The models are those of `tools/calibration_cost.py`: the shapes of the real ones, random weights, since neither time nor
memory depends on their values. The stages are those of the report's own clock, and "factorize", which is taken off the
stages it happens in: decompositions, the order of hidden units, and factors that are cut. On one thread processor
seconds are nearly free of what else runs on the machine.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx
from calibration_cost import MODELS

import onnxlr
from onnxlr import choice, clock, groups, layer, offers, pipeline
from onnxlr.config import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ORDER = ("prepare", "calibrate", "factorize", "importance", "search", "rewrite", "validate", "benchmark", "save")
FACTORIZE = (
    (layer.Layer, "decompose"),
    (layer.Layer, "foresee"),
    (choice.Part, "pair"),
    (choice, "cut"),
    (offers, "cut"),
    (groups.Elimination, "__init__"),
    (groups, "stand_in"),
)


class Clock(clock.Clock):
    """The report's clock, with processor time and memory; a stage within another is taken off it."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._open: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer = self._open[-1] if self._open else None
        if name == outer:
            yield
            return
        self._note(outer)
        self._open.append(name)
        start, spent = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - start, time.process_time() - spent)
            if outer is not None:
                self._add(outer, start - time.perf_counter(), spent - time.process_time())
            self._note(self._open.pop())

    def _add(self, name: str, seconds: float, processor: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.processor[name] = self.processor.get(name, 0.0) + processor

    def _note(self, name: str | None) -> None:
        """Read the peak since the last note, and begin anew."""
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        if name is not None:
            self.peaks[name] = max(self.peaks.get(name, 0), peak)
        Path("/proc/self/clear_refs").write_text("5")


def timed(stages: Clock, owner: Any, name: str) -> None:
    """Count what a function takes as factorization."""
    original: Callable[..., Any] = getattr(owner, name)

    @wraps(original)
    def measured(*arguments: Any, **options: Any) -> Any:
        with stages.stage("factorize"):
            return original(*arguments, **options)

    setattr(owner, name, measured)


def settings(given: tuple[str, ...]) -> dict[str, Any]:
    """`name=value` as arguments of `Config`; numbers are read as such."""
    pairs = dict(each.split("=", 1) for each in given)
    found: dict[str, Any] = {}
    for name, value in pairs.items():
        found[name] = frozenset(value.split(",")) if name == "forms" else int(value) if value.isdecimal() else value
    return found


@click.command(help=__doc__)
@click.option("--model", default="vit_b", help=f"{', '.join(MODELS)}, or the path of a model; then --calib too.")
@click.option("--calib", type=click.Path(path_type=Path, exists=True))
@click.option("--samples", default=64, help="Of a model with random weights.")
@click.option("--blocks", type=int, help="Of a model with random weights, where not as many as the real one has.")
@click.option("--keep-params", default=0.5)
@click.option("--set", "given", multiple=True, help="name=value: an argument of Config.")
@click.option("--save", "output", type=click.Path(path_type=Path), help="Where the compressed model goes.")
@click.option("--json", "path", type=click.Path(path_type=Path))
def main(
    model: str,
    calib: Path | None,
    samples: int,
    blocks: int | None,
    keep_params: float,
    given: tuple[str, ...],
    output: Path | None,
    path: Path | None,
) -> None:
    stages = Clock()
    pipeline.Clock = lambda: stages  # type: ignore[assignment,misc]
    for owner, name in FACTORIZE:
        timed(stages, owner, name)
    chosen: dict[str, Any] = {"objective": "output", "threads": 1} | settings(given)
    config = onnxlr.Config(target=Target("keep_params", keep_params), **chosen)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(model)
        if model in MODELS:
            file, calib = Path(folder, "model.onnx"), Path(folder, "data.npz")
            proto, data = MODELS[model](samples, **({} if blocks is None else {"blocks": blocks}))
            onnx.save(proto, file)
            np.savez(calib, **data)  # type: ignore[arg-type]
            del proto, data
        start = time.perf_counter()
        report = onnxlr.compress(file, calib, config, output=output, force=True)
        total = time.perf_counter() - start
    print(f"{model}, {config.target}, objective {config.objective}, {config.threads or 'all'} threads\n")
    print("| stage | seconds | processor | peak MB |\n|---|---|---|---|")
    for name in (*ORDER, *(stages.seconds.keys() - set(ORDER))):
        if name in stages.seconds:
            figures = f"{stages.seconds[name]:.1f} | {stages.processor[name]:.1f} | {stages.peaks[name] / 1e6:.0f}"
            print(f"| {name} | {figures} |")
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| all | {total:.1f} | {sum(stages.processor.values()):.1f} | {peak / 1e6:.0f} |\n")
    print(f"error {report.validation.error:.4f}")
    if path is not None:
        found = {"seconds": stages.seconds, "processor": stages.processor, "peaks": stages.peaks}
        path.write_text(json.dumps(found | {"error": report.validation.error}))


if __name__ == "__main__":
    sys.exit(main())

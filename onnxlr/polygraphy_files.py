"""A second opinion from Polygraphy: its comparator's verdict on two models, and the files to repeat it.

Polygraphy compares two runs feed by feed, output by output, by a statistic of the absolute difference against an
absolute tolerance (its relative tolerance is kept at 0: divided by values near zero, it says nothing of a network's
output). The gate of `onnxlr.validate` is relative_l2 = rms(a - b) / rms(a) <= max_error, `a` being the reference, over
all samples and for every output. Polygraphy has no rms, so its nearest statistic is held against the same bound:

    floating   mean |a - b|                         <= max_error rms(a)
    integer    quantile 1 - max_error of |a - b|    <= 0               at most max_error (n - 1) of n elements differ
    bool       mean (a xor b)                       <= max_error       at most max_error n

with rms(a) over all the feeds. An output that is empty on some feed has no mean there: its elements are held one by one
against the same bound. As mean |e| <= rms(e), a floating output that fails here has an rms error above max_error rms(a)
on some feed; on a single feed, an output with relative_l2 <= max_error passes. The converse is looser: normally
distributed errors fail from 1.25 max_error on. Polygraphy sees padding too. A few feeds are enough: they are held in
memory, and in the files.

`write_polygraphy` leaves a folder for the documented command line, which gives the same verdict:

    inputs.json      the feeds
    outputs_a.json   the reference's outputs
    run.sh           polygraphy run B.onnx --onnxrt --load-inputs inputs.json --load-outputs outputs_a.json
                     --check-error-stat ... --atol ... --rtol 0
"""

from __future__ import annotations

import math
import os
import shlex
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy import comparator
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from onnxlr.errors import ConfigError, DataError, ModelError, OutputError
from onnxlr.files import replacing, require_writable
from onnxlr.metrics import is_floating
from onnxlr.session import PROVIDERS, provider_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from onnxlr.metrics import Array

SCRIPT = "run.sh"
INPUTS = "inputs.json"
OUTPUTS = "outputs_a.json"

# CompareFunc.simple of older releases became a class of its own and goes with 0.60
_simple = getattr(comparator, "SimpleCompareFunc", None) or comparator.CompareFunc.simple


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What Polygraphy checks of an output: `statistic` of |a - b| ("mean", "quantile" or "elemwise") against `atol`."""

    statistic: str
    atol: float
    quantile: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Polygraphy's word on one output.

    Attributes
    ----------
    name : str
        The output.
    passed : bool
        Whether it passes on every feed.
    value : float or None
        The statistic on the worst feed, in the output's own unit (the largest difference for "elemwise"); None where
        shapes differ or a difference is not finite.
    tolerance : Tolerance
        What it was held against.
    """

    name: str
    passed: bool
    value: float | None
    tolerance: Tolerance


def tolerances(outputs: Sequence[Mapping[str, Array]], max_error: float) -> dict[str, Tolerance]:
    """Polygraphy's tolerances for a gate, from the reference's outputs on each feed; see the module's docstring.

    Raises
    ------
    ConfigError
        `max_error` is negative or not finite.
    DataError
        An output holds NaN or infinity.
    """
    if not (math.isfinite(max_error) and max_error >= 0):
        raise ConfigError(f"max_error {max_error}: expected a finite number, 0 or more")
    bound, chosen = float(max_error), {}  # numpy's scalars print as code, not as numbers
    for name in outputs[0]:
        arrays = [output[name] for output in outputs]
        kind = "f" if is_floating(arrays[0].dtype) else arrays[0].dtype.kind
        statistic = "elemwise" if not all(array.size for array in arrays) else "mean" if kind in "fb" else "quantile"
        atol = bound * _rms(name, arrays) if kind == "f" else bound if kind == "b" else 0.0
        chosen[name] = Tolerance(statistic, atol, max(0.0, 1.0 - bound) if statistic == "quantile" else None)
    return chosen


def run_comparator(
    a_path: Path, b_path: Path, feeds: Sequence[Mapping[str, Array]], *, max_error: float, provider: str = "cpu"
) -> tuple[Verdict, ...]:
    """Run two models through Polygraphy's comparator.

    Parameters
    ----------
    a_path, b_path : Path
        The reference and the candidate; external data lie beside them.
    feeds : sequence of mapping of str to array
        A small sample: all their outputs are held in memory.
    max_error : float
        The gate, a relative_l2 error.
    provider : str
        As of `Session`.

    Returns
    -------
    tuple of Verdict
        One an output, in the reference's order.

    Raises
    ------
    ConfigError
        `max_error` is negative or not finite.
    DataError
        There are no feeds.
    ModelError
        Polygraphy cannot run a model, or cannot compare the two.
    """
    results = _run(a_path, b_path, feeds, provider)
    return _verdicts(results, tolerances(_outputs(results), max_error))


def require_room(folder: Path, *, force: bool = False) -> None:
    """Refuse a folder that `write_polygraphy` could not write to, before the work begins; it is made where it lacks.

    Raises
    ------
    OutputError
        A file exists already and `force` is not set, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created: {error.strerror or error}") from error
    for file in (INPUTS, OUTPUTS, SCRIPT):
        require_writable(folder / file, force=force)


def write_polygraphy(
    folder: Path,
    a_path: Path,
    b_path: Path,
    feeds: Sequence[Mapping[str, Array]],
    *,
    max_error: float,
    provider: str = "cpu",
    force: bool = False,
) -> tuple[Verdict, ...]:
    """`run_comparator`, and the files with which `polygraphy run` repeats its verdict.

    The script refers to the candidate by its path relative to `folder`, and needs `polygraphy` on the PATH. Its exit
    code is 0 where every output passes on every feed.

    Raises
    ------
    OutputError
        A file exists already and `force` is not set, or the folder cannot be written.
    ConfigError, DataError, ModelError
        As `run_comparator`.
    """
    require_room(folder, force=force)
    results = _run(a_path, b_path, feeds, provider)
    chosen = tolerances(_outputs(results), max_error)
    reference = RunResults()
    reference.append(results[0])
    with _quiet():
        with replacing(folder / INPUTS, force=force) as path:
            save_json([dict(feed) for feed in feeds], str(path))
        with replacing(folder / OUTPUTS, force=force) as path:
            reference.save(str(path))
        with replacing(folder / SCRIPT, force=force) as path:
            path.write_text(_script(os.path.relpath(b_path, folder), chosen, provider), encoding="utf-8")
            path.chmod(0o755)
    return _verdicts(results, chosen)


def command_line(model: str, chosen: Mapping[str, Tolerance], provider: str = "cpu") -> list[str]:
    """The arguments of `polygraphy` that repeat the comparison in a folder of `write_polygraphy`."""
    quantiles = [f"{name}:{limit.quantile!r}" for name, limit in chosen.items() if limit.quantile is not None]
    return [
        *("polygraphy", "run", model, "--onnxrt"),
        *(() if provider_name(provider) == PROVIDERS["cpu"] else ("--providers", provider_name(provider))),
        *("--load-inputs", INPUTS, "--load-outputs", OUTPUTS),
        *("--check-error-stat", *(f"{name}:{limit.statistic}" for name, limit in chosen.items())),
        *(("--error-quantile", *quantiles) if quantiles else ()),
        *("--atol", *(f"{name}:{limit.atol!r}" for name, limit in chosen.items())),
        *("--rtol", "0"),
    ]


def _rms(name: str, arrays: Sequence[Array]) -> float:
    squares = sum(float(np.sum(np.square(array.astype(np.float64)))) for array in arrays)
    if not math.isfinite(squares):
        raise DataError(f"output {name!r} of the reference model holds NaN or infinity: it has no tolerance")
    return math.sqrt(squares / max(1, sum(array.size for array in arrays)))


def _script(model: str, chosen: Mapping[str, Tolerance], provider: str) -> str:
    return (
        "#!/bin/sh\n"
        "# Compares the model below with the stored outputs of its reference, on the stored inputs.\n"
        "# Exit code 0: every output is within its tolerance on every feed.\n"
        'cd "$(dirname "$0")" || exit 1\n'
        f"exec {shlex.join(command_line(model, chosen, provider))}\n"
    )


def _run(a_path: Path, b_path: Path, feeds: Sequence[Mapping[str, Array]], provider: str) -> Any:
    if not feeds:
        raise DataError("Polygraphy has no feed to compare on: give at least one")
    providers = [provider_name(provider)]
    runners = [
        OnnxrtRunner(SessionFromOnnx(os.fspath(path), providers=providers), name=f"{letter}: {path.name}")
        for letter, path in (("A", a_path), ("B", b_path))
    ]
    with _quiet():
        try:
            results = Comparator.run(runners, data_loader=[dict(feed) for feed in feeds])
        except Exception as error:  # its own exceptions and every one of onnxruntime's
            raise ModelError(
                f"Polygraphy cannot run {a_path.name} and {b_path.name}: {' '.join(str(error).split())}"
            ) from error
    ours, theirs = (list(iterations[0].keys()) for _, iterations in results)
    if set(ours) != set(theirs):  # Polygraphy would pair outputs of different names by their places
        raise ModelError(
            f"{a_path.name} has the outputs {', '.join(map(repr, ours))}, {b_path.name} has "
            f"{', '.join(map(repr, theirs))}: only models with the same outputs can be compared"
        )
    return results


def _outputs(results: Any) -> list[dict[str, Array]]:
    return [dict(iteration.items()) for iteration in results[0][1]]


def _verdicts(results: Any, chosen: Mapping[str, Tolerance]) -> tuple[Verdict, ...]:
    compare = _simple(
        rtol=0.0,
        atol={name: limit.atol for name, limit in chosen.items()},
        check_error_stat={name: limit.statistic for name, limit in chosen.items()},
        error_quantile={name: limit.quantile for name, limit in chosen.items() if limit.quantile is not None},
    )
    with _quiet():
        try:
            accuracy = Comparator.compare_accuracy(results, compare_func=compare)
        except Exception as error:  # numpy's, for dtypes that have no difference
            raise ModelError(f"Polygraphy cannot compare the outputs: {' '.join(str(error).split())}") from error
    by_pair = accuracy if hasattr(accuracy, "items") else accuracy[0]  # newer releases give a list, one a function
    feeds = next(iter(by_pair.values()))
    verdicts = []
    for name, limit in chosen.items():
        field = "max_absdiff" if limit.statistic == "elemwise" else f"{limit.statistic}_absdiff"
        values = [getattr(feed[name], field, math.nan) for feed in feeds]  # a bare False where the shapes differ
        worst = float(np.max(values))
        passed = all(bool(feed[name]) for feed in feeds)
        verdicts.append(Verdict(name, passed, worst if math.isfinite(worst) else None, limit))
    return tuple(verdicts)


@contextmanager
def _quiet() -> Iterator[None]:
    # its log goes to stdout, which belongs to results, and its statistics divide by zeros of integer outputs
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield

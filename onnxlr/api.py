"""Single stages as functions that take whatever a user has: paths, models in memory, any data.

`compress` (`onnxlr.pipeline`) and `analyze` (`onnxlr.analyze`) are the longer ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxlr.case import (
    as_labels,
    as_model,
    images_for,
    load_truth,
    passes_check,
    prepare,
    quiet,
    require_held_out,
    require_loss_of_use,
    require_metric_of_use,
    require_tuning,
    tune,
)
from onnxlr.config import Config, Tuning
from onnxlr.data import open_data
from onnxlr.errors import ConfigError, ModelError
from onnxlr.files import require_writable
from onnxlr.gathered import gather
from onnxlr.gram import Stats
from onnxlr.model_io import save
from onnxlr.report.schema import plain
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes, synthetic_sample
from onnxlr.sites import take_inventory
from onnxlr.unfold import unfold
from onnxlr.validate import validate as compare_models
from onnxlr.work import working

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import ArrayLike

    from onnxlr.case import ModelLike, Progress
    from onnxlr.data import ImageOptions
    from onnxlr.report import Recovery
    from onnxlr.sites import Inventory
    from onnxlr.validate import Validation


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found: the inventory, and for which shapes its multiply-accumulates hold.

    `notes` say how the model that it is of differs from what was given (`onnxlr.unfold`), and what no data can be
    gathered of.
    """

    inventory: Inventory
    shapes_of: Mapping[str, tuple[int, ...]]
    problem: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "format": "onnxlr-inspection/1",
            "parameters": self.inventory.parameters,
            "macs": self.inventory.macs,
            "macs_of": {name: list(shape) for name, shape in self.shapes_of.items()},
            "problem": self.problem,
            "weights": [plain(asdict(weight)) for weight in self.inventory.weights],
            "refusals": [asdict(refusal) for refusal in self.inventory.refusals],
            "uncounted": self.inventory.uncounted,
            "notes": self.notes,
        }


def inspect(model: ModelLike, *, provider: str = "cpu") -> Inspection:
    """List every linear operator, those that can be compressed and those that cannot, with reasons and shares.

    Without data the shapes are those of one synthetic sample; where the model does not run on it, multiply-accumulates
    stay unknown and `problem` says why.

    Raises
    ------
    ModelError, InstallError
        The file is no model, or onnxruntime is missing.
    """
    loaded, notes = unfold(as_model(model))
    problem, shapes, sample = None, None, {}
    try:
        sample = synthetic_sample(Session(loaded, provider=provider, optimize=False).inputs)
        shapes = measure_shapes(loaded, sample, provider=provider)
    except ModelError as error:
        problem = str(error)
    sizes = {name: array.shape for name, array in sample.items()}
    inventory = take_inventory(loaded, shapes)
    return Inspection(inventory, sizes, problem, (*notes, *unseen(inventory)))


def unseen(inventory: Inventory) -> Iterator[str]:
    """Of which sites no data can be gathered, and why."""
    for weight in inventory.weights:
        for site in weight.sites:
            if site.unseen:
                yield f"{site.label}: {site.unseen}, so it is cut by its weight alone"


def calibrate(
    model: ModelLike,
    calib: object,
    config: Config | None = None,
    *,
    output: str | Path | None = None,
    labels: str | Path | ArrayLike | None = None,
    images: ImageOptions | None = None,
    work: str | Path | None = None,
    force: bool = False,
    progress: Progress = quiet,
) -> Stats:
    """Gather the second moments that `config.objective` needs, over all of `calib` but the held-out part.

    `labels`, one a sample of `calib`, a file or an array, are for `config.loss`. With `output` the moments are written
    there, in place of an existing file where `force` is set, and read from there when they are looked at. With `work` a
    run that was cut off goes on from the folder in which it keeps what it has finished. With `config.memory` one of the
    two is needed.

    Raises
    ------
    OnnxlrError
        As `prepare`; DataError for values that are not finite, naming the tensor.
    """
    config = config or Config()
    require_loss_of_use(config, labels)
    if labels is not None and config.loss is None:
        raise ConfigError("--labels without --loss: give the loss whose gradients they are for, or leave them out")
    if config.memory is not None and output is None and work is None:
        raise ConfigError("moments that take more than config.memory need a file: give output, or work")
    path = None if output is None else Path(output)
    if path is not None:
        require_writable(path, force=force)
    case = prepare(model, calib, config, images)
    truth = None if labels is None else load_truth(case, labels)
    with working(work, case.fingerprint) as kept:
        stats = gather(case, config, progress, truth, kept)
        if path is None:
            return stats
        stats.save(path, force=force)
    return Stats.load(path)


def finetune(
    dense: ModelLike,
    small: ModelLike,
    calib: object,
    tuning: Tuning | None = None,
    config: Config | None = None,
    *,
    output: str | Path | None = None,
    labels: str | Path | ArrayLike | None = None,
    checkpoint: str | Path | None = None,
    images: ImageOptions | None = None,
    force: bool = False,
    progress: Progress = quiet,
) -> Recovery | None:
    """Train a compressed model to do what the dense one does; it is never worse on held-out data afterwards.

    Under `torchrun` several processes train together, and the first writes the result.

    Parameters
    ----------
    dense, small
        Paths, `Model`s or ModelProtos.
    calib
        Whatever `onnxlr.data.open_data` takes. The same part is held out as in `compress`.
    tuning
        How to train; the defaults, when None.
    config
        Of it `batch`, `holdout_every`, `mask`, `metric`, `provider` and `threads` are used.
    output
        Where the model is saved; nothing is written when None.
    labels
        One a sample of `calib`, a file or an array, for the metric and for `tuning.loss`.
    checkpoint
        A file that holds the state while training runs; where it exists, training goes on from it.
    images
        How images become inputs, where `calib` is a folder of images.
    force
        Replace an existing `output`.
    progress
        Called with ("finetune", steps done, steps in all, loss and held-out error in words).

    Returns
    -------
    Recovery
        What was gained; None in all processes but the first.

    Raises
    ------
    OnnxlrError
        Whatever is wrong with the models, the data or the installation.
    """
    tuning, config = tuning or Tuning(), config or Config()
    require_tuning(tuning, labels)
    require_metric_of_use(config, labels)
    path = None if output is None else Path(output)
    if path is not None:
        require_writable(path, force=force)
        if checkpoint is not None and path.absolute() == Path(checkpoint).absolute():
            raise ConfigError(
                f"--checkpoint and --output are both {path}: the state of the run needs a file of its own"
            )
    student, case = as_model(small), prepare(dense, calib, config, images)
    require_held_out(case)
    truth = None if labels is None else load_truth(case, labels)
    tuned, recovery = tune(
        student, case, config, tuning, truth, progress, None if checkpoint is None else Path(checkpoint)
    )
    from onnxlr.tuning import leads

    if not leads():
        return None
    if path is not None:
        save(tuned, path, force=force, check=passes_check(student))
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return recovery


def validate(
    a: ModelLike,
    b: ModelLike,
    data: object,
    *,
    labels: str | Path | ArrayLike | None = None,
    images: ImageOptions | None = None,
    batch: int = 8,
    mask: str | None = None,
    metric: str = "top1",
    provider: str = "cpu",
    threads: int = 0,
    max_error: float | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Validation:
    """Compare model `b` with model `a` on all of `data`.

    Parameters
    ----------
    a, b
        Paths, references, `Model`s or ModelProtos, with the same inputs and outputs.
    data
        Whatever `onnxlr.data.open_data` takes.
    labels
        One a sample of `data`, a file or an array, for the task metric.
    images
        How images become inputs, where `data` is a folder of images.
    batch, mask, metric, provider, threads
        As of `Config`.
    max_error
        The gate: the relative error of `b`'s outputs that is allowed.
    progress
        Called with the number of samples after each batch.

    Raises
    ------
    OnnxlrError
        Whatever is wrong with the models or the data; a gate that is not met is for the caller to act on.
    """
    first, second = as_model(a), as_model(b)
    inputs = Session(first, provider=provider, optimize=False).inputs
    samples = open_data(data, inputs, images=images_for(first, images))
    truth = None if labels is None else as_labels(labels)
    return compare_models(
        first, second, samples, batch=batch, mask=mask, labels=truth, metric=metric, provider=provider,
        threads=threads, max_error=max_error, progress=progress,
    )  # fmt: skip

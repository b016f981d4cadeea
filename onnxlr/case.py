"""What every stage starts from: a model, its data divided in two, its linear operators and which of them take part."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx

from onnxlr.calibrate import data_fingerprint
from onnxlr.data import IMAGES_KEY, ImageOptions, batches, fixed_batch, load_labels, open_data, split
from onnxlr.errors import ConfigError, DataError, ModelError
from onnxlr.export import export_temporarily
from onnxlr.model_io import Model, check, from_proto, load
from onnxlr.reference import find_reference
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes
from onnxlr.sites import take_inventory
from onnxlr.task_metrics import load_metric
from onnxlr.unfold import unfold

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from onnxlr.config import Config, Tuning
    from onnxlr.data import Dataset, TensorSpec
    from onnxlr.report import Recovery
    from onnxlr.sites import Inventory, Weight

    ModelLike = str | Path | Model | onnx.ModelProto
    """A path, a reference to a torch model (`onnxlr.reference`), or a model in memory."""


UNUTILIZED = (
    "the objective utilized projects on the leading directions of the input, and an embedding table's are its most "
    "frequent rows: all others would be lost, use another objective"
)


class Progress(Protocol):
    """Told of the stage, the steps done since the last call, all steps where known, and how it stands in words."""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "", /) -> None: ...


def quiet(stage: str, done: int, total: int | None, note: str = "") -> None:
    """Report no progress."""


def as_model(model: ModelLike) -> Model:
    """The model behind a path, a reference to a torch model, a protobuf or a `Model`.

    Raises
    ------
    OnnxlrError
        As `onnxlr.model_io.load`, or as `onnxlr.export.export`.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, onnx.ModelProto):
        return from_proto(model)
    reference = find_reference(str(model))
    return load(model) if reference is None else export_temporarily(reference)


def name_of(model: ModelLike) -> str:
    """What a report calls a model."""
    path = model.path if isinstance(model, Model) else None if isinstance(model, onnx.ModelProto) else model
    return "in memory" if path is None else str(path)


def images_for(model: Model, images: ImageOptions | None) -> ImageOptions:
    """How images become the input of a model: as its metadata say where `images` says nothing.

    Raises
    ------
    ModelError
        Its metadata are no image options.
    """
    stated = next((entry.value for entry in model.proto.metadata_props if entry.key == IMAGES_KEY), None)
    return (images or ImageOptions()).or_stated(stated, name_of(model))


@dataclass(frozen=True, slots=True)
class Case:
    """A model with its data, its linear operators, and which of them take part; `name` is what it was given as.

    `held_back` gives the reason for every weight that a pattern or the objective keeps out, `notes` say how
    `model` differs from what was given (`onnxlr.unfold`).
    """

    name: str
    model: Model
    inputs: Sequence[TensorSpec]
    calibration: Dataset
    held_out: Dataset
    inventory: Inventory
    weights: Sequence[Weight]
    held_back: Mapping[str, str]
    notes: tuple[str, ...]

    def fingerprint(self) -> str:
        """What tells this model and these data from others; all data are read for it."""
        data = [data_fingerprint(part) for part in (self.calibration, self.held_out)]
        return " ".join((self.model.fingerprint(), *data))


def prepare(model: ModelLike, calib: object, config: Config, images: ImageOptions | None = None) -> Case:
    """Load the model, open and split the data, find the sites.

    Raises
    ------
    ModelError, DataError, ConfigError, InstallError
        What is wrong with the model, the data, a pattern or the installation.
    """
    loaded, notes = unfold(as_model(model))
    inputs = Session(loaded, provider=config.provider, threads=config.threads).inputs
    if config.mask is not None and config.mask not in {spec.name for spec in inputs}:
        raise DataError(f"--mask {config.mask!r} is none of the inputs {', '.join(repr(s.name) for s in inputs)}")
    calibration, held_out = split(open_data(calib, inputs, images=images_for(loaded, images)), config.holdout_every)
    first = next(batches(islice(calibration, fixed_batch(inputs) or 1), 1, inputs), None)
    if first is None:
        raise DataError(f"{calibration.name}: no sample to calibrate on")
    inventory = take_inventory(loaded, measure_shapes(loaded, first, provider=config.provider)).observing(config.forms)
    weights, held_back = _taking_part(inventory, config)
    return Case(name_of(model), loaded, inputs, calibration, held_out, inventory, weights, held_back, notes)


def _taking_part(inventory: Inventory, config: Config) -> tuple[list[Weight], dict[str, str]]:
    patterns = {*config.include, *config.exclude, *config.ranks}
    unused = set(patterns)
    taking_part, held_back = [], {}
    for weight in inventory.weights:
        matching = {pattern for pattern in patterns if weight.matches(pattern)}
        unused -= matching
        excluding = [pattern for pattern in config.exclude if pattern in matching]
        if excluding:
            held_back[weight.name] = f"excluded by {excluding[0]!r}"
        elif config.include and not matching.intersection(config.include):
            held_back[weight.name] = "not included"
        elif config.objective == "utilized" and not weight.shows_input:
            held_back[weight.name] = UNUTILIZED
        else:
            taking_part.append(weight)
    if unused:
        raise ConfigError(f"the pattern {min(unused)!r} matches no weight or site: `onnxlr inspect` lists their names")
    for pattern in config.ranks:
        if not any(weight.matches(pattern) for weight in taking_part):
            raise ConfigError(f"--rank {pattern!r} is only for weights that are kept out: {min(held_back.values())}")
    return taking_part, held_back


def passes_check(model: Model) -> bool:
    """Whether onnx's checker has nothing against a model, or cannot look at it: in memory, with data in files."""
    try:
        if model.path is not None:
            check(model.path)
        elif not model.external_files:
            onnx.checker.check_model(model.proto)
    except (ModelError, onnx.checker.ValidationError):
        return False
    return True


def require_loss_of_use(config: Config, labels: object, *, tuned: bool = False) -> None:
    """Refuse a loss without labels, or where no gradients are asked for and nothing is `tuned` with it.

    Raises
    ------
    ConfigError
        It is so.
    """
    if config.loss is None:
        return
    if labels is None:
        raise ConfigError(f"--loss {config.loss} needs --labels: one label for every sample of --calib")
    if config.objective not in ("auto", "fisher") and not tuned:
        raise ConfigError(f"the objective {config.objective} uses no gradients: leave --loss {config.loss} out")


def require_metric_of_use(config: Config, labels: object) -> None:
    """Refuse a task metric that there is not, or that has no labels to go by.

    Raises
    ------
    ConfigError
        It is so.
    """
    if config.metric != "top1" and labels is None:
        raise ConfigError(f"--metric {config.metric} needs --labels: one label for every sample of --calib")
    load_metric(config.metric)


def require_tuning(tuning: Tuning, labels: object) -> None:
    """Refuse fine-tuning that cannot be done, before the work begins.

    Raises
    ------
    ConfigError
        A loss without labels.
    InstallError
        torch is not installed.
    """
    if tuning.loss is not None and labels is None:
        raise ConfigError(f"--loss {tuning.loss} needs --labels: one label for every sample of --calib")
    import onnxlr.tuning  # noqa: F401


def require_one_process() -> None:
    """Refuse to do in each of several processes what is to be done once.

    Raises
    ------
    ConfigError
        `torchrun` has started several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "only fine-tuning is shared by several processes: compress without torchrun, then "
            "`torchrun --no-python onnxlr finetune`"
        )


def tune(
    student: Model,
    case: Case,
    config: Config,
    tuning: Tuning,
    labels: NDArray[Any] | None,
    progress: Progress,
    checkpoint: Path | None = None,
) -> tuple[Model, Recovery]:
    """Fine-tune `student` with the model of `case` as its teacher; see `onnxlr.tuning.recover`."""
    from onnxlr.tuning import recover  # torch is not there for every user

    return recover(
        student, case.model, case.calibration, case.held_out, case.inputs, config, tuning,
        labels=labels, checkpoint=checkpoint,
        progress=lambda done, total, note: progress("finetune", done, total, note),
    )  # fmt: skip


def require_held_out(case: Case) -> None:
    """Refuse data that leave nothing to validate on, before the work begins.

    Raises
    ------
    DataError
        Fewer samples are held out than one run of the model takes.
    """
    size = fixed_batch(case.inputs) or 1
    held_out = sum(1 for _ in islice(case.held_out.read(), size))
    if held_out < size:
        raise DataError(
            f"{case.held_out.name}: {held_out} samples to validate on, at least {size} are needed: give more data, or "
            "hold out a larger share with --holdout-every"
        )


def as_labels(labels: str | Path | ArrayLike) -> NDArray[Any]:
    """Labels from a file, or as an array.

    Raises
    ------
    DataError
        The file cannot be read.
    """
    return load_labels(labels) if isinstance(labels, (str, Path)) else np.asarray(labels)


def load_truth(case: Case, labels: str | Path | ArrayLike) -> NDArray[Any]:
    """The labels, if there is one for every sample of the whole data.

    Raises
    ------
    DataError
        The file cannot be read, or their number is another.
    """
    truth = as_labels(labels)
    count = sum(1 for part in (case.calibration, case.held_out) for _ in part.read())
    if len(truth) != count:
        raise DataError(
            f"--labels: {len(truth)} labels for {count} samples of --calib: give one a sample, in the order of the data"
        )
    return truth

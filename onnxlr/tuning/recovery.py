"""From a compressed model to a better one, or to the same one: never to one that is worse on held-out data.

The dense model teaches the compressed one on the calibration samples. A model is handed back only if onnxruntime finds
it better than the one before on all held-out samples: in the error of the outputs or, where it is trained on labels, in
the task metric.
"""

from __future__ import annotations

import hashlib
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onnxlr.calibrate import data_fingerprint, mask_of
from onnxlr.data import batches, numbered_batches, spread
from onnxlr.errors import ModelError
from onnxlr.report import Recovery
from onnxlr.task_loss import TaskLoss
from onnxlr.torch_graph import check_parity, float32_products, to_array, to_tensor, to_torch
from onnxlr.tuning.augment import takes_images
from onnxlr.tuning.checkpoint import load_checkpoint, run_identity, save_checkpoint
from onnxlr.tuning.distill import plan_lesson
from onnxlr.tuning.parallel import processes
from onnxlr.tuning.stream import Stream
from onnxlr.tuning.trained import trained_weights, with_weights
from onnxlr.tuning.training import EVALUATIONS, Run, Trainer
from onnxlr.validate import validate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from onnxlr.config import Config, Tuning
    from onnxlr.data import Dataset, Feed, TensorSpec
    from onnxlr.model_io import Model
    from onnxlr.torch_graph import TorchGraph
    from onnxlr.validate import Validation

LEAST_STEPS = 2000
"""Steps that a run of unspecified length takes at least, and no fewer than `LEAST_EPOCHS` epochs."""
LEAST_EPOCHS = 3
MANY = 100
"""Epochs above which images are augmented: fewer passes fit them too little to need it."""
LEAST_WATCHED, WATCHED = 128, 512
"""Held-out samples that are watched during training, at least and at most; the result is validated on all."""
MEASURED = 128
"""Samples on which the units of the loss are measured."""


@float32_products()
def recover(
    student: Model,
    teacher: Model,
    calibration: Dataset,
    held_out: Dataset,
    inputs: Sequence[TensorSpec],
    config: Config,
    tuning: Tuning,
    *,
    labels: NDArray[Any] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> tuple[Model, Recovery]:
    """Train `student` to do what `teacher` does.

    Parameters
    ----------
    student, teacher
        The compressed and the dense model.
    calibration, held_out
        What is trained on, and what is not.
    inputs
        Of both models.
    config
        Batch size in onnxruntime, mask, loss, metric, provider and threads are used.
    tuning
        How to train.
    labels
        One a sample of the whole data, for the metric and the loss.
    checkpoint
        Where the state is kept while it runs, and gone on from if there is one; it stays.
    progress
        Called with (steps done since the last call, steps in all, a note).

    Returns
    -------
    Model
        The best model seen; `student` itself where none was better on the held-out samples.
    Recovery
        What was done and found.

    Raises
    ------
    InstallError
        torch is not installed.
    ModelError
        torch cannot run a model, or not as onnxruntime does.
    ConfigError
        There is nothing to train, no such loss, or the checkpoint is of another run.
    DataError
        Too few samples, or labels that the loss fails on.
    """
    start = time.perf_counter()
    loss = tuning.loss or ("cross-entropy" if config.metric == "top1" else None)
    task = None if labels is None or loss is None else TaskLoss(loss)
    names = trained_weights(student, teacher, tuning.train)
    with processes() as own:
        graphs = [to_torch(model).to(own.device) for model in (student, teacher)]
        stream = Stream(calibration, inputs, tuning.batch, tuning.seed, own.rank, own.size)
        first = list(batches(spread(calibration, MEASURED), tuning.batch, inputs))
        for graph, model in zip(graphs, (student, teacher), strict=True):
            check_parity(graph, model, first[:1])
        given = [
            ({n: to_tensor(array, own.device) for n, array in feed.items()}, mask_of(feed, config.mask))
            for feed in first
        ]
        lesson = plan_lesson((student, graphs[0]), (teacher, graphs[1]), names, given, task)
        epochs = tuning.epochs or max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / stream.steps))
        steps = epochs * stream.steps
        truth = labels if task else None
        watched = _watched(held_out, inputs, tuning.batch, truth, steps)
        trainer = Trainer(
            graphs[0], graphs[1], lesson, stream, watched, truth, tuning, config.mask, steps,
            takes_images(inputs) and (tuning.augment == "always" or (tuning.augment == "auto" and epochs > MANY)), own,
        )  # fmt: skip
        identity = run_identity(
            student, teacher, tuning, mask=config.mask, loss=task and loss,
            data=[data_fingerprint(samples) for samples in (calibration, held_out)],
            labels=None if labels is None else hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest(),
        )  # fmt: skip
        resumed = None if checkpoint is None else load_checkpoint(checkpoint, identity)
        save = partial(save_checkpoint, checkpoint, identity) if checkpoint and own.rank == 0 else lambda _: None
        run = trainer.train(_reached(graphs[0], names, trainer, given), resumed, save, progress)
    tuned = _rebuilt(student, graphs[0], run, first[:1])
    before, after = (
        validate(
            teacher, model, held_out, batch=config.batch, mask=config.mask, labels=labels, metric=config.metric,
            provider=config.provider, threads=config.threads,
        )
        for model in (student, tuned)
    )  # fmt: skip
    better = _better(before, after, by_metric=task is not None)
    assert run.best is not None
    return tuned if better else student, Recovery(
        kept=better,
        ended=run.ended,
        steps=run.step,
        steps_planned=trainer.steps,
        samples=stream.samples,
        held_out=before.samples,
        trained=sum(values.numel() for values in run.best.values()),
        inner=tuple(lesson.inner),
        error_before=before.error,
        error_after=after.error,
        metric_before=before.metric_b,
        metric_after=after.metric_b,
        metric_dense=before.metric_a,
        history=tuple((step, loss, error) for step, loss, error, _ in run.history),
        processes=own.size,
        seconds=time.perf_counter() - start,
    )


def _watched(
    held_out: Dataset, inputs: Sequence[TensorSpec], batch: int, labels: NDArray[Any] | None, steps: int
) -> list[tuple[Feed, NDArray[Any] | None]]:
    """So many that watching takes a fifth of the time: two models run them forwards, and a step is the work of four."""
    most = steps * batch // (2 * EVALUATIONS)
    watched = numbered_batches(spread(held_out, min(max(most, LEAST_WATCHED), WATCHED)).indexed(), batch, inputs)
    return [(feed, None if labels is None else labels[numbers]) for numbers, feed in watched]


def _reached(graph: TorchGraph, names: Sequence[str], trainer: Trainer, given: Any) -> dict[str, Any]:
    """The parameters that the loss depends on, in the first batch or, with bodies that may not run, in any."""
    parameters = {name: graph.weight(name) for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_()
    ours, theirs = trainer.lesson.asked
    found: set[str] = set()
    for feed, mask in given if graph.captured() else given[:1]:
        with torch.no_grad():
            known = trainer.teacher(feed, outputs=theirs)
        loss = trainer.lesson.loss(graph(feed, outputs=ours), known, mask, None)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
            found |= {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    reached = {name: parameter for name, parameter in parameters.items() if name in found}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in reached)
    if not reached:
        raise ModelError("no gradient reaches the weights that are to be trained: none of them can be")
    return reached


def _rebuilt(student: Model, graph: TorchGraph, run: Run, feeds: Sequence[Feed]) -> Model:
    """The student with the best weights, if onnxruntime computes with them what torch does."""
    assert run.best is not None
    with torch.no_grad():
        for name, values in run.best.items():
            graph.weight(name).copy_(values)
    tuned = with_weights(student, {name: to_array(graph.weight(name)) for name in run.best})
    check_parity(graph.cpu(), tuned, feeds)
    return tuned


def _better(before: Validation, after: Validation, *, by_metric: bool) -> bool:
    if by_metric and before.metric_b is not None and after.metric_b is not None:
        return after.metric_b > before.metric_b or (after.metric_b == before.metric_b and after.error < before.error)
    return after.error < before.error

"""The loop: AdamW on the trained weights, warm-up and cosine, the running average watched on held-out data.

Every so many steps the averaged weights are tried on the held-out samples; the best that were seen are kept, and the
loop ends when half of its length has brought nothing better. Where they have become much worse, the learning rate was
too high for this model: the run goes on from the best weights with a third of it. Whatever is drawn is drawn by seed
and step, so that a run that goes on from a checkpoint takes the very steps that an unbroken one takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onnxlr.calibrate import mask_of
from onnxlr.metrics import token_rows
from onnxlr.torch_graph import float32_products, to_tensor
from onnxlr.tuning.augment import augment
from onnxlr.tuning.averaged import Weights
from onnxlr.tuning.distill import TASK

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from onnxlr.config import Tuning
    from onnxlr.data import Feed
    from onnxlr.torch_graph import TorchGraph
    from onnxlr.tuning.distill import Lesson
    from onnxlr.tuning.parallel import Processes
    from onnxlr.tuning.stream import Stream

    HeldOut = Sequence[tuple[Feed, NDArray[np.int64] | None]]
    """Batches of held-out samples, with their labels."""

EVALUATIONS = 30
"""How often a run looks at the held-out samples."""
PATIENCE = EVALUATIONS // 2
"""Looks without a gain after which it ends."""
WARM_UP = 0.05
"""The part of the steps over which the learning rate rises."""
AVERAGED = 0.02
"""The part of the steps that the running average reaches back over."""
LEAST_SIZE = 1e-5
"""Weights that are all 0 are moved as if this were their root mean square."""
CLIP = 1.0
"""The largest norm of a gradient."""
MUCH_WORSE = 1.15
"""The learning rate is cut where what is watched exceeds its best by this factor."""
CUT = 1 / 3
CUTS = 8
"""After so many cuts the run ends."""


@dataclass(slots=True)
class Run:
    """How far a run has come; what a checkpoint holds beside weights and optimizer.

    Attributes
    ----------
    step
        Steps done.
    best, value
        The best averaged weights, and what was watched with them; None before the first look.
    cuts
        How often the learning rate was cut.
    history
        (step, mean training loss since the last look, relative error of the outputs, what is watched) by look.
    ended
        Why it ended; empty while it runs.
    """

    step: int = 0
    best: dict[str, Tensor] | None = None
    value: float = math.inf
    cuts: int = 0
    history: list[tuple[int, float, float, float]] = field(default_factory=list)
    ended: str = ""

    @property
    def stale(self) -> int:
        """Looks since the best one."""
        values = [value for *_, value in self.history if not math.isnan(value)]
        return len(values) - 1 - values.index(min(values)) if values else 0


@dataclass(slots=True)
class Trainer:
    """Two graphs, what is compared between them, the data, and the settings."""

    student: TorchGraph
    teacher: TorchGraph
    lesson: Lesson
    stream: Stream
    held_out: HeldOut
    labels: NDArray[np.int64] | None
    tuning: Tuning
    mask: str | None
    steps: int
    images: bool
    processes: Processes

    def train(
        self,
        parameters: Mapping[str, Any],
        resumed: Mapping[str, Any] | None,
        checkpoint: Callable[[dict[str, Any]], None],
        report: Callable[[int, int, str], None],
    ) -> Run:
        """Train `parameters` of the student, from the start or from a checkpoint's state.

        `checkpoint` is handed the state after every look at the held-out samples; `report` is told of the steps done
        since its last call, of all steps, and of how the run stands.
        """
        run = Run()
        weights = Weights(parameters, round(AVERAGED * self.steps))
        optimizer = _optimizer(weights)
        half = any(parameter.dtype == torch.float16 for parameter in parameters.values())
        scaler = torch.amp.GradScaler(self.processes.device.type, enabled=half)
        captured = self.student.captured()
        idle = [parameter for name, parameter in parameters.items() if name in captured]
        module = self.processes.wrap(self.student)
        if resumed is not None:
            run = Run(
                resumed["step"],
                resumed["best"],
                resumed["value"],
                resumed["cuts"],
                resumed["history"],
                resumed["ended"],
            )
            _copy(weights.masters, resumed["masters"])
            _copy(weights.average, resumed["average"])
            weights.load(weights.masters)
            optimizer.load_state_dict(resumed["optimizer"])
            scaler.load_state_dict(resumed["scaler"])
            report(run.step, self.steps, "resumed")
        else:
            self._look(run, weights, math.nan)
        every = max(1, self.steps // EVALUATIONS)
        total = 0.0
        while run.step < self.steps and not run.ended:
            rate = self.tuning.learning_rate * CUT**run.cuts * schedule(run.step / self.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["size"]
            optimizer.zero_grad(set_to_none=True)
            loss = self._step(module, run.step, scaler, idle)
            total += loss
            weights.take_gradients()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights.masters.values(), CLIP)
            scaler.step(optimizer)
            scaler.update()
            weights.follow(run.step)
            run.step += 1
            if run.step % every == 0 or run.step == self.steps or not math.isfinite(total):
                self._look(run, weights, total / (run.step - run.history[-1][0]))
                total = 0.0
                assert run.best is not None
                if not run.history[-1][-1] <= MUCH_WORSE * run.value:
                    run.cuts += 1
                    weights.restart(run.best)
                    optimizer = _optimizer(weights)
                if run.cuts >= CUTS:
                    run.ended = f"stopped at step {run.step} of {self.steps}: it diverges, lower the learning rate"
                elif run.stale >= PATIENCE:
                    run.ended = f"stopped at step {run.step} of {self.steps}: held-out data gained nothing any more"
                checkpoint(
                    {
                        "step": run.step, "best": run.best, "value": run.value, "cuts": run.cuts, "ended": run.ended,
                        "history": run.history,
                        "masters": {name: master.detach() for name, master in weights.masters.items()},
                        "average": weights.average, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    }
                )  # fmt: skip
            error = run.history[-1][2]
            report(1, self.steps, f"loss {loss:.4g}, held-out error {error:.4g}")
        run.ended = run.ended or f"all {self.steps} steps"
        return run

    def _step(self, module: Any, step: int, scaler: Any, idle: Sequence[Any]) -> float:
        """Gradients of one batch, 0 for those of `idle` that it does not reach; the loss over all processes."""
        feed, chosen, share = self.stream[step]
        labels = None if self.labels is None else self._tensor(self.labels[chosen])
        given, mask = self._given(feed), mask_of(feed, self.mask)
        if self.images:
            drawn = (self.tuning.seed, step, self.processes.rank)
            generator = torch.Generator().manual_seed(int(np.random.SeedSequence(drawn).generate_state(1)[0]))
            given = {name: augment(images, generator, mix=labels is None) for name, images in given.items()}
        ours, theirs = self.lesson.asked
        with float32_products(tf32=True):
            with torch.no_grad():
                known = self.teacher(given, outputs=theirs)
            part = self.lesson.loss(module(given, outputs=ours), known, mask, labels) * share
            part = part + 0 * sum(parameter.flatten()[0] for parameter in idle)
            # processes average their gradients, which are parts of one sum
            scaler.scale(part * self.processes.size).backward()
        return float(self.processes.sum(part.detach()))

    def _look(self, run: Run, weights: Weights, loss: float) -> None:
        """Try the averaged weights on the held-out samples and keep them if they are the best so far."""
        with weights.averaged():
            error, task = self.held_out_error()
        value = error if self.lesson.task is None else error**2 + TASK * task
        run.history.append((run.step, loss, error, value))
        if value < run.value or run.best is None:
            run.value, run.best = value, {name: values.clone() for name, values in weights.average.items()}

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is Any to mypy
    def held_out_error(self) -> tuple[float, float]:
        """The relative error of the outputs, as validation defines it, and the task's mean loss, 0 without one."""
        outputs = list(self.lesson.scores)
        scores = [s for s, _ in self.lesson.scores.values()]
        sums = torch.zeros(len(outputs) + 1, 2, dtype=torch.float64)
        for feed, labels in self.held_out[self.processes.rank :: self.processes.size]:
            given, mask = self._given(feed), mask_of(feed, self.mask)
            ours, theirs = self.student(given, outputs=[*outputs, *scores]), self.teacher(given, outputs=outputs)
            for row, name in enumerate(outputs):
                for column, values in enumerate((ours[name].double() - theirs[name].double(), theirs[name].double())):
                    real = None if mask is None else token_rows(mask, tuple(values.shape))
                    if real is not None:
                        values = values.reshape(-1, values.shape[-1])[torch.from_numpy(real.copy()).to(values.device)]
                    sums[row, column] += values.square().sum().cpu()
            if self.lesson.task is not None and labels is not None:
                given_scores = {name: ours[s] for name, s in zip(outputs, scores, strict=True)}
                sums[-1] += torch.tensor([float(self.lesson.task(given_scores, self._tensor(labels))), len(labels)])
        total = self.processes.sum(sums.to(self.processes.device)).cpu()
        error = float((total[:-1, 0] / total[:-1, 1].clamp_min(1e-30)).max().sqrt())
        return error, float(total[-1, 0] / total[-1, 1]) if total[-1, 1] else 0.0

    def _given(self, feed: Feed) -> dict[str, Tensor]:
        return {name: to_tensor(array, self.processes.device) for name, array in feed.items()}

    def _tensor(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.processes.device)


def schedule(progress: float) -> float:
    """The learning rate's factor at a part of the run: a linear rise, then half a cosine down to 0."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))


def _optimizer(weights: Weights) -> Any:
    groups = [{"params": [master], "size": _size(master)} for master in weights.masters.values()]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _size(weight: Tensor) -> float:
    """How far each number of a weight may move in a step of 1, which then doubles the weight at most.

    The first steps of AdamW have the size of the rate everywhere, and their signs may all agree: for a matrix [m, n]
    that is a spectral norm of `sqrt(m n)`, where numbers of the same size at random have `sqrt(m) + sqrt(n)`. So wide
    matrices have to move less. For biases the two are the same.
    """
    size = float(weight.detach().double().square().mean().sqrt()) or LEAST_SIZE
    if weight.ndim < 2:
        return size
    m, n = len(weight), weight[0].numel()
    return float(size * (m**0.5 + n**0.5) / (m * n) ** 0.5)


def _copy(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(values[name])

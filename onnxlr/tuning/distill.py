"""What a compressed model is taught: to give the dense model's scores and, on the way, its tensors.

    loss = mean over outputs of |s - t|^2 / a  +  0.1 mean over waists of |s - t|^2 / a  (+ 0.1 the task's loss)

`s` and `t` are a tensor of the compressed and of the dense model, `|.|^2` the mean square over the elements of real
tokens. `a` puts every tensor into one unit: for scores it is the mean square of `t`, for inner tensors that of `t` less
its mean over the samples, since transformers carry large constants there. It is measured once, at the start.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from onnxlr.errors import ModelError
from onnxlr.metrics import token_rows
from onnxlr.task_loss import scores_of
from onnxlr.waists import waists

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from onnxlr.model_io import Model
    from onnxlr.task_loss import TaskLoss
    from onnxlr.torch_graph import TorchGraph

    Tensors = Mapping[str, Tensor]
    Batch = tuple[Tensors, NDArray[Any] | None]
    """What the models are fed, and the mask of the real tokens."""

INNER = 0.1
"""What inner tensors weigh beside the outputs: they help where data are few, and cost a little where they are many."""
TASK = 0.1
"""What the task's loss weighs: labels are few where calibration data are, and the dense model knows more than they."""
_TINY = 1e-12
MISTAKEN = 1.0
"""Above this relative error an inner tensor is none that a compressed model has only lost some precision of."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """Which tensors are compared, and in which unit.

    Attributes
    ----------
    scores
        By output, the names of its scores in the compressed and in the dense model.
    inner
        Names of tensors within both.
    scales
        By name in the dense model: the mean square that counts as 1.
    task
        A loss on labels, if there are any.
    """

    scores: Mapping[str, tuple[str, str]]
    inner: Sequence[str]
    scales: Mapping[str, float]
    task: TaskLoss | None

    @property
    def asked(self) -> tuple[list[str], list[str]]:
        """The tensors that a step needs of the compressed and of the dense model."""
        ours, theirs = zip(*self.scores.values(), strict=True)
        return [*ours, *self.inner], [*theirs, *self.inner]

    def loss(self, student: Tensors, teacher: Tensors, mask: NDArray[Any] | None, labels: Tensor | None) -> Tensor:
        """The loss above of a batch; the task's is its mean over the samples."""
        total = _mean([self._distance(student[s], teacher[t], t, mask) for s, t in self.scores.values()])
        if self.inner:
            inner = _mean([self._distance(student[name], teacher[name], name, mask) for name in self.inner])
            total = total + INNER * inner
        if self.task is not None and labels is not None:
            scores = {name: student[s] for name, (s, _) in self.scores.items()}
            total = total + TASK * self.task(scores, labels) / len(labels)
        return total

    def _distance(self, s: Tensor, t: Tensor, name: str, mask: NDArray[Any] | None) -> Tensor:
        return _mean_square(s.float() - t.float(), mask) / self.scales[name]


def plan_lesson(
    student: tuple[Model, TorchGraph],
    teacher: tuple[Model, TorchGraph],
    trained: Collection[str],
    batches: Iterable[Batch],
    task: TaskLoss | None,
) -> Lesson:
    """Find what to compare, and measure the units on some batches.

    An inner tensor is left out where its shapes differ, or where the compressed model is off by more than its whole
    variation: it is something else there, such as hidden units in another order.

    Raises
    ------
    ModelError
        No output is floating.
    """
    (ours, our_graph), (theirs, their_graph) = student, teacher
    mine, dense = (scores_of(model, their_graph.outputs) for model in (ours, theirs))
    scores = {name: (mine[name], dense[name]) for name in their_graph.outputs}
    known = set(their_graph.tensor_names())
    inner = [name for name in waists(ours.proto.graph, trained) if name in known]
    inner = [name for name in inner if name not in mine.values()]
    sums: dict[str, float] = defaultdict(float)
    off = dict.fromkeys(inner, 0.0)
    count = 0
    for feed, mask in batches:
        count += 1
        with torch.no_grad():
            s = our_graph(feed, outputs=[*mine.values(), *inner])
            t = their_graph(feed, outputs=[*dense.values(), *inner])
        scores = {name: pair for name, pair in scores.items() if t[pair[1]].is_floating_point()}
        for name in (pair[1] for pair in scores.values()):
            sums[name] += float(_mean_square(t[name].float(), mask))
        for name in tuple(off):
            if s[name].shape != t[name].shape or not t[name].is_floating_point():
                del off[name]
                continue
            values = t[name].float()
            several = values.ndim > 1 and len(values) > 1
            sums[name] += float(_mean_square(values - values.mean(0) if several else values, mask))
            off[name] += float(_mean_square(s[name].float() - t[name].float(), mask))
    if not scores:
        raise ModelError("no output of the model is floating, so there is nothing to teach")
    kept = [name for name in off if off[name] <= MISTAKEN * sums[name]]
    scales = {name: max(total / count, _TINY) for name, total in sums.items()}
    return Lesson(scores, kept, scales, task)


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()


def _mean_square(values: Tensor, mask: NDArray[Any] | None) -> Tensor:
    """The mean square of a tensor over the rows of real tokens; over all where the mask says nothing of its rows."""
    real = None if mask is None else token_rows(mask, tuple(values.shape))
    squares = values.square()
    if real is None:
        return squares.mean()
    rows = squares.reshape(-1, values.shape[-1])[torch.from_numpy(real.copy()).to(values.device)]
    return rows.sum() / max(rows.numel(), 1)  # of a batch that is all padding, nothing

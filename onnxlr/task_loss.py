"""What a model is trained for, where there are labels: a loss of its scores.

Scores are the outputs, or what a final softmax or sigmoid reads: probabilities near 0 and 1 have no gradient left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from onnxlr.errors import DataError, one_line
from onnxlr.task_metrics import load_function

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnxlr.model_io import Model

NO_CLASS = -100
"""The label of what has none, as torch has it."""
SATURATING = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})


def scores_of(model: Model, outputs: Sequence[str]) -> dict[str, str]:
    """By output: the tensor of the main graph that holds its scores."""
    makers = {name: node for node in model.proto.graph.node for name in node.output}
    return {
        name: makers[name].input[0] if name in makers and makers[name].op_type in SATURATING else name
        for name in outputs
    }


def cross_entropy(outputs: Mapping[str, Any], labels: Any) -> Any:
    """The sum over samples of the cross-entropy of the first output's scores [..., classes] and class indices [...]."""
    scores = next(iter(outputs.values()))
    scores, labels = scores.reshape(-1, scores.shape[-1]), labels.reshape(-1)
    if labels.is_floating_point():
        raise TypeError(f"labels are {labels.dtype}, where cross-entropy takes the numbers of classes")
    # on a GPU one out of range would end all work on it, and no message would say why
    wrong = labels[((labels < 0) | (labels >= scores.shape[1])) & (labels != NO_CLASS)]
    if len(wrong):
        raise IndexError(f"label {wrong[0].item()} where there are {scores.shape[1]} classes")
    return torch.nn.functional.cross_entropy(scores, labels.long(), reduction="sum", ignore_index=NO_CLASS)


class TaskLoss:
    """A loss by name: "cross-entropy", or "module:function" of (scores by output, labels), the sum over a batch.

    Raises
    ------
    ConfigError
        There is no such loss.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._function = load_function("loss", name, {"cross-entropy": cross_entropy})

    def __call__(self, scores: Mapping[str, Any], labels: Any) -> Any:
        """The loss of a batch, a tensor of one number.

        Raises
        ------
        DataError
            It fails, or gives anything but one number.
        """
        try:
            total = self._function(scores, labels)
            if getattr(total, "is_cuda", False):
                torch.cuda.synchronize()  # only then does a GPU say what failed
        except Exception as error:  # whatever the user's function raises
            raise DataError(f"loss {self.name!r} fails on a batch: {one_line(error)}") from error
        if not isinstance(total, torch.Tensor) or total.numel() != 1:
            given = f"a tensor {list(total.shape)}" if isinstance(total, torch.Tensor) else f"a {type(total).__name__}"
            raise DataError(
                f"loss {self.name!r} gives {given}: expected a tensor of one number, the sum over the batch"
            )
        return total.sum()

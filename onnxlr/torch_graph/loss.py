"""Losses that a graph itself computes: for models exported with their labels as an input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxlr.torch_graph.registry import operator


@operator("NegativeLogLikelihoodLoss", since=12)
def nll_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`-weight[target] x[target]` of log probabilities x [n, c, ..] and classes [n, ..]; "mean" divides by weights."""
    labels = target.long().reshape(len(target), -1)
    rows = x.reshape(*x.shape[:2], -1)
    if ignore_index is None:
        loss = F.nll_loss(rows, labels, weight, reduction=reduction)
    else:
        loss = F.nll_loss(rows, labels, weight, ignore_index=ignore_index, reduction=reduction)
    return loss.reshape(target.shape) if reduction == "none" else loss


@operator("SoftmaxCrossEntropyLoss", since=12)
def softmax_cross_entropy_loss(
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The loss above of the scores' log softmax over axis 1, and that log softmax."""
    logarithms = torch.log_softmax(scores, 1)
    return nll_loss(logarithms, target, weight, ignore_index=ignore_index, reduction=reduction), logarithms

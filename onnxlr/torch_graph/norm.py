"""Normalizations, as they run in inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxlr.torch_graph.registry import operator
from onnxlr.torch_graph.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def channels(values: Tensor, rank: int) -> Tensor:
    """A vector [c] in the shape that broadcasts along axis 1 of a tensor of `rank` axes."""
    return values.reshape(-1, *[1] * (rank - 2))


def _training(attributes: Mapping[str, Any]) -> str | None:
    return "training_mode = 1" if attributes.get("training_mode") else None


@operator("BatchNormalization", since=7, refuse=_training)
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    """`(x - mean) / sqrt(variance + epsilon) scale + bias`, per channel, with the stored statistics."""
    if x.dtype == scale.dtype == mean.dtype:
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
    factor = scale.float() * torch.rsqrt(variance.float() + epsilon)
    shift = bias.float() - mean.float() * factor
    return (x.float() * channels(factor, x.ndim) + channels(shift, x.ndim)).to(x.dtype)


@operator("InstanceNormalization", since=6)
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Each channel of each sample to mean 0 and variance 1, then scaled and shifted."""
    axes = tuple(range(2, x.ndim))
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + epsilon) * channels(scale, x.ndim) + channels(bias, x.ndim)


@operator("GroupNormalization", since=18)
def group_normalization_18(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Groups of channels to mean 0 and variance 1; scale and bias one a group."""
    repeats = x.shape[1] // num_groups
    return group_norm(x, scale.repeat_interleave(repeats), bias.repeat_interleave(repeats), num_groups, epsilon)


@operator("GroupNormalization", since=21)
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Groups of channels to mean 0 and variance 1; scale and bias one a channel."""
    return group_norm(x, scale, bias, num_groups, epsilon)


def group_norm(x: Tensor, scale: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
    """The normalization itself; scale and bias [c]."""
    return F.group_norm(x, groups, scale.to(x.dtype), bias.to(x.dtype), epsilon)


@operator("LayerNormalization", since=17)
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    n_outputs: int,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The axes from `axis` on to mean 0 and variance 1, scaled and shifted; also the mean and 1 / deviation."""
    axes = x.shape[axis:]
    if n_outputs == 1 and scale.shape == axes and (bias is None or bias.shape == axes) and x.dtype == scale.dtype:
        return F.layer_norm(x, axes, scale, bias, epsilon)
    dims = tuple(range(axis % x.ndim, x.ndim))
    y = x.to(DTYPES[stash_type]) if x.element_size() < 4 else x
    mean = y.mean(dims, keepdim=True)
    inverse = torch.rsqrt((y - mean).square().mean(dims, keepdim=True) + epsilon)
    y = ((y - mean) * inverse).to(x.dtype) * scale
    return (y if bias is None else y + bias), mean, inverse


@operator("RMSNormalization", since=23)
def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """`x` divided by its root mean square over the axes from `axis` on, scaled."""
    return rms_norm(x, scale, axis, epsilon, stash_type)[0]


def rms_norm(x: Tensor, scale: Tensor, axis: int, epsilon: float, stash_type: int = 1) -> tuple[Tensor, Tensor]:
    """The normalization itself, and 1 / root mean square."""
    dims = tuple(range(axis % x.ndim, x.ndim))
    y = x.to(DTYPES[stash_type]) if x.element_size() < 4 else x
    inverse = torch.rsqrt(y.square().mean(dims, keepdim=True) + epsilon)
    return (y * inverse).to(x.dtype) * scale, inverse


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """Some axes to mean 0 and variance 1."""
    mean = x.mean(tuple(axes), keepdim=True)
    deviation = (x - mean).square().mean(tuple(axes), keepdim=True).sqrt()
    return (x - mean) / (deviation + 1e-9)


@operator("LRN")
def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """`x / (bias + alpha / size * sum of squares over `size` neighbouring channels) ** beta`."""
    squares = F.pad(x.square().movedim(1, -1), ((size - 1) // 2, size // 2))
    total = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return x / torch.pow(bias + alpha / size * total, beta)

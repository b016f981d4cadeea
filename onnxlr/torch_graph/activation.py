"""Activation functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxlr.torch_graph.registry import operator


@operator("Relu")
def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`."""
    return torch.relu(x)


@operator("Sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + exp(-x))`."""
    return torch.sigmoid(x)


@operator("Tanh")
def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent."""
    return torch.tanh(x)


@operator("Softplus")
def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`."""
    return F.softplus(x)


@operator("Softsign")
def softsign(x: Tensor) -> Tensor:
    """`x / (1 + |x|)`."""
    return F.softsign(x)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """`x`, times `alpha` below 0."""
    return F.leaky_relu(x, alpha)


@operator("PRelu", since=7)
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """`x`, times `slope` (broadcast to `x`) below 0."""
    return torch.where(x < 0, x * slope, x)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`x`, or `alpha (exp(x) - 1)` below 0."""
    return torch.where(x < 0, alpha * torch.expm1(x.clamp(max=0)), x)


@operator("Celu", since=12)
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`max(x, 0) + min(alpha (exp(x / alpha) - 1), 0)`."""
    return F.celu(x, alpha)


@operator("Selu")
def selu(x: Tensor, *, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805) -> Tensor:
    """`gamma` times an Elu."""
    return gamma * elu(x, alpha=alpha)


@operator("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`x` above `alpha`, else 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operator("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """`x` moved towards 0 by `bias` outside of [-lambd, lambd], 0 within."""
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """`alpha x + beta` within [0, 1]."""
    return torch.clamp(alpha * x + beta, 0, 1)


@operator("HardSwish", since=14)
def hard_swish(x: Tensor) -> Tensor:
    """`x` times the hard sigmoid of slope 1/6."""
    return x * torch.clamp(x / 6 + 0.5, 0, 1)


@operator("Mish", since=18)
def mish(x: Tensor) -> Tensor:
    """`x tanh(softplus(x))`."""
    return F.mish(x)


@operator("Gelu", since=20)
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """`x` times the normal distribution function of `x`, exact or by tanh."""
    return F.gelu(x, approximate=approximate)


@operator("Swish", since=24)
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`x sigmoid(alpha x)`."""
    return x * torch.sigmoid(alpha * x)


@operator("SwiGLU", since=28)
def swiglu(gate: Tensor, value: Tensor, *, alpha: float = 1.0) -> Tensor:
    """A swish of the gate, times the value."""
    return swish(gate, alpha=alpha) * value


def _rows(x: Tensor, axis: int) -> Tensor:
    """The matrix [before axis, from axis on] that softmax works on up to opset 12."""
    axis %= max(x.ndim, 1)
    return x.reshape(x.shape[:axis].numel(), -1)


@operator("Softmax")
def softmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """Softmax over all axes from `axis` on."""
    return torch.softmax(_rows(x, axis), -1).reshape(x.shape)


@operator("LogSoftmax")
def log_softmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """Logarithm of the softmax over all axes from `axis` on."""
    return torch.log_softmax(_rows(x, axis), -1).reshape(x.shape)


@operator("Hardmax")
def hardmax_1(x: Tensor, *, axis: int = 1) -> Tensor:
    """1 at the first maximum over all axes from `axis` on, else 0."""
    return hardmax(_rows(x, axis), axis=-1).reshape(x.shape)


@operator("Softmax", since=13)
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Softmax along one axis."""
    return torch.softmax(x, axis)


@operator("LogSoftmax", since=13)
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Logarithm of the softmax along one axis."""
    return torch.log_softmax(x, axis)


@operator("Hardmax", since=13)
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first maximum along an axis, else 0."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)

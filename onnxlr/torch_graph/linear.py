"""Products of matrices: MatMul, Gemm, Einsum and their integer forms."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxlr.torch_graph.registry import operator


@operator("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product of matrices, as numpy's: [.., n, k] by [.., k, m] to [.., n, m]."""
    return torch.matmul(a, b)


@operator("Gemm", since=7)
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """`alpha op(a) op(b) + beta c`, where `op` transposes if asked to."""
    y = torch.matmul(a.T if transA else a, b.T if transB else b)
    if alpha != 1:
        y = y * alpha if y.is_floating_point() else (y * alpha).to(y.dtype)
    if c is None:
        return y
    return y + (c if beta == 1 else (c * beta).to(y.dtype))


@operator("Einsum", since=12)
def einsum(*xs: Tensor, equation: str) -> Tensor:
    """Einstein's summation."""
    return torch.einsum(equation, *xs)


def minus_zero_point(x: Tensor, zero_point: Tensor | None, row: bool = False) -> Tensor:
    """An integer matrix in int32, less its zero point, which is one number or one a row (`row`) or column."""
    if zero_point is None:
        return x.int()
    if row and zero_point.ndim == 1 and zero_point.numel() > 1:
        zero_point = zero_point[:, None]
    return x.int() - zero_point.int()


@operator("MatMulInteger", since=10)
def matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """Product of integer matrices, less their zero points, in int32."""
    return torch.matmul(minus_zero_point(a, a_zero_point, row=True), minus_zero_point(b, b_zero_point))

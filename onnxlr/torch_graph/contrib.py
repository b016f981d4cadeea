"""Operators of the domain com.microsoft that onnxruntime's transformer optimizer fuses nodes into.

Source: docs/ContribOperators.md of onnxruntime. Forms with caches or packed projections are refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxlr.torch_graph import activation, conv
from onnxlr.torch_graph.attention import masked_softmax, merge_heads, rotated, split_heads
from onnxlr.torch_graph.linear import gemm
from onnxlr.torch_graph.norm import rms_norm
from onnxlr.torch_graph.registry import MICROSOFT, operator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "": lambda x: x,
    "Relu": activation.relu,
    "Tanh": activation.tanh,
    "Sigmoid": activation.sigmoid,
    "LeakyRelu": activation.leaky_relu,
    "HardSigmoid": activation.hard_sigmoid,
    "Gelu": activation.gelu,
    "Clip": torch.clamp,
}


def _activated(x: Tensor, name: str, parameters: Sequence[float]) -> Tensor:
    if name == "Clip":
        return torch.clamp(x, *parameters)
    return _ACTIVATIONS[name](x, **dict(zip(("alpha", "beta"), parameters, strict=False)))


@operator("Gelu", domain=MICROSOFT)
def gelu(x: Tensor) -> Tensor:
    """The exact Gelu."""
    return F.gelu(x)


@operator("BiasGelu", domain=MICROSOFT)
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """The exact Gelu of `x + bias`."""
    return F.gelu(x + bias)


@operator("FastGelu", domain=MICROSOFT)
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The Gelu by tanh, of `x + bias`."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=MICROSOFT)
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """`x sigmoid(alpha x)`."""
    return activation.swish(x, alpha=alpha)


@operator("BiasAdd", domain=MICROSOFT)
def bias_add(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """`x + bias + skip`."""
    return x + bias + skip


@operator("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """`alpha op(a) op(b)`; the batch flags say that the matrix's rows are axis 0 and the batch follows them."""

    def laid_out(x: Tensor, transposed: int, batch: int) -> Tensor:
        x = x.movedim(0, -2) if batch else x
        return x.transpose(-2, -1) if transposed and x.ndim > 1 else x

    return alpha * torch.matmul(laid_out(a, transA, transBatchA), laid_out(b, transB, transBatchB))


@operator(
    "FusedMatMulActivation",
    domain=MICROSOFT,
    refuse=lambda a: None if a["activation"] in _ACTIVATIONS else f"activation {a['activation']}",
)
def fused_matmul_activation(
    a: Tensor,
    b: Tensor,
    *,
    activation: str,
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """A FusedMatMul and an activation."""
    product = fused_matmul(
        a, b, alpha=alpha, transA=transA, transB=transB, transBatchA=transBatchA, transBatchB=transBatchB
    )
    parameters = [value for value in (activation_alpha, activation_beta) if value is not None]
    return _activated(product, activation, parameters)


@operator("FusedGemm", domain=MICROSOFT)
def fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """A Gemm and an activation."""
    parameters = [value for value in (activation_alpha, activation_beta) if value is not None]
    return _activated(gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB), activation, parameters)


@operator("FusedConv", domain=MICROSOFT)
def fused_conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """A convolution, plus `z`, and an activation."""
    y = conv.conv(x, w, bias, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return _activated(y if z is None else y + z, activation, activation_params)


@operator("SimplifiedLayerNormalization", domain=MICROSOFT)
@operator("SimplifiedLayerNormalization")
def simplified_layer_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Tensor, Tensor]:
    """`x` by its root mean square. onnxruntime registers it in ONNX's own domain too."""
    return rms_norm(x, scale, axis, epsilon, stash_type)


@operator("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
) -> tuple[Tensor, None, None, Tensor]:
    """Layer normalization of `x + skip + bias`; the sum is output 3."""
    total = x + skip if bias is None else x + skip + bias
    return F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon), None, None, total


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_simplified_layer_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-12
) -> tuple[Tensor, None, None, Tensor]:
    """Root-mean-square normalization of `x + skip + bias`; the sum is output 3."""
    total = x + skip if bias is None else x + skip + bias
    return rms_norm(total, gamma, -1, epsilon)[0], None, None, total


@operator(
    "EmbedLayerNormalization",
    domain=MICROSOFT,
    refuse=lambda a: "mask_index_type" if a.get("mask_index_type") else None,
)
def embed_layer_norm(
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Word, position and segment embeddings added up and normalized; the number of real tokens; the plain sum."""
    places = torch.arange(ids.shape[1], device=ids.device)[None] if position_ids is None else position_ids.long()
    total = words[ids.long()] + positions[places]
    if segments is not None and types is not None:
        total = total + types[segments.long()]
    counts = torch.zeros(len(ids), dtype=torch.int32) if mask is None else mask.sum(1).int()
    return F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon), counts, total


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, causal: int, filter_value: float
) -> Tensor:
    """Attention of [n, heads, s, d] with an additive bias."""
    if causal:
        ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2])
        shut = torch.zeros(ahead.shape, dtype=q.dtype, device=q.device).masked_fill(ahead, filter_value)
        bias = shut if bias is None else bias + shut
    scores = (q @ k.transpose(2, 3)) * (scale or 1 / math.sqrt(q.shape[3]))
    return merge_heads(masked_softmax(scores if bias is None else scores + bias, bias) @ v)


def _mask_bias(mask: Tensor | None, keys: int, like: Tensor, filter_value: float) -> Tensor | None:
    """The bias of a mask: [n] lengths, [2 n] ends and starts, [n, keys], [n, queries, keys] or [n, 1, q, keys]."""
    if mask is None:
        return None
    if mask.ndim == 1:
        place = torch.arange(keys, device=like.device)
        batch = len(like)
        allowed = place < mask[:batch, None]
        if len(mask) == 2 * batch:
            allowed = allowed & (place >= mask[batch:, None])
        allowed = allowed[:, None, None]
    elif mask.ndim == 2:
        allowed = mask.bool()[:, None, None]
    else:
        allowed = (mask.bool()[:, None] if mask.ndim == 3 else mask.bool())[..., :keys]
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, filter_value)


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


@operator(
    "Attention",
    domain=MICROSOFT,
    refuse=lambda a: (
        "rotary embedding or a shared cache" if a.get("do_rotary") or a.get("past_present_share_buffer") else None
    ),
)
def attention(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    num_heads: int,
    do_rotary: int = 0,
    mask_filter_value: float = -10000.0,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: Sequence[int] = (),
    rotary_embedding_dim: int = 0,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Tensor, Tensor]:
    """Self-attention of x [n, s, h] with one projection to q, k and v; also keys and values [2, n, heads, s, d]."""
    qkv = torch.matmul(x, w) if bias is None else torch.matmul(x, w) + bias
    sizes = list(qkv_hidden_sizes) or [qkv.shape[-1] // 3] * 3
    q, k, v = (split_heads(part, num_heads) for part in qkv.split(sizes, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    total = _joined(_mask_bias(mask, k.shape[2], q, mask_filter_value), attention_bias)
    y = _attend(q, k, v, total, scale, unidirectional, mask_filter_value)
    return y, torch.stack([k, v]) if k.shape == v.shape else k


@operator("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = -10000.0,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q [n, s, h] to k and v [n, l, h] (or split into heads already); also the keys and values."""
    if q.ndim == 5:
        q, k, v = (part.flatten(2) for part in q.unbind(3))
    elif k is not None and k.ndim == 5:
        k, v = (part.flatten(2) for part in k.unbind(3))
    assert k is not None, "MultiHeadAttention without keys"
    assert v is not None, "MultiHeadAttention without values"
    if bias is not None:
        width = q.shape[-1]
        q = q + bias[:width]
        k = k + bias[width : 2 * width] if k.ndim == 3 else k
        v = v + bias[2 * width :] if v.ndim == 3 else v
    queries = split_heads(q, num_heads)
    keys = split_heads(k, num_heads) if k.ndim == 3 else k
    values = split_heads(v, num_heads) if v.ndim == 3 else v
    if past_key is not None and past_value is not None:
        keys, values = torch.cat([past_key, keys], 2), torch.cat([past_value, values], 2)
    total = _joined(_mask_bias(mask, keys.shape[2], queries, mask_filter_value), attention_bias)
    return _attend(queries, keys, values, total, scale, unidirectional, mask_filter_value), keys, values


@operator(
    "RotaryEmbedding", domain=MICROSOFT, refuse=lambda a: "packed batching" if a.get("is_packed_batching") else None
)
def rotary_embedding(
    x: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Positions as rotations; `positions` [n, s], or [1]: the position of the first token."""
    heads = x if x.ndim == 4 else split_heads(x, num_heads or x.shape[-1] // (2 * cos.shape[-1]))
    size = rotary_embedding_dim or heads.shape[-1]
    if positions.numel() == 1:
        positions = positions.reshape(1, 1) + torch.arange(heads.shape[2], device=x.device)
    angles = cos[positions.long()].unsqueeze(1), sin[positions.long()].unsqueeze(1)
    y = torch.cat([rotated(heads[..., :size], *angles, interleaved), heads[..., size:]], -1)
    return y if x.ndim == 4 else merge_heads(y)

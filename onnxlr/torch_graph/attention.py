"""Attention and rotary embeddings of ONNX's own domain (opset 23 on)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onnxlr.torch_graph.registry import operator
from onnxlr.torch_graph.tensors import DTYPES


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[n, s, heads * d] to [n, heads, s, d]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[n, heads, s, d] to [n, s, heads * d]."""
    return x.transpose(1, 2).flatten(2)


def masked_softmax(scores: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax along the last axis; a row that `bias` shuts completely (all -inf) gives zeros, with zero gradients."""
    if bias is None:
        return torch.softmax(scores, -1)
    shut = torch.isneginf(bias).all(-1, keepdim=True)
    if not bool(shut.any()):
        return torch.softmax(scores, -1)
    scores = torch.where(shut, torch.zeros_like(scores), scores)
    weights = torch.softmax(scores, -1)
    return torch.where(shut, torch.zeros_like(weights), weights)


def _as_bias(allowed: Tensor, like: Tensor) -> Tensor:
    """0 where allowed, -inf elsewhere."""
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, float("-inf"))


def _bias(
    q: Tensor,
    keys: int,
    mask: Tensor | None,
    offset: Tensor,
    valid: Tensor | None,
    causal: int,
    windows: tuple[int, int],
) -> Tensor | None:
    """Everything that is added to the scores [n, heads, queries, keys], broadcastable; None where nothing is."""
    parts = []
    if mask is not None:
        mask = _as_bias(mask, q) if mask.dtype == torch.bool else mask
        if mask.shape[-1] < keys:
            mask = torch.nn.functional.pad(mask, (0, keys - mask.shape[-1]), value=float("-inf"))
        parts.append(mask)
    place = torch.arange(keys, device=q.device)
    distance = torch.arange(q.shape[2], device=q.device)[:, None] + offset[:, None, None, None] - place
    left, right = windows
    if causal:
        right = 0 if right < 0 else min(right, 0)
    if left >= 0:
        parts.append(_as_bias(distance <= left, q))
    if right >= 0:
        parts.append(_as_bias(-distance <= right, q))
    if valid is not None:
        parts.append(_as_bias(place < valid[:, None, None, None], q))
    return sum(parts[1:], parts[0]) if parts else None


@operator("Attention", since=23)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled dot-product attention with grouped heads, caches, masks and windows; see the operator's own document.

    Returns the output, the keys and values (past ones included), and the scores at the stage asked for.
    """
    flat = q.ndim == 3
    if flat:
        assert q_num_heads is not None
        assert kv_num_heads is not None
        q, k, v = split_heads(q, q_num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    offset = torch.zeros(1, dtype=torch.int64, device=q.device)
    if past_key is not None and past_value is not None:
        offset = offset + past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    elif valid is not None:
        offset = valid.long() - q.shape[2]
    present = k, v
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    root = math.sqrt(1 / math.sqrt(q.shape[3]) if scale is None else scale)
    bias = _bias(q, k.shape[2], mask, offset, valid, is_causal, (left_window_size, right_window_size))

    scores = (q * root) @ (k * root).transpose(2, 3)
    shown = scores
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if qk_matmul_output_mode >= 1:
        shown = scores
    if bias is not None:
        scores = scores + bias
    if qk_matmul_output_mode == 2:
        shown = scores
    wide = scores if softmax_precision is None else scores.to(DTYPES[softmax_precision])
    weights = masked_softmax(wide, bias).to(q.dtype)
    if qk_matmul_output_mode == 3:
        shown = weights
    y = weights @ v
    return (merge_heads(y) if flat else y), *present, shown


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: int) -> Tensor:
    """Rotate pairs of x [n, heads, s, d] by angles; cos and sin [n or 1, 1, s, d / 2]."""
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    real, imaginary = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        return torch.stack([real, imaginary], -1).flatten(-2)
    return torch.cat([real, imaginary], -1)


@operator("RotaryEmbedding", since=23)
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Positions as rotations (Su et al. 2021) of the first `rotary_embedding_dim` features of each head."""
    heads = split_heads(x, num_heads) if x.ndim == 3 else x
    size = rotary_embedding_dim or heads.shape[-1]
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    turned = rotated(heads[..., :size], cos.unsqueeze(1), sin.unsqueeze(1), interleaved)
    y = torch.cat([turned, heads[..., size:]], -1)
    return merge_heads(y) if x.ndim == 3 else y

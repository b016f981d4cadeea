"""Multiply-accumulate operations of a node, from the shapes of its tensors.

Counted are the operators that multiply matrices or convolve; elementwise operators count nothing, as everywhere in the
field.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from onnxlr.sites.equation import spelled_out

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_graphsurgeon as gs

    Shape = tuple[int, ...]

MATRIX_PRODUCTS = frozenset(
    {
        "MatMul", "FusedMatMul", "TransposeMatMul", "FusedMatMulActivation", "GemmFastGelu", "MatMulInteger",
        "MatMulInteger16", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QOrderedMatMul",
        "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "MatMulPacked", "MatMulBlockQuantizedFp4Weight",
        "MatMulBlockQuantizedFp8Weight",
    }
)  # fmt: skip
"""The last axis of what they read first, or the one before, is summed over."""
GEMMS = frozenset({"Gemm", "FusedGemm", "QGemm", "GemmFloat8"})
CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcConv", "NhwcFusedConv", "ConvInteger", "DeformConv"})
TRANSPOSED_CONVOLUTIONS = frozenset({"ConvTranspose", "ConvTransposeWithDynamicPads"})
RECURRENT = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
COUNTED = (
    MATRIX_PRODUCTS
    | GEMMS
    | CONVOLUTIONS
    | TRANSPOSED_CONVOLUTIONS
    | RECURRENT
    | {"QLinearConv", "Attention", "Einsum"}
)
UNKNOWN = frozenset(
    {
        "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "PackedMultiHeadAttention",
        "DecoderAttention", "DecoderMaskedSelfAttention", "DecoderMaskedMultiHeadAttention", "LongformerAttention",
        "SparseAttention", "DynamicSparseAttention", "PagedAttention", "SparsePagedAttention", "LinearAttention",
        "SparseAttentionIndexer", "PackedSparseAttentionIndexer", "GatedRelativePositionBias", "GatedDeltaNet",
        "GatedDeltaNetStateReplay", "Mamba2Verify", "CausalConvWithState", "VarlenCausalConvWithState", "AttnLSTM",
        "MoE", "MoEPacked", "MoEGroupRouter", "QMoE", "RouterGateUpProj", "HyperConnectionLowRankMix",
        "HyperConnectionPostMix", "HyperConnectionPreMix", "SparseToDenseMatMul", "CDist", "WordConvEmbedding",
        "QAttention", "QOrderedAttention", "QOrderedLongformerAttention", "QLinearConvTranspose", "MatMulNBitsMlp",
        "MatMulNBitsQkv", "MatMulNBitsQLoRA",
    }
)  # fmt: skip
"""Operators that multiply, whose count is not known here."""


def macs(node: gs.Node, shapes: Mapping[str, Shape]) -> int | None:
    """Multiply-accumulates of one run of `node`; None where it is unknown, 0 for operators that do not multiply."""
    if node.op in UNKNOWN:
        return None
    if node.op not in COUNTED:
        return 0
    try:
        return _count(node, shapes)
    except (KeyError, IndexError, ValueError):  # a shape is unknown, or an equation unclear
        return None


def _count(node: gs.Node, shapes: Mapping[str, Shape]) -> int | None:
    def of(index: int) -> Shape:
        return shapes[node.inputs[index].name]

    if node.op in RECURRENT:
        steps, batch = of(0)[:2]
        return steps * batch * (prod(of(1)) + prod(of(2)))
    output = shapes[node.outputs[0].name]
    if node.op in MATRIX_PRODUCTS:
        inner = of(0)[-2 if node.attrs.get("transA", 0) and len(of(0)) > 1 else -1]
        return prod(output) * inner
    if node.op in GEMMS:
        return prod(output) * of(0)[0 if node.attrs.get("transA", 0) else 1]
    if node.op in CONVOLUTIONS:
        return prod(output) * prod(of(1)[1:])
    if node.op == "QLinearConv":
        return prod(output) * prod(of(3)[1:])
    if node.op in TRANSPOSED_CONVOLUTIONS:
        return prod(of(0)) * prod(of(1)[1:])
    if node.op == "Einsum":
        if len(node.inputs) != 2:
            return None
        terms, _ = spelled_out(node.attrs["equation"], (len(of(0)), len(of(1))))
        lengths: dict[str, int] = {}
        for letter, length in zip("".join(terms), of(0) + of(1), strict=True):
            lengths[letter] = max(length, lengths.get(letter, 1))  # an axis of length 1 is broadcast
        return prod(lengths.values())
    past = of(4)[-2] if len(node.inputs) > 4 and node.inputs[4].name else 0
    if node.domain != "com.microsoft":  # ONNX's Attention: queries times keys, then scores times values
        return (prod(of(0)) + prod(output)) * (of(1)[-2] + past)
    batch, length, width = of(0)  # com.microsoft Attention: packed projection, scores, mixing
    queries, _, values = node.attrs.get("qkv_hidden_sizes", [of(1)[1] // 3] * 3)
    if node.attrs.get("past_present_share_buffer", 0):  # how much of the past is filled is a value, not a shape
        return None
    return batch * length * (width * of(1)[1] + (length + past) * int(queries + values))

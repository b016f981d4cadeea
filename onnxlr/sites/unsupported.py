"""Linear operators that are not compressed yet, each with its reason.

They are listed with their share of the model, so that nothing is left out in silence. A family that learns to compress
one of them takes it off this list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from onnxlr.sites.constants import GraphView

QUANTIZED = "it is quantized already: compress before quantizing"
FUSED = "a fused operator that is not supported yet: compress before fusing"
TABLE = "an embedding table of a fused operator that is not supported yet: compress before fusing"
EXPERTS = "the experts of a fused operator that is not supported yet: compress before fusing"
CHANNELS = "it convolves each channel by itself, which leaves nothing to factor"
OPTIMIZED = "its weight is laid out by onnxruntime's optimizer: compress before optimizing"

REASONS = {
    **dict.fromkeys(
        (
            "MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul",
            "QGemm", "GemmFloat8", "QAttention", "QLinearConv", "QLinearConvTranspose", "ConvInteger",
            "DynamicQuantizeLSTM", "MatMulNBits", "MatMulNBitsMlp", "MatMulNBitsQkv", "MatMulNBitsQLoRA", "MatMulBnb4",
            "MatMulFpQ4", "MatMulPacked", "MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight", "QMoE",
            "MoEPacked", "QOrderedMatMul", "QOrderedAttention", "QOrderedLongformerAttention",
            "QEmbedLayerNormalization", "GatherBlockQuantized", "GatherPacked",
        ),
        QUANTIZED,
    ),
    **dict.fromkeys(
        (
            "GemmFastGelu", "RouterGateUpProj", "MoEGroupRouter", "HyperConnectionLowRankMix", "AttnLSTM",
            "LongformerAttention", "DecoderAttention", "GatedRelativePositionBias",
        ),
        FUSED,
    ),
    **dict.fromkeys(("EmbedLayerNormalization", "TorchEmbedding", "WordConvEmbedding", "RelativePositionBias"), TABLE),
    **dict.fromkeys(("CausalConvWithState", "VarlenCausalConvWithState", "Mamba2Verify"), CHANNELS),
    **dict.fromkeys(("NhwcConv", "NhwcFusedConv"), OPTIMIZED),
    "MoE": EXPERTS,
    "DeformConv": "it multiplies samples at places that are data: this operator is not supported yet",
    "ConvTransposeWithDynamicPads": "its pads are data: make them attributes of a ConvTranspose",
    "SparseToDenseMatMul": "it multiplies a sparse matrix: store it densely, as a MatMul",
}  # fmt: skip
"""By operator type, in any domain; only nodes that read a constant weight count."""

PACKED = frozenset({"MatMulBnb4", "MatMulFpQ4"})
"""Operators whose weight, the second input, is a vector of bytes."""

LAYOUTS = frozenset({"com.microsoft.nchwc", "com.ms.internal.nhwc"})
"""Domains of convolutions that onnxruntime's optimizer writes."""


def unsupported(node: gs.Node, view: GraphView) -> str | None:
    """Why a node of no family stays as it is; None where it reads no constant weight, or is not known to multiply."""
    own = node.domain in LAYOUTS and node.op in ("Conv", "ConvTranspose")
    reason = OPTIMIZED if own else REASONS.get(node.op)
    return reason if reason is not None and (matrices(node, view) or any(map(view.is_sparse, node.inputs))) else None


def matrices(node: gs.Node, view: GraphView) -> set[str]:
    """The names of the constants with two axes or more that a node reads, and of a weight of bytes."""
    if node.op in PACKED:
        return view.matrices(node.inputs[1], axes=1)
    return {source for tensor in node.inputs for source in view.matrices(tensor)}

"""Linear operators that are not compressed yet, each with its reason.

They are listed with their share of the model, so that nothing is left out in silence. A family that learns to compress
one of them takes it off this list.
"""

from __future__ import annotations

QUANTIZED = "it is quantized already: compress before quantizing"
LATER = "this operator is not supported yet"

REASONS = {
    "EmbedLayerNormalization": f"embedding tables of a fused operator: {LATER}, compress before fusing",
    "FusedMatMulActivation": "a fused operator of DirectML: compress before fusing",
    "MatMulInteger": QUANTIZED,
    "MatMulIntegerToFloat": QUANTIZED,
    "DynamicQuantizeMatMul": QUANTIZED,
    "QLinearMatMul": QUANTIZED,
    "QGemm": QUANTIZED,
    "QAttention": QUANTIZED,
    "QLinearConv": QUANTIZED,
    "ConvInteger": QUANTIZED,
    "MatMulNBits": QUANTIZED,
    "MatMulBnb4": QUANTIZED,
    "DynamicQuantizeLSTM": QUANTIZED,
    "QOrderedMatMul": QUANTIZED,
    "QOrderedAttention": QUANTIZED,
    "QEmbedLayerNormalization": QUANTIZED,
    "GatherBlockQuantized": QUANTIZED,
}
"""By operator type, in any domain; only nodes that read a constant matrix (two axes or more) count."""

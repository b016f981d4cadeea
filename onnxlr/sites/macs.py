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
        "MatMul",
        "FusedMatMul",
        "TransposeMatMul",
        "FusedMatMulActivation",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
    }
)
CONVOLUTIONS = frozenset({"Conv", "FusedConv", "ConvInteger"})
RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1, "DynamicQuantizeLSTM": 4}
COUNTED = MATRIX_PRODUCTS | CONVOLUTIONS | RECURRENT.keys() | {
    "Gemm", "FusedGemm", "QGemm", "QLinearMatMul", "QLinearConv", "ConvTranspose", "MatMulNBits", "Attention", "Einsum",
}  # fmt: skip
UNKNOWN = frozenset(
    {
        "MultiHeadAttention",
        "GroupQueryAttention",
        "PackedAttention",
        "DecoderMaskedSelfAttention",
        "QAttention",
        "MatMulBnb4",
        "QOrderedMatMul",
        "QOrderedAttention",
    }
)
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
    if node.op in ("Gemm", "FusedGemm", "QGemm"):
        return prod(output) * of(0)[0 if node.attrs.get("transA", 0) else 1]
    if node.op == "QLinearMatMul":
        return prod(output) * of(0)[-1]
    if node.op == "MatMulNBits":
        return prod(output) * int(node.attrs["K"])
    if node.op in CONVOLUTIONS:
        return prod(output) * prod(of(1)[1:])
    if node.op == "QLinearConv":
        return prod(output) * prod(of(3)[1:])
    if node.op == "ConvTranspose":
        return prod(of(0)) * prod(of(1)[1:])
    if node.op == "Einsum":
        if len(node.inputs) != 2:
            return None
        terms, _ = spelled_out(node.attrs["equation"], (len(of(0)), len(of(1))))
        lengths: dict[str, int] = {}
        for letter, length in zip("".join(terms), of(0) + of(1), strict=True):
            lengths[letter] = max(length, lengths.get(letter, 1))  # an axis of length 1 is broadcast
        return prod(lengths.values())
    if node.domain != "com.microsoft":  # ONNX's Attention: queries times keys, then scores times values
        past = of(4)[-2] if len(node.inputs) > 4 and node.inputs[4].name else 0
        return (prod(of(0)) + prod(output)) * (of(1)[-2] + past)
    batch, length, width = of(0)  # com.microsoft Attention: packed projection, scores, mixing
    queries, _, values = node.attrs.get("qkv_hidden_sizes", [of(1)[1] // 3] * 3)
    return batch * length * (width * of(1)[1] + length * int(queries + values))

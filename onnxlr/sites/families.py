"""Which family compresses which operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxlr.sites.bodies import graphs
from onnxlr.sites.conv import Conv
from onnxlr.sites.conv_transpose import ConvTranspose
from onnxlr.sites.einsum import Einsum
from onnxlr.sites.front import Attention, FusedGemm, Recurrent
from onnxlr.sites.fused_conv import FusedConv
from onnxlr.sites.fused_matmul import FusedMatMul, FusedMatMulActivation
from onnxlr.sites.gather import Gather
from onnxlr.sites.gemm import Gemm
from onnxlr.sites.matmul import MatMul

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import onnx_graphsurgeon as gs
    from numpy.typing import NDArray

    from onnxlr.sites.base import Family, Site
    from onnxlr.sites.constants import GraphView

FAMILIES: dict[str, Family] = {
    op: family
    for family in (
        MatMul(),
        Gemm(),
        Einsum(),
        Gather(),
        Conv(),
        ConvTranspose(),
        FusedMatMul(),
        FusedMatMulActivation(),
        FusedGemm(),
        FusedConv(),
        Attention(),
        Recurrent(),
    )
    for op in family.ops
}
"""The family of every operator that can be compressed."""


def family_of(node: gs.Node) -> Family | None:
    """The family that can compress operators like `node`, if there is one."""
    family = FAMILIES.get(node.op)
    return family if family is not None and node.domain in family.domains else None


def by_output(graph: gs.Graph) -> dict[str, gs.Node]:
    """The nodes of a graph and of the bodies in it, by each of their outputs."""
    nodes = (node for scope, _ in graphs(graph) for node in scope.nodes)
    return {tensor.name: node for node in nodes for tensor in node.outputs if tensor.name}


def matrix_of(site: Site, nodes: Mapping[str, gs.Node], view: GraphView) -> NDArray[np.float64]:
    """`W` of a site, [d_in, d_out] or [groups, d_in, d_out], read now."""
    return FAMILIES[site.op].matrix(site, nodes[site.output], view.values(view.tensors[site.weight]))

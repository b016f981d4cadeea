"""No operator that multiplies by a constant is passed over in silence: onnx's and onnxruntime's own, one by one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.defs
import pytest
from models import random
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("onnxruntime")
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from onnxlr.model_io import from_proto
from onnxlr.sites import take_inventory
from onnxlr.sites.families import FAMILIES
from onnxlr.sites.macs import COUNTED, UNKNOWN
from onnxlr.sites.unsupported import LAYOUTS, OPTIMIZED, PACKED, REASONS

if TYPE_CHECKING:
    from onnxlr.sites import Inventory

INPUTS = re.compile(r"weight|embedding|bias_table|lora|^W$", re.IGNORECASE)
OPERATORS = re.compile(r"MatMul|Gemm(?!a)|Conv|Einsum|MoE|LSTM$|GRU$|^RNN$|^Gather$|^Gather(Block|Packed)")
"""What schemas call a matrix that is multiplied by or looked up in, and operators whose schemas call it otherwise."""

NO_MATRIX = frozenset(
    {
        # weights of features' norms, beside projections that are nodes of their own
        "GroupQueryAttention", "PagedAttention", "SparsePagedAttention", "DynamicSparseAttention", "GatedAdd",
        "SparseAttentionIndexer", "PackedSparseAttentionIndexer",
        # cached states, replayed
        "ConvStateReplay",
        # weights of classes in losses
        "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss",
    }
)  # fmt: skip
TABLES = frozenset(
    {
        "Gather", "EmbedLayerNormalization", "QEmbedLayerNormalization", "GatherBlockQuantized", "GatherPacked",
        "TorchEmbedding", "RelativePositionBias",
    }
)  # fmt: skip
"""Operators that look up, and multiply nothing."""

SCHEMAS = [
    *(s for s in get_all_operator_schema() if s.domain in ("", "com.microsoft")),
    *(s for s in onnx.defs.get_all_schemas() if s.domain == ""),
]


def test_every_operator_with_a_weight_is_known() -> None:
    with_weights = {
        schema.name
        for schema in SCHEMAS
        if OPERATORS.search(schema.name) or any(INPUTS.search(value.name) for value in schema.inputs)
    }
    assert with_weights - FAMILIES.keys() - REASONS.keys() == NO_MATRIX
    assert REASONS.keys() <= {s.name for s in SCHEMAS} | {"QLinearConvTranspose"}


def test_every_multiplication_is_counted_or_known_to_be_unknown() -> None:
    assert (FAMILIES.keys() | REASONS.keys()) - COUNTED - UNKNOWN == TABLES
    assert not COUNTED & UNKNOWN
    assert {s.name for s in SCHEMAS if s.name.endswith("Attention")} <= COUNTED | UNKNOWN


def inventory_of(op: str, domain: str, weight: np.ndarray[Any, Any], **attributes: int) -> Inventory:
    node = helper.make_node(op, ["x", "w"], ["y"], "it", domain=domain, **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    return take_inventory(from_proto(helper.make_model(graph, ir_version=8)), {"x": (3, 32), "y": (3, 16)})


@pytest.mark.parametrize("op", sorted(PACKED))
def test_a_weight_that_is_a_vector_of_bytes_is_listed(op: str) -> None:
    inventory = inventory_of(op, "com.microsoft", np.zeros(256, np.uint8), K=32, N=16, block_size=16)
    (refusal,) = inventory.refusals
    assert (refusal.reason, refusal.sources, refusal.parameters) == (REASONS[op], ("w",), 256)
    assert refusal.macs == inventory.macs == 3 * 32 * 16


@pytest.mark.parametrize("domain", sorted(LAYOUTS))
def test_a_convolution_that_onnxruntime_laid_out_is_listed(domain: str) -> None:
    inventory = inventory_of("Conv", domain, random(1, 16, 16, 3, 3))
    assert not inventory.weights
    assert [refusal.reason for refusal in inventory.refusals] == [OPTIMIZED]


@pytest.mark.parametrize("stored", ["initializer", "Constant"])
def test_a_product_with_a_sparse_matrix_is_listed(stored: str) -> None:
    values, places = numpy_helper.from_array(np.ones(2, np.float32), "w"), numpy_helper.from_array(np.array([3, 8]))
    sparse = helper.make_sparse_tensor(values, places, [6, 5])
    nodes = [helper.make_node("SparseToDenseMatMul", ["w", "x"], ["y"], domain="com.microsoft")]
    if stored == "Constant":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    if stored == "initializer":
        graph.sparse_initializer.append(sparse)
    (refusal,) = take_inventory(from_proto(helper.make_model(graph, ir_version=8))).refusals
    assert (refusal.op, refusal.reason) == ("SparseToDenseMatMul", REASONS["SparseToDenseMatMul"])


@pytest.mark.parametrize(
    ("node", "shape", "reason"),
    [
        ("y = Conv<group = 0>(x, w)", (4, 2, 1, 1), "its 4 output channels do not fall into 0 groups"),
        ("y = Conv<group = 3>(x, w)", (4, 2, 1, 1), "its 4 output channels do not fall into 3 groups"),
        ("y = MatMul(w)", (4, 2, 1, 1), "it has not two inputs"),
        ("y = MatMul(x, w)", (32, 0), "its weight is empty"),
    ],
)
def test_nodes_that_make_no_sense_are_listed(node: str, shape: tuple[int, ...], reason: str) -> None:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, 6, 8, 32] x) => (y) {{ {node} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), "w"))
    (refusal,) = take_inventory(from_proto(proto)).refusals
    assert refusal.reason == reason

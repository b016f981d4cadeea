"""Operators in torch: onnx's own test cases, onnxruntime's fused operators, and forms that changed between opsets."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

torch = pytest.importorskip("torch")

from onnxlr.model_io import Model, from_proto  # noqa: E402
from onnxlr.session import Session  # noqa: E402
from onnxlr.torch_graph import relative_error, to_array, to_tensor, to_torch  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

torch.set_num_threads(1)

FAMILIES = """
    test_add_bcast test_clip_default_min test_where_example test_gelu_tanh_1 test_hardswish test_mish
    test_prelu_broadcast test_pow test_cast_FLOAT_to_BFLOAT16 test_isinf_negative test_mod_mixed_sign_int64
    test_div_int32_trunc test_softmax_axis_0 test_logsoftmax_large_number test_hardmax_one_hot test_matmul_3d
    test_gemm_all_attributes test_einsum_batch_matmul test_layer_normalization_4d_axis1
    test_rms_normalization_3d_axis1_epsilon test_group_normalization_epsilon test_instancenorm_epsilon
    test_batchnorm_epsilon test_lrn test_mvn test_basic_conv_with_padding test_conv_with_autopad_same
    test_conv_with_strides_and_asymmetric_padding test_convtranspose_autopad_same test_convtranspose_output_shape
    test_convtranspose_3d test_convinteger_with_padding test_averagepool_2d_ceil_last_window_starts_on_pad
    test_maxpool_2d_dilations test_lppool_2d_same_lower test_maxpool_with_argmax_2d_precomputed_strides
    test_globalaveragepool test_reduce_sum_negative_axes_keepdims_random test_reduce_max_empty_set
    test_reduce_log_sum_exp_default_axes_keepdims_random
    test_argmax_negative_axis_keepdims_example_select_last_index test_cumsum_1d_reverse_exclusive
    test_top_k_negative_axis test_gather_negative_indices test_gather_elements_1
    test_gathernd_example_int32_batch_dim1 test_scatternd_max test_scatter_elements_with_reduction_min
    test_onehot_negative_indices test_nonzero_example test_compress_negative_axis test_slice_negative_axes
    test_slice_neg_steps test_split_variable_parts_2d_opset18 test_concat_3d_axis_negative_2 test_edge_pad
    test_reflect_pad test_wrap_pad test_expand_dim_changed test_tile test_range_float_type_positive_delta
    test_reshape_allowzero_reordered test_squeeze_negative_axes test_unsqueeze_unsorted_axes
    test_shape_start_1_end_negative_1 test_depthtospace_crd_mode_example test_spacetodepth test_transpose_default
    test_eyelike_populate_off_main_diagonal test_resize_upsample_scales_cubic_align_corners
    test_resize_downsample_sizes_linear_antialias test_resize_upsample_scales_linear_half_pixel_symmetric
    test_resize_tf_crop_and_resize test_resize_upsample_sizes_nearest_round_prefer_ceil_asymmetric
    test_resize_upsample_sizes_nearest_not_larger test_lstm_with_peepholes test_lstm_bidirectional
    test_gru_seq_length test_rnn_seq_length test_simple_rnn_batchwise
    test_attention_4d_gqa_with_past_and_present test_attention_3d_causal test_attention_4d_with_qk_matmul_softmax
    test_rotary_embedding_interleaved test_quantizelinear_axis test_dequantizelinear_blocked
    test_dynamicquantizelinear test_qlinearmatmul_2D_uint8_float32 test_dropout_default_mask test_if test_loop11
    test_scan9_sum test_stft_with_window test_dft_axis test_tril_neg test_unique_not_sorted_without_axis
    test_reversesequence_batch test_tensorscatter
    test_gridsample_bilinear test_affine_grid_2d test_col2im test_nllloss_NCd1d2_with_weight test_sce_mean_weight_ii
    test_melweightmatrix test_swish test_reduce_l2_do_not_keepdims_random
"""


@pytest.fixture(scope="module")
def coverage() -> Any:
    """The script that counts; it knows all cases."""
    path = Path(__file__).parent.parent / "tools" / "torch_graph_coverage.py"
    spec = importlib.util.spec_from_file_location("torch_graph_coverage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases(coverage: Any) -> dict[str, Any]:
    return {case.name: case for case in coverage.made_cases()}


def test_a_spread_of_operators_gives_what_onnx_expects(coverage: Any, cases: dict[str, Any]) -> None:
    # names differ a little between releases of onnx
    known = [name for name in FAMILIES.split() if name in cases]
    assert len(known) > 80
    assert {name: why for name in known if (why := coverage.ours(cases[name]))[0] != "passed"} == {}


@pytest.mark.slow
def test_nothing_that_is_supported_fails(coverage: Any, cases: dict[str, Any]) -> None:
    outcomes = {case.name: coverage.ours(case) for case in (*cases.values(), *coverage.stored_cases())}
    assert {name: why for name, (outcome, why) in outcomes.items() if outcome == "failed"} == {}
    assert sum(outcome == "passed" for outcome, _ in outcomes.values()) > 1000


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape) + len(shape)).standard_normal(shape).astype(np.float32)


def node_model(
    op: str, inputs: Sequence[NDArray[Any] | None], *, outputs: int, domain: str, opset: int, **attributes: Any
) -> Model:
    """A model of one node; inputs that are None are left out."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    results = [f"y{i}" for i in range(outputs)]
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in zip(names, inputs, strict=True)
        if x is not None
    ]
    node = helper.make_node(op, names, results, domain=domain, **attributes)
    graph = helper.make_graph([node], "g", given, [onnx.ValueInfoProto(name=name) for name in results])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def agree(
    op: str,
    inputs: Sequence[NDArray[Any] | None],
    *,
    outputs: int = 1,
    domain: str = "",
    opset: int = 17,
    **attributes: Any,
) -> None:
    """One node gives the same numbers in torch and in onnxruntime."""
    model = node_model(op, inputs, outputs=outputs, domain=domain, opset=opset, **attributes)
    feed = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    expected = Session(model, threads=1).run(feed)
    found = to_torch(model)({name: to_tensor(x) for name, x in feed.items()})
    for name, array in expected.items():
        assert relative_error(to_array(found[name]), array) < 1e-5, (op, attributes, name)


X, W, B = random(2, 5, 16), 0.3 * random(16, 48), random(48)
REAL = np.int32([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
IDS = np.int32([[1, 2, 3, 4, 5], [0, 8, 7, 6, 5]])
COS, SIN = np.cos(random(10, 4)), np.sin(random(10, 4))
MICROSOFT: list[tuple[str, list[NDArray[Any] | None], dict[str, Any]]] = [
    ("Gelu", [X], {}),
    ("BiasGelu", [X, random(16)], {}),
    ("FastGelu", [X, random(16)], {}),
    ("QuickGelu", [X], {"alpha": 1.5}),
    ("FusedMatMul", [random(2, 3, 5, 4), random(2, 3, 5, 6)], {"transA": 1, "alpha": 0.5}),
    ("FusedMatMul", [random(2, 3, 4, 5), random(6, 2, 3, 5)], {"transBatchB": 1, "transB": 1}),
    ("FusedMatMul", [random(4, 2, 3, 5), random(2, 3, 5, 6)], {"transBatchA": 1}),
    ("FusedGemm", [random(4, 5), random(6, 5), random(6)], {"transB": 1, "activation": "Relu"}),
    ("FusedGemm", [random(4, 5), random(5, 6)], {"activation": "LeakyRelu", "activation_alpha": 0.2}),
    ("FusedConv", [random(1, 3, 8, 8), random(4, 3, 3, 3), random(4)], {"activation": "Relu", "pads": [1, 1, 1, 1]}),
    (
        "FusedConv",
        [random(1, 3, 8, 8), random(4, 3, 3, 3), random(4), random(1, 4, 6, 6)],
        {"activation": "Clip", "activation_params": [-0.5, 0.5]},
    ),
    ("SkipLayerNormalization", [X, random(2, 5, 16), random(16), random(16), random(16)], {}),
    ("SkipLayerNormalization", [X, random(1, 5, 16), random(16)], {}),
    ("SkipSimplifiedLayerNormalization", [X, random(2, 5, 16), random(16), random(16)], {"epsilon": 1e-5}),
    (
        "EmbedLayerNormalization",
        [IDS, IDS % 2, random(9, 8), random(7, 8), random(2, 8), random(8), random(8), REAL],
        {"epsilon": 1e-5, "outputs": 2},
    ),
    ("Attention", [X, W, B], {"num_heads": 4}),
    ("Attention", [X, W, B, REAL], {"num_heads": 4, "outputs": 2}),
    ("Attention", [X, W, B, REAL], {"num_heads": 4, "unidirectional": 1, "scale": 0.3}),
    ("Attention", [X, W, B, np.int32([4, 3])], {"num_heads": 4}),
    ("Attention", [X, W, B, np.int32([4, 3, 1, 0])], {"num_heads": 4}),
    ("Attention", [X, W, B, None, None, random(2, 4, 5, 5)], {"num_heads": 4}),
    ("Attention", [X, 0.3 * random(16, 64), random(64)], {"num_heads": 4, "qkv_hidden_sizes": [16, 16, 32]}),
    ("Attention", [X, W, B, None, random(2, 2, 4, 3, 4)], {"num_heads": 4, "outputs": 2, "unidirectional": 1}),
    ("MultiHeadAttention", [X, random(2, 7, 16), random(2, 7, 16), B], {"num_heads": 4}),
    ("MultiHeadAttention", [X, random(2, 4, 7, 4), random(2, 4, 7, 4)], {"num_heads": 4}),
    ("MultiHeadAttention", [X, X, X, None, REAL], {"num_heads": 4}),
    ("MultiHeadAttention", [X, X, X], {"num_heads": 4, "unidirectional": 1}),
    ("RotaryEmbedding", [random(2, 4, 5, 8), IDS.astype(np.int64), COS, SIN], {"interleaved": 1}),
    ("RotaryEmbedding", [random(2, 5, 32), np.int64([2]), COS, SIN], {}),
]


@pytest.mark.parametrize(("op", "inputs", "attributes"), MICROSOFT)
def test_fused_operators_agree_with_onnxruntime(op: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    agree(op, inputs, domain="com.microsoft", **attributes)


OPSETS: list[tuple[str, list[NDArray[Any] | None], int, dict[str, Any]]] = [
    ("Softmax", [random(2, 3, 4)], 11, {"axis": 1}),
    ("Softmax", [random(2, 3, 4)], 13, {"axis": 1}),
    ("LogSoftmax", [random(2, 3, 4)], 12, {}),
    ("Slice", [random(5, 6)], 9, {"starts": [1, -4], "ends": [9, -1], "axes": [0, 1]}),
    ("Slice", [random(5, 6), np.int64([-1]), np.int64([-9]), np.int64([1]), np.int64([-2])], 10, {}),
    ("ReduceSum", [random(2, 3, 4)], 11, {"axes": [1], "keepdims": 0}),
    ("ReduceSum", [random(2, 3, 4), np.int64([-1])], 13, {"keepdims": 1}),
    ("ReduceSum", [random(2, 3, 4)], 13, {"noop_with_empty_axes": 1}),
    ("ReduceMean", [random(2, 3, 4)], 17, {"axes": [0, 2]}),
    ("ReduceMean", [random(2, 3, 4), np.int64([0, 2])], 18, {}),
    ("Squeeze", [random(2, 1, 4, 1)], 12, {"axes": [-1]}),
    ("Squeeze", [random(2, 1, 4, 1), np.int64([1])], 13, {}),
    ("Unsqueeze", [random(2, 3)], 12, {"axes": [0, -1]}),
    ("Unsqueeze", [random(2, 3), np.int64([0, -1])], 13, {}),
    ("Clip", [random(3, 4)], 10, {"min": -0.5, "max": 0.5}),
    ("Clip", [random(3, 4), None, np.array(0.5, np.float32)], 11, {}),
    ("Dropout", [random(3, 4)], 10, {"ratio": 0.3}),
    ("Dropout", [random(3, 4), np.array(0.3, np.float32)], 13, {}),
    ("Upsample", [random(1, 2, 3, 3), np.float32([1, 1, 2, 2])], 9, {"mode": "linear"}),
    ("Resize", [random(1, 2, 3, 3), np.float32([1, 1, 2, 2])], 10, {"mode": "nearest"}),
    ("Resize", [random(1, 2, 5, 5), None, None, np.int64([1, 2, 9, 4])], 13, {"mode": "linear"}),
    ("Resize", [random(1, 2, 5, 5), None, np.float32([1, 1, 1.7, 0.6])], 13, {"mode": "cubic"}),
    ("Split", [random(2, 6)], 11, {"axis": 1, "outputs": 3}),
    ("Split", [random(2, 7)], 18, {"axis": 1, "outputs": 3, "num_outputs": 3}),
    ("Pad", [random(2, 3)], 10, {"pads": [0, 1, 2, 0], "mode": "edge"}),
    ("Pad", [random(2, 3), np.int64([1, 2]), np.array(7, np.float32), np.int64([-1])], 18, {}),
    ("TopK", [random(4, 9)], 9, {"k": 3, "outputs": 2}),
    ("GroupNormalization", [random(2, 6, 4), random(3), random(3)], 18, {"num_groups": 3}),
    ("GroupNormalization", [random(2, 6, 4), random(6), random(6)], 21, {"num_groups": 3}),
    ("MaxPool", [random(1, 2, 9, 9)], 12, {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [1] * 4}),
    ("AveragePool", [random(1, 2, 9)], 19, {"kernel_shape": [3], "pads": [1, 0], "count_include_pad": 1}),
    ("Conv", [random(1, 4, 9), random(6, 2, 3)], 11, {"group": 2, "auto_pad": "SAME_LOWER", "strides": [2]}),
    ("Conv", [random(1, 2, 5, 5, 5), random(3, 2, 2, 2, 2)], 11, {"pads": [1, 0, 0, 0, 1, 1]}),
    (
        "ConvTranspose",
        [random(1, 4, 5, 5), random(4, 3, 3, 3), random(6)],
        11,
        {"group": 2, "strides": [2, 2], "pads": [1, 1, 0, 1], "output_padding": [1, 0]},
    ),
    (
        "LSTM",
        [random(5, 2, 3), random(2, 16, 3), random(2, 16, 4)],
        14,
        {"direction": "bidirectional", "hidden_size": 4},
    ),
    (
        "GRU",
        [random(5, 2, 3), random(1, 12, 3), random(1, 12, 4), random(1, 24), np.int32([5, 3])],
        14,
        {"direction": "reverse", "hidden_size": 4, "linear_before_reset": 1, "outputs": 2},
    ),
]


@pytest.mark.parametrize(("op", "inputs", "opset", "attributes"), OPSETS)
def test_each_opset_has_its_own_form(op: str, inputs: list[Any], opset: int, attributes: dict[str, Any]) -> None:
    agree(op, inputs, opset=opset, **attributes)


def test_softmax_of_opset_12_is_over_all_following_axes() -> None:
    x = random(2, 3, 4)
    old, new = (
        to_torch(node_model("Softmax", [x], outputs=1, domain="", opset=opset, axis=1))({"x0": to_tensor(x)})["y0"]
        for opset in (12, 13)
    )
    assert torch.allclose(old.sum((1, 2)), torch.ones(2))
    assert torch.allclose(new.sum(1), torch.ones(2, 4))


def test_constants_keep_bfloat16_and_float16() -> None:
    for dtype in (np.float16, numpy_helper.to_array(helper.make_tensor("", 16, [0], [])).dtype):
        array = np.array([[1.5, -2.25]], dtype)
        assert to_array(to_tensor(array)).tobytes() == array.tobytes()
        assert to_array(to_tensor(array)).dtype == array.dtype

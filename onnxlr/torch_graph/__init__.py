"""An ONNX graph as a torch module, with gradients."""

from __future__ import annotations

from onnxlr.errors import InstallError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise InstallError(
        f"gradients need torch, which cannot be imported ({error}): `pip install 'onnxlr[torch]'`"
    ) from error

from onnxlr.torch_graph import operators
from onnxlr.torch_graph.module import TorchGraph, to_torch
from onnxlr.torch_graph.parity import Parity, check_parity, relative_error
from onnxlr.torch_graph.precision import float32_products
from onnxlr.torch_graph.registry import Unsupported, UnsupportedOperatorsError, find, supported
from onnxlr.torch_graph.tensors import to_array, to_tensor

__all__ = [
    "Parity",
    "TorchGraph",
    "Unsupported",
    "UnsupportedOperatorsError",
    "check_parity",
    "find",
    "float32_products",
    "operators",
    "relative_error",
    "supported",
    "to_array",
    "to_tensor",
    "to_torch",
]

"""Fine-tuning: a compressed model learns from the dense one what it has lost, in torch, from graph to graph."""

import onnxlr.torch_graph  # noqa: F401  says what to install where torch is missing

# isort: split
from onnxlr.tuning.parallel import leads
from onnxlr.tuning.recovery import recover

__all__ = ["leads", "recover"]

"""Fine-tuning: a compressed model learns from the dense one what it has lost, in torch, from graph to graph."""

from onnxlr.tuning.parallel import leads
from onnxlr.tuning.recovery import recover

__all__ = ["leads", "recover"]

"""What a compression did, for machines (JSON) and for people (tables)."""

from onnxlr.report.recovery import Recovery
from onnxlr.report.schema import FORMAT, ModelFigures, Quantized, RefusalReport, Report, WeightReport, plain

__all__ = ["FORMAT", "ModelFigures", "Quantized", "Recovery", "RefusalReport", "Report", "WeightReport", "plain"]

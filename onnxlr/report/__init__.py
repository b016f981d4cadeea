"""What a compression did, for machines (JSON) and for people (tables)."""

from onnxlr.report.schema import FORMAT, ModelFigures, RefusalReport, Report, WeightReport, plain

__all__ = ["FORMAT", "ModelFigures", "RefusalReport", "Report", "WeightReport", "plain"]

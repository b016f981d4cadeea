"""Low-rank compression of ONNX models.

import onnxlr

report = onnxlr.compress("model.onnx", "calib/", output="small.onnx")
print(report.after.parameters / report.before.parameters, report.validation.error)
"""

from onnxlr.analyze import Analysis, analyze
from onnxlr.api import Inspection, calibrate, finetune, inspect, validate
from onnxlr.config import Config, Target, Tuning
from onnxlr.data import ImageOptions
from onnxlr.errors import OnnxlrError
from onnxlr.export import Export, export
from onnxlr.gram import Stats
from onnxlr.model_io import Model, load, save
from onnxlr.pipeline import compress
from onnxlr.report import Recovery, Report
from onnxlr.speed import Benchmark, Profile, bench, profile
from onnxlr.validate import Validation

__all__ = [
    "Analysis",
    "Benchmark",
    "Config",
    "Export",
    "ImageOptions",
    "Inspection",
    "Model",
    "OnnxlrError",
    "Profile",
    "Recovery",
    "Report",
    "Stats",
    "Target",
    "Tuning",
    "Validation",
    "analyze",
    "bench",
    "calibrate",
    "compress",
    "export",
    "finetune",
    "inspect",
    "load",
    "profile",
    "save",
    "validate",
]

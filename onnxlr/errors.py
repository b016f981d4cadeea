"""Every error onnxlr raises on purpose.

    OnnxlrError                exit code 1
    ├── ConfigError            exit code 2   options that contradict each other or are out of range
    ├── InstallError                         onnxruntime is missing, or two builds of it collide; no such provider
    ├── ModelError                           a model file that cannot be read, checked or run
    │   └── ExternalDataError                its external data are missing, truncated or outside its folder
    ├── DataError                            calibration data that do not exist, do not fit or are not finite
    ├── StatsError                           a moments file of another model, or without the moments asked for
    ├── RangeError                           a factor has numbers beyond the weight's element type
    ├── OutputError                          an output exists already, or cannot be written
    └── GateError              exit code 3   a target or a parity gate was not met

A message is one line: what was wrong, where, what was expected, what to do.
"""

from __future__ import annotations

from typing import ClassVar


class OnnxlrError(Exception):
    """Base of all errors of this package; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1


class ConfigError(OnnxlrError):
    """Options that contradict each other, or a value out of its range."""

    exit_code = 2


class InstallError(OnnxlrError):
    """The environment lacks something: onnxruntime, an execution provider, an optional package."""


class ModelError(OnnxlrError):
    """A model file that cannot be read, checked or run."""


class ExternalDataError(ModelError):
    """External data that are missing, truncated or outside the model's folder."""


class DataError(OnnxlrError):
    """Data that do not exist, do not fit the model's inputs or are not finite."""


class StatsError(OnnxlrError):
    """A moments file of another model, or without the moments that were asked for."""


class RangeError(OnnxlrError):
    """A factor with numbers beyond the element type of the weight that it stands for."""


class OutputError(OnnxlrError):
    """An output that exists already or cannot be written."""


class GateError(OnnxlrError):
    """A target or a parity gate that was not met."""

    exit_code = 3


def one_line(error: BaseException) -> str:
    """What an error of somebody else's code says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}" if str(error).strip() else type(error).__name__

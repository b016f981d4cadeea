"""Torch models by reference, ready to be exported: one file a kind of reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxlr.errors import InstallError

try:
    import onnxscript  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    raise InstallError(
        f"export needs torch and onnxscript ({error}): `pip install 'onnxlr[torch]'`, or `pip install torch onnxscript`"
    ) from error

from onnxlr.torch_models.convert import Converted, convert
from onnxlr.torch_models.huggingface import open_huggingface
from onnxlr.torch_models.source import TorchModel
from onnxlr.torch_models.user import open_callable, open_program
from onnxlr.torch_models.vision import open_timm, open_torchvision

if TYPE_CHECKING:
    from onnxlr.reference import Reference

__all__ = ["Converted", "TorchModel", "convert", "open_torch_model"]

_OPENERS = {
    "timm": open_timm,
    "torchvision": open_torchvision,
    "hf": open_huggingface,
    "callable": open_callable,
    "program": open_program,
}


def open_torch_model(reference: Reference) -> TorchModel:
    """The model that a reference names, in evaluation mode, with example inputs.

    Raises
    ------
    ConfigError
        The callable does not exist, or the library has no such model.
    ModelError
        The callable raises or returns something else, a file cannot be read, weights cannot be fetched.
    InstallError
        The library is not installed.
    """
    return _OPENERS[reference.kind](reference)

"""onnxruntime on an NVIDIA GPU: in which precision, with which libraries, and what it lacks where it does not start.

Products of float32 are of float32. Left to itself a GPU rounds their operands to TF32, 10 bits of mantissa, and moments
and errors would be measured through that noise. CUDA has an option for it. TensorRT in onnxruntime has none, so the
variable NVIDIA_TF32_OVERRIDE is set for the whole process, where the user has not set it.

What TensorRT does not take runs in CUDA. Its engines are not kept between sessions: onnxruntime finds a kept engine by
the names in the graph, whatever the weights are, and a model that was tuned or cut anew would run with the old ones.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout
from functools import cache
from typing import Any

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
TF32 = "NVIDIA_TF32_OVERRIDE"
_LACKING = {
    CUDA: ", and for CUDA and cuDNN: `pip install 'onnxruntime-gpu[cuda,cudnn]'`",
    TENSORRT: ", and for CUDA, cuDNN and TensorRT in the versions that onnxruntime was built with",
}


def with_options(provider: str) -> list[str | tuple[str, dict[str, str]]]:
    """`provider`, onnxruntime's own name of any, with its options, and what is to run what it does not take."""
    cuda = (CUDA, {"use_tf32": "0"})
    if provider == TENSORRT:
        os.environ.setdefault(TF32, "0")
        return [provider, cuda]
    return [cuda if provider == CUDA else provider]


@cache
def load_libraries(onnxruntime: Any) -> None:
    """Load the libraries of CUDA that pip has installed, where onnxruntime does not look for them by itself."""
    preload = getattr(onnxruntime, "preload_dlls", None)  # since 1.21
    if preload is not None:
        with redirect_stdout(io.StringIO()):  # there it says what it does not find; a session will say so too
            preload()


def is_missing(error: Exception) -> bool:
    """Whether onnxruntime has raised for want of a library, a driver or a device, and not for the model."""
    return re.search(r"install TensorRT libraries|CUDA failure (35|100):", str(error)) is not None


def not_started(provider: str) -> str:
    """Why there is no session of `provider`, whatever it is, and what to look for."""
    return (
        f"onnxruntime could not start {provider} on this machine: look for the driver{_LACKING.get(provider, '')}; "
        "or choose --provider cpu"
    )

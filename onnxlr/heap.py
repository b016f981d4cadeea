"""Memory that was freed and yet stays with the process."""

from __future__ import annotations

import ctypes
import sys


def release() -> None:
    """Give freed memory back to the system: glibc keeps it where something small beside it is still in use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)

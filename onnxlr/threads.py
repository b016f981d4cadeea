"""Threads that share out arrays: each works on some of its own, on one core.

BLAS shares out single products instead. That gains little where they are small, leaves all that is not a product to one
core, and its threads wait, spinning, on cores that others would work on. numpy releases Python's lock while it works.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from collections.abc import Iterator


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def sharing_out(threads: int = 0) -> Iterator[ThreadPoolExecutor]:
    """So many threads, 0 for one a core; BLAS keeps to the thread that calls it meanwhile."""
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads or cores()) as pool:
        yield pool

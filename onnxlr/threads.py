"""Who works on which core: threads of our own, or those of BLAS.

BLAS shares out single products. That gains little where they are small, and leaves all that is not a product to one
core. Threads of our own share out arrays, each of which is worked on by one; numpy releases Python's lock meanwhile,
most of scipy does not. Threads of BLAS wait for the next product by spinning, on cores that others would work on.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import scipy
from threadpoolctl import ThreadpoolController, threadpool_limits

if TYPE_CHECKING:
    from collections.abc import Iterator


AT_ONCE = 4
"""Matrices that are decomposed at once, at most: each takes memory, and some of that holds Python's lock."""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_blas() -> Iterator[None]:
    """Where numpy and scipy each came with a BLAS of its own, only numpy's has threads: see the module."""
    libraries, package = ThreadpoolController(), Path(scipy.__file__).parent
    folders = {package, package.with_name("scipy.libs")}  # what a wheel brings is in either
    places = [library["filepath"] for library in libraries.info()]
    own = [place for place in places if folders & set(Path(place).parents)]
    with libraries.select(filepath=own).limit(limits=1, user_api="blas"):
        yield


@contextmanager
def sharing_out(threads: int = 0, most: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """So many threads, 0 for one a core, and no more than `most`; BLAS keeps to the thread that calls it meanwhile."""
    count = min(threads or cores(), most or sys.maxsize)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(count) as pool:
        yield pool

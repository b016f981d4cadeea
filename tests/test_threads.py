"""Who works on which core, and that it changes no figure."""

from __future__ import annotations

import time
from threading import Barrier
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.linalg
from threadpoolctl import threadpool_info, threadpool_limits

from onnxlr.recent import Recent
from onnxlr.threads import AT_ONCE, cores, one_blas, sharing_out

if TYPE_CHECKING:
    from collections.abc import Iterator

assert scipy.linalg.blas  # or its library is not loaded


def threads() -> dict[str, int]:
    """Of every BLAS in this process, by its file."""
    return {one["filepath"]: one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


@pytest.fixture
def three() -> Iterator[dict[str, int]]:
    """Every BLAS with three threads, whatever the machine has."""
    with threadpool_limits(3, user_api="blas"):
        yield threads()


def test_blas_keeps_to_one_thread_while_others_share_out(three: dict[str, int]) -> None:
    with sharing_out(2) as pool:
        assert set(threads().values()) == {1}
        found = list(pool.map(lambda x: x.T @ x, [np.eye(3), 2 * np.eye(2)]))
    assert [float(np.trace(own)) for own in found] == [3, 8]
    assert threads() == three


def test_only_one_blas_has_threads(three: dict[str, int]) -> None:
    with one_blas():
        inside = threads()
    assert threads() == three
    of_scipy = {place for place in three if "/scipy.libs/" in place or "/scipy/" in place}
    assert inside == {place: 1 if place in of_scipy else count for place, count in three.items()}
    assert len(of_scipy) < len(three)


@pytest.mark.parametrize(("asked", "most", "expected"), [(3, None, 3), (3, 2, 2), (1, AT_ONCE, 1), (0, None, cores())])
def test_so_many_threads_work_at_once(asked: int, most: int | None, expected: int) -> None:
    meeting = Barrier(expected, timeout=20)
    with sharing_out(asked, most) as pool:
        assert pool._max_workers == expected
        # as many as there are meet; one less would wait in vain
        assert sorted(pool.map(lambda _: meeting.wait(), range(expected))) == list(range(expected))


def test_threads_find_what_is_their_own_among_what_was_used_last() -> None:
    recent: Recent[int] = Recent(2)
    owners = [object() for _ in range(5)]
    made = []

    def make(number: int) -> int:
        made.append(number)
        time.sleep(0.001)
        return number

    def look(number: int) -> bool:
        return recent.get(owners[number % 5], lambda: make(number % 5)) == number % 5

    with sharing_out(4) as pool:
        assert all(pool.map(look, range(200)))
    assert len(recent._kept) <= 2
    made.clear()
    kept = [owner for owner in owners if id(owner) in recent._kept]
    assert [recent.get(owner, lambda: -1) for owner in kept] == [owners.index(owner) for owner in kept]
    assert made == []

"""Work divided into passes, each of which fits into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")


def in_passes(items: Iterable[T], size: Callable[[T], int], limit: int | None) -> list[list[T]]:
    """The items in their order, in passes of at most `limit` bytes; one that is larger has a pass of its own."""
    passes: list[list[T]] = [[]]
    taken = 0
    for item in items:
        own = size(item)
        if limit is not None and passes[-1] and taken + own > limit:
            passes.append([])
            taken = 0
        passes[-1].append(item)
        taken += own
    return passes

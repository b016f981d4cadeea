"""Decompositions that are kept as long as there is room, and made again where they are needed after that.

What a plan asks of a weight most is the damage at every rank: a vector, which stays. The factors of a rank take the
whole decomposition, its bases as large as the weight.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from onnxlr.factors import Decomposition, Factors

T = TypeVar("T")


class Recent(Generic[T]):
    """What was used last, by its owner; of threads, each makes what it needs.

    Parameters
    ----------
    room
        How many there may be.
    """

    def __init__(self, room: int = 1) -> None:
        self._room = room
        # with its owner, or another one might come to live where that was
        self._kept: OrderedDict[int, tuple[object, T]] = OrderedDict()
        self._lock = Lock()

    def get(self, owner: object, make: Callable[[], T]) -> T:
        """That of `owner`, made where it is not there any more."""
        key = id(owner)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][1]
            self._leave(self._room - 1)
        made = make()
        with self._lock:
            self._kept[key] = owner, made
            self._leave(self._room)
        return made

    def _leave(self, room: int) -> None:
        while len(self._kept) > room:
            self._kept.popitem(last=False)


class _Remade:
    """A decomposition of which only the damages are kept for good."""

    def __init__(
        self,
        make: Callable[[], Decomposition],
        recent: Recent[Decomposition],
        foresee: Callable[[], NDArray[np.float64]] | None,
    ) -> None:
        self._make, self._recent, self._foresee = make, recent, foresee

    @property
    def _whole(self) -> Decomposition:
        return self._recent.get(self, self._make)

    @cached_property
    def _damages(self) -> list[float]:
        if self._foresee is not None:
            return list(map(float, self._foresee()))
        damages = [self._whole.damage(0)]
        while damages[-1] > 0:
            damages.append(self._whole.damage(len(damages)))
        return damages

    @property
    def total(self) -> float:
        return self._damages[0]

    def damage(self, rank: int) -> float:
        return self._damages[rank] if rank < len(self._damages) else 0.0

    def rank_for(self, energy: float) -> int:
        return self._whole.rank_for(energy)

    def cut(self, rank: int) -> Factors:
        return self._whole.cut(rank)

    def unbalanced(self, rank: int) -> Factors:
        return self._whole.unbalanced(rank)

    def cut_by_energy(self, energy: float, rank: int) -> tuple[Factors, float]:
        return self._whole.cut_by_energy(energy, rank)


def decomposed(
    make: Callable[[], Decomposition],
    recent: Recent[Decomposition] | None,
    foresee: Callable[[], NDArray[np.float64]] | None = None,
) -> Decomposition:
    """What `make` gives, for good; or, with `recent`, as long as there is room.

    `foresee` gives the damages at every rank for less than `make`, which then waits until factors are asked for.
    """
    if recent is None and foresee is None:
        return make()
    return _Remade(make, recent or Recent(), foresee)

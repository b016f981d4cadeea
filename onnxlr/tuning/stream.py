"""The order in which samples are seen: drawn by seed and epoch alone, so that a run can go on where it was stopped.

An epoch shows every sample once, in batches of samples of equal shapes; what does not fill a batch is left out of that
epoch, unless its shape has no full batch at all. Of several processes each takes its share of every batch.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from onnxlr.data import batches, fixed_batch, has_batch_axis
from onnxlr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxlr.data import Dataset, Feed, Sample, TensorSpec

_ROOM = 2**31
"""Bytes of samples that stay in memory; others are read again when their turn comes."""


class Stream:
    """The samples of a data set as batches, by step.

    Parameters
    ----------
    dataset, inputs
        The samples, and the inputs of the model that takes them.
    batch
        Samples in a batch, over all processes.
    seed
        Of the order.
    rank, size
        Which process this is, of how many.

    Raises
    ------
    DataError
        There is no batch in it.
    ConfigError
        Several processes cannot share the batches.
    """

    def __init__(
        self, dataset: Dataset, inputs: Sequence[TensorSpec], batch: int, seed: int, rank: int = 0, size: int = 1
    ) -> None:
        self._items = list(dataset.read())
        self._inputs = inputs
        fixed = fixed_batch(inputs) if has_batch_axis(inputs) else 1
        if fixed and size > 1:
            raise ConfigError(f"{size} processes cannot share batches of a fixed size, {fixed}: train with one process")
        self._size = fixed or batch
        self._seed, self._rank, self._ranks = seed, rank, size
        self._held: dict[int, Sample] = {}
        self._room = _ROOM
        self._alike: dict[object, list[int]] = defaultdict(list)
        for position in range(len(self._items)):
            sample = self._sample(position)
            self._alike[tuple(sorted((name, array.shape) for name, array in sample.items()))].append(position)
        self.samples = len(self._items)
        self.steps = len(self._epoch(0))
        if not self.steps:
            shared = f" that {size} processes can share" if size > 1 else ""
            remedy = "choose a larger --tune-batch" if self._size < size else "give more data"
            raise DataError(f"{dataset.name}: {self.samples} samples make no batch of {self._size}{shared}: {remedy}")
        self._order: tuple[int, list[list[int]]] = (0, self._epoch(0))

    def __getitem__(self, step: int) -> tuple[Feed, list[int], float]:
        """The batch of a step: the feed, its samples' numbers in the whole data set, and what part of the batch it is.

        With several processes it is this one's share.
        """
        epoch, place = divmod(step, self.steps)
        if self._order[0] != epoch:
            self._order = epoch, self._epoch(epoch)
        whole = self._order[1][place]
        own = whole[self._rank :: self._ranks]
        (feed,) = batches([self._sample(position) for position in own], len(own), self._inputs)
        return feed, [self._items[position][0] for position in own], len(own) / len(whole)

    def _epoch(self, epoch: int) -> list[list[int]]:
        generator = np.random.default_rng((self._seed, epoch))
        order: list[list[int]] = []
        for alike in self._alike.values():
            shuffled = generator.permutation(alike).tolist()
            size = self._size if fixed_batch(self._inputs) else min(self._size, len(shuffled))
            if size >= self._ranks:
                order += [shuffled[first : first + size] for first in range(0, len(shuffled) - size + 1, size)]
        return [order[place] for place in generator.permutation(len(order))]

    def _sample(self, position: int) -> Sample:
        if position in self._held:
            return self._held[position]
        sample = self._items[position][1]()
        size = sum(array.nbytes for array in sample.values())
        if size <= self._room:
            self._room -= size
            self._held[position] = sample
        return sample

"""A re-iterable stream of samples, its division into calibration and held-out parts, and its batches.

A data set is not a list: it is read anew on every pass, one file at a time. Its samples are deferred: reading yields
functions that load a sample, so that a part of a data set never decodes the images of the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxlr.data.spec import Feed, Sample, TensorSpec, fixed_batch, has_batch_axis
from onnxlr.errors import ConfigError

# a sample's number travels with it through the batches, under a name that no tensor of ONNX can have
_NUMBER = ""

Deferred: TypeAlias = Callable[[], Sample]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A stream of samples that can be iterated any number of times, always in the same order.

    Attributes
    ----------
    name : str
        Where the samples come from, for messages and reports.
    read : callable
        Starts a pass: an iterator of `(index, load)`, `load()` giving the sample with that index in the whole data set.
    """

    name: str
    read: Callable[[], Iterator[tuple[int, Deferred]]]

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples; a DataError names the first that does not fit the model."""
        for _, sample in self.indexed():
            yield sample

    def indexed(self) -> Iterator[tuple[int, Sample]]:
        """Yield `(index, sample)`, the index counting in the whole data set: `labels[index]` is the sample's label."""
        for index, load in self.read():
            yield index, load()


def split(dataset: Dataset, holdout_every: int = 8) -> tuple[Dataset, Dataset]:
    """Divide a data set into (calibration, held-out): of every `holdout_every` samples the second is held out.

    Both are lazy views, and of two samples or more neither is empty.

    Raises
    ------
    ConfigError
        For `holdout_every` below 2, which would leave nothing to calibrate on.
    """
    if holdout_every < 2:
        raise ConfigError(f"holdout_every {holdout_every}: expected 2 or more; 1 in that many samples is held out")

    def part(held_out: bool) -> Callable[[], Iterator[tuple[int, Deferred]]]:
        def read() -> Iterator[tuple[int, Deferred]]:
            for position, item in enumerate(dataset.read()):
                if (position % holdout_every == 1) == held_out:
                    yield item

        return read

    return Dataset(f"{dataset.name} (calibration)", part(False)), Dataset(f"{dataset.name} (held out)", part(True))


def spread(dataset: Dataset, count: int) -> Dataset:
    """A view of at most `count` samples, evenly spaced over the data set: files sorted by class show every class."""

    def read() -> Iterator[tuple[int, Deferred]]:
        items = list(dataset.read())
        for position in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int):
            yield items[position]

    return Dataset(dataset.name, read)


def shuffled(dataset: Dataset, run: int) -> Dataset:
    """A view in a fixed random order, in which `run` consecutive samples stay together to fill a batch."""

    def read() -> Iterator[tuple[int, Deferred]]:
        items = list(dataset.read())
        starts = range(0, len(items), run)
        for start in np.random.default_rng(0).permutation(len(starts)):
            yield from items[starts[start] : starts[start] + run]

    return Dataset(dataset.name, read)


def batches(samples: Iterable[Sample], size: int, inputs: Sequence[TensorSpec]) -> Iterator[Feed]:
    """Merge consecutive samples along axis 0 into feeds, in order.

    Samples of different shapes never meet, so sequences of different lengths need no padding. A model whose batch axis
    is fixed to b gets feeds of exactly b, whatever `size`; what is left over is dropped with a warning. Without a batch
    axis every sample is a feed.

    Parameters
    ----------
    samples : iterable of Sample
        As a Dataset gives them.
    size : int
        The most rows in a feed.
    inputs : sequence of TensorSpec
        The model's inputs.

    Returns
    -------
    iterator of Feed
        Arrays `[rows, ...]`, C-contiguous.

    Raises
    ------
    ConfigError
        For a size below 1.
    """
    if size < 1:
        raise ConfigError(f"batch size {size}: expected 1 or more")
    if not has_batch_axis(inputs):
        return (dict(sample) for sample in samples)
    fixed = fixed_batch(inputs)
    return _merge(samples, size) if fixed is None else _merge_fixed(samples, fixed)


def numbered_batches(
    numbered: Iterable[tuple[int, Sample]], size: int, inputs: Sequence[TensorSpec]
) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.int64]], Feed]]:
    """The batches of numbered samples, each with their numbers: `labels[numbers]` are their labels."""
    samples = ({**sample, _NUMBER: np.array([number])} for number, sample in numbered)
    for feed in batches(samples, size, inputs):
        yield feed.pop(_NUMBER), feed


def _merge(samples: Iterable[Sample], size: int) -> Iterator[Feed]:
    for group in _groups(samples, size):
        yield _concatenate(group)


def _merge_fixed(samples: Iterable[Sample], fixed: int) -> Iterator[Feed]:
    dropped = 0
    for group in _groups(samples, fixed):
        if sum(map(_rows, group)) == fixed:
            yield _concatenate(group)
        else:
            dropped += len(group)
    if dropped:
        warnings.warn(
            f"{dropped} samples left out: the model's batch axis is fixed to {fixed} and they do not fill a batch of "
            "equal shapes",
            stacklevel=2,
        )


def _groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Gather consecutive samples of equal shapes, up to `size` rows."""
    group: list[Sample] = []
    rows = 0
    for sample in samples:
        if group and (_shapes(sample) != _shapes(group[0]) or rows + _rows(sample) > size):
            yield group
            group, rows = [], 0
        group.append(sample)
        rows += _rows(sample)
    if group:
        yield group


def _concatenate(group: list[Sample]) -> Feed:
    if len(group) == 1:
        return dict(group[0])
    return {name: np.concatenate([sample[name] for sample in group]) for name in group[0]}


def _rows(sample: Sample) -> int:
    # An image for a model that takes [C, H, W] is one sample of C rows: its batch axis is none, but looks like one.
    return len(next(iter(sample.values())))


def _shapes(sample: Sample) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in sample.items()}

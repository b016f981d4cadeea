"""How fast models are on this machine: whole ones in turn, and one model's layers alone, dense and as pairs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from onnxlr.bench import compare_latency
from onnxlr.case import as_model, images_for, name_of
from onnxlr.costs import Latency as Prices
from onnxlr.costs import timed_dtype
from onnxlr.data import batches, open_data, sample_count
from onnxlr.errors import ConfigError, DataError
from onnxlr.forms import pair_products
from onnxlr.memory import peak_memory
from onnxlr.session import Session
from onnxlr.shapes import measure_shapes, synthetic_sample
from onnxlr.sites import take_inventory
from onnxlr.timing_cache import recalled, remember
from onnxlr.unfold import unfold

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from onnxlr.bench import Latency
    from onnxlr.case import ModelLike
    from onnxlr.data import Feed, ImageOptions
    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory, Weight


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Models timed in turn, ratios against the first.

    Attributes
    ----------
    models
        What they were given as.
    file_bytes
        Of each, its external data included.
    peak_memory_bytes
        What loading each and running it on the largest batch adds to a process of its own.
    latencies
        By batch size, of each model.
    """

    models: tuple[str, ...]
    file_bytes: tuple[int, ...]
    peak_memory_bytes: tuple[int, ...]
    latencies: dict[int, tuple[Latency, ...]]
    provider: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"format": "onnxlr-benchmark/1", **asdict(self)}


def bench(
    models: Sequence[ModelLike],
    calib: object | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    runs: int = 100,
    seconds: float = 10.0,
    images: ImageOptions | None = None,
    provider: str = "cpu",
    threads: int = 0,
) -> Benchmark:
    """Time models against each other, run by run in turn (`onnxlr.bench`), and measure the memory of each.

    Parameters
    ----------
    models
        Paths, references, `Model`s or ModelProtos that take the same inputs; ratios are against the first.
    calib
        Whatever `onnxlr.data.open_data` takes: its first samples are run. Made-up values when None, with free axes at a
        usual length.
    batch_sizes
        Samples in a run; one alone is measured where the model fixes it.
    runs, seconds
        Of each model at each batch size at most, and for all models together (`compare_latency`).
    images
        How images become inputs, where `calib` is a folder of images.
    provider, threads
        As of `Session`.

    Raises
    ------
    OnnxlrError
        Whatever is wrong with the models, the data or the installation; a model that does not take the first one's
        inputs fails on them.
    """
    if not models or not batch_sizes:
        raise ConfigError("nothing to time: give one model or more, and one batch size or more")
    loaded = [as_model(model) for model in models]
    feeds = _feeds(loaded[0], calib, batch_sizes, images, provider)
    latencies = {
        size: tuple(
            compare_latency(loaded, feed, runs=runs, budget_seconds=seconds, provider=provider, threads=threads)
        )
        for size, feed in feeds.items()
    }
    largest = feeds[max(feeds)]
    return Benchmark(
        models=tuple(name_of(model) for model in models),
        file_bytes=tuple(model.nbytes for model in loaded),
        peak_memory_bytes=tuple(peak_memory(model, largest, provider=provider, threads=threads) for model in loaded),
        latencies=latencies,
        provider=provider,
        threads=threads,
    )


def _feeds(
    model: Model, calib: object | None, batch_sizes: Sequence[int], images: ImageOptions | None, provider: str
) -> dict[int, Feed]:
    """What to run, by the number of samples that it really holds."""
    inputs = Session(model, provider=provider, optimize=False).inputs
    data = None if calib is None else open_data(calib, inputs, images=images_for(model, images))
    feeds = {}
    for size in batch_sizes:
        if size < 1:
            raise ConfigError(f"batch size {size}: expected 1 or more")
        feed = synthetic_sample(inputs, size) if data is None else next(batches(data, size, inputs), None)
        if feed is None:
            assert data is not None
            raise DataError(f"{data.name}: no sample to run")
        feeds[sample_count(feed, inputs)] = feed
    return feeds


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Times of weights of one shape, in microseconds of one run of the batch.

    Attributes
    ----------
    d_in, d_out, groups, rows
        Of `y [rows, d_out] = x W`, as many at a time as `groups`.
    weights
        How many weights of the model are so.
    dense_us
        As it is.
    break_even, break_even_by_time
        The rank from which on a pair is no smaller, and the largest multiple that is faster; 0 where none is.
    half_rank, half_us
        The largest multiple that keeps at most half of the parameters, and the time of that pair; None where even the
        least keeps more.
    """

    d_in: int
    d_out: int
    groups: int
    rows: int
    weights: int
    dense_us: float
    break_even: float
    break_even_by_time: int
    half_rank: int | None
    half_us: float | None


@dataclass(frozen=True, slots=True)
class Profile:
    """A model's layers, timed as products and convolutions.

    `model_us` is the time of a whole run, `recalled` whether times of an earlier profile still held, `cache` where they
    are kept, `refused` how many weights have rows that are unknown.
    """

    model: str
    batch: int
    provider: str
    threads: int
    dtype: str
    model_us: float
    layers: tuple[LayerTimes, ...]
    refused: int
    recalled: bool
    cache: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"format": "onnxlr-profile/1", **asdict(self)}


def profile(
    model: ModelLike,
    calib: object | None = None,
    *,
    batch: int = 8,
    rank_multiple: int = 16,
    images: ImageOptions | None = None,
    provider: str = "cpu",
    threads: int = 0,
) -> Profile:
    """Time a model's layers, dense and as pairs, and keep the times for `compress` with the target max_latency.

    Parameters
    ----------
    model
        A path, a reference, a `Model` or a ModelProto.
    calib
        Data whose first samples give the shapes, as of `bench`; made-up ones when None.
    batch
        Samples in a run, where the model leaves it free.
    rank_multiple
        Ranks are multiples of it.
    images, provider, threads
        As of `bench`.

    Raises
    ------
    OnnxlrError
        Whatever is wrong with the model, the data or the installation; OutputError where the cache cannot be written.
    """
    loaded, _ = unfold(as_model(model))
    feeds = list(_feeds(loaded, calib, [1, batch], images, provider).items())  # one alone, where the batch is fixed
    (counted, one), (size, many) = feeds[0], feeds[-1]
    inventory = take_inventory(loaded, measure_shapes(loaded, one, provider=provider))
    settings: dict[str, Any] = {"provider": provider, "threads": threads}
    dtype = timed_dtype(inventory.weights)
    timings, held = recalled(**settings, dtype=dtype)
    times = size // counted
    prices = Prices(inventory, timings, times, timings.whole(loaded, many), rank_multiple)
    layers = tuple(_layers(inventory, prices, times, rank_multiple))
    path: Path = remember(timings, **settings, dtype=dtype)
    return Profile(
        model=name_of(model), batch=size, **settings, dtype=dtype, model_us=prices.whole, layers=layers,
        refused=sum(not any(weight.rows) for weight in inventory.weights), recalled=held, cache=str(path),
    )  # fmt: skip


def _layers(inventory: Inventory, prices: Prices, times: int, multiple: int) -> Iterator[LayerTimes]:
    alike: dict[tuple[Any, ...], list[Weight]] = {}
    for weight in inventory.weights:
        if any(weight.rows):
            key = weight.rows, weight.d_in, weight.d_out, weight.groups, weight.convolutions
            alike.setdefault(key, []).append(weight)
    for (rows, d_in, d_out, groups, _), weights in alike.items():
        dense, ranks = prices.dense(weights[0]), range(multiple, min(d_in, d_out) + 1, multiple)

        def pair(rank: int, weight: Weight = weights[0]) -> float:
            return prices.form(weight, pair_products(weight.d_in, weight.d_out, rank), moved=0, corrected=False)

        break_even = d_in * d_out / (d_in + d_out)
        half = max((rank for rank in ranks if rank <= break_even / 2), default=None)
        yield LayerTimes(
            d_in, d_out, groups, round(times * rows[0]), len(weights), dense, break_even,
            max((rank for rank in ranks if pair(rank) < dense), default=0),
            half, None if half is None else pair(half),
        )  # fmt: skip

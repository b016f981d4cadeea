"""What a linear layer costs in time: matrix products, measured and interpolated.

A plan weighs thousands of ways to write a layer, each a few products `[rows, d_in] x [d_in, d_out]` with constant
weights. To time them all would take longer than the compression. At fixed rows, the time of a product is close to

    a + b d_in + c d_out + d d_in d_out

(dispatch; reading the data; writing the result; multiplying), with coefficients that change slowly with the sizes. So
products are timed where both sizes are a power of two or one and a half times that (64, 96, 128, 192, 256, 384, ...,
where most models have their widths), and the rest is interpolated in both sizes, which is exact for the formula above.
On the CPU, kernels compute 16 columns at a time: `d_out` counts as the next multiple of 16.

Three things would make such times wrong:

- A product that runs alone mostly shows the call: onnxruntime has to be entered and its threads woken. So every timed
  run holds several copies of a product, each with weights of its own, and the same run without them is subtracted.
- Sessions differ in how their threads and memory happen to lie. So all that is timed together is one model in one
  session (`onnxlr.timed_graph`): a tree of If operators that an input leads to one leaf.
- Other load on the machine comes and goes. So the leaves are run in turn, round by round, and of each the least time
  but for outliers is kept, since other load only ever adds. On a single thread its own processor time is taken, which
  other load does not enter. And what is measured later is scaled by one product that is timed each time: a machine's
  pace changes by a third within minutes.

Times of an earlier process (`onnxlr.timing_cache`) are believed only where some of them, measured again, are still in
proportion, and are then scaled to the machine's pace of now.

Weights, and the data of Concats, are seldom in the nearest cache when they are read, as in a whole model; where the
results go is. In a whole model, moving data therefore takes up to twice as long as here.
"""

from __future__ import annotations

import time
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper

from onnxlr.bench import clock_of
from onnxlr.errors import ConfigError
from onnxlr.session import PROVIDERS, Session
from onnxlr.timed_graph import Leaf, groups, tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from onnxlr.data import Feed
    from onnxlr.timed_graph import Sizes

    Table = dict[Sizes, float]

DTYPES = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
}
SMALLEST, LARGEST = 8, 4096
"""Smaller sizes count as the first; larger ones are timed at the second and scaled: there time follows the work."""
KERNEL_COLUMNS = 16
"""Columns that a CPU kernel computes at once."""
WARMUP, MIN_ROUNDS, MAX_ROUNDS = 2, 5, 30
SECONDS = 0.05
"""For each point: no round begins later than all of them together after the first, once `MIN_ROUNDS` are done."""
QUANTILE = 0.1
CHECKED, TRUSTED = 12, 0.15
"""How many times of an earlier process are measured again, and by what share three of four must be in proportion."""

_REFERENCE = (256, (256, 256))  # rows and sizes of the product that tells the machine's pace


class Timings:
    """Times of matrix products and of data movement, measured on first use and kept.

    The times of one object are consistent: asked again they are the same, and none falls as a layer grows wider.

    Parameters
    ----------
    provider, threads
        As of `Session`.
    dtype : str
        Element type of data and weights: float16, bfloat16, float32 or float64. A CPU without half precision runs such
        products in float32 between two Casts; those count here, although a whole model may do with fewer.

    Raises
    ------
    ConfigError
        Another dtype.
    """

    def __init__(self, *, provider: str = "cpu", threads: int = 0, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r}: products are timed in {', '.join(DTYPES)}")
        self._provider, self._threads, self._dtype = provider, threads, dtype
        self._columns = KERNEL_COLUMNS if PROVIDERS.get(provider.lower(), provider) == PROVIDERS["cpu"] else 1
        self._clock = clock_of(provider, threads)
        self._pace: float | None = None  # microseconds of the reference when the first times were taken
        self._products: dict[int, Table] = {}
        self._moves: dict[int, Table] = {}

    def product(self, rows: int, d_in: int, d_out: int) -> float:
        """Microseconds of a MatMul of data [rows, d_in] with a constant [d_in, d_out].

        Parameters
        ----------
        rows, d_in, d_out : int
            At least 1; `rows` is the product of all axes of the data but the last.

        Raises
        ------
        ConfigError
            A size below 1.
        InstallError, ModelError
            As `Session`.
        """
        self.measure([(rows, d_in, d_out)])
        return _interpolated(self._products, rows, d_in, self._padded(d_out))

    def moved(self, rows: int, features: int) -> float:
        """Microseconds of a Concat of two halves to [rows, features].

        A Split of [rows, features] moves as much. Raises as `product` does.
        """
        _require_sizes(rows, features)
        self._fill(self._moves, [(rows, SMALLEST, features)], Leaf.concat)
        return _interpolated(self._moves, rows, SMALLEST, features)

    def measure(self, products: Iterable[tuple[int, int, int]]) -> None:
        """Time all that the given products need, in turn.

        Without it `product` times what is missing when it is asked, a few points at a time. The times of points that
        are measured together can be compared best, since what else the machine does meets all of them alike.

        Parameters
        ----------
        products : iterable of (rows, d_in, d_out)
            What `product` will be asked for.

        Raises as `product` does.
        """
        wanted = []
        for rows, d_in, d_out in products:
            _require_sizes(rows, d_in, d_out)
            wanted.append((rows, d_in, self._padded(d_out)))
        self._fill(self._products, wanted, self._matmul)

    def to_dict(self) -> dict[str, Any]:
        """All that was measured, in microseconds, for `recall` in another process; plain JSON types."""
        return {
            "reference": self._pace,
            **{
                name: [[rows, *sizes, one] for rows, table in tables.items() for sizes, one in table.items()]
                for name, tables in (("products", self._products), ("moves", self._moves))
            },
        }

    def recall(self, document: Mapping[str, Any]) -> bool:
        """Take over the times of an earlier process, if they are still in proportion to each other.

        Up to `CHECKED` products among the longer half, which noise blurs least, and the reference are measured again.
        The median of new over old is how the machine's pace has changed, and all times are scaled by it.

        Parameters
        ----------
        document
            From `to_dict` of an object with the same provider, threads and dtype.

        Returns
        -------
        bool
            False where a quarter of what was measured again is off by more than `TRUSTED` after scaling, or nothing
            is in the document: then nothing was taken over.

        Raises
        ------
        KeyError, TypeError, ValueError
            The document is not what `to_dict` gives.
        """
        entries = sorted((float(one), int(rows), (int(a), int(b))) for rows, a, b, one in document["products"])
        moves = [(float(one), int(rows), (int(a), int(b))) for rows, a, b, one in document["moves"]]
        if not entries:
            return False
        long = entries[len(entries) // 2 :]
        some = [long[i] for i in sorted({round(i) for i in np.linspace(0, len(long) - 1, CHECKED)})]
        pace, *now = self._time([self._matmul(*_REFERENCE), *(self._matmul(rows, sizes) for _, rows, sizes in some)])
        before = [float(document["reference"]), *(one for one, _, _ in some)]
        ratios = np.asarray([pace, *now]) / before
        change = float(np.median(ratios))
        if not (change > 0 and np.quantile(np.abs(ratios / change - 1), 0.75) <= TRUSTED):
            return False
        self._pace = change * before[0]
        for tables, measured in ((self._products, entries), (self._moves, moves)):
            for one, rows, sizes in measured:
                tables.setdefault(rows, {})[sizes] = round(1024 * change * one) / 1024
        return True

    def _matmul(self, rows: int, sizes: Sizes) -> Leaf:
        return Leaf.matmul(rows, sizes, helper.tensor_dtype_to_np_dtype(DTYPES[self._dtype]).itemsize)

    def _padded(self, d_out: int) -> int:
        return -(-d_out // self._columns) * self._columns

    def _fill(
        self,
        tables: dict[int, Table],
        wanted: Iterable[tuple[int, int, int]],
        leaf: Callable[[int, Sizes], Leaf],
    ) -> None:
        missing: set[tuple[int, Sizes]] = set()
        for full, a, b in wanted:
            rows = min(full, LARGEST)
            table = tables.setdefault(rows, {})
            points = product((size for size, _ in _neighbours(a)), (size for size, _ in _neighbours(b)))
            missing.update((rows, sizes) for sizes in points if sizes not in table)
        # from large to small: where two times contradict each other the longer run is the one to trust
        ordered = sorted(missing, key=lambda key: (key[0] * key[1][0] * key[1][1], key), reverse=True)
        for group in groups([leaf(rows, sizes) for rows, sizes in ordered]):
            pace, *times = self._time([self._matmul(*_REFERENCE), *group])
            self._pace = self._pace or pace
            for one, microseconds in zip(group, times, strict=True):
                _insert(tables[one.rows], one.sizes, microseconds * self._pace / pace)

    def _time(self, leaves: Sequence[Leaf]) -> list[float]:
        """Microseconds of one copy of each leaf's operator."""
        model, feed = tree(leaves, DTYPES[self._dtype])
        session = Session(model, provider=self._provider, threads=self._threads)
        feeds = [{**feed, "which": np.asarray(i, np.int64)} for i in range(2 * len(leaves))]

        def seconds(which: Feed) -> float:
            start = self._clock()
            session.run(which)
            return self._clock() - start

        rounds: list[list[float]] = []
        deadline = time.perf_counter() + SECONDS * len(leaves)
        while len(rounds) < WARMUP + MIN_ROUNDS or (
            len(rounds) < WARMUP + MAX_ROUNDS and time.perf_counter() < deadline
        ):
            rounds.append([seconds(which) for which in feeds])
        least = 1e6 * np.quantile(rounds[WARMUP:], QUANTILE, axis=0)
        copies = np.asarray([leaf.copies for leaf in leaves])
        return [float(one) for one in (least[::2] - least[1::2]) / copies]


def _neighbours(size: int) -> list[tuple[int, float]]:
    """The sizes on the grid between which `size` lies, with their shares in it; one alone where it is on the grid."""
    size = min(max(size, SMALLEST), LARGEST)
    low = 1 << (size.bit_length() - 1)
    low, high = (low, low + low // 2) if size < low + low // 2 else (low + low // 2, 2 * low)
    if size == low:
        return [(low, 1.0)]
    share = (size - low) / (high - low)
    return [(low, 1 - share), (high, share)]


def _interpolated(tables: dict[int, Table], rows: int, a: int, b: int) -> float:
    table = tables[min(rows, LARGEST)]
    inside = sum(table[i, j] * p * q for (i, p), (j, q) in product(_neighbours(a), _neighbours(b)))
    beyond = max(1, rows / LARGEST) * max(1, a / LARGEST) * max(1, b / LARGEST)
    return inside * beyond


def _insert(table: Table, sizes: Sizes, microseconds: float) -> None:
    """Add a time, no shorter than that of any smaller sizes and no longer than that of any larger ones."""
    a, b = sizes
    # noise may leave nothing of the quickest, but none is free
    floor = max((one for (i, j), one in table.items() if i <= a and j <= b), default=2**-10)
    ceiling = min((one for (i, j), one in table.items() if i >= a and j >= b), default=float("inf"))
    # in steps of 2^-10: distances on the grid are powers of two as well, so that interpolation rounds nothing and what
    # is level stays level
    table[sizes] = min(max(round(1024 * microseconds) / 1024, floor), ceiling)


def _require_sizes(*sizes: int) -> None:
    if min(sizes) < 1:
        raise ConfigError(f"sizes {', '.join(map(str, sizes))}: there is nothing to time unless each is at least 1")

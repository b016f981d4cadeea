"""What a linear layer costs in time: matrix products and convolutions, measured and interpolated.

A plan weighs thousands of ways to write a layer, each a few products `[rows, d_in] x [d_in, d_out]` with constant
weights. To time them all would take longer than the compression. At fixed rows, the time of a product is close to

    a + b d_in + c d_out + d d_in d_out

(dispatch; reading the data; writing the result; multiplying), with coefficients that change slowly with the sizes. So
products are timed where both sizes are a power of two or one and a half times that (64, 96, 128, 192, 256, 384, ...,
where most models have their widths), and the rest is interpolated in both sizes, which is exact for the formula above.
On the CPU, kernels compute 16 columns at a time: `d_out` counts as the next multiple of 16.

A convolution (`onnxlr.sites.convolution`) is timed as such, on what it reads in the model; sizes are its channels. Its
time rises in steps with those that it makes: with AVX2, one of 3 x 3 to 8, 16 and 24 channels takes 0.67, 0.75 and 1.0
of the time of 32, and to 40 as long as to 48, 1.8. So there the grid has all multiples of 8 up to 128.

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

Weights of products, and the data of Concats, are seldom in the nearest cache when they are read, as in a whole model;
where the results go is. In a whole model, moving data therefore takes up to twice as long as here.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper

from onnxlr.bench import clock_of
from onnxlr.errors import ConfigError
from onnxlr.session import PROVIDERS, Session, provider_name
from onnxlr.sites.convolution import Convolution
from onnxlr.timed_graph import concat, convolve, groups, matmul, tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from onnxlr.data import Feed
    from onnxlr.model_io import Model
    from onnxlr.timed_graph import Leaf, Sizes

    Table = dict[Sizes, float]
    Over = int | Convolution

DTYPES = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
}
SMALLEST, LARGEST = 8, 4096
"""Smaller sizes count as the first, but as 1 for channels; larger ones are timed at the second and scaled: there time
follows the work. Convolutions of more positions are timed on fewer samples."""
KERNEL_COLUMNS = 16
"""Columns that a CPU kernel computes at once."""
BLOCK, STEPS = 8, 128
"""Channels that a CPU kernel computes at once at the least, and up to how many all multiples are on the grid."""
WARMUP, MIN_ROUNDS, MAX_ROUNDS = 2, 5, 30
SECONDS, WHOLE_SECONDS = 0.05, 2.0
"""For each point, and a whole model, by the clock that times them: no round begins later than all of them together
after the first, once `MIN_ROUNDS` are done."""
QUANTILE = 0.1
CHECKED, TRUSTED = 12, 0.15
"""How many times of an earlier process are measured again, and by what share three of four must be in proportion."""

_REFERENCE = (256, (256, 256))  # rows and sizes of the product that tells the machine's pace


class Timings:
    """Times of matrix products, convolutions and data movement, measured on first use and kept.

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
        self._columns = KERNEL_COLUMNS if provider_name(provider) == PROVIDERS["cpu"] else 1
        self._clock = clock_of(provider, threads)
        self._pace: dict[int, float] = {}  # of the reference when the first times were taken, by the runs of a leaf
        self._products: dict[Over, Table] = {}
        self._moves: dict[Over, Table] = {}

    def product(self, over: Over, d_in: int, d_out: int) -> float:
        """Microseconds of a MatMul of data [rows, d_in] with a constant [d_in, d_out], or of a convolution.

        Parameters
        ----------
        over : int or Convolution
            The rows, at least 1: the product of all axes of the data but the last. Or the convolution.
        d_in, d_out : int
            The shape of the constant; of a convolution, the channels that each of its groups reads and makes.

        Raises
        ------
        ConfigError
            A size below 1.
        InstallError, ModelError
            As `Session`.
        """
        self.measure([(over, d_in, d_out)])
        return _interpolated(self._products, over, d_in, self._padded(over, d_out))

    def moved(self, rows: int, features: int) -> float:
        """Microseconds of a Concat of two halves to [rows, features].

        A Split of [rows, features] moves as much. Raises as `product` does.
        """
        _require_sizes(rows, features)
        self._fill(self._moves, [(rows, SMALLEST, features)], concat)
        return _interpolated(self._moves, rows, SMALLEST, features)

    def whole(self, model: Model, feed: Feed) -> float:
        """Microseconds of one run of a model on `feed`, at the machine's pace when the first products were timed.

        Raises
        ------
        InstallError, ModelError
            As `Session`.
        """
        session = Session(model, provider=self._provider, threads=self._threads)
        warm = self._reference(2)
        pace, microseconds = self._time([warm], (session, feed))
        return microseconds * self._scale([warm], [pace])[warm.runs]

    def measure(self, products: Iterable[tuple[Over, int, int]]) -> None:
        """Time all that the given products need, in turn.

        Without it `product` times what is missing when it is asked, a few points at a time. The times of points that
        are measured together can be compared best, since what else the machine does meets all of them alike.

        Parameters
        ----------
        products : iterable of (over, d_in, d_out)
            What `product` will be asked for.

        Raises as `product` does.
        """
        wanted = []
        for over, d_in, d_out in products:
            _require_sizes(*([over] if isinstance(over, int) else ()), d_in, d_out)
            wanted.append((over, d_in, self._padded(over, d_out)))
        self._fill(self._products, wanted, self._product)

    def to_dict(self) -> dict[str, Any]:
        """All that was measured, in microseconds, for `recall` in another process; plain JSON types."""
        return {
            "reference": {str(runs): one for runs, one in self._pace.items()},
            **{
                name: [[_plain(over), *sizes, one] for over, table in tables.items() for sizes, one in table.items()]
                for name, tables in (("products", self._products), ("moves", self._moves))
            },
        }

    def recall(self, document: Mapping[str, Any]) -> bool:
        """Take over the times of an earlier process, if they are still in proportion to each other.

        Up to `CHECKED` products and convolutions among the longer half, which noise blurs least, and the reference are
        measured again. The median of new over old is how the machine's pace has changed: all times are scaled by it.

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
        entries, moves = (
            [(float(one), _over(plain), (int(a), int(b))) for plain, a, b, one in document[name]]
            for name in ("products", "moves")
        )
        entries.sort(key=lambda entry: entry[0])
        if not entries:
            return False
        long = entries[len(entries) // 2 :]
        some = [long[i] for i in sorted({round(i) for i in np.linspace(0, len(long) - 1, CHECKED)})]
        pace = {int(runs): float(one) for runs, one in document["reference"].items()}
        again = [*map(self._reference, pace), *(self._product(over, sizes) for _, over, sizes in some)]
        ratios = np.asarray(self._time(again)) / [*pace.values(), *(one for one, _, _ in some)]
        change = float(np.median(ratios))
        if not (change > 0 and np.quantile(np.abs(ratios / change - 1), 0.75) <= TRUSTED):
            return False
        self._pace = {runs: change * one for runs, one in pace.items()}
        for tables, measured in ((self._products, entries), (self._moves, moves)):
            for one, over, sizes in measured:
                tables.setdefault(over, {})[sizes] = round(1024 * change * one) / 1024
        return True

    def _product(self, over: Over, sizes: Sizes) -> Leaf:
        itemsize = helper.tensor_dtype_to_np_dtype(DTYPES[self._dtype]).itemsize
        return matmul(over, sizes, itemsize) if isinstance(over, int) else convolve(over, sizes, itemsize)

    def _padded(self, over: Over, d_out: int) -> int:
        return -(-d_out // self._columns) * self._columns if isinstance(over, int) else d_out

    def _fill(
        self,
        tables: dict[Over, Table],
        wanted: Iterable[tuple[Over, int, int]],
        leaf: Callable[[Any, Sizes], Leaf],
    ) -> None:
        missing: dict[tuple[Over, Sizes], None] = {}
        for whole, a, b in wanted:
            over, _ = _fewer(whole)
            table = tables.setdefault(over, {})
            missing.update(((over, sizes), None) for sizes in _points(over, a, b) if sizes not in table)
        # from large to small: where two times contradict each other the longer run is the one to trust
        leaves = sorted((leaf(over, sizes) for over, sizes in missing), key=lambda leaf: leaf.work, reverse=True)
        for group in groups(leaves):
            references = [self._reference(runs) for runs in sorted({one.runs for one in group})]
            times = self._time([*references, *group])
            scale = self._scale(references, times[: len(references)])
            for one, microseconds in zip(group, times[len(references) :], strict=True):
                _insert(tables[one.over], one.sizes, microseconds * scale[one.runs])

    def _reference(self, runs: int) -> Leaf:
        """The reference, run as often as the leaves it is for: what others leave in the caches enters single runs."""
        return replace(self._product(*_REFERENCE), runs=runs)

    def _scale(self, references: Sequence[Leaf], pace: Sequence[float]) -> dict[int, float]:
        """What makes times of now those of the pace of the first ones, by how often a leaf is run."""
        return {one.runs: self._pace.setdefault(one.runs, now) / now for one, now in zip(references, pace, strict=True)}

    def _time(self, leaves: Sequence[Leaf], *wholes: tuple[Session, Feed]) -> list[float]:
        """Microseconds of one copy of each leaf's operator, and of one run of each whole model."""
        model, feed = tree(leaves, DTYPES[self._dtype])
        session = Session(model, provider=self._provider, threads=self._threads)
        timed = [
            *(
                (session, {**feed, "which": np.asarray(i, np.int64)}, leaves[i // 2].runs)
                for i in range(2 * len(leaves))
            ),
            *((whole, fed, 2) for whole, fed in wholes),
        ]

        def seconds(session: Session, feed: Feed) -> float:
            start = self._clock()
            session.run(feed)
            return self._clock() - start

        rounds: list[list[float]] = []
        deadline = self._clock() + SECONDS * len(leaves) + WHOLE_SECONDS * len(wholes)
        while len(rounds) < WARMUP + MIN_ROUNDS or (len(rounds) < WARMUP + MAX_ROUNDS and self._clock() < deadline):
            rounds.append([min(seconds(session, fed) for _ in range(runs)) for session, fed, runs in timed])
        least = 1e6 * np.quantile(rounds[WARMUP:], QUANTILE, axis=0)
        of_leaves, of_wholes = least[: 2 * len(leaves)], least[2 * len(leaves) :]
        copies = np.asarray([leaf.copies for leaf in leaves])
        return [float(one) for one in (*((of_leaves[::2] - of_leaves[1::2]) / copies), *of_wholes)]


def _fewer(over: Over) -> tuple[Over, float]:
    """What is timed in the place of `over`, and how many times that it is."""
    if isinstance(over, int):
        rows = min(over, LARGEST)
        return rows, over / rows
    samples = min(over.samples, max(1, LARGEST * over.samples // over.positions))
    return replace(over, samples=samples), over.samples / samples


def _plain(over: Over) -> int | dict[str, Any]:
    return over if isinstance(over, int) else over.to_dict()


def _over(plain: Any) -> Over:
    return Convolution.from_dict(plain) if isinstance(plain, dict) else int(plain)


def _points(over: Over, a: int, b: int) -> dict[Sizes, float]:
    """The points of the grid between which the sizes lie, with their shares in it."""
    if isinstance(over, int):
        ends = _between(max(a, SMALLEST)), _between(max(b, SMALLEST))
    else:
        ends = _between(a), _between(b, steps=True)
    return {(i, j): p * q for (i, p), (j, q) in product(*(each.items() for each in ends))}


def _between(size: int, *, steps: bool = False) -> dict[int, float]:
    """The sizes on the grid next to `size`, with their shares in it; one alone where it is on the grid."""
    size = min(size, LARGEST)
    low = 1 << (size.bit_length() - 1)
    low, high = (low, low + low // 2) if size < low + low // 2 else (low + low // 2, 2 * low)
    if steps and BLOCK <= size <= STEPS:
        low, high = size // BLOCK * BLOCK, size // BLOCK * BLOCK + BLOCK
    if size == low:
        return {low: 1.0}
    share = (size - low) / (high - low)
    return {low: 1 - share, high: share}


def _interpolated(tables: dict[Over, Table], whole: Over, a: int, b: int) -> float:
    over, beyond = _fewer(whole)
    inside = sum(tables[over][sizes] * share for sizes, share in _points(over, a, b).items())
    return inside * beyond * max(1, a / LARGEST) * max(1, b / LARGEST)


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

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
- After a run, onnxruntime's threads go on spinning for tens of milliseconds and take the cores from the next session.
  So all that is timed together is one model in one session: a tree of If operators that an input leads to one leaf.
- Other load on the machine comes and goes. So the leaves are run in turn, round by round, and of each the least time
  but for outliers is kept, since other load only ever adds. On a single thread its own processor time is taken, which
  other load does not enter. And what is measured later is scaled by one product that is timed each time: a machine's
  pace changes by a third within minutes.

Weights, and the data of Concats, are seldom in the nearest cache when they are read, as in a whole model; where the
results go is. In a whole model, moving data therefore takes up to twice as long as here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxlr.bench import clock_of
from onnxlr.errors import ConfigError
from onnxlr.model_io import from_proto
from onnxlr.session import PROVIDERS, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from onnx import GraphProto, NodeProto

    from onnxlr.data import Feed
    from onnxlr.model_io import Model

    Sizes = tuple[int, int]
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

_REFERENCE = (256, (256, 256))  # rows and sizes of the product that tells the machine's pace
_WORK = 10**8  # multiply-accumulates of one run, for which products are copied
_COPIES, _COPIED_BYTES = 32, 2**21  # at most, of one product
_MOVED, _MOVES = 2 * 10**6, 8  # elements of one run, for which Concats are copied, and how many at most
_MODEL_BYTES = 2**26  # weights of one model


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
        self._fill(self._moves, [(rows, SMALLEST, features)], _Leaf.concat)
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

    def _matmul(self, rows: int, sizes: Sizes) -> _Leaf:
        return _Leaf.matmul(rows, sizes, helper.tensor_dtype_to_np_dtype(DTYPES[self._dtype]).itemsize)

    def _padded(self, d_out: int) -> int:
        return -(-d_out // self._columns) * self._columns

    def _fill(
        self,
        tables: dict[int, Table],
        wanted: Iterable[tuple[int, int, int]],
        leaf: Callable[[int, Sizes], _Leaf],
    ) -> None:
        missing: set[tuple[int, Sizes]] = set()
        for full, a, b in wanted:
            rows = min(full, LARGEST)
            table = tables.setdefault(rows, {})
            points = product((size for size, _ in _neighbours(a)), (size for size, _ in _neighbours(b)))
            missing.update((rows, sizes) for sizes in points if sizes not in table)
        # from large to small: where two times contradict each other the longer run is the one to trust
        ordered = sorted(missing, key=lambda key: (key[0] * key[1][0] * key[1][1], key), reverse=True)
        for group in _groups([leaf(rows, sizes) for rows, sizes in ordered]):
            pace, *times = self._time([self._matmul(*_REFERENCE), *group])
            self._pace = self._pace or pace
            for one, microseconds in zip(group, times, strict=True):
                _insert(tables[one.rows], one.sizes, microseconds * self._pace / pace)

    def _time(self, leaves: Sequence[_Leaf]) -> list[float]:
        """Microseconds of one copy of each leaf's operator."""
        model, feed = _tree(leaves, DTYPES[self._dtype])
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


@dataclass(frozen=True, slots=True)
class _Leaf:
    """Copies of one operator, whose time goes to `sizes` of the table of `rows`.

    The operator reads data [rows, width] of all `widths`, and weights [widths[0], d_out] where `d_out` is not 0.
    """

    op: str
    rows: int
    sizes: Sizes
    widths: tuple[int, ...]
    d_out: int
    copies: int
    weight_bytes: int

    @classmethod
    def matmul(cls, rows: int, sizes: Sizes, itemsize: int) -> _Leaf:
        d_in, d_out = sizes
        nbytes = d_in * d_out * itemsize
        copies = max(1, min(_COPIES, _WORK // (rows * d_in * d_out), _COPIED_BYTES // nbytes))
        return cls("MatMul", rows, sizes, (d_in,), d_out, copies, copies * nbytes)

    @classmethod
    def concat(cls, rows: int, sizes: Sizes) -> _Leaf:
        _, features = sizes
        copies = max(1, min(_MOVES, _MOVED // (rows * features)))
        return cls("Concat", rows, sizes, (features - features // 2, features // 2), 0, copies, 0)

    def data(self, copy: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of what a copy reads: products the same, Concats each their own."""
        own = "" if self.d_out else f"/{copy}"
        return {f"x{self.rows}x{width}/{i}{own}": (self.rows, width) for i, width in enumerate(self.widths)}

    def nodes(self, prefix: str) -> tuple[list[NodeProto], list[str]]:
        """The copies and their results' names; their weights are to be called `prefix/w0` and so on."""
        results = [f"{prefix}/y{i}" for i in range(self.copies)]
        nodes = []
        for i, result in enumerate(results):
            if self.d_out:
                nodes.append(helper.make_node("MatMul", [*self.data(i), f"{prefix}/w{i}"], [result]))
            else:
                nodes.append(helper.make_node("Concat", list(self.data(i)), [result], axis=-1))
        return nodes, results


def _tree(leaves: Sequence[_Leaf], element: int) -> tuple[Model, Feed]:
    """A model that runs what its input `which` says, and a feed for the rest of its inputs.

    2 i are the copies of leaf i, and 2 i + 1 is the same without them. Only shapes leave the model, which cost the same
    in both and need no copies of data.
    """
    rng = np.random.default_rng(0)
    dtype = helper.tensor_dtype_to_np_dtype(element)

    def array(*shape: int, scale: float = 1.0) -> np.ndarray[Any, Any]:
        return (scale * rng.standard_normal(shape, np.float32)).astype(dtype)

    def graph(name: str, nodes: list[NodeProto], weights: Sequence[TensorProto]) -> GraphProto:
        out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.INT64, None)
        return helper.make_graph(nodes, name, [], [out], weights)

    def branch(low: int, high: int) -> GraphProto:
        """What runs where `low <= which < high`."""
        name = f"{low}-{high}"
        if high - low > 1:
            middle = (low + high) // 2
            nodes = [
                helper.make_node("Less", ["which", f"{name}/middle"], [f"{name}/below"]),
                helper.make_node(
                    "If", [f"{name}/below"], [f"{name}/out"],
                    then_branch=branch(low, middle), else_branch=branch(middle, high),
                ),
            ]  # fmt: skip
            return graph(name, nodes, [numpy_helper.from_array(np.asarray(middle, np.int64), f"{name}/middle")])
        leaf = leaves[low // 2]
        nodes, results = (
            leaf.nodes(name) if low % 2 == 0 else ([], [next(iter(leaf.data(i))) for i in range(leaf.copies)])
        )
        weights = [
            numpy_helper.from_array(array(leaf.widths[0], leaf.d_out, scale=leaf.widths[0] ** -0.5), f"{name}/w{i}")
            for i in range(leaf.copies if nodes and leaf.d_out else 0)
        ]
        shapes = [f"{name}/s{i}" for i in range(leaf.copies)]
        nodes += [helper.make_node("Shape", [y], [shape]) for y, shape in zip(results, shapes, strict=True)]
        return graph(name, [*nodes, helper.make_node("Concat", shapes, [f"{name}/out"], axis=0)], weights)

    whole = branch(0, 2 * len(leaves))
    data = {x: shape for leaf in leaves for i in range(leaf.copies) for x, shape in leaf.data(i).items()}
    whole.input.append(helper.make_tensor_value_info("which", TensorProto.INT64, []))
    # with free rows no shape is known before the run, and no product is left out for it
    whole.input.extend(helper.make_tensor_value_info(x, element, [None, width]) for x, (_, width) in data.items())
    proto = helper.make_model(whole, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return from_proto(proto), {x: array(*shape) for x, shape in data.items()}


def _groups(leaves: Sequence[_Leaf]) -> Iterator[list[_Leaf]]:
    """The leaves, as many together as one model may hold."""
    group: list[_Leaf] = []
    for leaf in leaves:
        if group and sum(other.weight_bytes for other in group) + leaf.weight_bytes > _MODEL_BYTES:
            yield group
            group = []
        group.append(leaf)
    if group:
        yield group


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

"""What can be decided about a weight, and on what terms: the words in which groups make their offers.

A `Part` is a weight that takes part, a `Cut` says how it is kept, and a `Choice` is a cut for every weight of a group,
with what it costs and what it is predicted to do. A choice stores nothing until it is asked to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from onnxlr.factors import evened
from onnxlr.forms import Stored
from onnxlr.layer import Unread
from onnxlr.recent import decomposed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from onnxlr.config import Config
    from onnxlr.costs import Costs
    from onnxlr.factors import Decomposition, Factors
    from onnxlr.forms import Products, Side
    from onnxlr.layer import Layer
    from onnxlr.recent import Recent
    from onnxlr.sites import Weight

    Index = NDArray[np.intp]
    Block = tuple[str, int | None, int]
    Keep = Callable[[Stored], Stored]
    """Puts what is stored where there is room for it."""

BLOCK_GAIN = 0.06
"""The share of a pair's parameters that a block has to save to be offered: its Concat or Split costs time."""
ANY_RANK = 0
"""In place of a rank: no block of the weight is offered."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How one weight is kept.

    `rank` is None for dense, `width` the number of hidden units left where it was narrowed, `shared` whether its first
    factor also serves others.
    """

    form: Literal["dense", "pair", "block", "separable"] = "dense"
    rank: int | None = None
    width: int | None = None
    shared: bool = False

    def __str__(self) -> str:
        return (
            self.form
            + (" with a shared first factor" if self.shared else "")
            + (f" of {self.width} hidden units" if self.width is not None else "")
        )


def width_key(consumer: str) -> str:
    """Under which the importance of dropping hidden units is kept, those that the weight `consumer` reads."""
    return f"{consumer}:width"


def separable_key(weight: str) -> str:
    """Under which the importance of splitting the kernel of `weight` is kept."""
    return f"{weight}:separable"


class BadlyConditionedError(Exception):
    """Blocks of these weights would amplify rounding too much."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self.blocks = frozenset(blocks)
        super().__init__(", ".join(f"{name} at rank {rank}" for name, _, rank in sorted(self.blocks, key=str)))


@dataclass(frozen=True, slots=True)
class Choice:
    """A form for every weight of a group.

    Attributes
    ----------
    cuts
        By weight.
    damages
        By weight: the squared relative error of the model's outputs that is predicted for it.
    store
        Makes the arrays of the weights that are not left as they are. Its argument says whether they are final: until
        then pairs are not balanced, and no blocks made of them, which leaves the products the same. Raises
        `BadlyConditionedError`.
    cost
        Of the whole model, where a planner chose.
    """

    cuts: Mapping[str, Cut]
    damages: Mapping[str, float]
    store: Callable[[bool], dict[str, Stored]]
    cost: float = 0.0

    @classmethod
    def of(cls, choices: Sequence[Choice], keep: Keep = lambda stored: stored) -> Choice:
        """Several choices as one; what is stored goes through `keep`, one choice after the other."""
        return cls(
            {name: cut for choice in choices for name, cut in choice.cuts.items()},
            {name: damage for choice in choices for name, damage in choice.damages.items()},
            lambda final: _store(choices, final, keep),
        )


def _store(choices: Sequence[Choice], final: bool, keep: Keep) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    refused: set[Block] = set()
    for choice in choices:
        try:
            stored |= {name: keep(arrays) for name, arrays in choice.store(final).items()}
        except BadlyConditionedError as refusal:
            refused |= refusal.blocks
    if refused:
        raise BadlyConditionedError(refused)
    return stored


@dataclass(frozen=True)
class Narrowing:
    """What is left of a weight whose hidden units were dropped.

    `inputs` or `outputs` are the features kept, `width` their number. `bias` gives the correction that this alone
    makes, `matrix` the weight that is left, where that takes less than its layer. `foreseen` is what a cut on top of it
    loses at every rank, where that is known.
    """

    width: int
    inputs: Index | None = None
    outputs: Index | None = None
    bias: Callable[[], NDArray[np.float64]] | None = None
    matrix: Callable[[], NDArray[np.float64]] | None = None
    foreseen: NDArray[np.float64] | None = None

    def put(self, stored: Stored) -> Stored:
        """`stored`, known to be narrowed, its bias added to."""
        bias = stored.bias if self.bias is None else self.bias() + (0.0 if stored.bias is None else stored.bias)
        return replace(stored, inputs=self.inputs, outputs=self.outputs, bias=bias)


def cut(decomposition: Decomposition, rank: int, *, final: bool) -> Factors:
    """Balanced factors; of those that are only tried the lengths are even."""
    return decomposition.cut(rank) if final else evened(decomposition.unbalanced(rank))


@dataclass(frozen=True)
class Part:
    """A weight that takes part, ready to be cut.

    Attributes
    ----------
    weight, source
        What it is, and how its objective sees it.
    fixed
        The rank that is demanded, if any.
    rows, dim
        Rows that made up its moments, and their width; None without data.
    note
        Goes before the reason for its form in the report.
    narrowing
        Set where it stands for less than the whole weight.
    memory
        Where its decomposition is kept as long as there is room; None: always.
    split
        Prepares the split of a convolution between the rows and the columns of its kernel (`onnxlr.separable`); None
        where that is not on offer.
    """

    weight: Weight
    source: Layer | Unread
    fixed: int | None = None
    rows: int | None = None
    dim: int = 0
    note: str = ""
    narrowing: Narrowing | None = None
    memory: Recent[Decomposition] | None = None
    split: Callable[[], Decomposition] | None = None

    @property
    def layer(self) -> Layer:
        """How its objective sees it; where that is not in memory it is read."""
        return self.source.read() if isinstance(self.source, Unread) else self.source

    @property
    def d_in(self) -> int:
        """Width of the input that is left."""
        return self.source.d_in

    @property
    def d_out(self) -> int:
        """Width of the output that is left."""
        return self.source.d_out

    @property
    def name(self) -> str:
        """That of its weight."""
        return self.weight.name

    def block(self, rank: int, *, shared: bool = False) -> Block:
        """What tells its block of this rank from others; one that is shared goes by the first weight that has it."""
        return f"{self.name}{' and others' if shared else ''}", self.width, rank

    @property
    def width(self) -> int | None:
        """The hidden units left, where it was narrowed."""
        return None if self.narrowing is None else self.narrowing.width

    @cached_property
    def decomposition(self) -> Decomposition:
        """Made when it is needed first; of what is narrowed only the damages are, until it is chosen."""
        foresee = None if self.narrowing is None else self._foresee
        return decomposed(lambda: self.layer.decompose(), self.memory, foresee)

    def _foresee(self) -> NDArray[np.float64]:
        assert self.narrowing is not None
        return self.layer.foresee() if self.narrowing.foreseen is None else self.narrowing.foreseen

    def decompose(self) -> None:
        """Make what its damages take now rather than when they are asked for."""
        self.decomposition.damage(0)
        if self.split is not None:
            self.separation.damage(0)

    def pair(self, rank: int, *, final: bool = True) -> Stored:
        """Its two factors; unless they are `final` only their product counts, and it is had for less."""
        return self.put(cut(self.decomposition, rank, final=final))

    @cached_property
    def separation(self) -> Decomposition:
        """Made when it is needed first; only where there is a `split`."""
        assert self.split is not None
        return decomposed(self.split, self.memory)

    def separable(self, rank: int) -> Stored:
        """Its kernel as a column and a row."""
        return Stored.separable(self.separation.cut(rank), self.weight.taps)

    def put(self, factors: Factors) -> Stored:
        """Factors of its layer as what is stored."""
        stored = Stored.pair(factors if self.weight.corrected else replace(factors, bias=None))
        return stored if self.narrowing is None else self.narrowing.put(stored)

    def dense(self) -> dict[str, Stored]:
        """What is stored where no rank is cut: nothing new for the whole weight."""
        narrowing = self.narrowing
        if narrowing is None:
            return {}
        matrix = self.layer.matrix if narrowing.matrix is None else narrowing.matrix()
        return {self.name: narrowing.put(Stored(None, matrix, None))}


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms groups make their offers.

    `importance` is the squared error of the model's outputs for a unit of a weight's damage; `no_blocks` are those that
    proved badly conditioned.
    """

    config: Config
    costs: Costs
    importance: Mapping[str, float]
    no_blocks: frozenset[Block] = frozenset()

    def refuses(self, block: Block) -> bool:
        """Whether a block proved badly conditioned."""
        name, width, _ = block
        return block in self.no_blocks or (name, width, ANY_RANK) in self.no_blocks

    def damage(self, key: str, damage: float) -> float:
        """The damage of a weight, or of what `width_key` or `separable_key` stands for, in squared relative error."""
        # whatever its importance: an infinite one has no product with 0
        return self.importance.get(key, 0.0) * damage if damage else 0.0

    def price(self, part: Part, products: Products, *, moved: int = 0, corrected: bool | None = None) -> float:
        """The cost of `part` stored as `products`."""
        corrects = self.config.corrects_bias if corrected is None else corrected
        return self.costs.form(part.weight, products, moved=moved, corrected=corrects)


def best_side(weight: Weight, d_in: int, d_out: int) -> Side | None:
    """The side of a block: the narrower one, where less has to be moved, if it can be had there."""
    sides: tuple[Side, Side] = ("output", "input") if d_out <= d_in else ("input", "output")
    return next((side for side in sides if side in weight.block_sides), None)


def worth_a_block(rank: int, d_in: int, d_out: int, config: Config) -> bool:
    pair = rank * (d_in + d_out)
    return pair - rank**2 <= config.margin * d_in * d_out and rank**2 >= BLOCK_GAIN * pair


def ranks(config: Config, full: int) -> range:
    """The ranks on offer below full rank: multiples of what the hardware likes, from the floor on."""
    least = max(1, math.ceil(config.floor * full / config.rank_multiple))
    return range(least * config.rank_multiple, full, config.rank_multiple)


def pair_ranks(d_in: int, d_out: int, config: Config) -> list[int]:
    """The ranks at which a pair saves enough to be offered."""
    most = config.margin * d_in * d_out
    return [rank for rank in ranks(config, min(d_in, d_out)) if rank * (d_in + d_out) <= most]


def separable_ranks(weight: Weight, config: Config) -> list[int]:
    """The ranks at which a split of its kernel saves enough to be offered; none where it cannot be split."""
    if weight.taps == 1 or "separable" not in config.forms:
        return []
    return pair_ranks(weight.d_in // weight.taps, weight.taps * weight.d_out, config)


def block_ranks(d_in: int, d_out: int, config: Config) -> list[int]:
    """The ranks at which a block saves enough to be offered, of the dense weight and of the pair."""
    return [rank for rank in ranks(config, min(d_in, d_out)) if worth_a_block(rank, d_in, d_out, config)]

"""Weights that are decided on together, and the forms that each group offers.

    Single    one weight: dense, a pair, a block, or a separable kernel
    Shared    weights that read one tensor: each on its own, or all with one first factor
    Chained   weights that make hidden units and the one that reads them: as they are, or with fewer units, and on top
              of that whatever the narrowed weights offer
    Several   weights side by side that share nothing

A group's options are choices with a cost and a predicted damage: the squared relative error of the model's outputs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from onnxlr.choice import (
    BadlyConditionedError,
    Choice,
    Cut,
    Narrowing,
    Part,
    best_side,
    block_ranks,
    cut,
    pair_ranks,
    ranks,
    separable_key,
    separable_ranks,
    width_key,
    worth_a_block,
)
from onnxlr.factorize import Factors
from onnxlr.forms import (
    MAX_CONDITION,
    Stored,
    as_block,
    as_shared_block,
    best_window,
    block_products,
    holds,
    pair_products,
    separable_products,
)
from onnxlr.layer import Unread, stacked
from onnxlr.order import blocks_among_units
from onnxlr.plan import Option, joined
from onnxlr.recent import decomposed
from onnxlr.width import Elimination, narrower, stand_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnxlr.choice import Terms
    from onnxlr.config import Config
    from onnxlr.factorize import Decomposition
    from onnxlr.forms import Index, Side
    from onnxlr.layer import Layer
    from onnxlr.sites import Inventory

NARROWED = (0.75, 0.5, 0.25)
"""The shares of a chain's hidden units at which the narrowed weights are offered as pairs and blocks as well."""
LEAST_SCALE = 1e-6
"""The least importance of a weight in a shared first factor, relative to the largest: it cannot be 0."""


class Group(Protocol):
    """Weights that are decided on together."""

    @property
    def parts(self) -> Sequence[Part]:
        """All its weights."""

    def options(self, terms: Terms) -> list[Option[Choice]]:
        """What it offers, dense or what the user demands at least."""


class Single:
    """One weight."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.parts = (part,)

    def options(self, terms: Terms) -> list[Option[Choice]]:
        part = self.part
        if part.fixed is not None:
            return [self._pair(part.fixed, terms)]
        return [self._dense(terms), *self._pairs(terms), *self._blocks(terms), *self._separable(terms)]

    def _dense(self, terms: Terms) -> Option[Choice]:
        part, narrowing = self.part, self.part.narrowing
        if narrowing is None:
            return Option(Choice({part.name: Cut()}, {part.name: 0.0}, lambda _: {}), terms.costs.dense(part.weight), 0)
        cost = terms.price(part, ((part.d_in, part.d_out),), corrected=narrowing.bias is not None)
        cut = Cut(width=narrowing.width)
        return Option(Choice({part.name: cut}, {part.name: 0.0}, lambda _: part.dense()), cost, 0.0)

    def _pairs(self, terms: Terms) -> Iterator[Option[Choice]]:
        d_in, d_out = self.part.d_in, self.part.d_out
        if "pair" not in terms.config.forms:
            return
        for rank in pair_ranks(d_in, d_out, terms.config):
            yield self._pair(rank, terms)

    def _pair(self, rank: int, terms: Terms) -> Option[Choice]:
        part = self.part
        cost = terms.price(part, pair_products(part.d_in, part.d_out, rank))
        damage = terms.damage(part.name, part.decomposition.damage(rank))
        how = Cut("pair", rank, part.width)
        return Option(
            Choice({part.name: how}, {part.name: damage}, lambda final: {part.name: part.pair(rank, final=final)}),
            cost,
            damage,
        )

    def _blocks(self, terms: Terms) -> Iterator[Option[Choice]]:
        part, d_in, d_out = self.part, self.part.d_in, self.part.d_out
        side = best_side(part.weight, d_in, d_out)
        if "block" not in terms.config.forms or side is None:
            return
        for rank in block_ranks(d_in, d_out, terms.config):
            if terms.refuses(part.block(rank)):
                continue
            damage = terms.damage(part.name, part.decomposition.damage(rank))
            cut = Cut("block", rank, part.width)
            choice = Choice({part.name: cut}, {part.name: damage}, self._storing(rank, side))
            products, moved = block_products(d_in, d_out, rank, side), d_in if side == "input" else d_out
            yield Option(choice, terms.price(part, products, moved=moved), damage)

    def _separable(self, terms: Terms) -> Iterator[Option[Choice]]:
        part = self.part
        if part.split is None:
            return
        strips = replace(part, weight=part.weight.in_strips)
        for rank in separable_ranks(part.weight, terms.config):
            damage = terms.damage(separable_key(part.name), part.separation.damage(rank))
            products = separable_products(part.d_in, part.d_out, rank, part.weight.taps)
            cut, store = Cut("separable", rank), partial(_store_separable, part, rank)
            choice = Choice({part.name: cut}, {part.name: damage}, store)
            yield Option(choice, terms.price(strips, products), damage)

    def _storing(self, rank: int, side: Side) -> Callable[[bool], dict[str, Stored]]:
        part = self.part

        def store(final: bool) -> dict[str, Stored]:
            pair = part.pair(rank, final=final)
            if not final:
                return {part.name: pair}
            assert pair.first is not None
            window = best_window(pair.first if side == "input" else pair.second, side)
            dtype = part.weight.dtype
            if window.condition > MAX_CONDITION[dtype] or not holds(dtype, block := as_block(pair, window)):
                raise BadlyConditionedError([part.block(rank)])
            return {part.name: block}

        return store


class Shared:
    """Weights that read one tensor; what they have in common is decomposed by their importances."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._stacked: tuple[tuple[float, ...], Decomposition] | None = None

    def options(self, terms: Terms) -> list[Option[Choice]]:
        apart = _side_by_side(self.parts, terms)
        importances = [terms.importance.get(part.name, 0.0) for part in self.parts]
        most = max(importances)
        if not 0 < most < np.inf or not terms.config.forms & {"pair", "block"}:
            return apart
        # to so many digits, so that importances which one factor multiplied find what was made before
        scales = tuple(max(round(importance / most, 12), LEAST_SCALE) for importance in importances)
        return [*apart, *self._together(self._decomposed(scales), most, terms)]

    def _decomposed(self, scales: tuple[float, ...]) -> Decomposition:
        if self._stacked is None or self._stacked[0] != scales:

            def together() -> Layer:
                return stacked([part.layer for part in self.parts], scales)

            made = decomposed(lambda: together().decompose(), self.parts[0].memory, lambda: together().foresee())
            self._stacked = scales, made
        return self._stacked[1]

    def _together(self, decomposition: Decomposition, scale: float, terms: Terms) -> Iterator[Option[Choice]]:
        d_in, widths = self.parts[0].d_in, [part.d_out for part in self.parts]
        blocks = all("input" in part.weight.block_sides for part in self.parts)
        for rank in ranks(terms.config, min(d_in, sum(widths))):
            damage = scale * decomposition.damage(rank)
            # the least gain in error is spread over the weights by their share of the parameters
            damages = {p.name: damage * width / sum(widths) for p, width in zip(self.parts, widths, strict=True)}
            seconds = sum(terms.price(part, ((rank, width),)) for part, width in zip(self.parts, widths, strict=True))
            pair, block = ((d_in, rank),), ((d_in - rank, rank),)
            if "pair" in terms.config.forms and rank * (d_in + sum(widths)) <= terms.config.margin * d_in * sum(widths):
                cost = seconds + terms.price(self.parts[0], pair, corrected=False)
                yield Option(self._choice(rank, "pair", damages, decomposition), cost, damage)
            worth = "block" in terms.config.forms and worth_a_block(rank, d_in, sum(widths), terms.config)
            if blocks and worth and not terms.refuses(self.parts[0].block(rank, shared=True)):
                cost = seconds + terms.price(self.parts[0], block, moved=d_in, corrected=False)
                yield Option(self._choice(rank, "block", damages, decomposition), cost, damage)

    def _choice(
        self, rank: int, form: Literal["pair", "block"], damages: Mapping[str, float], decomposition: Decomposition
    ) -> Choice:
        def store(final: bool) -> dict[str, Stored]:
            factors = cut(decomposition, rank, final=final)
            pairs = self._split(factors)
            if final and form == "block":
                window, dtype = best_window(factors.first, "input"), self.parts[0].weight.dtype
                if window.condition <= MAX_CONDITION[dtype]:
                    pairs = as_shared_block(pairs, window)
                if not all(pair.window and holds(dtype, pair) for pair in pairs):
                    raise BadlyConditionedError([self.parts[0].block(rank, shared=True)])
            return {part.name: pair for part, pair in zip(self.parts, pairs, strict=True)}

        cuts = {part.name: Cut(form, rank, part.width, shared=True) for part in self.parts}
        return Choice(cuts, damages, store)

    def _split(self, factors: Factors) -> list[Stored]:
        name = "+".join(part.name for part in self.parts)
        pairs, start = [], 0
        for part in self.parts:
            own = slice(start, start + part.d_out)
            bias = None if factors.bias is None else factors.bias[own]
            pairs.append(replace(part.put(Factors(factors.first, factors.second[:, own], bias)), shared=name))
            start = own.stop
        return pairs


class Chained:
    """Weights that make hidden units, and the one that reads them."""

    def __init__(self, producers: Sequence[Part], consumer: Part, config: Config) -> None:
        self._producers, self.consumer, self._config = tuple(producers), consumer, config
        self.parts = (*self._producers, consumer)

    @cached_property
    def elimination(self) -> Elimination:
        """The order in which hidden units go."""
        layer = self.consumer.layer
        root = None if layer.gain is None else layer.gain.root
        return Elimination(layer.matrix, layer.moments, root, self._config.rank_multiple, self._cut_too)

    @property
    def widths(self) -> list[int]:
        """The numbers of hidden units on offer, rising."""
        least = self._config.floor * self.consumer.d_in
        return [width for width in narrower(self.consumer.d_in, self._config.rank_multiple) if width >= least]

    @property
    def _cut_too(self) -> set[int]:
        """Those at which the narrowed weights are cut as well."""
        full, offered = self.consumer.d_in, self.widths
        return {min(offered, key=lambda width: abs(width - share * full)) for share in NARROWED} if offered else set()

    @cached_property
    def _whole(self) -> tuple[Group, Group]:
        return self._groups(self._producers, self.consumer)

    @cached_property
    def _narrowed(self) -> dict[int, tuple[Group, Group]]:
        return {width: self._narrow(width) for width in self._cut_too}

    def _groups(self, producers: Sequence[Part], consumer: Part) -> tuple[Group, Group]:
        sharing = len(producers) > 1 and "shared" in self._config.forms and _read_one_tensor(producers)
        first = Shared(producers) if sharing else Several(producers)
        return first, Single(consumer)

    def _narrow(self, width: int) -> tuple[Group, Group]:
        kept = self.elimination.kept(width)
        producers = [
            replace(
                part,
                source=Unread(part.d_in, width, partial(_narrowed_outputs, part, kept)),
                narrowing=Narrowing(width, outputs=kept),
            )
            for part in self._producers
        ]
        rest = _Rest(self.consumer, kept)
        consumer = replace(
            self.consumer,
            source=Unread(width, self.consumer.d_out, rest.layer),
            narrowing=Narrowing(
                width,
                inputs=kept,
                bias=rest.bias if self._config.corrects_bias and self.elimination.has_mean else None,
                foreseen=self.elimination.foreseen(width) if width in self._cut_too else None,
            ),
        )
        return self._groups(producers, consumer)

    def options(self, terms: Terms) -> list[Option[Choice]]:
        found = [self._chosen(option, 0.0) for option in _joined_options(self._whole, terms)]
        for width in self.widths:
            lost = terms.damage(width_key(self.consumer.name), self.elimination.damage(width))
            if width in self._narrowed:
                found += [self._chosen(option, lost) for option in _joined_options(self._narrowed[width], terms)]
            else:
                found.append(self._dense_option(width, lost, terms))
        return found

    def _chosen(self, option: Option[tuple[Choice, ...]], lost: float) -> Option[Choice]:
        name = self.consumer.name

        def choose(choices: tuple[Choice, ...]) -> Choice:
            choice = Choice.of(choices)
            damages = {**choice.damages, name: choice.damages[name] + lost}
            return replace(choice, damages=damages, store=lambda final: self._store(choice, final))

        return option.revised(choose, lost)

    def _store(self, choice: Choice, final: bool) -> dict[str, Stored]:
        """As chosen; blocks without a well conditioned window of their own have it among the hidden units."""
        try:
            return choice.store(final)
        except BadlyConditionedError:
            blocks = [part for part in self.parts if choice.cuts[part.name].form == "block"]
            sides: dict[str, Side] = dict.fromkeys((part.name for part in self._producers), "output")
            sides[self.consumer.name] = "input"
            cuts = [choice.cuts[part.name] for part in blocks]
            units = cuts[0].width or self.consumer.d_in
            if (
                len(blocks) > 2
                or sum(cut.rank or 0 for cut in cuts) > units
                or any(cut.shared for cut in cuts)
                or any(sides[part.name] not in part.weight.block_sides for part in blocks)
            ):
                raise
        stored = {part.name: Stored(None, part.layer.matrix, None) for part in self.parts}
        stored |= {name: pair.balanced() for name, pair in choice.store(False).items()}
        result = blocks_among_units(stored, sides, [part.name for part in blocks], units)
        bad = [
            (part.name, cut.width, cut.rank or 0)
            for part, cut in zip(blocks, cuts, strict=True)
            if not holds(part.weight.dtype, result[part.name])
        ]
        if bad:
            raise BadlyConditionedError(bad)
        return result

    def _dense_option(self, width: int, lost: float, terms: Terms) -> Option[Choice]:
        cost = terms.price(self.consumer, ((width, self.consumer.d_out),), corrected=self._config.corrects_bias) + sum(
            terms.price(part, ((part.d_in, width),), corrected=False) for part in self._producers
        )

        def store(final: bool) -> dict[str, Stored]:
            return self.store_narrowed(width)

        cuts = {part.name: Cut(width=width) for part in self.parts}
        damages = {part.name: lost if part is self.consumer else 0.0 for part in self.parts}
        return Option(Choice(cuts, damages, store), cost, lost)

    def store_narrowed(self, width: int) -> dict[str, Stored]:
        """All its weights, dense but for the hidden units that are gone."""
        parts = [part for members in self._narrow(width) for part in members.parts]
        return {name: stored for part in parts for name, stored in part.dense().items()}


class Several:
    """Weights side by side that have nothing to share."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    def options(self, terms: Terms) -> list[Option[Choice]]:
        return _side_by_side(self.parts, terms)


def _store_separable(part: Part, rank: int, _final: bool) -> dict[str, Stored]:
    return {part.name: part.separable(rank)}


def _narrowed_outputs(part: Part, kept: Index) -> Layer:
    return part.layer.narrowed_outputs(kept)


class _Rest:
    """A weight with some of its inputs only, made anew whenever it is looked at; what stays is its bias."""

    def __init__(self, part: Part, kept: Index) -> None:
        self._part, self._kept = part, kept
        self._bias: NDArray[np.float64] | None = None

    def layer(self) -> Layer:
        whole = self._part.layer
        matrix, self._bias = stand_in(whole.matrix, whole.moments, self._kept)
        return whole.narrowed_inputs(self._kept, matrix)

    def bias(self) -> NDArray[np.float64]:
        """What corrects the bias."""
        if self._bias is None:
            self.layer()
        assert self._bias is not None
        return self._bias


def _side_by_side(parts: Sequence[Part], terms: Terms) -> list[Option[Choice]]:
    return [option.revised(Choice.of) for option in joined([Single(part).options(terms) for part in parts])]


def _joined_options(groups: Sequence[Group], terms: Terms) -> list[Option[tuple[Choice, ...]]]:
    return joined([group.options(terms) for group in groups])


def _read_one_tensor(parts: Sequence[Part]) -> bool:
    return len({(part.weight.sites[0].input, part.weight.sites[0].input_axis) for part in parts}) == 1


def group(parts: Sequence[Part], inventory: Inventory, config: Config) -> list[Group]:
    """All parts, each in one group; those with a rank that is demanded stay alone."""
    free = {part.name: part for part in parts if part.fixed is None}
    groups: list[Group] = []
    for chain in inventory.chains if "width" in config.forms else ():
        members = [free[name] for name in (*chain.producers, chain.consumer) if name in free]
        if len(members) == len(chain.producers) + 1:
            groups.append(Chained(members[:-1], members[-1], config))
            for part in members:
                del free[part.name]
    for names in inventory.shared if "shared" in config.forms else ():
        members = [free.pop(name) for name in names if name in free]
        if members:
            groups.append(Shared(members) if len(members) > 1 else Single(members[0]))
    rest = [*free.values(), *(part for part in parts if part.fixed is not None)]
    return [*groups, *map(Single, rest)]

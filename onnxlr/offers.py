"""What one weight offers, and what weights side by side do: forms with a cost and a predicted damage.

    Single    one weight: dense, a pair, a block, or a separable kernel
    Shared    weights that read one tensor: each on its own, or all with one first factor
    Several   weights side by side that share nothing

Options are choices; the damage is the squared relative error of the model's outputs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from onnxlr.choice import (
    BadlyConditionedError,
    Choice,
    Cut,
    Part,
    best_side,
    block_ranks,
    cut,
    pair_ranks,
    ranks,
    separable_key,
    separable_ranks,
    worth_a_block,
)
from onnxlr.factors import Factors
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
from onnxlr.layer import stacked
from onnxlr.plan import Option, joined
from onnxlr.recent import decomposed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from onnxlr.choice import Terms
    from onnxlr.factors import Decomposition
    from onnxlr.forms import Side
    from onnxlr.layer import Layer

LEAST_SCALE = 1e-6
"""The least importance of a weight in a shared first factor, relative to the largest: it cannot be 0."""


class Group(Protocol):
    """Weights that are decided on together."""

    @property
    def parts(self) -> Sequence[Part]:
        """All its weights."""

    def decompose(self) -> None:
        """Decompose what its offers need on whatever terms, which would else be done when they are asked for."""

    def options(self, terms: Terms) -> list[Option[Choice]]:
        """What it offers, dense or what the user demands at least."""


class Single:
    """One weight."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.parts = (part,)

    def decompose(self) -> None:
        self.part.decompose()

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

    def decompose(self) -> None:
        for part in self.parts:
            part.decompose()

    def options(self, terms: Terms) -> list[Option[Choice]]:
        apart = side_by_side(self.parts, terms)
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


class Several:
    """Weights side by side that have nothing to share."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    def decompose(self) -> None:
        for part in self.parts:
            part.decompose()

    def options(self, terms: Terms) -> list[Option[Choice]]:
        return side_by_side(self.parts, terms)


def _store_separable(part: Part, rank: int, _final: bool) -> dict[str, Stored]:
    return {part.name: part.separable(rank)}


def side_by_side(parts: Sequence[Part], terms: Terms) -> list[Option[Choice]]:
    return [option.revised(Choice.of) for option in joined([Single(part).options(terms) for part in parts])]

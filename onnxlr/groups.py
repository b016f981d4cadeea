"""Weights that are decided on together: on their own, by the tensor that they read, or as a chain (`onnxlr.offers`).

A chain are the weights that make hidden units and the one that reads them: as they are, or with fewer units, and on top
of that whatever the narrowed weights offer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from onnxlr.choice import BadlyConditionedError, Choice, Cut, Narrowing, Part, width_key
from onnxlr.forms import Stored, holds
from onnxlr.layer import Unread
from onnxlr.offers import Group, Several, Shared, Single
from onnxlr.order import blocks_among_units
from onnxlr.plan import Option, joined
from onnxlr.threads import AT_ONCE, sharing_out
from onnxlr.width import Elimination, narrower, stand_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from onnxlr.choice import Terms
    from onnxlr.config import Config
    from onnxlr.forms import Index, Side
    from onnxlr.layer import Layer
    from onnxlr.sites import Inventory

    Matrix = NDArray[np.float64]

NARROWED = (0.75, 0.5, 0.25)
"""The shares of a chain's hidden units at which the narrowed weights are offered as pairs and blocks as well."""


class Chained:
    """Weights that make hidden units, and the one that reads them."""

    def __init__(self, producers: Sequence[Part], consumer: Part, config: Config) -> None:
        self._producers, self.consumer, self._config = tuple(producers), consumer, config
        self.parts = (*self._producers, consumer)
        self._stood_in: tuple[int, tuple[Matrix, Matrix]] | None = None

    @cached_property
    def elimination(self) -> Elimination:
        """The order in which hidden units go."""
        layer = self.consumer.layer
        root = None if layer.gain is None else layer.gain.root
        return Elimination(layer.matrix, layer.moments, root, self._config.rank_multiple, self._cut_too)

    def decompose(self) -> None:
        for members in (self._whole, *self._narrowed.values()):
            for group in members:
                group.decompose()

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
        consumer = replace(
            self.consumer,
            source=Unread(width, self.consumer.d_out, lambda: self._rest(width)),
            narrowing=Narrowing(
                width,
                inputs=kept,
                bias=(lambda: self._stand_in(width)[1]) if self._corrects else None,
                matrix=lambda: self._stand_in(width)[0],
                foreseen=self.elimination.foreseen(width) if width in self._cut_too else None,
            ),
        )
        return self._groups(producers, consumer)

    @property
    def _corrects(self) -> bool:
        return self._config.corrects_bias and self.elimination.has_mean

    def _rest(self, width: int) -> Layer:
        matrix, _ = self._stand_in(width)
        return self.consumer.layer.narrowed_inputs(self.elimination.kept(width), matrix)

    def _stand_in(self, width: int) -> tuple[Matrix, Matrix]:
        """The consumer's weight for `width` units, and what corrects its bias; the last are kept, where there is room.

        A plan that is tried, tried again and stored asks for the same ones.
        """
        if self._stood_in is not None and self._stood_in[0] == width:
            return self._stood_in[1]
        layer = self.consumer.layer
        found = stand_in(layer.matrix, layer.moments, self.elimination.kept(width))
        self._stood_in = None if self.consumer.memory is not None else (width, found)
        return found

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


def _narrowed_outputs(part: Part, kept: Index) -> Layer:
    return part.layer.narrowed_outputs(kept)


def _joined_options(groups: Sequence[Group], terms: Terms) -> list[Option[tuple[Choice, ...]]]:
    return joined([group.options(terms) for group in groups])


def _read_one_tensor(parts: Sequence[Part]) -> bool:
    return len({(part.weight.sites[0].input, part.weight.sites[0].input_axis) for part in parts}) == 1


def decompose(groups: Sequence[Group], config: Config, progress: Callable[[int], None]) -> None:
    """Decompose the weights of several groups at once, each in a thread; not where memory is scarce.

    `progress` is called with the number of weights after each group.
    """
    if config.memory is not None:
        return
    with sharing_out(config.threads, most=AT_ONCE) as pool:
        for members, _ in zip(groups, pool.map(lambda members: members.decompose(), groups), strict=True):
            progress(len(members.parts))


def group(parts: Sequence[Part], inventory: Inventory, config: Config) -> list[Group]:
    """All parts, each in one group, in their order; those with a rank that is demanded stay alone."""
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
    groups += map(Single, (*free.values(), *(part for part in parts if part.fixed is not None)))
    place = {part.name: number for number, part in enumerate(parts)}
    return sorted(groups, key=lambda members: min(place[part.name] for part in members.parts))

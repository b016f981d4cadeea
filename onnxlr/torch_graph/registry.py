"""Which function computes an operator: by domain, name and the opset version from which it holds.

An implementation takes the node's inputs as positional arguments (None where one is left out) and its attributes as
keyword arguments under their ONNX names; it returns a tensor or a tuple of them. So its signature says which
attributes it knows, and a node with any other attribute is refused before anything runs. Three keyword names that no
ONNX attribute has are filled in by the executor: `n_outputs` (outputs the node lists), `opset` (version in force) and
`runner` (for operators with bodies: what calls them).

Of the implementations of one operator, the newest not above the model's opset is taken, as in the operator's own
history; the same scheme is found in tinygrad's `nn/onnx.py`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from onnxlr.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

Function = TypeVar("Function", bound=Callable[..., Any])
Refusal = Callable[["Mapping[str, Any]"], "str | None"]

MICROSOFT = "com.microsoft"
FILLED_IN = frozenset({"n_outputs", "opset", "runner"})


@dataclass(frozen=True, slots=True)
class Implementation:
    """One operator from one opset version on.

    Attributes
    ----------
    function
        What computes it.
    since
        The first opset version it holds for.
    host
        Positions of inputs that are read as numbers (shapes, axes), so they need not lie on the model's device.
    filled
        Which of `FILLED_IN` it takes.
    attributes
        The attributes it knows; None where it takes any.
    refuse
        From a node's attributes to a reason why they are not supported, or None.
    """

    function: Callable[..., Any]
    since: int
    host: frozenset[int]
    filled: frozenset[str]
    attributes: frozenset[str] | None
    refuse: Refusal | None

    def refusal(self, attributes: Mapping[str, Any]) -> str | None:
        """Why a node with these attributes cannot be computed; None where it can."""
        if self.attributes is not None and (unknown := attributes.keys() - self.attributes):
            return f"attribute {', '.join(sorted(unknown))}"
        return self.refuse(attributes) if self.refuse else None


@dataclass(frozen=True, slots=True)
class Unsupported:
    """An operator, or a tensor, that torch_graph cannot compute.

    Attributes
    ----------
    op, domain, opset
        The operator, its domain ("" is ONNX's own) and the version of the domain that the model imports.
    count
        How many nodes.
    reason
        What of it is not supported; empty where the operator as such is not.
    """

    op: str
    domain: str
    opset: int
    count: int
    reason: str = ""

    def __str__(self) -> str:
        """Return the form error messages use."""
        name = f"{self.domain}.{self.op}" if self.domain else self.op
        return f"{name} (opset {self.opset}{', ' + self.reason if self.reason else ''}) x {self.count}"


class UnsupportedOperatorsError(ModelError):
    """Operators of a model that torch_graph does not implement: all of them, in `operators`."""

    def __init__(self, where: str, operators: tuple[Unsupported, ...]) -> None:
        self.operators = operators
        super().__init__(
            f"{where} cannot run in torch, which gradients need: not supported are "
            f"{', '.join(map(str, operators))}. Objectives without gradients work"
        )


class RefusedError(Exception):
    """Raised by an implementation that finds, in the values of its inputs, something it does not support."""


class Missing:
    """Collects what is unsupported while a graph is being read."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, int, str]] = Counter()

    def add(self, op: str, domain: str, opset: int, reason: str = "") -> None:
        """Count one more node."""
        self._counts[op, domain, opset, reason] += 1

    def raise_if_any(self, where: str) -> None:
        """Raise `UnsupportedOperatorsError` with the complete list, if there is anything on it."""
        if self._counts:
            found = sorted(self._counts.items(), key=lambda item: (item[0][1], item[0][0], item[0][2:]))
            raise UnsupportedOperatorsError(
                where,
                tuple(Unsupported(op, domain, opset, count, reason) for (op, domain, opset, reason), count in found),
            )


_implementations: dict[tuple[str, str], list[Implementation]] = {}


def operator(
    *names: str,
    since: int = 1,
    domain: str = "",
    host: tuple[int, ...] = (),
    refuse: Refusal | None = None,
) -> Callable[[Function], Function]:
    """Register a function as the implementation of operators `names` of `domain`, from opset version `since` on."""

    def register(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        entry = Implementation(
            function,
            since,
            frozenset(host),
            frozenset(keywords & FILLED_IN),
            None if anything else frozenset(keywords - FILLED_IN),
            refuse,
        )
        for name in names:
            entries = _implementations.setdefault((domain, name), [])
            assert all(other.since != since for other in entries), f"{name} is registered twice"
            entries.append(entry)
            entries.sort(key=lambda other: other.since)
        return function

    return register


def find(domain: str, name: str, opset: int) -> Implementation | None:
    """The newest implementation of an operator that is not above `opset`; None where there is none."""
    found = [entry for entry in _implementations.get((domain, name), ()) if entry.since <= opset]
    return found[-1] if found else None


def supported() -> frozenset[tuple[str, str]]:
    """All (domain, operator) that have an implementation."""
    return frozenset(_implementations)

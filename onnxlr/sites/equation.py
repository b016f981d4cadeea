"""The letters of an Einsum's equation, one for each axis of its operands and of its output.

Spaces mean nothing. Without an arrow the output has the letters that occur once, in alphabetical order. An ellipsis
stands for the axes that the letters beside it leave over; operands are aligned at the last of these.
"""

from __future__ import annotations

from string import ascii_letters
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ELLIPSIS = "..."


def terms(equation: str) -> tuple[tuple[str, ...], str]:
    """The letters of all operands and of the output, ellipses as they are.

    Raises
    ------
    ValueError
        The output is implicit and runtimes do not agree on it: capital letters sort before or after small ones.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = tuple(inputs.split(","))
    if not arrow:
        letters = inputs.replace(ELLIPSIS, "").replace(",", "")
        once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        if len({letter.isupper() for letter in once}) > 1:
            raise ValueError("its implicit output has capital and small letters: write the output out")
        output = (ELLIPSIS if ELLIPSIS in inputs else "") + "".join(once)
    return operands, output


def spelled_out(equation: str, ranks: Sequence[int]) -> tuple[tuple[str, ...], str]:
    """The letters of all operands and of the output, with letters of their own in place of ellipses.

    Parameters
    ----------
    equation
        The attribute of the node.
    ranks
        Of its operands.

    Raises
    ------
    ValueError
        It does not fit operands of these ranks, or is not clear.
    """
    operands, output = terms(equation)
    if len(operands) != len(ranks):
        raise ValueError(f"its equation {equation!r} is of {len(operands)} operands, not of {len(ranks)}")
    left = [rank - len(term.replace(ELLIPSIS, "")) for term, rank in zip(operands, ranks, strict=True)]
    if any(count < 0 or (count and ELLIPSIS not in term) for term, count in zip(operands, left, strict=True)):
        raise ValueError(f"its equation {equation!r} does not fit operands of {', '.join(map(str, ranks))} axes")
    most = max(left)
    free = "".join(letter for letter in ascii_letters if letter not in equation)[:most]
    spelled = tuple(term.replace(ELLIPSIS, free[most - count :]) for term, count in zip(operands, left, strict=True))
    return spelled, output.replace(ELLIPSIS, free)


def free_letter(equation: str) -> str:
    """A letter that an equation does not use."""
    return next(letter for letter in "r" + ascii_letters if letter not in equation)

"""How far a model's outputs are from a reference's, streamed: sums are kept, arrays are not.

For one output, over all values `a` of the reference and `b` of the candidate that count (`n` of them):

    relative_l2 = sqrt(sum (a - b)^2 / sum a^2)        0 for two equal zeros, inf where only the reference is zero
    cosine      = sum a b / sqrt(sum a^2 sum b^2)      1 for two zeros, 0 where only one is zero
    mean_abs    = sum |a - b| / n,   max_abs = max |a - b|

Every value is widened to fp64 before it is subtracted, in blocks, so neither fp16 nor the number of batches matters.
Two outputs that are not floating (labels, masks, text) are compared by the share of equal elements instead.

`top1_agreement`, the share of rows with the same argmax, is given where an output looks like scores: floating, rank 2
with at least 2 columns (`[N, classes]`), or rank 3 and more with at least 1000 (`[N, S, vocabulary]`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from onnxlr.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

BLOCK = 1 << 20
"""Values widened to fp64 at a time: 8 MB an array, whatever the size of an output."""

MIN_VOCABULARY = 1000


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output of two models, over all samples streamed.

    Attributes
    ----------
    name : str
        The output's name.
    relative_l2, max_abs, mean_abs, cosine : float or None
        As in the module's docstring; None where the output is not floating or `count` is 0.
    top1_agreement : float or None
        Share of rows with the same argmax; None where the output does not look like scores.
    agreement : float or None
        Share of equal elements, of outputs that are not floating; else None.
    count : int
        Elements compared.
    """

    name: str
    relative_l2: float | None
    max_abs: float | None
    mean_abs: float | None
    cosine: float | None
    top1_agreement: float | None
    agreement: float | None
    count: int


class CandidateError(DataError):
    """The candidate's outputs are not finite where those of the reference are looked at."""


class OutputComparison:
    """Accumulates one output of a reference and a candidate, batch by batch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._floating: bool | None = None
        self._count = 0
        self._equal = 0
        self._rows = 0
        self._same_top = 0
        self._aa = self._bb = self._ab = self._dd = self._abs = self._max = 0.0

    def update(self, reference: Array, candidate: Array, rows: Array | None = None) -> None:
        """Add one batch.

        Parameters
        ----------
        reference, candidate : array, same shape `[..., features]`
            Any dtypes, either both floating (of any widths) or neither.
        rows : bool array `[prod of the leading dims]`, optional
            Which rows count, as from `token_rows`; the others are not looked at. All of them, when None.

        Raises
        ------
        DataError
            Shapes or kinds differ, `rows` does not fit, or a value that counts is not finite.
        """
        if reference.shape != candidate.shape:
            raise DataError(
                f"output {self.name!r}: the reference gives the shape {list(reference.shape)}, the candidate "
                f"{list(candidate.shape)}: only models with the same outputs can be compared; where the values decide "
                "how many there are (NonZero, NonMaxSuppression), end the graph before that"
            )
        floating = is_floating(reference.dtype)
        if is_floating(candidate.dtype) != floating or self._floating not in (None, floating):
            raise DataError(
                f"output {self.name!r}: the reference gives {reference.dtype}, the candidate {candidate.dtype}: "
                "only floating with floating outputs, or neither, can be compared"
            )
        self._floating = floating
        features = reference.shape[-1] if reference.ndim else 1
        if reference.size == 0:
            return
        a, b = reference.reshape(-1, features), candidate.reshape(-1, features)
        if rows is not None:
            if rows.shape != (len(a),):
                raise DataError(f"output {self.name!r}: {len(a)} rows, but a selection of {list(rows.shape)} of them")
            a, b = a[rows], b[rows]
        if not floating:
            self._count += a.size
            self._equal += int(np.count_nonzero(a == b))
            return
        scores = features >= 2 if reference.ndim == 2 else reference.ndim > 2 and features >= MIN_VOCABULARY
        step = max(1, BLOCK // features)
        for start in range(0, len(a), step):
            self._add(self._widen(a, start, step, "reference"), self._widen(b, start, step, "candidate"), scores)

    def result(self) -> OutputParity:
        """What has been streamed so far."""
        if not self._count or not self._floating:
            agreement = self._equal / self._count if self._count else None
            return OutputParity(self.name, None, None, None, None, None, agreement, self._count)
        norms = math.sqrt(self._aa) * math.sqrt(self._bb)
        cosine = max(-1.0, min(1.0, self._ab / norms)) if norms else float(self._aa == self._bb)
        return OutputParity(
            name=self.name,
            relative_l2=_ratio(math.sqrt(self._dd), math.sqrt(self._aa)),
            max_abs=self._max,
            mean_abs=self._abs / self._count,
            cosine=cosine,
            top1_agreement=self._same_top / self._rows if self._rows else None,
            agreement=None,
            count=self._count,
        )

    def _widen(self, rows: Array, start: int, step: int, whose: str) -> Array:
        block = rows[start : start + step].astype(np.float64)
        bad = block.size - int(np.count_nonzero(np.isfinite(block)))
        if bad:
            raise (CandidateError if whose == "candidate" else DataError)(
                f"output {self.name!r} of the {whose} model holds NaN or infinity ({bad} of {block.size} values "
                "looked at): no error can be measured on it; find the sample, or leave this output out"
            )
        return block

    def _add(self, a: Array, b: Array, scores: bool) -> None:
        self._count += a.size
        if scores:
            self._rows += len(a)
            self._same_top += int(np.count_nonzero(a.argmax(axis=-1) == b.argmax(axis=-1)))
        self._aa += float(np.vdot(a, a))
        self._bb += float(np.vdot(b, b))
        self._ab += float(np.vdot(a, b))
        difference = np.abs(a - b)
        self._dd += float(np.vdot(difference, difference))
        self._abs += float(difference.sum())
        self._max = max(self._max, float(difference.max()))


def relative_error(parities: Iterable[OutputParity], *, floating: bool = False) -> float:
    """The one figure of a model: that of the output which is furthest off, of those that hold values.

    Of a floating output it is `relative_l2`, of another `1 - agreement`. With `floating` only floating ones count where
    there are any: small errors move what others agree in by steps, or not at all.

    Raises
    ------
    DataError
        No output holds a value: nothing was compared, which is no sign of parity.
    """
    counted = [parity for parity in parities if parity.count]
    errors = [parity.relative_l2 for parity in counted if parity.relative_l2 is not None]
    if not (errors and floating):
        errors += [1.0 - parity.agreement for parity in counted if parity.agreement is not None]
    if not errors:
        raise DataError("no output holds a value: there is nothing to compare; check the data and the padding mask")
    return max(errors)


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is floating, those of ml_dtypes (bfloat16, float8) included: numpy takes them for void."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def token_rows(mask: Array, shape: tuple[int, ...]) -> Array | None:
    """Which rows of a tensor belong to real tokens and not to padding.

    Parameters
    ----------
    mask : array `[N, S]`
        Nonzero where a token is real.
    shape : tuple of int
        The tensor's, features last; its leading dims count rows.

    Returns
    -------
    bool array `[prod(shape[:-1])]`, or None
        For leading dims `(N, S, ...)`, `(N, ..., S)` (the first where both fit) and `(N S,)`. None for any other:
        its rows are no tokens, such as those of a pooled output.

    Raises
    ------
    DataError
        The mask is not of rank 2.
    """
    if mask.ndim != 2:
        raise DataError(f"the padding mask has the shape {list(mask.shape)}: expected [samples, tokens]")
    real = mask != 0
    samples, tokens = real.shape
    leading = shape[:-1]
    if len(leading) >= 2 and leading[0] == samples:
        for axis in (1, len(leading) - 1):
            if leading[axis] == tokens:
                spread = [1] * len(leading)
                spread[0], spread[axis] = samples, tokens
                return np.broadcast_to(real.reshape(spread), leading).reshape(-1)
    return real.reshape(-1) if leading == (samples * tokens,) else None


def _ratio(difference: float, reference: float) -> float:
    if not math.isfinite(difference) or not math.isfinite(reference):  # squares beyond float64
        return math.inf
    return difference / reference if reference else (math.inf if difference else 0.0)

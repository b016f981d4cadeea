"""Second moments of the rows of a tensor: accumulate, merge, store.

For rows `x [n, d]` a `Moments` holds `n`, `sum(x) [d]` and the Gram matrix `x^T x [d, d]`, all in float64. From these
three come the mean `mu`, the second moments `C = E[x^T x]` and the covariance `C - mu^T mu`. Sums add: the moments of
shards, processes and machines merge into exactly those of a single pass, up to the rounding of float64.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from scipy.linalg.blas import dger

from onnxlr.errors import StatsError
from onnxlr.files import replacing
from onnxlr.tensor_file import write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

FORMAT = "onnxlr-moments/1"

Size = tuple[int, int]
"""Rows, and their width."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over `count` rows: `total [d]` and `gram [d, d]`, float64."""

    count: int
    total: NDArray[np.float64]
    gram: NDArray[np.float64]

    @classmethod
    def zero(cls, dim: int) -> Moments:
        """The moments of no rows of width `dim`."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, rows: NDArray[Any]) -> Moments:
        """The moments of `rows [n, d]`, any floating dtype."""
        wide = np.asarray(rows, np.float64)
        return cls(len(wide), wide.sum(0), wide.T @ wide)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.gram + other.gram)

    def shifted(self, offset: NDArray[np.float64]) -> Moments:
        """The moments of `x + offset` for the same rows; offset [d]."""
        cross = np.outer(self.total, offset)
        gram = self.gram + cross + cross.T + self.count * np.outer(offset, offset)
        return Moments(self.count, self.total + self.count * offset, gram)

    def mapped(self, matrix: NDArray[np.float64]) -> Moments:
        """The moments of `x M` for the same rows; matrix [d, k]."""
        return Moments(self.count, self.total @ matrix, matrix.T @ self.gram @ matrix)

    def mixed(self, other: Moments, share: float) -> Moments:
        """These moments with a `share` of the rows as in `other`; their number stays."""
        others = share * self.count / max(other.count, 1)
        return Moments(
            self.count,
            (1 - share) * self.total + others * other.total,
            (1 - share) * self.gram + others * other.gram,
        )

    @property
    def uncentred(self) -> Moments:
        """The moments of the same rows and of their negatives, which have no mean: those that no bias can take over."""
        return Moments(self.count, np.zeros(self.dim), self.gram)

    def kept(self, features: NDArray[np.intp]) -> Moments:
        """The moments of the same rows with only `features` of them, in that order."""
        return Moments(self.count, self.total[features], self.gram.take(features, 0).take(features, 1))

    @property
    def dim(self) -> int:
        """The width `d` of the rows."""
        return len(self.total)

    @property
    def mean(self) -> NDArray[np.float64]:
        """`mu = E[x]`, shape [d]."""
        return self.total / max(self.count, 1)

    @property
    def second(self) -> NDArray[np.float64]:
        """`C = E[x^T x]`, shape [d, d]."""
        return self.gram / max(self.count, 1)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """`C - mu^T mu`, shape [d, d]."""
        # its transpose, which it equals, is as BLAS takes it: no second array of its size is made
        result: NDArray[np.float64] = dger(-1.0, self.mean, self.mean, a=self.second.T, overwrite_a=True).T
        return result


class OnDemand(Mapping[str, Moments]):
    """Moments that are made when they are looked at, by `make(key)`, and kept by nobody.

    `sizes` are the number and the width of their rows, by key, which are known without making them.
    """

    def __init__(self, sizes: Mapping[str, Size], make: Callable[[str], Moments]) -> None:
        self.sizes, self._make = sizes, make

    def __getitem__(self, key: str) -> Moments:
        if key not in self.sizes:
            raise KeyError(key)
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        return key in self.sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True, slots=True)
class Stats:
    """All moments gathered for one model.

    Attributes
    ----------
    model
        Fingerprint of the model (sha256).
    data
        Fingerprints of the data, one for each calibrated shard.
    samples
        Samples that were calibrated on, held-out ones left out.
    moments
        By `onnxlr.probes.probe_key`: the name of a tensor and how its rows lie in it; gradients by `gradient_keys`.
    holdout_every
        Every how many samples one was held out and never calibrated on.
    no_gradients
        Why there are no gradients among them, where there would be if they could be had.
    loss
        What the gradients among them are of, as of `Config.loss`; "" for those of the outputs.
    mask
        The input by which padding was left out, as of `Config.mask`; "" where none was.
    """

    model: str
    data: tuple[str, ...]
    samples: int
    holdout_every: int
    moments: Mapping[str, Moments] = field(repr=False)
    no_gradients: str = ""
    loss: str = ""
    mask: str = ""

    @property
    def sizes(self) -> Mapping[str, Size]:
        """How many rows there are of every tensor, and how wide they are."""
        if isinstance(self.moments, OnDemand):
            return self.moments.sizes
        return {key: (value.count, value.dim) for key, value in self.moments.items()}

    def __add__(self, other: Stats) -> Stats:
        if self.model != other.model:
            raise StatsError(f"moments of different models do not add: {self.model[:12]} and {other.model[:12]}")
        if self.moments.keys() != other.moments.keys():
            differing = sorted(self.moments.keys() ^ other.moments.keys())
            raise StatsError(f"moments of different tensors do not add: only one of the files has {differing[0]!r}")
        if twice := set(self.data) & set(other.data):
            raise StatsError(
                f"two of the shards are of the same data (sha256 {min(twice)[:12]}): each counts once, so leave one out"
            )
        if self.loss != other.loss:
            losses = " and ".join(own.loss or "the outputs" for own in (self, other))
            raise StatsError(f"gradients of different losses do not add: those of {losses}")
        if self.mask != other.mask:
            masks = " and ".join(f"--mask {own.mask}" if own.mask else "no --mask" for own in (self, other))
            raise StatsError(f"shards that leave out other padding do not add: those with {masks}")
        if self.holdout_every != other.holdout_every:
            raise StatsError(
                f"shards with different held-out shares do not add: "
                f"one sample of {self.holdout_every} and one of {other.holdout_every}"
            )
        return Stats(
            self.model,
            self.data + other.data,
            self.samples + other.samples,
            self.holdout_every,
            OnDemand(
                {key: (rows + other.sizes[key][0], dim) for key, (rows, dim) in self.sizes.items()},
                lambda key: self.moments[key] + other.moments[key],
            ),
            self.no_gradients or other.no_gradients,
            self.loss,
            self.mask,
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) over what tells these moments from others, of other data or of gradients of another loss."""
        digest = hashlib.sha256()
        for key in sorted(self.moments):
            value = self.moments[key]
            digest.update(f"{key} {value.count}".encode())
            digest.update(value.total.tobytes())
            digest.update(np.diagonal(value.gram).tobytes())
        return digest.hexdigest()

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write as safetensors, whole or not at all, one tensor's moments in memory at a time.

        Raises
        ------
        OutputError
            `path` exists without `force`, or cannot be written.
        """
        header = {
            "format": FORMAT,
            "model": self.model,
            "data": json.dumps(self.data),
            "samples": str(self.samples),
            "holdout_every": str(self.holdout_every),
            "no_gradients": self.no_gradients,
            "loss": self.loss,
            "mask": self.mask,
            "rows": json.dumps({key: rows for key, (rows, _) in self.sizes.items()}),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for key, (_, dim) in self.sizes.items():
            shapes |= {f"{key}/total": (dim,), f"{key}/gram": (dim, dim)}
        arrays = (array for value in self.moments.values() for array in (value.total, value.gram))
        with replacing(path, force=force) as temporary:
            write_tensors(temporary, header, shapes, arrays)

    @classmethod
    def load(cls, path: Path) -> Stats:
        """Open what `save` wrote; every tensor's moments are read when they are asked for, and kept by nobody.

        Raises
        ------
        StatsError
            `path` is missing, damaged or no moments file.
        """
        try:
            with safe_open(path, framework="np") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise StatsError(f"{path} is no moments file ({FORMAT}): write one with `onnxlr calibrate`")
                sizes = {
                    key: (rows, int(file.get_slice(f"{key}/gram").get_shape()[0]))
                    for key, rows in json.loads(header["rows"]).items()
                }
                return cls(
                    header["model"],
                    tuple(json.loads(header["data"])),
                    int(header["samples"]),
                    int(header["holdout_every"]),
                    OnDemand(sizes, lambda key: _read(path, key, sizes[key][0])),
                    header.get("no_gradients", ""),
                    header.get("loss", ""),
                    header.get("mask", ""),
                )
        except FileNotFoundError:
            raise StatsError(f"{path} does not exist: write it with `onnxlr calibrate`") from None
        except (SafetensorError, OSError) as error:
            raise StatsError(f"{path} cannot be read as a moments file: {error}") from error
        except (KeyError, ValueError) as error:
            raise StatsError(
                f"{path} is damaged, its header gives {error!r}: write it anew with `onnxlr calibrate`"
            ) from error


def beside(a: Stats, b: Stats) -> Stats:
    """The moments of one pass beside those of another over the same data, of other tensors."""
    first, second = a.moments, b.moments
    return replace(
        a,
        # with rows "auto" a pass ends when it has enough of them
        data=a.data if a.samples >= b.samples else b.data,
        samples=max(a.samples, b.samples),
        moments=OnDemand({**a.sizes, **b.sizes}, lambda key: first[key] if key in first else second[key]),
    )


def _read(path: Path, key: str, count: int) -> Moments:
    try:
        with safe_open(path, framework="np") as file:
            return Moments(count, file.get_tensor(f"{key}/total"), file.get_tensor(f"{key}/gram"))
    except (SafetensorError, OSError) as error:
        raise StatsError(f"{path} cannot be read any more: {error}") from error

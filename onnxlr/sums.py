"""The moments of all tensors of a pass while batches come in.

Tensors are shared out among threads (`onnxlr.threads`): rows are added to the moments of one tensor by one thread at a
time, batch by batch, so that sums do not depend on how many threads there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxlr.errors import DataError
from onnxlr.gram import OnDemand
from onnxlr.inner import outputs_of, pieces
from onnxlr.probes import probe_key, probe_width, sightings
from onnxlr.running import RunningMoments, drawn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from onnxlr.config import Config
    from onnxlr.data import Feed
    from onnxlr.probes import Probe
    from onnxlr.sites import Weight
    from onnxlr.sites.bodies import Body


def not_finite(tensor: str, first: int) -> DataError:
    """The error of a tensor that is NaN or infinite in the batch that begins with sample `first`."""
    return DataError(
        f"tensor {tensor!r} holds NaN or infinite values in the batch from sample {first}: "
        "check the model and the data with onnxruntime"
    )


class Sums:
    """The running moments of the probes of one pass.

    Parameters
    ----------
    weights
        All weights of the model, which say what the names of probes in bodies stand for.
    together
        The probes, in sets whose moments are added up: as many rows of each are to be counted.
    config
        Objective and rows are used. Where `rows` is "auto" a tensor whose moments have settled (`onnxlr.running`)
        takes no more rows, and before that a share of those that are much alike.
    """

    def __init__(self, weights: Iterable[Weight], together: Sequence[Sequence[Probe]], config: Config) -> None:
        self._together = together
        self.running: dict[Probe, RunningMoments] = {}
        """The moments of every probe; of no rows where a body never runs."""
        self.inner: dict[str, tuple[str, tuple[Body, ...]]] = {}
        """The tensor, and the bodies it is in, of every probe in a body."""
        wanted = {probe for own in together for probe in own}
        for weight, site, probe in sightings(weights, config):
            if probe not in wanted:
                continue
            if probe not in self.running:
                self.running[probe] = RunningMoments(probe_width(weight, site, probe), watched=config.rows == "auto")
            if site.bodies:
                of_output = probe[0] == site.seen_as(site.output)
                self.inner[probe[0]] = (site.output if of_output else site.input, site.bodies)

    @property
    def wanted(self) -> list[Probe]:
        """The probes that take rows still, those together as long as one of them does."""
        return [
            probe for own in self._together if not all(self.running[probe].settled for probe in own) for probe in own
        ]

    def add(
        self, pool: Executor, activations: Feed, probes: Iterable[Probe], mask: NDArray[Any] | None, first: int
    ) -> None:
        """Add the rows that one batch has of some probes.

        Parameters
        ----------
        pool
            The threads that share them out.
        activations
            All tensors that the probes need.
        probes
            What is added.
        mask
            Padding [N, S]: rows of padded tokens are left out.
        first
            The first sample of the batch.

        Raises
        ------
        DataError
            A tensor is NaN or infinite (named), or the mask does not fit.
        """
        shares = self._shares()

        def add(probe: Probe) -> None:
            tensor, place = probe
            names = outputs_of(tensor) if tensor in self.inner else ()
            running = self.running[probe]
            try:
                for array in pieces(*(activations[name] for name in names)) if names else [activations[tensor]]:
                    running.add(drawn(place.of(array, mask), shares[probe], running.count))
            except FloatingPointError:
                raise not_finite(tensor, first) from None

        for _ in pool.map(add, probes):
            pass

    def _shares(self) -> dict[Probe, float]:
        """Which share of its rows each probe takes: as much as all that it is added up with."""
        shares: dict[Probe, float] = {}
        for own in self._together:
            shares |= dict.fromkeys(own, max((self.running[probe].share for probe in own), default=1.0))
        return shares

    def moments(self) -> OnDemand:
        """What the rows so far add up to, by the key of the probe."""
        by_key = {probe_key(probe): self.running[probe] for own in self._together for probe in own}
        sizes = {key: (running.count, running.dim) for key, running in by_key.items()}
        return OnDemand(sizes, lambda key: by_key[key].moments())

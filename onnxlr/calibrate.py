"""Second moments of what every linear layer sees: probes into the graph, batches through the session, moments out.

The tensors whose rows matter become outputs of a copy of the graph. One batch at a time runs through it, its rows are
folded into running sums (`onnxlr.gram`), and the activations are dropped. Moments are keyed by tensor, not by layer:
layers that read one tensor share them, and where a layer's output is the smaller side, the output is observed.
Tensors of bodies (If, Loop, Scan) come out by way of `onnxlr.inner`. On a GPU most sums are made in the graph, and no
activations come out (`onnxlr.in_graph`). With TensorRT calibration runs in CUDA: TensorRT builds an engine for every
shape that a batch has, which takes minutes, to run it some hundred times.
"""

from __future__ import annotations

import hashlib
from functools import reduce
from typing import TYPE_CHECKING, Any

import onnx

from onnxlr.data import batches, sample_count
from onnxlr.errors import DataError
from onnxlr.gram import Stats, beside
from onnxlr.heap import release
from onnxlr.in_graph import InGraph, gram_bytes, taken
from onnxlr.inner import bring_out, outputs_of
from onnxlr.liveness import keep_only
from onnxlr.model_io import from_proto
from onnxlr.nvidia import CUDA, TENSORRT
from onnxlr.passes import in_passes
from onnxlr.probes import Probe, as_seen, probe_key, probe_width, sightings, site_probes
from onnxlr.running import packed_bytes
from onnxlr.session import DEVICES, Session, provider_name
from onnxlr.sums import Sums
from onnxlr.threads import sharing_out

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnxlr.config import Config, Objective
    from onnxlr.data import Feed, Sample, TensorSpec
    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory, Weight
    from onnxlr.sites.bodies import Body

INSTEAD = ": use --objective output"
"""Ends messages of why there are no gradients."""


def with_outputs(model: Model, tensors: Sequence[str]) -> Model:
    """A copy of `model` whose graph also gives `tensors` out; graph inputs and present outputs are left alone."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    known = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    proto.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors if tensor not in known)
    return from_proto(proto, model.folder)


def mask_of(feed: Feed, mask: str | None) -> NDArray[Any] | None:
    """The padding mask [N, S] of a feed.

    Raises
    ------
    DataError
        There is no such input.
    """
    if mask is None:
        return None
    if mask not in feed:
        raise DataError(f"--mask {mask!r} is none of the model's inputs: {', '.join(map(repr, feed))}")
    return feed[mask]


def accumulate(
    model: Model,
    inventory: Inventory,
    samples: Iterable[Sample],
    inputs: Sequence[TensorSpec],
    config: Config,
    *,
    recall: Callable[[object, Callable[[], Stats]], Stats] = lambda _, make: make(),
    progress: Callable[[int], None] = lambda _: None,
) -> Stats:
    """Gather the moments that `config.objective` needs at every weight of `inventory`.

    Where they take more than `config.memory` they are gathered in several passes over the samples, each through the
    part of the graph that its tensors need.

    Parameters
    ----------
    model, inventory
        The model and its sites.
    samples
        What to calibrate on, held-out samples already left out; read once a pass.
    inputs
        The model's inputs.
    config
        Batch size, mask, rows, memory, provider and threads are used. Where `rows` is "auto" a tensor whose moments
        have settled (`onnxlr.running`) takes no more rows, and before that a share of those that are much alike; the
        pass ends when all have: give the samples in an order in which any first part is a sample of all.
    recall
        Gives the moments of a pass from what they follow from and from what makes them, so that they may go to a file
        before the next pass begins, or come from there.
    progress
        Called with the number of samples after each batch of each pass.

    Raises
    ------
    DataError
        There are no samples, or an activation is NaN or infinite (named).
    ModelError, InstallError
        From onnxruntime.
    """
    fingerprint = model.fingerprint()
    how = (config.objective, config.batch, config.rows, config.mask, config.holdout_every)

    def gathered(together: list[list[Probe]]) -> Stats:
        keys = sorted(probe_key(probe) for own in together for probe in own)
        return recall(
            (keys, *how),
            lambda: _one_pass(model, fingerprint, inventory, together, samples, inputs, config, progress),
        )

    return reduce(beside, (gathered(together) for together in _passes(inventory.weights, config)))


def _passes(weights: Sequence[Weight], config: Config) -> list[list[list[Probe]]]:
    """All probes, by pass and then by what is added up, in the order of the graph: early passes need little of it."""
    widths = {probe: probe_width(weight, site, probe) for weight, site, probe in sightings(weights, config)}
    together = _added_up(as_seen(weights, config), config.objective)
    size = gram_bytes if _stays_on_device(config) else packed_bytes
    return in_passes(together, lambda own: sum(size(widths[probe]) for probe in own), config.memory)


def _provider(config: Config) -> str:
    """What calibration runs in."""
    provider = provider_name(config.provider)
    return CUDA if provider == TENSORRT else provider


def _stays_on_device(config: Config) -> bool:
    """Whether moments are added up where the model runs; those that are watched are looked at after every batch."""
    return _provider(config) in DEVICES and config.rows != "auto"


def _one_pass(
    model: Model,
    fingerprint: str,
    inventory: Inventory,
    together: list[list[Probe]],
    samples: Iterable[Sample],
    inputs: Sequence[TensorSpec],
    config: Config,
    progress: Callable[[int], None],
) -> Stats:
    sums = Sums(inventory.weights, together, config)
    probed = _Probed(model, sums, inputs, config)
    probes = sums.wanted
    digest = hashlib.sha256()
    count = 0
    with sharing_out(config.threads) as pool:
        for feed in batches(_hashed(samples, digest), config.batch, inputs):
            seen = probed.run(feed, probes, count)
            sums.add(pool, seen, probes, mask_of(feed, config.mask), count)
            if not count and _stays_on_device(config):
                probes = probed.add_up(seen, probes)
            del seen  # or it is still there beside the next batch's
            size = sample_count(feed, inputs)
            count += size
            progress(size)
            if config.rows == "auto":
                probes = sums.wanted
                if not probes:
                    break
    probed.finish()
    if not count:
        raise DataError("there are no samples to calibrate on: one of so many is held out, so give at least two")
    return Stats(
        model=fingerprint,
        data=(digest.hexdigest(),),
        samples=count,
        holdout_every=config.holdout_every,
        moments=sums.moments(),
        mask=config.mask or "",
    )


class _Probed:
    """The model, which gives out what probes need or, once it is told to, adds up their moments itself.

    Parameters
    ----------
    model
        The model.
    sums
        All that is wanted of it.
    inputs
        The model's inputs.
    config
        Provider, threads and mask are used.
    """

    def __init__(self, model: Model, sums: Sums, inputs: Sequence[TensorSpec], config: Config) -> None:
        self._sums, self._inputs, self._config = sums, inputs, config
        extended = _probing(model, sums.wanted, sums.inner, inputs)
        self._session: Session | None = Session(
            extended, provider=_provider(config), threads=config.threads, streaming=True
        )
        self._in_graph: InGraph | None = None
        self._model = extended if _stays_on_device(config) else None  # or the weights are in memory twice
        del extended
        release()

    def run(self, feed: Feed, probes: Sequence[Probe], first: int) -> Feed:
        """The tensors of `probes` of one batch, which begins with sample `first`, and the feed."""
        fetched = _fetched(probes, self._sums.inner, self._inputs)
        if self._in_graph is not None:
            return {**feed, **self._in_graph.run(feed, fetched, first)}
        assert self._session is not None
        return {**feed, **(self._session.run(feed, fetched) if fetched else {})}

    def add_up(self, seen: Feed, probes: Sequence[Probe]) -> list[Probe]:
        """From now on the graph adds up what it can, after a first batch with the tensors `seen`; the probes left."""
        assert self._model is not None
        own = taken(self._model, self._inputs, probes, self._sums.inner, self._sums.running)
        left = [probe for probe in probes if probe not in own]
        axes = {tensor: seen[tensor].ndim for tensor, _ in own}
        fetched = _fetched(left, self._sums.inner, self._inputs)
        self._session = None  # or the weights are on the device twice
        self._in_graph = InGraph(
            self._model, own, axes, self._sums.running, fetched, self._config, provider=_provider(self._config)
        )
        return left

    def finish(self) -> None:
        """Bring home what the graph has added up."""
        if self._in_graph is not None:
            self._in_graph.finish()


def _probing(
    model: Model,
    wanted: Sequence[Probe],
    inner: Mapping[str, tuple[str, tuple[Body, ...]]],
    inputs: Sequence[TensorSpec],
) -> Model:
    """A copy of `model` that gives out the tensors of `wanted`, and computes nothing that they do not need."""
    probed = with_outputs(model, list(dict.fromkeys(tensor for tensor, _ in wanted if tensor not in inner)))
    graph = probed.proto.graph
    for seen_as in dict.fromkeys(tensor for tensor, _ in wanted if tensor in inner):
        tensor, bodies = inner[seen_as]
        bring_out(graph, tensor, seen_as, bodies)
    fetched = set(_fetched(wanted, inner, inputs))
    if fetched:
        keep_only(graph, [value for value in graph.output if value.name in fetched])
    return probed


def _fetched(wanted: Sequence[Probe], inner: Container[str], inputs: Sequence[TensorSpec]) -> list[str]:
    """The outputs of the session that `wanted` are made of; inputs of the model are there without it."""
    given = {spec.name for spec in inputs}
    names = (name for tensor, _ in wanted for name in (outputs_of(tensor) if tensor in inner else (tensor,)))
    return [name for name in dict.fromkeys(names) if name not in given]


def _added_up(weights: Iterable[Weight], objective: Objective) -> list[list[Probe]]:
    """All probes, those together whose moments are added up: they have to count as many rows of each."""
    sets: list[dict[Probe, None]] = []
    for weight in weights:
        own = dict.fromkeys(probe for site in weight.sites for probe in site_probes(weight, site, objective))
        for other in [other for other in sets if other.keys() & own.keys()]:
            sets.remove(other)
            own = other | own
        sets.append(own)
    return [list(own) for own in sets]


def data_fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 (hex) over samples."""
    digest = hashlib.sha256()
    for _ in _hashed(samples, digest):
        pass
    return digest.hexdigest()


def _hashed(samples: Iterable[Sample], digest: Any) -> Iterator[Sample]:
    for sample in samples:
        for name in sorted(sample):
            digest.update(f"{name}{sample[name].shape}{sample[name].dtype}".encode())
            digest.update(_bytes_of(sample[name]))
        yield sample


def _bytes_of(array: NDArray[Any]) -> bytes:
    return "\0".join(map(str, array.ravel())).encode() if array.dtype.kind in "OUS" else array.tobytes()

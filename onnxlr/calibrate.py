"""Second moments of what every linear layer sees: probes into the graph, batches through the session, moments out.

The tensors whose rows matter become outputs of a copy of the graph. One batch at a time runs through it, its rows are
folded into running sums (`onnxlr.gram`), and the activations are dropped. Moments are keyed by tensor, not by layer:
layers that read one tensor share them, and where a layer's output is the smaller side, the output is observed.
Tensors of bodies (If, Loop, Scan) come out by way of `onnxlr.inner`.
"""

from __future__ import annotations

import hashlib
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import onnx

from onnxlr.data import batches, sample_count
from onnxlr.errors import DataError, StatsError
from onnxlr.gram import Moments, Stats
from onnxlr.inner import bring_out, outputs_of, pieces
from onnxlr.model_io import from_proto
from onnxlr.rows import Rows
from onnxlr.running import RunningMoments
from onnxlr.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from onnxlr.config import Config, Objective
    from onnxlr.data import Feed, Sample, TensorSpec
    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory, Site, Weight
    from onnxlr.sites.bodies import Body

Probe = tuple[str, Rows]
"""A tensor, by the name that its site sees it as, and how a layer's rows lie in it."""
UNSEEN = 0.1
"""The share of a table's moments that all its rows have alike, gathered or not.

Calibration never gathers most rows of a table, and a cut made for the others alone ruins them: later positions of a
longer text, rarer words. As in the smoothing of counts, every row is taken to come now and then.
"""
INSTEAD = ": use --objective output"
"""Ends messages of why there are no gradients."""


def probe_key(probe: Probe) -> str:
    """The name of a probe's moments in a `Stats`."""
    tensor, rows = probe
    return tensor + rows.key


def site_probes(weight: Weight, site: Site, objective: Objective) -> list[Probe]:
    """What has to be observed at a site for an objective, one a group; nothing where no data are needed or seen."""
    if objective == "weight" or site.unseen:
        return []
    if objective != "utilized" and weight.observes_output:
        return [(site.seen_as(site.output), rows) for rows in site.output_rows]
    return [(site.seen_as(site.input), rows) for rows in site.input_rows]


def probes(weights: Iterable[Weight], objective: Objective) -> list[Probe]:
    """All distinct tensors to observe for `weights`."""
    sites = ((weight, site) for weight in weights for site in weight.sites)
    return list(dict.fromkeys(probe for weight, site in sites for probe in site_probes(weight, site, objective)))


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
    progress: Callable[[int], None] = lambda _: None,
) -> Stats:
    """Gather the moments that `config.objective` needs at every weight of `inventory`.

    Parameters
    ----------
    model, inventory
        The model and its sites.
    samples
        What to calibrate on, held-out samples already left out.
    inputs
        The model's inputs.
    config
        Batch size, mask, rows, provider and threads are used. Where `rows` is "auto" a tensor whose moments have
        settled (`onnxlr.running`) takes no more rows, and the pass ends when all have: give the samples in an order in
        which any first part is a sample of all.
    progress
        Called with the number of samples after each batch.

    Raises
    ------
    DataError
        There are no samples, or an activation is NaN or infinite (named).
    ModelError, InstallError
        From onnxruntime.
    """
    wanted = probes(inventory.weights, config.objective)
    inner, sums = _in_bodies(inventory.weights, config)
    probed = with_outputs(model, list(dict.fromkeys(tensor for tensor, _ in wanted if tensor not in inner)))
    for seen_as, (tensor, bodies) in inner.items():
        bring_out(probed.proto.graph, tensor, seen_as, bodies)
    session = Session(probed, provider=config.provider, threads=config.threads, streaming=True)
    given = {spec.name for spec in inputs}
    together = _added_up(inventory.weights, config.objective)
    digest = hashlib.sha256()
    count = 0
    for feed in batches(_hashed(samples, digest), config.batch, inputs):
        names = (name for tensor, _ in wanted for name in (outputs_of(tensor) if tensor in inner else (tensor,)))
        fetched = [name for name in dict.fromkeys(names) if name not in given]
        mask = mask_of(feed, config.mask)
        # what is not named is not there any more beside the next batch's
        _add(
            {**feed, **session.run(feed, fetched)} if fetched else feed,
            inner,
            mask,
            wanted,
            sums,
            count,
            watched=config.rows == "auto",
        )
        size = sample_count(feed, inputs)
        count += size
        progress(size)
        if config.rows == "auto":
            wanted = [probe for own in together if not all(sums[each].settled for each in own) for probe in own]
            if not wanted:
                break
    if not count:
        raise DataError("there are no samples to calibrate on: one of so many is held out, so give at least two")
    del session  # its memory is as much as the moments take once they are whole
    return Stats(
        model=model.fingerprint(),
        data=(digest.hexdigest(),),
        samples=count,
        holdout_every=config.holdout_every,
        moments={probe_key(probe): sums.pop(probe).moments() for probe in list(sums)},
    )


def _in_bodies(
    weights: Iterable[Weight], config: Config
) -> tuple[dict[str, tuple[str, tuple[Body, ...]]], dict[Probe, RunningMoments]]:
    """What the names of probes in bodies stand for: a tensor and its bodies; and their moments while none has run."""
    tensors, sums = {}, {}
    sites = ((weight, site) for weight in weights for site in weight.sites if site.bodies)
    for weight, site in sites:
        for probe in site_probes(weight, site, config.objective):
            of_output = probe[0] == site.seen_as(site.output)
            tensors[probe[0]] = (site.output if of_output else site.input, site.bodies)
            width = weight.d_out if of_output else weight.d_in
            sums[probe] = RunningMoments(width, watched=config.rows == "auto")
    return tensors, sums


def _add(
    activations: Feed,
    inner: Container[str],
    mask: NDArray[Any] | None,
    wanted: Iterable[Probe],
    sums: dict[Probe, RunningMoments],
    first: int,
    *,
    watched: bool,
) -> None:
    """Add the rows of one batch, which begins with sample `first`, to `sums`."""
    for probe in wanted:
        tensor, place = probe
        names = outputs_of(tensor) if tensor in inner else ()
        try:
            for array in pieces(*(activations[name] for name in names)) if names else [activations[tensor]]:
                rows = place.of(array, mask)
                running = sums[probe] = sums.get(probe) or RunningMoments(rows.shape[1], watched=watched)
                running.add(rows)
        except FloatingPointError:
            raise DataError(
                f"tensor {tensor!r} holds NaN or infinite values in the batch from sample {first}: "
                "check the model and the data with onnxruntime"
            ) from None


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


def _hashed(samples: Iterable[Sample], digest: Any) -> Iterator[Sample]:
    for sample in samples:
        for name in sorted(sample):
            digest.update(f"{name}{sample[name].shape}{sample[name].dtype}".encode())
            digest.update(_bytes_of(sample[name]))
        yield sample


GRADIENT = ":gradient"


def gradient_keys(site: Site) -> list[str]:
    """The names, in a `Stats`, of the gradient moments at a site's output, one a group; none where it is not seen."""
    if site.groups == 1:
        return [site.output + GRADIENT for _ in site.output_rows]
    return [probe_key((site.output, rows)) + GRADIENT for rows in site.output_rows]


def has_gradients(stats: Stats) -> bool:
    """Whether there are gradient moments of any site."""
    return any(key.endswith(GRADIENT) for key in stats.moments)


def weight_gradients(stats: Stats, weight: Weight) -> list[Moments] | None:
    """The gradient moments of one weight, of each group: those of all its sites added up.

    None where no gradient reached one of them.

    Raises
    ------
    StatsError
        `stats` has no gradient moments at all.
    """
    if not has_gradients(stats):
        raise StatsError("these moments hold no gradients: gather them with `onnxlr calibrate --objective fisher`")
    keys = [gradient_keys(site) for site in weight.sites]
    if any(len(own) < weight.groups or not stats.moments.keys() >= set(own) for own in keys):
        return None
    return [reduce(add, (stats.moments[key] for key in own)) for own in zip(*keys, strict=True)]


def _bytes_of(array: NDArray[Any]) -> bytes:
    return "\0".join(map(str, array.ravel())).encode() if array.dtype.kind in "OUS" else array.tobytes()


def weight_moments(stats: Stats, inventory: Inventory, weight: Weight, objective: Objective) -> list[Moments]:
    """The moments of one weight, of each group: those of all its sites added up.

    Where the output is observed, a bias that the operator itself adds is taken off, so that they are those of `x W`.
    A share `UNSEEN` of those of a table is that of all its rows.
    There are none where no site can be observed; they are of no rows where bodies of If, Loop or Scan never ran.

    Raises
    ------
    StatsError
        `stats` lacks them.
    """
    by_site = []
    for site in weight.sites:
        found = []
        for group, probe in enumerate(site_probes(weight, site, objective)):
            key = probe_key(probe)
            if key not in stats.moments:
                raise StatsError(
                    f"the moments lack tensor {key!r}, which objective {objective!r} needs at {site.name!r}: "
                    f"gather them with `onnxlr calibrate --objective {objective}`"
                )
            moments, bias = stats.moments[key], inventory.own_bias(site)
            if probe[0] == site.seen_as(site.output) and bias is not None:
                moments = moments.shifted(-bias[group * site.d_out : (group + 1) * site.d_out])
            if not site.input_rows:
                moments = moments.mixed(Moments.of(inventory.matrix(weight)), UNSEEN)
            found.append(moments)
        if found:
            by_site.append(found)
    return [reduce(add, own) for own in zip(*by_site, strict=True)]


def without_rows(weight: Weight, moments: Sequence[Moments]) -> str:
    """Why no data were seen of a weight whose moments are `moments`; "" where some were."""
    site = weight.sites[0]
    if not site.bodies or (moments and moments[0].count):
        return ""
    return site.unseen or f"calibration never ran {site.bodies[-1]}"

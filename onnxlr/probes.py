"""What has to be observed of a layer, under which names its moments are kept, and what a weight takes of them.

Moments are keyed by tensor, not by layer: layers that read one tensor share them, and where a layer's output is the
smaller side, the output is observed. A convolution whose kernel may be split has the moments of its patches gathered
besides.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from onnxlr.errors import StatsError
from onnxlr.gram import Moments, Size
from onnxlr.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from onnxlr.config import Config, Objective
    from onnxlr.gram import Stats
    from onnxlr.sites import Inventory, Site, Weight

Probe = tuple[str, Rows]
"""A tensor, by the name that its site sees it as, and how a layer's rows lie in it."""
UNSEEN = 0.1
"""The share of a table's moments that all its rows have alike, gathered or not.

Calibration never gathers most rows of a table, and a cut made for the others alone ruins them: later positions of a
longer text, rarer words. As in the smoothing of counts, every row is taken to come now and then.
"""
WIDEST = 4608
"""The widest patches whose moments [d, d] are gathered to split a kernel: 512 channels under 3 x 3."""


def probe_key(probe: Probe) -> str:
    """The name of a probe's moments in a `Stats`."""
    tensor, rows = probe
    return tensor + rows.key


def site_probes(weight: Weight, site: Site, objective: Objective) -> list[Probe]:
    """What has to be observed at a site for an objective, one a group; nothing where no data are needed or seen."""
    if objective == "weight" or site.unseen:
        return []
    if objective != "utilized" and weight.observes_output and not site.transposed:
        return [(site.seen_as(site.output), rows) for rows in site.output_rows]
    return [(site.seen_as(site.input), rows) for rows in site.input_rows]


def probe_width(weight: Weight, site: Site, probe: Probe) -> int:
    """The width of the rows of one of `site_probes`; an output head that is a table too reads the table's output."""
    return weight.d_out if site.transposed or probe[0] == site.seen_as(site.output) else weight.d_in


def as_seen(weights: Iterable[Weight], config: Config) -> Iterator[Weight]:
    """Every weight as each of the forms on offer sees it: some as they are, and by their patches."""
    for weight in weights:
        yield weight
        if splits(weight, config) and weight.d_in <= WIDEST:
            yield weight.in_strips


def sightings(weights: Iterable[Weight], config: Config) -> Iterator[tuple[Weight, Site, Probe]]:
    """All that has to be observed: each of `as_seen` at each of its sites, with one of its probes there."""
    for weight in as_seen(weights, config):
        for site in weight.sites:
            for probe in site_probes(weight, site, config.objective):
                yield weight, site, probe


def splits(weight: Weight, config: Config) -> bool:
    """Whether the kernel of a weight may be split, for all that its geometry and the settings say."""
    return "separable" in config.forms and config.objective != "utilized" and weight.taps > 1


def probes(weights: Iterable[Weight], objective: Objective) -> list[Probe]:
    """All distinct tensors to observe for `weights`."""
    sites = ((weight, site) for weight in weights for site in weight.sites)
    return list(dict.fromkeys(probe for weight, site in sites for probe in site_probes(weight, site, objective)))


GRADIENT = ":gradient"


def gradient_keys(site: Site) -> list[str]:
    """The names, in a `Stats`, of the gradient moments at a site's output, one a group; none where it is not seen.

    Those of an output head whose weight is a table of embeddings are of what it reads, through it alone.
    """
    if site.groups == 1:
        return [site.output + GRADIENT for _ in site.output_rows]
    return [probe_key((site.output, rows)) + GRADIENT for rows in site.output_rows]


def has_gradients(stats: Stats) -> bool:
    """Whether there are gradient moments of any site."""
    return any(key.endswith(GRADIENT) for key in stats.moments)


def weight_gradients(stats: Stats, weight: Weight) -> list[Moments] | None:
    """The gradient moments of one weight, of each group: those of all its sites added up.

    Those of a table that is the output head too are of what is gathered (`read_gradients` are those of the head).
    None where no gradient reached one of them.

    Raises
    ------
    StatsError
        `stats` has no gradient moments at all.
    """
    if not gradients_reach(stats, weight):
        return None
    keys = [gradient_keys(site) for site in weight.sites if not site.transposed]
    return [reduce(add, (stats.moments[key] for key in own)) for own in zip(*keys, strict=True)]


def gradients_reach(stats: Stats, weight: Weight) -> bool:
    """Whether there are gradient moments of all sites of a weight.

    Raises
    ------
    StatsError
        `stats` has no gradient moments at all.
    """
    if not has_gradients(stats):
        raise StatsError("these moments hold no gradients: gather them with `onnxlr calibrate --objective fisher`")
    keys = [gradient_keys(site) for site in weight.sites]
    return all(len(own) >= weight.groups and stats.moments.keys() >= set(own) for own in keys)


def weight_moments(stats: Stats, inventory: Inventory, weight: Weight, objective: Objective) -> list[Moments]:
    """The moments of one weight, of each group: those of all its sites added up.

    Where the output is observed, a bias that the operator itself adds is taken off, so that they are those of `x W`.
    A share `UNSEEN` of those of a table is that of all its rows.
    Those of a table that is the output head too are of what is gathered (`read_moments` are those of the head). There
    are none where no site can be observed; they are of no rows where bodies of If, Loop or Scan never ran.

    Raises
    ------
    StatsError
        `stats` lacks them.
    """
    moments_size(stats, weight, objective)
    by_site = []
    for site in weight.sites:
        if site.transposed:
            continue
        found = []
        for group, probe in enumerate(site_probes(weight, site, objective)):
            moments, bias = stats.moments[probe_key(probe)], inventory.own_bias(site)
            if probe[0] == site.seen_as(site.output) and bias is not None:
                moments = moments.shifted(-bias[group * site.d_out : (group + 1) * site.d_out])
            if not site.input_rows:
                moments = moments.mixed(Moments.of(inventory.matrix(weight)), UNSEEN)
            found.append(moments)
        if found:
            by_site.append(found)
    return [reduce(add, own) for own in zip(*by_site, strict=True)]


def read_moments(stats: Stats, weight: Weight, objective: Objective) -> Moments:
    """The moments of what the output heads of a tied table read."""
    probes = (probe for site in weight.sites if site.transposed for probe in site_probes(weight, site, objective))
    return reduce(add, (stats.moments[probe_key(probe)] for probe in probes))


def read_gradients(stats: Stats, weight: Weight) -> Moments:
    """The gradient moments of what the output heads of a tied table read, where gradients reach it."""
    keys = (key for site in weight.sites if site.transposed for key in gradient_keys(site))
    return reduce(add, (stats.moments[key] for key in keys))


def moments_size(stats: Stats, weight: Weight, objective: Objective) -> Size:
    """The number of rows that made up the moments of a weight, the least of its groups, and their width; (0, 0): none.

    Raises
    ------
    StatsError
        `stats` lacks them.
    """
    rows, width = [0] * weight.groups, 0
    for site in weight.sites:
        for group, probe in enumerate(site_probes(weight, site, objective)):
            key = probe_key(probe)
            if key not in stats.moments:
                raise StatsError(
                    f"the moments lack tensor {key!r}, which objective {objective!r} needs at {site.name!r}: "
                    f"gather them with `onnxlr calibrate --objective {objective}`, and with the same --forms"
                )
            count, width = stats.sizes[key]
            rows[group] += count
    return min(rows), width


def without_rows(weight: Weight, rows: int) -> str:
    """Why no data were seen of a weight whose moments are of so many rows; "" where some were."""
    site = weight.sites[0]
    if not site.bodies or rows:
        return ""
    return site.unseen or f"calibration never ran {site.bodies[-1]}"

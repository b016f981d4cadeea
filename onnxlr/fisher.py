"""What the network's output makes of an error in each layer's output: gradient moments, without labels.

A small error `e` in the output of a site moves the network's outputs `o` by `J e`, `J` the Jacobian. With a random
probe `u` of independent standard normal entries, `g = J^T u` has `E[g^T g] = J^T J`, so the moments `G` of the
gradients of `<u, o>` at the site weigh `e` as the network does: `E ||J e||^2 = e G e^T` (the Gauss-Newton matrix of
the squared error of the outputs). Every output is scaled to a root mean square of 1, so that relative errors count.
An output that is a softmax or sigmoid is probed before it: probabilities near 0 and 1 have no gradient left.

A half-precision model is differentiated as its float32 self: gradients that pass through float16 overflow or vanish.

Where there are labels and a loss, the gradients can be those of the loss instead (the empirical Fisher matrix): errors
then count where they change the loss, and not where the network is wrong or indifferent already.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

# before torch itself: where that is missing, this import says what to install
from onnxlr.torch_graph import check_parity, float32_products, to_tensor, to_torch

# isort: split
import numpy as np
import torch

from onnxlr.calibrate import INSTEAD, mask_of
from onnxlr.data import numbered_batches, sample_count
from onnxlr.errors import ModelError
from onnxlr.gram import Moments, Stats, beside
from onnxlr.metrics import token_rows
from onnxlr.passes import in_passes
from onnxlr.precision import half_types, widened, widened_feed
from onnxlr.probes import gradient_keys
from onnxlr.task_loss import TaskLoss, scores_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from onnxlr.config import Config
    from onnxlr.data import Sample, TensorSpec
    from onnxlr.model_io import Model
    from onnxlr.rows import Rows
    from onnxlr.sites import Inventory, Site


WIDEST = 16384
"""Outputs wider than that, vocabularies, have no gradient moments: their square is larger than any model."""


def gradient_moments(
    model: Model,
    inventory: Inventory,
    samples: Iterable[Sample],
    inputs: Sequence[TensorSpec],
    config: Config,
    *,
    labels: NDArray[Any] | None = None,
    recall: Callable[[object, Callable[[], Stats]], Stats] = lambda _, make: make(),
    progress: Callable[[int], None] = lambda _: None,
) -> Stats:
    """Gradient moments [d_out, d_out] at every site of `inventory` whose output is seen, by `gradient_keys`.

    At an output head `z = x E^T` whose weight is a table of embeddings `E [V, d]` too, they are those [d, d] of the
    gradients `g E` at its input, through it alone: of `G [V, V]` no more than `E^T G E` is asked for.

    With `config.loss` they are those of the loss on `labels`, one a sample. They are gathered in as many passes as
    `config.memory` takes; `recall` is as of `onnxlr.calibrate.accumulate`.

    Whole-model parity of the gradient graph with onnxruntime is checked on the first batch. A site that no gradient
    reaches is left out. The GPU is used when torch has one.

    Raises
    ------
    InstallError
        torch is not installed.
    ModelError
        An operator has no gradient implementation (all are listed), parity fails, no output is floating, no gradient
        reaches any site or one is not finite.
    ConfigError
        There is no such loss.
    DataError
        The loss fails on the outputs and labels.
    """
    every = (site for weight in inventory.weights for site in weight.sites)
    sites = {site.output: site for site in every if site.output_rows and _width(site) <= WIDEST}
    tables = {site.output: weight for weight in inventory.weights for site in weight.sites if site.transposed}
    fingerprint = model.fingerprint()
    how = (config.batch, config.mask, config.loss, None if labels is None else labels.tobytes(), config.holdout_every)
    passes = []
    for names in in_passes(sites, lambda name: 8 * sites[name].groups * _width(sites[name]) ** 2, config.memory):
        own = {name: sites[name] for name in names}

        def gathered(own: dict[str, Site] = own) -> Stats:
            heads = {name: inventory.matrix(tables[name]) for name in own if name in tables}
            moments = _one_pass(model, own, heads, samples, inputs, config, labels, progress)
            return Stats(fingerprint, (), 0, config.holdout_every, moments, mask=config.mask or "")

        passes.append(recall((names, *how), gathered))
    result = reduce(beside, passes)
    if inventory.weights and not result.moments:
        raise ModelError(f"no gradient reaches any weight{INSTEAD}")
    return result


def _width(site: Site) -> int:
    """Of the gradients that are gathered at a site."""
    return site.d_in if site.transposed else site.d_out


@float32_products()
def _one_pass(
    model: Model,
    sites: Mapping[str, Site],
    heads: Mapping[str, NDArray[np.float64]],
    samples: Iterable[Sample],
    inputs: Sequence[TensorSpec],
    config: Config,
    labels: NDArray[Any] | None,
    progress: Callable[[int], None],
) -> dict[str, Moments]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = bool(half_types(model))
    model = widened(model) if half else model
    graph = to_torch(model).to(device)
    tables = {name: torch.from_numpy(table).float().to(device) for name, table in heads.items()}
    nested = [name for name, site in sites.items() if site.bodies]
    flat = [name for name in sites if name not in nested]
    probed = scores_of(model, graph.outputs)
    generator = torch.Generator(device).manual_seed(0)
    sums: dict[str, _Sums] = {}
    loss = None if config.loss is None else TaskLoss(config.loss)
    checked = False
    for numbers, given_feed in numbered_batches(enumerate(samples), config.batch, inputs):
        feed = widened_feed(given_feed) if half else given_feed
        if not checked:
            checked = True
            check_parity(graph, model, [feed])
        mask = mask_of(feed, config.mask)
        given = {name: to_tensor(array, device) for name, array in feed.items()}
        # a tensor of a body may have many values in one run, or none
        values: dict[str, list[Any]] = {name: [] for name in nested}
        tensors = graph(given, outputs=[*probed.values(), *flat], track=flat, inner=values)
        values |= {name: [tensors[name]] for name in flat}
        floating = [tensors[name] for name in dict.fromkeys(probed.values()) if tensors[name].is_floating_point()]
        if not floating:
            raise ModelError(f"no output of the model is floating, so nothing has a gradient{INSTEAD}")
        if loss is None:
            total = sum(_probe(output, mask, generator) for output in floating)
        else:
            assert labels is not None
            own = torch.from_numpy(np.asarray(labels[numbers])).to(device)
            total = loss({name: tensors[tensor] for name, tensor in probed.items()}, own)
        every = [(name, value) for name in sites for value in values[name]]
        reached = [(name, value) for name, value in every if total.requires_grad and value.requires_grad]
        made = [value for _, value in reached]
        gradients = torch.autograd.grad(total, made, allow_unused=True) if made else ()
        for (name, _), gradient in zip(reached, gradients, strict=True):
            if gradient is None:
                continue
            for key, place in zip(gradient_keys(sites[name]), sites[name].output_rows, strict=True):
                rows = _rows(gradient, place, mask, tables.get(name))
                if key not in sums:
                    sums[key] = _Sums(name, rows)
                sums[key].add(rows)
        _require_finite(sums.values())
        progress(sample_count(feed, inputs))
    return {key: sums.pop(key).fetched() for key in list(sums)}


class _Sums:
    """The moments of gradients at the site `name`, which stay on the device until all are added up."""

    def __init__(self, name: str, rows: Any) -> None:
        width = rows.shape[1]
        self.name, self._count = name, 0
        self._total, self.gram = (torch.zeros(s, dtype=torch.float64, device=rows.device) for s in (width, [width] * 2))

    def add(self, rows: Any) -> None:
        """One batch, squared in float32: probes are noisier by far."""
        self._count += len(rows)
        self._total += rows.sum(0)
        self.gram += rows.T @ rows

    def fetched(self) -> Moments:
        return Moments(self._count, self._total.cpu().numpy(), self.gram.cpu().numpy())


def _require_finite(every: Iterable[_Sums]) -> None:
    own = list(every)
    if not own:
        return
    # what is not finite in a row is not on the diagonal either
    finite = torch.stack([sums.gram.trace() for sums in own]).isfinite().tolist()
    if not all(finite):
        raise ModelError(f"the gradient at {own[finite.index(False)].name!r} is not finite{INSTEAD}")


def _rows(gradient: Any, place: Rows, mask: NDArray[Any] | None, table: Any | None) -> Any:
    """The gradients of a batch as rows [n, d]; with a `table` [V, d], their products [V] with it."""
    gradient = gradient[place.chunk(tuple(gradient.shape))].float()
    gradient = gradient.permute(place.order(gradient.ndim))
    rows = gradient.reshape(place.shape(tuple(gradient.shape)))
    real = None if mask is None else token_rows(mask, (*gradient.shape[: -len(place.axes)], rows.shape[1]))
    if real is not None:
        rows = rows[torch.from_numpy(real.copy()).to(rows.device)]
    return rows if table is None else rows @ table


def _probe(output: Any, mask: NDArray[Any] | None, generator: Any) -> Any:
    """`<u, o> / rms(o)` for a random probe `u`, over the rows of real tokens."""
    probe = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    real = None if mask is None else token_rows(mask, tuple(output.shape))
    seen = output.detach().float()
    if real is not None:
        tokens = torch.from_numpy(real.copy()).to(output.device)
        probe = probe * tokens.to(output.dtype).reshape(*output.shape[:-1], 1)
        seen = seen.reshape(-1, output.shape[-1])[tokens]
    # none of them may be real
    scale = (seen.square().sum() / max(seen.numel(), 1)).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return (output * probe).sum() / scale

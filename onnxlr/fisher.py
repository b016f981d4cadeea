"""What the network's output makes of an error in each layer's output: gradient moments, without labels.

A small error `e` in the output of a site moves the network's outputs `o` by `J e`, `J` the Jacobian. With a random
probe `u` of independent standard normal entries, `g = J^T u` has `E[g^T g] = J^T J`, so the moments `G` of the
gradients of `<u, o>` at the site weigh `e` as the network does: `E ||J e||^2 = e G e^T` (the Gauss-Newton matrix of
the squared error of the outputs). Every output is scaled to a root mean square of 1, so that relative errors count.
An output that is a softmax or sigmoid is probed before it: probabilities near 0 and 1 have no gradient left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# before torch itself: where that is missing, this import says what to install
from onnxlr.torch_graph import check_parity, to_array, to_tensor, to_torch

# isort: split
import torch

from onnxlr.calibrate import gradient_key, mask_of, rows_of
from onnxlr.data import batches, sample_count
from onnxlr.errors import DataError, ModelError
from onnxlr.gram import Moments
from onnxlr.metrics import token_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from onnxlr.config import Config
    from onnxlr.data import Sample, TensorSpec
    from onnxlr.model_io import Model
    from onnxlr.sites import Inventory

SATURATING = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})


def gradient_moments(
    model: Model,
    inventory: Inventory,
    samples: Iterable[Sample],
    inputs: Sequence[TensorSpec],
    config: Config,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Moments]:
    """Gradient moments [d_out, d_out] at every site of `inventory`, by `gradient_key`.

    Whole-model parity of the gradient graph with onnxruntime is checked on the first batch. A site that no gradient
    reaches is left out. The GPU is used when torch has one.

    Raises
    ------
    InstallError
        torch is not installed.
    ModelError
        An operator has no gradient implementation (all are listed), parity fails, or no output is floating.
    DataError
        A gradient is not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    graph = to_torch(model).to(device)
    sites = {site.output: site.output_axis for weight in inventory.weights for site in weight.sites}
    probed = _probed_outputs(model, graph.outputs)
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, Moments] = {}
    for number, feed in enumerate(batches(samples, config.batch, inputs)):
        if number == 0:
            check_parity(graph, model, [feed])
        mask = mask_of(feed, config.mask)
        tensors = graph(
            {name: to_tensor(array, device) for name, array in feed.items()}, outputs=[*probed, *sites], track=sites
        )
        floating = [tensors[name] for name in probed if tensors[name].is_floating_point()]
        if not floating:
            raise ModelError("no output of the model is floating, so nothing has a gradient: use --objective output")
        total = sum(_probe(output, mask, generator) for output in floating)
        reached = [name for name in sites if tensors[name].requires_grad]
        made = [tensors[name] for name in reached]
        gradients = torch.autograd.grad(total, made, allow_unused=True) if made else ()
        for name, gradient in zip(reached, gradients, strict=True):
            if gradient is None:
                continue
            moments = Moments.of(rows_of(to_array(gradient), sites[name], mask))
            if not torch.isfinite(gradient).all():
                raise DataError(f"the gradient at {name!r} is not finite: use --objective output")
            key = gradient_key(name)
            sums[key] = sums[key] + moments if key in sums else moments
        progress(sample_count(feed, inputs))
    return sums


def _probe(output: Any, mask: NDArray[Any] | None, generator: Any) -> Any:
    """`<u, o> / rms(o)` for a random probe `u`, over the rows of real tokens."""
    probe = torch.randn(output.shape, generator=generator).to(output)
    real = None if mask is None else token_rows(mask, tuple(output.shape))
    if real is not None:
        probe = probe * torch.from_numpy(real.copy()).to(output).reshape(*output.shape[:-1], 1)
    scale = output.detach().float().square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return (output * probe).sum() / scale


def _probed_outputs(model: Model, outputs: Sequence[str]) -> list[str]:
    makers = {name: node for node in model.proto.graph.node for name in node.output}
    probed = []
    for name in outputs:
        saturating = name in makers and makers[name].op_type in SATURATING
        probed.append(makers[name].input[0] if saturating else name)
    return list(dict.fromkeys(probed))

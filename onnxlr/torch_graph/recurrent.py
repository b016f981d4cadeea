"""LSTM, GRU and RNN: all directions, layouts, activations and initial states, with the steps written out.

ONNX keeps the gates of an LSTM in the order i, o, f, c, those of a GRU in z, r, h; torch's own layers have another
order and no peepholes, so the recurrence is computed here, one matrix product a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onnxlr.torch_graph import activation
from onnxlr.torch_graph.registry import operator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": activation.relu,
    "tanh": activation.tanh,
    "sigmoid": activation.sigmoid,
    "softsign": activation.softsign,
    "softplus": activation.softplus,
    "leakyrelu": activation.leaky_relu,
    "thresholdedrelu": activation.thresholded_relu,
    "hardsigmoid": activation.hard_sigmoid,
    "elu": activation.elu,
}
_ALPHA = {"leakyrelu", "thresholdedrelu", "hardsigmoid", "elu", "affine", "scaledtanh"}
_BETA = {"hardsigmoid", "affine", "scaledtanh"}


def _functions(
    names: Sequence[str], alphas: Sequence[float], betas: Sequence[float]
) -> list[Callable[[Tensor], Tensor]]:
    """The activations with their parameters, taken from the two lists in order by those that have any."""
    alpha, beta = iter(alphas), iter(betas)
    found: list[Callable[[Tensor], Tensor]] = []
    for name in map(str.lower, names):
        given: dict[str, float] = {}
        if name in _ALPHA and (value := next(alpha, None)) is not None:
            given["alpha"] = value
        if name in _BETA and (value := next(beta, None)) is not None:
            given["beta"] = value
        found.append(_with(name, given))
    return found


def _with(name: str, given: dict[str, float]) -> Callable[[Tensor], Tensor]:
    if name == "affine":
        return lambda x: given.get("alpha", 1.0) * x + given.get("beta", 0.0)
    if name == "scaledtanh":
        return lambda x: given.get("alpha", 1.0) * torch.tanh(given.get("beta", 1.0) * x)
    function = _ACTIVATIONS[name]
    return lambda x: function(x, **given)


Cell = Any
"""From the step's gate input and the states to the new states; the first of them is the output."""


def _scan(cell: Cell, x: Tensor, states: list[Tensor], lengths: Tensor | None, reverse: bool) -> list[Tensor]:
    """Run a cell over x [t, n, ..]; returns the outputs [t, n, h] and the last states.

    Beyond a sequence's own length its states stay and its outputs are 0; in reverse it starts at its own end.
    """
    steps = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    outputs = []
    for t in steps:
        new = cell(x[t], *states)
        output = new[0]
        if lengths is not None:
            live = (t < lengths)[:, None]
            output = torch.where(live, output, torch.zeros_like(output))
            new = [torch.where(live, fresh, old) for fresh, old in zip(new, states, strict=True)]
        states = list(new)
        outputs.append(output)
    if reverse:
        outputs.reverse()
    return [torch.stack(outputs) if outputs else x.new_zeros(0, *states[0].shape), *states]


def _run(
    make_cell: Callable[[int], tuple[Cell, Callable[[Tensor], Tensor]]],
    x: Tensor,
    initial: list[Tensor],
    lengths: Tensor | None,
    direction: str,
    layout: int,
) -> tuple[Tensor, ...]:
    """All directions: `make_cell(d)` gives a cell and the map from x to its gate input."""
    if layout:
        x, initial = x.transpose(0, 1), [state.transpose(0, 1) for state in initial]
    backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    parts = []
    for d, reverse in enumerate(backwards):
        cell, gates = make_cell(d)
        parts.append(_scan(cell, gates(x), [state[d] for state in initial], lengths, reverse))
    outputs, *finals = (torch.stack(part) for part in zip(*parts, strict=True))
    if layout:
        return outputs.permute(2, 1, 0, 3), *(state.transpose(0, 1) for state in finals)
    return outputs.transpose(0, 1), *finals


def _initial(x: Tensor, w: Tensor, hidden: int, layout: int, given: Tensor | None) -> Tensor:
    if given is not None:
        return given
    batch = x.shape[0] if layout else x.shape[1]
    shape = (batch, len(w), hidden) if layout else (len(w), batch, hidden)
    return torch.zeros(shape, dtype=x.dtype, device=x.device)


def _biases(b: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor]:
    """The biases of input and recurrence, [d, gates * hidden] each."""
    if b is None:
        zero = torch.zeros(w.shape[:2], dtype=w.dtype, device=w.device)
        return zero, zero
    first, second = b.chunk(2, 1)
    return first, second


def _bounded(x: Tensor, clip: float | None) -> Tensor:
    return x if clip is None else x.clamp(-clip, clip)


@operator("RNN", since=7)
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    activations: Sequence[str] = (),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """`h' = f(x W^T + h R^T + b)`; outputs [t, d, n, h] and the last state [d, n, h]."""
    functions = _functions(activations or ["Tanh"] * len(w), activation_alpha, activation_beta)
    wb, rb = _biases(b, w)

    def make(d: int) -> tuple[Cell, Callable[[Tensor], Tensor]]:
        def cell(gates: Tensor, state: Tensor) -> list[Tensor]:
            return [functions[d](_bounded(gates + state @ r[d].T, clip))]

        return cell, lambda x: x @ w[d].T + (wb[d] + rb[d])

    return _run(make, x, [_initial(x, w, r.shape[-1], layout, h)], lengths, direction, layout)


@operator("GRU", since=7)
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    activations: Sequence[str] = (),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """Gated recurrent units, gates z, r, h; outputs [t, d, n, h] and the last state [d, n, h]."""
    functions = _functions(activations or ["Sigmoid", "Tanh"] * len(w), activation_alpha, activation_beta)
    wb, rb = _biases(b, w)
    size = r.shape[-1]

    def make(d: int) -> tuple[Cell, Callable[[Tensor], Tensor]]:
        f, g = functions[2 * d : 2 * d + 2]

        def cell(gates: Tensor, state: Tensor) -> list[Tensor]:
            update = gates[:, : 2 * size] + state @ r[d, : 2 * size].T + rb[d, : 2 * size]
            z, reset = f(_bounded(update, clip)).chunk(2, 1)
            if linear_before_reset:
                past = reset * (state @ r[d, 2 * size :].T + rb[d, 2 * size :])
            else:
                past = (reset * state) @ r[d, 2 * size :].T + rb[d, 2 * size :]
            fresh = g(_bounded(gates[:, 2 * size :] + past, clip))
            return [(1 - z) * fresh + z * state]

        return cell, lambda x: x @ w[d].T + wb[d]

    return _run(make, x, [_initial(x, w, size, layout, h)], lengths, direction, layout)


@operator("LSTM", since=7)
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    activations: Sequence[str] = (),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """Long short-term memory, gates i, o, f, c; outputs [t, d, n, h], the last state and the last cell [d, n, h]."""
    functions = _functions(activations or ["Sigmoid", "Tanh", "Tanh"] * len(w), activation_alpha, activation_beta)
    wb, rb = _biases(b, w)
    size = r.shape[-1]

    def make(d: int) -> tuple[Cell, Callable[[Tensor], Tensor]]:
        f, g, k = functions[3 * d : 3 * d + 3]
        holes = None if peepholes is None else peepholes[d].chunk(3)

        def cell(gates: Tensor, state: Tensor, memory: Tensor) -> list[Tensor]:
            i, o, forget, fresh = (gates + state @ r[d].T).chunk(4, 1)
            if holes is not None:
                i, forget = i + holes[0] * memory, forget + holes[2] * memory
            i = f(_bounded(i, clip))
            keep = 1 - i if input_forget else f(_bounded(forget, clip))
            memory = keep * memory + i * g(_bounded(fresh, clip))
            if holes is not None:
                o = o + holes[1] * memory
            return [f(_bounded(o, clip)) * k(memory), memory]

        return cell, lambda x: x @ w[d].T + (wb[d] + rb[d])

    initial = [_initial(x, w, size, layout, h), _initial(x, w, size, layout, c)]
    return _run(make, x, initial, lengths, direction, layout)

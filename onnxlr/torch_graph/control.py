"""If, Loop and Scan: bodies that run with the names of the scope around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onnxlr.torch_graph.registry import RefusedError, operator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Runner = Any
"""`runner(body, *inputs)` runs a body in the scope of its node and returns its outputs, in order."""


@operator("If")
def if_(condition: Tensor, *, then_branch: Any, else_branch: Any, runner: Runner) -> tuple[Tensor, ...]:
    """One of two bodies."""
    return tuple(runner(then_branch if bool(condition) else else_branch))


@operator("Loop")
def loop(
    count: Tensor | None = None, condition: Tensor | None = None, *carried: Tensor, body: Any, runner: Runner
) -> tuple[Tensor, ...]:
    """A body run `count` times or while its condition holds; carried values, then what each run gave, stacked."""
    states = list(carried)
    gathered: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(states))]
    going = True if condition is None else bool(condition)
    limit = None if count is None else int(count)
    i = 0
    while going and (limit is None or i < limit):
        flag = torch.tensor(going)
        keep, *results = runner(body, torch.tensor(i), flag, *states)
        going, states = bool(keep), results[: len(states)]
        for values, value in zip(gathered, results[len(states) :], strict=True):
            values.append(value)
        i += 1
    return *states, *(torch.stack(values) if values else torch.zeros(0) for values in gathered)


def _each(values: Sequence[int], count: int) -> Sequence[int]:
    return list(values) or [0] * count


def _scan(
    values: Sequence[Tensor],
    body: Any,
    runner: Callable[..., list[Tensor]],
    inputs: int,
    axes: tuple[Sequence[int], Sequence[int]],
    directions: tuple[Sequence[int], Sequence[int]],
) -> tuple[Tensor, ...]:
    states = list(values[: len(values) - inputs])
    streams = [
        stream.flip(axis).unbind(axis) if backwards else stream.unbind(axis)
        for stream, axis, backwards in zip(values[len(states) :], axes[0], directions[0], strict=True)
    ]
    gathered: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - len(states))]
    for parts in zip(*streams, strict=True):
        results = runner(body, *states, *parts)
        states = results[: len(states)]
        for outputs, output in zip(gathered, results[len(states) :], strict=True):
            outputs.append(output)
    stacked = [
        torch.stack(list(reversed(outputs)) if backwards else outputs, axis)
        for outputs, axis, backwards in zip(gathered, axes[1], directions[1], strict=True)
    ]
    return *states, *stacked


@operator("Scan", since=8)
def scan_8(
    lengths: Tensor | None,
    *values: Tensor,
    body: Any,
    num_scan_inputs: int,
    directions: Sequence[int] = (),
    runner: Runner,
) -> tuple[Tensor, ...]:
    """A body over sequences, sample by sample of a batch, all of full length."""
    if lengths is not None:
        raise RefusedError("sequence lengths")
    count = len(body.outputs) - len(values) + num_scan_inputs
    one_way = (_each(directions, num_scan_inputs), [0] * count)
    samples = [
        _scan(
            [value[i] for value in values], body, runner, num_scan_inputs, ([0] * num_scan_inputs, [0] * count), one_way
        )
        for i in range(len(values[0]))
    ]
    return tuple(torch.stack(outputs) for outputs in zip(*samples, strict=True))


@operator("Scan", since=9)
def scan(
    *values: Tensor,
    body: Any,
    num_scan_inputs: int,
    runner: Runner,
    scan_input_axes: Sequence[int] = (),
    scan_input_directions: Sequence[int] = (),
    scan_output_axes: Sequence[int] = (),
    scan_output_directions: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """A body over slices of its last inputs; the states, then what each run gave, stacked."""
    count = len(body.outputs) - len(values) + num_scan_inputs
    axes = _each(scan_input_axes, num_scan_inputs), _each(scan_output_axes, count)
    directions = _each(scan_input_directions, num_scan_inputs), _each(scan_output_directions, count)
    return _scan(values, body, runner, num_scan_inputs, axes, directions)

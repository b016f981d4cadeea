"""Weights as an optimizer sees them, and their running average.

AdamW moves float32 copies of weights that are stored in fewer bits: steps smaller than half a unit in the last place of
a float16 would be lost. The average of the last steps (Polyak and Juditsky 1992) is what is validated and kept.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor


class Weights:
    """Trained parameters by ONNX name, their float32 masters and the masters' average.

    Parameters
    ----------
    parameters
        Of the module, by name; they come to require gradients.
    horizon
        Steps over which the average reaches back.
    """

    def __init__(self, parameters: Mapping[str, Any], horizon: int) -> None:
        self._parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            parameter.requires_grad_()
            full = parameter.dtype in (torch.float32, torch.float64)
            self.masters[name] = parameter if full else parameter.detach().float().clone().requires_grad_()
        self.average = {name: master.detach().clone() for name, master in self.masters.items()}
        self._decay = 1 - 1 / max(1, horizon)

    def take_gradients(self) -> None:
        """Hand the parameters' gradients to their masters."""
        for name, parameter in self._parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is Any to mypy
    def follow(self, step: int) -> None:
        """After a step of the optimizer: parameters take their masters' values, the average moves."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            master = self.masters[name]
            if master is not parameter:
                parameter.copy_(master)
            self.average[name].lerp_(master.detach(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters at the average, as long as the block runs."""
        now = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.load(self.average)
        try:
            yield
        finally:
            self.load(now)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def restart(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters, masters and average."""
        for name, value in values.items():
            self.masters[name].copy_(value)
            self.average[name].copy_(value)
        self.load(values)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the parameters, but not masters that are apart from them."""
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

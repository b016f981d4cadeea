"""What every kind of reference becomes: a torch model, example inputs by name, and what is known of both."""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from onnxlr.errors import InstallError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.export import ExportedProgram

    from onnxlr.data import ImageOptions
    from onnxlr.reference import Reference


@dataclass(frozen=True, slots=True, eq=False)
class TorchModel:
    """A torch model that can be run and exported.

    Attributes
    ----------
    name
        The reference, for messages.
    module
        The model, in evaluation mode.
    args, kwargs
        Example inputs, positional and by keyword: tensors.
    inputs
        The name of every example input, positional ones first.
    outputs
        Names of the outputs, where the library gives them a meaning; the model's own otherwise.
    images
        How images become its input, where the library says.
    program
        What `torch.export` made of it already, with its dynamic axes.
    """

    name: str
    module: Any
    args: tuple[torch.Tensor, ...]
    kwargs: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    images: ImageOptions | None = None
    program: ExportedProgram | None = None

    @property
    def example(self) -> dict[str, torch.Tensor]:
        """The example inputs by name."""
        return dict(zip(self.inputs, (*self.args, *self.kwargs.values()), strict=True))

    def run(self, feed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name, in the order in which torch flattens them, for inputs by name.

        Raises
        ------
        ModelError
            The model raises, or returns something that is no tensor.
        """
        values = [feed[name] for name in self.inputs]
        count = len(self.args)
        try:
            with torch.inference_mode(), quietly():
                found = self.module(*values[:count], **dict(zip(self.kwargs, values[count:], strict=True)))
        except Exception as error:  # whatever the model raises
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in feed.items())
            raise ModelError(f"{self.name} fails in torch on inputs ({shapes}): {first_line(error)}") from error
        flat = flatten(found, self.name)
        names = self.outputs if len(self.outputs) == len(flat) else tuple(flat)
        # a tensor of an ONNX graph has one name
        return {f"{n}_out" if n in self.inputs else n: t for n, t in zip(names, flat.values(), strict=True)}


def with_examples(reference: Reference, module: torch.nn.Module, example: object, **known: Any) -> TorchModel:
    """A `TorchModel` of a module and its example inputs, a tuple of tensors or a mapping by name of `forward`'s inputs.

    Raises
    ------
    ModelError
        The inputs are no tensors, or `forward` does not take them.
    """
    given = example if isinstance(example, dict) else (example,) if isinstance(example, torch.Tensor) else example
    values = list(given.values()) if isinstance(given, dict) else given
    if not (isinstance(values, (tuple, list)) and values and all(isinstance(v, torch.Tensor) for v in values)):
        raise ModelError(
            f"{reference}: the example inputs are {describe(example)}; expected a tuple of tensors, or a dict of "
            "tensors by input name"
        )
    args, kwargs = ((), dict(given)) if isinstance(given, dict) else (tuple(values), {})
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ModelError(
            f"{reference}: {type(module).__name__}.forward{signature} does not take the example inputs: {error}"
        ) from None
    names = [name for parameter, value in bound.items() for name in _names(parameter, value)]
    kwargs = {name: kwargs[name] for name in names if name in kwargs}  # torch.export flattens them in this order
    return TorchModel(str(reference), module.eval(), args, kwargs, tuple(names), **known)


def flatten(found: Any, where: str, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors in what a model returns, by name: keys of mappings and named tuples, else positions; None has none.

    Raises
    ------
    ModelError
        Something in it is no tensor.
    """
    if isinstance(found, torch.Tensor):
        return {path or "output": found}
    if found is None:
        return {}
    if isinstance(found, dict):
        items = [(str(key), value) for key, value in found.items()]
        prefix = f"{path}_" if path else ""
    elif isinstance(found, (tuple, list)):
        fields = getattr(found, "_fields", None)
        items = list(zip(fields or map(str, range(len(found))), found, strict=True))
        prefix = f"{path}_" if path else "" if fields else "output_"
    else:
        what = f"its output {path!r}" if path else "what it returns"
        raise ModelError(f"{where}: {what} is {describe(found)}; expected tensors, or tuples and dicts of them")
    return {name: t for key, value in items for name, t in flatten(value, where, prefix + key).items()}


def import_library(reference: Reference, package: str) -> Any:
    """A library that a reference needs.

    Raises
    ------
    InstallError
        It is not installed, or not for this torch.
    """
    try:
        with quietly():
            return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # a RuntimeError comes from operators built for another torch
        name = package.partition(".")[0]
        raise InstallError(
            f"{reference} needs {name}, which cannot be imported ({first_line(error)}): `pip install {name}`"
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Keep libraries' warnings and log lines, which speak to their own developers, from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Random numbers that are the same in every run; the caller's generator is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def unfetched(reference: Reference, error: Exception) -> ModelError:
    """The error for weights that a library could not get."""
    return ModelError(
        f"the pretrained weights of {reference} cannot be had ({first_line(error)}): check the connection or the "
        f"folder, or ask for random weights: {reference}@random"
    )


def first_line(error: BaseException) -> str:
    """The type and the first line of the error at the root of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _names(parameter: str, value: object) -> Sequence[str]:
    """The names of a bound parameter: its own, those of `**kwargs`, or one an element of `*args`."""
    if isinstance(value, dict):
        return list(value)
    return [f"{parameter}_{place}" for place in range(len(value))] if isinstance(value, tuple) else [parameter]


def describe(value: object) -> str:
    """What something is, for a message: a tuple of Linear, int."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value[:4]) or 'nothing'}"
    return f"a {type(value).__name__}"

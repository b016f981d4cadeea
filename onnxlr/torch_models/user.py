"""A user's own models: a function that returns one, or a program that `torch.export` saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from onnxlr.errors import ConfigError, ModelError
from onnxlr.task_metrics import load_function
from onnxlr.torch_models.source import TorchModel, describe, first_line, quietly, with_examples

if TYPE_CHECKING:
    from onnxlr.reference import Reference


def open_callable(reference: Reference) -> TorchModel:
    """The model that `module:callable` returns beside its example inputs.

    The module is imported with the current folder on the path; the model is put into evaluation mode.

    Raises
    ------
    ConfigError
        There is no such callable.
    ModelError
        It raises, or returns something else than (model, example_inputs).
    """
    try:
        make = load_function("reference", reference.name, {})
    except ConfigError as error:
        raise ConfigError(f"{error}; models of libraries are timm:NAME, torchvision:NAME and hf:NAME") from error
    try:
        made = make()
    except Exception as error:  # whatever the user's function raises
        raise ModelError(f"{reference} fails: {first_line(error)}") from error
    if not (isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], torch.nn.Module)):
        raise ModelError(
            f"{reference} returns {describe(made)}; expected (model, example_inputs), a torch.nn.Module and a tuple or "
            "dict of tensors"
        )
    return with_examples(reference, *made)


def open_program(reference: Reference) -> TorchModel:
    """The program in a .pt2 file, with the example inputs that it was exported with.

    Raises
    ------
    ModelError
        The file is missing, is none, or was saved without example inputs.
    """
    path = Path(reference.name)
    if not path.is_file():
        raise ModelError(f"{path} does not exist")
    try:
        with quietly():
            program = torch.export.load(path)
            module = program.module()
    except Exception as error:  # torch raises what it likes on a damaged file
        raise ModelError(f"{path} is no program that torch.export.save wrote: {first_line(error)}") from error
    if program.example_inputs is None:
        raise ModelError(f"{path} holds no example inputs: save it again with those that torch.export.export was given")
    args, kwargs = program.example_inputs
    names = tuple(program.graph_signature.user_inputs)
    if len(names) != len(args) + len(kwargs) or not all(isinstance(v, torch.Tensor) for v in (*args, *kwargs.values())):
        raise ModelError(f"{path}: its inputs are not plain tensors; export a model whose forward takes tensors")
    return TorchModel(str(reference), module, tuple(args), dict(kwargs), names, program=program)

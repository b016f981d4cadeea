"""References: names of torch models that stand where a model file can stand.

    timm:NAME                     of the library timm, with its pretrained weights
    torchvision:NAME              of torchvision, likewise
    hf:NAME_OR_FOLDER             of transformers: a name on the hub, or a folder with config.json and weights
    module:callable               a function of one's own that returns (model, example_inputs)
    FILE.pt2                      an ExportedProgram that `torch.export.save` wrote

`@random` behind the name of a library's model asks for its architecture with random weights, the same in every run:
`timm:vit_tiny_patch16_224@random`. A file or folder that exists is always a path, whatever it looks like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from onnxlr.errors import ConfigError

LIBRARIES = ("timm", "torchvision", "hf")
RANDOM = "@random"
FORMS = "timm:NAME, torchvision:NAME, hf:NAME_OR_FOLDER, module:callable or a .pt2 file"

_CALLABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True, slots=True)
class Reference:
    """A torch model by name.

    Attributes
    ----------
    text
        As it was given.
    kind
        One of `LIBRARIES`, "callable" or "program".
    name
        What the kind knows it by: a model's name, `module:callable`, a path.
    random
        Random weights, where a library has pretrained ones.
    """

    text: str
    kind: str
    name: str
    random: bool = False

    def __str__(self) -> str:
        """As it was given."""
        return self.text


def find_reference(text: str) -> Reference | None:
    """The reference that `text` is; None for a path.

    Raises
    ------
    ConfigError
        The scheme of a library without a name.
    """
    if text.endswith(".pt2"):
        return Reference(text, "program", text)
    if Path(text).exists():
        return None
    kind, colon, name = text.partition(":")
    if kind in LIBRARIES and colon:
        if not name.removesuffix(RANDOM):
            raise ConfigError(f"{text!r} names no model: give {kind}:NAME")
        return Reference(text, kind, name.removesuffix(RANDOM), name.endswith(RANDOM))
    return Reference(text, "callable", text) if _CALLABLE.fullmatch(text) else None


def parse_reference(text: str) -> Reference:
    """The reference that `text` is.

    Raises
    ------
    ConfigError
        It is none.
    """
    reference = find_reference(text)
    if reference is None:
        what = "is a file or folder" if Path(text).exists() else "is no reference to a torch model"
        raise ConfigError(f"{text!r} {what}: expected {FORMS}")
    return reference

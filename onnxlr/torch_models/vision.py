"""Image models of timm and torchvision, with the preprocessing that each of them states.

The input is `images` [N, 3, H, W]. The output is `logits` [N, classes] where the model classifies, `features` where it
was made without a head; torchvision's segmentation models name their own (`out`, `aux`).
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from onnxlr.data import ImageOptions
from onnxlr.errors import ConfigError
from onnxlr.torch_models.source import fixed_seed, import_library, quietly, unfetched, with_examples

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnxlr.reference import Reference
    from onnxlr.torch_models.source import TorchModel


def open_timm(reference: Reference) -> TorchModel:
    """A model of timm, `timm:NAME`, or `timm:NAME.TAG` for certain weights.

    Raises
    ------
    ConfigError, ModelError, InstallError
        timm has no such model, its weights cannot be fetched, or timm is not installed.
    """
    timm = import_library(reference, "timm")
    if not timm.is_model(reference.name.partition(".")[0]):
        raise _unknown(reference, timm.list_models())
    try:
        with quietly(), fixed_seed():
            model = timm.create_model(reference.name, pretrained=not reference.random)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise unfetched(reference, error) from error
    config = timm.data.resolve_data_config({}, model=model)
    side = tuple(round(length / config["crop_pct"]) for length in config["input_size"][1:])
    images = ImageOptions(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize=(side[0], side[1]) if config["crop_mode"] == "squash" else None,
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
    )
    output = "logits" if getattr(model, "num_classes", 0) else "features"
    return _image_model(reference, model, config["input_size"], (output,), images)


def open_torchvision(reference: Reference) -> TorchModel:
    """A model of torchvision that takes a batch of images, `torchvision:NAME`.

    Raises
    ------
    ConfigError, ModelError, InstallError
        torchvision has no such model, it does not take a batch of images, its weights cannot be fetched, or torchvision
        is not installed.
    """
    models = import_library(reference, "torchvision.models")
    if reference.name not in models.list_models():
        raise _unknown(reference, models.list_models())
    weights: Any = models.get_model_weights(reference.name).DEFAULT
    preset = weights.transforms()
    side = getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None)
    family = type(weights).__module__.removeprefix("torchvision.models.").partition(".")[0]
    if side is None or family in ("detection", "video", "quantization", "optical_flow"):
        raise ConfigError(
            f"{reference} is of torchvision's {family} models, which do not take a batch of images: export it through "
            "a module:callable of your own"
        )
    try:
        with quietly(), fixed_seed():
            model = models.get_model(reference.name, weights=None if reference.random else weights)
    except Exception as error:  # urllib's errors, a broken download
        raise unfetched(reference, error) from error
    images = ImageOptions(
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
    )
    return _image_model(reference, model, (3, side[0], side[-1]), ("logits",), images)


def _image_model(
    reference: Reference, model: Any, size: tuple[int, ...], outputs: tuple[str, ...], images: ImageOptions
) -> TorchModel:
    if reference.random:
        _fill_zeros(model)
    example = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    return replace(with_examples(reference, model, (example,), outputs=outputs, images=images), inputs=("images",))


def _fill_zeros(model: Any) -> None:
    """Give heads that a library begins at zero random weights too, or the model's outputs would say nothing of it."""
    with torch.no_grad(), fixed_seed():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)


def _unknown(reference: Reference, names: Iterable[str]) -> ConfigError:
    close = difflib.get_close_matches(reference.name, list(names), 3)
    hint = f"did you mean {', '.join(close)}?" if close else f"{reference.kind}.list_models() lists what there is"
    return ConfigError(f"{reference.kind} has no model {reference.name!r}: {hint}")

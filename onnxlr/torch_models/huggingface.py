"""Encoders, classifiers and decoders of transformers, from the hub or from a folder.

The class is the one that the config's `architectures` names, `AutoModel` where it names none, in fp32, with eager
attention: plain MatMul, Add and Softmax. Inputs and outputs have the library's own names: `input_ids`,
`attention_mask` and, where there are token types, `token_type_ids`, int64 [batch, sequence]; or `pixel_values`
[batch, channels, height, width]; `last_hidden_state`, `logits`. Caches of decoders are left out.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from onnxlr.data import ImageOptions
from onnxlr.errors import ConfigError, ModelError
from onnxlr.torch_models.source import (
    first_line,
    fixed_seed,
    import_library,
    quietly,
    unfetched,
    with_examples,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from onnxlr.reference import Reference
    from onnxlr.torch_models.source import TorchModel

SEQUENCE = 8
"""Tokens of the example sentences."""

_SIDE = 224
"""Height and width of images for models that take any."""

_RESAMPLING: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that `ImageOptions` knows."""


def open_huggingface(reference: Reference) -> TorchModel:
    """A model of transformers, by its name on the hub or its folder.

    Raises
    ------
    ConfigError
        Its architecture is not one of transformers' own, or takes neither one text nor one image.
    ModelError
        The config cannot be read, or weights cannot be fetched.
    InstallError
        transformers is not installed.
    """
    transformers = import_library(reference, "transformers")
    local = Path(reference.name).is_dir()
    where: dict[str, Any] = {"local_files_only": local}
    try:
        with quietly():
            config = transformers.AutoConfig.from_pretrained(
                reference.name, attn_implementation="eager", use_cache=False, **where
            )
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise ModelError(
            f"the config of {reference} cannot be had ({first_line(error)}): give a folder with a config.json, or a "
            "name on the hub and a connection to it"
        ) from error
    if config.is_encoder_decoder:
        raise ConfigError(
            f"{reference} is an encoder and a decoder in one ({config.model_type}): export each through a "
            "module:callable of your own"
        )
    model = _build(transformers, reference, config, where)
    kind = model.main_input_name
    if kind == "input_ids":
        return with_examples(reference, model, _texts(model))
    if kind == "pixel_values":
        images = _preprocessing(transformers, reference, where)
        return with_examples(reference, model, {kind: _image(config)}, images=images)
    raise ConfigError(f"{reference} takes {kind!r}, neither text nor images: export it through a module:callable")


def _build(transformers: Any, reference: Reference, config: Any, where: dict[str, Any]) -> Any:
    named = next(iter(config.architectures or []), "AutoModel")
    kind = getattr(transformers, named, None)
    if kind is None:
        raise ConfigError(
            f"{reference} is a {named}, which is not one of transformers' own: export it through a module:callable"
        )
    if reference.random:
        with quietly(), fixed_seed():
            return kind.from_config(config) if named == "AutoModel" else kind(config).float()
    try:
        with quietly(), _no_bar(transformers) if where["local_files_only"] else nullcontext():
            model, found = kind.from_pretrained(
                reference.name, config=config, dtype=torch.float32, output_loading_info=True, **where
            )
    except Exception as error:
        raise unfetched(reference, error) from error
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        warnings.warn(f"{reference} has no weights for {missing[0]}{more}: they are random", stacklevel=2)
    return model


@contextmanager
def _no_bar(transformers: Any) -> Iterator[None]:
    """Loading from a disk takes a moment, and its bar would be in the way of a program's own messages."""
    log = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def _texts(model: Any) -> dict[str, torch.Tensor]:
    """Two sentences of random tokens; the first is padded, or its mask would be taken for a constant."""
    config = model.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (2, SEQUENCE), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, SEQUENCE - 3 :] = 0
    texts = {"input_ids": ids, "attention_mask": mask}
    taken = inspect.signature(model.forward).parameters
    if "token_type_ids" in taken and getattr(config, "type_vocab_size", 0) > 1:
        texts["token_type_ids"] = torch.zeros_like(ids)
    return {name: tensor for name, tensor in texts.items() if name in taken}


def _image(config: Any) -> torch.Tensor:
    size = getattr(config, "image_size", None) or _SIDE
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def _preprocessing(transformers: Any, reference: Reference, where: dict[str, Any]) -> ImageOptions | None:
    """What preprocessor_config.json says; None where there is no such file."""
    processors = transformers.models.auto.image_processing_auto
    try:
        with quietly():
            stated = processors.get_image_processor_config(reference.name, **where)
    except Exception as error:
        raise unfetched(reference, error) from error
    if not stated:
        return None
    size = stated.get("size") or {}
    sides = (size, size) if isinstance(size, int) else (size.get("height"), size.get("width"))
    normalized = stated.get("do_normalize", True)
    return ImageOptions(
        mean=_values(stated.get("image_mean")) if normalized else (0.0,),
        std=_values(stated.get("image_std")) if normalized else (1.0,),
        resize=(sides[0], sides[1]) if sides[0] and sides[1] else size.get("shortest_edge"),
        interpolation=_RESAMPLING.get(stated.get("resample", 2), "bilinear"),
    )


def _values(stated: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if stated is None else tuple(stated)

"""Folders of images for models with one image input: layout and size come from the input's shape.

An image of h x w pixels is resized, cut to the model's H x W at its centre, scaled to [0, 1], and normalized:

    y[c] = (x[c] / 255 - mean[c]) / std[c]        float inputs
    y[c] = x[c]                                   integer inputs, 0 to 255

The conventions of `ImageOptions.convention` are those the common model collections evaluate with:

    model         what the model's own metadata say, under `IMAGES_KEY`; as unit where they say nothing
    none, unit    resized to cover H x W (bilinear), centre crop; values in [0, 1]
    torchvision   resized to cover H x W / 0.875 (256 for 224; bilinear), centre crop; ImageNet mean and std
    timm          the same with bicubic resampling; mean 0.5, std 0.5: values in [-1, 1] ("inception" normalization)

Orientation tags (EXIF) are not applied, as those collections do not apply them either.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from onnxlr.data.fit import fit
from onnxlr.data.spec import Array, Sample, TensorSpec, names
from onnxlr.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

IMAGES_KEY = "onnxlr.images"
"""Where a model's metadata hold its `ImageOptions`, as JSON: models that `onnxlr export` wrote have them."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How an image becomes a model's input; what is None is as the model's metadata say, if they do.

    Attributes
    ----------
    mean, std : tuple of float or None
        For float inputs: one value a channel, or one for all; None is 0 and 1.
    resize : int, (int, int) or None
        An int: the shorter side, aspect kept. A pair: exactly that height and width. None: covers the crop divided by
        `crop_pct`, aspect kept.
    crop : int, (int, int) or None
        Height and width cut out of the centre. None: the model's own; where those are dynamic, nothing is cut.
    crop_pct : float or None
        Share of the resized image that the crop keeps, in (0, 1]; only used where `resize` is None. None is 1.
    interpolation : "bilinear", "bicubic" or None
        The filter of the resize, always antialiased. None is bilinear.

    Raises
    ------
    ConfigError
        For a value out of its range.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    crop_pct: float | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for what, size in (("resize", self.resize), ("crop", self.crop)):
            sides = (size,) if size is None or isinstance(size, int) else tuple(size)
            if len(sides) > 2 or any(side is not None and side < 1 for side in sides):
                raise ConfigError(f"image {what} {size!r}: expected a side or (height, width) of at least 1 pixel")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f"image crop_pct {self.crop_pct}: expected a share above 0 and up to 1")
        if self.interpolation not in (None, "bilinear", "bicubic"):
            raise ConfigError(f"image interpolation {self.interpolation!r}: expected 'bilinear' or 'bicubic'")
        if not all(isfinite(value) for value in self.mean or ()):
            raise ConfigError(f"image mean {self.mean}: expected finite values")
        if not all(isfinite(value) and value > 0 for value in self.std or ()):
            raise ConfigError(f"image std {self.std}: expected values above 0")

    @classmethod
    def convention(cls, name: str) -> ImageOptions:
        """Return the options of a convention: "model", "unit", "torchvision" or "timm".

        Raises ConfigError for any other name.
        """
        if name not in _CONVENTIONS:
            raise ConfigError(f"image convention {name!r}: expected one of {', '.join(_CONVENTIONS)}")
        return _CONVENTIONS[name]

    def to_json(self) -> str:
        """What is not None, as a JSON object."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None})

    def or_stated(self, stated: str | None, where: str) -> ImageOptions:
        """Return these options with what a model's metadata state, as JSON, in the place of None.

        Raises ModelError where the metadata are no `ImageOptions`; `where` is the model.
        """
        if stated is None:
            return self
        try:
            given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(stated).items()}
            own = ImageOptions(**given)
        except (ValueError, TypeError, AttributeError, ConfigError) as error:
            raise ModelError(
                f"{where}: its metadata {IMAGES_KEY!r} are no image options ({error}): remove or correct them"
            ) from error
        # how far to shrink an image and how much of it to keep are one decision
        kept = {"resize", "crop_pct"} if self.resize or self.crop_pct else set()
        lacking = [f.name for f in fields(self) if getattr(self, f.name) is None and f.name not in kept]
        return replace(self, **{name: getattr(own, name) for name in lacking})


_CONVENTIONS = {
    "model": ImageOptions(),
    "unit": ImageOptions(mean=(0.0,), std=(1.0,), crop_pct=1.0, interpolation="bilinear"),
    "torchvision": ImageOptions(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.875, interpolation="bilinear"
    ),
    "timm": ImageOptions(mean=(0.5,), std=(0.5,), crop_pct=0.875, interpolation="bicubic"),
}


class ImageReader:
    """Turns image files into samples of one model; made once, so that what cannot work is said before any is opened.

    Parameters
    ----------
    inputs : sequence of TensorSpec
        One input: `[N, C, H, W]`, `[N, H, W, C]`, `[C, H, W]`, `[H, W, C]` with C 1 or 3, or gray `[N, H, W]`.
    options : ImageOptions
        Resize, crop and normalization.

    Raises
    ------
    DataError
        Where the model has no such input, or dynamic H, W and no size in the options.
    ConfigError
        Where mean, std, resize or crop contradict the input.
    """

    def __init__(self, inputs: list[TensorSpec], options: ImageOptions) -> None:
        if len(inputs) != 1:
            raise DataError(
                f"images feed a model with one input, this one has {len(inputs)}: {names(inputs)}; give .npz"
            )
        self._inputs = inputs
        self._options = options
        self._channel_axis = _channel_axis(inputs[0])
        shape = inputs[0].shape
        spatial = [dim for axis, dim in enumerate(shape) if axis != self._channel_axis][-2:]
        self._channels = 3 if self._channel_axis is not None and shape[self._channel_axis] == 3 else 1
        self._crop = self._find_crop(spatial)
        for what, values in (("mean", options.mean), ("std", options.std)):
            if values is not None and len(values) not in (1, self._channels):
                raise ConfigError(
                    f"image {what} has {len(values)} values, input {inputs[0].name!r} ({inputs[0]}) has "
                    f"{self._channels} channels; give one value, or one a channel"
                )

    def _find_crop(self, spatial: list[int | str | None]) -> tuple[int, int] | None:
        spec, crop, resize = self._inputs[0], self._options.crop, self._options.resize
        wanted = (crop, crop) if isinstance(crop, int) else crop
        if isinstance(spatial[0], int) and isinstance(spatial[1], int):
            model = (spatial[0], spatial[1])
            if wanted not in (None, model):
                raise ConfigError(f"image crop {crop}: input {spec.name!r} ({spec}) takes {model} only; leave crop out")
            wanted = model
        elif wanted is None and resize is None:
            raise DataError(
                f"input {spec.name!r} ({spec}) has a dynamic height or width; say how large images are to be: "
                "set resize or crop of the image options"
            )
        if wanted and resize and any(s < w for s, w in zip(_pair(resize), wanted, strict=True)):
            raise ConfigError(f"image resize {resize}: smaller than the {wanted} cut out of it; resize to more")
        return wanted

    def __call__(self, path: Path) -> Sample:
        """Read one image as one sample.

        Raises DataError for a file that cannot be decoded or has more than 8 bits a channel.
        """
        spec = self._inputs[0]
        pixels = self._load(path)
        if self._channel_axis is not None:
            pixels = pixels.reshape(*pixels.shape[:2], self._channels)
        values: Array = pixels
        if spec.dtype.kind not in "iu":
            mean = np.asarray(self._options.mean or (0.0,), np.float32)
            std = np.asarray(self._options.std or (1.0,), np.float32)
            values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        if self._channel_axis is not None and self._channel_axis == len(spec.shape) - 3:
            values = values.transpose(2, 0, 1)
        if values.ndim == len(spec.shape) - 1:
            values = values[np.newaxis]
        return fit({spec.name: values}, self._inputs, str(path))

    def _load(self, path: Path) -> Array:
        """Return uint8 `[h, w]` or `[h, w, 3]`, resized and cropped."""
        from PIL import Image

        try:
            with Image.open(path) as opened:
                if opened.mode.startswith(("I", "F")):
                    raise DataError(
                        f"{path}: {opened.mode} image, more than 8 bits a channel; convert it, or give .npz"
                    )
                # PIL warns about the direct way from a transparent palette.
                transparent = opened.mode == "P" and "transparency" in opened.info
                image = opened.convert("RGBA") if transparent else opened
                return np.asarray(self._resize_and_crop(image.convert("L" if self._channels == 1 else "RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be decoded as an image ({error}); remove or replace it") from error

    def _resize_and_crop(self, image: Any) -> Any:
        from PIL import Image

        width, height = image.size
        resize, crop = self._options.resize, self._crop
        if isinstance(resize, tuple):
            size = resize
        elif isinstance(resize, int):
            size = _cover(height, width, resize, resize)
        else:
            assert crop is not None  # _find_crop wants one of the two
            size = _cover(height, width, *(int(side / (self._options.crop_pct or 1)) for side in crop))
        if size != (height, width):
            filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
            image = image.resize((size[1], size[0]), filters[self._options.interpolation or "bilinear"])
        if crop and crop != size:
            top, left = round((size[0] - crop[0]) / 2), round((size[1] - crop[1]) / 2)
            image = image.crop((left, top, left + crop[1], top + crop[0]))
        return image


def _channel_axis(spec: TensorSpec) -> int | None:
    """Return the axis of 1 or 3 channels, the leading candidate first; None for gray `[N, H, W]`."""
    rank = len(spec.shape)
    if rank in (3, 4):
        for axis in (rank - 3, rank - 1):
            if spec.shape[axis] in (1, 3):
                return axis
    if rank == 3 and not isinstance(spec.shape[0], int):
        return None
    raise DataError(
        f"input {spec.name!r} ({spec}) is not an image: expected 3 or 4 axes, one of them 1 or 3 channels; "
        "give prepared arrays (.npz) instead"
    )


def _cover(height: int, width: int, least_height: int, least_width: int) -> tuple[int, int]:
    """Return the smallest size of the same aspect that is no smaller than asked for on either side."""
    if least_height * width >= least_width * height:
        return least_height, least_height * width // height
    return least_width * height // width, least_width


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size

"""Folders of images: layouts, sizes, conventions, and images that cannot be used."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from onnxlr.data import ImageOptions, TensorSpec, batches, open_data
from onnxlr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path


def spec(*shape: int | str | None, dtype: object = np.float32) -> list[TensorSpec]:
    return [TensorSpec("image", np.dtype(dtype), shape)]


def photo(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 256, (height, width, channels)[: 2 if channels == 1 else 3], dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def only(source: Path, inputs: list[TensorSpec], images: ImageOptions | None = None) -> np.ndarray:
    (sample,) = open_data(source, inputs, images=images or ImageOptions())
    return sample["image"]


def test_images_are_found_in_subfolders_and_sorted(tmp_path: Path) -> None:
    for number, name in enumerate(["a/1.png", "a/2.PNG", "b/0.bmp", "c.png"]):
        save(tmp_path / name, np.full((4, 4, 3), number, np.uint8))
    (tmp_path / "a" / "labels.csv").write_text("1\n")
    data = open_data(tmp_path, spec("N", 3, 4, 4, dtype=np.uint8))
    for _ in range(2):
        assert [int(sample["image"].max()) for sample in data] == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "gif", "tif", "tiff", "webp"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / f"a.{suffix}", np.full((4, 4, 3), 100, np.uint8))
    assert np.allclose(only(tmp_path, spec("N", 3, 4, 4)), 100 / 255, atol=0.02)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("N", 3, 20, 30), (1, 3, 20, 30)),
        (("N", 20, 30, 3), (1, 20, 30, 3)),
        ((1, 3, 20, 30), (1, 3, 20, 30)),
        ((4, 3, 20, 30), (1, 3, 20, 30)),
        (("N", 1, 20, 30), (1, 1, 20, 30)),
        (("N", 20, 30, 1), (1, 20, 30, 1)),
        ((3, 20, 30), (3, 20, 30)),
        ((20, 30, 3), (20, 30, 3)),
        ((1, 20, 30), (1, 20, 30)),
        (("N", 20, 30), (1, 20, 30)),
    ],
)
def test_layouts(tmp_path: Path, shape: tuple[int | str, ...], expected: tuple[int, ...]) -> None:
    save(tmp_path / "a.png", photo())
    color = 3 in shape
    pixels = np.asarray(Image.fromarray(photo()).convert("RGB" if color else "L")).reshape(20, 30, -1)
    found = only(tmp_path, spec(*shape, dtype=np.uint8))
    assert found.shape == expected
    channels_first = color and expected[-1] != 3
    np.testing.assert_array_equal(found.ravel(), (pixels.transpose(2, 0, 1) if channels_first else pixels).ravel())


def test_an_image_without_batch_axis_is_one_feed(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / f"{number}.png", photo())
    inputs = spec(3, 20, 30)
    feeds = list(batches(open_data(tmp_path, inputs), 8, inputs))
    assert [feed["image"].shape for feed in feeds] == [(3, 20, 30)] * 2


def test_values(tmp_path: Path) -> None:
    save(tmp_path / "a.png", photo())
    raw = photo().transpose(2, 0, 1)[np.newaxis]
    unit = only(tmp_path, spec("N", 3, 20, 30))
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, raw / 255, rtol=1e-6)
    np.testing.assert_array_equal(only(tmp_path, spec("N", 3, 20, 30), ImageOptions.convention("unit")), unit)
    normal = ImageOptions(mean=(0.1, 0.2, 0.3), std=(0.5,))
    expected = (raw / 255 - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / 0.5
    np.testing.assert_allclose(only(tmp_path, spec("N", 3, 20, 30), normal), expected, rtol=1e-5, atol=1e-6)
    assert only(tmp_path, spec("N", 3, 20, 30, dtype=np.float16)).dtype == np.float16
    np.testing.assert_array_equal(only(tmp_path, spec("N", 3, 20, 30, dtype=np.uint8), normal), raw)


def test_conventions_resize_and_crop_as_their_collections_do(tmp_path: Path) -> None:
    save(tmp_path / "a.png", photo(100, 150))
    image = Image.open(tmp_path / "a.png")
    for name, resample in (("torchvision", Image.Resampling.BILINEAR), ("timm", Image.Resampling.BICUBIC)):
        options = replace(ImageOptions.convention(name), mean=None, std=None)
        # 56 / 0.875 = 64 on the shorter side, 64 * 150 / 100 = 96 on the longer; the centre begins at 4 and 20.
        expected = np.asarray(image.resize((96, 64), resample).crop((20, 4, 76, 60))).transpose(2, 0, 1)
        np.testing.assert_allclose(only(tmp_path, spec("N", 3, 56, 56), options)[0], expected / 255, rtol=1e-6)
    imagenet, inception = ImageOptions.convention("torchvision"), ImageOptions.convention("timm")
    assert only(tmp_path, spec("N", 3, 56, 56), imagenet).min() < -1
    assert np.abs(only(tmp_path, spec("N", 3, 56, 56), inception)).max() <= 1
    with pytest.raises(ConfigError, match="image convention 'keras': expected one of model, unit, torch"):
        ImageOptions.convention("keras")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ImageOptions(resize=10), (10, 15)),
        (ImageOptions(resize=(7, 9)), (7, 9)),
        (ImageOptions(crop=8), (8, 8)),
        (ImageOptions(crop=(6, 8), crop_pct=0.5), (6, 8)),
        (ImageOptions(resize=12, crop=(10, 8)), (10, 8)),
        (replace(ImageOptions.convention("torchvision"), crop=14), (14, 14)),
    ],
)
def test_dynamic_sizes_take_the_options(tmp_path: Path, options: ImageOptions, expected: tuple[int, int]) -> None:
    save(tmp_path / "a.png", photo())
    assert only(tmp_path, spec("N", 3, "H", None), options).shape == (1, 3, *expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 97), (333, 7), (28, 28), (29, 31)])
def test_every_size_covers_the_crop(tmp_path: Path, height: int, width: int) -> None:
    save(tmp_path / "a.png", photo(height, width))
    for options in (ImageOptions(), ImageOptions.convention("timm")):
        assert only(tmp_path, spec(None, 3, 28, 20), options).shape == (1, 3, 28, 20)


def test_modes(tmp_path: Path) -> None:
    palette = Image.fromarray(photo()).quantize(16)
    palette.info["transparency"] = bytes(range(16))
    palette.save(tmp_path / "a.png", transparency=bytes(range(16)))
    assert only(tmp_path, spec("N", 3, 20, 30)).shape == (1, 3, 20, 30)
    save(tmp_path / "a.png", photo(channels=1))
    assert only(tmp_path, spec("N", 3, 20, 30)).shape == (1, 3, 20, 30)
    Image.fromarray(np.full((20, 30), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png: I;16 image, more than 8 bits a channel"):
        only(tmp_path, spec("N", 1, 20, 30))


def test_broken_images(tmp_path: Path) -> None:
    save(tmp_path / "a.png", photo())
    whole = (tmp_path / "a.png").read_bytes()
    for content in (b"garbage", b"", whole[: len(whole) // 2]):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=r"a.png: cannot be decoded as an image"):
            only(tmp_path, spec("N", 3, 20, 30))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (spec("N", 3, 4, 4) * 2, "images feed a model with one input, this one has 2: 'image', 'image'"),
        (spec("N", 12), r"input 'image' \(float32 \[N, 12\]\) is not an image"),
        (spec("N", "C", 8, 8), "is not an image: expected 3 or 4 axes, one of them 1 or 3 channels"),
        (spec(5, 8, 8), "is not an image"),
        (spec("N", 3, "H", "W"), "has a dynamic height or width; .*set resize or crop"),
    ],
)
def test_models_that_take_no_images(tmp_path: Path, inputs: list[TensorSpec], message: str) -> None:
    save(tmp_path / "a.png", photo())
    with pytest.raises(DataError, match=message):
        open_data(tmp_path, inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 0}, "image resize 0: expected"),
        ({"crop": (4, 0)}, r"image crop \(4, 0\): expected"),
        ({"crop_pct": 1.5}, "image crop_pct 1.5: expected a share"),
        ({"interpolation": "nearest"}, "image interpolation 'nearest': expected 'bilinear' or 'bicubic'"),
        ({"mean": (float("nan"),)}, "image mean .*: expected finite values"),
        ({"std": (0.0,)}, r"image std \(0.0,\): expected values above 0"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ImageOptions(crop=9), r"image crop 9: input 'image' .* takes \(8, 8\) only"),
        (ImageOptions(resize=(6, 9)), r"image resize \(6, 9\): smaller than the \(8, 8\) cut out of it"),
        (ImageOptions(mean=(0.1, 0.2)), "image mean has 2 values, .* 1 channels; give one value"),
        (ImageOptions.convention("torchvision"), "image mean has 3 values"),
    ],
)
def test_options_that_contradict_the_model(tmp_path: Path, options: ImageOptions, message: str) -> None:
    save(tmp_path / "a.png", photo())
    with pytest.raises(ConfigError, match=message):
        open_data(tmp_path, spec("N", 1, 8, 8), images=options)

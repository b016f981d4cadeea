"""Options that several commands share, and what is made of them."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxlr.config import AUGMENT, ROWS, TRAINED, Tuning, multiple_for
from onnxlr.data import ImageOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

FILE = click.Path(path_type=Path)
SHARE = click.FloatRange(0, 1, min_open=True)
POSITIVE = click.IntRange(min=1)
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
DATA = (
    "a folder of .npz, .npy, images or test_data_set_*, or a file: .npz, .npy, .json (Polygraphy inputs), "
    ".py (a script with load_data())."
)


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, such as 500M or 2.5G."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number, unit = (value[:-1], value[-1].upper()) if value[-1:].isalpha() else (value, "")
        try:
            size = int(float(number) * UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            size = 0
        if size < 1:
            self.fail(f"{value!r} is no size in memory: give bytes, or a number with K, M, G or T, such as 2G")
        return size


def _all(*decorators: Decorator) -> Decorator:
    """Several decorators as one, in the order in which they would stand above a command."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        return reduce(lambda decorated, decorator: decorator(decorated), reversed(decorators), command)

    return decorate


common = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
"""The options of every command."""
watched = _all(
    common,
    click.option("-q", "--quiet", is_flag=True, help="No progress bars."),
)
"""The options of commands that take long."""
reported = _all(
    watched,
    click.option("-v", "--verbose", is_flag=True, help="Every weight and operator, with reasons."),
)
"""The options of commands that report what became of every weight."""
placed = _all(
    click.option(
        "--provider", default="cpu", help="Execution provider: cpu, cuda, tensorrt, ... or onnxruntime's own name."
    ),
    click.option("--threads", default=0, type=click.IntRange(min=0), help="Threads of an operator; 0 is one a core."),
)
"""Where and how onnxruntime runs."""


def pictured(command: Callable[..., Any]) -> Callable[..., Any]:
    """How images become inputs."""

    @click.option("--images", "convention", default="model",
                  type=click.Choice(["model", "unit", "torchvision", "timm"]),
                  help="How images become inputs: as the model's metadata say (else as unit), values in [0, 1], or "
                  "a library's convention.")  # fmt: skip
    @click.option("--mean", metavar="V[,V,V]", help="Image mean by channel, in place of the convention's.")
    @click.option("--std", metavar="V[,V,V]", help="Image standard deviation by channel.")
    @click.option("--resize", metavar="H[xW]", help="Resize images: the shorter side, or height and width.")
    @wraps(command)
    def wrapped(
        *args: Any, convention: str, mean: str | None, std: str | None, resize: str | None, **kwargs: Any
    ) -> Any:
        return command(*args, images=_image_options(convention, mean, std, resize), **kwargs)

    return wrapped


running = _all(
    placed,
    click.option("--batch", default=8, type=POSITIVE, help="Samples in a batch, where the model leaves it free."),
    click.option("--mask", metavar="INPUT", help="Input that is nonzero where a token is real, for padded batches."),
    pictured,
)
"""The options of commands that run a model on all of their data."""
selecting = _all(
    click.option("--include", multiple=True, metavar="PATTERN", help="Only weights or sites that match; repeatable."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="No weights or sites that match; repeatable."),
    click.option(
        "--holdout-every",
        default=8,
        type=click.IntRange(min=2),
        help="One sample of so many is held out for validation, never calibrated on.",
    ),
    click.option(
        "--rows",
        default="all",
        type=click.Choice(ROWS),
        help="Moments of every row of the data, or until more rows would change little.",
    ),
    click.option(
        "--memory", type=Bytes(), help="Most that moments may take, such as 4G; the data are read again for more."
    ),
)
"""The options of commands that choose weights and gather moments of them."""
metric = click.option(
    "--metric",
    default="top1",
    help="Task metric: top1, top1:OUTPUT where several could hold the scores, or module:function.",
)
"""How good outputs are at their task."""
resumed = click.option(
    "--work", type=FILE, help="Keep what is finished in this folder; the same command resumes there."
)
"""Where a run keeps what it has finished."""


def training(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of commands that train a compressed model."""

    @click.option("--train", default="factors", type=click.Choice(TRAINED),
                  help="Train the weights that compression made, or all that operators learn.")  # fmt: skip
    @click.option("--epochs", type=POSITIVE, help="Passes over the data.  [default: as many as make 2,000 steps]")
    @click.option("--tune-batch", default=32, type=POSITIVE, help="Samples in a step of training.")
    @click.option("--learning-rate", default=0.01, type=click.FloatRange(min=0, min_open=True),
                  help="The most that a step changes a weight by, relative to its size.")  # fmt: skip
    @click.option("--augment", default="auto", type=click.Choice(AUGMENT),
                  help="Shift, mirror and blend images; auto: where each is seen more than 100 times.")  # fmt: skip
    @click.option("--seed", default=0, type=int, help="Of the order of samples and all that is drawn.")
    @wraps(command)
    def wrapped(
        *args: Any, train: Any, epochs: int | None, tune_batch: int, learning_rate: float, augment: Any, seed: int,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        tuning = Tuning(train, epochs, tune_batch, learning_rate, augment, seed=seed)
        return command(*args, tuning=tuning, **kwargs)

    return wrapped


def _image_options(convention: str, mean: str | None, std: str | None, resize: str | None) -> ImageOptions:
    options = ImageOptions.convention(convention)
    if mean is not None:
        options = replace(options, mean=_by_channel("--mean", mean))
    if std is not None:
        options = replace(options, std=_by_channel("--std", std))
    if resize is not None:
        options = replace(options, resize=_sides(resize))
    return options


def _by_channel(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in text.split(","))
    except ValueError:
        raise click.UsageError(f"{option} {text!r} is no number, or one a channel, such as 0.5,0.5,0.5") from None


def _sides(text: str) -> int | tuple[int, int]:
    match text.lower().split("x"):
        case [side] if side.isdecimal():
            return int(side)
        case [height, width] if height.isdecimal() and width.isdecimal():
            return int(height), int(width)
    raise click.UsageError(f"--resize {text!r} is neither a side nor height and width, such as 256 or 256x256")


def rank_multiple(command: Callable[..., Any]) -> Callable[..., Any]:
    """The multiple that ranks are of, after `--provider` where it is left open."""

    @click.option("--rank-multiple", default="auto", metavar="auto|N",
                  help="Ranks are multiples of it, as hardware likes them; auto: 16 on the CPU, else 8.")  # fmt: skip
    @wraps(command)
    def wrapped(*args: Any, rank_multiple: str, provider: str, **kwargs: Any) -> Any:
        if rank_multiple != "auto" and not (rank_multiple.isdecimal() and int(rank_multiple)):
            message = f"{rank_multiple!r} is neither auto nor a number from 1 on"
            raise click.BadParameter(message, param_hint="'--rank-multiple'")
        multiple = multiple_for(provider) if rank_multiple == "auto" else int(rank_multiple)
        return command(*args, rank_multiple=multiple, provider=provider, **kwargs)

    return wrapped


def parse_sizes(text: str) -> list[int]:
    """Batch sizes, from N or N,N."""
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise click.UsageError(f"--batch {text!r} is not a number from 1 on, or several separated by commas")
    return [int(size) for size in sizes]


def parse_forms(text: str) -> frozenset[Any]:
    """Forms, from FORM,FORM; whether there are such forms is for the configuration to say."""
    return frozenset(form.strip() for form in text.split(","))


def parse_ranks(pairs: Iterable[str]) -> dict[str, int]:
    """Ranks by pattern, from PATTERN=R."""
    ranks = {}
    for pair in pairs:
        pattern, separator, rank = pair.rpartition("=")
        if not separator or not pattern or not rank.isdecimal():
            raise click.UsageError(f"--rank {pair!r} is not of the form PATTERN=R, such as --rank '*.fc1*=64'")
        ranks[pattern] = int(rank)
    return ranks

"""A convolution but for its channels: where it reads and writes, and its attributes. What it costs follows from them.

Compressed, it becomes two (`onnxlr.sites.conv`): itself and one of 1 x 1 behind it, or one along each of its axes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    Attribute = int | str | tuple[int, ...]
    Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution of any number of channels.

    Attributes
    ----------
    op
        Conv or ConvTranspose.
    samples
        Arrays that it reads in one run.
    read, written
        Their lengths along the spatial axes, before and after.
    attributes
        Those of the node in the order of their names, spelled out: what is computed alike is equal.
    """

    op: str
    samples: int
    read: Shape
    written: Shape
    attributes: tuple[tuple[str, Attribute], ...]

    @classmethod
    def of(cls, op: str, read: Shape, written: Shape, kernel: Shape, attributes: Mapping[str, Any]) -> Convolution:
        """From the shapes [N, C, ...] of what a node reads and writes, that of its kernel, and what it states."""
        ones = (1,) * len(kernel)
        known: dict[str, Any] = {"kernel_shape": kernel, "strides": ones, "dilations": ones, "group": 1}
        automatic = attributes.get("auto_pad", "NOTSET")
        known |= {"pads": 2 * (0,) * len(kernel)} if automatic == "NOTSET" else {"auto_pad": automatic}
        known |= {name: attributes[name] for name in (*known, "output_padding") if name in attributes}
        return cls(op, read[0], read[2:], written[2:], _frozen(known))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Convolution:
        """What `to_dict` gave; KeyError, TypeError or ValueError where it did not."""
        read, written = (tuple(map(int, document[name])) for name in ("read", "written"))
        attributes = _frozen(dict(document["attributes"]))
        return cls(str(document["op"]), int(document["samples"]), read, written, attributes)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        attributes = {name: list(value) if isinstance(value, tuple) else value for name, value in self.attributes}
        lengths = {"read": list(self.read), "written": list(self.written)}
        return {"op": self.op, "samples": self.samples, **lengths, "attributes": attributes}

    @property
    def kernel(self) -> Shape:
        """Its lengths."""
        kernel: Shape = dict(self.attributes)["kernel_shape"]  # type: ignore[assignment]
        return kernel

    @property
    def groups(self) -> int:
        """How many convolutions it is, side by side."""
        groups: int = dict(self.attributes)["group"]  # type: ignore[assignment]
        return groups

    @property
    def positions(self) -> int:
        """How often its kernel is applied: at every position of the output, or transposed, of the input."""
        return self.samples * prod(self.read if self.op == "ConvTranspose" else self.written)

    def times(self, batch: int) -> Convolution:
        """The same for `batch` times the samples."""
        return replace(self, samples=batch * self.samples)

    def pointwise(self) -> Convolution:
        """The convolution of 1 x 1 of what it writes, in as many groups."""
        ones = (1,) * len(self.kernel)
        shape = (self.samples, 0, *self.written)
        return Convolution.of("Conv", shape, shape, ones, {"group": self.groups})

    def halves(self) -> tuple[Convolution, Convolution]:
        """A convolution of two axes as one along the first, then one along the second."""
        between = self.written[0], self.read[1]
        first, second = (_frozen(along(dict(self.attributes), axis)) for axis in (0, 1))
        return replace(self, written=between, attributes=first), replace(self, read=between, attributes=second)


def along(attributes: Mapping[str, Any], axis: int) -> dict[str, Any]:
    """The attributes of a convolution of two axes along one of them: the kernel is 1 along the other.

    With a kernel and a stride of 1 any `auto_pad` adds nothing there.
    """
    result = dict(attributes)
    for name in ("kernel_shape", "strides", "dilations"):
        if name in result:
            result[name] = [length if own == axis else 1 for own, length in enumerate(result[name])]
    if "pads" in result:
        result["pads"] = [pad if own % 2 == axis else 0 for own, pad in enumerate(result["pads"])]
    return result


def _frozen(attributes: Mapping[str, Any]) -> tuple[tuple[str, Attribute], ...]:
    return tuple(
        (name, value if isinstance(value, int | str) else tuple(map(int, value)))
        for name, value in sorted(attributes.items())
    )

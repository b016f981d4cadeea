"""From a torch model to a checked ONNX file: export, parity with torch, and only then a file.

Parity is held on the example inputs and, where axes are free, on a batch of one and on another batch size and sequence
length: the relative error `||onnxruntime - torch|| / ||torch||` of every output stays below `TOLERANCE`. torch is
imported once there is a reference to export.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxlr.data import IMAGES_KEY
from onnxlr.errors import ConfigError, GateError, ModelError, OutputError
from onnxlr.files import require_writable
from onnxlr.model_io import PROTOBUF_LIMIT, load, save
from onnxlr.protos import opset_of
from onnxlr.reference import parse_reference
from onnxlr.session import Session

if TYPE_CHECKING:
    from onnxlr.data import ImageOptions
    from onnxlr.model_io import Model
    from onnxlr.reference import Reference
    from onnxlr.torch_models import Converted, TorchModel

TOLERANCE = 1e-4
"""The largest relative error of an output; kernels that sum in another order differ by some 1e-6 in fp32."""
HALF_TOLERANCE = 2e-2
"""The same for models with weights in fp16 or bf16, whose steps are 1e-3 and 8e-3."""

_ROOM = 2**26
"""Bytes left for the graph beside the weights, in a file that protobuf can serialize."""


@dataclass(frozen=True, slots=True)
class Export:
    """What was written, and how close it is to torch.

    Attributes
    ----------
    reference, output
        What was exported, and where to.
    opset
        The version of ONNX's operators.
    parameters, nbytes
        Numbers in the torch model's parameters, tied ones once; bytes of the files.
    inputs, outputs
        dtype and shape by name, such as `float32 [batch, 3, 224, 224]`.
    errors
        Per output the largest relative error over `feeds` feeds; `tolerance` was allowed.
    images
        How images become the input, where the library says; the model carries it in its metadata.
    seconds
        The time it took.
    """

    reference: str
    output: str
    opset: int
    parameters: int
    nbytes: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    errors: dict[str, float]
    feeds: int
    tolerance: float
    images: ImageOptions | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"format": "onnxlr-export/1", **asdict(self)}


def export(
    reference: str,
    output: str | Path,
    *,
    opset: int | None = None,
    fixed_batch: bool = False,
    external_data: bool = False,
    force: bool = False,
) -> Export:
    """Export a torch model to ONNX, and hold it against torch before it is written.

    Parameters
    ----------
    reference
        `timm:NAME`, `torchvision:NAME`, `hf:NAME_OR_FOLDER`, `module:callable` (a function that returns a module and
        example inputs, a tuple of tensors or a dict by input name) or a .pt2 file. Library models have pretrained
        weights, or random ones with `@random` at the end.
    output
        The file to write.
    opset
        The version of ONNX's operators; torch's choice, when None.
    fixed_batch
        Keep the batch axis as long as it is in the example: 1 for library models of images, 2 for text.
    external_data
        Write the weights to a second file, `<output>.data`. Models above 2 GB are written so in any case.
    force
        Replace an existing `output`.

    Raises
    ------
    ConfigError
        `reference` is none, or names nothing that exists.
    InstallError
        torch, onnxruntime or the library is missing.
    ModelError
        The model cannot be made, run or exported, or onnx's checker refuses the result.
    GateError
        onnxruntime computes something else than torch.
    OutputError
        `output` exists or cannot be written.
    """
    start = time.perf_counter()
    path, parsed = Path(output), parse_reference(str(reference))
    if parsed.kind == "program" and path.resolve() == Path(parsed.name).resolve():
        raise ConfigError(f"{reference} is both the reference and the output: name another file")
    require_writable(path, force=force)
    from onnxlr.torch_models import convert, open_torch_model  # torch is slow to import, and not there for every user

    source = open_torch_model(parsed)
    parameters = {id(p): p for p in (*source.module.parameters(), *source.module.buffers())}.values()
    external = external_data or sum(p.nbytes for p in parameters) > PROTOBUF_LIMIT - _ROOM
    try:
        with tempfile.TemporaryDirectory(prefix="onnxlr.", ignore_cleanup_errors=True) as folder:
            converted = convert(source, Path(folder), opset=opset, fixed_batch=fixed_batch, external=external)
            model = converted.model
            session = Session(model)
            tolerance = _tolerance(source)
            errors = _errors(source, converted, session, tolerance)
            if source.images is not None:
                model.proto.metadata_props.add(key=IMAGES_KEY, value=source.images.to_json())
            save(model, path, force=force, size_threshold=0 if external else PROTOBUF_LIMIT)
    except OSError as error:
        raise OutputError(f"the temporary folder cannot be written: {error.strerror or error}") from error
    return Export(
        reference=str(reference),
        output=str(path),
        opset=opset_of(model.proto),
        parameters=sum(p.numel() for p in source.module.parameters()),
        nbytes=load(path).nbytes,
        inputs={spec.name: str(spec) for spec in session.inputs},
        outputs={spec.name: str(spec) for spec in session.outputs},
        errors=errors,
        feeds=len(converted.feeds),
        tolerance=tolerance,
        images=source.images,
        seconds=time.perf_counter() - start,
    )


def export_temporarily(reference: Reference) -> Model:
    """The model that a reference names, exported to files that exist for as long as the `Model` does.

    Raises
    ------
    OnnxlrError
        As `export`.
    """
    name = re.sub(r"\W+", "_", reference.name.removesuffix(".pt2")).strip("_")
    try:
        folder = Path(tempfile.mkdtemp(prefix="onnxlr."))
    except OSError as error:
        raise OutputError(f"the temporary folder cannot be written: {error.strerror or error}") from error
    try:
        export(reference.text, folder / f"{name[-64:]}.onnx")
        model = load(folder / f"{name[-64:]}.onnx")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def _tolerance(source: TorchModel) -> float:
    half = any(p.is_floating_point() and p.itemsize == 2 for p in source.module.parameters())
    return HALF_TOLERANCE if half else TOLERANCE


def _errors(source: TorchModel, converted: Converted, session: Session, tolerance: float) -> dict[str, float]:
    """Per output the largest relative error over the feeds.

    Raises
    ------
    GateError
        One is above the tolerance.
    ModelError
        The torch model takes no other batch size.
    """
    from onnxlr.torch_graph import relative_error, to_array

    errors: dict[str, float] = {}
    for place, feed in enumerate(converted.feeds):
        try:
            expected = source.run(feed)
        except ModelError as refusal:
            if place == 0 or source.program is not None:
                raise
            raise ModelError(
                f"{refusal}; if its batch cannot vary, --fixed-batch keeps that of the example"
            ) from refusal
        found = session.run({name: to_array(tensor) for name, tensor in feed.items()})
        for name, tensor in expected.items():
            reference = to_array(tensor)
            distance = relative_error(found[name], reference)
            if not distance <= tolerance:
                shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in feed.items())
                raise GateError(
                    f"the export of {source.name} is not the torch model: output {name!r} differs by {distance:.1e} on "
                    f"inputs ({shapes}), {tolerance:.0e} is allowed (torch {list(reference.shape)}, onnxruntime "
                    f"{list(found[name].shape)}); nothing was written"
                )
            errors[name] = max(errors.get(name, 0.0), distance)
    return errors

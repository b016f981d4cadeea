"""From whatever a source gives to samples that the model takes, or one line saying why not.

A reader hands over raw feeds, mappings from names to array-likes. Here each is checked against the model's inputs
(names, rank, static dims, dtype, finite values), cut into samples along the batch axis and converted. Every sample is
a fresh, contiguous array: sources that refill one buffer, or map a file into memory, cannot change it afterwards.

Which dtypes convert:

    given, wanted    bool   integer   float   complex   text
    bool             same   yes       yes     yes       no
    integer          0, 1   in range  yes     yes       no
    float            no     no        yes     yes       no
    complex          no     no        no      yes       no
    text             no     no        no      no        yes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from onnxlr.data.spec import Array, Sample, TensorSpec, format_shape, has_batch_axis, names
from onnxlr.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_LADDER = ("bool", "integer", "float", "complex")


def check_names(given: Iterable[str], inputs: Sequence[TensorSpec], where: str, *, extra_ok: bool = False) -> None:
    """Raise DataError unless every input has its array and, without `extra_ok`, no array is left over."""
    arrays = list(given)
    wanted = {spec.name for spec in inputs}
    unknown = [name for name in arrays if name not in wanted]
    for spec in inputs:
        if spec.name not in arrays:
            came = ", ".join(repr(name) for name in arrays) or "nothing"
            hint = f"; unknown to the model: {', '.join(map(repr, unknown))}" if unknown else ""
            raise DataError(
                f"{where}: no array for input {spec.name!r} ({spec}), got {came}{hint}; name the arrays as the inputs"
            )
    if unknown and not extra_ok:
        listed = ", ".join(map(repr, unknown))
        raise DataError(f"{where}: the model has no input {listed}; its inputs are {names(inputs)}, leave out the rest")


def cut(feed: Mapping[str, object], inputs: Sequence[TensorSpec], where: str) -> Iterator[Sample]:
    """Cut a raw feed into samples along the batch axis and fit each; without a batch axis the feed is the sample.

    Parameters
    ----------
    feed : mapping of str to array-like
        numpy arrays, tensors with a `numpy()` method (torch) or nested lists. With a batch axis `[n, ...]`, or one rank
        lower, `[...]`, for a single sample.
    inputs : sequence of TensorSpec
        The model's inputs.
    where : str
        The file or item the feed comes from, for messages.

    Yields
    ------
    Sample
        In order; each array `[1, ...]` with a batch axis, the model's dtypes.

    Raises
    ------
    DataError
        For names, shapes, dtypes or values that do not fit.
    """
    check_names(feed, inputs, where)
    arrays = {spec.name: to_array(feed[spec.name], f"{where}: input {spec.name!r}") for spec in inputs}
    if not has_batch_axis(inputs):
        yield fit(arrays, inputs, where)
        return
    for spec in inputs:
        if arrays[spec.name].ndim == len(spec.shape) - 1:
            arrays[spec.name] = arrays[spec.name][np.newaxis]
        if arrays[spec.name].ndim != len(spec.shape):
            raise _misfit(spec, arrays[spec.name], where)
    lengths = {name: len(array) for name, array in arrays.items()}
    count = next(iter(lengths.values()))
    if set(lengths.values()) != {count}:
        listed = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
        raise DataError(f"{where}: the inputs differ in their number of samples (axis 0): {listed}; make them equal")
    if count == 0:
        raise DataError(f"{where}: axis 0 is empty, expected at least one sample; remove it")
    for row in range(count):
        place = where if count == 1 else f"{where}, sample {row}"
        yield fit({name: array[row : row + 1] for name, array in arrays.items()}, inputs, place)


def fit(arrays: Mapping[str, Array], inputs: Sequence[TensorSpec], where: str) -> Sample:
    """Check one sample's shapes, dtypes and values and copy it into the model's dtypes.

    The leading dim is not compared where it is the batch axis. Raises DataError naming `where`, the input, what was
    expected and what came.
    """
    first = 1 if has_batch_axis(inputs) else 0
    sample: dict[str, Array] = {}
    for spec in inputs:
        array = arrays[spec.name]
        if array.ndim != len(spec.shape):
            raise _misfit(spec, array, where)
        pairs = zip(spec.shape[first:], array.shape[first:], strict=True)
        if any(isinstance(wanted, int) and wanted != got for wanted, got in pairs):
            raise _misfit(spec, array, where)
        sample[spec.name] = _convert(array, spec, where)
    return sample


def to_array(value: object, what: str) -> Array:
    """Turn an array-like into a numpy array, tensors of other libraries by their own methods, without importing those.

    bfloat16 tensors, for which torch has no numpy form, come out as float32. Raises DataError for anything ragged or
    not numeric; `what` names the value in it.
    """
    if isinstance(value, np.ndarray):
        return value
    tensor: Any = value
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
    try:
        if hasattr(tensor, "numpy"):
            try:
                return np.asarray(tensor.numpy())
            except TypeError:
                return np.asarray(tensor.float().numpy())
        return np.asarray(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{what}: {type(value).__name__} is not an array ({error}); give numpy arrays") from error


def _convert(array: Array, spec: TensorSpec, where: str) -> Array:
    if array.dtype.kind == "V" and array.dtype.names is None and spec.dtype.kind == "V":
        # .npy files cannot name the ml_dtypes types: bfloat16 comes back as two raw bytes.
        array = array.view(spec.dtype) if array.dtype.name == f"void{8 * spec.dtype.itemsize}" else array
    given, wanted = _kind(array.dtype), _kind(spec.dtype)
    place = f"{where}: input {spec.name!r}"
    if given == "object" and wanted not in ("text", "object"):
        raise DataError(f"{place}: holds Python objects, expected {spec.dtype.name}; give numeric arrays")
    if not _converts(given, wanted) and array.dtype != spec.dtype:
        raise DataError(f"{place}: {array.dtype.name} does not convert to {spec.dtype.name} without loss; convert it")
    if wanted in ("bool", "integer") and array.size and array.dtype != spec.dtype:
        low, high = (0, 1) if wanted == "bool" else (np.iinfo(spec.dtype).min, np.iinfo(spec.dtype).max)
        least, most = int(array.min()), int(array.max())
        if least < low or most > high:
            raise DataError(f"{place}: values from {least} to {most} do not fit {spec.dtype.name} ({low} to {high})")
    with np.errstate(over="ignore", invalid="ignore"):
        fitted: Array = np.array(array, dtype=spec.dtype, order="C")
    if wanted in ("float", "complex") and not np.isfinite(fitted).all():
        if given in ("float", "complex") and not np.isfinite(array).all():
            raise DataError(f"{place}: holds NaN or infinity; leave the sample out or repair it")
        raise DataError(f"{place}: values too large for {spec.dtype.name} (it overflows); rescale them")
    return fitted


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "V" and dtype.name.startswith(("bfloat", "float")):
        # ml_dtypes types register with numpy as void.
        return "float"
    return {"b": "bool", "i": "integer", "u": "integer", "f": "float", "c": "complex", "U": "text", "O": "object"}.get(
        dtype.kind, dtype.name
    )


def _converts(given: str, wanted: str) -> bool:
    if wanted in ("text", "object"):
        return given in ("text", "object")
    if (given, wanted) == ("integer", "bool"):
        return True
    return given in _LADDER and wanted in _LADDER and _LADDER.index(given) <= _LADDER.index(wanted)


def _misfit(spec: TensorSpec, array: Array, where: str) -> DataError:
    return DataError(
        f"{where}: input {spec.name!r} expects shape {format_shape(spec.shape)}, got {format_shape(array.shape)}; "
        "check the preprocessing and the order of the axes"
    )

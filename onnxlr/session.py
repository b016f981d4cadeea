"""Running a model: the only module that imports onnxruntime.

A `Session` is one loaded model on one execution provider. It never falls back to another provider in silence, and it
can run in streaming order, where every node runs as soon as its inputs exist: probes added to a graph then free the
activations they read at once, instead of keeping all of them alive to the end of the run. Its threads sleep while there
is no work for them. By default onnxruntime's go on looking for it, after the end of a run too, and so take the cores
from the next session; and where another process has a core, one thread then looks on at full speed while the other,
which has the work, waits for its turn (`tools/turns.py`).

onnxruntime's CPU computes next to nothing in bfloat16 (no MatMul, no Add; it casts and moves such tensors). A model
that it refuses for that is run as its float32 self there, and `computes` says so. Its Python interface has no numpy
type for bfloat16 either, on no provider: such arrays pass through OrtValues.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx

from onnxlr.data import TensorSpec
from onnxlr.errors import InstallError, ModelError
from onnxlr.external_data import inline_bytes
from onnxlr.model_io import load
from onnxlr.nvidia import CUDA, TENSORRT, is_missing, load_libraries, not_started, with_options
from onnxlr.precision import float32_self, half_types, widened_feed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnxlr.model_io import Model

INLINE_BYTES, LARGE_WEIGHT = 2**30, 2**16
"""Where a model holds more bytes of weights than the first, those of the second and more go beside its protobuf."""
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": CUDA,
    "tensorrt": TENSORRT,
    "rocm": "ROCMExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
"""The `--provider` names and onnxruntime's own names of them; any other onnxruntime name is taken as it is."""
DEVICES = {CUDA: "cuda"}
"""Of providers with a memory of their own, in which tensors may stay from run to run: what onnxruntime calls it."""

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises
    ------
    InstallError
        None of its builds is installed, or two are: they share one folder and break each other.
    """
    builds = []
    for build in ("onnxruntime", "onnxruntime-gpu"):
        try:
            importlib.metadata.distribution(build)
        except importlib.metadata.PackageNotFoundError:
            continue
        builds.append(build)
    if len(builds) == 2:
        raise InstallError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "`pip uninstall onnxruntime onnxruntime-gpu`, then install one of them"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise InstallError(
            f"onnxruntime cannot be imported ({error}): `pip install 'onnxlr[cpu]'`, or 'onnxlr[gpu]' for CUDA"
        ) from error
    return onnxruntime


def element_type(name: str) -> np.dtype[Any]:
    """The numpy dtype of an onnxruntime type such as "tensor(float)"."""
    element = name.removeprefix("tensor(").removesuffix(")")
    if element == "bfloat16":
        return BFLOAT16
    names = {"float": "float32", "double": "float64", "string": "object"}
    return np.dtype(names.get(element, element))


def provider_name(provider: str) -> str:
    """Onnxruntime's own name of a provider, from that or from a key of `PROVIDERS`."""
    return PROVIDERS.get(provider.lower(), provider)


class Session:
    """A model loaded into onnxruntime.

    Parameters
    ----------
    model
        What to run; its external data are read by onnxruntime from `model.folder`. A path is read by onnxruntime
        alone, so that no other copy of the weights is in memory.
    provider
        A key of `PROVIDERS`, or onnxruntime's own name of a provider.
    threads
        Threads within an operator; 0 leaves it to onnxruntime (one per core).
    streaming
        Run nodes in the order that frees tensors soonest, for graphs with added probes or outputs.
    optimize
        False switches graph optimizations off: for models that run once, to learn their shapes.
    save_optimized
        Where onnxruntime saves what its fusions make of the graph; the weights go to a second file beside it. Layouts
        of this machine's kernels are left out of such a session.

    Raises
    ------
    InstallError
        onnxruntime is missing, or this build or machine lacks the provider.
    ModelError
        onnxruntime refuses the model.

    Attributes
    ----------
    name, provider
        The model's path, and onnxruntime's name of the provider.
    device
        The provider's memory, where it has one of its own, as in `DEVICES`; else "".
    inputs, outputs
        What the model takes and gives.
    computes
        "float32" where a bfloat16 model is run as its float32 self, since this provider cannot run it; else "".
    native
        Whether onnxruntime by itself runs the model on numpy arrays, so that other tools can.
    """

    def __init__(
        self,
        model: Model | Path,
        *,
        provider: str = "cpu",
        threads: int = 0,
        streaming: bool = False,
        optimize: bool = True,
        save_optimized: Path | None = None,
    ) -> None:
        ort = import_onnxruntime()
        self.name = str((model if isinstance(model, Path) else model.path) or "the model")
        self.provider = provider_name(provider)
        self.device = DEVICES.get(self.provider, "")
        if self.provider not in ort.get_available_providers():
            raise InstallError(
                f"this onnxruntime build has no {self.provider}: available are "
                f"{', '.join(ort.get_available_providers())} (for CUDA install 'onnxlr[gpu]')"
            )

        def options() -> Any:
            own = ort.SessionOptions()
            own.log_severity_level = 4
            own.intra_op_num_threads = threads
            own.enable_mem_pattern = False  # planned for one shape; batches differ in size and length
            own.add_session_config_entry("session.intra_op.allow_spinning", "0")
            if streaming:
                own.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            if not optimize:
                own.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            if save_optimized is not None:
                own.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
                own.optimized_model_filepath = os.fspath(save_optimized)
                prefix = "session.optimized_model_external_initializers_"
                own.add_session_config_entry(prefix + "file_name", save_optimized.name + ".data")
                own.add_session_config_entry(prefix + "min_size_in_bytes", "1024")
            return own

        self.computes = ""
        try:
            self._session = self._load(model, options())
        except ModelError as error:
            whole = load(model) if isinstance(model, Path) else model
            lacking = self.provider == PROVIDERS["cpu"] and "NOT_IMPLEMENTED" in str(error)
            if not lacking or "bfloat16" not in half_types(whole):
                raise
            with float32_self(whole) as wide:
                self._session, self.computes = self._load(wide, options()), "float32"
            model = whole
        if self.provider not in self._session.get_providers():
            raise InstallError(not_started(self.provider))
        self.inputs = [_spec("input", argument) for argument in self._session.get_inputs()]
        self.outputs = [_spec("output", argument) for argument in self._session.get_outputs()]
        self._plain = all(spec.dtype != BFLOAT16 for spec in (*self.inputs, *self.outputs))
        if self.computes and not isinstance(model, Path):
            stated = {value.name: value.type.tensor_type.elem_type for value in model.proto.graph.input}
            self.inputs = [
                TensorSpec(spec.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(stated[spec.name])), spec.shape)
                for spec in self.inputs
            ]

    @property
    def native(self) -> bool:
        return self._plain and not self.computes

    def _load(self, model: Model | Path, options: Any) -> Any:
        folder = model.parent if isinstance(model, Path) else model.folder
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", os.fspath(folder.resolve())
        )
        content = os.fspath(model) if isinstance(model, Path) else self._content(model, options)
        ort = import_onnxruntime()
        if self.provider in (CUDA, TENSORRT):
            load_libraries(ort)
        try:
            # with its fallback onnxruntime goes on with another provider, now or in a later run, and says so on stdout
            return ort.InferenceSession(content, options, providers=with_options(self.provider), enable_fallback=0)
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            if is_missing(error):
                raise InstallError(not_started(self.provider)) from error
            raise ModelError(f"onnxruntime cannot load {self.name}: {_first_line(error)}") from error

    def _content(self, model: Model, options: Any) -> bytes:
        """The model's bytes; weights that are too many for one protobuf go to `options` instead."""
        if inline_bytes(model.proto) <= INLINE_BYTES:
            return model.serialize()
        content, weights = model.apart(LARGE_WEIGHT)
        value, element = import_onnxruntime().OrtValue, onnx.helper.np_dtype_to_tensor_dtype
        # onnxruntime reads the arrays where they are, so they have to live as long as the session
        self._weights = [
            value.ortvalue_from_numpy_with_onnx_type(array, element(array.dtype)) for array in weights.values()
        ]
        options.add_external_initializers(list(weights), self._weights)
        return content

    def run(self, feed: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The named outputs (all, when None) for one feed.

        Raises
        ------
        ModelError
            The model fails on this feed.
        """
        names = [spec.name for spec in self.outputs] if outputs is None else list(outputs)
        given = widened_feed(feed) if self.computes else dict(feed)
        try:
            values = self._session.run(names, given) if self._plain else self._run_boxed(names, given)
        except Exception as error:
            raise self._failed(feed, error) from error
        return dict(zip(names, values, strict=True))

    def _failed(self, feed: Mapping[str, np.ndarray], error: Exception) -> ModelError:
        shapes = ", ".join(f"{name} {list(np.shape(array))}" for name, array in list(feed.items())[:4])
        return ModelError(f"{self.name} fails on a feed ({shapes}): {_first_line(error)}")

    def _run_boxed(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """`run` by way of OrtValues, in which onnxruntime takes and gives bfloat16."""
        boxed = {name: _boxed(array) for name, array in feed.items()}
        return [_unboxed(value) for value in self._session.run_with_ort_values(names, boxed)]

    def placed(self, array: np.ndarray) -> Any:
        """An array in the memory of the provider, for `run_in_place`; on the CPU it is the array itself."""
        return import_onnxruntime().OrtValue.ortvalue_from_numpy(array, self.device or "cpu", 0)

    def run_in_place(
        self, feed: Mapping[str, np.ndarray], outputs: Sequence[str], kept: Mapping[tuple[str, str], Any]
    ) -> dict[str, np.ndarray]:
        """`run`, with tensors that stay where the provider has them.

        Parameters
        ----------
        feed, outputs
            As of `run`; without strings.
        kept
            By an input of the model and the output that takes its place: what `placed` gave, which is overwritten. The
            operator that makes the output has to be elementwise, and alone in reading the input.

        Raises
        ------
        ModelError
            The model fails on this feed.
        """
        try:
            binding = self._session.io_binding()
            # named, since not every release of onnxruntime keeps what is bound
            given = {name: _boxed(array) for name, array in (widened_feed(feed) if self.computes else feed).items()}
            for name, value in given.items():
                binding.bind_ortvalue_input(name, value)
            for (before, after), value in kept.items():
                binding.bind_ortvalue_input(before, value)
                binding.bind_ortvalue_output(after, value)
            for name in outputs:
                binding.bind_output(name, "cpu")
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            values = binding.get_outputs()[len(kept) :]
        except Exception as error:
            raise self._failed(feed, error) from error
        return {name: _unboxed(value) for name, value in zip(outputs, values, strict=True)}


def _boxed(array: np.ndarray) -> Any:
    box, array = import_onnxruntime().OrtValue, np.asarray(array, order="C")
    if array.dtype == BFLOAT16:
        return box.ortvalue_from_numpy_with_onnx_type(array, onnx.TensorProto.BFLOAT16)
    return box.ortvalue_from_numpy(array)


def _unboxed(value: Any) -> np.ndarray:
    if value.element_type() != onnx.TensorProto.BFLOAT16:
        array: np.ndarray = value.numpy()
        return array
    size = value.tensor_size_in_bytes()
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(raw, BFLOAT16).reshape(value.shape())


def _spec(kind: str, argument: Any) -> TensorSpec:
    try:
        return TensorSpec(argument.name, element_type(argument.type), tuple(argument.shape))
    except (TypeError, ValueError):
        raise ModelError(
            f"{kind} {argument.name!r} of the model is of type {argument.type}: only dense tensors can be fed and "
            f"compared, so take it off the graph's {kind}s"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""An ONNX graph as a torch module: one loop over the nodes, in order.

    graph = to_torch(model)
    y = graph({"images": images})["logits"]
    inner = graph(feeds, outputs=["logits", "/blocks.0/fc1/MatMul_output_0"], track=[...])

Weights are parameters and buffers, known by their ONNX names; what several nodes read is one parameter. Any tensor of
the main graph can be asked for by name; only the nodes that lead to what is asked for run, and a tensor is dropped
after its last use. It is always inference: Dropout passes through and BatchNormalization uses its stored statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onnxlr.errors import ModelError
from onnxlr.torch_graph.graph import Compiler, Graph, Step, schedule
from onnxlr.torch_graph.registry import Missing, RefusedError, Unsupported, UnsupportedOperatorsError
from onnxlr.torch_graph.tensors import to_tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from onnxlr.model_io import Model

_SMALL = 64
"""Tensors that are not floating and have at most so many elements are shapes and axes: they stay in host memory."""

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, ArithmeticError)


def to_torch(model: Model) -> TorchGraph:
    """Build the torch module of a model.

    Raises
    ------
    UnsupportedOperatorsError
        It has operators (or attributes or element types of them) that are not implemented: the complete list.
    ExternalDataError
        Its external data cannot be read.
    """
    return TorchGraph(model)


class TorchGraph(torch.nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """An ONNX model that torch runs and differentiates; made by `to_torch`.

    Attributes
    ----------
    inputs
        Names that `forward` must be fed.
    outputs
        Names of the graph's outputs.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._where = str(model.path or "the model")
        missing = Missing()
        compiler = Compiler(model.proto, missing)
        self._graph = compiler.graph(model.proto.graph, compiler.opsets, "", {})
        missing.raise_if_any(self._where)
        self._keys: dict[Graph, dict[str, str]] = {}
        self._host: set[str] = set()
        self._inner: dict[str, list[Tensor]] = {}
        self._schedules: dict[tuple[Graph, tuple[str, ...]], tuple[tuple[Step, tuple[str, ...]], ...]] = {}
        # before any weight is registered: one of them may be called `outputs`
        self.inputs = tuple(name for name in self._graph.inputs if name not in self._graph.weights)
        self.outputs = self._graph.outputs
        self._known = {*self._graph.inputs, *self.tensor_names()}
        for graph in self._graph.walk():
            self._keys[graph] = {
                name: self._register(graph.scope + name, to_tensor(model.array(tensor)))
                for name, tensor in graph.weights.items()
            }
            graph.weights.clear()
        self.eval()

    def _register(self, name: str, value: Tensor) -> str:
        key = name.replace(".", "|") or "|"  # torch allows no dots in names
        while hasattr(self, key):  # a weight may be called `forward`
            key += "_"
        if value.is_floating_point():
            self.register_parameter(key, torch.nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(key, value)
            if value.numel() <= _SMALL:
                self._host.add(key)
        return key

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for key in self._host:
            self._buffers[key] = self._buffers[key].cpu()
        return self

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each floating weight by its ONNX name (that of the output, for a Constant node), as a parameter.

        Those inside the bodies of If, Loop and functions have the node's path before their name.
        """
        for graph, keys in self._keys.items():
            for name, key in keys.items():
                if key in self._parameters:
                    yield graph.scope + name, self._parameters[key]

    def weight(self, name: str) -> Tensor:
        """The parameter or buffer of an initializer or Constant node of the main graph.

        Raises
        ------
        ModelError
            There is none of this name.
        """
        key = self._keys[self._graph].get(name)
        if key is None:
            raise ModelError(f"{self._where} has no weight {name!r}")
        return getattr(self, key)

    def captured(self) -> set[str]:
        """What bodies of If, Loop and Scan take from the main graph: a run may leave it out."""
        return {name for step in self._graph.steps for body in step.bodies for name in body.captured}

    def tensor_names(self) -> list[str]:
        """All tensors that nodes of the main graph make, in the order of the nodes."""
        return [name for step in self._graph.steps for name in step.outputs if name]

    def node_of(self, tensor: str) -> str:
        """What errors call the node that makes a tensor of the main graph."""
        return next((step.label for step in self._graph.steps if tensor in step.outputs), "an input")

    def forward(
        self,
        feeds: Mapping[str, Tensor],
        *,
        outputs: Sequence[str] | None = None,
        track: Collection[str] = (),
        inner: dict[str, list[Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Run the graph.

        Parameters
        ----------
        feeds
            The inputs by name; on the module's device. An initializer that is also an input may be overridden.
        outputs
            Which tensors to return, inputs and inner ones included; the graph's outputs by default.
        track
            Tensors that gradients are wanted for though no parameter or input requires one. Where such a tensor is
            not part of an autograd graph yet, it becomes a leaf that requires a gradient; so nothing before the
            first tracked tensor is kept for the backward pass. Only floating ones can be tracked.
        inner
            Names of tensors of bodies to track likewise; each is given the values that it had in this run.

        Returns
        -------
        dict
            The tensors asked for, by name, as parts of the autograd graph: `torch.autograd.grad` takes them.

        Raises
        ------
        ModelError
            An input is missing or unknown, a tensor is unknown or cannot be tracked, or a node fails: named, with the
            shapes it got.
        UnsupportedOperatorsError
            An operator finds something unsupported in the values of its inputs.
        """
        unknown = [name for name in feeds if name not in self._graph.inputs]
        if absent := [name for name in self.inputs if name not in feeds]:
            raise ModelError(f"{self._where} lacks the inputs {', '.join(map(repr, absent))}: got {list(feeds)}")
        if unknown:
            raise ModelError(f"{self._where} has no inputs {', '.join(map(repr, unknown))}: it takes {self.inputs}")
        if foreign := sorted(set(track) - self._known):
            raise ModelError(f"{self._where} has no tensors {', '.join(map(repr, foreign))} to track")
        wanted = self.outputs if outputs is None else tuple(dict.fromkeys(outputs))
        scope = dict(feeds)
        for name in track:
            if name in scope:
                scope[name] = self._tracked(name, scope[name])
        self._inner = {} if inner is None else inner
        self._run(self._graph, scope, wanted, frozenset(track))
        self._inner = {}
        return {name: self._value(self._graph, scope, name) for name in wanted}

    def _tracked(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ModelError(f"{self._where}: tensor {name!r} cannot be tracked, it is {_described(value)}")
        return value if value.requires_grad else value.detach().requires_grad_()

    def _value(self, graph: Graph, scope: Mapping[str, Any], name: str) -> Any:
        if name in scope:
            return scope[name]
        key = self._keys[graph].get(name)
        if key is None:
            raise ModelError(f"{self._where} has no tensor {name!r}")
        return getattr(self, key)

    def _run(self, graph: Graph, scope: dict[str, Any], wanted: tuple[str, ...], track: frozenset[str]) -> None:
        """Fill `scope` with the tensors `wanted` of a graph; others are gone after their last use."""
        plan = self._schedules.get((graph, wanted))
        if plan is None:
            plan = self._schedules[graph, wanted] = schedule(graph, wanted)
        for step, dead in plan:
            inputs = [self._value(graph, scope, name) if name else None for name in step.inputs]
            results = self._step(graph, scope, step, inputs)
            for name, value in zip(step.outputs, results, strict=False):
                if not name or value is None:
                    continue
                if isinstance(value, Tensor) and any(value is x for x in inputs):
                    # one tensor under two names would merge their gradients into one
                    value = value.view_as(value)
                scope[name] = self._tracked(name, value) if name in track or name in self._inner else value
                if name in self._inner:
                    self._inner[name].append(scope[name])
            inputs = results = value = None  # type: ignore[assignment]  # or they would outlive their use
            for name in dead:
                scope.pop(name, None)

    def _step(self, graph: Graph, scope: dict[str, Any], step: Step, inputs: list[Any]) -> Sequence[Any]:
        def call(body: Graph, *values: Any) -> list[Any]:
            inner = {name: self._value(graph, scope, name) for name in body.captured}
            inner.update(zip(body.inputs, values, strict=False))
            for name in body.inputs[len(values) :]:
                if name not in self._keys[body]:
                    inner[name] = None
            wanted = tuple(dict.fromkeys(name for name in body.outputs if name))
            self._run(body, inner, wanted, frozenset())
            return [self._value(body, inner, name) if name else None for name in body.outputs]

        try:
            if step.function is not None:
                return call(step.function, *inputs)
            implementation = step.implementation
            assert implementation is not None
            filled = {"n_outputs": len(step.outputs), "opset": step.opset, "runner": call}
            arguments = {name: filled[name] for name in implementation.filled}
            inputs = _together(inputs, implementation.host)
            results = implementation.function(*inputs, **step.attributes, **arguments)
        except RefusedError as error:
            unsupported = Unsupported(step.op, step.domain, step.opset, 1, str(error))
            raise UnsupportedOperatorsError(self._where, (unsupported,)) from error
        except _FAILURES as error:
            shapes = ", ".join(map(_described, inputs))
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ModelError(f"{self._where}: {step.label} fails in torch on ({shapes}): {reason}") from error
        return results if isinstance(results, tuple) else (results,)


def _together(inputs: list[Any], host: frozenset[int]) -> list[Any]:
    """Inputs on one device: that of those which are not in host memory; those read as numbers are left alone."""
    free = {i for i, x in enumerate(inputs) if isinstance(x, Tensor) and i not in host}
    devices = {inputs[i].device for i in free}
    if len(devices) < 2:
        return inputs
    target = next(device for device in devices if device.type != "cpu")
    return [x.to(target) if i in free else x for i, x in enumerate(inputs)]


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    return "nothing" if x is None else f"{len(x)} tensors"

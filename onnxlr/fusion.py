"""What onnxruntime's optimizer makes of a graph: operators that it puts in the place of several."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from onnxlr.errors import OutputError
from onnxlr.model_io import load
from onnxlr.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnxlr.model_io import Model


def fused_operators(model: Model, *, provider: str = "cpu", threads: int = 0) -> dict[str, int]:
    """How many operators onnxruntime's optimizer puts in the place of several, by operator type.

    Counted are the operators that stand for a graph of others: onnxruntime's own (`Attention`, `BiasGelu`) and those
    that ONNX defines as functions (`LayerNormalization`, `Gelu`), where the optimized graph has more of them than
    `model`. The optimized graph, weights included, passes through the temporary folder.

    Parameters
    ----------
    model
        The model, which is left as it is; bodies of If and Loop and calls of local functions are counted too.
    provider, threads
        As of `Session`: other providers fuse other operators.

    Returns
    -------
    dict of str to int
        Operators gained, by type, in alphabetical order; types that are not more than before are left out.

    Raises
    ------
    InstallError, ModelError
        As `Session`. ModelError also where a provider compiles the graph, so that onnxruntime cannot save it.
    OutputError
        The temporary folder cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="onnxlr.") as folder:
            path = Path(folder, "optimized.onnx")
            Session(model, provider=provider, threads=threads, save_optimized=path)
            after = _operators(load(path).proto)
    except OSError as error:
        raise OutputError(f"the temporary folder cannot be written: {error.strerror or error}") from error
    before = _operators(model.proto)
    composite = {op for domain, op in after if _stands_for_several(domain, op)}
    # by name alone: a Gelu of ONNX that becomes onnxruntime's Gelu is not a fusion
    gained = Counter(_by_name(after))
    gained.subtract(_by_name(before))
    return {op: gained[op] for op in sorted(composite) if gained[op] > 0}


def _operators(proto: onnx.ModelProto) -> Counter[tuple[str, str]]:
    """Operators by (domain, type), bodies included; a local function counts as its operators at every call."""
    functions = {(function.domain, function.name): function for function in proto.functions}

    def count(nodes: Iterable[onnx.NodeProto]) -> Counter[tuple[str, str]]:
        counts: Counter[tuple[str, str]] = Counter()
        for node in nodes:
            function = functions.get((node.domain, node.op_type))
            counts.update([(node.domain, node.op_type)] if function is None else count(function.node))
            for attribute in node.attribute:
                for body in (attribute.g, *attribute.graphs):
                    counts.update(count(body.node))
        return counts

    return count(proto.graph.node)


def _by_name(operators: Counter[tuple[str, str]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (_, op), number in operators.items():
        counts[op] += number
    return counts


def _stands_for_several(domain: str, op: str) -> bool:
    domain = "" if domain == "ai.onnx" else domain
    if not onnx.defs.has(op, domain):
        return True  # onnxruntime's own
    schema: Any = onnx.defs.get_schema(op, domain)  # onnx's stubs lack both attributes
    return bool(schema.has_function or schema.has_context_dependent_function)

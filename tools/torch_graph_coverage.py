"""How much of ONNX runs in torch: onnx's own operator tests, through `onnxlr.torch_graph` and through onnx2torch.

    python tools/torch_graph_coverage.py [--list] [--only NAME]

Every case that onnx makes for an operator (with the expanded forms of functions), and the stored ones of older opsets
(`backend/test/data`), is run and compared with its expected outputs, at the case's own tolerances or within two units
in the last place of the output's type, where that is coarser. Three outcomes: passed, failed (an exception or other
values) and unsupported (refused before anything ran). The rows:

    floating    cases of ONNX's own domain with a floating tensor among inputs or outputs; without strings, sequences,
                element types that torch cannot compute with, random numbers and training
    stored      the stored cases alone, all of opset 12 or older: those made on the spot are mostly of the newest opset
    all         every case

onnx2torch is counted too where it can be imported; it has no check of its own, so what it cannot convert counts as
unsupported. Exit code 1 if one of ours failed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.backend.test.case import node as node_cases

from onnxlr.errors import OnnxlrError
from onnxlr.model_io import from_proto
from onnxlr.torch_graph import UnsupportedOperatorsError, to_array, to_tensor, to_torch
from onnxlr.torch_graph.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}


@dataclass(frozen=True, slots=True)
class Case:
    """One test: a model, and inputs with the outputs they must give."""

    name: str
    model: onnx.ModelProto
    data: list[tuple[list[Any], list[Any]]]
    rtol: float
    atol: float

    @property
    def floating(self) -> bool:
        """Whether it belongs to the row `floating`."""
        graph = self.model.graph
        kinds = {
            value.type.tensor_type.elem_type if value.type.HasField("tensor_type") else -1
            for value in (*graph.input, *graph.output)
        }
        nodes = {(node.domain, node.op_type) for node in graph.node}
        known = all(kind in DTYPES for kind in kinds)
        own = all(domain in ("", "ai.onnx") for domain, _ in nodes)
        training = any(a.name == "training_mode" and a.i for node in graph.node for a in node.attribute)
        training |= "training" in self.name or "train" in self.name
        drawn = bool({op for _, op in nodes} & RANDOM)
        return known and own and not training and not drawn and any(DTYPES[kind].is_floating_point for kind in kinds)


def made_cases() -> Iterator[Case]:
    """The tests of operators that onnx makes on the spot, at its newest opset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = node_cases.collect_testcases()
    for case in cases:
        if case.model is not None and case.data_sets is not None:
            data = [([_array(x) for x in inputs], [_array(y) for y in outputs]) for inputs, outputs in case.data_sets]
            yield Case(case.name, case.model, data, case.rtol, case.atol)


def stored_cases() -> Iterator[Case]:
    """The tests that onnx ships as files, at older opsets."""
    for file in sorted((Path(onnx.__file__).parent / "backend" / "test" / "data").glob("*/*/model.onnx")):
        model = onnx.load(file)
        graph = model.graph
        data = []
        for folder in sorted(file.parent.glob("test_data_set_*")):
            inputs = [
                _read(folder / f"input_{i}.pb", value)
                for i, value in enumerate(graph.input)
                if (folder / f"input_{i}.pb").exists()
            ]
            outputs = [
                _read(folder / f"output_{i}.pb", value)
                for i, value in enumerate(graph.output)
                if (folder / f"output_{i}.pb").exists()
            ]
            data.append((inputs, outputs))
        if data:
            yield Case(f"{file.parent.parent.name}/{file.parent.name}", model, data, 1e-3, 1e-7)


def _read(file: Path, value: onnx.ValueInfoProto) -> Any:
    if not value.type.HasField("tensor_type"):
        return None
    return numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))


def _array(value: Any) -> Any:
    """Some cases hold protobufs instead of arrays."""
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def difference(found: np.ndarray, expected: np.ndarray, rtol: float, atol: float) -> str | None:
    """How an output differs from what is expected; None where it agrees."""
    if found.dtype != expected.dtype:
        return f"{found.dtype} instead of {expected.dtype}"
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} instead of {list(expected.shape)}"
    if expected.dtype.kind in "biu":
        return None if np.array_equal(found, expected) else "other values"
    a, b = found.astype(np.float64), expected.astype(np.float64)
    # some tolerances are finer than the type: two units in the last place of the largest value pass
    finite = np.abs(b[np.isfinite(b)])
    atol = max(
        atol, 2 * float(torch.finfo(to_tensor(expected.reshape(-1)[:0]).dtype).eps) * float(finite.max(initial=0))
    )
    if np.allclose(a, b, rtol, atol, equal_nan=True):
        return None
    with np.errstate(invalid="ignore"):
        return f"off by {np.nanmax(np.abs(a - b)):.1e}"


def ours(case: Case) -> tuple[str, str]:
    """The outcome in torch_graph, and why."""
    try:
        graph = to_torch(from_proto(case.model))
    except UnsupportedOperatorsError as error:
        return "unsupported", ", ".join(map(str, error.operators))
    names = [value.name for value in case.model.graph.input]
    for inputs, outputs in case.data:
        try:
            with torch.no_grad():
                found = graph({name: to_tensor(x) for name, x in zip(names, inputs, strict=False)})
        except UnsupportedOperatorsError as error:
            return "unsupported", str(error)
        except OnnxlrError as error:
            return "failed", str(error)
        for name, expected in zip(graph.outputs, outputs, strict=True):
            if reason := difference(to_array(found[name]), np.asarray(expected), case.rtol, case.atol):
                return "failed", f"{name}: {reason}"
    return "passed", ""


def onnx2torch_runner() -> Callable[[Case], tuple[str, str]] | None:
    """The same for onnx2torch; None where it is not installed."""
    try:
        import onnx2torch
    except Exception:  # it fails in several ways where torchvision is missing
        return None

    def run(case: Case) -> tuple[str, str]:
        try:
            module = onnx2torch.convert(case.model).eval()
        except Exception as error:
            return "unsupported", str(error)
        for inputs, outputs in case.data:
            try:
                with torch.no_grad():
                    found = module(*(to_tensor(x) for x in inputs))
                found = list(found) if isinstance(found, (tuple, list)) else [found]
                for got, expected in zip(found, outputs, strict=True):
                    if reason := difference(to_array(got), np.asarray(expected), case.rtol, case.atol):
                        return "failed", reason
            except Exception as error:
                return "failed", str(error)
        return "passed", ""

    return run


def table(title: str, cases: list[Case], run: Callable[[Case], tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Run every case, print the rows, return the outcomes by name."""
    outcomes = {}
    rows: dict[str, Counter[str]] = {"floating": Counter(), "stored": Counter(), "all": Counter()}
    for case in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = run(case)
        outcomes[case.name] = outcome
        belongs = {"floating": case.floating, "stored": "/" in case.name, "all": True}
        for row in (row for row in rows if belongs[row]):
            rows[row][outcome[0]] += 1
    for row, counts in rows.items():
        figures = "  ".join(f"{kind} {counts[kind]:5d}" for kind in ("passed", "failed", "unsupported"))
        print(f"{title:<12} {row:<9} {figures}  of {counts.total()}", flush=True)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="also print every case of ours that did not pass, and why")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = [case for case in (*made_cases(), *stored_cases()) if options.only in case.name]
    outcomes = table("torch_graph", cases, ours)
    other = onnx2torch_runner()
    if other is None:
        print("onnx2torch is not installed")
    else:
        table("onnx2torch", cases, other)
    if options.list:
        floating = {case.name for case in cases if case.floating}
        for name, (outcome, reason) in sorted(outcomes.items(), key=lambda item: item[1]):
            if outcome != "passed":
                print(f"{outcome:<11} {'floating' if name in floating else '':<8} {name}: {reason}")
    return 1 if any(outcome == "failed" for outcome, _ in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

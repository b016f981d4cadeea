"""Load, import, export and save real models, and compare byte by byte: nothing may be lost.

    python tools/roundtrip.py [FILE OR FOLDER ...]

goes over every model that onnx is tested with (its files, and one model for each test of an operator) and whatever is
named. Exit code 1 if one that loads is not lossless.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import onnx
from onnx.backend.test.case import model as model_cases
from onnx.backend.test.case import node as node_cases
from onnx.external_data_helper import load_external_data_for_model

from onnxlr.errors import OnnxlrError
from onnxlr.model_io import Model, load, save
from onnxlr.surgery import close_graph, open_graph


def backend_models() -> list[Path]:
    """The models that onnx is tested with."""
    return sorted((Path(onnx.__file__).parent / "backend" / "test" / "data").rglob("*.onnx"))


def operator_models(folder: Path) -> list[Path]:
    """The models of onnx's operator tests, written to `folder`: every attribute, type and kind of body there is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [*node_cases.collect_testcases(), *model_cases.collect_testcases()]
    for case in cases:
        if case.model is not None:
            (folder / f"{case.name}.onnx").write_bytes(case.model.SerializeToString())
    return sorted(folder.iterdir())


def loss(original: Model, folder: Path) -> str | None:
    """What a round trip through the graph and a file changes in `original`; None if nothing."""
    before = original.serialize()
    closed = close_graph(open_graph(original.proto), original.proto)
    if original.serialize() != before:
        return "the original was changed"
    if closed.SerializeToString(deterministic=True) != before:
        return "open_graph and close_graph are not lossless"
    target = folder / "model.onnx"
    # The checker refuses some of them as they are: this is about bytes.
    save(original, target, force=True, check=False)
    if _inlined(load(target)) != _inlined(original):
        return "save and load are not lossless"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Print the counts and every failure; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="more .onnx files, or folders to search for them")
    paths = parser.parse_args(arguments).paths

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as operators, tempfile.TemporaryDirectory() as scratch:
        files = backend_models() + operator_models(Path(operators))
        for path in paths:
            files += sorted(path.rglob("*.onnx")) if path.is_dir() else [path]
        refused, lost = [], []
        for path in files:
            try:
                original = load(path)
            except OnnxlrError as error:
                refused.append(f"not loaded: {error}")
                continue
            try:
                reason = loss(original, Path(scratch))
            except OnnxlrError as error:
                reason = str(error)
            if reason:
                lost.append(f"not lossless: {path}: {reason}")
    for line in refused + lost:
        print(line)
    loaded = len(files) - len(refused)
    seconds = time.perf_counter() - start
    print(f"{len(files)} files, {loaded} loaded, {loaded - len(lost)} lossless, {seconds:.1f} s")
    return 1 if lost else 0


def _inlined(loaded: Model) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(loaded.proto)
    load_external_data_for_model(copy, str(loaded.folder))
    return copy.SerializeToString(deterministic=True)


if __name__ == "__main__":
    sys.exit(main())

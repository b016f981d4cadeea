"""A decoder with random weights of any size, and what each command takes of it: seconds and peak memory.

    python -m tools.decoder make decoder/ --layers 48 --width 1600            # GPT-2 XL's shape: 1.5 billion parameters
    python -m tools.decoder measure decoder/ --memory 2G

Weights are random, so the errors say nothing; time and memory do not care. The file is written one weight at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HEADS = 25
SCALE = 0.02


class Builder:
    """Nodes of the graph, and weights that go to the data file as they are drawn."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._stream = (folder / "model.onnx.data").open("wb")
        self._generator = np.random.default_rng(0)
        self.dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        self._element = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def node(self, op: str, *inputs: str, name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, array: NDArray[Any]) -> str:
        self.weights.append(onnx.numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, *shape: int, mean: float = 0.0) -> str:
        proto = TensorProto(name=name, data_type=self._element, dims=shape, data_location=TensorProto.EXTERNAL)
        self._stream.seek(-self._stream.tell() % 4096, os.SEEK_CUR)
        proto.external_data.add(key="location", value="model.onnx.data")
        proto.external_data.add(key="offset", value=str(self._stream.tell()))
        # the rows of a large table are drawn a part at a time
        for rows in np.array_split(np.arange(shape[0]), max(1, shape[0] // 4096)):
            drawn = self._generator.standard_normal((len(rows), *shape[1:]), np.float32) * SCALE + mean
            self._stream.write(drawn.astype(self.dtype).tobytes())
        proto.external_data.add(key="length", value=str(self.dtype.itemsize * int(np.prod(shape))))
        self.weights.append(proto)
        return name

    def linear(self, x: str, name: str, d_in: int, d_out: int) -> str:
        product = self.node("MatMul", x, self.weight(f"{name}.weight", d_in, d_out), name=f"{name}.product")
        return self.node("Add", product, self.weight(f"{name}.bias", d_out), name=name)

    def norm(self, x: str, name: str, width: int) -> str:
        scale, shift = self.weight(f"{name}.scale", width, mean=1.0), self.weight(f"{name}.shift", width)
        return self.node("LayerNormalization", x, scale, shift, name=name, axis=-1)

    def finish(self, inputs: Sequence[onnx.ValueInfoProto], output: str, folder: Path) -> None:
        self._stream.close()
        result = helper.make_tensor_value_info(output, self._element, ["batch", "length", None])
        graph = helper.make_graph(self.nodes, "decoder", inputs, [result], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, folder / "model.onnx")


def build(folder: Path, layers: int, width: int, vocabulary: int, length: int, dtype: str) -> None:
    """A GPT of pre-norm blocks over token ids [batch, length], with an output head of its own."""
    made = Builder(folder, dtype)
    heads = next(count for count in range(HEADS, 0, -1) if width % count == 0)
    apart, together = made.constant("apart", np.array([0, 0, heads, -1])), made.constant("whole", np.array([0, 0, -1]))
    mask = made.constant("mask", np.triu(np.full((length, length), -1e4), 1).astype(made.dtype))
    scale = made.constant("scale", np.array((width // heads) ** -0.5, made.dtype))
    x = made.node("Gather", made.weight("table", vocabulary, width), "ids", name="embedded", axis=0)
    x = made.node("Add", x, made.weight("positions", 1, length, width), name="placed")
    for index in range(layers):
        block = f"block{index}"
        y = made.norm(x, f"{block}.norm1", width)
        turned = {}
        for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            own = made.linear(y, f"{block}.{part}", width, width)
            own = made.node("Reshape", own, apart, name=f"{block}.{part}.heads")
            turned[part] = made.node("Transpose", own, name=f"{block}.{part}.turned", perm=order)
        scores = made.node("MatMul", turned["q"], turned["k"], name=f"{block}.raw")
        scores = made.node("Mul", scores, scale, name=f"{block}.scaled")
        scores = made.node("Add", scores, mask, name=f"{block}.masked")
        scores = made.node("Softmax", scores, name=f"{block}.soft", axis=-1)
        mixed = made.node("MatMul", scores, turned["v"], name=f"{block}.mixed")
        mixed = made.node("Transpose", mixed, name=f"{block}.back", perm=[0, 2, 1, 3])
        mixed = made.node("Reshape", mixed, together, name=f"{block}.joined")
        x = made.node("Add", x, made.linear(mixed, f"{block}.out", width, width), name=f"{block}.attended")
        y = made.linear(made.norm(x, f"{block}.norm2", width), f"{block}.up", width, 4 * width)
        y = made.linear(made.node("Gelu", y, name=f"{block}.gelu"), f"{block}.down", 4 * width, width)
        x = made.node("Add", x, y, name=f"{block}.done")
    y = made.norm(x, "norm", width)
    logits = made.node("MatMul", y, made.weight("head", width, vocabulary), name="logits")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", length])
    made.finish([ids], logits, folder)


@click.group()
def main() -> None:
    """A decoder with random weights, and what onnxlr takes of it."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=48)
@click.option("--width", default=1600)
@click.option("--vocabulary", default=50257)
@click.option("--length", default=32, help="Tokens in a sample.")
@click.option("--samples", default=72)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32")
def make(folder: Path, layers: int, width: int, vocabulary: int, length: int, samples: int, dtype: str) -> None:
    """Write a model and samples of random tokens to FOLDER."""
    folder.mkdir(parents=True)
    build(folder, layers, width, vocabulary, length, dtype)
    ids = np.random.default_rng(1).integers(0, vocabulary, (samples, length))
    np.savez(folder / "calib.npz", ids=ids)
    click.echo(f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e9:.2f} GB in {folder}")


def measured(arguments: Sequence[str]) -> tuple[int, float, float, int]:
    """Exit code, seconds, seconds of processor time and peak resident bytes of one onnxlr command."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "onnxlr", *arguments]
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    process = os.posix_spawn(sys.executable, command, os.environ, file_actions=silent)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    return os.waitstatus_to_exitcode(status), seconds, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--memory", default="2G")
@click.option("--forms", default="pair")
@click.option("--target", default="--energy 0.6", help="As compress takes it.")
def measure(folder: Path, memory: str, forms: str, target: str) -> None:
    """Inspect, calibrate, compress and validate the model in FOLDER, each in a process of its own."""
    model, calib = str(folder / "model.onnx"), str(folder / "calib.npz")
    moments, small, work = folder / "moments.safetensors", folder / "small.onnx", folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    size = sum(Path(folder, name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    print(f"model: {size / 1e9:.2f} GB\n\n| command | seconds | processor | peak GB |\n|---|---|---|---|")
    same = ["--calib", calib, "--objective", "output", "--forms", forms, "--memory", memory, "--force", "-q"]
    commands = {
        "inspect": [model, "--json"],
        "calibrate": [model, *same, "-o", str(moments)],
        "compress": [model, *same, "--stats", str(moments), *target.split(), "-o", str(small), "--work",
                     str(work), "--report", str(folder / "report.json")],
        "validate": [model, str(small), "--data", calib, "--max-error", "10"],
    }  # fmt: skip
    for name, arguments in commands.items():
        code, seconds, processor, peak = measured([name, *arguments])
        print(f"| {name} | {seconds:.0f} | {processor:.0f} | {peak / 1e9:.2f} |", flush=True)
        if code:
            sys.exit(f"onnxlr {name} ended with exit code {code}")
    report = json.loads((folder / "report.json").read_text())
    for stage, seconds in report["seconds"].items():
        print(f"compress: {stage} {seconds:.0f} s")


if __name__ == "__main__":
    main()

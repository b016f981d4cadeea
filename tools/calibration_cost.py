"""Time and memory of calibration beside plain inference of the same samples, and beside onnxruntime's calibrators.

    python tools/calibration_cost.py [--models vit_s,bert_base,fashion] [--samples 32] [--rounds 3]
    python tools/calibration_cost.py --models MODEL.onnx --calib DATA [--mask INPUT]
    python tools/calibration_cost.py --provider cuda --samples 512

In every round each pass runs in a process of its own, in turn with the others: plain inference in onnxruntime, the
moments of the objective "output" over all rows and with `--rows auto`, and onnxruntime's MinMax and Entropy calibrators
for quantization. Printed are medians over the rounds: wall seconds, session included; the ratio to plain inference of
the same round and its range; the same ratio of processor time, which other load on the machine enters less; and the
peak memory over that of plain inference. Last the arithmetic: multiply-accumulates of the moments, one triangle each,
over those of the model's matrix products, which is the part of the ratio that no implementation can save.

The models `vit_s` (ViT-S/16 on images of 224 x 224) and `bert_base` (128 tokens) have the shapes of the real ones and
random weights: neither time nor memory depends on their values, but `--rows auto` does. On a machine with other load
give OPENBLAS_NUM_THREADS=1: threads of OpenBLAS wait for each other by spinning, which costs more than they gain there.

On a GPU all passes run there. Memory is that of the host, and seconds hold the start of the device, which is some of
them: give enough samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SAMPLE = Path(__file__).parent.parent / "samples" / "fashion_vit"
OWN = ("all rows", "without width", "rows auto")
PASSES = ("inference", *OWN, "MinMax", "Entropy")


class Network:
    """A graph in the making, with random weights."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, array: Any) -> str:
        """The name of a new initializer."""
        name = f"weight{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        """The name of a new float32 initializer, normally distributed."""
        return self.constant((scale * self.random.standard_normal(shape)).astype(np.float32))

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """The name of a new node's output."""
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def linear(self, x: str, d_in: int, d_out: int) -> str:
        """`x W + b`."""
        product = self.add("MatMul", x, self.normal(d_in, d_out, scale=d_in**-0.5))
        return self.add("Add", product, self.normal(d_out, scale=0.1))

    def norm(self, x: str, width: int) -> str:
        """A layer normalization."""
        scale, shift = self.normal(width, scale=0.1), self.normal(width, scale=0.1)
        return self.add("LayerNormalization", x, self.add("Add", scale, self.constant(np.float32(1))), shift, axis=-1)

    def attention(self, x: str, width: int, heads: int) -> str:
        """Self-attention of `x [N, S, width]`."""
        split = self.constant(np.array([0, 0, heads, width // heads]))
        q, k, v = (self.add("Reshape", self.linear(x, width, width), split) for _ in range(3))
        q, v = (self.add("Transpose", each, perm=[0, 2, 1, 3]) for each in (q, v))
        scaled = self.add("Mul", q, self.constant(np.float32((width // heads) ** -0.5)))
        scores = self.add("MatMul", scaled, self.add("Transpose", k, perm=[0, 2, 3, 1]))
        mixed = self.add("MatMul", self.add("Softmax", scores, axis=-1), v)
        joined = self.add("Transpose", mixed, perm=[0, 2, 1, 3])
        return self.linear(self.add("Reshape", joined, self.constant(np.array([0, 0, width]))), width, width)

    def mlp(self, x: str, width: int) -> str:
        """Two layers with a GELU between."""
        return self.linear(self.add("Gelu", self.linear(x, width, 4 * width)), 4 * width, width)

    def model(self, value: onnx.ValueInfoProto, output: str) -> onnx.ModelProto:
        """The whole, with one input and one output."""
        given = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "network", [value], [given], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def vit(samples: int, *, width: int, blocks: int, heads: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A vision transformer on patches of 16 x 16, normalization first; smooth random images of 224 x 224."""
    network = Network()
    patches = network.add("Conv", "x", network.normal(width, 3, 16, 16, scale=0.04), strides=[16, 16])
    flat = network.add("Reshape", patches, network.constant(np.array([0, width, -1])))
    x = network.add("Add", network.add("Transpose", flat, perm=[0, 2, 1]), network.normal(1, 196, width, scale=0.5))
    for _ in range(blocks):
        x = network.add("Add", x, network.attention(network.norm(x, width), width, heads))
        x = network.add("Add", x, network.mlp(network.norm(x, width), width))
    pooled = network.add("ReduceMean", network.norm(x, width), network.constant(np.array([1])), keepdims=0)
    model = network.model(
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 224, 224]), network.linear(pooled, width, 1000)
    )
    coarse = np.random.default_rng(1).standard_normal((samples, 3, 28, 28)).astype(np.float32)
    return model, {"x": coarse.repeat(8, 2).repeat(8, 3)}


def bert_base(samples: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """BERT-base: width 768, 12 blocks, 12 heads, normalization last; tokens as frequent as words are."""
    network, width = Network(), 768
    x = network.add("Gather", network.normal(30522, width), "ids")
    x = network.norm(network.add("Add", x, network.normal(1, 128, width, scale=0.5)), width)
    for _ in range(12):
        x = network.norm(network.add("Add", x, network.attention(x, width, 12)), width)
        x = network.norm(network.add("Add", x, network.mlp(x, width)), width)
    model = network.model(helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 128]), x)
    ids = np.minimum(np.random.default_rng(1).zipf(1.2, (samples, 128)), 30522) - 1
    return model, {"ids": ids.astype(np.int64)}


MODELS = {
    "vit_s": partial(vit, width=384, blocks=12, heads=6),
    "vit_b": partial(vit, width=768, blocks=12, heads=12),
    "vit_l": partial(vit, width=1024, blocks=24, heads=16),
    "bert_base": bert_base,
}


def run(name: str, model: Path, calib: Path, mask: str | None, provider: str, batch: int) -> dict[str, float]:
    """One pass in this process: its seconds, its processor seconds and its peak in bytes."""
    import onnxruntime.quantization.calibrate as calibrators

    import onnxlr
    from onnxlr.calibrate import accumulate
    from onnxlr.case import as_model
    from onnxlr.data import batches, open_data
    from onnxlr.nvidia import with_options
    from onnxlr.session import PROVIDERS, Session
    from onnxlr.sites import take_inventory

    loaded = as_model(model)
    inputs = Session(loaded, provider=provider, optimize=False).inputs
    samples = list(open_data(calib, inputs))
    rows = "auto" if name == "rows auto" else "all"
    config = onnxlr.Config(objective="output", mask=mask, batch=batch, rows=rows, provider=provider)
    inventory = take_inventory(loaded)
    result = {}
    start, spent = time.perf_counter(), time.process_time()
    if name == "inference":
        session = Session(loaded, provider=provider)
        for feed in batches(samples, batch, inputs):
            session.run(feed)
    elif name in OWN:
        if name == "without width":
            config = replace(config, forms=frozenset({"pair", "block", "shared"}))
            inventory = inventory.observing(config.forms)
        stats = accumulate(loaded, inventory, samples, inputs, config)
        result["samples"] = stats.samples
    else:
        feeds = batches(samples, batch, inputs)

        class Reader(calibrators.CalibrationDataReader):
            def get_next(self) -> Any:
                return next(feeds, None)

        method = {"MinMax": calibrators.CalibrationMethod.MinMax, "Entropy": calibrators.CalibrationMethod.Entropy}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "augmented.onnx")
            calibrator = calibrators.create_calibrator(
                model,
                augmented_model_path=path,
                calibrate_method=method[name],
                providers=with_options(PROVIDERS.get(provider, provider)),
            )
            assert PROVIDERS.get(provider, provider) in calibrator.infer_session.get_providers()
            calibrator.collect_data(Reader())
            calibrator.compute_data()
    result |= {"seconds": time.perf_counter() - start, "processor": time.process_time() - spent}
    return result | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def arithmetic(model: Path, calib: Path) -> tuple[float, int]:
    """Multiply-accumulates of the moments of one row a tensor, over those of the products; bytes of all moments."""
    import onnxlr
    from onnxlr.calibrate import accumulate
    from onnxlr.case import as_model
    from onnxlr.data import open_data
    from onnxlr.session import Session
    from onnxlr.shapes import measure_shapes
    from onnxlr.sites import take_inventory

    loaded = as_model(model)
    inputs = Session(loaded, optimize=False).inputs
    sample = next(iter(open_data(calib, inputs)))
    inventory = take_inventory(loaded, measure_shapes(loaded, dict(sample)))
    stats = accumulate(loaded, inventory, [sample], inputs, onnxlr.Config(objective="output"))
    work = sum(own.count * own.dim * (own.dim + 1) / 2 for own in stats.moments.values())
    return work / float(inventory.macs or np.nan), sum(own.gram.nbytes for own in stats.moments.values())


def measure(model: Path, calib: Path, arguments: argparse.Namespace) -> None:
    """All rounds of one model, and their table."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.passes}
    for _ in range(arguments.rounds):
        for name in found:
            command = [sys.executable, __file__, "--run", name, "--models", str(model), "--calib", str(calib)]
            command += ["--provider", arguments.provider, "--batch", str(arguments.batch)]
            command += ["--mask", arguments.mask] if arguments.mask else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(".", end="", file=sys.stderr, flush=True)
    share, size = arithmetic(model, calib)
    plain = found["inference"]
    base = statistics.median(own["peak"] for own in plain)
    print(f"\n{model.stem}: plain peak {base / 1e6:.0f} MB, moments {size / 1e6:.0f} MB, arithmetic {1 + share:.2f}\n")
    print("| pass | seconds | over plain | processor time over plain | memory over plain | samples |")
    print("|---|---|---|---|---|---|")
    for name, own in found.items():
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(own, plain, strict=True)]
        worked = [a["processor"] / b["processor"] for a, b in zip(own, plain, strict=True)]
        seconds = statistics.median(each["seconds"] for each in own)
        peak = statistics.median(each["peak"] for each in own) - base
        print(
            f"| {name} | {seconds:.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {statistics.median(worked):.2f} ({min(worked):.2f} to {max(worked):.2f}) "
            f"| {peak / 1e6:.0f} MB | {own[0].get('samples', '')} |",
            flush=True,
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit_s,bert_base,fashion")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--mask")
    parser.add_argument("--samples", type=int, default=32, help="of the models with random weights")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--passes", default=",".join(PASSES), type=lambda text: text.split(","))
    parser.add_argument("--run", choices=PASSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        own = (arguments.mask, arguments.provider, arguments.batch)
        print(json.dumps(run(arguments.run, Path(arguments.models), arguments.calib, *own)))
        return
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            model, calib = Path(name), arguments.calib
            if name in MODELS:
                model, calib = Path(folder, name + ".onnx"), Path(folder, "data.npz")
                proto, data = MODELS[name](arguments.samples)
                onnx.save(proto, model)
                np.savez(calib, **data)  # type: ignore[arg-type]
            elif name == "fashion":
                model, calib = SAMPLE / "model.onnx", SAMPLE / "calib"
            measure(model, calib, arguments)


if __name__ == "__main__":
    main()

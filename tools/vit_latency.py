"""Measured latency over counted MACs: a vision transformer's shape with random weights.

    python tools/vit_latency.py [--shape small|base] [--batch 1 8] [--shares 0.75 0.5 0.25] [--threads 1] [--plans]

Every linear layer becomes a pair, and the share is of their parameters, ranks rounded down to a multiple of 16. With
`--plans` the model is what `compress --keep-macs` makes of it, with the objective "output" and all forms: hidden units
that are dropped take their part of the GELU with them. MACs are of the whole model: linear layers, the products of
attention and the patches. A last column near 1 says that what is saved on paper is saved in time; what has no MACs
(normalizations, softmax, GELU) is not saved. On one thread its own processor time is taken, which other load on the
machine hardly enters.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

import onnxlr
from onnxlr.bench import compare_latency
from onnxlr.config import Target
from onnxlr.model_io import Model, from_proto, load, save

SHAPES = {"small": (384, 6), "base": (768, 12)}
DEPTH, TOKENS, PATCH = 12, 197, 768
GOAL = 1.15
SAMPLES = 32


class Vit:
    """A vision transformer without its class token's details: [N, 197, 768] patches in, features out."""

    def __init__(self, width: int, heads: int, depth: int, share: float) -> None:
        self._share, self._width, self._heads = share, width, heads
        self._rng = np.random.default_rng(0)
        self._nodes, self._weights, self.macs = [], [], 0
        self._constant("split", np.array([0, TOKENS, heads, width // heads]))
        self._constant("merge", np.array([0, TOKENS, width]))
        self._constant("scale", np.array((width // heads) ** -0.5, np.float32))
        self._constant("one", np.ones(width, np.float32))
        self._constant("zero", np.zeros(width, np.float32))
        x = self._product("patches", "embed", PATCH, width)
        for layer in range(depth):
            x = self._block(x, f"l{layer}")
        self._node("LayerNormalization", [x, "one", "zero"], "y")

    def model(self) -> Model:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self._nodes,
            "vit",
            [value("patches", TensorProto.FLOAT, ["N", TOKENS, PATCH])],
            [value("y", TensorProto.FLOAT, ["N", TOKENS, self._width])],
            self._weights,
        )
        return from_proto(helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)]))

    def _block(self, x: str, name: str) -> str:
        width = self._width
        normal = self._node("LayerNormalization", [x, "one", "zero"], f"{name}/n1")
        parts = {}
        for part, axes in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            made = self._linear(normal, f"{name}/{part}", width, width)
            apart = self._node("Reshape", [made, "split"], f"{name}/{part}s")
            parts[part] = self._node("Transpose", [apart], f"{name}/{part}t", perm=axes)
        raw = self._node("MatMul", [parts["q"], parts["k"]], f"{name}/raw")
        scores = self._node("Mul", [raw, "scale"], f"{name}/scores")
        weights = self._node("Softmax", [scores], f"{name}/weights", axis=-1)
        mixed = self._node("MatMul", [weights, parts["v"]], f"{name}/mixed")
        self.macs += 2 * TOKENS * TOKENS * width
        back = self._node("Transpose", [mixed], f"{name}/back", perm=[0, 2, 1, 3])
        merged = self._node("Reshape", [back, "merge"], f"{name}/merged")
        x = self._node("Add", [x, self._linear(merged, f"{name}/o", width, width)], f"{name}/x1")
        normal = self._node("LayerNormalization", [x, "one", "zero"], f"{name}/n2")
        hidden = self._node("Gelu", [self._linear(normal, f"{name}/fc1", width, 4 * width)], f"{name}/gelu")
        return self._node("Add", [x, self._linear(hidden, f"{name}/fc2", 4 * width, width)], f"{name}/x2")

    def _linear(self, x: str, name: str, d_in: int, d_out: int) -> str:
        rank = int(self._share * d_in * d_out / (d_in + d_out)) // 16 * 16
        if self._share < 1:
            x, d_in = self._product(x, f"{name}/h", d_in, rank), rank
        y = self._product(x, f"{name}/m", d_in, d_out)
        self._constant(f"{name}/b", np.zeros(d_out, np.float32))
        return self._node("Add", [y, f"{name}/b"], f"{name}/y")

    def _product(self, x: str, name: str, d_in: int, d_out: int) -> str:
        self._constant(f"{name}/w", self._rng.standard_normal((d_in, d_out), np.float32) / np.float32(d_in**0.5))
        self.macs += TOKENS * d_in * d_out
        return self._node("MatMul", [x, f"{name}/w"], name)

    def _constant(self, name: str, values: np.ndarray) -> None:
        self._weights.append(numpy_helper.from_array(values, name))

    def _node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self._nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output


def planned(dense: Vit, shares: list[float], threads: int) -> list[tuple[Model, float]]:
    """What `compress` makes of a model, and the share of its MACs that it keeps."""
    found = []
    samples = np.random.default_rng(2).standard_normal((SAMPLES, TOKENS, PATCH), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        output, work = Path(folder, "small.onnx"), Path(folder, "work")
        np.savez(Path(folder, "data.npz"), patches=samples)
        save(dense.model(), Path(folder, "dense.onnx"))
        for share in shares:
            config = onnxlr.Config(target=Target("keep_macs", share), objective="output", threads=threads)
            report = onnxlr.compress(
                Path(folder, "dense.onnx"), Path(folder, "data.npz"), config, output=output, work=work, force=True
            )
            found.append((load(output), report.after.macs / report.before.macs))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch size")
    parser.add_argument("--plans", action="store_true", help="what compress makes of it, in place of pairs alone")
    arguments = parser.parse_args()
    width, heads = SHAPES[arguments.shape]
    whole = Vit(width, heads, arguments.depth, 1.0)
    if arguments.plans:
        built = planned(whole, arguments.shares, arguments.threads)
    else:
        pairs = [Vit(width, heads, arguments.depth, share) for share in arguments.shares]
        built = [(one.model(), one.macs / whole.macs) for one in pairs]
    models = [whole.model(), *(model for model, _ in built)]
    share_of = "MACs asked for" if arguments.plans else "linear parameters kept"
    print(f"| shape | batch | {share_of} | dense, ms | MACs kept | time kept | time over MACs |")
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for batch in arguments.batch:
        feed = {"patches": np.random.default_rng(1).standard_normal((batch, TOKENS, PATCH), np.float32)}
        dense, *others = compare_latency(
            models, feed, runs=200, budget_seconds=arguments.seconds, threads=arguments.threads
        )
        for share, (_, macs), latency in zip(arguments.shares, built, others, strict=True):
            worst = max(worst, latency.ratio / macs)
            print(
                f"| {arguments.shape} | {batch} | {share:.0%} | {dense.median_ms:.1f} | {macs:.3f} | "
                f"{latency.ratio:.3f} | {latency.ratio / macs:.3f} |",
                flush=True,
            )
    print(f"\nworst {worst:.3f}: {'within' if worst <= GOAL else 'above'} {GOAL}")


if __name__ == "__main__":
    main()

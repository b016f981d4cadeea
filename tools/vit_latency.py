"""Measured latency over counted MACs: a vision transformer's shape with random weights, every linear layer as a pair.

    python tools/vit_latency.py [--shape small|base] [--batch 1 8] [--shares 0.75 0.5 0.25] [--threads 1]

The share is of the linear layers' parameters, ranks rounded down to a multiple of 16. MACs are of the whole model:
linear layers, the products of attention and the patches. A last column near 1 says that what is saved on paper is saved
in time; what has no MACs (normalizations, softmax, GELU) is not saved. On one thread its own processor time is taken,
which other load on the machine hardly enters.
"""

from __future__ import annotations

import argparse

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxlr.bench import compare_latency
from onnxlr.model_io import Model, from_proto

SHAPES = {"small": (384, 6), "base": (768, 12)}
DEPTH, TOKENS, PATCH = 12, 197, 768
GOAL = 1.15


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch size")
    arguments = parser.parse_args()
    width, heads = SHAPES[arguments.shape]
    built = [Vit(width, heads, arguments.depth, share) for share in (1.0, *arguments.shares)]
    models = [one.model() for one in built]
    print("| shape | batch | linear parameters kept | dense, ms | MACs kept | time kept | time over MACs |")
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for batch in arguments.batch:
        feed = {"patches": np.random.default_rng(1).standard_normal((batch, TOKENS, PATCH), np.float32)}
        dense, *others = compare_latency(
            models, feed, runs=200, budget_seconds=arguments.seconds, threads=arguments.threads
        )
        for share, one, latency in zip(arguments.shares, built[1:], others, strict=True):
            macs = one.macs / built[0].macs
            worst = max(worst, latency.ratio / macs)
            print(
                f"| {arguments.shape} | {batch} | {share:.0%} | {dense.median_ms:.1f} | {macs:.3f} | "
                f"{latency.ratio:.3f} | {latency.ratio / macs:.3f} |",
                flush=True,
            )
    print(f"\nworst {worst:.3f}: {'within' if worst <= GOAL else 'above'} {GOAL}")


if __name__ == "__main__":
    main()

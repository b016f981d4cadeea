"""Predicted beside measured latency: what products timed alone say about a whole model.

    python tools/latency_model.py [--layers 12] [--widths 384 768] [--rows 197 1576] [--threads 0]

A stack of square layers is written in four forms: dense, pairs, and pairs with an identity block on the output side
(`h = x A, y = [h, h M]`: Concat) or on the input side (`h = x[:r] + x[r:] M, y = h B`: Split and Add). Each stack is
timed in turn with the dense one, and its ratio is compared with that of the times in `onnxlr.latency`. About three
minutes on two cores, which have to be idle: with as many threads as cores, any other load makes both sides of the table
meaningless (`--threads 1` bears some).
"""

from __future__ import annotations

import argparse

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxlr.bench import compare_latency
from onnxlr.latency import Timings
from onnxlr.model_io import Model, from_proto

RANKS = (64, 128, 192, 256)
FORMS = ("pair", "output side", "input side")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--rows", type=int, nargs="+", default=[197, 1576])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each ratio")
    arguments = parser.parse_args()

    timings = Timings(threads=arguments.threads)
    wanted = [("dense", 0), *((form, rank) for form in FORMS for rank in RANKS)]
    timings.measure(
        (rows, *shape)
        for rows in arguments.rows
        for width in arguments.widths
        for form, rank in wanted
        for shape in products(form, width, rank)
    )
    print("| width | rows | form | rank | dense, ms | predicted, ms | measured ratio | predicted ratio | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    errors = []
    for width in arguments.widths:
        for rows in arguments.rows:
            feed = {"x": np.random.default_rng(0).standard_normal((rows, width), np.float32)}
            dense_us = predicted("dense", width, 0, rows, timings)
            for form in FORMS:
                for rank in RANKS:
                    models = [stack("dense", width, 0, arguments.layers), stack(form, width, rank, arguments.layers)]
                    dense, variant = compare_latency(
                        models, feed, runs=200, budget_seconds=arguments.seconds, threads=arguments.threads
                    )
                    ratio = predicted(form, width, rank, rows, timings) / dense_us
                    error = ratio / variant.ratio - 1
                    errors.append(error)
                    print(
                        f"| {width} | {rows} | {form} | {rank} | {dense.median_ms:.2f} | "
                        f"{arguments.layers * dense_us / 1e3:.2f} | {variant.ratio:.3f} | {ratio:.3f} | {error:+.1%} |",
                        flush=True,
                    )
    within, middle = sum(abs(error) <= 0.05 for error in errors), np.median(np.abs(errors))
    print(f"\n{within} of {len(errors)} within 5%; median {middle:.1%}, worst {max(errors, key=abs):+.1%}")


def products(form: str, width: int, rank: int) -> list[tuple[int, int]]:
    """The matrix products of a layer, (d_in, d_out) each."""
    return {
        "dense": [(width, width)],
        "pair": [(width, rank), (rank, width)],
        "output side": [(width, rank), (rank, width - rank)],
        "input side": [(width - rank, rank), (rank, width)],
    }[form]


def predicted(form: str, width: int, rank: int, rows: int, timings: Timings) -> float:
    """Microseconds of one layer."""
    total = sum(timings.product(rows, *shape) for shape in products(form, width, rank))
    if form.endswith("side"):
        total += timings.moved(rows, width)
    if form == "input side":
        total += timings.moved(rows, rank)  # an Add reads a little more than a Concat
    return total


def stack(form: str, width: int, rank: int, layers: int) -> Model:
    """`layers` layers in a row, weights that keep the scale of the data."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: int) -> None:
        nodes.append(helper.make_node(op, inputs, outputs, **attributes))

    for layer in range(layers):
        x, y = "x" if layer == 0 else f"y{layer - 1}", f"y{layer}"
        names = []
        for index, shape in enumerate(products(form, width, rank)):
            names.append(f"w{layer}.{index}")
            matrix = rng.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5)
            weights.append(numpy_helper.from_array(matrix, names[-1]))
        h, rest, kept, part = (f"{name}{layer}" for name in ("h", "rest", "kept", "part"))
        if form == "dense":
            node("MatMul", [x, *names], [y])
        elif form == "pair":
            node("MatMul", [x, names[0]], [h])
            node("MatMul", [h, names[1]], [y])
        elif form == "output side":
            node("MatMul", [x, names[0]], [h])
            node("MatMul", [h, names[1]], [rest])
            node("Concat", [h, rest], [y], axis=-1)
        else:
            node("Split", [x, f"sizes{layer}"], [kept, rest], axis=-1)
            weights.append(numpy_helper.from_array(np.array([rank, width - rank]), f"sizes{layer}"))
            node("MatMul", [rest, names[0]], [part])
            node("Add", [kept, part], [h])
            node("MatMul", [h, names[1]], [y])
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info(f"y{layers - 1}", TensorProto.FLOAT, ["rows", width])],
        weights,
    )
    return from_proto(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]))


if __name__ == "__main__":
    main()

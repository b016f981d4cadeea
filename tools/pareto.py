"""Low rank beside fewer bits, and both: bytes, latency, error and top-1, and what is on the front.

    python tools/pareto.py fashion [--shares 0.5,0.25] [--threads 1]
    python tools/minilm.py make -o minilm && python tools/pareto.py minilm --folder minilm

The error of the outputs and top-1 are of test data that nothing was calibrated on; latency is of a batch of 8 in turn
with the dense model. A model is on the front if no other is at least as good in bytes, latency and error. Rows with
8 bits start from pairs, since identity blocks do not bear them (`--blocks` shows that too). Compressed models are
left in the working folder and used again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import onnxlr
from onnxlr.bench import compare_latency
from onnxlr.case import prepare
from onnxlr.data import batches, open_data, spread
from onnxlr.demo import sample_folder
from onnxlr.quantize import quantize
from onnxlr.search import QUANTIZE_SAMPLES
from onnxlr.validate import validate

BITS = ("int8", "int8-static", "fp16")
PAIRS = frozenset({"pair", "shared", "width"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["fashion", "minilm"])
    parser.add_argument("--folder", type=Path, default=Path("minilm"))
    parser.add_argument("--shares", default="0.5,0.25", help="of the linear layers' parameters")
    parser.add_argument("--objective", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each latency")
    parser.add_argument("--samples", type=int, default=1000, help="of the test data")
    parser.add_argument("--blocks", action="store_true")
    arguments = parser.parse_args()
    fashion = arguments.model == "fashion"
    folder = sample_folder() if fashion else arguments.folder
    path = folder / ("model.onnx" if fashion else "minilm.onnx")
    mask = None if fashion else "attention_mask"
    config = onnxlr.Config(objective=arguments.objective, threads=arguments.threads, mask=mask)
    case = prepare(path, folder / "calib", config)
    total = case.inventory.parameters
    linear = sum(weight.parameters for weight in case.weights)

    def bits(model: onnxlr.Model, then: str) -> onnxlr.Model:
        feeds = batches(spread(case.calibration, QUANTIZE_SAMPLES), config.batch, case.inputs)
        return quantize(model, then, feeds)

    dense = case.model
    models = {"dense": dense, **{f"dense, {then}": bits(dense, then) for then in BITS}}
    stats = None
    for share in (float(one) for one in arguments.shares.split(",")):
        target = onnxlr.Target("keep_params", (total - linear + share * linear) / total)
        for forms, label in ((config.forms, "all forms"), (PAIRS, "pairs")):
            own = onnxlr.Config(
                objective=arguments.objective, threads=arguments.threads, mask=mask, target=target, forms=forms
            )
            made = Path(f"pareto-{arguments.model}-{share:g}-{label.replace(' ', '-')}.onnx")
            if not made.exists():
                stats = stats or onnxlr.calibrate(dense, folder / "calib", config)
                onnxlr.compress(path, folder / "calib", own, stats=stats, output=made)
            small = onnxlr.load(made)
            name = f"{share:.0%}, {label}"
            models[name] = small
            wanted = BITS[:2] if label == "pairs" else BITS if arguments.blocks else BITS[2:]
            models |= {f"{name}, {then}": bits(small, then) for then in wanted}

    test = spread(open_data(folder / "test", case.inputs), arguments.samples)
    labels = np.load(folder / "test_labels.npy") if fashion else None
    feed = next(batches(test, 8, case.inputs))
    rows: dict[str, tuple[float, float, float]] = {}
    print("| model | MB | bytes kept | latency | error | top-1 |")
    print("|---|---|---|---|---|---|")
    for name, model in models.items():
        ratio = compare_latency(
            [dense, model], feed, runs=60, budget_seconds=arguments.seconds, threads=arguments.threads
        )[1].ratio
        found = validate(dense, model, test, batch=50, mask=mask, labels=labels, threads=arguments.threads)
        rows[name] = (model.nbytes, 1.0 if model is dense else ratio, found.error)
        size, ratio, error = rows[name]
        top = "" if found.metric_b is None else f"{100 * found.metric_b:.1f}"
        print(
            f"| {name} | {size / 1e6:.2f} | {size / dense.nbytes:.0%} | {ratio:.2f} | {error:.4f} | {top} |", flush=True
        )
    front = [
        name
        for name, mine in rows.items()
        if not any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in rows.values())
    ]
    print(f"\non the front of bytes, latency and error: {'; '.join(front)}")


if __name__ == "__main__":
    main()

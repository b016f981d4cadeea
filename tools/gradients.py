"""Time and memory of calibration with gradients, beside plain inference of the same samples.

    python tools/gradients.py [MODEL --calib DATA [--mask INPUT]]

Each pass runs in a process of its own, in turn with the others, and the median over rounds is printed: plain inference
in onnxruntime, the moments of the inputs (objective "output"), and the gradients in torch, which "fisher" adds.
Memory is the peak of the process over that of one which only loads the libraries. Without arguments the model is the
fashion ViT.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SAMPLE = Path(__file__).parent.parent / "samples" / "fashion_vit"
PASSES = ("libraries", "inference", "moments", "gradients")


def run(name: str, arguments: argparse.Namespace) -> None:
    """One pass, in this process; prints its seconds and its peak in bytes."""
    import torch  # noqa: F401 -- every pass carries the same libraries

    import onnxlr
    from onnxlr.calibrate import accumulate
    from onnxlr.case import prepare
    from onnxlr.data import batches
    from onnxlr.fisher import gradient_moments
    from onnxlr.session import Session

    config = onnxlr.Config(objective="output", mask=arguments.mask)
    seconds = 0.0
    if name != "libraries":
        case = prepare(arguments.model, arguments.calib, config, onnxlr.ImageOptions())
        samples = list(case.calibration)
        start = time.perf_counter()
        if name == "inference":
            session = Session(case.model)
            for feed in batches(samples, config.batch, case.inputs):
                session.run(feed)
        else:
            gather = accumulate if name == "moments" else gradient_moments
            gather(case.model, case.inventory, samples, case.inputs, config)
        seconds = time.perf_counter() - start
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=SAMPLE / "model.onnx")
    parser.add_argument("--calib", type=Path, default=SAMPLE / "calib")
    parser.add_argument("--mask")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=PASSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run, arguments)
        return
    found: dict[str, list[list[float]]] = {name: [] for name in PASSES}
    for _ in range(arguments.rounds):
        for name in PASSES:
            printed = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--run", name], capture_output=True, text=True, check=True
            ).stdout
            found[name].append(json.loads(printed))
    base = statistics.median(peak for _, peak in found["libraries"])
    ratios = {
        name: statistics.median(own[0] / plain[0] for own, plain in zip(found[name], found["inference"], strict=True))
        for name in PASSES[1:]
    }
    print("| pass | seconds | over inference | memory over the libraries |\n|---|---|---|---|")
    for name in PASSES[1:]:
        seconds = statistics.median(second for second, _ in found[name])
        peak = statistics.median(peak for _, peak in found[name])
        print(f"| {name} | {seconds:.1f} | {ratios[name]:.2f} | {(peak - base) / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()

"""The README's table and picture: objectives side by side on the sample's vision transformer.

    python tools/fashion.py [--model samples/fashion_vit/model.onnx] [--figure samples/fashion_vit/objectives.svg]

Every objective compresses the model to every share of its parameters, calibrated on the sample's unlabelled images, and
is tested on the labelled ones. "utilized" is the method of arXiv 2407.04797 at a fixed rank; "weight" is the plain
singular value decomposition, which no data enter; "fisher" needs torch. About five minutes on two cores; the figure
needs matplotlib.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnxlr

SAMPLE = Path(__file__).parent.parent / "samples" / "fashion_vit"
SHARES = (0.75, 0.5, 0.35, 0.25, 0.15)
OBJECTIVES = ("weight", "utilized", "output", "fisher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SAMPLE / "model.onnx")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()

    dense = onnxlr.load(arguments.model)
    results = {}
    for objective in OBJECTIVES:
        settings = onnxlr.Config(objective=objective)
        stats = None if objective == "weight" else onnxlr.calibrate(dense, SAMPLE / "calib", settings)
        for share in SHARES:
            config = onnxlr.Config(objective=objective, target=onnxlr.Target("keep_params", share), rank_multiple=8)
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder, "compressed.onnx")
                report = onnxlr.compress(dense, SAMPLE / "calib", config, stats=stats, output=output)
                parity = onnxlr.validate(dense, output, SAMPLE / "test", batch=100, labels=SAMPLE / "test_labels.npy")
            results[objective, share] = parity, report

    parity, _ = results["output", SHARES[0]]
    print(f"dense: top-1 {100 * parity.metric_a:.2f}% on {parity.samples} test images\n")
    print("| parameters kept | " + " | ".join(OBJECTIVES) + " | MACs | file | latency, batch 8 |")
    print("|---|" + "---|" * (len(OBJECTIVES) + 3))
    for share in SHARES:
        cells = [
            f"{100 * results[objective, share][0].metric_b:.2f}% ({results[objective, share][0].error:.3f})"
            for objective in OBJECTIVES
        ]
        report = results["output", share][1]
        before, after = report.before, report.after
        cells += [
            f"{after.macs / before.macs:.0%}",
            f"{after.file_bytes / before.file_bytes:.0%}",
            f"{report.latency_ratio:.0%}",
        ]
        print(f"| {after.parameters / before.parameters:.1%} | " + " | ".join(cells) + " |")
    if arguments.figure:
        draw(results, parity.metric_a, arguments.figure)


def draw(results: dict, dense: float, path: Path) -> None:
    """Error of the scores and top-1 over the share of parameters kept."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "onnxlr"  # the same figures give the same file
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    shares = [100 * share for share in SHARES]
    for objective, colour in zip(OBJECTIVES, ("#b0b0b0", "#e08a2e", "#1f6fb4", "#2a9d5c"), strict=True):
        parities = [results[objective, share][0] for share in SHARES]
        left.plot(shares, [p.error for p in parities], "o-", color=colour, label=objective)
        right.plot(shares, [100 * p.metric_b for p in parities], "o-", color=colour, label=objective)
    left.set(xlabel="parameters kept, %", ylabel="relative error of the scores", yscale="log")
    right.set(xlabel="parameters kept, %", ylabel="top-1 on test images, %")
    right.axhline(100 * dense, color="black", linewidth=0.8, linestyle=":", label="dense")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    right.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

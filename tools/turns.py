"""What measuring models in turn does to their ratio: a model against the half of it, which takes half of its time.

    python tools/turns.py [--layers 4] [--width 384] [--rows 197] [--rounds 600]

After a run onnxruntime's threads go on looking for work, unless they are told not to (`allow_spinning` 0) or to stop at
the end of a run (`force_spinning_stop` 1). Timed are, round by round so that the machine's drift meets all alike: both
models in turn in one process, in those three ways; both in turn, each in a process of its own; and each alone for some
runs at a time, which is the ratio that the others are to find. On a machine with other load the median says how long
the others' turns take; the fastest of many runs are those that met no other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import onnxruntime
from latency_model import stack

WAYS = {
    "default": {},
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "spinning stops with the run": {"session.force_spinning_stop": "1"},
}
BURST = 30
"""Runs at a time; the first two of them are not counted."""
PAUSE = 0.1
"""Seconds between bursts, longer than threads spin."""


class Here:
    """A model in this process."""

    def __init__(self, layers: int, entries: dict[str, str], arguments: argparse.Namespace) -> None:
        options = onnxruntime.SessionOptions()
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        proto = stack("dense", arguments.width, 0, layers).serialize()
        self._session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        self._feed = {"x": np.random.default_rng(0).standard_normal((arguments.rows, arguments.width), np.float32)}

    def seconds(self, runs: int = 1) -> list[float]:
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            self._session.run(None, self._feed)
            times.append(time.perf_counter() - start)
        return times


class There:
    """A model in a process of its own."""

    def __init__(self, layers: int, way: str, arguments: argparse.Namespace) -> None:
        sizes = ["--width", str(arguments.width), "--rows", str(arguments.rows)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(layers), way, *sizes],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.seconds()

    def seconds(self, runs: int = 1) -> list[float]:
        self._process.stdin.write(f"{runs}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rows", type=int, default=197)
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--serve", nargs=2, metavar=("LAYERS", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        layers, way = arguments.serve
        model = Here(int(layers), WAYS[way], arguments)
        for line in sys.stdin:
            print(json.dumps(model.seconds(int(line))), flush=True)
        return

    halves = (arguments.layers, arguments.layers // 2)
    here = {way: [Here(layers, entries, arguments) for layers in halves] for way, entries in WAYS.items()}
    there = {way: [There(layers, way, arguments) for layers in halves] for way in WAYS}
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(-(-arguments.rounds // (BURST - 2))):
        for place, models in (("one process", here), ("two processes", there)):
            for way, (whole, half) in models.items():
                time.sleep(PAUSE)
                turns = [(*whole.seconds(), *half.seconds()) for _ in range(BURST)]
                times.setdefault(f"in turn, {place}, {way}", []).extend(turns[2:])
        for way, models in there.items():
            bursts = []
            for model in models:
                time.sleep(PAUSE)
                bursts.append(model.seconds(BURST)[2:])
            times.setdefault(f"alone, {way}", []).extend(zip(*bursts, strict=True))
    for models in there.values():
        for model in models:
            model.end()
    print("| how | whole, ms: fastest, median | half, ms | ratio of the fastest | of medians | median of ratios |")
    print("|---|---|---|---|---|---|")
    for how, pairs in times.items():
        both = 1e3 * np.asarray(pairs)
        (fast_a, fast_b), (a, b) = np.quantile(both, 0.03, axis=0), np.median(both, axis=0)
        print(
            f"| {how} | {fast_a:.2f}, {a:.2f} | {fast_b:.2f}, {b:.2f} | {fast_b / fast_a:.3f} | {b / a:.3f} | "
            f"{np.median(both[:, 1] / both[:, 0]):.3f} |"
        )


if __name__ == "__main__":
    main()

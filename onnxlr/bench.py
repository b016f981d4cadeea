"""Latency of models, measured in turn.

One round runs every model once, on the same feed: A B A B ... A machine's clock, caches and other load drift over
seconds, so the times of one round share them, and the ratio of two models is taken round by round:

    ratio of B = median over rounds of (time of B / time of A)

which is steadier than the ratio of two medians measured one after the other. The models' sessions share a process,
and no thread of one is awake while another runs (`onnxlr.session`), or ratios would be pulled towards 1 on few cores.
Where an application lets onnxruntime's threads spin on idle cores, all its models run some percent faster than here.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxlr.errors import ConfigError
from onnxlr.session import PROVIDERS, Session, provider_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnxlr.model_io import Model

MIN_RUNS = 5
"""Rounds that are run however small the time budget: fewer have no median worth the name."""

_QUANTILES = [0.5, 0.1, 0.9]


@dataclass(frozen=True, slots=True)
class Latency:
    """One model's time for one feed.

    Attributes
    ----------
    median_ms, p10_ms, p90_ms : float
        Quantiles of the time of a run by `clock_of`, in milliseconds.
    ratio, ratio_p10, ratio_p90 : float
        Quantiles over rounds (the median first) of this model's time over the first model's; 1 for the first itself.
    runs : int
        Timed runs.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def compare_latency(
    models: Sequence[Model],
    feed: Mapping[str, np.ndarray],
    *,
    runs: int = 50,
    warmup: int = 2,
    budget_seconds: float = 4.0,
    provider: str = "cpu",
    threads: int = 0,
) -> list[Latency]:
    """Time models against each other on one feed.

    Parameters
    ----------
    models : sequence of Model
        What to time; ratios are against the first.
    feed : mapping of str to array
        What every run gets, with the batch size that is to be measured.
    runs : int
        Timed rounds at most.
    warmup : int
        Rounds run and not timed before; the first runs allocate memory and, on a GPU, compile kernels.
    budget_seconds : float
        No round begins later than this after the first warm-up began, but the lesser of `runs` and `MIN_RUNS` rounds
        are always timed. Loading the models is not counted.
    provider, threads
        As of `Session`.

    Returns
    -------
    list of Latency
        In the order of `models`.

    Raises
    ------
    ConfigError
        No model, or a number out of its range.
    InstallError, ModelError
        As `Session`.
    """
    if not models:
        raise ConfigError("no model to time: give one or more")
    if runs < 1 or warmup < 0 or budget_seconds < 0:
        raise ConfigError(
            f"runs {runs}, warmup {warmup}, budget_seconds {budget_seconds}: expected at least 1, 0 and 0 of them"
        )
    sessions = [Session(model, provider=provider, threads=threads) for model in models]
    deadline = time.perf_counter() + budget_seconds
    for done in range(warmup):
        if done and time.perf_counter() > deadline:
            break
        for session in sessions:
            session.run(feed)
    rounds: list[list[float]] = []
    clock = clock_of(provider, threads)
    while len(rounds) < min(runs, MIN_RUNS) or (len(rounds) < runs and time.perf_counter() < deadline):
        rounds.append([_seconds(session, feed, clock) for session in sessions])
    times = np.asarray(rounds)
    middle, low, high = 1e3 * np.quantile(times, _QUANTILES, axis=0)
    ratio, least, most = np.quantile(times / times[:, :1], _QUANTILES, axis=0)
    columns = np.stack([middle, low, high, ratio, least, most]).T.tolist()
    return [Latency(a, b, c, d, e, f, len(rounds)) for a, b, c, d, e, f in columns]


def clock_of(provider: str, threads: int) -> Callable[[], float]:
    """What runs are timed with, in seconds.

    A single thread on the CPU is timed by its own processor time, which other load on the machine does not enter, where
    the system counts it finely enough; all else by the wall clock.
    """
    alone = provider_name(provider) == PROVIDERS["cpu"] and threads == 1
    return time.thread_time if alone and time.get_clock_info("thread_time").resolution <= 1e-6 else time.perf_counter


def _seconds(session: Session, feed: Mapping[str, np.ndarray], clock: Callable[[], float]) -> float:
    start = clock()
    session.run(feed)
    return clock() - start

"""What fine-tuning did and found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recovery:
    """A run of fine-tuning.

    Attributes
    ----------
    kept
        Whether its model is better on all held-out samples than the one before, and was taken.
    ended
        Why training ended.
    steps, steps_planned
        Done, and at most.
    samples, held_out
        How many samples were trained on, and how many the result was validated on.
    trained
        Numbers in the weights that were trained.
    inner
        Inner tensors that were taught beside the outputs.
    error_before, error_after
        Relative error of the outputs on the held-out samples; after: of the best model seen, kept or not.
    metric_before, metric_after, metric_dense
        The task metric there; None without labels.
    history
        By look at the held-out samples: steps done, mean loss since the last look, relative error of the outputs.
    processes
        How many took part.
    seconds
        All in all.
    """

    kept: bool
    ended: str
    steps: int
    steps_planned: int
    samples: int
    held_out: int
    trained: int
    inner: tuple[str, ...]
    error_before: float
    error_after: float
    metric_before: float | None
    metric_after: float | None
    metric_dense: float | None
    history: tuple[tuple[int, float, float], ...]
    processes: int
    seconds: float

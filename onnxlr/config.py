"""What a user can ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from onnxlr.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Objective = Literal["auto", "weight", "utilized", "output", "fisher"]
Form = Literal["pair", "block", "shared", "width", "separable"]
Allocation = Literal["global", "uniform"]
Trained = Literal["factors", "all"]
Augment = Literal["auto", "always", "never"]
Then = Literal["int8", "int8-static", "fp16"]
RowChoice = Literal["all", "auto"]
TargetKind = Literal["energy", "keep_params", "keep_macs", "max_latency", "max_error", "min_metric_kept"]

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
FORMS: tuple[Form, ...] = get_args(Form)
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
TRAINED: tuple[Trained, ...] = get_args(Trained)
AUGMENT: tuple[Augment, ...] = get_args(Augment)
THENS: tuple[Then, ...] = get_args(Then)
ROWS: tuple[RowChoice, ...] = get_args(RowChoice)
TARGETS: tuple[TargetKind, ...] = get_args(TargetKind)
BUDGETS: frozenset[TargetKind] = frozenset({"keep_params", "keep_macs", "max_latency"})
"""Targets that are a share of what the dense model costs, and allocated; others hold for each weight or are sought."""


def multiple_for(provider: str) -> int:
    """What ranks should be multiples of: CPU kernels compute 16 columns at a time, a GPU's half-precision units 8."""
    return 16 if provider.lower() in ("cpu", "cpuexecutionprovider") else 8


@dataclass(frozen=True, slots=True)
class Target:
    """How far to compress; one of these at a time.

    energy
        Per weight: the least rank that keeps this share of the energy, in the sense of the objective.
    keep_params, keep_macs
        The share of the whole model's parameters, or multiply-accumulates, to keep; met exactly, from below.
    max_latency
        The share of the dense model's time for one run of `Config.batch` samples; allocated by times of products
        and convolutions on this machine, then measured on the model in turn with the dense one.
    max_error
        The relative error of the model's outputs on held-out data; the smallest model within it is searched.
    min_metric_kept
        The share of the dense model's task metric on held-out labelled data; searched likewise.
    """

    kind: TargetKind = "max_error"
    value: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in TARGETS:
            raise ConfigError(f"unknown target {self.kind!r}: choose one of {', '.join(TARGETS)}")
        if self.kind == "max_error" and not (self.value > 0 and math.isfinite(self.value)):
            raise ConfigError(f"max_error must be above 0 and finite, not {self.value}")
        if self.kind != "max_error" and not 0 < self.value <= 1:
            raise ConfigError(f"{self.kind} must be above 0 and at most 1, not {self.value}")

    def __str__(self) -> str:
        return f"{self.kind.replace('_', '-')} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that decides a compression, besides the model and its data.

    Attributes
    ----------
    objective
        What a factorization minimises: see `onnxlr.factorize`.
    target
        How far to compress.
    include, exclude
        Shell patterns of site or weight names; a weight takes part if one of its sites is included (all are, when
        `include` is empty) and none is excluded.
    ranks
        Fixed ranks by pattern; the last pattern that matches counts.
    rank_multiple
        Ranks are multiples of this number: hardware runs them faster.
    margin
        No factors that keep more than this share of a weight's parameters: they save little and add operators. The form
        "width" makes none.
    floor
        No rank and no number of hidden units below this share of the full one is used.
    forms
        What may be made of a weight: a plain pair; a pair with an identity block; pairs with one first factor for
        weights that read the same tensor; fewer hidden units; of a convolution's kernel a column, then a row.
    allocation
        One budget for the whole model, or the same share for every weight.
    rounds
        How often importances are measured again at the plan that was found, where it errs otherwise than predicted and
        as long as that makes it better.
    batch
        Samples in a batch, where the model's batch axis is free.
    holdout_every
        One sample of so many is held out for validation and never calibrated on.
    rows
        "all": moments of every row of the calibration data. "auto": of samples in random order, until more would change
        little.
    memory
        Bytes that moments may take at a time: they are gathered in several passes where all take more. None: no limit.
    mask
        Name of the input that is nonzero where a token is real, for padded batches.
    loss
        "cross-entropy" or "module:function" of (outputs, labels), the sum over a batch in torch: what gradients are of,
        where labels are given; those of the outputs themselves when None. Outputs that are a softmax or sigmoid come as
        the scores before it.
    metric
        "top1", "top1:output" or "module:function", the task metric where labels are given.
    then
        What is done with the compressed model at last: see `onnxlr.quantize`. Bounds on the error or the metric hold
        for the result, shares of parameters, multiply-accumulates or latency for the model before. With 8 bits no
        identity blocks are made: their factors cannot be balanced.
    provider, threads
        Where and how onnxruntime runs.
    """

    objective: Objective = "auto"
    target: Target = field(default_factory=Target)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    rank_multiple: int = 16
    margin: float = 0.85
    floor: float = 0.0
    forms: frozenset[Form] = frozenset(FORMS)
    allocation: Allocation = "global"
    rounds: int = 1
    batch: int = 8
    holdout_every: int = 8
    rows: RowChoice = "all"
    memory: int | None = None
    mask: str | None = None
    loss: str | None = None
    metric: str = "top1"
    then: Then | None = None
    provider: str = "cpu"
    threads: int = 0

    @property
    def corrects_bias(self) -> bool:
        """Whether the pairs of the objective come with a correction of the bias."""
        return self.objective in ("output", "fisher")

    def __post_init__(self) -> None:
        if unknown := self.forms - set(FORMS):
            raise ConfigError(f"unknown form {min(unknown)!r}: choose of {', '.join(FORMS)}")
        if self.allocation not in ALLOCATIONS:
            raise ConfigError(f"unknown allocation {self.allocation!r}: choose one of {', '.join(ALLOCATIONS)}")
        if self.then is not None and self.then not in THENS:
            raise ConfigError(f"unknown step {self.then!r} after compression: choose one of {', '.join(THENS)}")
        if self.rows not in ROWS:
            raise ConfigError(f"unknown rows {self.rows!r}: choose one of {', '.join(ROWS)}")
        if self.rounds < 0:
            raise ConfigError(f"rounds must be at least 0, not {self.rounds}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"unknown objective {self.objective!r}: choose one of {', '.join(OBJECTIVES)}")
        if self.memory is not None and self.memory < 1:
            raise ConfigError(f"memory must be at least 1 byte, not {self.memory}")
        for name in ("rank_multiple", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.holdout_every < 2:
            raise ConfigError(
                f"holdout_every must be at least 2, not {self.holdout_every}: some data must be left over"
            )
        if not 0 < self.margin <= 1:
            raise ConfigError(f"margin must be above 0 and at most 1, not {self.margin}")
        if not 0 <= self.floor < 1:
            raise ConfigError(f"floor must be at least 0 and below 1, not {self.floor}")
        for pattern, rank in self.ranks.items():
            if rank < 1:
                raise ConfigError(f"the rank for {pattern!r} must be at least 1, not {rank}")


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a compressed model is trained to do what the dense one does.

    Attributes
    ----------
    train
        "factors": the weights that compression made. "all": every weight that operators learn.
    epochs
        Passes over the calibration samples; when None as many as make 2,000 steps, and at least 3.
    batch
        Samples in a step, over all processes.
    learning_rate
        The most that a step changes a weight by, relative to its size, at the height of the schedule.
    augment
        Shift, mirror and blend images: "auto" does so where each is seen more than 100 times.
    loss
        "cross-entropy" or "module:function", as `Config.loss`: added to the distance from the dense model, where labels
        are given. When None it is cross-entropy for the metric top1, and for another metric labels are not trained on.
    seed
        Of the order of samples and whatever else is drawn.
    """

    train: Trained = "factors"
    epochs: int | None = None
    batch: int = 32
    learning_rate: float = 0.01
    augment: Augment = "auto"
    loss: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise ConfigError(f"unknown weights to train {self.train!r}: choose one of {', '.join(TRAINED)}")
        if self.augment not in AUGMENT:
            raise ConfigError(f"unknown augment {self.augment!r}: choose one of {', '.join(AUGMENT)}")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs must be at least 1, not {self.epochs}")
        if self.batch < 1:
            raise ConfigError(f"batch must be at least 1, not {self.batch}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ConfigError(f"learning_rate must be above 0 and finite, not {self.learning_rate}")

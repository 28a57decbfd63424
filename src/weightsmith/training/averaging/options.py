"""Settings of averaging and of SeWA's mask."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from weightsmith.errors import InputError

Method = Literal["sewa", "uniform", "lawa", "every", "random", "best", "greedy", "swa", "ema"]
LEARNED: tuple[Method, ...] = ("sewa", "best", "greedy")
"""Methods that look at a loss."""
RUNNING: tuple[Method, ...] = ("swa", "ema")
"""Methods that keep one running mean during training instead of candidates."""


@dataclass(frozen=True, kw_only=True)
class SeWAOptions:
    """How SeWA learns which candidates to keep.

    Attributes:
        steps: Iterations; one forward and backward pass each, times `mc_samples`.
        mc_samples: Draws of the mask in an iteration.
        learning_rate: Of Adam on the mask; 0.02 for prob and 0.1 for logit when left out.
        temperature: Of the relaxed mask at the first and the last iteration, geometric in between.
        parameterization: prob learns keep probabilities under the constraint that they sum to at most K;
            logit learns free logits.
        normalize: sum divides the relaxed mixture by the sum of its mask; count divides by K, to the letter
            of the paper, which also rescales the network.
        hard: Evaluate the mean of the K highest noisy logits and use the relaxed mask for the gradient only.
        polish: Single swaps tried after learning, each kept when it lowers the loss.
        seed: Of the draws.
    """

    steps: int = 200
    mc_samples: int = 1
    learning_rate: float | None = None
    temperature: tuple[float, float] = (1.0, 0.1)
    parameterization: Literal["prob", "logit"] = "prob"
    normalize: Literal["sum", "count"] = "sum"
    hard: bool = False
    polish: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("steps", "mc_samples"):
            _check_count(key, getattr(self, key))
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not all(0 < value < math.inf for value in self.temperature):
            raise InputError(f"temperature must be above 0 at both ends, got {self.temperature}")
        if self.polish < 0:
            raise InputError(f"polish must not be negative, got {self.polish}")
        for key, known in (("parameterization", ("prob", "logit")), ("normalize", ("sum", "count"))):
            if getattr(self, key) not in known:
                raise InputError(f"{key} must be one of {', '.join(known)}, got {getattr(self, key)!r}")


@dataclass(frozen=True, kw_only=True)
class AveragingOptions:
    """Which states of a run are averaged, and how they are chosen.

    Attributes:
        method: sewa; a rule: uniform (all candidates), lawa (the latest), every (evenly spread), random; a
            search: best (lowest loss alone), greedy (soup); or a running mean without candidates: swa, ema.
        num_select: Candidates averaged (K) by sewa, lawa, every, random and best; auto lets sewa choose by
            loss.
        num_candidates: Latest states kept as candidates (N); each costs a copy of the trained weights on
            disk.
        start: Where collecting begins: a fraction of the run below 1, or a step.
        every: Optimiser steps from one candidate (or running update) to the next; spread over the tail so
            that `num_candidates` fill it when left out.
        decay: Of the running mean of ema, per update.
        objective: val needs held-out data, train takes the training data (the paper's), auto takes val when
            there is held-out data.
        batches: Batches that a loss is measured on by best, greedy, polish and auto.
        norm_statistics: How running statistics of batch normalisation are made: recompute (a pass over
            training data after averaging) or average.
        seed: Of random.
        sewa: How the mask is learned.
    """

    method: Method = "sewa"
    num_select: int | Literal["auto"] = 10
    num_candidates: int = 100
    start: float = 0.8
    every: int | None = None
    decay: float = 0.999
    objective: Literal["auto", "val", "train"] = "auto"
    batches: int = 8
    norm_statistics: Literal["recompute", "average"] = "recompute"
    seed: int = 0
    sewa: SeWAOptions = field(default_factory=SeWAOptions)

    def __post_init__(self) -> None:
        known = ("sewa", "uniform", "lawa", "every", "random", "best", "greedy", "swa", "ema")
        if self.method not in known:
            raise InputError(f"method must be one of {', '.join(known)}, got {self.method!r}")
        if self.num_select != "auto":
            _check_count("num_select", self.num_select)
        elif self.method != "sewa":
            raise InputError(f"num_select `auto` is for sewa, not for {self.method}")
        for key in ("num_candidates", "batches"):
            _check_count(key, getattr(self, key))
        if self.every is not None:
            _check_count("every", self.every)
        if not (0 <= self.start < math.inf) or (self.start >= 1 and self.start != int(self.start)):
            raise InputError(f"start must be a fraction below 1 or a whole step, got {self.start}")
        if not 0 <= self.decay < 1:
            raise InputError(f"decay must be in 0 <= decay < 1, got {self.decay}")
        if self.method not in ("uniform", "greedy", *RUNNING) and self.num_select != "auto":
            check_select(self.num_select, self.num_candidates)

    def schedule(self, total_steps: int) -> tuple[int, int]:
        """(first step, distance) of the states collected in a run of `total_steps`.

        The last one is the run's last step where the distance is derived.
        """
        first = int(self.start * total_steps) if self.start < 1 else int(self.start)
        every = self.every or max(1, (total_steps - first) // self.num_candidates)
        return first, every

    def collects(self, step: int, total_steps: int) -> bool:
        """Whether the state after optimiser step number `step` (1-based) is a candidate."""
        first, every = self.schedule(total_steps)
        return step > first and (total_steps - step) % every == 0


def check_select(num_select: int, num_candidates: int) -> None:
    """Refuse to choose more than there is.

    Raises:
        InputError: gives both numbers.
    """
    if num_select < 1 or num_select > num_candidates:
        raise InputError(f"num_select must be in 1..{num_candidates} (the candidates), got {num_select}")


def _check_count(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{key} must be a whole number of at least 1, got {value!r}")

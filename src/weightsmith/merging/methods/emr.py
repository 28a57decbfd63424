"""EMR: one elected change for all tasks, masked and rescaled for each: a model for every task.

Problem  One merged model gives up some of what each fine-tune can; where the task is known, a mask over one
         shared change gives most of it back.
Rule     gamma = sgn(sum_t tau_t),  tau_t = theta_t - theta_0
         elect    tau = gamma * the largest |tau_t| among the tau_t with sign gamma, entry by entry
         mask     mask_t = tau_t tau > 0
         rescale  lambda_t = sum |tau_t| / sum |mask_t tau|     over the whole model
         theta of task t = theta_0 + lambda_t mask_t tau
Source   Huang et al., arXiv:2405.17461. It needs the task at inference: a merge writes one folder for each,
         or that of `task` alone. Where the votes cancel exactly (gamma 0) nothing is elected.
Cost     For each task two passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.options import OptionError
from weightsmith.merging.parameter import ParallelMap, Parameter, Tile
from weightsmith.merging.sums import piece_absolutes, total
from weightsmith.tensors.blend import scaled, summed


@dataclass(frozen=True, kw_only=True)
class Emr:
    """Elect, mask, rescale.

    Attributes:
        task: Number of the model, from 1 on in the order of the page, whose task the output is for; null
            makes a folder for each.
    """

    task: int | None = None

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    per_task: ClassVar[bool] = True
    global_survey: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.task is not None and self.task < 1:
            raise OptionError("task", f"must be the number of a model, from 1 on, got {self.task}")

    def survey(self, parameter: Parameter) -> tuple[float, float]:
        """Of one tensor: sum of the task's |change|, sum of what is elected under its mask."""
        place = self._place(parameter.num_models)
        before: list[np.ndarray] = []
        after: list[np.ndarray] = []
        for tile in parameter.tiles():
            before.append(piece_absolutes(tile.deltas()[place], parameter, tile.scratch))
            again = parameter.tile(tile.start, tile.start + tile.numel)
            after.append(piece_absolutes(masked(again.deltas(), place, again), parameter, again.scratch))
        return total(before), total(after)

    def survey_all(self, parameters: Sequence[Parameter], parallel: ParallelMap) -> Mapping[str, float]:
        """The factor of the task, the same for every tensor."""
        sums = parallel(self.survey, parameters)
        own, kept = (float(np.sum(column)) for column in zip(*sums, strict=True))
        factor = own / kept if kept > 0 else 1.0
        return {parameter.name: factor for parameter in parameters}

    def merge_tile(self, tile: Tile, stats: float) -> np.ndarray:
        """Base plus the task's share of the elected change, fp32 (n,)."""
        assert tile.base is not None
        change = scaled(masked(tile.deltas(), self._place(len(tile.models)), tile), stats)
        return np.add(tile.base, change, out=change)

    def check_models(self, num_models: int) -> None:
        """Refuse a task that is no model.

        Raises:
            OptionError: says what there is.
        """
        if self.task is not None:
            self._place(num_models)

    def _place(self, num_models: int) -> int:
        if self.task is None or self.task > num_models:
            found = "none is named" if self.task is None else f"got {self.task}"
            raise OptionError("task", f"must be the number of a model, 1 .. {num_models}; {found}")
        return self.task - 1


def masked(deltas: np.ndarray, place: int, tile: Tile) -> np.ndarray:
    """The elected change where the model at `place` agrees with it, else 0.

    Args:
        deltas: Changes of the models, fp32 (T, n). Overwritten.
        place: Of the model whose mask is taken.
        tile: Where they are.

    Returns:
        fp32 (n,), a scratch buffer.
    """
    votes = summed(deltas, tile.scratch.get("votes", deltas.shape[1]))
    sign = np.sign(votes, out=votes)
    # With the elected sign taken out, those who agree are the positive ones.
    np.multiply(deltas, sign, out=deltas)
    agrees = tile.scratch.get("flags", deltas.shape[1], np.bool_)
    np.greater(deltas[place], np.float32(0), out=agrees)
    largest = np.max(deltas, axis=0, out=tile.scratch.get("largest", deltas.shape[1]))
    np.multiply(largest, agrees, out=largest)
    return np.multiply(largest, sign, out=largest)

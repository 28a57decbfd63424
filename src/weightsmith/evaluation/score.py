"""One number about one model, with what a reader must know to compare it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from weightsmith.errors import InputError

RANGES: dict[str, tuple[float, float]] = {
    "bits_per_character": (0.0, math.inf),
    "bits_per_byte": (0.0, math.inf),
    "exact_match": (0.0, 1.0),
    "accuracy": (0.0, 1.0),
    "acc": (0.0, 1.0),
    "acc_norm": (0.0, 1.0),
    "balanced_recall": (-1.0, 1.0),
}
"""What each metric of ours, and the usual ones of the harness, can be; another may be any finite number."""


@dataclass(frozen=True, slots=True)
class Score:
    """A task's score.

    Attributes:
        metric: What was measured: a key of `RANGES`, or a user's own word.
        value: The number.
        higher_is_better: Its direction.
        n: Characters, bytes or items behind it.
        chance: What guessing scores, where that is known.
    """

    metric: str
    value: float
    higher_is_better: bool
    n: int
    chance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The score as plain JSON values."""
        return asdict(self)

    def checked(self, model: str, task: str) -> Score:
        """This score.

        Raises:
            InputError: it is NaN, infinite or outside its metric's range; names model and task.
        """
        low, high = RANGES.get(self.metric, (-math.inf, math.inf))
        if not math.isfinite(self.value):
            raise InputError(
                f"{model}: task `{task}` scored {self.value}, expected a finite {self.metric}; "
                "`weightsmith inspect --norms` shows weights that are not finite"
            )
        if not low <= self.value <= high:
            raise InputError(
                f"{model}: task `{task}` scored {self.value}, {self.metric} lies in {low}..{high}"
            )
        return self

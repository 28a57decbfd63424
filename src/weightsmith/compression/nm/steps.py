"""The steps of MaskPro: masks are drawn, tried on a batch, and learnt from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from weightsmith.compression.nm.batches import Batch, batch_key, to_device
from weightsmith.compression.nm.learner import Learner
from weightsmith.compression.nm.masked import MaskedWeights
from weightsmith.compression.nm.options import MaskProConfig
from weightsmith.compression.nm.state import State
from weightsmith.errors import InputError

LossFn = Callable[[nn.Module, Batch], Any]
_WINDOW, _MOST_SKIPPED = 200, 10
_LARGE_MOVE = 5.0
_SHARE_OF_STD = 0.1


class Steps:
    """The steps of a run, one after another.

    Args:
        model: Whose loss is taken.
        config: Settings.
        loss_fn: From (model, batch) to a loss.
        state: Of the run; changed in place.
        learner: Of its logits.
        weights: The model's, under whatever mask is tried.

    Attributes:
        whole: Whether the state is that between two steps.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MaskProConfig,
        loss_fn: LossFn,
        state: State,
        learner: Learner,
        weights: MaskedWeights,
    ) -> None:
        self.whole = True
        self._model, self._config, self._loss_fn = model, config, loss_fn
        self._state, self._learner, self._weights = state, learner, weights
        self._warned = False

    def take(self, turn: Turn) -> None:
        """Draw masks, try them on a batch, and move the logits.

        Raises:
            InputError: a loss that is not finite, of the reference mask or of more than 5 % of the last 200
                steps; a batch that was in no pass before, where its loss is to be known; no mask that changed
                the loss in all of the warm-up.
        """
        reference, residuals = self._try(turn)
        self._learn(turn, reference, residuals)

    def mean_loss(self, codes: Mapping[str, Tensor], batches: Iterable[Batch]) -> float:
        """Mean loss of a mask over one pass of the data."""
        self._show(codes)
        each = [self._loss(batch) for batch in batches]
        return math.fsum(each) / len(each)

    def _try(self, turn: Turn) -> tuple[float, list[float]]:
        """The reference's loss on a batch, and what the masks of the next step differ from it by."""
        config, step = self._config, self._state.step + 1
        reference = self._reference(turn)
        if config.first_mask == "init" and step == 1:
            self._show(self._state.first)
            return reference, [self._loss(turn.batch) - reference]
        residuals = []
        for sample in range(config.samples_per_step):
            self._show(self._learner.draw(step, sample))
            residuals.append(self._loss(turn.batch) - reference)
        return reference, residuals

    def _learn(self, turn: Turn, reference: float, residuals: list[float]) -> None:
        """Learn from what was tried. All that may fail comes before the first change of the state."""
        config, state, step = self._config, self._state, self._state.step + 1
        mean = math.fsum(residuals) / len(residuals)
        finite = math.isfinite(mean)
        lr, measured, factors = state.lr, state.measured, []
        if not finite:
            if sum(step - _WINDOW < at for at in state.skipped) >= _MOST_SKIPPED:
                raise InputError(
                    f"more than {_MOST_SKIPPED} of the last {_WINDOW} steps had a loss that is not finite, "
                    f"the last was step {step}; a smaller change_rate or a larger init_scale keeps masks "
                    "nearer to the first"
                )
        elif lr is None:
            lr, measured = self._measure(residuals)
        elif not (config.first_mask == "init" and step == 1):
            baseline = state.tracker if config.estimator in ("tracked", "baseline") else 0.0
            factors = [-lr * (residual - baseline) for residual in residuals]
            self._warn_of_large_moves(lr, factors)
        self.whole = False
        state.step, state.position, state.passed = step, turn.position, turn.passed
        state.losses.append(mean + reference)
        state.residuals.append(mean)
        if finite:
            state.lr, state.measured = lr, measured
            if factors:
                self._learner.move(step, factors)
            state.tracker = config.alpha * state.tracker + (1 - config.alpha) * mean
            self._refresh(mean + reference, reference)
        else:
            state.skipped.append(step)
        self.whole = True

    def _measure(self, residuals: list[float]) -> tuple[float | None, tuple[int, float, float]]:
        """The rate, once enough residuals were seen, and what is known of their spread (Welford)."""
        state = self._state
        count, mean, squares = state.measured
        for residual in residuals:
            count += 1
            gap = residual - mean
            mean += gap / count
            squares += gap * (residual - mean)
        if state.step + 1 - len(state.skipped) < self._config.warmup:
            return None, (count, mean, squares)
        spread = math.sqrt(squares / (count - 1))
        if spread == 0:
            raise InputError(
                f"lr: auto: no mask of {state.step + 1} steps changed the loss; raise change_rate, or lower "
                f"init_scale, which is {state.scale:.3g}"
            )
        return _SHARE_OF_STD / spread, (count, mean, squares)

    def _reference(self, turn: Turn) -> float:
        """Loss of the reference mask on the batch; 0 where no one asks."""
        config, state = self._config, self._state
        if not config.compares:
            return 0.0
        key = batch_key(turn.batch) if config.reference == "cached" else ""
        known = state.references.get(key)
        if known is not None:
            return known
        if key and turn.passed and key not in state.references:
            raise InputError(
                f"reference: cached: batch {turn.position} of this pass was in no pass before; batches must "
                "come again as they were (no shuffling of samples, the same number): set `reference: online`"
            )
        self._show(state.reference)
        loss = self._loss(turn.batch)
        if not math.isfinite(loss):
            raise InputError(
                f"the reference mask gives a loss of {loss} on batch {turn.position}, before any mask is "
                "tried"
            )
        if key:
            state.references[key] = loss
        return loss

    def _refresh(self, loss: float, reference: float) -> None:
        """Make the likeliest mask the reference when the loss has halved."""
        config, state = self._config, self._state
        if not config.refresh_reference or not config.compares:
            return
        ours, theirs, count = state.means
        ours = config.alpha * ours + (1 - config.alpha) * loss
        theirs = config.alpha * theirs + (1 - config.alpha) * reference
        state.means = (ours, theirs, count + 1)
        # Both means began at 0 and lack the same part of themselves.
        if count + 1 >= 1 / (1 - config.alpha) and ours < 0.5 * theirs:
            for name, codes in learnt(state, self._learner, config).items():
                state.reference[name].copy_(codes)
            state.references = dict.fromkeys(state.references)
            state.tracker, state.means = 0.0, (0.0, 0.0, 0)
            state.refreshed.append(state.step)

    def _warn_of_large_moves(self, lr: float, factors: list[float]) -> None:
        largest = max(map(abs, factors))
        if largest > _LARGE_MOVE and not self._warned:
            self._warned = True
            warnings.warn(
                f"lr {lr:.3g} moves logits by {largest:.3g} in one step, at a residual of {largest / lr:.3g} "
                'from its mean; `lr="auto"` measures what fits',
                stacklevel=7,
            )

    def _loss(self, batch: Batch) -> float:
        device = next(iter(self._state.logits.values())).device
        return float(self._loss_fn(self._model, to_device(batch, device)))

    def _show(self, codes: Mapping[str, Tensor]) -> None:
        for name, code in codes.items():
            self._weights.show(name, code)


def learnt(state: State, learner: Learner, config: MaskProConfig) -> dict[str, Tensor]:
    """The masks that the logits say: the N largest of each group; see also `certainty`."""
    if not config.certainty:
        return learner.likeliest()
    return learner.accepted(state.first, state.scale, config.certainty)


class Turn(NamedTuple):
    """A batch, where it stands in its pass, and whether all were met before that pass."""

    batch: Batch
    position: int
    passed: bool


def again_and_again(batches: Iterable[Batch], state: State) -> Iterator[Turn]:
    """Batches without end, from where the state is."""
    skip, passed = state.position, state.passed
    while True:
        found = 0
        for batch in batches:
            found += 1
            if found > skip:
                yield Turn(batch, found, passed)
        if not found:
            raise InputError("the batches came once and not again: give a DataLoader or a list")
        skip, passed = 0, True

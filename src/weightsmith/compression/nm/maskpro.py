"""MaskPro: learn which N of every M weights to keep, by the model's own loss and forward passes alone.

Problem  One-shot masks look at one layer at a time; learning masks by gradients takes the memory of training.
Method   Each group's mask is N draws without replacement by the softmax of its logits. A step draws all masks
         at once, takes the loss of the masked model, and moves all logits along the score of what was drawn:

             r = f(drawn mask) - f(reference mask), the same batch
             π ← π - η (r - δ) ∇ log P(drawn mask | π);   δ ← α δ + (1 - α) r, after the step

         The learnt mask keeps the N largest logits of each group. Weights never change.
Source   MaskPro, arXiv:2506.12876. CONFIRMED: the residual, its tracker, α, C and η. RECONSTRUCTED: when the
         reference is made anew, `auto` of scale and rate, several samples a step, any N:M.
Departs  δ is that of before the step (public code uses the new one: the same η but for 1 %). The first step
         draws a mask (`first_mask: init` tries the first one itself, as public code does). The score is
         exact where a group has all but decided. A learnt mask that is worse on its own data than the first
         one is not kept (`keep: learnt` does).
Cost     One forward pass a step (one more on each batch's first turn, or in each step with `online`); one
         logit (with `certainty` two numbers) and one copy of each pruned weight, in memory.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightsmith.compression.nm.batches import Batch, causal_loss, data_digest
from weightsmith.compression.nm.files import codes_from, read_masks
from weightsmith.compression.nm.learner import Learner, first_logits
from weightsmith.compression.nm.masked import MaskedWeights, mask_of
from weightsmith.compression.nm.oneshot import Mask, Masks, evaluating, masks_of, one_shot, unchanged
from weightsmith.compression.nm.options import KINDS, MaskProConfig
from weightsmith.compression.nm.state import STATE_FILE, State, weights_digest
from weightsmith.compression.nm.steps import LossFn, Steps, again_and_again, learnt
from weightsmith.compression.nm.targets import find_targets
from weightsmith.errors import InputError, SystemFault
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.tensors.zeros import masked

_SAVE_SECONDS, _SAVE_SHARE = 30.0, 20.0


@dataclass(frozen=True)
class MaskProReport:
    """What a run did.

    Attributes:
        steps: Steps done, of this run and those before that it went on from.
        groups: Groups of M weights.
        kept: Which mask came out: the `learnt` one, or the `first`, where that is better and `keep` says so.
        changed: Share of the groups whose final mask, the one that came out, is not the first one.
        changed_by_parameter: The same for each parameter.
        first_loss: Mean loss of the first mask over one pass of the data.
        learnt_loss: That of the learnt mask: the N largest logits, not a random one.
        final_loss: That of the mask that came out.
        lr: η that was used.
        init_scale: C that was used.
        losses: Mean loss of the random masks of each step.
        residuals: What they differed from the reference mask by.
        skipped: Steps whose loss was not finite.
        refreshed: Steps after which the reference was made anew.
        repaired: Groups of the first mask that had to be completed.
    """

    steps: int
    groups: int
    kept: Literal["learnt", "first"]
    changed: float
    changed_by_parameter: dict[str, float]
    first_loss: float
    learnt_loss: float
    final_loss: float
    lr: float
    init_scale: float
    losses: tuple[float, ...]
    residuals: tuple[float, ...]
    skipped: tuple[int, ...]
    refreshed: tuple[int, ...]
    repaired: int


class MaskProPruner:
    """Learns N:M masks of a model.

    Args:
        model: Any module; its weights are only read until `apply_`.
        config: Settings; see `MaskProConfig`.
        loss_fn: From (model, batch) to a loss. By default the model is called with the batch and says its
            `loss`; labels are the inputs, without padding, where the batch has none.
        masks: The masks to begin with, in place of `config.init`: bool by parameter's name.

    Raises:
        InputError: nothing to prune, or what can't be.

    Example:
        >>> pruner = MaskProPruner(model, MaskProConfig(init="magnitude", lr="auto", steps=2000))
        >>> report = pruner.fit(batches)
        >>> pruner.apply_()
    """

    def __init__(
        self,
        model: nn.Module,
        config: MaskProConfig | None = None,
        *,
        loss_fn: LossFn | None = None,
        masks: Mapping[str, Mask | Tensor] | None = None,
    ) -> None:
        self.model, self.config = model, config or MaskProConfig()
        self._loss_fn = loss_fn or causal_loss
        self._first = masks
        self._targets = find_targets(model, self.config)
        self._weights = weights_digest(self._targets)
        self._state: State | None = None
        self._learner: Learner | None = None
        self._file: Path | None = None  # that the state came from, until `fit` has compared the run with it

    @torch.no_grad()
    def fit(
        self,
        batches: Iterable[Batch],
        *,
        work: str | Path | None = None,
        save_every: int | None = None,
        progress: Progress = SILENT,
    ) -> MaskProReport:
        """Do the steps that are left of `config.steps`.

        Args:
            batches: A DataLoader or a list, gone through again and again; in the same batches with
                `reference: cached`, in any order. A state from a file goes on with the batches that it was
                made with, in a first pass of the same order: let what shuffles begin from a seed.
            work: Folder for the state; a run that was killed goes on from it to the same bits.
            save_every: Steps between two saves; by default half a minute lies between them, or twenty times
                what a save takes. An error or Ctrl-C saves the last step as well, unless it comes while the
                logits move.
            progress: Told about steps.

        Raises:
            InputError: one of several processes; no batches, or an iterator; batches that are not those of
                before, or whose content can't be read where it must; a state of another run; a loss that is
                not finite, of the first mask or of more than 5 % of the last 200 steps.
            SystemFault: the state can't be saved.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError(
                f"MaskPro runs in one process, this is one of {dist.get_world_size()}: each would see losses "
                "of its own batches and learn other masks"
            )
        file = None if work is None else Path(work) / STATE_FILE
        data = data_digest(batches)
        with evaluating(self.model):
            if self._state is None and file is not None and file.is_file():
                found = State.load(file, self.config, self._targets, self._weights)
                self._compare(found, file, data)
                self._take(found)
            elif self._file is not None:
                self._compare(self._running()[0], self._file, data)
                self._file = None
            if self._state is None:
                self._begin(batches, data)
            state, learner = self._running()
            state.data = data
            progress.start("maskpro", self.config.steps, "steps")
            progress.advance(state.step)
            with MaskedWeights(self._targets, state.reference, self.config.nm.m) as weights:
                steps = Steps(self.model, self.config, self._loss_fn, state, learner, weights)
                try:
                    self._run(steps, batches, file, save_every, progress)
                except BaseException:
                    if not steps.whole:
                        self._state = self._learner = None
                    elif file is not None and state.step:
                        with suppress(SystemFault):  # what ended the run is what has to be told
                            state.save(file, self.config, self._weights)
                    raise
                report = self._report(steps, batches)
                if file is not None and state.fell_back:
                    state.save(file, self.config, self._weights)
            progress.done()
        return report

    def masks(self) -> Masks:
        """The masks of the largest logits, exactly N of M in each group; see also `certainty` and `keep`.

        Raises:
            InputError: `fit` or `load` comes first.
        """
        return masks_of(self._targets, self._chosen(), self.config.nm)

    @torch.no_grad()
    def apply_(self) -> nn.Module:
        """Put the masks on the model's weights, in place.

        Raises:
            InputError: `fit` or `load` comes first.
        """
        codes = self._chosen()
        for target in self._targets:
            mask = mask_of(codes[target.name], target, self.config.nm.m)
            target.parameter.copy_(masked(target.parameter, mask))
        return self.model

    def save(self, path: str | Path) -> None:
        """Write the state to a file.

        Raises:
            InputError: `fit` comes first.
            SystemFault: no space, no permission.
        """
        self._running()[0].save(Path(path), self.config, self._weights)

    def load(self, path: str | Path) -> Self:
        """Take the state of a file; `fit` goes on from there.

        Raises:
            CheckpointError: it is damaged.
            InputError: it is of other weights or options, or of more steps. `fit` compares data and first
                masks.
        """
        self._take(State.load(Path(path), self.config, self._targets, self._weights))
        self._file = Path(path)
        return self

    def _running(self) -> tuple[State, Learner]:
        if self._state is None or self._learner is None:
            raise InputError("there are no masks yet: call fit(batches) first")
        return self._state, self._learner

    def _take(self, state: State) -> None:
        self._state = state
        self._learner = Learner(state.logits, self.config, state.spread)

    def _chosen(self) -> dict[str, Tensor]:
        state, learner = self._running()
        return state.first if state.fell_back else learnt(state, learner, self.config)

    def _given(self) -> tuple[dict[str, Tensor], int] | None:
        """First masks from elsewhere, and how many of their groups had to be completed."""
        config, masks = self.config, self._first
        if masks is None:
            if config.masks is None:
                return None
            masks = read_masks(config.masks)
        return codes_from(masks, self._targets, config.nm, repair=config.repair)

    def _compare(self, state: State, path: Path, data: str) -> None:
        given = self._given()
        state.check_run(path, data, None if given is None else given[0])

    def _begin(self, batches: Iterable[Batch], data: str) -> None:
        """The first masks and their logits."""
        config, repaired = self.config, 0
        given = self._given()
        if given is not None:
            codes, repaired = given
        else:
            shared = {name: getattr(config, name) for name in ("pattern", "targets", "ignore", "experts")}
            options = KINDS[config.init](**shared, remainder=config.remainder)
            with unchanged(self._targets):
                codes, _ = one_shot(self.model, self._targets, batches, options, run=self._loss_fn)
        scale = config.scale_for(sum(target.groups for target in self._targets))
        lr = None if config.lr == "auto" else float(config.lr)
        logits = first_logits(codes, config.nm.m, scale)
        kept = {name: code.clone() for name, code in codes.items()}
        spread = {name: torch.zeros_like(rows) for name, rows in logits.items()} if config.certainty else {}
        self._take(
            State(logits, codes, kept, given is not None, data, scale, lr, repaired=repaired, spread=spread)
        )

    def _run(
        self,
        steps: Steps,
        batches: Iterable[Batch],
        file: Path | None,
        save_every: int | None,
        progress: Progress,
    ) -> None:
        """The steps that are left, and a save every now and then."""
        state, _ = self._running()
        state.fell_back = False
        turns = again_and_again(batches, state)
        due = time.monotonic() + _SAVE_SECONDS
        while state.step < self.config.steps:
            steps.take(next(turns))
            progress.advance(1)
            now = time.monotonic()
            asked = now >= due if save_every is None else state.step % save_every == 0
            if file is not None and (asked or state.step == self.config.steps):
                state.save(file, self.config, self._weights)
                took = time.monotonic() - now
                due = now + took + max(_SAVE_SECONDS, _SAVE_SHARE * took)

    def _report(self, steps: Steps, batches: Iterable[Batch]) -> MaskProReport:
        state, learner = self._running()
        first_loss = steps.mean_loss(state.first, batches)
        learnt_loss = steps.mean_loss(learnt(state, learner, self.config), batches)
        if math.isfinite(first_loss) and not learnt_loss <= first_loss:
            state.fell_back = self.config.keep == "better"
            what = 'the first is kept (`keep="learnt"` takes the other)' if state.fell_back else "it is kept"
            warnings.warn(
                f"the learnt mask has a loss of {learnt_loss:.5g}, the first one {first_loss:.5g}: {what}. "
                "Too few steps for so many groups, or batches too small; `certainty: 3` changes only groups "
                "that are sure",
                stacklevel=4,
            )
        final = self._chosen()
        differ = {name: int((codes != state.first[name]).sum()) for name, codes in final.items()}
        groups = sum(target.groups for target in self._targets)
        return MaskProReport(
            steps=state.step,
            groups=groups,
            kept="first" if state.fell_back else "learnt",
            changed=sum(differ.values()) / groups,
            changed_by_parameter={t.name: differ[t.name] / t.groups for t in self._targets},
            first_loss=first_loss,
            learnt_loss=learnt_loss,
            final_loss=first_loss if state.fell_back else learnt_loss,
            lr=state.lr if state.lr is not None else math.nan,
            init_scale=state.scale,
            losses=tuple(state.losses),
            residuals=tuple(state.residuals),
            skipped=tuple(state.skipped),
            refreshed=tuple(state.refreshed),
            repaired=state.repaired,
        )


__all__ = ["MaskProPruner", "MaskProReport"]

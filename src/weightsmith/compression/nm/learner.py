"""The random part of MaskPro: logits of all masks, drawn from and moved.

Cost  Beside the logits (float32) one integer a group is kept. A step goes over the logits twice, in pieces
      that fit the cache: to draw, and to move. Masks of several samples are drawn again, not kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightsmith.compression.nm.distribution import ordered_score, score_of_two, set_score
from weightsmith.compression.nm.groups import chunks, code_dtype, to_mask, top_codes
from weightsmith.compression.nm.options import LARGEST_LOGIT, MaskProConfig
from weightsmith.compression.nm.sampling import Sampler


def first_logits(codes: dict[str, Tensor], m: int, scale: float) -> dict[str, Tensor]:
    """Logits that prefer a mask: `scale` for what it keeps, 0 for the rest; (M, G) by name."""
    found: dict[str, Tensor] = {}
    for name, code in codes.items():
        found[name] = torch.empty((m, len(code)), dtype=torch.float32, device=code.device)
        for j, row in enumerate(found[name].unbind(0)):
            row.copy_((code & (1 << j)).ne_(0))
        found[name] *= scale
    return found


class Learner:
    """Logits by parameter, and the masks drawn from them.

    Args:
        logits: (M, G) in float32, by name; moved in place.
        config: Its `pattern`, `score` and `seed`.
        spread: Sums of squared moves, shaped like the logits, kept up in place; only `accepted` needs them.

    Attributes:
        logits: What was given.
        drawn: The masks of the last `draw`, by name.
    """

    def __init__(
        self, logits: dict[str, Tensor], config: MaskProConfig, spread: dict[str, Tensor] | None = None
    ) -> None:
        self._nm, self._ordered = config.nm, config.ordered
        self.logits, self._spread = logits, spread or {}
        dtype = code_dtype(self._nm.m)
        self.drawn = {
            name: torch.zeros(rows.shape[1], dtype=dtype, device=rows.device) for name, rows in logits.items()
        }
        devices = {rows.device for rows in logits.values()}
        self._samplers = {device: Sampler(self._nm, config.seed or 0, device) for device in devices}
        self._scratch: dict[torch.device, Tensor] = {}

    def draw(self, step: int, sample: int = 0) -> dict[str, Tensor]:
        """The masks of a step, overwritten by the next call."""
        for name, rows in self.logits.items():
            sampler = self._samplers[rows.device]
            sampler.codes(rows, sampler.keys(name, step, sample), out=self.drawn[name])
        return self.drawn

    def move(self, step: int, steepness: Sequence[float]) -> None:
        """Add the mean over samples of `steepness` times their score.

        Args:
            step: In which they were drawn; the logits are still what they were then.
            steepness: -η (r - δ) of each sample.
        """
        single = len(steepness) == 1
        for name, logits in self.logits.items():
            sampler = self._samplers[logits.device]
            keys = [sampler.keys(name, step, k) for k in range(len(steepness))]
            for part in chunks(logits.shape[1], self._nm.m, logits.device):
                rows = logits[:, part]
                if single and not self._ordered:
                    change = self._set_score(rows, self.drawn[name][part]).mul_(steepness[0])
                else:
                    change = torch.zeros_like(rows)
                    for k, factor in enumerate(steepness):
                        change.add_(self._score(sampler, rows, keys[k], part.start), alpha=factor)
                    change /= len(steepness)
                if name in self._spread:
                    self._spread[name][:, part].addcmul_(change, change)
                rows.add_(change).clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)

    def likeliest(self) -> dict[str, Tensor]:
        """The N largest logits of each group; ties keep the lower index."""
        found: dict[str, Tensor] = {}
        for name, logits in self.logits.items():
            codes = torch.empty(logits.shape[1], dtype=code_dtype(self._nm.m), device=logits.device)
            for part in chunks(len(codes), self._nm.m, logits.device):
                codes[part] = top_codes(logits[:, part], self._nm.n)
            found[name] = codes
        return found

    def accepted(self, first: dict[str, Tensor], scale: float, certainty: float) -> dict[str, Tensor]:
        """The largest logits of the groups that are sure of them, the first mask of the others.

        Unbiased steps without a signal are a random walk, whose variance is the sum of its squared moves. A
        group is sure where what speaks for its change has grown, since the start, by more than `certainty`
        standard deviations of that walk.

        Args:
            first: Masks that `first_logits` made the logits of.
            scale: As given to it.
            certainty: In standard deviations.
        """
        found = self.likeliest()
        for name, logits in self.logits.items():
            for part in chunks(logits.shape[1], self._nm.m, logits.device):
                codes, before = found[name][part], first[name][part]
                kept = to_mask(before, self._nm.m).to(logits.dtype)
                change = to_mask(codes, self._nm.m).to(logits.dtype).sub_(kept)
                gained = (logits[:, part] - scale * kept).mul_(change).sum(0)
                noise = (self._spread[name][:, part] * change.abs()).sum(0).sqrt_()
                codes.copy_(torch.where(gained > certainty * noise, codes, before))
        return found

    def _score(self, sampler: Sampler, rows: Tensor, keys: tuple[int, ...], start: int) -> Tensor:
        if self._ordered:
            return ordered_score(rows, sampler.order(rows, keys, start), self._nm.n)
        return self._set_score(rows, sampler.codes(rows, keys, start))

    def _set_score(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Overwritten by the next call."""
        m, count = rows.shape
        if self._nm.n != 2:
            return set_score(rows, to_mask(codes, m), self._nm.n)
        # Fresh memory for each piece would cost as much as the arithmetic.
        scratch = self._scratch.get(rows.device)
        if scratch is None or scratch.shape[1] < count:
            scratch = self._scratch[rows.device] = rows.new_empty((4 * m + 1, count))
        kept, rest = scratch[:m, :count], scratch[m:, :count]
        for j, row in enumerate(kept.unbind(0)):
            row.copy_((codes & (1 << j)).ne_(0))
        return score_of_two(rows, kept, rest)

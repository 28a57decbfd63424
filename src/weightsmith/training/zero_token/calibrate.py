"""A threshold for early exit, from held-out data: as few cycles as a given loss allows.

Every candidate threshold is measured by real passes, because a token that leaves early also changes what
later tokens see. The full pass's signals say which thresholds are worth a pass: their quantiles.

Source  arXiv:2502.12214 stops above a threshold, whose value is not known; this way to choose one is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from weightsmith.errors import InputError
from weightsmith.training.zero_token.options import MODEL_TYPE

IGNORED = -100


@dataclass(frozen=True)
class ExitPoint:
    """What one threshold gives.

    Attributes:
        threshold: None for no exit.
        cycles: Mean cycles of a token.
        loss: Mean loss of a token, nats.
    """

    threshold: float | None
    cycles: float
    loss: float


@dataclass(frozen=True)
class ExitCalibration:
    """The outcome.

    Attributes:
        chosen: The threshold that was set, with its cost; that of no exit where none was good enough.
        curve: All that were measured, no exit first.
        spread: Standard deviation of the signal over tokens: near 0 it can't tell them apart.
    """

    chosen: ExitPoint
    curve: tuple[ExitPoint, ...]
    spread: float


def calibrate_exit(
    model: Any, batches: Iterable[Mapping[str, Any]], *, max_loss_increase: float = 0.01, points: int = 12
) -> ExitCalibration:
    """Choose `config.exit_threshold` and note the curve in `config.exit_curve`.

    Tokens leave one by one in these passes, unless the model's level is `batch`: with a cache a row decodes
    one token at a time, so that is what `sequence` means there.

    Args:
        model: A `ZTTForCausalLM`.
        batches: Held-out batches with `input_ids` (B, T), and `attention_mask` and `labels` where the tokens
            don't all count. Never the test data.
        max_loss_increase: Of the full loss, relative.
        points: Thresholds to try.

    Raises:
        InputError: another model, no data or data of another form, one cycle only, a criterion that the
            model can't tell, or a value out of range.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != MODEL_TYPE or not hasattr(model, "lm_head"):  # which an adapter around the model shows too
        raise InputError(f"model: expected a ZTTForCausalLM, found {type(model).__name__}")
    kept = list(batches)
    if not kept:
        raise InputError("batches: expected held-out data, found none")
    for number, batch in enumerate(kept):
        _check_batch(number, batch)
    if not max_loss_increase >= 0:
        raise InputError(f"max_loss_increase: expected at least 0, got {max_loss_increase}")
    if points < 1:
        raise InputError(f"points: expected at least 1, got {points}")
    config = model.config
    if config.num_cycles <= config.min_cycles:
        raise InputError(f"min_cycles: {config.min_cycles} of {config.num_cycles} cycles leave none to skip")
    level = "batch" if config.exit_level == "batch" else "token"
    was_training, before = model.training, config.exit_threshold
    model.eval()
    config.exit_threshold = None
    try:
        full, signals = _measure(model, kept, None, level, keep_signals=True)
        asked = signals[config.min_cycles - 1 : config.num_cycles - 1].flatten()
        asked = asked[asked.isfinite()]
        tried = worth_trying(asked, points)
        curve = [full, *(_measure(model, kept, threshold, level)[0] for threshold in tried)]
    finally:
        config.exit_threshold = before
        model.train(was_training)
    good = [point for point in curve if point.loss <= full.loss * (1 + max_loss_increase)]
    chosen = min(good, key=lambda point: (point.cycles, point.loss))
    config.exit_threshold = chosen.threshold
    config.exit_curve = [asdict(point) for point in curve]
    return ExitCalibration(chosen, tuple(curve), float(asked.std()))


def _check_batch(number: int, batch: Any) -> None:
    """Refuse a batch that has no ids (B, T), or a mask or labels of another shape."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise InputError(
            f"batches: expected mappings with `input_ids`, found {type(batch).__name__} at {number}"
        )
    wanted = tuple(batch["input_ids"].shape) if isinstance(batch["input_ids"], torch.Tensor) else ()
    for key in ("input_ids", "attention_mask", "labels"):
        if key not in batch:
            continue
        found = batch[key]
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if len(wanted) != 2 or shape != wanted:
            raise InputError(
                f"batches: expected {key} of batch {number} to be a tensor of the shape of its input_ids, "
                f"(rows, tokens), found {shape}"
            )


def worth_trying(signals: torch.Tensor, points: int) -> list[float]:
    """At most `points` thresholds, ascending: quantiles of the signals, to six significant digits (those of a
    converted model over long texts lie far below 1).
    """
    shares = torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1]
    # Sorted here: `torch.quantile` takes no more than 16 million numbers.
    found = signals.sort().values[(shares * (len(signals) - 1)).round().long()]
    return sorted({float(f"{value:.6g}") for value in found.tolist()})


@torch.no_grad()
def _measure(
    model: Any,
    batches: list[Mapping[str, Any]],
    threshold: float | None,
    level: str,
    *,
    keep_signals: bool = False,
) -> tuple[ExitPoint, torch.Tensor]:
    """Cycles and loss at a threshold; signals of all real tokens (cycles, tokens) where they are wanted."""
    nats = cycles = 0.0
    predicted = tokens = 0
    kept = []
    for batch in batches:
        inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
        ids = inputs["input_ids"]
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        labels = batch["labels"].to(model.device) if "labels" in batch else ids.masked_fill(~real, IGNORED)
        out = model(
            **inputs,
            use_cache=False,
            exit_threshold=threshold,
            exit_level=level,
            output_exit_signal=keep_signals,
        )
        targets = labels[:, 1:].flatten()
        logits = out.logits[:, :-1].flatten(0, 1).float()
        nats += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
        predicted += int((targets != IGNORED).sum())
        used = out.num_cycles_used
        used = used if used.ndim == 2 else used[:, None].expand_as(ids)
        cycles += float(used[real].sum())
        tokens += int(real.sum())
        if keep_signals:
            kept.append(out.exit_signal[:, real].float().cpu())
    if not predicted:
        raise InputError("batches: no token to predict; every label is ignored")
    loss = nats / predicted
    if not math.isfinite(loss):
        raise InputError(f"batches: the loss is {loss}")
    return ExitPoint(threshold, cycles / tokens, loss), torch.cat(kept, 1) if kept else torch.empty(0)

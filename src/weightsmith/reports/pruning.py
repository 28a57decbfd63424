"""What pruning did: how much of each matrix a mask keeps, and how MaskPro's loss went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.checkpoints.names import layer_index
from weightsmith.reports import drawing
from weightsmith.reports.curves import HEIGHT, LEFT, RIGHT, WIDTH, Panel, axes, scales, smoothed, thinned
from weightsmith.reports.folder import Run, Stage
from weightsmith.reports.strips import Strip

_LABEL = 13.0  # pixels
_NAMES = {
    "first": "first mask",
    "maskpro": "final mask",
    "sparsegpt": "SparseGPT",
    "sparseswaps": "SparseSwaps",
    "wanda": "Wanda",
}


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """One stage: strips of its masks, a panel of its learning, and a sentence."""

    stage: str
    words: str
    strips: tuple[Strip, ...]
    panel: Panel | None


def prunings(run: Run) -> list[Pruning]:
    """One entry for each finished `prune` stage."""
    return [_pruning(stage, record) for stage in run.stages if (record := stage.pruning)]


def _pruning(stage: Stage, record: Mapping[str, Any]) -> Pruning:
    layers = record["layers"]
    strips = [_strip("Share of each matrix’s squared norm that the mask keeps", layers, "kept_norm")]
    learning = record.get("learning")
    words = (
        f"{record['method']} keeps {record['pattern'].replace(':', ' of every ')} weights of {len(layers)} "
        f"matrices, {100 * record['pruned'] / record['parameters']:.0f} % of the model."
    )
    if learning:
        strips.append(_strip("Share of groups whose mask is not the first one", layers, "changed"))
        words += (
            f" In {learning['steps']:,} steps the masks of {100 * learning['changed']:.2g} % of "
            f"{learning['groups']:,} groups changed."
        )
        if learning.get("kept") == "first":
            loss = learning["learnt_loss"]
            words += (
                f" The learnt mask has a loss of {f'{loss:.4g}' if _finite(loss) else 'no finite number'} on "
                "the calibration data, not below the first one’s, which is kept."
            )
    panel = _panel(stage, record) if learning else None
    return Pruning(stage=stage.name, words=words, strips=tuple(strips), panel=panel)


def _strip(title: str, layers: Mapping[str, Mapping[str, Any]], key: str) -> Strip:
    kinds: dict[str, dict[int | None, float]] = {}
    for name, facts in layers.items():
        kinds.setdefault(_kind(name), {})[layer_index(name)] = facts[key]
    numbers = sorted({n for row in kinds.values() for n in row if n is not None})
    outside = any(None in row for row in kinds.values())
    columns: list[int | None] = [*numbers, *([None] if outside else [])]
    return Strip(
        title=title,
        rows=list(kinds),
        columns=["rest" if column is None else str(column) for column in columns],
        num_summaries=int(outside),
        values=[[row.get(column) for column in columns] for row in kinds.values()],
        as_percent=True,
    )


def _kind(name: str) -> str:
    """What a matrix is called in every layer: what follows the number of the layer."""
    parts = name.removesuffix(".weight").split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[number + 1 :])


def _finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _panel(stage: Stage, record: Mapping[str, Any]) -> Panel | None:
    """Losses of the masks that were tried, thin and smoothed, with levels of fixed masks as lines.

    None where no loss is a finite number.
    """
    tried = enumerate(record["learning"]["losses"], start=1)
    losses = [(step, loss) for step, loss in tried if _finite(loss)]
    if not losses:
        return None
    smooth = smoothed([loss for _, loss in losses])
    known = {name: level for name, level in record["losses"].items() if _finite(level)}
    levels = dict(sorted(known.items(), key=lambda item: item[1]))
    x, y = scales([step for step, _ in losses], [*smooth, *levels.values()])
    body = axes(x, y, "step")
    raw = thinned(losses, x, y)
    body.append(drawing.path(raw, "raw"))
    highest, lowest = min(at for _, at in raw), max(at for _, at in raw)
    for name, level in levels.items():
        at = y(level)
        body.append(drawing.line(LEFT, at, WIDTH - RIGHT, at, "level"))
        if at - _LABEL > lowest or at < highest:  # the note has them all; the curve has no room for words
            body.append(drawing.text(WIDTH - RIGHT - 2, at - 3, _NAMES.get(name, name), "tick", "end"))
    body.append(
        drawing.path(thinned([(s, v) for (s, _), v in zip(losses, smooth, strict=True)], x, y), "smooth")
    )
    first, final = (levels.get(name, math.nan) for name in ("first", "maskpro"))
    body.append(drawing.text(LEFT, 17, drawing.shorten(stage.name, 16), "panel"))
    body.append(drawing.text(WIDTH - RIGHT, 17, f"{first:.3f} → {final:.3f}", "value", "end"))
    title = f"Loss of the masks that {stage.name} tried, over steps: {first:.4f} to {final:.4f}"
    fixed = ", ".join(f"{_NAMES.get(name, name)} {level:.4f}" for name, level in levels.items())
    note = f"Loss on the calibration batches of the masks that were tried. Lines are fixed masks: {fixed}."
    for name, reason in record.get("absent", {}).items():
        note += f" Not compared with {_NAMES.get(name, name)}: {reason}."
    return Panel(stage=stage.name, chart=drawing.svg(WIDTH, HEIGHT, title, body, css="plot"), note=note)

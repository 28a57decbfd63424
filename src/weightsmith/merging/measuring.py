"""What `weightsmith stats` measures of a model on data: Fisher information and Gram matrices of inputs.

    fisher.<parameter>   sum over examples of (d log p(example) / d theta)^2 / number of tokens
    gram.<parameter>     mean of x x^T over the inputs x that its linear layer sees

Examples come one by one. Fisher information takes one backward pass an example and a second copy of the
parameters; Gram matrices one (inputs, inputs) matrix for each linear layer: as many at once as a budget
holds, and another forward pass over the examples for every further group of layers. What comes out does not
depend on the groups.

Source  Fisher: Matena and Raffel, arXiv:2111.09832; `labels: model` draws each token from the model's own
        distribution given the true ones before it (the expectation of the definition), `data` takes the true
        tokens (the empirical Fisher information, which needs no second draw and is the default). Gram: Jin
        et al., arXiv:2212.09849. Both are means over tokens: what makes two models comparable is not told
        there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from weightsmith.checkpoints import Ancestor, Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import CheckpointError, InputError
from weightsmith.merging.statistics import FACTS_FILE, FORMAT, KINDS, Kind
from weightsmith.runs.environment import versions
from weightsmith.runs.memory import free_bytes
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.runs.seeds import derive

if TYPE_CHECKING:
    from torch import Tensor

_IGNORED = -100
# Share of the free memory that Gram matrices take where nothing is said.
_MEMORY_SHARE = 0.5

Labels = Literal["data", "model"]


@dataclass(frozen=True)
class StatisticsReport:
    """What was measured.

    Attributes:
        path: The finished folder.
        kinds: What it holds.
        examples: Examples seen.
        tokens: Tokens predicted in them.
        bytes: Size of the folder.
        passes: Times that the examples were gone through.
    """

    path: Path
    kinds: tuple[str, ...]
    examples: int
    tokens: int
    bytes: int
    passes: int


def measure(
    source: str | Path,
    batches: Sequence[dict[str, Any]] | Iterable[dict[str, Any]],
    out: str | Path,
    *,
    kinds: Sequence[Kind] = KINDS,
    labels: Labels = "data",
    data: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    gram_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> StatisticsReport:
    """Measure a model and write what `fisher` and `regmean` need to know of it into the folder `out`.

    Args:
        source: Folder or hub id of a causal language model.
        batches: "input_ids" and "labels" (B, L), -100 where nothing is predicted; rows are taken one by one.
        out: Folder to make.
        kinds: What to measure.
        labels: Whose tokens Fisher information is of, see above.
        data: What the batches were made of, for the record.
        device: "auto", "cpu" or "cuda".
        seed: Of the tokens drawn with `labels: model`.
        gram_bytes: What Gram matrices may take at once; by default half of the memory that is free.
        overwrite: Replace `out` if it exists.
        progress: Told about each example.

    Raises:
        CheckpointError: the model can't be loaded, or `out` exists.
        InputError: no tokens to predict, a parameter that no stored tensor has, or one Gram matrix that is
            larger than `gram_bytes`.
    """
    from weightsmith.evaluation.models import load_model
    from weightsmith.tensors.spectra import one_thread

    if os.path.lexists(out) and not overwrite:
        raise CheckpointError(f"{out}: exists already; choose another output or pass --overwrite")
    model, _ = load_model(source, device=device, dtype="float32")
    rows = list(_rows(batches))
    with Checkpoint.open(source) as checkpoint, one_thread():
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for name in parameters:
            if name not in checkpoint.tensors:
                raise InputError(f"{checkpoint.name}: its parameter {name} is no tensor of the checkpoint")
        groups = _groups(model, checkpoint.tensors if "gram" in kinds else {}, gram_bytes)
        progress.start(f"measuring {checkpoint.name}", float(len(rows) * len(groups)), "examples")
        squares = {f"fisher.{name}": value.new_zeros(value.shape) for name, value in parameters.items()}
        squares = squares if "fisher" in kinds else {}
        tokens = seen = 0
        met: dict[str, int] = {}
        with _gram_hooks(model, groups, 0, met) as grams:
            for number, (ids, targets) in enumerate(rows):
                counted = _one(model, ids, targets, labels, derive(seed, "stats", number), bool(squares))
                for name, value in parameters.items() if squares else ():
                    if value.grad is not None:
                        squares[f"fisher.{name}"] += value.grad.square()
                model.zero_grad(set_to_none=True)
                tokens += counted
                seen += ids.numel()
                progress.advance(1.0)
        if tokens == 0:
            raise InputError("data: there is no token to predict in it")
        facts = {
            "format": FORMAT,
            "model": checkpoint.name,
            "fingerprint": checkpoint.fingerprint(),
            "kinds": list(kinds),
            "labels": labels,
            "data": list(data),
            "examples": len(rows),
            "tokens": tokens,
        }
        lineage = Lineage(
            method="stats",
            parameters={key: facts[key] for key in ("kinds", "labels", "data", "examples", "tokens")},
            seed=seed if labels == "model" else None,
            inputs=(Ancestor.of(checkpoint, "model"),),
            versions=versions(("weightsmith", "torch", "transformers")),
        )
        shapes = {name: tuple(value.shape) for name, value in squares.items()}
        shapes |= {name: (size, size) for name, size in met.items()}
        with _writer(shapes, facts, lineage, Path(out), overwrite=overwrite) as writer:
            _write(writer, squares, tokens)
            squares.clear()
            _write(writer, grams, seen)
            for place in range(1, len(groups)):
                grams.clear()
                with _gram_hooks(model, groups, place, met) as grams:
                    for ids, targets in rows:
                        _one(model, ids, targets, labels, 0, backward=False)
                        progress.advance(1.0)
                _write(writer, grams, seen)
            writer.commit()
            written = writer.planned_bytes
        progress.done()
    return StatisticsReport(Path(out), tuple(kinds), len(rows), tokens, written, len(groups))


def _writer(
    shapes: dict[str, tuple[int, ...]],
    facts: dict[str, Any],
    lineage: Lineage,
    out: Path,
    *,
    overwrite: bool,
) -> CheckpointWriter:
    specs = [TensorSpec(name, "F32", shape) for name, shape in sorted(shapes.items())]
    side = {FACTS_FILE: (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()}
    return CheckpointWriter(out, specs, side_files=side, lineage=lineage, overwrite=overwrite)


def _write(writer: CheckpointWriter, sums: dict[str, Tensor], count: int) -> None:
    """Write sums as means; each is divided where it is."""
    for name, value in sums.items():
        value /= count
        writer.write(name, np.ascontiguousarray(value.float().cpu().numpy()).reshape(-1))


def _groups(model: Any, tensors: Iterable[str], budget: int | None) -> list[list[str]]:
    """Names of linear layers in groups whose Gram matrices fit into the budget together; at least one group.

    Raises:
        InputError: one alone doesn't fit; names it, what it takes and what there is.
    """
    room = int(free_bytes() * _MEMORY_SHARE) if budget is None else budget
    groups: list[list[str]] = [[]]
    taken = 0
    for name, module in _linear_layers(model, tensors):
        size = 4 * _inputs(module) ** 2
        if budget is not None and size > budget:
            raise InputError(
                f"the Gram matrix of {name} takes {size / 1e9:.3g} GB, {budget / 1e9:.3g} GB are allowed; "
                "allow that much, or measure `fisher` alone"
            )
        if groups[-1] and taken + size > room:
            groups.append([])
            taken = 0
        groups[-1].append(name)
        taken += size
    return groups


def _linear_layers(model: Any, tensors: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Linear layers by name, whose weights are among `tensors`."""
    import torch

    known = set(tensors)
    for name, module in model.named_modules():
        # transformers' Conv1D is GPT-2's linear layer, stored inputs first.
        is_linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if is_linear and f"{name}.weight" in known:
            yield name, module


def _inputs(module: Any) -> int:
    return module.weight.shape[0] if type(module).__name__ == "Conv1D" else module.weight.shape[1]


def _rows(batches: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each example's token ids and labels (1, L), without what follows its last label."""
    for batch in batches:
        for ids, targets in zip(batch["input_ids"], batch["labels"], strict=True):
            wanted = (targets != _IGNORED).nonzero()
            if len(wanted):
                end = int(wanted[-1]) + 1
                yield ids[None, :end], targets[None, :end]


def _one(model: Any, ids: Tensor, targets: Tensor, labels: Labels, seed: int, backward: bool) -> int:
    """One example forward, and backward where gradients are wanted; returns the tokens it predicts."""
    import torch

    with contextlib.nullcontext() if backward else torch.no_grad():
        logits_LV = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1].float()
        wanted_L = targets[0, 1:]
        counted_L = wanted_L != _IGNORED
        if backward and bool(counted_L.any()):
            if labels == "model":
                # Drawn on the CPU, so that devices agree.
                shares = logits_LV.detach().softmax(-1).cpu()
                draws = torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(seed % 2**63))
                wanted_L = torch.where(counted_L, draws[:, 0], wanted_L)
            loss = torch.nn.functional.cross_entropy(
                logits_LV, wanted_L.to(logits_LV.device), reduction="sum", ignore_index=_IGNORED
            )
            loss.backward()
    return int(counted_L.sum())


@contextlib.contextmanager
def _gram_hooks(
    model: Any, groups: Sequence[Sequence[str]], place: int, met: dict[str, int]
) -> Iterator[dict[str, Tensor]]:
    """Sums of x x^T over all inputs of each linear layer of the group at `place`; `met` takes note of every
    layer of any group that sees an input: name of its statistic -> number of inputs.
    """
    sums: dict[str, Tensor] = {}
    handles = []

    def add(key: str, inputs: Any, is_summed: bool) -> None:
        met[key] = inputs[0].shape[-1]
        if is_summed:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            product = x.mT @ x
            sums[key] = sums[key].add_(product) if key in sums else product

    modules = dict(model.named_modules())
    for number, group in enumerate(groups):
        for name in group:
            handles.append(
                modules[name].register_forward_pre_hook(
                    lambda _module, inputs, key=f"gram.{name}.weight", is_summed=number == place: add(
                        key, inputs, is_summed
                    )
                )
            )
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()

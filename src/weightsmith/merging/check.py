"""What `--check` tells of the models of a merge: what they are, and whether they belong together.

Facts     Layers, dtypes, tokens and rows, special tokens, chat template of every model, from headers and side
          files; what differs from the model whose config the output takes is a warning.
Ancestry  "Are these fine-tunes of this base?" twice: what lineages say, and a sample of the weights. For a
          fine-tune the sampled matrices of model and base point the same way (cosine near 1) and differ by a
          small part of the base's norm; weights of two separate trainings are unrelated (cosine near 0,
          difference about 1.4), and nothing that merges changes can work on them.
Cost      A few megabytes of reads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from weightsmith.checkpoints import Checkpoint, Lineage, layer_index
from weightsmith.checkpoints.vocabulary import read_vocabulary
from weightsmith.merging.aligned import AlignedCheckpoint
from weightsmith.merging.chat import read_template
from weightsmith.merging.compatibility import text_config
from weightsmith.merging.plan import MergePlan
from weightsmith.merging.vocabulary import token_tensors

SAMPLED_TENSORS, SAMPLED_ELEMENTS = 24, 4096
"""Matrices of the sample, and elements of each."""
UNRELATED_BELOW, FAR_BELOW = 0.5, 0.9
"""Cosines of a model and its base: less is another training, or a fine-tune that went far."""

_ROLES = ("bos", "eos", "pad")


def check(plan: MergePlan) -> dict[str, Any]:
    """Look at the models of an opened merge.

    Returns:
        JSON-able: "models", one entry for each in the page's order ("name", "role", "layers", "parameters",
        "dtypes", "tokens", "rows", "special_tokens", "chat_template", "ancestry"), and "warnings".

    Raises:
        CheckpointError: NaN or infinity in the sample.
    """
    reference = _plain(plan.donor)
    wanted = _facts(reference)
    base = next((_plain(c) for c, role in plan.inputs if role == "base"), None)
    sampled = sample(plan)
    models, warnings = [], []
    for checkpoint, role in plan.inputs:
        model = _plain(checkpoint)
        facts = wanted if model is reference else _facts(model)
        entry = {"name": model.name, "role": role, **facts, "ancestry": None}
        if model is not reference:
            warnings += _differences(model.name, facts, reference.name, wanted, plan)
        if role == "model" and model.name in sampled:
            entry["ancestry"] = {**sampled[model.name], "lineage": _descent(model, base)}
            warnings += _doubts(
                model.name, sampled[model.name], reference.name if base is None else base.name
            )
        models.append(entry)
    return {"models": models, "warnings": list(dict.fromkeys(warnings))}


def sample(plan: MergePlan) -> dict[str, dict[str, float]]:
    """Distance of every model from the base (or from the first model), in a sample of the matrices.

    Returns:
        Name of the model -> "relative_norm" (|model - base| / |base|) and "cosine" (of model and base).
    """
    matrices = [o for o in plan.outputs if o.method is not None and len(o.spec.shape) >= 2]
    step = max(1, len(matrices) // SAMPLED_TENSORS)
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for output in matrices[::step][:SAMPLED_TENSORS]:
        tile = output.parameter(plan.donor.config, plan.config.nan_policy).sample(SAMPLED_ELEMENTS)
        values = tile.models.astype(np.float64)
        first = values[0] if tile.base is None else tile.base.astype(np.float64)
        others = list(zip(output.models, values, strict=True))[1 if tile.base is None else 0 :]
        for origin, model in others:
            change = model - first
            sums[origin.checkpoint.name] += (change @ change, first @ first, model @ model, model @ first)
    return {
        name: {
            "relative_norm": math.sqrt(change / base) if base > 0 else math.inf,
            "cosine": dot / math.sqrt(base * own) if base > 0 and own > 0 else 0.0,
        }
        for name, (change, base, own, dot) in sums.items()
    }


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as it is stored, with its own tokens."""
    return checkpoint.inner if isinstance(checkpoint, AlignedCheckpoint) else checkpoint


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    files = checkpoint.side_file_map()
    vocabulary = read_vocabulary(files)
    template = read_template(files)
    layers = {layer for name in checkpoint.tensors if (layer := layer_index(name)) is not None}
    names = {} if vocabulary is None else {number: token for token, number in vocabulary.tokens.items()}
    return {
        "layers": len(layers),
        "parameters": sum(info.numel for info in checkpoint.tensors.values()),
        "dtypes": sorted({info.dtype for info in checkpoint.tensors.values()}),
        "tokens": None if vocabulary is None else len(vocabulary),
        "rows": max(token_tensors(checkpoint).values(), default=None),
        "special_tokens": _special(checkpoint, names),
        "chat_template": template and hashlib.blake2b(template.strip().encode(), digest_size=4).hexdigest(),
    }


def _special(checkpoint: Checkpoint, names: Mapping[int, str]) -> dict[str, Any]:
    """Role -> token, or its number where no tokenizer names it; what generation uses wins."""
    stated = dict(text_config(checkpoint.config))
    file = checkpoint.side_file_map().get("generation_config.json")
    if file is not None:
        stated |= {key: value for key, value in json.loads(file.read_bytes()).items() if value is not None}
    found = {}
    for role in _ROLES:
        value = stated.get(f"{role}_token_id")
        numbers = value if isinstance(value, list) else [value]
        tokens = [names.get(number, number) for number in numbers if number is not None]
        if tokens:
            found[role] = tokens if len(tokens) > 1 else tokens[0]
    return found


def _differences(
    name: str, facts: Mapping[str, Any], owner: str, wanted: Mapping[str, Any], plan: MergePlan
) -> list[str]:
    found = []
    for role in _ROLES:
        ours, theirs = wanted["special_tokens"].get(role), facts["special_tokens"].get(role)
        if theirs is not None and ours != theirs:
            has = "has none" if ours is None else f"has {ours!r}"
            found.append(f"{name}: its {role} token is {theirs!r}, {owner} {has}; the output has the latter")
    template = facts["chat_template"]
    if template and template != wanted["chat_template"] and plan.config.chat_template is None:
        found.append(
            f"{name}: its chat template is not that of {owner}, which the output keeps; `chat_template: "
            "auto` takes the one that most models have"
        )
    return found


def _descent(model: Checkpoint, base: Checkpoint | None) -> str | None:
    """What the model's lineage says about the base; None where there is none to say it."""
    if model.lineage is None or base is None:
        return None
    known = {base.fingerprint()}
    if base.lineage is not None and base.lineage.content:
        known.add(base.lineage.content)
    return "from the base" if _names(model.lineage, known) else "does not name the base"


def _names(lineage: Lineage, fingerprints: set[str]) -> bool:
    return any(
        ancestor.fingerprint in fingerprints
        or ancestor.content in fingerprints
        or (ancestor.lineage is not None and _names(ancestor.lineage, fingerprints))
        for ancestor in lineage.inputs
    )


def _doubts(name: str, sampled: Mapping[str, float], base: str) -> list[str]:
    if sampled["relative_norm"] == 0.0:
        return [f"{name}: equal to {base} in all sampled weights; it adds nothing"]
    cosine = sampled["cosine"]
    if cosine >= FAR_BELOW:
        return []
    measured = f"cosine {cosine:.2f}, difference {sampled['relative_norm']:.2f} of its norm, in a sample"
    if cosine < UNRELATED_BELOW:
        return [f"{name}: unrelated to {base} ({measured}); both must come from one base to be merged"]
    return [f"{name}: far from {base} ({measured}); is it a fine-tune of it?"]

"""Plans of others: pages for mergekit, and plan files of the paper's authors."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.stacks import decoder_stack, is_first
from weightsmith.compression.tailoring.plan import TailorPlan
from weightsmith.compression.tailoring.space import Configuration, Layer
from weightsmith.errors import InputError
from weightsmith.runs.atomic import read_json

_KEY = re.compile(r"remove_idx_(\d+)|layer_(\d+)_(candidate_(\d+)|merge_scale_factor|output_scale)")


def mergekit_page(plan: TailorPlan, out_dtype: str = "bfloat16") -> str:
    """A merge page with one slice for each kept layer.

    Every slice lists the base and all candidates, with weight lambda, 1 or 0: mergekit takes tensors behind
    the last layer from as many models as the first slice names.

    Args:
        plan: Of models that have folders.
        out_dtype: Of the output; mergekit computes in float32.

    Raises:
        InputError: a model has no folder, or the plan has the base of blends where the public code took it.
    """
    from ruamel.yaml import YAML

    configuration = plan.configuration
    if plan.compat == "repo" and configuration.num_merged:
        raise InputError(
            "plan: compat repo mixes layers of different numbers, which mergekit has no page for"
        )
    paths = []
    for member in plan.models:
        if member.path is None:
            raise InputError(f"plan: `{member.name}` is a model in memory; save it to export a page")
        paths.append(member.path)
    base, *candidates = paths
    slices = []
    for place, layer in enumerate(configuration.layers):
        span = [layer.layer, layer.layer + 1]
        sources: list[dict[str, Any]] = [{"model": base, "layer_range": list(span)}]
        for number, path in enumerate(candidates, start=1):
            weight: Any = _weight(layer, number)
            is_end = place in (0, len(configuration.layers) - 1)
            if is_end and plan.edge != "follow":
                edge = 0.0 if plan.edge == "base" else 1.0 / len(candidates)
                weight = [{"filter": name, "value": edge} for name in _outside(base)] + [{"value": weight}]
            sources.append({"model": path, "layer_range": list(span), "parameters": {"weight": weight}})
        slices.append({"sources": sources})
    page: dict[str, Any] = {"slices": slices, "merge_method": "passthrough"}
    if candidates:
        page |= {"merge_method": "task_arithmetic", "base_model": base, "parameters": {"normalize": False}}
    page |= {"dtype": "float32", "out_dtype": out_dtype}
    yaml, text = YAML(), io.StringIO()
    yaml.dump(page, text)
    return text.getvalue()


def read_auto_merge_llm(plan: str | Path | Mapping[str, Any], num_candidates: int) -> Configuration:
    """The configuration of a plan file of the paper's authors; its `output_scale` is ignored, as their code
    does.

    Args:
        plan: The file, or its content.
        num_candidates: K.

    Raises:
        InputError: it is no such plan, or it is of another number of candidates.
    """
    source = "plan" if isinstance(plan, Mapping) else str(plan)
    value = plan if isinstance(plan, Mapping) else read_json(plan)
    if not isinstance(value, Mapping):
        raise InputError(f"{source}: holds {type(value).__name__}, expected an object")
    dropped: set[int] = set()
    sources: dict[int, list[int]] = {}
    weights: dict[int, float] = {}
    for key, given in value.items():
        match = _KEY.fullmatch(str(key))
        if not match or isinstance(given, bool) or not isinstance(given, int | float):
            raise InputError(f"{source}: {key} = {given!r}: not of a pruning plan of auto-merge-llm")
        if match[1] is not None:
            dropped.add(int(given))
        elif match[4] is not None:
            layer = sources.setdefault(int(match[2]), [])
            if int(match[4]) >= num_candidates:
                raise InputError(
                    f"{source}: {key}: candidates are counted from 0, there are {num_candidates}"
                )
            if given:
                layer.append(int(match[4]) + 1)
        elif match[3] == "merge_scale_factor":
            weights[int(match[2])] = float(given)
    if not sources:
        raise InputError(f"{source}: names no layer (layer_0_candidate_0, ...)")
    depth = max(*sources, *dropped, 0) + 1
    if missing := set(range(depth)) - dropped - set(sources):
        raise InputError(f"{source}: layer {min(missing)} is neither removed nor described")
    for layer in dropped:  # what it says of layers that are gone has no meaning
        sources.pop(layer, None)
    return Configuration.of(depth, sorted(dropped), sources, weights, digits=None)


def _weight(layer: Layer, number: int) -> float:
    return layer.weight if number in layer.sources else 0.0


def _outside(base: str) -> list[str]:
    """Names of tensors outside of the layers, those before them first."""
    with Checkpoint.open(base) as checkpoint:
        names = [*checkpoint.tensors, *checkpoint.tied]
        return sorted(decoder_stack(checkpoint).outside(names), key=lambda name: (not is_first(name), name))

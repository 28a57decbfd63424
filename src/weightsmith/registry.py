"""The list of methods: one entry each, importing nothing.

`weightsmith methods`, the README's table, the docs index and the shared test battery are made from this list,
so they can't drift apart. A third-party package adds a method through an entry point of the group
`weightsmith.methods` whose object is a `MethodCard`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from weightsmith.errors import InputError, nearest

Verdict = Literal["reproduced", "weaker claim", "not shown", "peer", "open"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodCard:
    """One method of the toolkit.

    Attributes:
        id: The name in recipes and on the command line.
        name: The name in print.
        paper: arXiv id, or an empty string for folklore.
        room: The wing that holds it; with the room inside the wing where it is not one of the wing's plain
            methods (a merge page can name all of `merging`, but not `merging/mediator`).
        target: `module:object` of its public part.
        purpose: What it is for, one line.
        verdict: What our evidence shows. `peer` is a baseline with no claim of ours; `open` has none yet.
    """

    id: str
    name: str
    paper: str
    room: str
    target: str
    purpose: str
    verdict: Verdict


def _merge(id: str, name: str, paper: str, cls: str, purpose: str, verdict: Verdict = "peer") -> MethodCard:
    target = f"weightsmith.merging.methods.{id}:{cls}"
    return MethodCard(
        id=id, name=name, paper=paper, room="merging", target=target, purpose=purpose, verdict=verdict
    )


def _training(
    id: str, name: str, paper: str, target: str, purpose: str, verdict: Verdict = "open"
) -> MethodCard:
    target = f"weightsmith.training.{target}"
    return MethodCard(
        id=id, name=name, paper=paper, room="training", target=target, purpose=purpose, verdict=verdict
    )


def _compression(
    id: str, name: str, paper: str, target: str, purpose: str, verdict: Verdict = "open"
) -> MethodCard:
    target = f"weightsmith.compression.{target}"
    return MethodCard(
        id=id, name=name, paper=paper, room="compression", target=target, purpose=purpose, verdict=verdict
    )


def _nm(id: str, name: str, paper: str, target: str, purpose: str, verdict: Verdict = "peer") -> MethodCard:
    return MethodCard(
        id=id,
        name=name,
        paper=paper,
        room="compression/nm",
        target=f"weightsmith.compression.nm.{target}",
        purpose=purpose,
        verdict=verdict,
    )


METHODS: tuple[MethodCard, ...] = (
    _merge("linear", "Linear (weight average)", "2203.05482", "Linear", "Weighted mean of checkpoints."),
    _merge(
        "task_arithmetic",
        "Task arithmetic",
        "2212.04089",
        "TaskArithmetic",
        "Base plus the scaled sum of the fine-tunes' changes.",
    ),
    _merge(
        "ties",
        "TIES",
        "2306.01708",
        "Ties",
        "Keep each fine-tune's largest changes, elect a sign per weight, average those that agree.",
    ),
    _merge(
        "dare_linear",
        "DARE",
        "2311.03099",
        "DareLinear",
        "Drop changes at random, rescale the rest, then task arithmetic.",
    ),
    _merge(
        "dare_ties",
        "DARE-TIES",
        "2311.03099",
        "DareTies",
        "Drop changes at random, rescale the rest, then elect signs as TIES does.",
    ),
    _merge(
        "della_linear",
        "DELLA",
        "2406.11617",
        "DellaLinear",
        "Drop small changes more often than large ones, rescale the rest, then task arithmetic.",
    ),
    _merge(
        "della",
        "DELLA-TIES",
        "2406.11617",
        "Della",
        "Drop small changes more often than large ones, rescale the rest, then elect signs as TIES does.",
    ),
    _merge(
        "breadcrumbs",
        "Breadcrumbs",
        "2312.06795",
        "Breadcrumbs",
        "Drop the largest and the smallest changes, then task arithmetic.",
    ),
    _merge(
        "breadcrumbs_ties",
        "Breadcrumbs-TIES",
        "2312.06795",
        "BreadcrumbsTies",
        "Drop the largest and the smallest changes, then elect signs as TIES does.",
    ),
    _merge("slerp", "SLERP", "", "Slerp", "Two checkpoints blended along the arc between them."),
    _merge(
        "nuslerp",
        "NuSLERP",
        "",
        "NuSlerp",
        "Two checkpoints, or their changes, blended along the arc by weights; by tensors, rows or columns.",
    ),
    _merge(
        "multislerp",
        "Multi-SLERP",
        "",
        "MultiSlerp",
        "The mean direction of several checkpoints, or of their changes, at their mean length.",
    ),
    _merge(
        "karcher",
        "Karcher mean",
        "2603.04972",
        "Karcher",
        "The point on the sphere that is nearest to several checkpoints along its arcs.",
    ),
    _merge(
        "sce",
        "SCE",
        "2408.07990",
        "Sce",
        "Select weights on which fine-tunes differ, weigh models by energy, erase the minority's signs.",
    ),
    _merge("ram", "RAM", "2601.13572", "Ram", "Mean of changes over the models that changed a weight."),
    _merge(
        "ramplus_tl",
        "RAM+ (tensor-local)",
        "2601.13572",
        "RamPlus",
        "RAM, with what one model alone changed made stronger.",
    ),
    _merge("nearswap", "NearSwap", "", "NearSwap", "Base plus another model's changes, each cut to a size."),
    _merge(
        "arcee_fusion",
        "Arcee Fusion",
        "",
        "ArceeFusion",
        "Take over those weights of another model whose change matters most to their row.",
    ),
    _merge(
        "fisher",
        "Fisher",
        "2111.09832",
        "Fisher",
        "Mean in which each weight counts by how much its model's predictions depend on it.",
    ),
    _merge(
        "regmean",
        "RegMean",
        "2212.09849",
        "RegMean",
        "Linear layers whose outputs are nearest to those of every fine-tune on its own inputs.",
    ),
    _merge(
        "consensus",
        "Consensus (TALL masks)",
        "2405.07813",
        "Consensus",
        "Task arithmetic without the weights that fewer than two tasks need.",
    ),
    _merge(
        "model_stock",
        "Model Stock",
        "2403.19522",
        "ModelStock",
        "Mean of the fine-tunes pulled back to the base by the angle between them.",
    ),
    _merge("passthrough", "Passthrough", "", "Passthrough", "Copy tensors: layer slices, stacked models."),
    _merge(
        "tsvm",
        "TSV-M",
        "2412.00081",
        "Tsvm",
        "Sum of truncated singular directions of each change, made mutually orthogonal.",
    ),
    _merge(
        "resm",
        "RESM (R-TSVM)",
        "2502.06876",
        "Resm",
        "TSV-M with outlier-driven task weights and sparsity-driven ranks.",
        verdict="not shown",
    ),
    _merge(
        "iso_c",
        "Iso-C",
        "2502.04959",
        "IsoC",
        "Sum of the changes with all its singular values set to their mean.",
    ),
    _merge(
        "iso_cts",
        "Iso-CTS",
        "2502.04959",
        "IsoCts",
        "Common directions of the changes and the best of each task outside of them, all equally strong.",
    ),
    _merge(
        "wudi",
        "WUDI",
        "2503.08099",
        "Wudi",
        "The change that disturbs each fine-tune least on the inputs its own change points to.",
    ),
    _merge(
        "emr",
        "EMR",
        "2405.17461",
        "Emr",
        "One elected change, masked and rescaled for each task: a folder for each.",
    ),
    MethodCard(
        id="mediator",
        name="Mediator",
        paper="2502.04411",
        room="merging/mediator",
        target="weightsmith.merging.mediator.model:Mediator",
        purpose="Average the blocks on which fine-tunes agree, route to sparse experts of the others.",
        verdict="reproduced",
    ),
    _training(
        "adagc",
        "AdaGC",
        "2502.11034",
        "adagc.clipper:AdaGC",
        "Clip each tensor's gradient against its own past, so that a fault stays in its tensor.",
        verdict="reproduced",
    ),
    _training(
        "alphadecay",
        "AlphaDecay",
        "2506.14562",
        "alphadecay.controller:AlphaDecay",
        "Decay each weight matrix by how heavy the tail of its spectrum is.",
        verdict="weaker claim",
    ),
    _training(
        "lightsam",
        "LightSAM",
        "2505.24399",
        "lightsam.optimizer:LightSAM",
        "Sharpness-aware steps whose radius and learning rate follow running gradient statistics.",
        verdict="weaker claim",
    ),
    _training(
        "tezo",
        "TeZO",
        "2501.19057",
        "tezo.optimizer:TeZO",
        "Fine-tune by forward passes alone; momentum and Adam cost two short vectors for each matrix.",
        verdict="not shown",
    ),
    _training(
        "mezo",
        "MeZO",
        "2305.17333",
        "tezo.optimizer:MeZO",
        "Fine-tune by forward passes alone, along dense random directions.",
        verdict="peer",
    ),
    _training(
        "lozo",
        "LOZO",
        "2410.07698",
        "tezo.optimizer:LOZO",
        "Fine-tune by forward passes alone, along low-rank directions that share a factor for some steps.",
        verdict="peer",
    ),
    _training(
        "meap",
        "MEAP",
        "2502.07490",
        "meap.collator:DataCollatorForMEAP",
        "Hide a part of what a causal model reads, so that it learns to find things in its context.",
        verdict="weaker claim",
    ),
    _training(
        "hrp",
        "HRP",
        "2502.07739",
        "hrp.initialize:initialize_lora_hrp_weights",
        "Begin a small LoRA adapter in the direction that a large one takes in a few steps.",
        verdict="reproduced",
    ),
    _training(
        "sewa",
        "SeWA",
        "2502.10119",
        "averaging.sewa:sewa_select",
        "Learn which states of a run to average; SWA, EMA, LAWA and soups beside it.",
        verdict="reproduced",
    ),
    _training(
        "ztt",
        "Zero-Token Transformer",
        "2502.12214",
        "zero_token.modeling:ZTTForCausalLM",
        "Run the middle layers several times over the same weights; leave early where they add nothing.",
        verdict="not shown",
    ),
    _compression(
        "gptailor",
        "GPTailor",
        "2506.20480",
        "tailoring.search:TailorSearch",
        "Drop layers, and fill each place that is left from the base, a fine-tune or a blend, by search.",
        verdict="weaker claim",
    ),
    _compression(
        "shortgpt",
        "ShortGPT",
        "2403.03853",
        "tailoring.baselines:shortgpt",
        "Drop the layers that turn the residual stream least.",
        verdict="peer",
    ),
    _compression(
        "angular",
        "Angular block",
        "2403.17887",
        "tailoring.baselines:angular_block",
        "Drop the contiguous block of layers that turns the residual stream least.",
        verdict="peer",
    ),
    _compression(
        "laco",
        "LaCo",
        "2402.11187",
        "tailoring.baselines:laco",
        "Collapse layers into those below, while the last hidden states stay alike.",
        verdict="peer",
    ),
    _compression(
        "sleb",
        "SLEB",
        "2402.09025",
        "tailoring.baselines:greedy",
        "Drop layers one after the other, each time the one that perplexity misses least.",
        verdict="peer",
    ),
    _nm(
        "maskpro",
        "MaskPro",
        "2506.12876",
        "maskpro:MaskProPruner",
        "Learn which N of every M weights to keep, by forward passes alone.",
        verdict="reproduced",
    ),
    _nm(
        "sparsegpt",
        "SparseGPT",
        "2301.00774",
        "sparsegpt:sparsegpt_prune",
        "Prune to N:M column by column; the columns that are left make up for what goes.",
    ),
    _nm(
        "sparseswaps",
        "SparseSwaps",
        "2512.10922",
        "sparseswaps:sparseswaps_mask",
        "Prune to N:M: exchange kept and pruned weights of a mask while a layer's output comes closer.",
    ),
    _nm(
        "wanda",
        "Wanda",
        "2306.11695",
        "wanda:wanda_scores",
        "Prune to N:M: keep weights that are large where their inputs are.",
    ),
    _nm(
        "ria",
        "RIA",
        "",
        "ria:ria_scores",
        "Prune to N:M as Wanda does, each weight seen relative to its row and column.",
    ),
    _nm(
        "magnitude",
        "Magnitude (N:M)",
        "2104.08378",
        "magnitude:magnitude_scores",
        "Prune to N:M: keep the largest weights of each group. Needs no data.",
    ),
)


def cards(room: str | None = None) -> tuple[MethodCard, ...]:
    """All method cards, those of installed third-party packages last; `room` keeps one wing."""
    # The scan of installed packages costs milliseconds, so it happens on first use, not on import.
    from importlib.metadata import entry_points

    others = tuple(point.load() for point in entry_points(group="weightsmith.methods"))
    return tuple(card for card in METHODS + others if room in (None, card.room))


def card(id: str, room: str | None = None) -> MethodCard:
    """The card of method `id`.

    Raises:
        InputError: no such method in that room; names the nearest one.
    """
    for entry in METHODS:
        if entry.id == id and room in (None, entry.room):
            return entry  # our own need no scan of what is installed
    known = {entry.id: entry for entry in cards(room)}
    if id not in known:
        raise InputError(f"no method `{id}`{nearest(id, known)}; known: {', '.join(known)}")
    return known[id]


def load(id: str, room: str | None = None) -> Any:
    """Import and return the object of method `id`."""
    module, _, name = card(id, room).target.partition(":")
    return getattr(importlib.import_module(module), name)

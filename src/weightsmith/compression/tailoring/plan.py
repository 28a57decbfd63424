"""A tailored model as a small file: which layer comes from where, what it scored, and the other good ones.

A plan names its models and says what was measured; `build` makes the model in memory, `save_pretrained`
writes it from the models' files without loading any of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from weightsmith.compression.tailoring.options import EDGES, Compat, Edge
from weightsmith.compression.tailoring.sources import (
    Member,
    Source,
    is_live,
    members,
    open_pool,
    torch_name,
)
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.errors import InputError
from weightsmith.runs.atomic import read_json, write_json
from weightsmith.runs.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """A configuration that no other one beat on all tasks.

    Attributes:
        trial: Its number.
        configuration: What it is.
        costs: 1 - score, by task.
    """

    trial: int
    configuration: Configuration
    costs: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TailorPlan:
    """How to put a smaller model together.

    Attributes:
        configuration: What is kept and where it comes from.
        models: The base and the candidates.
        edge: What tensors outside of the layers follow.
        compat: Whose base a blend has.
        costs: 1 - score by task, on calibration examples; empty for a plan that was not measured.
        budget: Examples of each task behind the costs.
        front: The Pareto set at that budget, this one included.
        settings: What the search was told.
        num_parameters: Of the model, tied ones once; 0 where it was not measured.
        base_parameters: Of the base.
        sources: The models themselves, where they were loaded; not stored.
    """

    configuration: Configuration
    models: tuple[Member, ...]
    edge: Edge = "follow"
    compat: Compat = "own"
    costs: Mapping[str, float] = field(default_factory=dict)
    budget: int = 0
    front: tuple[Point, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_parameters: int = 0
    base_parameters: int = 0
    sources: tuple[Source, ...] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        configuration: Configuration,
        base: Source,
        candidates: Sequence[Source] = (),
        *,
        edge: Edge = "follow",
        compat: Compat = "own",
    ) -> Self:
        """A plan that was not searched for.

        Raises:
            CheckpointError: a folder is no sound checkpoint.
            InputError: a source that is not there.
        """
        plan = cls(
            configuration=configuration,
            models=tuple(members(base, candidates)),
            edge=edge,
            compat=compat,
            sources=(base, *candidates),
        )
        plan.check()
        return plan

    @property
    def dropped_share(self) -> float:
        """Share of the layers that go. That of the parameters is smaller: embeddings stay."""
        return len(self.configuration.dropped) / self.configuration.depth

    @property
    def dropped_parameters(self) -> float:
        """Share of the parameters that go; 0 where they were not counted."""
        return 1 - self.num_parameters / self.base_parameters if self.base_parameters else 0.0

    def alternative(self, trial: int) -> TailorPlan:
        """The plan of another point of the Pareto set.

        Raises:
            InputError: no such point.
        """
        for point in self.front:
            if point.trial == trial:
                return dataclasses.replace(
                    self,
                    configuration=point.configuration,
                    costs=point.costs,
                    settings={**self.settings, "trial": trial},
                )
        raise InputError(
            f"trial {trial} is not in the Pareto set ({', '.join(str(p.trial) for p in self.front)})"
        )

    def check(self) -> None:
        """Raise `InputError` where the configuration asks for models that are not there."""
        for layer in self.configuration.layers:
            if layer.sources and not 1 <= layer.sources[0] <= layer.sources[-1] < len(self.models):
                raise InputError(
                    f"plan: layer {layer.layer}: sources {list(layer.sources)}, there are "
                    f"{len(self.models) - 1} candidates"
                )
        if self.edge not in EDGES or self.compat not in ("own", "repo"):
            raise InputError(
                f"plan: edge {self.edge!r}, compat {self.compat!r}: expected {', '.join(EDGES)}; own, repo"
            )

    def given(self) -> tuple[Source, ...]:
        """The models to work with: those that are loaded, else the folders.

        Raises:
            InputError: the plan was made of loaded models, which are gone.
        """
        if self.sources is not None:
            return self.sources
        paths = [member.path for member in self.models if member.path is not None]
        if len(paths) < len(self.models):
            raise InputError("plan: was made of models in memory; give them again as `sources`")
        return tuple(paths)

    def build(self, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
        """The model, in memory.

        Args:
            dtype: Of its weights; what the models are loaded as by default (float32 on the CPU).

        Raises:
            CheckpointError: a model can't be loaded.
            InputError: the models don't fit one another, or `dtype` is none of the float types that weights
                can have.
        """
        import torch

        wanted = None if dtype is None else getattr(torch, torch_name(str(dtype)))
        base, *candidates = self.given()
        pool, _ = open_pool(base, candidates, edge=self.edge, compat=self.compat)
        return pool.build(self.configuration, wanted)

    def save_pretrained(
        self,
        out: str | Path,
        *,
        dtype: str = "auto",
        overwrite: bool = False,
        progress: Progress = SILENT,
    ) -> Path:
        """Write the model as an ordinary checkpoint, with the base's tokenizer and our lineage.

        Of loaded models, the tokenizer is that of the folder that the base was loaded from, and the lineage
        names the folders that still hold what was loaded; a warning says what is not known.

        Args:
            out: Folder to make.
            dtype: Of its weights; each tensor as the base stores it by default.
            overwrite: Replace `out` when it exists.
            progress: Told the elements written.

        Raises:
            CheckpointError: `out` exists, or a model's content is not what the plan was made for.
            InputError: the models don't fit one another, or `dtype` is none that weights can have.
            SystemFault: no space, no permission.
        """
        from weightsmith.compression.tailoring.saving import save_live, save_stored

        if any(is_live(source) for source in self.given()):
            return save_live(self, out, dtype=dtype, overwrite=overwrite, progress=progress)
        return save_stored(self, out, dtype=dtype, overwrite=overwrite, progress=progress)

    def to_mergekit_yaml(self, out_dtype: str = "bfloat16") -> str:
        """The page that makes mergekit write the same model. Raises as `exchange.mergekit_page`."""
        from weightsmith.compression.tailoring.exchange import mergekit_page

        return mergekit_page(self, out_dtype)

    @classmethod
    def from_auto_merge_llm(
        cls,
        plan: str | Path | Mapping[str, Any],
        base: Source,
        candidates: Sequence[Source],
        *,
        compat: Compat = "repo",
    ) -> TailorPlan:
        """A plan as the paper's authors publish them. Raises as `exchange.read_auto_merge_llm`.

        Args:
            plan: Its JSON file or content.
            base: The base.
            candidates: Its fine-tunes, in the order of the plan.
            compat: "repo" takes the base of a blend from the place in the output, as the public code does:
                the model is then the published one; "own" takes it from the layer itself.
        """
        from weightsmith.compression.tailoring.exchange import read_auto_merge_llm

        return cls.of(read_auto_merge_llm(plan, len(candidates)), base, candidates, compat=compat)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": FORMAT,
            "method": "gptailor",
            "models": [dataclasses.asdict(member) for member in self.models],
            "edge": self.edge,
            "compat": self.compat,
            "configuration": self.configuration.to_json(),
            "dropped": list(self.configuration.dropped),
            "budget": self.budget,
            "costs": dict(self.costs),
            "front": [
                {"trial": p.trial, "costs": dict(p.costs), "configuration": p.configuration.to_json()}
                for p in self.front
            ],
            "num_parameters": self.num_parameters,
            "base_parameters": self.base_parameters,
            "settings": dict(self.settings),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path, *, sources: Sequence[Source] | None = None) -> TailorPlan:
        """Read a plan.

        Args:
            path: Its file.
            sources: The base and the candidates, where they are not where the plan says.

        Raises:
            InputError: it is no plan; names what is wrong.
        """
        return cls.from_json(read_json(path), path, sources=sources)

    @classmethod
    def from_json(
        cls, value: Any, source: str | Path = "plan", *, sources: Sequence[Source] | None = None
    ) -> TailorPlan:
        """Read back what `to_json` gave. Raises as `load`."""
        if (
            not isinstance(value, Mapping)
            or value.get("format") != FORMAT
            or value.get("method") != "gptailor"
        ):
            raise InputError(f"{source}: not a plan of GPTailor (expected format {FORMAT}, method gptailor)")
        try:
            plan = cls(
                configuration=Configuration.from_json(value["configuration"], str(source)),
                models=tuple(Member(**member) for member in value["models"]),
                edge=value["edge"],
                compat=value["compat"],
                costs=dict(value["costs"]),
                budget=int(value["budget"]),
                front=tuple(
                    Point(
                        trial=int(point["trial"]),
                        configuration=Configuration.from_json(point["configuration"], str(source)),
                        costs=dict(point["costs"]),
                    )
                    for point in value["front"]
                ),
                num_parameters=int(value["num_parameters"]),
                base_parameters=int(value["base_parameters"]),
                settings=dict(value["settings"]),
                sources=tuple(sources) if sources is not None else None,
            )
        except (KeyError, TypeError, ValueError) as problem:
            if isinstance(problem, InputError):
                raise
            raise InputError(f"{source}: not a plan of GPTailor: {problem!r}") from problem
        plan.check()
        if sources is not None and len(sources) != len(plan.models):
            raise InputError(f"{source}: is of {len(plan.models)} models, {len(sources)} were given")
        return plan

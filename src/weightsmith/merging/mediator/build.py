"""Building a mediated model: profile, plan, then one more pass that writes averaged, dense and sparse parts.

Everything is laid out before the first byte is written, so the size is known and the folder appears whole or
not at all. Averaged tensors go through the merge engine, tile by tile; a routed tensor is read whole, one
fine-tune at a
time: beside the dense part and one difference two buffers of its size are held.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.checkpoints import CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import CheckpointError, InputError
from weightsmith.merging.api import plan_merge
from weightsmith.merging.engine import execute
from weightsmith.merging.mediator import sparse
from weightsmith.merging.mediator.family import Experts, Family, block_of
from weightsmith.merging.mediator.options import MediatorConfig
from weightsmith.merging.mediator.plan import MediatorPlan, PlannedBlock, split_blocks
from weightsmith.merging.mediator.profile import HEAD, head_of, profile_family
from weightsmith.merging.mediator.store import (
    FACTS,
    add_error,
    difference,
    expert_file,
    facts_bytes,
    finite,
    kept_entries,
    lineage_of,
    part_name,
    part_specs,
    planned_block,
    raw_bytes,
    relative,
)
from weightsmith.merging.parameter import TILE_ELEMENTS
from weightsmith.merging.plan import Output
from weightsmith.merging.workers import Processes, Tell
from weightsmith.registry import load
from weightsmith.runs.environment import cores
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.tensors.floats import from_float32, to_float32

_AT_ONCE_BYTES = 4_000_000_000
"""Of routed tensors in all workers together."""
_BUFFERS = 6  # of a routed tensor's size in fp32


@dataclass(frozen=True)
class BuildReport:
    """What was built.

    Attributes:
        path: The finished folder.
        plan: What was averaged and what routed.
        bytes: Weights: averaged blocks, dense parts and experts.
        expert_bytes: Those of each expert.
        errors: For each routed block and task, the share of the difference's norm that was left out.
        seconds: Wall time.
        warnings: What the user should know.
    """

    path: Path
    plan: MediatorPlan
    bytes: int
    expert_bytes: dict[str, int]
    errors: dict[str, dict[str, float]]
    seconds: float
    warnings: tuple[str, ...] = field(default=())


def build_mediator(
    base: str | Path,
    experts: Experts,
    out: str | Path,
    config: MediatorConfig | None = None,
    *,
    plan: MediatorPlan | str | Path | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    overwrite: bool = False,
) -> BuildReport:
    """Average the blocks on which fine-tunes agree, keep sparse experts of the others, write the folder
    `out`.

    Args:
        base: Folder or hub id of the model that the experts were tuned from.
        experts: Folders, hub ids or LoRA adapters: a mapping from task to model, or a list.
        out: Folder to make; `Mediator.from_pretrained` opens it, any loader takes it for the model without
            experts.
        config: Every choice; see `MediatorConfig`.
        plan: A plan, or its file, made by `plan_mediator` and changed or not; no profile is measured then.
        threads: Worker processes; one a core by default. The bytes written do not depend on it.
        progress: Told what is done.
        overwrite: Replace `out` when it exists and is a checkpoint.

    Raises:
        InputError: fewer than two experts; a plan of other models; more blocks asked for than there are.
        CheckpointError: a model can't be read, they don't fit each other, or a weight is NaN or infinite.
        SystemFault: the machine failed; nothing is left behind.
    """
    begun = time.perf_counter()
    config = config or MediatorConfig()
    with Family(base, experts) as family:
        if plan is None:
            profile = profile_family(family, config, threads=threads, progress=progress)
            chosen = split_blocks(profile, config)
        else:
            chosen = plan if isinstance(plan, MediatorPlan) else MediatorPlan.load(plan)
            _check_plan(chosen, family)
        builder = _Builder(family, config, chosen, threads, progress)
        errors = builder.write(Path(out), overwrite=overwrite)
        return BuildReport(
            path=Path(out),
            plan=builder.plan,
            bytes=builder.plan.bytes,
            expert_bytes=builder.expert_bytes,
            errors=errors,
            seconds=time.perf_counter() - begun,
            warnings=(*family.plan.warnings, *builder.warnings),
        )


@dataclass(frozen=True)
class Foreseen:
    """What a build will write, as far as headers tell.

    Attributes:
        specs: Tensors of the checkpoint itself.
        side_files: What it carries beside them.
        lineage: What its `weightsmith.json` will say, but for the routed blocks.
        config: Its config.json.
        expert_bytes: Bytes of all experts, with as many routed blocks as the options allow.
        warnings: What the user should know.
    """

    specs: list[TensorSpec]
    side_files: dict[str, Path | bytes]
    lineage: Lineage
    config: dict[str, Any]
    expert_bytes: int
    warnings: tuple[str, ...]


def foreseen(base: str | Path, experts: Experts, config: MediatorConfig) -> Foreseen:
    """What `build_mediator` would write at most; reads no weights. Raises as `build_mediator`."""
    with Family(base, experts) as family:
        count = len(family.blocks)
        most = config.max_routed if config.max_routed is not None else max(1, count // 2)
        if config.n_routed is not None:
            most = config.n_routed
        elif config.threshold is not None or config.memory_budget is not None:
            most = count
        if most > count:
            raise InputError(f"{most} routed blocks asked for, the model has {count}; expected 0..{count}")
        names = [*family.blocks][:most] + [HEAD] * config.route_head
        plan = MediatorPlan(
            base=family.base.name,
            tasks=family.tasks,
            blocks=tuple(
                PlannedBlock(
                    block=name,
                    decision="routed" if name in names else "averaged",
                    conflict=0.0,
                    overlap=0.0,
                    low_support=False,
                    bytes=0,
                )
                for name in (*family.blocks, *([HEAD] if config.route_head else []))
            ),
            bytes=0,
        )
        # How far densities are raised only the weights can tell.
        builder = _Builder(family, dataclasses.replace(config, max_rel_err=None), plan, 1, SILENT)
        side = {**family.plan.side_files, **builder.untied_config(), FACTS: builder.facts({})}
        return Foreseen(
            builder.specs,
            side,
            lineage_of(config, builder.plan, family.plan.lineage.inputs),
            family.base.config,
            sum(builder.expert_bytes.values()),
            (*family.plan.warnings, *builder.warnings),
        )


class _Builder:
    """One build: which tensors are routed, how each difference is stored, and the writing."""

    def __init__(
        self,
        family: Family,
        config: MediatorConfig,
        plan: MediatorPlan,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self.family, self.config, self.progress = family, config, progress
        self.warnings: list[str] = []
        self.untied = False
        self.routed = self._routed(plan)
        largest = max((output.spec.numel for output in self.routed), default=1)
        fitting = max(1, _AT_ONCE_BYTES // (4 * _BUFFERS * largest))
        self.threads = threads
        self.workers = Processes(min(threads or cores(), fitting), TILE_ELEMENTS)
        counts = self._counts()
        self.forms = {
            task: {
                output.spec.name: sparse.choose_form(
                    output.spec.shape, output.spec.dtype, counts[output.spec.name][index], config
                )
                for output in self.routed
            }
            for index, task in enumerate(family.tasks)
        }
        names = {output.spec.name for output in self.routed}
        self.averaged = [output for output in family.plan.outputs if output.spec.name not in names]
        self.specs = sorted(
            (output.spec for output in (*self.averaged, *self.routed)), key=lambda spec: spec.name
        )
        self.expert_bytes = {
            task: sum(form.nbytes for form in forms.values()) for task, forms in self.forms.items()
        }
        dense = sum(spec.nbytes for spec in self.specs)
        self.plan = self._counted(plan, dense + sum(self.expert_bytes.values()))

    def write(self, out: Path, *, overwrite: bool) -> dict[str, dict[str, float]]:
        """Write the folder; returns the relative errors."""
        family, config, facts = self.family, self.config, self.facts
        parts = {
            expert_file(task): [
                spec for tensor, form in forms.items() for spec in part_specs(tensor, task, form)
            ]
            for task, forms in self.forms.items()
            if forms
        }
        side = {**family.plan.side_files, **self.untied_config(), FACTS: facts({})}
        lineage = lineage_of(config, self.plan, family.plan.lineage.inputs)
        with CheckpointWriter(
            out, self.specs, side_files=side, lineage=lineage, overwrite=overwrite, parts=parts
        ) as writer:
            self._write_averaged(writer)
            errors = self._write_routed(writer)
            writer.set_side_file(FACTS, facts(errors))
            writer.commit()
        return errors

    def facts(self, errors: dict[str, dict[str, float]]) -> bytes:
        """The content of `mediator.json`."""
        family, prints = self.family, self.family.fingerprints
        sources = {
            task: (checkpoint.name, prints[task])
            for task, checkpoint in zip(family.tasks, family.experts, strict=True)
        }
        return facts_bytes(self.config, self.plan, sources, errors, family.tasks, has_router=False)

    def _routed(self, plan: MediatorPlan) -> list[Output]:
        family = self.family
        routed = [
            output
            for block in plan.routed
            if block != HEAD
            for output in family.blocks[block]
            if output.method is not None
        ]
        if HEAD in plan.routed:
            head = head_of(family)
            aliases = [alias for alias, stored in family.base.tied.items() if stored == head.spec.name]
            if aliases and head.spec.name not in ("lm_head.weight", "embed_out.weight"):
                self.warnings.append(
                    f"{head.spec.name} is tied to {aliases[0]}, which is routed: untied, "
                    f"{head.spec.nbytes} bytes more"
                )
                spec = TensorSpec(aliases[0], head.spec.dtype, head.spec.shape)
                head = dataclasses.replace(head, spec=spec)
                self.untied = True
            routed.append(head)
        return routed

    def untied_config(self) -> dict[str, bytes]:
        """The config.json of a model whose head was untied; nothing where it was not."""
        if not self.untied:
            return {}
        body: dict[str, Any] = {**self.family.base.config, "tie_word_embeddings": False}
        nested = body.get("text_config") or {}
        if "tie_word_embeddings" in nested:
            body["text_config"] = {**nested, "tie_word_embeddings": False}
        return {"config.json": (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()}

    def _counts(self) -> dict[str, list[int]]:
        """Entries kept of each routed tensor by each expert."""
        if self.config.max_rel_err is None:
            return {
                output.spec.name: [sparse.kept(output.spec.numel, self.config.expert_density)]
                * len(self.family.tasks)
                for output in self.routed
            }

        def count(output: Output, tell: Tell) -> list[int]:
            dense = self._dense(output)
            found = [
                kept_entries(residual, output.spec, self.config)
                for residual in self._residuals(output, dense)
            ]
            tell(float(output.spec.numel))
            return found

        found = self._each("densities", count)
        return {output.spec.name: counts for output, counts in zip(self.routed, found, strict=True)}

    def _write_averaged(self, writer: CheckpointWriter) -> None:
        """All that is not routed, by the merge method asked for."""
        page: dict[str, Any] = {
            "method": self.config.average,
            "models": list(self.family.sources.values()),
            **self.config.average_options,
        }
        if not getattr(load(self.config.average, "merging"), "base_is_model", False):
            page["base"] = self.family.base_source
        names = {output.spec.name for output in self.averaged}
        with plan_merge(page, threads=self.threads) as plan:
            self.warnings += [
                warning for warning in plan.warnings if warning not in self.family.plan.warnings
            ]
            outputs = [output for output in plan.outputs if output.spec.name in names]
            execute(plan, outputs, writer, progress=self.progress)

    def _write_routed(self, writer: CheckpointWriter) -> dict[str, dict[str, float]]:
        def write(output: Output, tell: Tell) -> tuple[dict[str, Any], list[tuple[float, float]]]:
            spec = output.spec
            dense = self._dense(output)
            writer.write(spec.name, dense)
            receipts, errors = {spec.name: writer.receipt(spec.name)}, []
            for task, residual in zip(self.family.tasks, self._residuals(output, dense), strict=True):
                form = self.forms[task][spec.name]
                _, parts, error = difference(residual, spec, self.config, task, form.count)
                errors.append(error)
                for part, values in parts.items():
                    name = part_name(spec.name, task, part)
                    writer.write_raw(name, raw_bytes(values))
                    receipts[name] = writer.receipt(name)
            tell(float(spec.numel))
            return receipts, errors

        found = self._each("experts", write)
        sums: dict[str, dict[str, list[float]]] = {task: {} for task in self.family.tasks}
        for output, (receipts, errors) in zip(self.routed, found, strict=True):
            for name, receipt in receipts.items():
                writer.receive(name, receipt)
            for task, error in zip(self.family.tasks, errors, strict=True):
                add_error(sums[task], planned_block(output.spec.name), error)
        return {
            block: {task: relative(*sums[task][block]) for task in self.family.tasks if block in sums[task]}
            for block in self.plan.routed
        }

    def _each(self, label: str, work: Any) -> list[Any]:
        parameters = {id(output): self.family.parameter(output) for output in self.routed}
        self.progress.start(label, float(sum(output.spec.numel for output in self.routed)), "elements")
        found = self.workers.each(
            work, self.routed, lambda output: parameters[id(output)], self.progress.advance
        )
        self.progress.done()
        return found

    def _dense(self, output: Output) -> np.ndarray:
        """The dense part as it will be stored, fp32 (n,)."""
        assert output.base is not None
        if self.config.dense == "base":
            values = self._read(output, -1)
        else:
            values = np.zeros(output.spec.numel, np.float32)
            for index in range(len(self.family.tasks)):
                values += self._read(output, index)
            values /= np.float32(len(self.family.tasks))
        return to_float32(from_float32(values, output.spec.dtype), output.spec.dtype)

    def _residuals(self, output: Output, dense: np.ndarray) -> Any:
        for index in range(len(self.family.tasks)):
            values = self._read(output, index)
            yield np.subtract(values, dense, out=values)

    def _read(self, output: Output, index: int) -> np.ndarray:
        origin = output.base if index < 0 else output.models[index]
        assert origin is not None
        return finite(origin.checkpoint.read(origin.name), origin.checkpoint.name, origin.name)

    def _counted(self, plan: MediatorPlan, nbytes: int) -> MediatorPlan:
        """The plan with the bytes that its decisions come to."""
        sizes: dict[str, int] = {}
        for output in (*self.averaged, *self.routed):
            block = planned_block(output.spec.name) if output in self.routed else block_of(output.spec.name)
            if block is None:
                continue
            sizes[block] = sizes.get(block, 0) + output.spec.nbytes
            for forms in self.forms.values():
                if output.spec.name in forms:
                    sizes[block] += forms[output.spec.name].nbytes
        return dataclasses.replace(
            plan,
            bytes=nbytes,
            fingerprints=self.family.fingerprints,
            blocks=tuple(
                dataclasses.replace(block, bytes=sizes.get(block.block, block.bytes)) for block in plan.blocks
            ),
        )


def _check_plan(plan: MediatorPlan, family: Family) -> None:
    if plan.tasks != family.tasks:
        raise InputError(f"plan: made for the tasks {', '.join(plan.tasks)}, found {', '.join(family.tasks)}")
    known = {block.block for block in plan.blocks} - {HEAD}
    if known != set(family.blocks):
        other = min(known ^ set(family.blocks))
        raise InputError(f"plan: its blocks are not the model's: `{other}` is in one only")
    for name, fingerprint in family.fingerprints.items():
        if plan.fingerprints and plan.fingerprints.get(name) != fingerprint:
            raise CheckpointError(
                f"plan: made for another {f'expert `{name}`' if name else 'base'} than the one given; "
                "its content differs"
            )

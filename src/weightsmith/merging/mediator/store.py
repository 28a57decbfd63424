"""A mediated model on disk and in memory: one plain checkpoint and the few entries in which each expert
differs.

config.json, model.safetensors ...       the averaged blocks and the dense part of the routed ones: a plain
                                         checkpoint, which loads without us as the model with no expert on
weightsmith/mediator.json                tasks, plan, options, inputs
weightsmith/expert-<task>.safetensors    `<tensor>.delta.<task>.{bitmap,columns,starts,values,scale}`
weightsmith/router.safetensors           what `fit_router` learned
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from weightsmith.checkpoints import Ancestor, Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.checkpoints.folder import OWN_FOLDER, OpenFiles
from weightsmith.errors import CheckpointError, InputError, nearest
from weightsmith.merging.compatibility import check_architecture, check_plain
from weightsmith.merging.mediator import sparse
from weightsmith.merging.mediator.family import block_of, check_task
from weightsmith.merging.mediator.options import MediatorConfig, RouterConfig
from weightsmith.merging.mediator.plan import MediatorPlan
from weightsmith.merging.mediator.profile import HEAD, HEAD_NAMES, read_json
from weightsmith.merging.mediator.sparse import Form
from weightsmith.runs.environment import versions
from weightsmith.tensors.floats import FLOAT_DTYPES, storage_dtype

log = logging.getLogger(__name__)

FORMAT = 1
FACTS = f"{OWN_FOLDER}/mediator.json"
ROUTER = f"{OWN_FOLDER}/router.safetensors"
PARTS = ("bitmap", "columns", "starts", "values", "scale")


def expert_file(task: str) -> str:
    """Where the differences of an expert lie."""
    return f"{OWN_FOLDER}/expert-{task}.safetensors"


def part_name(tensor: str, task: str, part: str) -> str:
    """What one part of a difference is called in its file."""
    return f"{tensor}.delta.{task}.{part}"


def part_specs(tensor: str, task: str, form: Form) -> list[TensorSpec]:
    """The tensors that store one difference."""
    return [
        TensorSpec(part_name(tensor, task, part), dtype, shape)
        for part, (dtype, shape) in form.specs().items()
    ]


Delta = tuple[Form, dict[str, np.ndarray]]


@dataclass
class Expert:
    """One expert's differences, read when asked for.

    Attributes:
        task: Its name.
        source: Label of the fine-tune it was made from.
        fingerprint: Content of that.
        forms: How each routed tensor's difference is stored.
        memory: Differences that are in memory and in no file.
        files: Where the others are.
    """

    task: str
    source: str
    fingerprint: str
    forms: dict[str, Form]
    memory: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    files: Checkpoint | None = None

    def delta(self, tensor: str) -> Delta:
        """The difference of one tensor."""
        form = self.forms[tensor]
        if tensor in self.memory:
            return form, self.memory[tensor]
        assert self.files is not None
        parts = {}
        for part, (dtype, shape) in form.specs().items():
            raw = self.files.read_raw(part_name(tensor, self.task, part))
            parts[part] = raw.view(storage_dtype(dtype) if dtype != "I8" else np.int8).reshape(shape)
        return form, parts

    @property
    def nbytes(self) -> int:
        """Bytes of all differences."""
        return sum(form.nbytes for form in self.forms.values())


class MediatorStore:
    """The parts of a mediated model; a context manager that closes its files. Make one with `open`.

    Attributes:
        checkpoint: Averaged blocks and dense parts.
        experts: By task, in order.
        plan: What was averaged and what routed.
        config: The options it was built with.
        errors: For each routed block and task, the share of the difference's norm that was left out.
        average_of: Tasks whose fine-tunes are in the averaged blocks.
        router: What is stored of the router: tensors by name, and facts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: dict[str, Expert],
        *,
        plan: MediatorPlan,
        config: MediatorConfig,
        errors: dict[str, dict[str, float]],
        average_of: tuple[str, ...],
        router: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.experts = experts
        self.plan = plan
        self.config = config
        self.errors = errors
        self.average_of = average_of
        self.router = router
        self._changed: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> MediatorStore:
        """Open a mediated model's folder.

        Raises:
            CheckpointError: it is none, or a file of it is missing or damaged; names the file.
        """
        checkpoint = Checkpoint.open(folder)
        try:
            return cls._open(checkpoint)
        except BaseException:
            checkpoint.close()
            raise

    @classmethod
    def _open(cls, checkpoint: Checkpoint) -> MediatorStore:
        path = checkpoint.path / FACTS
        if not path.is_file():
            raise CheckpointError(f"{checkpoint.path}: no {FACTS}: a plain checkpoint, not a mediated model")
        facts = read_json(path)
        if facts.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {facts.get('format')!r}, this version reads {FORMAT}")
        try:
            options = dict(facts["config"])
            router = RouterConfig(**options.pop("router"))
            config = MediatorConfig(**options, router=router)
            plan = MediatorPlan.from_json(facts["plan"], path)
            found = {task: _open_expert(checkpoint, task, entry) for task, entry in facts["experts"].items()}
            average_of, errors = tuple(facts["average_of"]), facts["errors"]
        except (KeyError, TypeError) as problem:
            raise CheckpointError(f"{path}: not the facts of a mediated model: {problem!r}") from problem
        store = cls(checkpoint, found, plan=plan, config=config, errors=errors, average_of=average_of)
        if (checkpoint.path / ROUTER).is_file():
            store.router = read_router(checkpoint.path / ROUTER)
        elif facts["has_router"]:
            raise CheckpointError(
                f"{checkpoint.path / ROUTER}: missing; {path.name} says that the router was fitted"
            )
        return store

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the experts, in order."""
        return tuple(self.experts)

    @property
    def routed_tensors(self) -> tuple[str, ...]:
        """Tensors in which experts differ."""
        return tuple(next(iter(self.experts.values())).forms)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights: averaged blocks, dense parts, experts."""
        dense = sum(info.nbytes for info in self.checkpoint.tensors.values())
        return dense + sum(expert.nbytes for expert in self.experts.values())

    def read(self, tensor: str) -> np.ndarray:
        """The averaged or dense values of a tensor, fp32 (n,)."""
        if tensor in self._changed:
            return self._changed[tensor].copy()
        return self.checkpoint.read(tensor)

    def is_changed(self, tensor: str) -> bool:
        """Whether a tensor is no longer what the folder holds: experts came or went."""
        return tensor in self._changed

    def merged(self, tensor: str, weights: Mapping[str, float]) -> np.ndarray:
        """Dense part plus the weighted differences, fp32 (n,)."""
        values = self.read(tensor)
        for task, weight in weights.items():
            if weight and tensor in self.experts[task].forms:
                sparse.add_to(values, weight, *self.experts[task].delta(tensor))
        return values

    def weights_of(self, mix: str | Mapping[str, float]) -> dict[str, float]:
        """A task, or weights by task, checked.

        Raises:
            InputError: no such task, or a weight that is not finite.
        """
        weights = {mix: 1.0} if isinstance(mix, str) else {task: float(value) for task, value in mix.items()}
        for task, weight in weights.items():
            if task not in self.experts:
                raise InputError(
                    f"no task `{task}`{nearest(task, self.tasks)}; known: {', '.join(self.tasks)}"
                )
            if not np.isfinite(weight):
                raise InputError(f"weight of task `{task}`: expected a finite number, got {weight}")
        return weights

    def add_expert(self, task: str, model: str | Path, *, base: str | Path | None = None) -> tuple[str, ...]:
        """Take in one more fine-tune: its differences in routed blocks, its share of the averaged ones.

        Args:
            task: Its name.
            model: Folder, hub id or adapter.
            base: What an adapter belongs to.

        Returns:
            Names of the averaged tensors that changed.

        Raises:
            InputError: the task exists.
            CheckpointError: the model does not fit.
        """
        check_task(task)
        if task in self.experts:
            raise InputError(f"task `{task}` exists; remove it first, or choose another name")
        with Checkpoint.open(model, base=base) as source:
            self._check_fits(source)
            forms, memory = {}, {}
            sums: dict[str, list[float]] = {}
            for tensor in self.routed_tensors:
                spec = self._spec(tensor)
                residual = finite(source.read(tensor), source.name, tensor) - self.read(tensor)
                form, parts, error = difference(residual, spec, self.config, task)
                forms[tensor], memory[tensor] = form, parts
                add_error(sums, planned_block(tensor), error)
            count = len(self.average_of)
            changed = self._average(source, lambda old, new: (count * old + new) / (count + 1))
            self.experts[task] = Expert(task, source.name, source.fingerprint(), forms, memory)
        for block, (lost, whole) in sums.items():
            self.errors.setdefault(block, {})[task] = relative(lost, whole)
        self.average_of = (*self.average_of, task) if changed else self.average_of
        self._mark_stale()
        return changed

    def remove_expert(self, task: str, model: str | Path | None = None) -> tuple[str, ...]:
        """Take an expert out.

        Args:
            task: Its name.
            model: The fine-tune it was made from: needed to take its share out of the averaged blocks, which
                keep it otherwise.

        Returns:
            Names of the averaged tensors that changed.

        Raises:
            InputError: no such task, or the last one.
            CheckpointError: `model` is not what the expert was made from.
        """
        self.weights_of(task)
        if len(self.experts) == 1:
            raise InputError(f"task `{task}` is the last one; a mediated model has at least one expert")
        changed: tuple[str, ...] = ()
        if task in self.average_of and model is None:
            log.warning(
                "the averaged blocks keep the share of `%s`; give its checkpoint to take it out", task
            )
        elif task in self.average_of and model is not None:
            with Checkpoint.open(model, base=None) as source:
                if source.fingerprint() != self.experts[task].fingerprint:
                    raise CheckpointError(f"{source.name}: not the model that expert `{task}` was made from")
                count = len(self.average_of)
                if count < 2:
                    raise InputError(f"task `{task}` is all that the averaged blocks are made of")
                changed = self._average(source, lambda old, new: (count * old - new) / (count - 1))
            self.average_of = tuple(name for name in self.average_of if name != task)
        expert = self.experts.pop(task)
        if expert.files is not None:
            expert.files.close()
        for errors in self.errors.values():
            errors.pop(task, None)
        self._mark_stale()
        return changed

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write everything into a folder of its own, which appears whole or not at all.

        Raises:
            CheckpointError: `out` exists.
            SystemFault: the disk is full or failed.
        """
        if Path(out).resolve() == self.checkpoint.path.resolve():
            raise CheckpointError(f"{out}: is where this model was read from; choose another folder")
        specs = [self._spec(tensor) for tensor in self.checkpoint.tensors]
        parts = {
            expert_file(task): [
                spec for tensor, form in expert.forms.items() for spec in part_specs(tensor, task, form)
            ]
            for task, expert in self.experts.items()
            if expert.forms
        }
        side: dict[str, Path | bytes] = {**self.checkpoint.side_file_map(), FACTS: self.facts()}
        if self.router is not None:
            side[ROUTER] = router_bytes(*self.router)
        lineage = lineage_of(self.config, self.plan, (Ancestor.of(self.checkpoint, "model"),))
        with CheckpointWriter(
            out, specs, side_files=side, lineage=lineage, overwrite=overwrite, parts=parts
        ) as writer:
            for spec in specs:
                if spec.name in self._changed:
                    writer.write(spec.name, self._changed[spec.name])
                else:
                    writer.write_raw(spec.name, self.checkpoint.read_raw(spec.name))
            for task, expert in self.experts.items():
                for tensor in expert.forms:
                    for part, values in expert.delta(tensor)[1].items():
                        writer.write_raw(part_name(tensor, task, part), raw_bytes(values))
            return writer.commit()

    def facts(self) -> bytes:
        """The content of `mediator.json`."""
        return facts_bytes(
            self.config,
            self.plan,
            {task: (expert.source, expert.fingerprint) for task, expert in self.experts.items()},
            self.errors,
            self.average_of,
            has_router=self.router is not None,
        )

    def close(self) -> None:
        """Close all files."""
        self.checkpoint.close()
        for expert in self.experts.values():
            if expert.files is not None:
                expert.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spec(self, tensor: str) -> TensorSpec:
        info = self.checkpoint.tensors[tensor]
        return TensorSpec(tensor, info.dtype, info.shape)

    def _check_fits(self, source: Checkpoint) -> None:
        check_plain(source)
        check_architecture(source, self.checkpoint)
        for tensor, info in self.checkpoint.tensors.items():
            found = source.tensors.get(source.tied.get(tensor, tensor))
            if found is None or found.shape != info.shape:
                shape = "is missing" if found is None else f"is {list(found.shape)}"
                raise CheckpointError(f"{source.name}: {tensor} {shape}, expected {list(info.shape)}")

    def _average(self, source: Checkpoint, update: Any) -> tuple[str, ...]:
        """Change the averaged tensors; those of another method than the mean stay as they are."""
        if self.config.average != "linear":
            log.warning("blocks averaged by `%s` stay as they are", self.config.average)
            return ()
        changed = []
        for tensor, info in self.checkpoint.tensors.items():
            if tensor not in self.routed_tensors and info.dtype in FLOAT_DTYPES:
                new = finite(source.read(tensor), source.name, tensor)
                self._changed[tensor] = update(self.read(tensor), new).astype(np.float32)
                changed.append(tensor)
        return tuple(changed)

    def _mark_stale(self) -> None:
        self.plan = dataclasses.replace(self.plan, tasks=self.tasks, stale=True, bytes=self.nbytes)


def difference(
    residual: np.ndarray, spec: TensorSpec, config: MediatorConfig, task: str, count: int | None = None
) -> tuple[Form, dict[str, np.ndarray], tuple[float, float]]:
    """One stored difference: its form, its parts, and squared norms of what is left out and of all.

    Args:
        residual: Fine-tune less dense part, fp32 (n,).
        spec: The tensor.
        config: What is kept, and how.
        task: Whose it is.
        count: Entries to keep; by default what `config` says.
    """
    if count is None:
        count = kept_entries(residual, spec, config)
    form = sparse.choose_form(spec.shape, spec.dtype, count, config)
    if len(spec.shape) < 2:
        mask, values = np.ones(residual.size, np.bool_), residual
    else:
        mask, values = sparse.thinned(residual, count, config, spec.name, task)
    parts = sparse.pack(form, mask, values)
    left = residual.copy()
    sparse.add_to(left, -1.0, form, parts)
    whole = float(np.vdot(residual, residual))
    return form, parts, (float(np.vdot(left, left)), whole)


def kept_entries(residual: np.ndarray, spec: TensorSpec, config: MediatorConfig) -> int:
    """How many entries of a difference are kept."""
    count = sparse.kept(spec.numel, config.expert_density)
    if config.max_rel_err is not None and len(spec.shape) >= 2:
        count = sparse.count_for_error(residual, count, config.max_rel_err)
    return count


def planned_block(tensor: str) -> str:
    """What the plan calls the block of a routed tensor."""
    return block_of(tensor) or HEAD


def add_error(sums: dict[str, list[float]], block: str, error: tuple[float, float]) -> None:
    """Add the squared norms of one difference to those of its block."""
    entry = sums.setdefault(block, [0.0, 0.0])
    entry[0] += error[0]
    entry[1] += error[1]


def relative(lost: float, whole: float) -> float:
    """Share of the norm that is lost; 0 where there was nothing to lose."""
    return float(np.sqrt(max(lost, 0.0) / whole)) if whole > 0 else 0.0


def facts_bytes(
    config: MediatorConfig,
    plan: MediatorPlan,
    experts: Mapping[str, tuple[str, str]],
    errors: Mapping[str, Mapping[str, float]],
    average_of: tuple[str, ...],
    *,
    has_router: bool,
) -> bytes:
    """The content of `mediator.json`."""
    body = {
        "format": FORMAT,
        "experts": {
            # Without a routed block there is nothing in which experts differ, and no file.
            task: {
                "file": expert_file(task) if plan.routed else None,
                "source": source,
                "fingerprint": fingerprint,
            }
            for task, (source, fingerprint) in experts.items()
        },
        "average_of": list(average_of),
        "has_router": has_router,
        "errors": {block: dict(values) for block, values in errors.items()},
        "plan": plan.to_json(),
        "config": dataclasses.asdict(config),
    }
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()


def lineage_of(config: MediatorConfig, plan: MediatorPlan, inputs: tuple[Ancestor, ...]) -> Lineage:
    """What `weightsmith.json` says of a mediated model."""
    parameters = {"routed": list(plan.routed), "tasks": list(plan.tasks), **dataclasses.asdict(config)}
    seed = config.seed if config.select == "random" else None
    return Lineage("mediator", parameters, seed, inputs, versions(("weightsmith", "numpy")))


def raw_bytes(values: np.ndarray) -> np.ndarray:
    """An array's bytes."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def router_bytes(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> bytes:
    """The router as a safetensors file."""
    from safetensors.numpy import save

    return save(dict(tensors), {"facts": json.dumps(facts, sort_keys=True)})


def read_router(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and facts of a stored router.

    Raises:
        CheckpointError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as problem:
        raise CheckpointError(f"{path}: not a router of Mediator: {problem}") from problem


def _open_expert(checkpoint: Checkpoint, task: str, entry: Mapping[str, Any]) -> Expert:
    if entry["file"] is None:
        return Expert(task, entry["source"], entry["fingerprint"], {})
    path = checkpoint.path / str(entry["file"])
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; expert `{task}` can't be served without it")
    files = OpenFiles([path])
    opened = Checkpoint(
        path.parent,
        path.name,
        config={},
        side_files={},
        files=files,
        tensors=files.tensors,
        descriptors=files.descriptors,
    )
    try:
        forms = dict(_forms(opened, checkpoint, task, path))
    except BaseException:
        opened.close()
        raise
    return Expert(task, entry["source"], entry["fingerprint"], forms, files=opened)


def _forms(files: Checkpoint, checkpoint: Checkpoint, task: str, path: Path) -> Iterator[tuple[str, Form]]:
    """The form of every difference in a file, told from its parts."""
    found: dict[str, dict[str, Any]] = {}
    pattern = re.compile(rf"(.+)\.delta\.{re.escape(task)}\.({'|'.join(PARTS)})")
    for name, info in files.tensors.items():
        match = pattern.fullmatch(name)
        if not match:
            raise CheckpointError(f"{path}: tensor `{name}` is no difference of expert `{task}`")
        found.setdefault(match[1], {})[match[2]] = info
    for tensor, parts in found.items():
        dense = checkpoint.tensors.get(tensor)
        if dense is None or "values" not in parts:
            what = "its values are missing" if dense else "the model has no such tensor"
            raise CheckpointError(f"{path}: difference of `{tensor}`: {what}")
        layout = "bitmap" if "bitmap" in parts else "csr" if "columns" in parts else "dense"
        form = Form(dense.shape, parts["values"].dtype, layout, parts["values"].numel)
        wanted = form.specs()
        stored = {part: (info.dtype, info.shape) for part, info in parts.items()}
        if stored != wanted:
            raise CheckpointError(f"{path}: difference of `{tensor}`: found {stored}, expected {wanted}")
        yield tensor, form


def finite(values: np.ndarray, model: str, tensor: str) -> np.ndarray:
    """The values themselves; `CheckpointError` where one is NaN or infinite."""
    if not np.isfinite(values).all():
        raise CheckpointError(f"{model}: {tensor} holds NaN or infinity; every weight must be finite")
    return values


__all__ = ["FACTS", "HEAD_NAMES", "ROUTER", "Expert", "MediatorStore"]

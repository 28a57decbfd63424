"""A plan as a checkpoint, tensor by tensor out of the models' files.

What is taken as it is goes over as stored bytes; blends are made block by block in fp32 and cast once. Memory
does not grow with the model. Models that are loaded are put together in memory and written from there; what
else belongs to a checkpoint comes from the folders that they were loaded from, as far as those are known.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.checkpoints import Ancestor, Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.checkpoints.adapter import AdapterCheckpoint
from weightsmith.checkpoints.stacks import decoder_stack, is_first
from weightsmith.checkpoints.staging import Staging
from weightsmith.compression.tailoring.family import check_fields, warn_of_fields
from weightsmith.compression.tailoring.layers import kept_config
from weightsmith.compression.tailoring.plan import TailorPlan
from weightsmith.compression.tailoring.sources import Member, holds, is_live, known_folder, torch_name
from weightsmith.errors import CheckpointError, SystemFault, require
from weightsmith.evaluation.models import first_line, register_architecture, without_bars
from weightsmith.runs.atomic import system_faults
from weightsmith.runs.environment import versions
from weightsmith.runs.progress import Progress
from weightsmith.tensors.floats import BLOCK, FLOAT_DTYPES, parse_dtype

log = logging.getLogger(__name__)


_TOKENS = ("tokenizer", "vocab", "spiece")
"""How the names of files begin of which one makes a tokenizer."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One tensor of the output.

    Attributes:
        spec: What is written.
        base: Name of the base's tensor that a blend starts from.
        name: Name of the tensor in the sources.
        sources: Numbers of fine-tunes; none is the base.
        weight: Lambda.
    """

    spec: TensorSpec
    base: str
    name: str
    sources: tuple[int, ...]
    weight: float


def save_stored(
    plan: TailorPlan, out: str | Path, *, dtype: str, overwrite: bool, progress: Progress
) -> Path:
    """As `TailorPlan.save_pretrained`, from folders."""
    wanted = None if dtype == "auto" else parse_dtype(dtype)
    with ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint.open(str(source))) for source in plan.given()]
        for member, one in zip(plan.models, opened, strict=True):
            _check_content(member, one)
        configs = [_full_config(one) for one in opened]
        for one, config in zip(opened[1:], configs[1:], strict=True):
            check_fields(one.name, config, opened[0].name, configs[0])
            warn_of_fields(one.name, config, opened[0].name, configs[0])
        pieces = list(_pieces(plan, opened, wanted))
        files: dict[str, Path | bytes] = dict(opened[0].side_file_map())
        files["config.json"] = _config(plan, opened[0], configs[0], wanted)
        lineage = _lineage(
            plan, [Ancestor.of(one, role) for one, role in zip(opened, _roles(plan), strict=True)]
        )
        specs = [piece.spec for piece in pieces]
        with CheckpointWriter(out, specs, side_files=files, lineage=lineage, overwrite=overwrite) as writer:
            progress.start("writing", sum(spec.numel for spec in specs), "elements")
            for piece in pieces:
                _write(writer, piece, opened)
                progress.advance(piece.spec.numel)
            progress.done()
            return writer.commit()


def save_live(plan: TailorPlan, out: str | Path, *, dtype: str, overwrite: bool, progress: Progress) -> Path:
    """As `TailorPlan.save_pretrained`, of models in memory."""
    wanted = None if dtype == "auto" else torch_name(dtype)
    with ExitStack() as stack:
        # Refuses an `out` that can't be made before anything is computed; when this process is killed, the
        # next one that writes `out` tidies it away.
        scratch = Staging(Path(out), overwrite=overwrite)
        stack.callback(scratch.abort)
        files, ancestors = _origins(plan, out, stack)
        model = plan.build(wanted)
        safetensors: Any = require("safetensors", extra="hf", needed_by="writing a tailored model")
        with system_faults(out), without_bars():
            try:
                model.save_pretrained(scratch.part)
            except safetensors.SafetensorError as problem:
                raise SystemFault(f"{out}: {first_line(problem)}") from problem
        made = stack.enter_context(Checkpoint.open(scratch.part))
        specs = [TensorSpec(name, info.dtype, info.shape) for name, info in made.tensors.items()]
        files.update(made.side_file_map())
        lineage = _lineage(plan, ancestors)
        with CheckpointWriter(out, specs, side_files=files, lineage=lineage, overwrite=overwrite) as writer:
            progress.start("writing", sum(spec.numel for spec in specs), "elements")
            for spec in specs:
                _copy(writer, spec, made, spec.name)
                progress.advance(spec.numel)
            progress.done()
            return writer.commit()


def _origins(
    plan: TailorPlan, out: str | Path, stack: ExitStack
) -> tuple[dict[str, Path | bytes], list[Ancestor]]:
    """The base's side files and the family tree of a plan with loaded models, as far as their folders are
    known; one line says what is not.
    """
    files: dict[str, Path | bytes] = {}
    ancestors, strangers = [], []
    for member, source, role in zip(plan.models, plan.given(), _roles(plan), strict=True):
        folder = known_folder(source)
        one = stack.enter_context(Checkpoint.open(folder)) if folder is not None else None
        if one is not None and role == "base":
            files.update(one.side_file_map())
        if one is not None and not is_live(source):
            _check_content(member, one)
        # A model that was trained after it was loaded is not what its folder holds.
        if one is not None and (not is_live(source) or holds(one, source)):
            ancestors.append(Ancestor.of(one, role))
        else:
            strangers.append(member.name)
    missing = [] if any(name.startswith(_TOKENS) for name in files) else ["a tokenizer"]
    missing += [f"the ancestors {', '.join(strangers)}"] if strangers else []
    if missing:
        log.warning(
            "%s: written without %s: loaded models whose folder is not known or holds other weights",
            out,
            " and without ".join(missing),
        )
    return files, ancestors


def _roles(plan: TailorPlan) -> list[str]:
    return ["base", *["model"] * (len(plan.models) - 1)]


def _lineage(plan: TailorPlan, ancestors: Sequence[Ancestor]) -> Lineage:
    return Lineage(
        method="gptailor",
        parameters={
            "configuration": plan.configuration.to_json(),
            "edge": plan.edge,
            "compat": plan.compat,
            "models": [member.name for member in plan.models],
            "costs": dict(plan.costs),
            "budget": plan.budget,
        },
        seed=plan.settings.get("seed"),
        inputs=tuple(ancestors),
        versions=versions(),
    )


def _check_content(member: Member, checkpoint: Checkpoint) -> None:
    if checkpoint.quantized:
        raise CheckpointError(f"{checkpoint.name}: {checkpoint.quantized}; expected plain float weights")
    if member.fingerprint and member.fingerprint != checkpoint.fingerprint():
        raise CheckpointError(
            f"{checkpoint.name}: its content is not that of the `{member.name}` the plan was made for; "
            "nothing was written"
        )


def _pieces(plan: TailorPlan, opened: Sequence[Checkpoint], dtype: str | None) -> Iterator[_Piece]:
    """Every tensor of the output, in order."""
    base, configuration = opened[0], plan.configuration
    stack = decoder_stack(base)
    if stack.depth != configuration.depth:
        raise CheckpointError(f"{base.name}: has {stack.depth} layers, the plan is of {configuration.depth}")

    def spec(name: str, like: str) -> TensorSpec:
        info = base.tensors[like]
        plain = info.dtype in FLOAT_DTYPES
        return TensorSpec(name, dtype if dtype and plain else info.dtype, info.shape)

    for place, layer in enumerate(configuration.layers):
        for rest in stack.rest[layer.layer]:
            name = stack.name(layer.layer, rest)
            anchor = stack.name(place if plan.compat == "repo" else layer.layer, rest)
            piece = _Piece(spec(stack.name(place, rest), name), anchor, name, layer.sources, layer.weight)
            yield _checked(piece, opened)
    first, last = configuration.layers[0], configuration.layers[-1]
    for name in stack.outside(list(base.tensors)):
        layer = first if is_first(name) or base.tied.get(name) else last
        sources, weight = layer.sources, layer.weight
        if plan.edge == "base" or len(opened) == 1:
            sources = ()
        elif plan.edge == "mean":
            sources, weight = tuple(range(1, len(opened))), 1.0 / (len(opened) - 1)
        yield _checked(_Piece(spec(name, name), name, name, sources, weight), opened)


def _checked(piece: _Piece, opened: Sequence[Checkpoint]) -> _Piece:
    if len(piece.sources) > 1 and piece.base != piece.name:
        shifted = opened[0].tensors.get(opened[0].tied.get(piece.base, piece.base))
        if shifted is None or shifted.shape != piece.spec.shape:
            raise CheckpointError(
                f"{opened[0].name}: compat repo takes the base of `{piece.name}` from `{piece.base}`, which "
                f"is {list(shifted.shape) if shifted else 'missing'}, expected {list(piece.spec.shape)}; "
                "layers of several kinds need compat own; nothing was written"
            )
    for source in piece.sources:
        model = opened[source]
        info = model.tensors.get(model.tied.get(piece.name, piece.name))
        if info is None:
            raise CheckpointError(f"{model.name}: has no tensor `{piece.name}`; nothing was written")
        if info.shape != piece.spec.shape:
            raise CheckpointError(
                f"{model.name}: `{piece.name}` is {list(info.shape)}, {opened[0].name} has "
                f"{list(piece.spec.shape)}; nothing was written"
            )
    return piece


def _write(writer: CheckpointWriter, piece: _Piece, opened: Sequence[Checkpoint]) -> None:
    spec, base = piece.spec, opened[0]
    if len(piece.sources) < 2:
        _copy(writer, spec, opened[piece.sources[0]] if piece.sources else base, piece.name)
        return
    if spec.dtype not in FLOAT_DTYPES:
        _copy(writer, spec, base, piece.name)
        return
    for start in range(0, spec.numel, BLOCK):
        stop = min(start + BLOCK, spec.numel)
        anchor = base.read(piece.base, start, stop)
        change = np.zeros_like(anchor)
        for source in piece.sources:
            change += opened[source].read(piece.name, start, stop) - anchor
        writer.write(spec.name, anchor + np.float32(piece.weight) * change, start)


def _copy(writer: CheckpointWriter, spec: TensorSpec, source: Checkpoint, name: str) -> None:
    """Stored bytes where they are of the type wanted, else through fp32."""
    stored = source.tensors[source.tied.get(name, name)].dtype
    if stored != spec.dtype and (stored not in FLOAT_DTYPES or spec.dtype not in FLOAT_DTYPES):
        raise CheckpointError(f"{source.name}: `{name}` is {stored}, expected {spec.dtype}")
    if not spec.numel:
        return
    for start in range(0, spec.numel, BLOCK):
        stop = min(start + BLOCK, spec.numel)
        if stored == spec.dtype and source.stores(name):
            writer.write_raw(spec.name, source.read_raw(name, start, stop), start)
        else:
            writer.write(spec.name, source.read(name, start, stop), start)


def _full_config(model: Checkpoint) -> Any:
    """A config object with everything that config.json leaves to defaults."""
    transformers: Any = require("transformers", extra="hf", needed_by="writing a tailored model")
    plain = model.plain if isinstance(model, AdapterCheckpoint) else model
    register_architecture(plain.config)
    try:
        return transformers.AutoConfig.from_pretrained(plain.path)
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointError(f"{model.name}: config.json: {first_line(problem)}") from problem


def _config(plan: TailorPlan, base: Checkpoint, config: Any, dtype: str | None) -> bytes:
    """The base's config.json with what other layers change in it, lists by layer written out."""
    full = config.to_dict()
    kept = plan.configuration.kept
    new = _updated(base.config, full, kept_config(full, kept, plan.configuration.depth))
    if dtype is not None:
        new.pop("torch_dtype", None)
        new["dtype"] = torch_name(dtype)
    return (json.dumps(new, indent=2, sort_keys=True) + "\n").encode()


def _updated(stored: Mapping[str, Any], full: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(stored)
    for key, value in new.items():
        if key == "text_config" and isinstance(value, Mapping):
            found[key] = _updated(stored.get(key) or {}, full.get(key) or {}, value)
        elif full.get(key) != value:
            found[key] = value
    return found

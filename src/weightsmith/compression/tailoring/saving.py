"""A plan as a checkpoint, tensor by tensor out of the models' files.

What is taken as it is goes over as stored bytes; blends are made block by block in fp32 and cast once. Memory
does not grow with the model. Models that are loaded are put together in memory and written from there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.checkpoints import Ancestor, Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.checkpoints.stacks import decoder_stack, is_first
from weightsmith.compression.tailoring.layers import kept_config
from weightsmith.compression.tailoring.plan import TailorPlan
from weightsmith.errors import CheckpointError, require
from weightsmith.evaluation.models import first_line, register_architecture, without_bars
from weightsmith.runs.environment import versions
from weightsmith.runs.progress import Progress
from weightsmith.tensors.floats import BLOCK, FLOAT_DTYPES, parse_dtype

_CONFIG_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


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
        _check_models(plan, opened)
        pieces = list(_pieces(plan, opened, wanted))
        files: dict[str, Path | bytes] = dict(opened[0].side_file_map())
        files["config.json"] = _config(plan, opened[0], wanted)
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
    model = plan.build(None if dtype == "auto" else _CONFIG_NAMES[parse_dtype(dtype)])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        with without_bars():
            model.save_pretrained(folder)
        with Checkpoint.open(folder) as made:
            specs = [TensorSpec(name, info.dtype, info.shape) for name, info in made.tensors.items()]
            with CheckpointWriter(
                out, specs, side_files=made.side_file_map(), lineage=_lineage(plan, []), overwrite=overwrite
            ) as writer:
                progress.start("writing", sum(spec.numel for spec in specs), "elements")
                for spec in specs:
                    _copy(writer, spec, made, spec.name)
                    progress.advance(spec.numel)
                progress.done()
                return writer.commit()


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


def _check_models(plan: TailorPlan, opened: Sequence[Checkpoint]) -> None:
    for member, checkpoint in zip(plan.models, opened, strict=True):
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


def _config(plan: TailorPlan, base: Checkpoint, dtype: str | None) -> bytes:
    """The base's config.json with what other layers change in it, lists by layer written out."""
    transformers: Any = require("transformers", extra="hf", needed_by="writing a tailored model")
    register_architecture(base.config)
    try:
        full = transformers.AutoConfig.from_pretrained(base.path).to_dict()
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointError(f"{base.name}: config.json: {first_line(problem)}") from problem
    kept = plan.configuration.kept
    new = _updated(base.config, full, kept_config(full, kept, plan.configuration.depth))
    if dtype is not None:
        new.pop("torch_dtype", None)
        new["dtype"] = _CONFIG_NAMES[dtype]
    return (json.dumps(new, indent=2, sort_keys=True) + "\n").encode()


def _updated(stored: Mapping[str, Any], full: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(stored)
    for key, value in new.items():
        if key == "text_config" and isinstance(value, Mapping):
            found[key] = _updated(stored.get(key) or {}, full.get(key) or {}, value)
        elif full.get(key) != value:
            found[key] = value
    return found

"""From a model in training to files: candidates of a run, states of running means, and the averaged model."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.checkpoints.folder import side_files
from weightsmith.errors import InputError
from weightsmith.runs.environment import versions
from weightsmith.training.averaging.slots import integer_buffers, ranks, slots_of, whole

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The safetensors names of what models hold."""


def write_candidate(model: nn.Module, folder: Path, step: int) -> None:
    """Write a model's trained weights and saved buffers, under their names in memory.

    Frozen weights are not written: they are the same in every state. Sharded weights are gathered one by one,
    so every rank has to call this; the first one writes.

    Raises:
        SystemFault: no space, no permission; nothing is left under the folder's name.
    """
    tensors = {slot.name: slot.tensor for slot in slots_of(model)} | dict(integer_buffers(model))
    config = getattr(model, "config", None)
    files = {"config.json": config.to_json_string().encode()} if hasattr(config, "to_json_string") else {}
    write_tensors(folder, tensors, Lineage("candidate", {"step": step}, versions=versions()), files)


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], lineage: Lineage, files: Mapping[str, bytes]
) -> None:
    """Write tensors as they are stored in memory; sharded ones are gathered one by one on every rank."""
    specs = [TensorSpec(name, _dtype(name, tensor), tuple(tensor.shape)) for name, tensor in tensors.items()]
    if ranks()[0] != 0:
        for tensor in tensors.values():
            whole(tensor)
        return
    with CheckpointWriter(folder, specs, side_files=dict(files), lineage=lineage, overwrite=True) as writer:
        for name, tensor in tensors.items():
            values = whole(tensor).to("cpu").contiguous().reshape(-1)
            writer.write_raw(name, values.view(torch.uint8).numpy())
        writer.commit()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote of float tensors, fp32."""
    with Checkpoint.open(folder) as checkpoint:
        return {
            name: torch.from_numpy(checkpoint.read(name)).reshape(info.shape)
            for name, info in checkpoint.tensors.items()
        }


def write_model_folder(
    model: Any, out: Path, lineage: Lineage, files: Mapping[str, bytes], processing_class: Any = None
) -> None:
    """Write a model as a Hugging Face folder with our lineage; every rank calls it, the first one writes.

    Args:
        model: A `PreTrainedModel`, or a PEFT model, whose adapter is written.
        out: The folder; replaced when it holds a checkpoint.
        lineage: For `weightsmith.json`.
        files: Further files, by name inside the folder.
        processing_class: Tokenizer or processor, saved beside the weights.

    Raises:
        InputError: the model has no config.
        SystemFault: no space, no permission.
    """
    if hasattr(model, "peft_config"):
        _write_adapter(model, out, lineage, files)
        return
    if not hasattr(model, "config"):
        raise InputError(
            f"{type(model).__name__} has no config, so it can't be written as a Hugging Face folder"
        )
    from weightsmith.training.weights import stored_tensors

    lineage = Lineage(lineage.method, lineage.parameters, lineage.seed, lineage.inputs, versions())
    with tempfile.TemporaryDirectory() as scratch:
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.dtype = next(model.parameters()).dtype
        config.save_pretrained(scratch)
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            model.generation_config.save_pretrained(scratch)
        if processing_class is not None:
            processing_class.save_pretrained(scratch)
        found = {name: path.read_bytes() for name, path in side_files(Path(scratch)).items()}
    write_tensors(out, stored_tensors(model), lineage, {**found, **files})


def _write_adapter(model: Any, out: Path, lineage: Lineage, files: Mapping[str, bytes]) -> None:
    if ranks()[0] != 0:
        return
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    for name, content in {**files, "weightsmith.json": lineage.to_bytes()}.items():
        (part / name).parent.mkdir(exist_ok=True)
        (part / name).write_bytes(content)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def _dtype(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in DTYPES:
        raise InputError(f"{name}: {tensor.dtype} can't be written as a plain tensor")
    return DTYPES[tensor.dtype]

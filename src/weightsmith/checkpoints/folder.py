"""Which files make a checkpoint: from a path or hub id to a folder, its weight files, its side files.

Nothing here reads weights. A folder whose index, shards and headers disagree is refused as a whole, because
every later step relies on names alone.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
from pathlib import Path
from typing import Any

from weightsmith.checkpoints.header import TensorInfo, read_header
from weightsmith.errors import CheckpointError, nearest
from weightsmith.runs.atomic import system_faults

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LINEAGE_FILE = "weightsmith.json"
OWN_FOLDER = "weightsmith"
"""Where files of ours lie beside weights, so that no loader takes them for weights."""
MASKS_FILE = f"{OWN_FOLDER}/masks.safetensors"
"""Which weights of a pruned checkpoint are kept."""

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "*.tiktoken",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "tekken.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""What a copy of a checkpoint carries over beside its weights: `*.py` is the code of custom architectures."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


def resolve(source: str | Path, *, offline: bool = False, weights: bool = True) -> tuple[Path, str]:
    """The folder that `source` names, and the name to use in messages.

    Args:
        source: A folder, or the hub id of a model (`owner/name`, `owner/name@revision`), which is
            downloaded, or taken from the local cache when the hub can't be reached.
        offline: Look into the local cache only.
        weights: Whether weights are wanted; False downloads the side files alone.

    Raises:
        CheckpointError: neither a folder nor a model that can be had.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, label(folder)
    if folder.exists():
        raise CheckpointError(
            f"{source}: a file; expected the folder of a checkpoint (config.json beside weights)"
        )
    old = sorted(folder.parent.glob(f".{glob.escape(folder.name)}.weightsmith-*.old"))
    if old:
        raise CheckpointError(
            f"{source}: no such folder; an interrupted overwrite left its old content in {old[0]}"
        )
    text = str(source)
    if isinstance(source, Path) or looks_like_path(text) or not _HUB_ID.fullmatch(text):
        named = nearest(folder.name, _subfolders(folder.parent))
        doubt = "" if named or not _HUB_ID.fullmatch(text) else f"; for the hub's model write {text}@main"
        raise CheckpointError(f"{source}: no such folder{named or doubt}")
    return _download(text, offline, weights), text


def looks_like_path(text: str) -> bool:
    """Whether a name that is no folder was meant as one rather than as a hub id (`owner/name`)."""
    if "@" in text:
        return text.startswith((".", "/", "~"))
    return (
        text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or ("/" in text and Path(text).parent.is_dir())
    )


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []


def label(folder: Path) -> str:
    """The folder's name; a stage's `.../<stage>/checkpoint` is called by its stage."""
    path = Path(os.path.abspath(folder))
    return path.parent.name if path.name == "checkpoint" and path.parent.name else path.name or str(path)


def _download(hub_id: str, offline: bool, weights: bool) -> Path:
    """A snapshot of the safetensors and side files of a hub model, with its masks where it is pruned, or the
    cached one.
    """
    import huggingface_hub

    repo, _, revision = hub_id.partition("@")
    wanted = [*SIDE_FILES, ADAPTER_CONFIG, LINEAGE_FILE]
    wanted += ["*.safetensors", "*.safetensors.index.json"] if weights else []
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=wanted,
                ignore_patterns=["*/*.safetensors"],
                local_files_only=offline,
            )
        )
        # Weights in folders of a repository are other models, so they are ignored above, and masks with them.
        # The hub is asked for these only where a lineage says that the model may be a pruned one of ours.
        if weights and (folder / LINEAGE_FILE).is_file() and not (folder / MASKS_FILE).is_file():
            huggingface_hub.snapshot_download(
                repo,
                revision=folder.name,  # the commit that was just taken
                allow_patterns=[MASKS_FILE],
                local_files_only=offline,
            )
        return folder
    except huggingface_hub.errors.LocalEntryNotFoundError as problem:
        why = "the hub is not asked" if offline else "the hub can't be reached"
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            why = "the hub is switched off (HF_HUB_OFFLINE)"
        raise CheckpointError(
            f"{hub_id}: no such folder, {why}, and its local cache has no such model"
        ) from problem
    except huggingface_hub.errors.RepositoryNotFoundError as problem:
        raise CheckpointError(
            f"{hub_id}: no such folder, and the hub shows no such model; a private or gated one needs "
            "`hf auth login`"
        ) from problem
    # The hub's other errors derive from OSError (HTTP) or ValueError (malformed id).
    except (OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise CheckpointError(
            f"{hub_id}: no such folder, and the hub did not give a model of that name: {reason[:200]}"
        ) from problem


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds a PEFT adapter rather than a model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (
        (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()
    )


def holds_checkpoint(folder: Path) -> bool:
    """Whether `folder` looks like a model or an adapter; damaged ones count."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE, ADAPTER_CONFIG))


def side_files(folder: Path) -> dict[str, Path]:
    """The files of `folder` that a copy carries over, by name: never weights, pickle, or our lineage."""
    found = [path for path in folder.iterdir() if path.is_file()]
    found += folder.glob("additional_chat_templates/*.jinja")
    names = {path.relative_to(folder).as_posix(): path for path in found}
    kept = (name for name in sorted(names) if any(fnmatch.fnmatchcase(name, mask) for mask in SIDE_FILES))
    return {name: names[name] for name in kept}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: it holds anything else.
        SystemFault: it can't be read.
    """
    with system_faults(path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path}: not valid JSON: {str(problem)[:120]}") from problem
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of `folder`; empty where there is none.

    Raises:
        CheckpointError: it is not JSON, or the keys that say what the model is are not what they should be.
        SystemFault: it can't be read.
    """
    path = folder / "config.json"
    config = read_object(path) if path.is_file() else {}
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{path}: architectures: {names!r}, expected a list of names")
    for key, kind, wanted in (("model_type", str, "a name"), ("text_config", dict, "an object")):
        if not isinstance(config.get(key), kind | None):
            raise CheckpointError(f"{path}: {key}: {config[key]!r}, expected {wanted}")
    return config


class OpenFiles:
    """The descriptors of a checkpoint's weight files, and the tensors their headers promise."""

    def __init__(self, files: list[Path]) -> None:
        self.descriptors: dict[Path, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            for file in files:
                self._open(file)
        except BaseException:
            self.close()
            raise

    def _open(self, file: Path) -> None:
        with system_faults(file):
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self.descriptors[file] = descriptor
        for name, info in read_header(descriptor, file).items():
            if name in self.tensors:
                raise CheckpointError(f"{file}: tensor `{name}` is also in {self.tensors[name].file.name}")
            self.tensors[name] = info

    def close(self) -> None:
        """Close all files; safe to call twice."""
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])


def open_weights(folder: Path) -> OpenFiles:
    """Open the safetensors file or shards of `folder` and check headers and index against each other.

    Raises:
        CheckpointError: no safetensors weights, a shard is missing, or index and shards disagree.
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():  # first, as in transformers
        return OpenFiles([single])
    if not index.is_file():
        raise CheckpointError(_no_weights(folder))
    mapping = _weight_map(index)
    shards = sorted(set(mapping.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            names = [name for name, file in mapping.items() if file == shard]
            raise CheckpointError(
                f"{folder / shard}: shard is missing; {INDEX_FILE} places {len(names)} tensors there, "
                f"`{names[0]}` first"
            )
    opened = OpenFiles([folder / shard for shard in shards])
    try:
        _check_index(mapping, opened.tensors, index)
    except BaseException:
        opened.close()
        raise
    return opened


def _weight_map(index: Path) -> dict[str, str]:
    mapping = read_object(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{index}: no `weight_map` from tensor names to shards")
    for name, shard in mapping.items():
        if (
            not isinstance(shard, str)
            or shard != os.path.basename(shard)
            or not shard.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{index}: tensor `{name}` is placed in {shard!r}, expected a .safetensors file beside it"
            )
    return mapping


def _check_index(mapping: dict[str, str], tensors: dict[str, TensorInfo], index: Path) -> None:
    for name, shard in mapping.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: tensor `{name}` is not in {shard}{nearest(name, tensors)}")
        if tensors[name].file.name != shard:
            raise CheckpointError(f"{index}: tensor `{name}` is in {tensors[name].file.name}, not in {shard}")
    for name, info in tensors.items():
        if name not in mapping:
            raise CheckpointError(f"{info.file}: tensor `{name}` is not in {INDEX_FILE}")


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if any(fnmatch.fnmatchcase(name, mask) for mask in _PICKLES)]
    if pickles:
        return (
            f"{folder / pickles[0]}: pickle can run code when read and is refused; convert it once: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
        )
    if any(name.endswith(".gguf") for name in names):
        return (
            f"{folder}: holds GGUF weights; expected safetensors ({WEIGHTS_FILE}, or shards with their index)"
        )
    if os.path.lexists(folder / WEIGHTS_FILE):
        what = "a link to nothing" if (folder / WEIGHTS_FILE).is_symlink() else "not a file"
        return f"{folder / WEIGHTS_FILE}: {what}; expected the weights"
    stray = [name for name in names if name.endswith(".safetensors")]
    found = f"found {stray[0]} but no index" if stray else "found none"
    return f"{folder}: no weights: expected {WEIGHTS_FILE} or {INDEX_FILE}, {found}"

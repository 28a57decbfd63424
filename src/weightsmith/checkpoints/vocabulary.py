"""The tokens of a checkpoint and their numbers, read from its tokenizer files without any tokenizer library.

Sources  tokenizer.json; else vocab.json, vocab.txt or a sentencepiece model, with the tokens that
         added_tokens.json and tokenizer_config.json add to them. Other formats (tiktoken, tekken) are not
         read.
Cost     A tokenizer.json of 150,000 tokens takes a third of a second and 60 MB while it is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.errors import CheckpointError

Files = Mapping[str, Path]

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The roles a token can have by name in tokenizer_config.json; `<role>_id` in config.json."""

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens.

    Attributes:
        tokens: Token -> number; those that were added to the model's own are among them.
        added: The added tokens: token -> its entry in tokenizer.json (`special`, `lstrip`, ...).
        kind: Kind of model in tokenizer.json ("BPE", "Unigram", ...); empty where it was read elsewhere.
        merges: Of a BPE model, pairs in the order of their rank.
        roles: Role -> token, for those of `ROLES` that are stated.
        file: The file it was read from.
    """

    tokens: dict[str, int]
    added: dict[str, dict[str, Any]] = field(default_factory=dict)
    kind: str = ""
    merges: tuple[tuple[str, str], ...] = ()
    roles: dict[str, str] = field(default_factory=dict)
    file: Path | None = None

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def end(self) -> int:
        """One past the highest number."""
        return max(self.tokens.values(), default=-1) + 1


def read_vocabulary(files: Files) -> Vocabulary | None:
    """The vocabulary among the side files of a checkpoint; None where it has none that can be read.

    Args:
        files: Name -> file, as `Checkpoint.side_file_map` gives them.

    Raises:
        CheckpointError: a tokenizer file is damaged.
    """
    stated = _object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    roles = {role: token for role in ROLES if (token := _text(stated.get(role))) is not None}
    if "tokenizer.json" in files:
        return _from_json(files["tokenizer.json"], roles)
    plain = _plain(files)
    if plain is None:
        return None
    file, tokens = plain
    added: dict[str, dict[str, Any]] = {}
    if "added_tokens.json" in files:
        tokens.update(_object(files["added_tokens.json"]))
    for number, entry in (stated.get("added_tokens_decoder") or {}).items():
        tokens[entry["content"]] = int(number)
        added[entry["content"]] = dict(entry)
    return Vocabulary(tokens, added, roles=roles, file=file)


def _from_json(file: Path, roles: dict[str, str]) -> Vocabulary:
    page = _object(file)
    model = page.get("model") or {}
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: [token, score] in order of numbers
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    try:
        added = {entry["content"]: entry for entry in page.get("added_tokens") or []}
        tokens = {**vocabulary, **{token: entry["id"] for token, entry in added.items()}}
        merges = tuple(_pair(merge) for merge in model.get("merges") or ())
        kind = str(model.get("type") or ("BPE" if merges else ""))
    except (TypeError, KeyError, ValueError) as problem:
        raise CheckpointError(f"{file}: not a tokenizer: {problem!r}") from problem
    if not all(isinstance(number, int) and number >= 0 for number in tokens.values()):
        raise CheckpointError(f"{file}: not a tokenizer: a token has no number")
    return Vocabulary(tokens, added, kind, merges, roles, file)


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _plain(files: Files) -> tuple[Path, dict[str, int]] | None:
    if "vocab.json" in files:
        return files["vocab.json"], dict(_object(files["vocab.json"]))
    if "vocab.txt" in files:
        lines = files["vocab.txt"].read_text(encoding="utf-8").splitlines()
        return files["vocab.txt"], {line: number for number, line in enumerate(lines)}
    for name in _SENTENCEPIECE:
        if name in files:
            return files[name], {piece: number for number, piece in enumerate(_pieces(files[name]))}
    return None


def _pieces(file: Path) -> Iterator[str]:
    """The pieces of a sentencepiece model: field 1 of the message, and field 1 (text) of each of those."""
    data = file.read_bytes()
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                yield next(
                    piece.decode() for n, piece in _fields(value) if n == 1 and isinstance(piece, bytes)
                )
    except (IndexError, StopIteration, UnicodeDecodeError, ValueError) as problem:
        raise CheckpointError(f"{file}: not a sentencepiece model") from problem


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and content of each field of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(key & 7, -1)
        if size < 0 or at + size > len(data):
            raise ValueError("not a protobuf message")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _text(token: Any) -> str | None:
    """A token as tokenizer_config.json writes it: text, or an object with its content."""
    return token.get("content") if isinstance(token, Mapping) else token


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as problem:
        raise CheckpointError(f"{file}: not valid JSON: {str(problem)[:120]}") from problem
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds {type(value).__name__}, expected a JSON object")
    return value

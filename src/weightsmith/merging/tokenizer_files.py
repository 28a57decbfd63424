"""The tokenizer of an output whose vocabulary is not that of the model it takes after, and its config.

Files    The source's tokenizer files. Appended tokens go into tokenizer.json, the only format that can hold
         them whole: those of a model's own vocabulary into the output's own (BPE with the merges that make
         them, after all others, so that text is first cut as before), added tokens with the settings their
         owner gave them. Vocabulary files of other formats would contradict it and are left out.
Config   `vocab_size`, and every number of a token (`eos_token_id`, `suppress_tokens`, `image_token_index`):
         by the token it stood for, in config.json and generation_config.json.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.checkpoints.vocabulary import ROLES, read_vocabulary
from weightsmith.errors import CheckpointError
from weightsmith.merging.compatibility import NOTHING_WRITTEN
from weightsmith.merging.vocabulary import OutputVocabulary

Files = Mapping[str, Path | bytes]

_TOKENIZER = (
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
    "additional_chat_templates/*",
    "tekken.json",
)
_KEPT_WITH_NEW_TOKENS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template*",
)
_BY_MAP = ("BPE", "WordLevel", "WordPiece")
_PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
# Keys that hold a number of a token, or lists of them; `pad_token_id` of a T5 and `image_token_index` alike.
_NUMBERS = (
    "_token_id",
    "_token_ids",
    "_token_index",
    "suppress_tokens",
    "bad_words_ids",
    "forced_decoder_ids",
)


def with_vocabulary(files: Files, output: OutputVocabulary, name: str) -> dict[str, Path | bytes]:
    """The side files of an output with this vocabulary.

    Args:
        files: Those of the donor.
        output: The vocabulary.
        name: What to call the source of the tokenizer in messages.

    Raises:
        CheckpointError: tokens are to be appended and there is no tokenizer.json, or it is of another kind.
    """
    found: dict[str, Path | bytes] = dict(files)
    if output.files is not None:
        found = {key: file for key, file in found.items() if not _is_any(key, _TOKENIZER)}
        found |= {key: file for key, file in output.files.items() if _is_any(key, _TOKENIZER)}
    if output.appended:
        if "tokenizer.json" not in found:
            raise CheckpointError(
                f"{name}: has no tokenizer.json to append tokens to; make one with transformers: "
                f"AutoTokenizer.from_pretrained(...).save_pretrained(...). {NOTHING_WRITTEN}"
            )
        found = {
            key: file
            for key, file in found.items()
            if not _is_any(key, _TOKENIZER) or _is_any(key, (*_KEPT_WITH_NEW_TOKENS, "additional_chat*"))
        }
        found["tokenizer.json"] = _text(_appended(_object(found["tokenizer.json"]), output, name))
        if "tokenizer_config.json" in found:
            found["tokenizer_config.json"] = _text(_stated(_object(found["tokenizer_config.json"]), output))
    numbers = _renumbered(output)
    for key in ("config.json", "generation_config.json"):
        if key in found:
            old = _object(found[key])
            new = _with_numbers(old, *numbers) if numbers is not None else old
            new = _with_size(new, output) if key == "config.json" else new
            if new != old:
                found[key] = _text(new)
    return dict(sorted(found.items()))


def _appended(page: dict[str, Any], output: OutputVocabulary, name: str) -> dict[str, Any]:
    """tokenizer.json with the new tokens."""
    model, added = page.get("model") or {}, page.setdefault("added_tokens", [])
    if model.get("type") in _BY_MAP:
        # A reader numbers added tokens by their place unless the model's own vocabulary has them.
        model["vocab"].update({entry["content"]: entry["id"] for entry in added})
        model["vocab"].update({token: number for token, (number, _) in output.appended.items()})
        entries = {token: pair for token, pair in output.appended.items() if pair[1] is not None}
    else:
        end = max([len(model.get("vocab", ())), *(entry["id"] + 1 for entry in added)])
        first = min(number for number, _ in output.appended.values())
        if first != end:
            raise CheckpointError(
                f"{name}: its tokens are numbered up to {first - 1}, its tokenizer.json counts {end}: none "
                f"can be appended. {NOTHING_WRITTEN}"
            )
        entries = dict(output.appended)
    if model.get("type") == "BPE" and output.merges:
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in output.merges]
    for token, (number, entry) in entries.items():
        added.append({**_PLAIN_TOKEN, **(entry or {}), "id": number, "content": token})
    return page


def _stated(config: dict[str, Any], output: OutputVocabulary) -> dict[str, Any]:
    """tokenizer_config.json with the new added tokens, where it lists them."""
    if "added_tokens_decoder" in config:
        for token, (number, entry) in output.appended.items():
            if entry is not None:
                facts = {key: value for key, value in entry.items() if key in _PLAIN_TOKEN}
                config["added_tokens_decoder"][str(number)] = {**_PLAIN_TOKEN, **facts, "content": token}
    return config


def _renumbered(output: OutputVocabulary) -> tuple[dict[int, int], dict[str, int]] | None:
    """Old number -> new one, and the numbers that roles have in the new tokenizer; None where all stay."""
    if all(output.ids.get(token) == number for token, number in output.donor_ids.items()):
        return None
    moved = {number: output.ids[token] for token, number in output.donor_ids.items() if token in output.ids}
    roles: dict[str, int] = {}
    vocabulary = read_vocabulary(output.files) if output.files is not None else None
    if vocabulary is not None:
        roles = {
            f"{role}_id": output.ids[t] for role in ROLES if (t := vocabulary.roles.get(role)) in output.ids
        }
    return moved, roles


def _with_numbers(
    config: Mapping[str, Any], moved: Mapping[int, int], roles: Mapping[str, int]
) -> dict[str, Any]:
    """A config with every token's number changed; one whose token is gone takes its role's, or null."""

    def new(value: Any, role: int | None) -> Any:
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int):
            return moved.get(value, role)
        if isinstance(value, list):
            found = [new(item, role) for item in value]
            return [item for item in found if item is not None]
        return value

    return {
        key: _with_numbers(value, moved, roles)
        if isinstance(value, Mapping)
        else new(value, roles.get(key))
        if key.endswith(_NUMBERS)
        else value
        for key, value in config.items()
    }


def _with_size(config: Mapping[str, Any], output: OutputVocabulary) -> dict[str, Any]:
    new = json.loads(json.dumps(config))
    for part in (new, new.get("text_config")):
        if isinstance(part, dict) and part.get("vocab_size") is not None:
            part["vocab_size"] = output.rows
    return new


def _is_any(name: str, masks: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, mask) for mask in masks)


def _object(file: Path | bytes) -> dict[str, Any]:
    return json.loads(file if isinstance(file, bytes) else file.read_bytes())


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

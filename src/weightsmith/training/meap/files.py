"""Whether a model folder's tokenizer can mask, told by its files: a page is checked without loading one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import InputError, nearest
from weightsmith.training.meap.options import MEAPOptions


def check_tokenizer_files(files: Mapping[str, Path | bytes], options: MEAPOptions, model: str) -> None:
    """Refuse a run whose tokenizer has no token to mask with.

    Args:
        files: Files of a model folder by name, or their content.
        options: What token is asked for.
        model: The model's name, for the message.

    Raises:
        InputError: no mask token, or none of that name.
    """
    if "tokenizer.json" not in files or options.add_mask_token:
        return  # another kind of tokenizer: known when it is loaded
    found, tokens = tokens_of_files(files)
    if options.mask_token is not None and options.mask_token not in tokens:
        raise InputError(
            f"objective: meap.mask_token: the tokenizer of {model} has no token `{options.mask_token}`"
            f"{nearest(options.mask_token, tokens)}"
        )
    if options.mask_token is None and found is None:
        raise InputError(
            f"objective: meap: the tokenizer of {model} has no mask token; name a reserved token "
            "(`mask_token: ...`), or let one be added for the training (`add_mask_token: true`)"
        )


def tokens_of_files(files: Mapping[str, Path | bytes]) -> tuple[str | None, tuple[str, ...]]:
    """The mask token and every token that a tokenizer's files name."""

    def read(name: str) -> Mapping[str, Any]:
        content = files.get(name, b"{}")
        return json.loads(content if isinstance(content, bytes) else content.read_bytes())

    found = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        given = read(name).get("mask_token")
        found = given.get("content") if isinstance(given, Mapping) else given or found
    tokenizer = read("tokenizer.json")
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or ()
    words = vocabulary if isinstance(vocabulary, Mapping) else (entry[0] for entry in vocabulary)
    return found, (*(entry["content"] for entry in tokenizer.get("added_tokens") or ()), *words)

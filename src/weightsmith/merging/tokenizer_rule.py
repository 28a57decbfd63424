"""What a page says about the tokens of the output: whose tokenizer, and where single tokens' rows come from.

    tokenizer: base | union | models/code           one word, or
    tokenizer:
      source: union                                 the base's, all models' tokens, or one model's
      tokens:
        <|im_start|>: {source: models/chat}         this row for every model that lacks the token
        <|pad|>: {source: {kind: zero}}
        <s>: {source: {kind: model_token, model: models/code, token: <bos>}, force: true}
      pad_to_multiple_of: 64

The same keys as mergekit's, on our own pages too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from weightsmith.errors import nearest

Keys = tuple[str | int, ...]
Fail = Callable[[Keys, str], NoReturn]
ReadModel = Callable[[Mapping[str, Any], str, Keys], str | None]
"""Reads a model's name under a key of a mapping that stands at some keys."""

RULE_KEYS = ("source", "tokens", "pad_to_multiple_of")
TOKEN_KEYS = ("source", "force")
SOURCE_KEYS = {"model_token": ("kind", "model", "token_id", "token"), "zero": ("kind",)}


@dataclass(frozen=True)
class TokenRule:
    """Where the row of one token comes from.

    Attributes:
        kind: `own` for the usual rule, `model` for that token's row in `model`, `model_token` for another
            token's row in it, `zero` for zeros.
        model: The model as the page names it.
        token: The other token.
        token_id: The other token's number, instead of its name.
        force: Every model takes that row, also one that has the token.
        keys: Where the rule stands on the page.
    """

    kind: Literal["own", "model", "model_token", "zero"] = "own"
    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False
    keys: Keys = ()


@dataclass(frozen=True)
class TokenizerRule:
    """Whose tokens the output has.

    Attributes:
        source: `base`, `union`, or a model.
        tokens: Rules of single tokens; those that no tokenizer has are added.
        pad_to_multiple_of: Rows of the embeddings are filled up to a multiple of this.
        keys: Where the rule stands on the page.
        source_keys: Where its source does.
    """

    source: str
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    keys: Keys = ("tokenizer",)
    source_keys: Keys = ("tokenizer",)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the lineage; models that single tokens come from are left out as paths."""
        tokens = {
            name: {"kind": rule.kind, **({"force": True} if rule.force else {})}
            for name, rule in self.tokens.items()
        }
        padding = {"pad_to_multiple_of": self.pad_to_multiple_of} if self.pad_to_multiple_of else {}
        return {**({"tokens": tokens} if tokens else {}), **padding}


def parse_rule(
    body: Mapping[str, Any], key: str, default: str | None, fail: Fail, model: ReadModel
) -> TokenizerRule | None:
    """The rule under `key` of a page, None where there is none.

    Args:
        body: The page.
        key: `tokenizer`, or `tokenizer_source` of older pages of mergekit.
        default: The source where a mapping names none; None makes that an error.
        fail: Raises the error of some keys.
        model: Reads the name of a model.
    """
    value = body.get(key)
    if value is None:
        return None
    if key == "tokenizer_source" or not isinstance(value, Mapping):
        source = model(body, key, ())
        return TokenizerRule(source, keys=(key,), source_keys=(key,)) if source else None
    keys = (key,)
    _check_keys(value, keys, RULE_KEYS, fail)
    source = default if value.get("source") is None else model(value, "source", keys)
    if not source:
        fail(keys, "expected `source: base`, `source: union` or the path of a model")
    tokens = value.get("tokens")
    if tokens is not None and not isinstance(tokens, Mapping):
        fail((*keys, "tokens"), f"expected a mapping of tokens, found {tokens!r}")
    multiple = value.get("pad_to_multiple_of")
    if multiple is not None and (not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1):
        fail((*keys, "pad_to_multiple_of"), f"expected a whole number from 1 on, found {multiple!r}")
    rules = {
        token: _token_rule(rule, (*keys, "tokens", token), fail, model)
        for token, rule in (tokens or {}).items()
    }
    return TokenizerRule(source, rules, multiple, keys, (*keys, "source"))


def _token_rule(rule: Any, keys: Keys, fail: Fail, model: ReadModel) -> TokenRule:
    if rule is None:
        return TokenRule(keys=keys)
    _check_keys(rule, keys, TOKEN_KEYS, fail)
    force = rule.get("force", False)
    if not isinstance(force, bool):
        fail((*keys, "force"), f"expected true or false, found {force!r}")
    source, at = rule.get("source"), (*keys, "source")
    if source is None:
        return TokenRule(force=force, keys=keys)
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenRule("model", model(rule, "source", keys), force=force, keys=keys)
    kind = source["kind"]
    if kind not in SOURCE_KEYS:
        fail((*at, "kind"), f"expected {' or '.join(SOURCE_KEYS)}, found {kind!r}")
    _check_keys(source, at, SOURCE_KEYS[kind], fail)
    if kind == "zero":
        return TokenRule("zero", force=force, keys=keys)
    token, number = source.get("token"), source.get("token_id")
    if (token is None) == (number is None):
        fail(at, "expected either `token` or `token_id`")
    if token is not None and not isinstance(token, str):
        fail((*at, "token"), f"expected text, found {token!r}")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        fail((*at, "token_id"), f"expected a whole number from 0 on, found {number!r}")
    name = model(source, "model", at)
    if not name:
        fail(at, "expected `model: <path>`")
    return TokenRule("model_token", name, token, number, force, keys)


def _check_keys(value: Any, keys: Keys, known: tuple[str, ...], fail: Fail) -> None:
    if not isinstance(value, Mapping):
        fail(keys, f"expected a mapping of {', '.join(known)}, found {value!r}")
    for key in value:
        if key not in known:
            fail((*keys, key), f"no such key{nearest(key, known) or ';'} known: {', '.join(known)}")

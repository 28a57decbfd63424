"""The tokens of the output of a merge, and which row of every model belongs to each.

Tokens   Those of the base (or first model) unless the page says otherwise; `union` appends the others', a
         path takes another tokenizer. Numbers of the base's tokens never change in a union.
Rows     As many as that model has, padding included, more where tokens need them; `pad_to_multiple_of` fills
         up. A token that a model lacks takes the base's row, else its only owner's, else the owners' mean;
         padding keeps each model's own, else the base's, else the mean of the base's tokens.
Default  Without a rule the tokenizers must agree; models that differ in padding alone are padded alike.

Every change against the base's vocabulary is a warning, part of the report, and part of the lineage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.checkpoints import Checkpoint, layer_index
from weightsmith.checkpoints import folder as folders
from weightsmith.checkpoints.vocabulary import Vocabulary, read_vocabulary
from weightsmith.errors import CheckpointError
from weightsmith.merging import compatibility
from weightsmith.merging.aligned import AlignedCheckpoint, Filler
from weightsmith.merging.config import MergeConfig
from weightsmith.merging.modules import split
from weightsmith.merging.tokenizer_rule import TokenizerRule, TokenRule

_OVER_TOKENS = re.compile(
    r"(?:^|\.)(?:(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared|lm_head|embed_out|proj_out"
    r"|vocab_projector|output_layer|backbone\.embeddings|lm_head\.linear|lm_head\.decoder"
    r"|cls\.predictions\.decoder)\.(?:weight|bias)|cls\.predictions\.bias)$|^output\.weight$"
)
_OF_POSITIONS = re.compile(r"posit|wpe|token_type|norm")
_SHOWN, _LISTED = 3, 100
"""Tokens named in a message, and in the lineage."""

FindModel = Callable[[str], Checkpoint | None]
"""The open checkpoint of a model that the page names, None for one that isn't part of the merge."""


@dataclass(frozen=True)
class OutputVocabulary:
    """What the output's tokenizer and config have to say.

    Attributes:
        ids: Token -> number.
        rows: Rows of the embeddings.
        files: Side files of the tokenizer that the output takes after, None for the donor's.
        appended: Tokens that the files don't have yet, in order: token -> (number, its entry among the added
            tokens of its owner, None for a token of a model's own vocabulary).
        merges: Merges of BPE models that make appended tokens.
        donor_ids: The donor's tokens.
        donor_rows: The donor's rows.
    """

    ids: Mapping[str, int]
    rows: int
    files: Mapping[str, Path] | None
    appended: Mapping[str, tuple[int, Mapping[str, Any] | None]]
    merges: tuple[tuple[str, str], ...]
    donor_ids: Mapping[str, int]
    donor_rows: int


@dataclass(frozen=True)
class Alignment:
    """How the models of a merge come to one vocabulary.

    Attributes:
        checkpoints: By `id` of a checkpoint, what to read instead of it; absent where nothing changes.
        output: The output's vocabulary.
        summary: For the report and the lineage.
        warnings: What the user should know.
    """

    checkpoints: Mapping[int, Checkpoint]
    output: OutputVocabulary
    summary: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def align(
    config: MergeConfig,
    donor: Checkpoint,
    checkpoints: Sequence[Checkpoint],
    find: FindModel,
) -> Alignment | None:
    """Bring the models of a merge to one vocabulary.

    Args:
        config: The page.
        donor: The model whose config the output takes.
        checkpoints: All models, the base and the donor among them, in the page's order.
        find: Gives the models that the rule names.

    Returns:
        None where every model's rows are used as they are.

    Raises:
        CheckpointError: the tokenizers differ and the page has no rule; a tokenizer is missing or damaged.
        PageError: the rule asks for what the models can't give.
    """
    rule = config.tokenizer
    if rule is None:
        rows = [token_tensors(checkpoint) for checkpoint in checkpoints]
        if all(one == rows[0] for one in rows) or not compatibility.has_tokenizer(donor):
            return None
        rule = TokenizerRule("base")
    if rule.source == "base" and not rule.tokens and not any(map(compatibility.has_tokenizer, checkpoints)):
        return None
    made = _Alignment(config, rule, donor, checkpoints, find)
    made.choose_tokens()
    made.choose_rows()
    made.choose_fillers()
    return made.finished()


def token_tensors(checkpoint: Checkpoint) -> dict[str, int]:
    """The tensors of a model whose first axis counts tokens, with their rows."""
    text = compatibility.text_config(checkpoint.config)
    parts = split(checkpoint.tensors)
    outside = [
        name
        for part, names in parts.items()
        if part not in ("vision_tower", "multi_modal_projector")
        for name in names
        if layer_index(name) is None and checkpoint.tensors[name].shape
    ]
    found = [name for name in outside if _OVER_TOKENS.search(name)]
    if not found:  # an architecture with names of its own
        size = text.get("vocab_size")
        found = [
            name
            for name in outside
            if checkpoint.tensors[name].shape[0] == size and not _OF_POSITIONS.search(name)
        ]
    return {name: checkpoint.tensors[name].shape[0] for name in found}


@dataclass
class _Side:
    """One model's view of the vocabularies.

    Attributes:
        own: For every output row the model's row, -1 where it has none.
    """

    checkpoint: Checkpoint
    vocabulary: Vocabulary
    rows: int
    names: list[str]
    own: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def row_of(self, token: str) -> int | None:
        """The row of a token; None where the model has no such token, or no row for it."""
        number = self.vocabulary.tokens.get(token)
        return number if number is not None and number < self.rows else None


class _Alignment:
    """Works out an alignment, step by step."""

    def __init__(
        self,
        config: MergeConfig,
        rule: TokenizerRule,
        donor: Checkpoint,
        checkpoints: Sequence[Checkpoint],
        find: FindModel,
    ) -> None:
        self.config, self.rule, self.find = config, rule, find
        self.warnings: list[str] = []
        self.sides = self._read(donor, checkpoints)
        self.donor = self.sides[id(donor)]
        base = find(config.base) if config.base is not None else None
        self.base = self.sides.get(id(base))

    def choose_tokens(self) -> None:
        """The output's tokens and their numbers."""
        self.files: Mapping[str, Path] | None = None
        source, start = self.donor.vocabulary, self.donor.rows
        if self.rule.source not in ("base", "union"):
            source, start, self.files = self._other_source()
        self.ids = dict(source.tokens)
        self.start_rows = start
        self.appended: dict[str, tuple[int, Mapping[str, Any] | None]] = {}
        merges: dict[tuple[str, str], None] = {}
        if self.rule.source == "union":
            for side in self.sides.values():
                self._append(side)
                if side.vocabulary.kind == source.kind == "BPE":
                    merges.update(dict.fromkeys(side.vocabulary.merges))
        for token in self.rule.tokens:
            if token not in self.ids:
                self._add(token, {"content": token, "normalized": True})
        old = set(source.merges)
        self.merges = tuple(
            pair
            for pair in merges
            if pair not in old and all(part in self.ids for part in (*pair, "".join(pair)))
        )

    def choose_rows(self) -> None:
        """How many rows the output has, and which row of every model belongs to each."""
        needed = [
            number
            for token, number in self.ids.items()
            if token in self.rule.tokens or any(s.row_of(token) is not None for s in self.sides.values())
        ]
        self.rows = max([self.start_rows, *(number + 1 for number in needed)])
        multiple = self.rule.pad_to_multiple_of
        if multiple:
            self.rows = -(-self.rows // multiple) * multiple
        self.tokens = {token: number for token, number in self.ids.items() if number < self.rows}
        numbers = np.fromiter(self.tokens.values(), np.int64, len(self.tokens))
        self.is_token = np.zeros(self.rows, bool)
        self.is_token[numbers] = True
        for side in self.sides.values():
            rows = (side.row_of(token) for token in self.tokens)
            side.own = np.full(self.rows, -1, np.int64)
            side.own[numbers] = np.fromiter(
                (-1 if row is None else row for row in rows), np.int64, len(numbers)
            )
            # Padding: what is no token, neither there nor here, stays where it is.
            padding = ~self.is_token
            padding[side.rows :] = False
            taken = np.fromiter(side.vocabulary.tokens.values(), np.int64, len(side.vocabulary))
            padding[taken[taken < self.rows]] = False
            side.own[padding] = np.flatnonzero(padding)

    def choose_fillers(self) -> None:
        """Where the rows come from that a model has not."""
        sides = list(self.sides.values())
        self.fill = {id(side.checkpoint): np.full(self.rows, -1, np.int64) for side in sides}
        forced = np.zeros(self.rows, bool)
        ruled = np.zeros(self.rows, bool)
        for token, rule in self.rule.tokens.items():
            number = self.ids[token]
            forced[number] = rule.force
            ruled[number] = rule.kind != "own"
            if rule.kind in ("model", "model_token"):
                side, row = self._ruled(token, rule)
                self.fill[id(side.checkpoint)][number] = row
        lacking = forced | np.any([side.own < 0 for side in sides], axis=0)
        free = lacking & ~ruled
        if self.base is not None:
            from_base = free & (self.base.own >= 0)
            self.fill[id(self.base.checkpoint)][from_base] = self.base.own[from_base]
            free &= ~from_base
        reference = self.base or self.donor
        padding = free & ~self.is_token & (reference.own >= 0)
        self.fill[id(reference.checkpoint)][padding] = reference.own[padding]
        free &= ~padding
        for side in sides:
            from_side = free & self.is_token & (side.own >= 0)
            self.fill[id(side.checkpoint)][from_side] = side.own[from_side]
        self.of_mean = free & ~self.is_token
        nobody = free & self.is_token & np.all([side.own < 0 for side in sides], axis=0)
        if nobody.any():
            names = [token for token, number in self.tokens.items() if nobody[number]]
            self.warnings.append(f"{_named(names)} in no model: rows of zeros")
        self.forced = forced

    def finished(self) -> Alignment | None:
        """The alignment; None where every model is used as it is and the tokenizer stays."""
        filler = self._filler()
        aligned: dict[int, Checkpoint] = {}
        models: dict[str, Any] = {}
        for key, side in self.sides.items():
            own = np.where(self.forced, -1, side.own)
            if self.rows != side.rows or not np.array_equal(own, np.arange(self.rows)):
                aligned[key] = AlignedCheckpoint(side.checkpoint, side.names, own, filler)
                models[side.checkpoint.name] = self._told(side)
        output = OutputVocabulary(
            self.ids,
            self.rows,
            self.files,
            self.appended,
            self.merges,
            self.donor.vocabulary.tokens,
            self.donor.rows,
        )
        if not aligned and self.files is None and not self.appended:
            return None
        added = [token for token in self.ids if token not in self.donor.vocabulary.tokens]
        dropped = [token for token in self.donor.vocabulary.tokens if token not in self.ids]
        summary = {
            "source": self.rule.source if self.rule.source in ("base", "union") else self.source_name,
            "tokens": len(self.ids),
            "rows": self.rows,
            "added": added[:_LISTED],
            "num_added": len(added),
            "num_dropped": len(dropped),
            "models": models,
        }
        return Alignment(aligned, output, summary, (*self._change(added, dropped), *self.warnings))

    def _read(self, donor: Checkpoint, checkpoints: Sequence[Checkpoint]) -> dict[int, _Side]:
        """Every model's vocabulary; equal files are read once."""
        known: dict[Any, Vocabulary] = {}
        found: dict[int, Vocabulary | None] = {}
        for checkpoint in checkpoints:
            content = tuple(sorted(compatibility.vocabulary_bytes(checkpoint).items()))
            if content and content not in known:
                vocabulary = read_vocabulary(checkpoint.side_file_map())
                if vocabulary is None:
                    raise CheckpointError(
                        f"{checkpoint.name}: its tokenizer ({', '.join(name for name, _ in content)}) can't "
                        "be read token by token; load it with transformers' AutoTokenizer and save it as "
                        f"tokenizer.json. {compatibility.NOTHING_WRITTEN}"
                    )
                known[content] = vocabulary
            found[id(checkpoint)] = known.get(content)
        own = found[id(donor)]
        if own is None:
            self.config.fail(
                self.rule.keys, f"{donor.name} has no tokenizer whose tokens the output could have"
            )
        sides = {}
        for checkpoint in checkpoints:
            if found[id(checkpoint)] is None:
                self.warnings.append(f"{checkpoint.name} has no tokenizer; taken for that of {donor.name}")
            tensors = token_tensors(checkpoint)
            if len(set(tensors.values())) > 1:
                sizes = ", ".join(f"{name} has {rows}" for name, rows in tensors.items())
                raise CheckpointError(
                    f"{checkpoint.name}: its tensors over tokens differ in rows ({sizes}), so that they "
                    f"can't be brought to another vocabulary. {compatibility.NOTHING_WRITTEN}"
                )
            rows = max(tensors.values(), default=0)
            sides[id(checkpoint)] = _Side(checkpoint, found[id(checkpoint)] or own, rows, list(tensors))
        return sides

    def _other_source(self) -> tuple[Vocabulary, int, Mapping[str, Path]]:
        """Vocabulary, rows and files of the model that the rule names; no rows if it isn't merged."""
        checkpoint = self.find(self.rule.source)
        if checkpoint is not None and id(checkpoint) in self.sides:
            side = self.sides[id(checkpoint)]
            self.source_name = checkpoint.name
            return side.vocabulary, side.rows, checkpoint.side_file_map()
        keys = self.rule.source_keys
        try:
            folder, self.source_name = folders.resolve(self.rule.source, weights=False)
        except CheckpointError as problem:
            self.config.fail(keys, str(problem))
        files = folders.side_files(folder)
        vocabulary = read_vocabulary(files)
        if vocabulary is None:
            self.config.fail(keys, f"{self.source_name} has no tokenizer that can be read")
        return vocabulary, 0, files

    def _append(self, side: _Side) -> None:
        """Append a model's tokens in the order of their numbers, those of its own vocabulary first."""
        tokens = sorted(side.vocabulary.tokens.items(), key=lambda item: item[1])
        for added in (False, True):
            for token, number in tokens:
                entry = side.vocabulary.added.get(token)
                if token not in self.ids and (entry is not None) == added and number < side.rows:
                    self._add(token, entry)

    def _add(self, token: str, entry: Mapping[str, Any] | None) -> None:
        number = max(self.ids.values(), default=-1) + 1 if not self.appended else self.next_number
        self.next_number = number + 1
        self.ids[token] = number
        self.appended[token] = (number, entry)

    def _ruled(self, token: str, rule: TokenRule) -> tuple[_Side, int]:
        """The model and row that a rule takes a token from."""
        assert rule.model is not None
        checkpoint = self.find(rule.model)
        side = self.sides.get(id(checkpoint)) if checkpoint is not None else None
        if side is None:
            self.config.fail((*rule.keys, "source"), f"`{rule.model}` is no model of this merge")
        if rule.token_id is not None:
            if rule.token_id >= side.rows:
                problem = f"{side.checkpoint.name} has {side.rows} rows, {rule.token_id} is asked for"
                self.config.fail((*rule.keys, "source", "token_id"), problem)
            return side, rule.token_id
        wanted = rule.token if rule.token is not None else token
        row = side.row_of(wanted)
        if row is None:
            self.config.fail((*rule.keys, "source"), f"{side.checkpoint.name} has no token {wanted!r}")
        return side, row

    def _filler(self) -> Filler:
        donors = [
            (side.checkpoint, self.fill[key])
            for key, side in self.sides.items()
            if (self.fill[key] >= 0).any()
        ]
        if not self.of_mean.any():
            return Filler(donors, None)
        reference = self.base or self.donor
        tokens = reference.own[self.is_token & (reference.own >= 0)]
        return Filler(donors, (reference.checkpoint, np.sort(tokens), self.of_mean))

    def _told(self, side: _Side) -> dict[str, Any]:
        """What becomes of one model's tokens."""
        own = side.vocabulary.tokens
        moved = sum(own[token] != number for token, number in self.tokens.items() if token in own)
        return {
            "rows": side.rows,
            "moved": moved,
            "missing": sum(side.row_of(token) is None for token in self.tokens),
            "dropped": sum(token not in self.ids for token in own),
        }

    def _change(self, added: Sequence[str], dropped: Sequence[str]) -> list[str]:
        """What changed against the donor's vocabulary, and in each model."""
        name, found = self.donor.checkpoint.name, []
        if added or dropped or self.rows != self.donor.rows or self.files is not None:
            parts = [f"{_named(added)} added"] * bool(added) + [f"{_named(dropped)} dropped"] * bool(dropped)
            found.append(
                f"vocabulary: {len(self.ids)} tokens in {self.rows} rows, {name} has "
                f"{len(self.donor.vocabulary)} in {self.donor.rows}" + "".join(f"; {part}" for part in parts)
            )
        for side in self.sides.values():
            if side is self.donor:
                continue
            own = side.vocabulary.tokens
            missing = [token for token in self.tokens if side.row_of(token) is None]
            lost = [token for token in own if token not in self.ids]
            moved = sum(own[token] != number for token, number in self.tokens.items() if token in own)
            parts = [f"{_named(missing)} not its own"] * bool(missing)
            parts += [f"{_named(lost)} dropped"] * bool(lost)
            parts += [f"{moved} moved to other rows"] * bool(moved)
            parts += [f"{side.rows} rows, the output has {self.rows}"] * (side.rows != self.rows)
            if parts:
                found.append(f"vocabulary of {side.checkpoint.name}: {'; '.join(parts)}")
        return found


def _named(tokens: Sequence[str]) -> str:
    """`2 tokens ('a', 'b')`."""
    shown = ", ".join(repr(token) for token in tokens[:_SHOWN])
    more = ", ..." if len(tokens) > _SHOWN else ""
    return f"{len(tokens)} token{'s' * (len(tokens) != 1)} ({shown}{more})"

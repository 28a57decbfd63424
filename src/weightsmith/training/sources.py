"""One source of training data: a task of the test-bed, a local file, or a hub data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weightsmith.errors import InputError, nearest, require
from weightsmith.evaluation import files
from weightsmith.runs.atomic import system_faults
from weightsmith.testbed import tasks


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One thing to train on."""

    source: str
    """A task or task set of the test-bed, a local file (.txt, .md, .jsonl, .ndjson, .parquet), or a hub id
    `owner/name`."""
    column: str = "text"
    """The column of a file or data set that holds the text, or the answer where `prompt` is given."""
    prompt: str | None = None
    """The column that holds the question; the loss then counts answers only."""
    subset: str | None = None
    """The configuration of a hub data set."""
    split: str = "train"
    """The split of a hub data set."""
    weight: float = 1.0
    """Share of this source among its neighbours."""

    @property
    def kind(self) -> Literal["testbed", "file", "hub"]:
        """Where the data comes from.

        Raises:
            InputError: the name is nothing known; names the nearest test-bed task.
        """
        if self.source in tasks.NAMES:
            return "testbed"
        if Path(self.source).suffix in files.KINDS or Path(self.source).is_file():
            return "file"
        if self.source.count("/") == 1 and not self.source.startswith((".", "/", "~")):
            return "hub"
        raise InputError(
            f"data `{self.source}`: neither a test-bed task ({', '.join(tasks.NAMES)}), "
            f"nor a file ({' '.join(files.KINDS)}), nor a hub id (owner/name)"
            + nearest(self.source, tasks.NAMES)
        )

    def check(self) -> None:
        """Raise `InputError` for what can be known without reading: names, missing files, weights."""
        if not self.weight > 0:
            raise InputError(f"data `{self.source}`: weight must be positive, got {self.weight}")
        if self.kind == "file":
            files.open_file(self.source).close()
            if self.prompt is not None and not files.is_table(self.source):
                raise InputError(f"data `{self.source}`: `prompt` names a column, but a text file has none")

    def fingerprint(self) -> str:
        """Stands for the content: the bytes of a file, code and Python of a test-bed task, a hub data set's
        name.

        Raises:
            InputError: the file is missing or the name is nothing known.
        """
        if self.kind == "testbed":
            return f"testbed:{tasks.fingerprint()}"
        if self.kind == "hub":
            return f"hub:{self.source}"
        digest = hashlib.blake2b(digest_size=16)
        with system_faults(self.source), files.open_file(self.source) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def texts(self) -> Iterator[str]:
        """The texts of a file or hub data set, one by one; a text file is one text.

        Raises:
            InputError: missing, empty, not of the format its name says, or without the column.
            MissingExtraError: Parquet files and hub data sets need the extra `hf`.
        """
        if self.kind == "file":
            return files.read_texts(self.source, self.column)
        values = (value for (value,) in self._hub_rows((self.column,)))
        return files.not_empty(self.source, files.as_texts(self.source, self.column, values))

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Prompts and answers; rows without an answer are left out. Raises as `texts`."""
        columns = (self.prompt or "", self.column)
        rows = files.read_rows(self.source, columns) if self.kind == "file" else self._hub_rows(columns)
        return files.not_empty(self.source, ((str(prompt), str(answer)) for prompt, answer in rows if answer))

    def _hub_rows(self, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
        datasets = require("datasets", extra="hf", needed_by=f"data set {self.source}")
        try:
            table = datasets.load_dataset(self.source, self.subset, split=self.split)
        except (ValueError, OSError) as problem:  # not there, no such subset or split, offline
            reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            raise InputError(
                f"data set {self.source} (split {self.split}) can't be loaded: {reason}"
            ) from problem
        files.check_columns(self.source, columns, table.column_names)
        for row in table.select_columns(list(columns)):
            yield tuple(row[column] for column in columns)

"""Rows of local files: text, JSON lines, Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from weightsmith.errors import InputError, nearest, require
from weightsmith.runs.atomic import system_faults

TEXT, JSON_LINES, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), (".parquet",)
KINDS = (*TEXT, *JSON_LINES, *PARQUET)

Row = tuple[Any, ...]


def is_table(file: str) -> bool:
    """Whether a file has columns; every other file is read as UTF-8 text."""
    return Path(file).suffix in (*JSON_LINES, *PARQUET)


def read_texts(file: str, column: str = "text") -> Iterator[str]:
    """The texts of one column, or a text file as a whole; empty ones are left out.

    Raises:
        InputError: missing, not of the format its name says, without the column, or without any text; names
            file, line and the columns there are.
        MissingExtraError: a Parquet file needs the extra `hf`.
    """
    if is_table(file):
        texts: Iterator[Any] = (value for (value,) in read_rows(file, (column,)))
    else:
        with open_file(file) as handle:
            content = handle.read()
        try:
            texts = iter([content.decode("utf-8")])
        except UnicodeDecodeError as problem:
            raise InputError(f"{file}: not UTF-8 text: {problem}") from problem
    return not_empty(file, as_texts(file, column, texts))


def read_rows(file: str, columns: Sequence[str]) -> Iterator[Row]:
    """The named columns of a JSON lines or Parquet file, row by row. Raises as `read_texts`."""
    if Path(file).suffix in JSON_LINES:
        return _json_rows(file, columns)
    if Path(file).suffix in PARQUET:
        return _parquet_rows(file, columns)
    raise InputError(f"{file}: has no columns; expected {' '.join((*JSON_LINES, *PARQUET))}")


def check_columns(place: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    """Raise `InputError` for the first of the `wanted` columns that is not there."""
    for column in wanted:
        if column not in found:
            raise InputError(
                f"{place}: no column `{column}`{nearest(column, found)}; found {', '.join(found)}"
            )


def as_texts(place: str, column: str, values: Iterator[Any]) -> Iterator[str]:
    """The values that are not empty, checked to be text (`InputError`)."""
    for value in values:
        if value is not None and not isinstance(value, str):
            raise InputError(f"{place}: column `{column}` holds {type(value).__name__}, expected text")
        if value:
            yield value


def not_empty(place: str, rows: Iterator[Any]) -> Iterator[Any]:
    """All rows; `InputError` at the end when there was none."""
    found = False
    for row in rows:
        found = True
        yield row
    if not found:
        raise InputError(f"{place}: there is nothing in it to read")


def open_file(file: str) -> BinaryIO:
    """The file, open for reading.

    Raises:
        InputError: there is none.
        SystemFault: it can't be opened.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{file}: no such file")
    with system_faults(path):
        return path.open("rb")


def _json_rows(file: str, columns: Sequence[str]) -> Iterator[Row]:
    with open_file(file) as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise InputError(f"{file}:{number}: not a line of JSON: {problem}") from problem
            if not isinstance(row, dict):
                raise InputError(f"{file}:{number}: expected an object, found {type(row).__name__}")
            check_columns(f"{file}:{number}", columns, list(row))
            yield tuple(row[column] for column in columns)


def _parquet_rows(file: str, columns: Sequence[str]) -> Iterator[Row]:
    arrow = require("pyarrow", extra="hf", needed_by=f"reading {file}")
    parquet = require("pyarrow.parquet", extra="hf", needed_by=f"reading {file}")
    with open_file(file) as handle:
        try:
            table = parquet.ParquetFile(handle)
        except arrow.ArrowInvalid as problem:
            raise InputError(f"{file}: not a Parquet file: {problem}") from problem
        check_columns(file, columns, table.schema_arrow.names)
        for batch in table.iter_batches(columns=list(columns)):
            yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)

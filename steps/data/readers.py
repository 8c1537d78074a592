"""Raw text tables into polars frames, with the place of every row in its file."""

from pathlib import Path
from typing import Any

import polars as pl

from steps.common.cli import StepError

_FIELD = b"\x1f"  # ASCII's unit separator: stands for separators of several characters
_TYPES: dict[str, Any] = {"rating": pl.Float32, "timestamp": pl.Int64, "title": pl.String}


def read_table(folder: Path, table: dict[str, Any]) -> tuple[pl.DataFrame, list[int]]:
    """Read the table that an entry of params/datasets.yaml describes.

    Returns the frame with the columns named user, item, rating, timestamp or title that the entry
    lists, and `row` (UInt32, counted from 1, the line in the file); and the lines whose number of
    fields is wrong. A value that is missing or of the wrong type becomes null: `schemas` reports it.
    Ids are Int64 where the file's first rows are whole numbers, else String.
    """
    path = folder / table["path"]
    if not path.is_file():
        raise StepError(f"{path} does not exist; params/datasets.yaml names it")
    content = path.read_bytes()
    if table.get("encoding") == "latin-1":
        content = content.decode("latin-1").encode("utf-8")
    separator = table["separator"].encode()
    columns = table["columns"]
    first = 2 if table["header"] else 1
    if not content.split(b"\n", first)[first - 1].strip():
        raise StepError(f"{path} has no rows")
    malformed = _malformed_lines(content, separator, len(columns), first)
    if len(separator) > 1:
        content = content.replace(separator, _FIELD)
        separator = _FIELD
    wanted = [name for name in columns if name in ("user", "item", *_TYPES)]
    frame = pl.read_csv(
        content,
        separator=separator.decode(),
        has_header=False,
        skip_lines=first - 1,
        new_columns=columns,
        columns=[columns.index(name) for name in wanted],
        schema_overrides={name: _TYPES[name] for name in wanted if name in _TYPES},
        quote_char='"' if separator == b"," else None,
        ignore_errors=True,
        truncate_ragged_lines=True,
    )
    return frame.with_row_index("row", offset=first).with_columns(pl.col("row").cast(pl.UInt32)), malformed


def _malformed_lines(content: bytes, separator: bytes, fields: int, first: int) -> list[int]:
    """Lines that do not have `fields` fields; counting the whole file first, which nearly always settles it."""
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    blank = content.startswith(b"\n") or b"\n\n" in content
    if not blank and content.count(separator) == lines * (fields - 1):
        short = content.count(separator + b"\n") + content.endswith(separator)
        if not short:
            return []
    if separator == b"," and b'"' in content:
        return []  # quoted fields may hold the separator: the parser, not a count, tells fields apart
    return [
        number
        for number, line in enumerate(content.rstrip(b"\n").split(b"\n"), 1)
        if number >= first and line.count(separator) != fields - 1
    ]

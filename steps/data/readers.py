"""Raw text tables into polars frames, with the line of every row in its file."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from steps.common.cli import StepError
from steps.common.files import reading

_FIELD = b"\x1f"  # ASCII's unit separator, which replaces separators of several characters
_LINE_END = b"\n"
_TYPE_SAMPLE_ROWS = 100
_TYPES: dict[str, Any] = {"rating": pl.Float32, "timestamp": pl.Int64, "title": pl.String}


def read_table(folder: Path, table: dict[str, Any]) -> tuple[pl.DataFrame, list[int]]:
    """Read the table that an entry of params/datasets.yaml describes.

    Returns the frame with the columns named user, item, rating, timestamp or title that the entry
    lists, its features (String), and `row` (UInt32, counted from 1, the line in the file); and the lines whose number
    of fields is wrong. A value that is missing or of the wrong type becomes null: `schemas` reports it.
    Ids are Int64 if those in the file's first rows are whole numbers without leading zeros and all later ones are whole
    numbers; else String.
    """
    content, separator, first = _content(folder, table)
    columns, options = table["columns"], _options(separator, first)
    malformed = _malformed_lines(content, separator, len(columns), first)
    head = pl.read_csv(content, schema=dict.fromkeys(columns, pl.String), n_rows=_TYPE_SAMPLE_ROWS, **options)
    types = _TYPES | dict.fromkeys(table.get("features", {}), pl.String)
    schema = {name: types.get(name) or _id_type(head[name]) for name in columns}
    frame = pl.read_csv(content, schema=schema, **options)
    if any(frame[name].null_count() for name, kind in schema.items() if kind == pl.Int64 and name not in types):
        texts = pl.read_csv(content, schema=dict.fromkeys(columns, pl.String), **options)
        late = [name for name in columns if name not in types and texts[name].null_count() < frame[name].null_count()]
        frame = frame.with_columns(texts.select(late))
    frame = frame.select(name for name in columns if name in ("user", "item", *types))
    return frame.with_row_index("row", offset=first).with_columns(pl.col("row").cast(pl.UInt32)), malformed


def read_texts(folder: Path, table: dict[str, Any]) -> pl.DataFrame:
    """The same table's fields as they are in the file, null where there is none, and `row`."""
    content, separator, first = _content(folder, table)
    frame = pl.read_csv(content, schema=dict.fromkeys(table["columns"], pl.String), **_options(separator, first))
    return frame.with_row_index("row", offset=first)


def _content(folder: Path, table: dict[str, Any]) -> tuple[bytes, bytes, int]:
    """The file as UTF-8, the one byte that separates its fields, and its first line with values."""
    path = folder / table["path"]
    with reading(path, "params/datasets.yaml names it"):
        content = path.read_bytes()
        if table.get("encoding") == "latin-1":
            content = content.decode("latin-1").encode("utf-8")
    separator = table["separator"].encode()
    first = 2 if table["header"] else 1
    if not content.split(b"\n", first)[first - 1].strip():
        raise StepError(f"{path} has no rows")
    if len(separator) > 1:
        content = content.replace(separator, _FIELD)
        separator = _FIELD
    return content, separator, first


def _options(separator: bytes, first: int) -> dict[str, Any]:
    return {
        "separator": separator.decode(),
        "has_header": False,
        "skip_lines": first - 1,
        "quote_char": '"' if separator == b"," else None,
        "ignore_errors": True,
        "truncate_ragged_lines": True,
        "missing_columns": "insert",  # where no line has the last fields
        "extra_columns": "ignore",
    }


def _id_type(head: pl.Series) -> type[pl.Int64] | type[pl.String]:
    numbers = head.cast(pl.Int64, strict=False)
    whole = numbers.null_count() == head.null_count() and (numbers.cast(pl.String) == head).all()
    return pl.Int64 if whole else pl.String


def _malformed_lines(content: bytes, separator: bytes, fields: int, first: int) -> list[int]:
    """Lines from `first` on that do not have `fields` fields, split by the one byte `separator`.

    For a good file one comparison of all separators and line ends is enough (0.03 s for MovieLens-1M). Only a bad file
    is read line by line.
    """
    if separator == b"," and b'"' in content:
        return []  # quoted fields may contain the separator: only the parser can count fields
    text = np.frombuffer(content if content.endswith(b"\n") else content + b"\n", dtype=np.uint8)
    marks = text[(text == separator[0]) | (text == _LINE_END[0])]
    pattern = np.frombuffer(separator * (fields - 1) + _LINE_END, dtype=np.uint8)
    if len(marks) % fields == 0 and (marks.reshape(-1, fields) == pattern).all():
        return []
    lines = content.removesuffix(_LINE_END).split(_LINE_END)
    return [number for number, line in enumerate(lines, 1) if number >= first and line.count(separator) != fields - 1]

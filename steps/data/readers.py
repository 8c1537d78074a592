"""Raw text tables into polars frames, with the line of every row in its file."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from steps.common.cli import StepError
from steps.common.files import reading

_FIELD = b"\x1f"  # ASCII's unit separator, which replaces separators of several characters
_LINE_END = b"\n"
_TYPES: dict[str, Any] = {"rating": pl.Float32, "timestamp": pl.Int64, "title": pl.String}


def read_table(folder: Path, table: dict[str, Any]) -> tuple[pl.DataFrame, list[int]]:
    """Read the table that an entry of params/datasets.yaml describes.

    Returns the frame with the columns named user, item, rating, timestamp or title that the entry
    lists, its features (String), and `row` (UInt32, counted from 1, the line in the file); and the lines whose number
    of fields is wrong. A value that is missing or of the wrong type becomes null: `schemas` reports it.
    Ids are Int64 if all of them are whole numbers as one writes them, without leading zeros or signs; else String.
    Raises StepError if the file cannot be read, or if its first line is not what `header` and `columns` say.
    """
    content, separator, first = _content(folder, table)
    columns, path = table["columns"], folder / table["path"]
    _check_first_line(content, separator, table, path)
    malformed = _malformed_lines(content, separator, len(columns), first, path)
    types = _TYPES | dict.fromkeys(table.get("features", {}), pl.String)
    schema = {name: types.get(name, pl.String) for name in columns}
    frame = pl.read_csv(content, schema=schema, **_options(separator, first))
    frame = frame.select(name for name in columns if name in ("user", "item", *types))
    frame = frame.with_columns(_as_ids(frame[name]) for name in ("user", "item") if name in columns)
    return frame.with_row_index("row", offset=first).with_columns(pl.col("row").cast(pl.UInt32)), malformed


def read_texts(folder: Path, table: dict[str, Any]) -> pl.DataFrame:
    """The same table's fields as they are in the file, null where there is none, and `row`."""
    content, separator, first = _content(folder, table)
    frame = pl.read_csv(content, schema=dict.fromkeys(table["columns"], pl.String), **_options(separator, first))
    return frame.with_row_index("row", offset=first)


def _content(folder: Path, table: dict[str, Any]) -> tuple[bytes, bytes, int]:
    """The file as UTF-8, the one byte that separates its fields, and its first line with values."""
    path, encoding = folder / table["path"], table.get("encoding", "utf-8")
    with reading(path, "params/datasets.yaml names it"):
        content = path.read_bytes()
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(_LINE_END, 0, error.start) + 1
        raise StepError(f"{path}, line {line}: is not {encoding}; set `encoding: latin-1`, or convert it") from None
    if encoding != "utf-8":
        content = text.encode()
    separator = table["separator"].encode()
    first = 2 if table["header"] else 1
    lines = io.BytesIO(content)  # which copies nothing
    if not [lines.readline().strip() for _ in range(first)][-1]:
        raise StepError(f"{path} has no rows")
    if len(separator) > 1:
        content = content.replace(separator, _FIELD)
        separator = _FIELD
    return content, separator, first


def _check_first_line(content: bytes, separator: bytes, table: dict[str, Any], path: Path) -> None:
    """Raise StepError if the first line shows that `header` is wrong, or `columns` in another order than the file."""
    line = io.BytesIO(content).readline().decode().lstrip("\ufeff").strip()
    fields = [field.strip() for field in next(csv.reader([line], delimiter=separator.decode()), [])]
    names, columns = [_plain(field) for field in fields], [_plain(name) for name in table["columns"]]
    if not table["header"]:
        if len(names) > 1 and names == columns:
            raise StepError(f"{path}, line 1: holds the names of the columns; set `header: true`")
        return
    if fields and all(_is_number(field) for field in fields):
        raise StepError(f"{path}, line 1: holds numbers alone, where `header: true` says names; set `header: false`")
    for place, (name, column) in enumerate(zip(names, columns, strict=False)):
        if name != column and name in columns:
            raise StepError(
                f"{path}, line 1: field {place + 1} is {fields[place]}, where `columns` has "
                f"{table['columns'][place]}; list the columns in the file's order"
            )


def _plain(name: str) -> str:
    """A column's name without case, blanks, and a last `id`: user_id, userId and User are one."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return letters.removesuffix("id") or letters


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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


def _as_ids(texts: pl.Series) -> pl.Series:
    numbers = texts.cast(pl.Int64, strict=False)
    whole = numbers.null_count() == texts.null_count() and (numbers.cast(pl.String) == texts).all()
    return numbers if whole else texts


def _malformed_lines(content: bytes, separator: bytes, fields: int, first: int, path: Path) -> list[int]:
    """Lines from `first` on that do not have `fields` fields, split by the one byte `separator`.

    For a good file one comparison of all separators and line ends is enough (0.03 s for MovieLens-1M). Only a bad file
    is read line by line.
    """
    if separator == b"," and b'"' in content:
        return _malformed_records(content.decode(), fields, first, path)
    text = np.frombuffer(content if content.endswith(b"\n") else content + b"\n", dtype=np.uint8)
    marks = text[(text == separator[0]) | (text == _LINE_END[0])]
    pattern = np.frombuffer(separator * (fields - 1) + _LINE_END, dtype=np.uint8)
    if len(marks) % fields == 0 and (marks.reshape(-1, fields) == pattern).all():
        return []
    lines = content.removesuffix(_LINE_END).split(_LINE_END)
    return [number for number, line in enumerate(lines, 1) if number >= first and line.count(separator) != fields - 1]


def _malformed_records(text: str, fields: int, first: int, path: Path) -> list[int]:
    """The same where fields may be in quotes, which may hold separators and line ends.

    Raises StepError for a quote that is not closed.
    """
    reader, found, begin = csv.reader(io.StringIO(text, newline=""), strict=True), [], 1
    try:
        for number, record in enumerate(reader, 1):
            if number >= first and len(record) != fields:
                found.append(begin)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise StepError(f"{path}, line {begin}: {error}; close the quote, and double quotes within quotes") from None
    return found

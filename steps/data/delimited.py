"""Delimited text, block by block: the first line is held against the entry, and every line's fields are counted."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from steps.common.cli import StepError
from steps.data.blocks import COLUMNS, SHOWN, Block, wanted_columns
from steps.data.records import LINE_END, QUOTE, as_utf8, count, outside, records

_FIELD = b"\x1f"  # ASCII's unit separator, which replaces separators of several characters
_DATE = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")


def text_blocks(path: Path, table: Mapping[str, Any], block_bytes: int) -> Iterator[Callable[[], Block]]:
    separator = table["separator"].encode()
    quoted = table.get("quotes", separator == b",")
    places: dict[str, int] = {}
    num_fields, line = 0, 1
    for content in records(path, block_bytes, QUOTE if quoted else None):
        content = as_utf8(content, table.get("encoding", "utf-8"), path, line)
        first = line
        if line == 1:
            places, num_fields = _places(content, separator, table, path, quoted)
            if table["header"]:
                content = content.partition(LINE_END)[2]
                first = 2
            if not content:
                line = first
                continue
        num_lines = count(content, LINE_END)
        yield partial(_parsed, content, num_lines, separator, places, num_fields, first, path, quoted)
        line = first + num_lines


def _places(
    content: bytes, separator: bytes, table: Mapping[str, Any], path: Path, quoted: bool
) -> tuple[dict[str, int], int]:
    """The place, from 0, of every column that is read, and the number of fields; the first line has to agree.

    Raises StepError if it shows that `header` or `separator` is wrong, or `columns` in another order than the file.
    """
    if table["header"]:
        content = content.partition(LINE_END)[0]
    fields = _first_fields(content, separator, quoted)
    columns, names = table["columns"], [_plain(field) for field in fields]
    where = f"{path}, line 1"
    shown = ", ".join(fields)[:SHOWN]
    if table["header"] and quoted and content.count(QUOTE) % 2:
        raise StepError(f"{where}: a quote is not closed; names stand in one line")
    if isinstance(columns, dict):
        places = _mapped_places(columns, fields, table["header"], where)
        if table["header"]:
            _check_names(places, fields, where)
        return places, len(fields)
    ours = [_plain(name) for name in columns]
    if not table["header"] and len(names) > 1 and names == ours:
        raise StepError(f"{where}: holds the names of the columns; set `header: true`")
    if len(fields) != len(columns) and len(columns) > 1:
        raise StepError(
            f"{where}: has {len(fields)} fields where `columns` has {len(columns)} ({shown}); "
            f"list every column, in the file's order, and see that `separator: {_shown(table['separator'])}` is right"
        )
    for place, (name, ours_there) in enumerate(zip(names, ours, strict=True) if table["header"] else []):
        if name != ours_there and name in ours:
            raise StepError(
                f"{where}: field {place + 1} is {fields[place]}, where `columns` has {columns[place]}; "
                "list the columns in the file's order"
            )
    wanted = wanted_columns(table)
    places = {name: place for place, name in enumerate(columns) if name in wanted}
    if table["header"]:
        _check_names(places, fields, where)
    return places, len(columns)


def _check_names(places: Mapping[str, int], fields: list[str], where: str) -> None:
    """Raise StepError if the first line has a number or a date as a name: it is a row."""
    for name in [name for name in COLUMNS[:-1] if name in places]:
        field = fields[places[name]]
        if _is_number(field) or _DATE.match(field):
            raise StepError(f"{where}: {name} is {field}, where `header: true` says names; set `header: false`")


def _mapped_places(columns: Mapping[str, str | int], fields: list[str], header: bool, where: str) -> dict[str, int]:
    """The places of columns that an entry gives by the file's name, or by place from 1."""
    places = {}
    for name, there in columns.items():
        if isinstance(there, int):
            if there > len(fields):
                raise StepError(f"{where}: has {len(fields)} fields; `columns` takes {name} from field {there}")
            places[name] = there - 1
            continue
        if not header:
            raise StepError(f"{where}: `header: false` has no names, so `columns` gives places from 1, not {there!r}")
        if fields.count(there) != 1:
            times = "twice or more" if there in fields else "not"
            known = ", ".join(fields)[:SHOWN]
            raise StepError(f"{where}: has the column {there!r} {times}; it has {known}; correct `columns`")
        places[name] = fields.index(there)
    return places


def _first_fields(content: bytes, separator: bytes, quoted: bool) -> list[str]:
    given, one = separator.decode(), (separator if len(separator) == 1 else _FIELD).decode()
    lines = (line.decode().replace(given, one) for line in io.BytesIO(content))
    reader = csv.reader(lines, delimiter=one, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    return [field.strip() for field in next(reader, [])]


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


def _shown(separator: str) -> str:
    return repr(separator)[1:-1] if separator.isspace() else separator


def _parsed(
    content: bytes,
    num_lines: int,
    separator: bytes,
    places: dict[str, int],
    num_fields: int,
    first: int,
    path: Path,
    quoted: bool,
) -> Block:
    """The rows of whole lines, of which `first` is the number of the first in the file."""
    given = separator
    if len(separator) > 1:
        if _FIELD in content:
            line = first + content.count(LINE_END, 0, content.index(_FIELD))
            raise StepError(f"{path}, line {line}: has the control character 1F, which stands for separators here")
        content = content.replace(separator, _FIELD)
        separator = _FIELD
    quoted = quoted and QUOTE in content
    if not quoted:
        frame = _frame(content, separator, places, num_fields, quoted)
        # Every line has its last field, and all lines together no separator too many: each has as many as it should.
        if (
            frame is not None
            and len(frame) == num_lines
            and not frame[str(num_fields - 1)].null_count()
            and count(content, separator) == num_lines * (num_fields - 1)
        ):
            return Block(_named(frame, places, pl.int_range(first, first + num_lines, eager=True)), [])
    block = _parsed_by_line(content, separator, places, num_fields, first, path, quoted)
    if quoted and given != separator:  # which stood within quotes too
        whole = pl.col(pl.String).str.replace_all(separator.decode(), given.decode(), literal=True)
        return Block(block.frame.with_columns(whole), block.malformed)
    return block


def _parsed_by_line(
    content: bytes, separator: bytes, places: dict[str, int], num_fields: int, first: int, path: Path, quoted: bool
) -> Block:
    """The same where lines may have a wrong number of fields, or quotes: fields of each line are counted."""
    text = np.frombuffer(content, dtype=np.uint8)
    marks, all_ends = np.flatnonzero(text == separator[0]), np.flatnonzero(text == LINE_END[0])
    ends = all_ends
    if quoted:
        quotes = np.flatnonzero(text == QUOTE[0])
        _check_quotes(text, quotes, separator, first, path)
        marks, ends = marks[outside(marks, quotes)], ends[outside(ends, quotes)]
    fields = np.diff(np.searchsorted(marks, ends), prepend=0) + 1
    begins = np.concatenate([[0], ends[:-1] + 1])
    lines = first + np.searchsorted(all_ends, begins)
    wrong = fields != num_fields
    if wrong.any():
        kept = [content[begin : end + 1] for begin, end in zip(begins[~wrong], ends[~wrong], strict=True)]
        content, lines, malformed = b"".join(kept), lines[~wrong], lines[wrong].tolist()
    else:
        malformed = []
    frame = _frame(content, separator, places, num_fields, quoted) if content else None
    if frame is None:
        empty = dict.fromkeys(sorted({*places.values(), num_fields - 1}), pl.String)
        frame = pl.DataFrame(schema={str(place): kind for place, kind in empty.items()})
    if len(frame) != len(lines):
        raise StepError(f"{path}: {len(lines)} rows from line {first} on were read as {len(frame)}; correct the quotes")
    return Block(_named(frame, places, pl.Series(lines)), malformed)


def _check_quotes(text: np.ndarray, quotes: np.ndarray, separator: bytes, first: int, path: Path) -> None:
    """Raise StepError unless quotes open at the begin of a field and close at its end, or are doubled within quotes."""
    outside = np.array([separator[0], LINE_END[0]], dtype=np.uint8)
    opening, closing = quotes[::2], quotes[1::2]
    before = text[np.maximum(opening - 1, 0)]
    doubled = np.zeros(len(opening), dtype=bool)
    doubled[1:] = opening[1:] == closing[: len(opening) - 1] + 1
    wrong = opening[~(np.isin(before, outside) | (opening == 0) | doubled)]
    after = text[np.minimum(closing + 1, len(text) - 1)]
    wrong = np.concatenate([wrong, closing[~(np.isin(after, outside) | (after == QUOTE[0]))]])
    if len(wrong):
        line = first + int(np.count_nonzero(text[: wrong.min()] == LINE_END[0]))
        raise StepError(
            f"{path}, line {line}: a quote within a field; put the field in quotes and double the quote, or set "
            "`quotes: false`"
        )
    if len(quotes) % 2:
        line = first + int(np.count_nonzero(text[: quotes[-1]] == LINE_END[0]))
        raise StepError(f"{path}, line {line}: a quote is not closed; close it, and double quotes within quotes")


def _frame(
    content: bytes, separator: bytes, places: dict[str, int], num_fields: int, quoted: bool
) -> pl.DataFrame | None:
    """The fields that are read, and the last, by place; None where the lines do not have as many fields."""
    names = [str(place) for place in range(num_fields)]
    read = sorted({*places.values(), num_fields - 1})
    try:
        return pl.read_csv(
            content,
            schema=dict.fromkeys(names, pl.String),
            columns=read,
            separator=separator.decode(),
            has_header=False,
            quote_char='"' if quoted else None,
            null_values="" if quoted else None,
            truncate_ragged_lines=True,
        )
    except pl.exceptions.PolarsError:
        return None


def _named(frame: pl.DataFrame, places: dict[str, int], rows: pl.Series) -> pl.DataFrame:
    columns = [frame[str(place)].alias(name) for name, place in places.items()]
    return pl.DataFrame([rows.cast(pl.UInt32).alias("row"), *columns])

"""Raw tables, block by block, as texts with the row of each: delimited text, JSON lines and Parquet.

A block is small, so that a file of any size is read in little memory. What a file may hold of it is checked here: its
encoding, its first line, and the number of fields of every line. What the values mean is checked later.
"""

import csv
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import polars as pl

from steps.common.cli import StepError
from steps.common.files import reading

T = TypeVar("T")

#: The columns that are more than features, in the order of typed tables.
COLUMNS = ("user", "item", "rating", "timestamp", "title")
#: Bytes of text that are parsed at once, and rows of Parquet.
BLOCK_BYTES, BLOCK_ROWS = 1 << 24, 1 << 20
_THREADS = 2
_TEXTS = (pl.Binary, pl.Categorical, pl.Enum)  # types of Parquet's columns that hold texts too
_FIELD = b"\x1f"  # ASCII's unit separator, which replaces separators of several characters
_LINE_END = b"\n"
_QUOTE = b'"'
_MARK = b"\xef\xbb\xbf"  # which some programs put at the begin of a file in UTF-8
_NO_TEXT = {
    b"\x1f\x8b": "packed by gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"PK\3\4": "a zip archive",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_LONGEST_RECORD = 1 << 26  # bytes; beyond it a quote was not closed
_SHOWN = 120  # characters of a header that a message repeats
_DATE = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
#: JSON's escape of the first half of a character, without its second, which polars reads as another character.
_HALF_CHARACTER = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")


@dataclass(frozen=True)
class Block:
    """Rows of a table.

    frame: `row` (UInt32, the line in the file, or the row of a Parquet file, from 1) and a column for each name that
    the table's entry gives; texts as they are in the file (null where a field is empty), or Parquet's own values.
    malformed: lines with a wrong number of fields, which the frame does not have.
    """

    frame: pl.DataFrame
    malformed: list[int]


def named_columns(table: Mapping[str, Any]) -> dict[str, str | int | None]:
    """What the entry of a table calls its columns: by our name, the file's name or place from 1; None for a place that
    the order of the list gives."""
    columns = table["columns"]
    return dict(columns) if isinstance(columns, dict) else dict.fromkeys(columns)


def wanted_columns(table: Mapping[str, Any]) -> list[str]:
    """The columns of a table that are read: those with a meaning of their own, and its features."""
    return [name for name in named_columns(table) if name in (*COLUMNS, *table.get("features", {}))]


def read_blocks(
    folder: Path, table: Mapping[str, Any], then: Callable[[Block], T], block_bytes: int = BLOCK_BYTES
) -> Iterator[T]:
    """What `then` makes of the blocks of a file, in the file's order.

    folder, table: the file, and an entry `files.<table>` of params/datasets.yaml that describes it. Two threads parse,
    and call `then`. Raises StepError with file and line if the file cannot be read, or is not what the entry says.
    """
    path = folder / table["path"]
    kind = table.get("format", "text")
    blocks = {"text": _text_blocks, "jsonl": _json_blocks, "parquet": _parquet_blocks}[kind](path, table, block_bytes)
    empty = True
    waiting: deque[Future[T]] = deque()
    with reading(path, "params/datasets.yaml names it"), ThreadPoolExecutor(_THREADS) as threads:
        try:
            for parse in blocks:
                empty = False
                waiting.append(threads.submit(lambda parse=parse: then(parse())))  # type: ignore[misc]
                if len(waiting) > _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except StepError:
            for earlier in waiting:  # what is wrong in a block before is said first
                earlier.result()
            raise
        except pl.exceptions.PanicException as error:  # of damaged Parquet; it is no Exception
            raise StepError(f"{path} is damaged ({error}); fetch it again") from error
    if empty:
        raise StepError(f"{path} has no rows")


def read_table(folder: Path, table: Mapping[str, Any]) -> Block:
    """All rows of a table at once: of an items or a users file, which are small."""
    blocks = list(read_blocks(folder, table, lambda block: block))
    malformed = [line for block in blocks for line in block.malformed]
    return Block(pl.concat([block.frame for block in blocks], how="vertical"), malformed)


# Delimited text


def _text_blocks(path: Path, table: Mapping[str, Any], block_bytes: int) -> Iterator[Callable[[], Block]]:
    separator = table["separator"].encode()
    quoted = table.get("quotes", separator == b",")
    places: dict[str, int] = {}
    num_fields, line = 0, 1
    for content in _records(path, block_bytes, _QUOTE if quoted else None):
        content = _as_utf8(content, table.get("encoding", "utf-8"), path, line)
        first = line
        if line == 1:
            places, num_fields = _places(content, separator, table, path, quoted)
            if table["header"]:
                content = content.partition(_LINE_END)[2]
                first = 2
            if not content:
                line = first
                continue
        num_lines = _count(content, _LINE_END)
        yield partial(_parsed, content, num_lines, separator, places, num_fields, first, path, quoted)
        line = first + num_lines


def _records(path: Path, block_bytes: int, quote: bytes | None) -> Iterator[bytes]:
    """Parts of a file that end with a line, which no quotes span; empty lines at the file's end are left out."""
    rest = b""
    with path.open("rb") as file:
        _check_text(file, path)
        while chunk := _read(file, block_bytes, path):
            content = rest + chunk
            end = _last_end(content, quote)
            rest = content[end:]
            if end:
                yield content[:end]
            if len(rest) > _LONGEST_RECORD:
                what = "a quote is not closed" if quote and quote in rest else "the line is longer than 64 MB"
                line = _line_at(path, file.tell()) - rest.count(_LINE_END)
                raise StepError(f"{path}, line {line}: {what}; correct the file")
    if rest.strip(b" \t\n"):
        yield rest + _LINE_END


def _check_text(file: BinaryIO, path: Path) -> None:
    """Raise StepError if a file begins as files of another kind do."""
    begin = file.read(4)
    file.seek(0)
    for mark, kind in _NO_TEXT.items():
        if begin.startswith(mark):
            raise StepError(f"{path} is {kind}, where its entry says text; convert it, or correct `path` or `format`")


def _read(file: BinaryIO, size: int, path: Path) -> bytes:
    """The next bytes of a file, with line ends that are one byte."""
    chunk = file.read(size)
    if b"\r" not in chunk:
        return chunk
    if chunk.endswith(b"\r"):
        chunk += file.read(1)
    start = file.tell() - len(chunk)
    chunk = chunk.replace(b"\r\n", _LINE_END)
    if b"\r" in chunk:
        line = _line_at(path, start) + chunk.count(_LINE_END, 0, chunk.index(b"\r"))
        raise StepError(f"{path}, line {line}: has a carriage return alone; end lines with \\n or \\r\\n")
    return chunk


def _line_at(path: Path, position: int) -> int:
    """The number of the line that has the byte at `position`, for a message."""
    line = 1
    with path.open("rb") as file:
        while position > 0 and (chunk := file.read(min(position, BLOCK_BYTES))):
            line += chunk.count(_LINE_END)
            position -= len(chunk)
    return line


def _count(content: bytes, byte: bytes) -> int:
    """As `content.count(byte)`, four times as fast where there are many."""
    return int(np.count_nonzero(np.frombuffer(content, dtype=np.uint8) == byte[0]))


def _last_end(content: bytes, quote: bytes | None) -> int:
    """Where the last line with values ends that no quotes span; 0 if there is none. Empty lines behind it are not part
    of it: they may be the file's last."""
    if quote is None or quote not in content:
        end = content.rfind(_LINE_END) + 1
        if content[max(end - 2, 0) : end].strip():  # the usual case, without a copy
            return end
        last = len(content[:end].rstrip(b" \t\n"))
        return content.find(_LINE_END, last) + 1 if last else 0
    text = np.frombuffer(content, dtype=np.uint8)
    ends = np.flatnonzero(text == _LINE_END[0])
    ends = ends[_outside(ends, np.flatnonzero(text == quote[0]))]
    last = len(content[: ends[-1] + 1].rstrip(b" \t\n")) if len(ends) else 0
    return int(ends[np.searchsorted(ends, last)]) + 1 if last else 0


def _outside(positions: np.ndarray, quotes: np.ndarray) -> np.ndarray:
    """Which positions are not within quotes: an even number of quotes is before them."""
    outside: np.ndarray = np.searchsorted(quotes, positions) % 2 == 0
    return outside


def _as_utf8(content: bytes, encoding: str, path: Path, line: int) -> bytes:
    """Lines, of which `line` is the number of the first, in UTF-8 and without a mark of it."""
    if b"\0" in content:
        line += content.count(_LINE_END, 0, content.index(b"\0"))
        raise StepError(
            f"{path}, line {line}: has a NUL byte, as damaged files have, and UTF-16; correct or convert it"
        )
    if content.isascii():
        return content
    if line == 1 and encoding == "utf-8":
        content = content.removeprefix(_MARK)
    marked = content.find(_LINE_END + _MARK) + 1
    if marked or content.startswith(_MARK):  # polars leaves it out where a block begins with it
        line += content.count(_LINE_END, 0, marked)
        raise StepError(f"{path}, line {line}: begins with a mark of utf-8; remove it, or set `encoding: utf-8`")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line += content.count(_LINE_END, 0, error.start)
        other = "`encoding: latin-1`, or convert it" if encoding == "utf-8" else "`encoding: utf-8`"
        raise StepError(f"{path}, line {line}: is not {encoding}; set {other}") from None
    return content if encoding == "utf-8" else text.encode()


def _places(
    content: bytes, separator: bytes, table: Mapping[str, Any], path: Path, quoted: bool
) -> tuple[dict[str, int], int]:
    """The place, from 0, of every column that is read, and the number of fields; the first line has to agree.

    Raises StepError if it shows that `header` or `separator` is wrong, or `columns` in another order than the file.
    """
    if table["header"]:
        content = content.partition(_LINE_END)[0]
    fields = _first_fields(content, separator, quoted)
    columns, names = table["columns"], [_plain(field) for field in fields]
    where = f"{path}, line 1"
    shown = ", ".join(fields)[:_SHOWN]
    if table["header"] and quoted and content.count(_QUOTE) % 2:
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
            known = ", ".join(fields)[:_SHOWN]
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
            line = first + content.count(_LINE_END, 0, content.index(_FIELD))
            raise StepError(f"{path}, line {line}: has the control character 1F, which stands for separators here")
        content = content.replace(separator, _FIELD)
        separator = _FIELD
    quoted = quoted and _QUOTE in content
    if not quoted:
        frame = _frame(content, separator, places, num_fields, quoted)
        # Every line has its last field, and all lines together no separator too many: each has as many as it should.
        if (
            frame is not None
            and len(frame) == num_lines
            and not frame[str(num_fields - 1)].null_count()
            and _count(content, separator) == num_lines * (num_fields - 1)
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
    marks, all_ends = np.flatnonzero(text == separator[0]), np.flatnonzero(text == _LINE_END[0])
    ends = all_ends
    if quoted:
        quotes = np.flatnonzero(text == _QUOTE[0])
        _check_quotes(text, quotes, separator, first, path)
        marks, ends = marks[_outside(marks, quotes)], ends[_outside(ends, quotes)]
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
    outside = np.array([separator[0], _LINE_END[0]], dtype=np.uint8)
    opening, closing = quotes[::2], quotes[1::2]
    before = text[np.maximum(opening - 1, 0)]
    doubled = np.zeros(len(opening), dtype=bool)
    doubled[1:] = opening[1:] == closing[: len(opening) - 1] + 1
    wrong = opening[~(np.isin(before, outside) | (opening == 0) | doubled)]
    after = text[np.minimum(closing + 1, len(text) - 1)]
    wrong = np.concatenate([wrong, closing[~(np.isin(after, outside) | (after == _QUOTE[0]))]])
    if len(wrong):
        line = first + int(np.count_nonzero(text[: wrong.min()] == _LINE_END[0]))
        raise StepError(
            f"{path}, line {line}: a quote within a field; put the field in quotes and double the quote, or set "
            "`quotes: false`"
        )
    if len(quotes) % 2:
        line = first + int(np.count_nonzero(text[: quotes[-1]] == _LINE_END[0]))
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


# JSON lines and Parquet


def _json_blocks(path: Path, table: Mapping[str, Any], block_bytes: int) -> Iterator[Callable[[], Block]]:
    columns = named_columns(table)
    keys = {name: str(there or name) for name, there in columns.items() if name in wanted_columns(table)}
    line = 1
    for content in _records(path, block_bytes, quote=None):
        content = _as_utf8(content, "utf-8", path, line)
        num_lines = _count(content, _LINE_END)
        yield partial(_parsed_json, content, num_lines, keys, line, path)
        line += num_lines


def _parsed_json(content: bytes, num_lines: int, keys: dict[str, str], first: int, path: Path) -> Block:
    try:
        frame = pl.read_ndjson(content, schema=dict.fromkeys(keys.values(), pl.String))
    except pl.exceptions.PolarsError:
        frame = pl.DataFrame()
    if len(frame) != num_lines or _HALF_CHARACTER.search(content):
        _check_json(content, path, first)
    if len(frame) != num_lines:
        raise StepError(f"{path}: lines from {first} on cannot be read as JSON; write one object a line")
    if first == 1:
        _check_keys(content, keys, path)
    rows = pl.int_range(first, first + num_lines, eager=True).cast(pl.UInt32).alias("row")
    return Block(_present([rows, *(frame[key].alias(name) for name, key in keys.items())]), [])


def _present(columns: list[pl.Series]) -> pl.DataFrame:
    """A frame of the columns, in which empty texts are missing."""
    return pl.DataFrame(columns).with_columns(pl.when(pl.col(pl.String) != "").then(pl.col(pl.String)))


def _check_json(content: bytes, path: Path, first: int) -> None:
    """Raise StepError that names the first line which is no JSON object, or has half a character."""
    for line, text in enumerate(content.decode().split("\n")[:-1], first):
        try:
            found = json.loads(text)
            json.dumps(found, ensure_ascii=False).encode()
            if isinstance(found, dict) and len(pl.read_ndjson(text.encode(), schema={"": pl.String})) == 1:
                continue
            problem = "is no JSON object"
        except (ValueError, pl.exceptions.PolarsError) as error:
            problem = "is empty" if not text.strip() else f"is not JSON ({error})"
        raise StepError(f"{path}, line {line}: {problem}; write one object a line")


def _check_keys(content: bytes, keys: dict[str, str], path: Path) -> None:
    """A key that the first object lacks is misspelt in the entry, rather than missing in every line."""
    there = json.loads(content.partition(_LINE_END)[0])
    for name, key in keys.items():
        if key not in there:
            known = ", ".join(there)[:_SHOWN]
            raise StepError(f"{path}, line 1: has no key {key!r}, from which `columns` takes {name}; it has {known}")


def _parquet_blocks(path: Path, table: Mapping[str, Any], block_bytes: int) -> Iterator[Callable[[], Block]]:
    columns = named_columns(table)
    wanted = {name: str(there or name) for name, there in columns.items() if name in wanted_columns(table)}
    with reading(path, "is it a Parquet file?"):
        schema = pl.read_parquet_schema(path)
    for name, there in wanted.items():
        if there not in schema:
            known = ", ".join(schema)[:_SHOWN]
            raise StepError(f"{path} has no column {there!r}, from which `columns` takes {name}; it has {known}")
        if schema[there].is_nested():
            raise StepError(f"{path}: column {there!r} is {schema[there]}; a column has one value a row")
    num_rows = int(pl.scan_parquet(path).select(pl.len()).collect().item())
    texts = {there for there, kind in schema.items() if kind in _TEXTS}
    for start in range(0, num_rows, BLOCK_ROWS):
        yield partial(_parsed_parquet, path, wanted, texts, start)


def _parsed_parquet(path: Path, wanted: dict[str, str], texts: set[str], start: int) -> Block:
    selected = pl.scan_parquet(path).select(
        (pl.col(there).cast(pl.String) if there in texts else pl.col(there)).alias(name)
        for name, there in wanted.items()
    )
    frame = selected.slice(start, BLOCK_ROWS).collect()
    rows = pl.int_range(start + 1, start + 1 + len(frame), eager=True).cast(pl.UInt32).alias("row")
    return Block(_present([rows, *frame.get_columns()]), [])

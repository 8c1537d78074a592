"""How a table is written: its format, separator, quotes, first line and encoding, from its first rows."""

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import polars as pl

from steps.common.cli import StepError
from steps.common.files import reading
from steps.data.description.column_names import listed, role_of
from steps.data.description.inference import Doubt
from steps.data.description.opening import Raw, check_text, encoding_of, is_parquet
from steps.data.readers import read_blocks

_SEPARATORS = ("::", "\t", ";", ",", "|", " ")  # of those that part all lines alike the first counts
_LINES = 200  # that are looked at for the form
_SAMPLE_BYTES, _SAMPLE_ROWS = 1 << 18, 20_000  # a reader reads three blocks ahead, of what `opening.HEAD` has
_UNIT = "\x1f"  # a separator of one character, in place of one of several
_MANY = 6  # columns; beyond it an entry names those that it reads, rather than all
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_OWN = {"row", "user", "item", "rating", "timestamp", "title"}


@dataclass
class Form:
    """settings: keys of the table's entry, but for its path and columns. names: of its columns, if the file has them.
    sample: first rows, columns "1", "2", ... by place, without those that hold several values a row."""

    settings: dict[str, Any]
    names: list[str] | None
    sample: pl.DataFrame
    num_columns: int
    doubts: list[Doubt] = field(default_factory=list)

    @property
    def is_text(self) -> bool:
        return "format" not in self.settings


def form_of(raw: Raw) -> Form:
    """The form of a file. Raises StepError if it has none that an entry can describe."""
    head = raw.head()
    if is_parquet(head):
        return _parquet(raw)
    check_text(raw, head)
    if not head.strip():
        raise StepError(f"{raw.shown} has no rows")
    encoding, line = encoding_of(raw)
    text = head.decode(encoding, errors="replace").removeprefix("\ufeff").replace("\r\n", "\n")
    if "\r" in text:
        line = text.count("\n", 0, text.index("\r")) + 1
        raise StepError(f"{raw.shown}, line {line}: has a carriage return alone; end lines with \\n or \\r\\n")
    if text.lstrip().startswith("["):
        raise StepError(f"{raw.shown} is one JSON array; write one object a line: jq -c '.[]' OLD > NEW.jsonl")
    if text.lstrip().startswith("{"):
        if encoding != "utf-8":
            raise StepError(f"{raw.shown}, line {line}: is not UTF-8; convert it: iconv -f LATIN1 -t UTF-8 OLD > NEW")
        return _json(raw, text)
    form = _delimited(raw, text, encoding)
    if encoding != "utf-8":
        form.doubts.append(not_utf8(line, text))
    return form


def not_utf8(line: int, text: str) -> Doubt:
    """A doubt about the encoding. text: some of the file's, read as latin-1."""
    other = "; if it is windows-1252, convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
    more = other if re.search("[\x80-\x9f]", text) else ""
    return Doubt("encoding", f"line {line} is not UTF-8, and so the file is taken for latin-1{more}")


def _delimited(raw: Raw, text: str, encoding: str) -> Form:
    lines = text.split("\n")[:_LINES]
    lines = lines[:-1] if len(lines) > 1 else lines
    separator, quoted = _separator(raw, [line for line in lines if line.strip()])
    rows = _fields(lines, separator, quoted)
    names = [name.strip() for name in rows[0]]
    usual = Counter(map(len, rows)).most_common(1)[0][0]
    if len(names) != usual:
        raise StepError(
            f"{raw.shown}, line 1: has {len(names)} fields where most lines have {usual}; remove or correct it"
        )
    if any("\n" in name for name in names):
        raise StepError(f"{raw.shown}, line 1: a column's name spans lines; write it on one")
    header, doubts = _header(names, [row for row in rows[1:] if len(row) == len(names)])
    settings: dict[str, Any] = {"separator": separator, "header": header}
    if '"' in text and quoted != (separator == ","):
        settings["quotes"] = quoted
    if encoding != "utf-8":
        settings["encoding"] = encoding
    columns = {str(place): place for place in range(1, len(names) + 1)}
    try:
        sample = _sample(raw, settings, columns)
    except StepError:
        if '"' not in text:
            raise
        other = with_other_quotes(settings)
        with suppress(StepError):
            sample = _sample(raw, other, columns, strict=True)
            return Form(other, names if header else None, sample, len(names), doubts)
        raise
    return Form(settings, names if header else None, sample, len(names), doubts)


def with_other_quotes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same where a quote means the opposite: a field's begin or end, or a sign like any other."""
    return {**settings, "quotes": not settings.get("quotes", settings["separator"] == ",")}


def _separator(raw: Raw, lines: list[str]) -> tuple[str, bool]:
    """What parts most lines into as many fields, more than one, and whether fields are in quotes."""
    best: tuple[float, str, bool] = (0.0, "", False)
    for separator in _SEPARATORS:
        quoted = separator == "," if '"' not in "".join(lines) else _has_quotes(lines, separator)
        counts = Counter(len(row) for row in _fields(lines, separator, quoted))
        common, times = counts.most_common(1)[0]
        share = times / counts.total()
        if common > 1 and share > best[0]:
            best = (share, separator, quoted)
    if not best[1]:
        raise StepError(
            f"{raw.shown}, line 1: none of `,` `;` `|` `::`, tab and blank parts the lines into columns alike; write "
            "the file as CSV"
        )
    return best[1:]


def _has_quotes(lines: Sequence[str], separator: str) -> bool:
    return any(re.search(rf'(?:^|{re.escape(separator)})"', line) for line in lines)


def _fields(lines: Sequence[str], separator: str, quoted: bool) -> list[list[str]]:
    if not quoted:
        return [line.split(separator) for line in lines]
    if len(separator) > 1:
        lines, separator = [line.replace(separator, _UNIT) for line in lines], _UNIT
    return list(csv.reader([f"{line}\n" for line in lines], delimiter=separator)) or [[""]]


def _header(names: list[str], rows: list[list[str]]) -> tuple[bool, list[Doubt]]:
    """Whether the first line has the names of the columns: it has known ones, or words where all others have numbers or
    times."""
    known = {role_of(name) for name in names} - {None}
    numbers = [_is_value(name) for name in names]
    if all(numbers):
        return False, []
    columns = [[row[place] for row in rows] for place in range(len(names))]
    told = [place for place, values in enumerate(columns) if values and all(map(_is_value, filter(None, values)))]
    words = [place for place in told if any(columns[place]) and not numbers[place]]
    first = listed(names)
    if any(numbers[place] for place in told):
        return False, []
    if len(known) >= 2 or (known and words):
        return True, []
    if words:
        text = f"line 1 ({first}) has words where others have numbers, and so is taken for names, though none is known"
        return True, [Doubt("header", text)]
    if known:
        return True, [Doubt("header", f"line 1 ({first}) is taken for names; of these but one is known")]
    return False, [Doubt("header", f"line 1 ({first}) is taken for a row, though it could have names: all are texts")]


def _is_value(text: str) -> bool:
    """Whether a text is a number or a time, and so no name."""
    text = text.strip()
    if not re.match(r"[-+.\d]", text):
        return False
    for read in (float, datetime.fromisoformat):
        with suppress(ValueError):
            read(text)
            return True
    return False


def _json(raw: Raw, text: str) -> Form:
    with raw.named(), reading(raw.local, "write one object a line"):
        try:
            first = json.loads(text.lstrip().partition("\n")[0])
        except ValueError as error:
            message = f"{raw.local}, line 1: is not JSON ({error}); write one object a line: jq -c . OLD > NEW.jsonl"
            raise StepError(message) from error
    names = list(first)
    nested = {name for name, value in first.items() if isinstance(value, list | dict)}
    keys = {str(place): name for place, name in enumerate(names, 1) if name and name not in nested}
    sample = _sample(raw, {"format": "jsonl"}, keys)
    return Form({"format": "jsonl"}, names, sample, len(names))


def _parquet(raw: Raw) -> Form:
    with raw.named(), reading(raw.local, "write it again"):
        schema = pl.read_parquet_schema(raw.local)
        usable = {
            str(place): name
            for place, (name, kind) in enumerate(schema.items(), 1)
            if name and not kind.is_nested() and kind != pl.Binary
        }
        rows = pl.scan_parquet(raw.local).head(_SAMPLE_ROWS)
        sample = rows.select(pl.col(name).alias(place) for place, name in usable.items()).collect()
    if not len(sample):
        raise StepError(f"{raw.shown} has no rows")
    return Form({"format": "parquet"}, list(schema), sample, len(schema))


def _sample(raw: Raw, settings: Mapping[str, Any], columns: Mapping[str, Any], strict: bool = False) -> pl.DataFrame:
    """The first rows, as validate will read them: all columns are taken for features. strict: none is malformed."""
    table = {**settings, "columns": dict(columns), "features": dict.fromkeys(columns, "category")}
    with raw.named():
        first = next(read_blocks(*raw.read_as(table), lambda block: block, _SAMPLE_BYTES))
    if strict and first.malformed:
        raise StepError(f"{raw.shown}, line {first.malformed[0]}: not as many fields as line 1 has")
    return first.frame.drop("row")


def columns_setting(form: Form, places: Mapping[str, int], usual: Sequence[str]) -> list[str] | dict[str, str | int]:
    """What an entry says of columns: all of them, in order, where those with a meaning come first, in the usual order;
    else those with a meaning, by the file's names or by place."""
    roles = sorted(places, key=lambda role: (usual.index(role) if role in usual else len(usual), places[role]))
    names = form.names
    if not form.is_text:
        assert names is not None  # noqa: S101
        given: dict[str, str | int] = {role: names[places[role] - 1] for role in roles}
        return roles if all(role == name for role, name in given.items()) else given
    rest = range(len(roles) + 1, form.num_columns + 1)
    others = [names[place - 1] if names else f"field{place}" for place in rest]
    plain = [_plain(name) for name in others]
    fits = all(map(_PLAIN.fullmatch, others)) and not {*plain} & _OWN and len({*plain}) == len(plain)
    if [places[role] for role in roles] == list(range(1, len(roles) + 1)) and form.num_columns <= _MANY and fits:
        columns = [*roles, *others]
        if names is None or _agree(columns, names):
            return columns
    if names and all(names.count(names[place - 1]) == 1 and names[place - 1] for place in places.values()):
        return {role: names[places[role] - 1] for role in roles}
    return {role: places[role] for role in roles}


def _plain(name: str) -> str:
    """A column's name as readers compare it."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return letters.removesuffix("id") or letters


def _agree(columns: Sequence[str], names: Sequence[str]) -> bool:
    """Whether no name of the file is one that the list has at another place, which a reader refuses."""
    ours, theirs = [_plain(name) for name in columns], [_plain(name) for name in names]
    return not any(one != other and one in ours for one, other in zip(theirs, ours, strict=True))

"""What a raw file means, a second time and in plain Python: the rows that an entry and its bytes give, or the faults.

It shares no code with steps/data, and looks at one character and one row after the other. Where more than one rule
would be sound, a comment that begins with "Choice" says which one holds.
"""

import csv
import io
import json
import re
import zoneinfo
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Id = int | str
#: row, user, item, rating, time in ticks.
Row = tuple[int, Id, Id, float | None, int]

TICKS = {"none": 1, "s": 1, "ms": 1_000, "us": 1_000_000, "decimal-s": 1_000_000, "iso": 1_000_000}
KEYS = {"interactions": ("user", "item"), "items": ("item",), "users": ("user",)}
MEANT = ("user", "item", "rating", "timestamp", "title")
MARK = b"\xef\xbb\xbf"  # of UTF-8
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
BLANKS = " \t"


@dataclass(frozen=True)
class Fault:
    """A reason to refuse a file. lines: those that a message may name, or none if no line is to blame."""

    path: str
    kind: str
    lines: range | None = None


@dataclass
class Expected:
    """What is to be read. rows: in the file's order. items: the catalogue with titles, in any order."""

    rows: list[Row]
    items: dict[Id, str]
    rated: bool
    ticks: int


@dataclass
class Refused(Exception):
    """The file is to be refused. fatal: one of these is named; else the first of every kind is."""

    faults: list[Fault]
    fatal: bool


@dataclass
class Table:
    """A file as read: values by our name, with the line or row of each."""

    lines: list[int] = field(default_factory=list)
    values: dict[str, list[Any]] = field(default_factory=dict)
    malformed: list[int] = field(default_factory=list)


def expect(entry: Mapping[str, Any], files: Mapping[str, bytes]) -> Expected:
    """What validate is to make of `files`, by path. Raises Refused with all that is wrong."""
    tables, faults = {}, []
    for name, settings in entry["files"].items():
        content = files[settings["path"]]
        try:
            tables[name] = READERS[settings.get("format", "text")](content, settings)
        except Refused as refused:
            faults += refused.faults
    if faults:
        raise Refused(faults, fatal=True)
    return _checked(entry, tables)


def wanted(table: Mapping[str, Any]) -> list[str]:
    return [name for name in table["columns"] if name in MEANT or name in table.get("features", {})]


# Delimited text


def _text(content: bytes, table: Mapping[str, Any]) -> Table:
    path, encoding = table["path"], table.get("encoding", "utf-8")
    faults = [Fault(path, "carriage return", _at(line)) for line in _lone_returns(content)]
    content = content.replace(b"\r\n", b"\n")
    faults += [Fault(path, "utf-16")] * content.startswith(UTF_16)
    # Choice: no text has a NUL.
    faults += [Fault(path, "nul", _at(line)) for line, part in enumerate(content.split(b"\n"), 1) if b"\0" in part]
    if encoding == "utf-8":
        content = content.removeprefix(MARK)
    text = ""
    for line, part in enumerate(content.split(b"\n"), 1):
        if part.startswith(MARK):  # Choice: a program that joins files leaves it
            faults.append(Fault(path, "mark", _at(line)))
        try:
            text += part.decode(encoding) + "\n"
        except UnicodeDecodeError:
            faults.append(Fault(path, "encoding", _at(line)))
            text += part.decode(encoding, "replace") + "\n"
    separator = table["separator"]
    quoted = table.get("quotes", separator == ",")
    if len(separator) > 1 and "\x1f" in text:  # Choice: this character is ours where separators are longer
        faults.append(Fault(path, "unit separator", _at(1 + text[: text.index("\x1f")].count("\n"))))
    # Choice: lines of blanks at the end are no rows, others are.
    lines = text.split("\n")
    while lines and not lines[-1].strip(BLANKS):
        lines.pop()
    text = "".join(f"{line}\n" for line in lines)
    first, _, body = text.partition("\n")
    names = _names((first if table["header"] else text).replace("\r", ""), separator, quoted)
    num_fields = len(table["columns"]) if isinstance(table["columns"], list) else len(names)
    if not text:
        faults.append(Fault(path, "no rows"))
        raise Refused(faults, fatal=True)
    places: dict[str, int] = {}
    try:
        places = _places(names, table)
    except ValueError as error:
        faults.append(Fault(path, str(error), _at(1)))
    begin = 1
    if table["header"]:
        begin, text = 2, body
        if quoted and first.count('"') % 2:  # Choice: names stand in one line
            faults.append(Fault(path, "header's quote", range(1, 2 + body.count("\n"))))
            raise Refused(faults, fatal=True)
        if not body:
            faults.append(Fault(path, "no rows"))
    result = Table(values={name: [] for name in places})
    try:
        for line, fields in _records(text, separator, quoted, begin):
            if len(fields) != num_fields:
                result.malformed.append(line)
                continue
            result.lines.append(line)
            for name, place in places.items():
                result.values[name].append(fields[place] or None)  # Choice: "" is as missing as nothing
    except _BadQuote as bad:
        faults.append(Fault(path, "quote", bad.lines))
    if faults:
        raise Refused(faults, fatal=True)
    return result


def _at(line: int) -> range:
    return range(line, line + 1)


def _lone_returns(content: bytes) -> Iterator[int]:
    """The lines with a carriage return that no newline follows."""
    for line, part in enumerate(content.split(b"\n"), 1):
        is_last = line == content.count(b"\n") + 1
        if b"\r" in (part if is_last else part.removesuffix(b"\r")):
            yield line


def _names(text: str, separator: str, quoted: bool) -> list[str]:
    """The fields of the first record."""
    if not quoted:
        return [name.strip() for name in text.partition("\n")[0].split(separator)]
    # Choice: names are read as csv reads them, which lets a quote pass within a field.
    one = separator if len(separator) == 1 else "\x1f"
    reader = csv.reader(io.StringIO(text.replace(separator, one), newline="\n"), delimiter=one)
    return [name.strip() for name in next(reader, [])]


def _plain(name: str) -> str:
    letters = "".join(letter for letter in name.lower() if letter in "abcdefghijklmnopqrstuvwxyz0123456789")
    return letters[:-2] if letters.endswith("id") and len(letters) > 2 else letters


def _places(names: list[str], table: Mapping[str, Any]) -> dict[str, int]:
    """The place of every column that is read. Raises ValueError if the first line is not what the entry says."""
    columns, header = table["columns"], table["header"]
    if isinstance(columns, list):
        places = {name: place for place, name in enumerate(columns)}
        ours, theirs = [_plain(name) for name in columns], [_plain(name) for name in names]
        if not header and theirs == ours:
            raise ValueError("names where header is false")
        if len(names) != len(columns):
            raise ValueError("fields of the first line")
        if header and any(there != here and there in ours for there, here in zip(theirs, ours, strict=True)):
            raise ValueError("order of names")
    else:
        places = {}
        for name, there in columns.items():
            if isinstance(there, int):
                places[name] = there - 1
            elif names.count(there) == 1:
                places[name] = names.index(there)
            else:
                raise ValueError("a name not there once")
        if max(places.values()) >= len(names):
            raise ValueError("fields of the first line")
    # Choice: a name is neither a number nor a date; where all are other texts, a first row cannot be told from names.
    meant = [names[place] for name, place in places.items() if name in MEANT[:4]]
    if header and any(_is_number(name) or re.match("[0-9]{4}-[0-9]{2}-[0-9]{2}", name) for name in meant):
        raise ValueError("no names where header is true")
    return {name: places[name] for name in wanted(table)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass
class _BadQuote(Exception):
    lines: range


def _records(text: str, separator: str, quoted: bool, begin: int) -> Iterator[tuple[int, list[str]]]:
    """The line and the fields of every record."""
    if not quoted:
        for line, content in enumerate(text.split("\n")[:-1], begin):
            yield line, content.split(separator)
        return
    line, at = begin, 0
    while at < len(text):
        fields, first = [], line
        while True:
            value = ""
            if text[at] == '"':
                at += 1
                while True:
                    if at >= len(text):
                        raise _BadQuote(range(first, line + 1))  # never closed
                    if text[at] != '"':
                        line += text[at] == "\n"
                        value += text[at]
                        at += 1
                    elif text[at + 1 : at + 2] == '"':
                        value += '"'
                        at += 2
                    else:
                        at += 1
                        break
                if not text.startswith((separator, "\n"), at):
                    raise _BadQuote(range(first, line + 1))  # text behind a quote that closes
            else:
                while not text.startswith((separator, "\n"), at):
                    if text[at] == '"':
                        raise _BadQuote(range(first, line + 1))  # a quote within a field
                    value += text[at]
                    at += 1
            fields.append(value)
            if text[at] == "\n":
                break
            at += len(separator)
        at += 1
        line += 1
        yield first, fields


# JSON lines and Parquet


def _jsonl(content: bytes, table: Mapping[str, Any]) -> Table:
    path = table["path"]
    faults = [Fault(path, "carriage return", _at(line)) for line in _lone_returns(content)]
    faults += [Fault(path, "utf-16")] * content.startswith(UTF_16)
    content = content.replace(b"\r\n", b"\n").removeprefix(MARK)
    parts = content.split(b"\n")
    while parts and not parts[-1].strip(BLANKS.encode()):
        parts.pop()
    if not parts:
        raise Refused([*faults, Fault(path, "no rows")], fatal=True)
    keys = _keys(table)
    result = Table(values={name: [] for name in keys})
    for line, part in enumerate(parts, 1):
        try:
            found = json.loads(
                part.decode(),
                object_pairs_hook=lambda pairs: dict(reversed(pairs)),  # Choice: of a key that is twice, the first
                parse_constant=_no_constant,
                parse_float=_float_text,
            )
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
            if not isinstance(found, dict):
                raise ValueError
        except ValueError:
            faults.append(Fault(path, "json", _at(line)))
            continue
        if line == 1:
            faults += [Fault(path, "key", _at(1)) for key in keys.values() if key not in found]
        result.lines.append(line)
        for name, key in keys.items():
            result.values[name].append(_json_text(found.get(key)))
    if faults:
        raise Refused(faults, fatal=True)
    return result


def _keys(table: Mapping[str, Any]) -> dict[str, str]:
    columns = table["columns"]
    return {name: name if isinstance(columns, list) else columns[name] for name in wanted(table)}


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _float_text(text: str) -> float:
    number = float(text)
    if abs(number) == float("inf"):
        raise ValueError(text)
    return _whole(number)


def _whole(number: float) -> float:
    """Choice: 3.0 is 3, as in JavaScript, and as programs write whole numbers beside missing ones."""
    return int(number) if number == number // 1 else number


def _json_text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parquet(content: bytes, table: Mapping[str, Any]) -> Table:
    path = table["path"]
    try:
        read = pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError):
        raise Refused([Fault(path, "parquet")], fatal=True) from None
    keys = _keys(table)
    if any(key not in read.column_names for key in keys.values()):
        raise Refused([Fault(path, "column")], fatal=True)
    if not read.num_rows:
        raise Refused([Fault(path, "no rows")], fatal=True)
    try:
        values = {name: [_present(value) for value in read[key].to_pylist()] for name, key in keys.items()}
    except UnicodeDecodeError:
        raise Refused([Fault(path, "text")], fatal=True) from None
    for name in {"user", "item"} & values.keys():
        values[name] = [
            _json_text(_whole(value) if isinstance(value, float) else value)
            for value in [None if value != value else value for value in values[name]]
        ]
    for name in {"title", *table.get("features", {})} & values.keys():
        values[name] = [None if value is None else str(value) for value in values[name]]
    return Table(list(range(1, read.num_rows + 1)), values)


def _present(value: Any) -> Any:
    """Choice: bytes are texts in UTF-8, and an empty one is missing."""
    value = value.decode() if isinstance(value, bytes) else value
    return None if value == "" else value


READERS: dict[str, Callable[[bytes, Mapping[str, Any]], Table]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
}


# Values


def whole_id(text: str) -> bool:
    """Whether an id is a whole number as one writes it, and fits 8 bytes."""
    return re.fullmatch("0|-?[1-9][0-9]*", text) is not None and -(2**63) <= int(text) < 2**63


def rating_of(value: Any) -> float | None:
    """A finite number, as a double; None if it is none."""
    if isinstance(value, bool | datetime):
        return None
    if isinstance(value, str):
        if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", value):
            return None
        value = Decimal(value)
    if value is None or Decimal(value).is_nan():
        return None
    # Choice: ratings are kept as 4-byte numbers, and one that is infinite as such is refused.
    number = float(value)
    with np.errstate(over="ignore"):
        return number if np.isfinite(np.float32(number)) else None


def ticks_of(value: Any, time: str, zone: str | None) -> int | None:
    """A time in ticks; None if it is none."""
    ticks: Any = None
    if isinstance(value, datetime):
        ticks = _of_datetime(value, zone) if time == "iso" else None
    elif time == "iso":
        ticks = _of_iso(value, zone) if isinstance(value, str) else None
    elif isinstance(value, bool):
        ticks = None
    elif isinstance(value, int):
        ticks = value * (TICKS[time] if time == "decimal-s" else 1)
    elif isinstance(value, float):
        if value == value and abs(value) != float("inf"):
            ticks = round(Fraction(value) * TICKS[time]) if time == "decimal-s" else value
            ticks = int(ticks) if ticks == int(ticks) else None
    elif isinstance(value, str) and time == "decimal-s":
        # Choice: up to 6 decimals, and zeros.
        if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]{1,6}0*)?", value):
            ticks = int(Decimal(value) * TICKS[time])
    elif isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(\.0*)?", value):
        ticks = int(value.partition(".")[0])
    return ticks if ticks is not None and -(2**63) <= ticks < 2**63 else None


_CLOCK = "([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:[.,]([0-9]{1,6}))?)?"
_ISO = re.compile(f"([0-9]{{4}})-([0-9]{{2}})-([0-9]{{2}})(?:[T ]{_CLOCK})?(Z|z|[+-][0-9]{{2}}:?[0-9]{{2}})?")


def _of_iso(text: str, zone: str | None) -> int | None:
    found = _ISO.fullmatch(text)
    if not found:
        return None
    *numbers, fraction, there = found.groups()
    year, month, day, hour, minute, second = (int(number or 0) for number in numbers)
    try:
        local = datetime(year, month, day, hour, minute, second, int((fraction or "0").ljust(6, "0")))
    except ValueError:
        return None
    if there is None:
        return _of_datetime(local, zone)
    if there in "Zz":
        return _of_datetime(local.replace(tzinfo=UTC), zone)
    hours, minutes = int(there[1:3]), int(there[-2:])
    if hours > 23 or minutes > 59:
        return None
    offset = timedelta(hours=hours, minutes=minutes) * (-1 if there[0] == "-" else 1)
    ticks = _of_datetime(local.replace(tzinfo=UTC), zone)
    return None if ticks is None else ticks - offset // timedelta(microseconds=1)


def _of_datetime(time: datetime, zone: str | None) -> int | None:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    if time.tzinfo is None:
        if zone is None:
            return None
        there = zoneinfo.ZoneInfo(zone)
        # Choice: of an hour that a clock shows twice, the first; one that it leaves out is no time.
        aware = time.replace(tzinfo=there, fold=0)
        if aware.astimezone(UTC).astimezone(there).replace(tzinfo=None) != time:
            return None
        time = aware
    return (time.astimezone(UTC) - epoch) // timedelta(microseconds=1)


# Checks and filters


def _checked(entry: Mapping[str, Any], tables: dict[str, Table]) -> Expected:
    checks, settings = entry["checks"], entry["files"]["interactions"]
    time, faults = settings.get("time", "s"), []
    for name, table in tables.items():
        path = entry["files"][name]["path"]
        faults += [Fault(path, "fields", _at(line)) for line in table.malformed]
        for key in KEYS[name]:
            once = Counter[str]()
            for line, value in zip(table.lines, table.values[key], strict=True):
                once[value or ""] += 1
                if value is None or (name != "interactions" and once[value] > 1):
                    faults.append(Fault(path, key, _at(line)))
    log = tables["interactions"]
    path = settings["path"]
    rows: list[Any] = []
    rated, timed = "rating" in log.values, "timestamp" in log.values
    low, high = (
        int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) * TICKS[time]
        for day in checks.get("time", ("1970-01-01", "2100-01-01"))
    )
    for at, line in enumerate(log.lines):
        rating, ticks = None, 0
        if rated:
            given = log.values["rating"][at]
            rating = rating_of(given)
            if rating is None:
                if not (checks.get("missing_ratings") and (given is None or given != given)):
                    faults.append(Fault(path, "rating", _at(line)))
            elif not _fits(rating, checks):
                faults.append(Fault(path, "rating", _at(line)))
        if timed:
            ticks = ticks_of(log.values["timestamp"][at], time, settings.get("zone"))  # type: ignore[assignment]
            if ticks is None or not low <= ticks <= high:
                faults.append(Fault(path, "timestamp", _at(line)))
        rows.append((line, log.values["user"][at], log.values["item"][at], rating, ticks))
    if faults:
        raise Refused(faults, fatal=False)
    rows = _typed(rows, tables)
    ids = {name: [_as(rows, key, text) for text in tables[name].values[key]] for name, (key,) in _beside(tables)}
    for name, (key,) in _beside(tables):
        unknown = [row[0] for row in rows if row[_PLACE[key]] not in set(ids[name])]
        faults += [Fault(path, f"unknown {key}", _at(line)) for line in unknown]
    if faults and entry.get("filters"):
        raise Refused(faults, fatal=False)
    rows, items = filtered(rows, entry.get("filters", []))
    if not rows:
        raise Refused([*faults, Fault(path, "none left")], fatal=True)
    per_user = Counter(row[1] for row in rows)
    few = [row[0] for row in rows if per_user[row[1]] < checks["min_user_interactions"]]
    faults += [Fault(path, "few", _at(line)) for line in few]
    if checks.get("unique_user_item"):
        seen = set()
        for row in rows:
            if row[1:3] in seen:
                faults.append(Fault(path, "repeated", _at(row[0])))
            seen.add(row[1:3])
    if faults:
        raise Refused(faults, fatal=False)
    titles: dict[Id, str] = dict.fromkeys(items, "")
    if "items" in tables:
        texts = tables["items"].values.get("title", [""] * len(ids["items"]))
        titles = dict(zip(ids["items"], [text or "" for text in texts], strict=True))
    return Expected(rows, titles, rated, TICKS[time])


_PLACE = {"user": 1, "item": 2}


def _beside(tables: Mapping[str, Table]) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, KEYS[name]) for name in tables if name != "interactions"]


def _fits(rating: float, checks: Mapping[str, Any]) -> bool:
    if "rating" in checks and not checks["rating"][0] <= rating <= checks["rating"][1]:
        return False
    if "rating_step" not in checks:
        return True
    steps = Decimal(repr(rating)) / Decimal(str(checks["rating_step"]))
    return abs(steps - round(steps)) < Decimal("1e-9")  # Choice: within a billionth of a step


def _typed(rows: list[Any], tables: Mapping[str, Table]) -> list[Any]:
    """Rows with ids as numbers where all ids of a kind, of all files, are whole numbers."""
    for key, place in _PLACE.items():
        texts = [text for table in tables.values() for text in table.values.get(key, [])]
        if all(whole_id(text) for text in texts):
            rows = [(*row[:place], int(row[place]), *row[place + 1 :]) for row in rows]
    return rows


def _as(rows: list[Row], key: str, text: str) -> Id:
    return int(text) if isinstance(rows[0][_PLACE[key]], int) else text


def filtered(rows: list[Row], rules: list[dict[str, Any]]) -> tuple[list[Row], set[Id]]:
    """The rows that the rules keep, and the items before the last rules that look at users alone."""
    places = {"user": 1, "item": 2, "rating": 3, "timestamp": 4}
    last = max(
        (at for at, rule in enumerate(rules, 1) if list(rule.get("min_interactions", ())) != ["user"]), default=0
    )
    items = {row[2] for row in rows}
    for at, rule in enumerate(rules, 1):
        ((name, value),) = rule.items()
        if name == "min_rating":  # of ratings as they are kept, in 4 bytes
            rows = [row for row in rows if row[3] is not None and np.float32(row[3]) >= np.float32(value)]
        elif name == "first_of":
            first: dict[Any, tuple[int, int]] = {}
            for row in rows:
                same = tuple(row[places[column]] for column in value)
                first[same] = min(first.get(same, (row[4], row[0])), (row[4], row[0]))
            rows = [row for row in rows if (row[4], row[0]) in set(first.values())]
        elif name == "min_interactions":
            rows = _at_least(rows, value, places)
        elif name == "k_core":
            while len(kept := _at_least(rows, value, places)) < len(rows):
                rows = kept
        else:
            raise NotImplementedError(name)
        if at == last:
            items = {row[2] for row in rows}
    return rows, items


def _at_least(rows: list[Row], least: Mapping[str, int], places: Mapping[str, int]) -> list[Row]:
    counts = {key: Counter(row[places[key]] for row in rows) for key in least}
    return [row for row in rows if all(counts[key][row[places[key]]] >= number for key, number in least.items())]


# Sequences


@dataclass
class Sequences:
    users: list[Id]
    items: list[Id]
    offsets: list[int]
    item: list[int]
    timestamp: list[int]
    rating: list[float | None]


def sequences(expected: Expected) -> Sequences:
    """The sequences of rows: users and items by id, numbers by size and texts by UTF-8; rows by time, then as in the
    file."""
    users = sorted({row[1] for row in expected.rows}, key=_order)
    items = sorted(expected.items, key=_order)
    place = {item: at for at, item in enumerate(items, 1)}
    result = Sequences(users, items, [0], [], [], [])
    for user in users:
        own = sorted((row for row in expected.rows if row[1] == user), key=lambda row: (row[4], row[0]))
        result.offsets.append(result.offsets[-1] + len(own))
        for _, _, item, rating, ticks in own:
            result.item.append(place[item])
            result.timestamp.append(ticks // expected.ticks)
            result.rating.append(rating)
    return result


def _order(name: Id) -> Any:
    return name.encode() if isinstance(name, str) else name

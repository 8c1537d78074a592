"""Raw files in bad shape: small data sets in many forms, each with a mutation, made from a seed and a number."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[list[str]]


@dataclass
class Case:
    """A data set whose files are mutated. entry: as in params/datasets.yaml. files: their bytes by path."""

    form: str
    mutation: str
    entry: dict[str, Any]
    files: dict[str, bytes]
    block_bytes: int


@dataclass
class Form:
    """How a delimited file is written."""

    separator: str
    header: bool
    quotes: bool
    always_quoted: bool = False
    by: str = "list"  # how `columns` names them: list, name or place


TEXT_FORMS = {
    "dat": Form("::", False, False),
    "dat quoted": Form("::", False, True),
    "csv": Form(",", True, True),
    "csv bare": Form(",", False, True),
    "csv quoted": Form(",", True, True, always_quoted=True, by="name"),
    "csv by place": Form(",", True, True, by="place"),
    "tsv": Form("\t", True, False, by="name"),
    "tsv quoted": Form("\t", False, True),
    "bars": Form("|", False, False, by="place"),
    "semicolons": Form(";", True, False),
}
FORMS = (*TEXT_FORMS, *TEXT_FORMS, "jsonl", "jsonl", "parquet")
BLOCKS = (1, 60, 150, 150, 300, 300, *[1 << 24] * 6)
COLUMN_NAMES = {"user": "userId", "item": "movieId", "rating": "rating", "timestamp": "timestamp", "title": "title"}


def _several(texts: str) -> list[str]:
    return texts.split("|")


# Values that are not what they look like.
IDS = _several(
    "03|+3| 3|3 |-0|0|-3|3.0|1e3|3|٣|３|1_000|0x3|NULL|null|nan||#3|'3'|\\N|-|\ufeff3|\x0b3|日本|a\0b|\x1f|\u200b3|"
    "3\u00a0|e\u0301|é|9223372036854775807|9223372036854775808|-9223372036854775808|-9223372036854775809|"
    "18446744073709551616|123456789012345678901234567890|a-name-that-is-longer-than-twelve-bytes"
)
RATINGS = _several(
    "5|5.0|4.5|0.5|5.5|0|0.0|-1|-0|1e0|+4| 4|4 |4.|.5|nan|inf|-inf||NULL|4,5|1_0|٤|abc|0.1|0.2|0.3|0.7|4.1|4.9|4.25|"
    "True|4.0000000001|4.00000001|0.30000001|5.0000000000000001|5.000000001|1e400|1e-400|1e39|--1|0x1|1e|1/2"
)
_SECONDS = _several(
    "0|-1|1600000000|1600000000.0|1600000000.|1600000000.5|+1600000000| 1600000000|1.6e9|1600000000000|"
    "1600000000000000|1600000000123|1600000000123456|4102444800|4102444801|4102444800000|4102444800001|"
    "9223372036854775808||NULL|nan|1_600|٣|2020-01-01|1,600,000,000|007|-0|1600000000.00000000000000000000000001"
)
_DECIMALS = _several(
    "0|0.000001|-0.5|1600000000|1600000000.25|1600000000.123456|1600000000.1234567|1.|1600000000.12345600|+1.5|1e9||.5|"
    "18446744073710|1600000000000000|9223372036854775807|1600000000.٣|4102444800.0|4102444800.000001|nan|36893488147420|"
    "1600000000,5"
)
_DATES = _several(
    "2020-01-01T00:00:00Z|2020-02-30T00:00:00Z|2020-02-29T10:00:00Z|2019-02-29T10:00:00Z|2020-01-01|2020-01-01T24:00:00Z|"
    "2020-01-01T23:59:60Z|2020-01-01T23:60:00Z|2020-01-01 10:00Z|2020-01-01Z|2020-01-01T10:00:00.5Z|20200101T100000Z|"
    "2020-01-01T10:00:00.123456Z|2020-01-01T10:00:00.1234567Z|2020-01-01T10:00:00+02:00|2020-01-01T10:00:00-0530|"
    "2020-01-01T10:00:00+24:00|2020-13-01T00:00:00Z|2020-01-01T10:00:00+02:60|2020-1-1T10:00:00Z|1600000000||NULL|"
    "2020-01-01T10:00:00.٣Z|2020-01-01T10Z|2020-03-29T02:30:00|2020-10-25T02:30:00|2020-07-01T10:00:00|0000-01-01Z|"
    "1969-12-31T23:30:00-01:00|2100-01-01T00:00:00Z|2100-01-01T00:00:00.000001Z|2020-01-01t10:00:00z|01/02/2020|"
    "2020-01-01T10:00:00 Z|2020-01-01T10:00:00,25Z|٢٠٢٠-01-01T10:00:00Z|2020-01-01T10:00:00+٠٢:00|9999-12-31Z"
)
TIMES = {"s": _SECONDS, "ms": _SECONDS, "us": _SECONDS, "decimal-s": _DECIMALS, "iso": _DATES, "none": [""]}
STRANGE_BYTES = [text.encode("latin-1") for text in _several('"|\n|\r|\r\n|\0|\x1f|\xff|\xc3|\xe2\x82|,|::|\t| |\\')]


def make(seed: int, number: int) -> Case:
    """The case of a number: the same for the same seed."""
    return _Maker(random.Random(f"{seed} {number}")).make()


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.form = chance.choice(FORMS)
        self.time = chance.choice(("s", "s", "ms", "us", "decimal-s", "iso", "iso", "none"))
        self.rated = chance.random() < 0.7
        self.zone = chance.choice((None, "UTC", "Europe/Berlin", "America/New_York")) if self.time == "iso" else None
        self.step = chance.choice((1, 0.5, 0.1, None))
        self.columns = ["user", "item", *["rating"] * self.rated, *["timestamp"] * (self.time != "none")]

    def make(self) -> Case:
        chance = self.chance
        rows = self.rows()
        if chance.random() < 0.3:  # an id that is odd wherever it stands
            at, odd = chance.randrange(2), chance.choice([name for name in IDS if name])
            old = chance.choice(rows)[at]
            for row in rows:
                row[at] = odd if row[at] == old else row[at]
        titles = enumerate(sorted({row[1] for row in rows}))
        items = [[item, f"Film {at}, 'é'" if at % 3 else ""] for at, item in titles]
        users = [[user] for user in sorted({row[0] for row in rows})]
        tables = {"interactions": (self.columns, rows)}
        if chance.random() < 0.5:
            tables["items"] = (["item", "title"], items)
            if chance.random() < 0.3:
                tables["users"] = (["user", "sex"], [[*user, "F"] for user in users])
        entry = {"files": {}, "checks": self.checks()} | self.filters()
        files = {}
        target = chance.choice([*["interactions"] * 4, *tables])
        kinds = (VALUE_MUTATIONS, VALUE_MUTATIONS, ROW_MUTATIONS, HEADER_MUTATIONS, BYTE_MUTATIONS, BYTE_MUTATIONS)
        mutation = chance.choice([*chance.choice(kinds)])
        name = mutation
        for table, (columns, content) in tables.items():
            content = [list(row) for row in content]
            if table == target and mutation in VALUE_MUTATIONS:
                for _ in range(chance.choice((1, 1, 2))):
                    name = VALUE_MUTATIONS[mutation](self, columns, content)
            elif table == target and mutation in ROW_MUTATIONS:
                ROW_MUTATIONS[mutation](chance, content)
            settings, data = self.written(table, columns, content, mutation if table == target else "")
            if table == target and mutation in BYTE_MUTATIONS and self.form != "parquet":
                data = BYTE_MUTATIONS[mutation](chance, data)
            entry["files"][table] = settings
            files[settings["path"]] = data
        return Case(self.form, name, entry, files, chance.choice(BLOCKS))

    def rows(self) -> Rows:
        chance = self.chance
        kind = chance.choice(("numbers", "numbers", "large", "texts"))
        users = {
            "numbers": ["1", "2", "10"],
            "large": ["9007199254740993", "9007199254740992", "-5"],
            "texts": ["anna", "Zoë", "b 1"],
        }[kind]
        items = {
            "numbers": ["1", "2", "3", "11", "20", "100"],
            "large": ["9007199254740993", "9007199254740992", "4", "5", "6", "0"],
            "texts": ["0001", "1", "日本", "x y", "000100039X", "é"],
        }[kind]
        rows = []
        for user in users:
            for at, item in enumerate(chance.sample(items, chance.choice((4, 5)))):
                rating = [self.rating()] if self.rated else []
                rows.append([user, item, *rating, *([self.moment(at)] if self.time != "none" else [])])
        if chance.random() < 0.5:
            chance.shuffle(rows)
        return rows

    def rating(self) -> str:
        step = Decimal(str(self.step or "0.25"))
        return str(step * self.chance.randrange(1, int(5 / step) + 1))

    def moment(self, at: int) -> str:
        """A time, with ties, as it is written."""
        second = 1_500_000_000 + at // 2 * 86_400 + self.chance.choice((0, 0, 7))
        part = self.chance.choice((0, 0, 250_000))
        if self.time == "iso":
            time = datetime.fromtimestamp(second, UTC) + timedelta(microseconds=part)
            return time.isoformat().replace("+00:00", "" if self.zone and self.chance.random() < 0.7 else "Z")
        if self.time == "decimal-s":
            return f"{second}.{part:06}".rstrip("0").rstrip(".") if part else str(second)
        return str(second * {"s": 1, "ms": 1_000, "us": 1_000_000}[self.time])

    def checks(self) -> dict[str, Any]:
        chance = self.chance
        checks: dict[str, Any] = {"min_user_interactions": 3}
        if self.rated and chance.random() < 0.8:
            checks["rating"] = [self.step or 0.25, 5]
            if self.step and chance.random() < 0.8:
                checks["rating_step"] = self.step
        if self.rated and chance.random() < 0.2:
            checks["missing_ratings"] = True
        if chance.random() < 0.5:
            checks["unique_user_item"] = True
        if self.time != "none" and chance.random() < 0.15:
            checks["time"] = ["1950-01-01", "2200-01-01"]
        return checks

    def filters(self) -> dict[str, Any]:
        chance = self.chance
        if chance.random() < 0.8:
            return {}
        rules: list[dict[str, Any]] = [
            {"first_of": ["user", "item"]},
            {"first_of": self.columns},
            {"min_interactions": {"user": chance.choice((3, 4))}},
            {"min_interactions": {"user": 3, "item": 2}},
            {"k_core": {"user": chance.choice((2, 3, 4)), "item": chance.choice((1, 2, 3))}},
        ]
        if self.rated:
            rules.append({"min_rating": chance.choice((1, 0.7, 4.1, 3))})
        return {"filters": chance.sample(rules, chance.choice((1, 2)))}

    def written(self, table: str, columns: list[str], rows: Rows, mutation: str) -> tuple[dict[str, Any], bytes]:
        """The entry of a file and its bytes. mutation: of HEADER_MUTATIONS, or nothing."""
        settings: dict[str, Any] = {"path": f"{table}.txt", "columns": columns}
        if table == "interactions":
            settings |= {"time": self.time} | ({"zone": self.zone} if self.zone else {})
        if self.form == "jsonl":
            settings["format"] = "jsonl"
            if self.chance.random() < 0.5:
                settings["columns"] = {name: COLUMN_NAMES.get(name, name) for name in columns}
            return settings, self.as_jsonl(settings["columns"], rows, mutation)
        if self.form == "parquet":
            settings["format"] = "parquet"
            settings["columns"] = {name: COLUMN_NAMES.get(name, name) for name in columns}
            return settings, self.as_parquet(columns, rows)
        return self.as_text(settings, columns, rows, mutation)

    def as_text(
        self, settings: dict[str, Any], columns: list[str], rows: Rows, mutation: str
    ) -> tuple[dict[str, Any], bytes]:
        chance, form = self.chance, TEXT_FORMS[self.form]
        settings |= {"separator": form.separator, "header": form.header}
        if form.quotes != (form.separator == ","):
            settings["quotes"] = form.quotes
        order = list(range(len(columns)))
        if form.by != "list":
            chance.shuffle(order)
            names = [COLUMN_NAMES.get(columns[at], columns[at]) for at in order]
            settings["columns"] = {
                columns[at]: names[place] if form.by == "name" else place + 1 for place, at in enumerate(order)
            }
        header = [COLUMN_NAMES.get(columns[at], columns[at]) for at in order]
        rows = [[row[at] for at in order if at < len(row)] + row[len(columns) :] for row in rows]
        with_header = form.header
        if mutation == "header there or not":
            with_header = not with_header
        elif mutation in HEADER_MUTATIONS:
            header, with_header = HEADER_MUTATIONS[mutation](chance, header), True
        lines = [self.line(row) for row in ([header] if with_header else []) + rows]
        text = "\n".join(lines) + "\n"
        if chance.random() < 0.15 and all(ord(letter) < 256 for letter in text):
            settings["encoding"] = "latin-1"
        return settings, text.encode(settings.get("encoding", "utf-8"))

    def line(self, row: list[str]) -> str:
        form = TEXT_FORMS[self.form]
        if not form.quotes:
            return form.separator.join(row)
        return form.separator.join(
            '"' + value.replace('"', '""') + '"'
            if form.always_quoted or any(part in value for part in ('"', "\n", form.separator))
            else value
            for value in row
        )

    def as_jsonl(self, columns: Any, rows: Rows, mutation: str) -> bytes:
        names = list(columns.values()) if isinstance(columns, dict) else list(columns)
        if mutation in HEADER_MUTATIONS and mutation != "header there or not":
            names = HEADER_MUTATIONS[mutation](self.chance, names)
        as_numbers = self.chance.random() < 0.5
        lines = []
        for row in rows:
            pairs = [
                f"{json.dumps(name)}: {value if as_numbers and _is_json_number(value) else _json(value)}"
                for name, value in zip(names, row, strict=False)
            ]
            lines.append("{" + ", ".join(pairs) + "}")
        return ("\n".join(lines) + "\n").encode()

    def as_parquet(self, columns: list[str], rows: Rows) -> bytes:
        chance = self.chance
        table = {}
        for at, name in enumerate(columns):
            texts = [row[at] if at < len(row) and row[at] != "" else None for row in rows]
            table[COLUMN_NAMES.get(name, name)] = self.array(name, texts, chance)
        buffer = io.BytesIO()
        pq.write_table(pa.table(table), buffer, row_group_size=chance.choice((5, 1000)))
        return buffer.getvalue()

    def array(self, name: str, texts: list[str | None], chance: random.Random) -> pa.Array:
        """Texts as one of the types that they can have."""
        kinds: list[Callable[[], pa.Array]] = [
            lambda: pa.array([None if text is None else int(text) for text in texts], pa.int64()),
            lambda: pa.array([None if text is None else int(text) for text in texts], pa.uint64()),
            lambda: pa.array([None if text is None else _double(text, name) for text in texts], pa.float64()),
            lambda: pa.array(texts).dictionary_encode(),
            lambda: pa.array([text and text.encode() for text in texts], pa.binary()),
        ]
        if name == "rating":
            kinds += [lambda: pa.array([None if text is None else float(text) for text in texts], pa.float32())]
            kinds += [lambda: pa.array([None if text is None else Decimal(text) for text in texts])]
        if name == "timestamp" and self.time == "iso":
            moments = [moment for text in texts if (moment := _moment(text)) or text is None]
            aware = pa.timestamp(chance.choice(("us", "ms", "ns")), chance.choice(("UTC", "Asia/Tokyo", None)))
            if len(moments) == len(texts):
                kinds += [lambda: pa.array([moment and _at_utc(moment) for moment in moments], aware)] * 5
        chance.shuffle(kinds)
        if chance.random() < 0.6 and any(texts):
            for kind in kinds:
                try:
                    return kind()
                except (ValueError, TypeError, ArithmeticError, pa.ArrowException):
                    continue
        return pa.array(texts, pa.string())

    # Mutations of values

    def value(self, columns: list[str], rows: Rows, column: str | None = None) -> str:
        at = self.chance.randrange(len(columns)) if column is None else columns.index(column)
        kind = columns[at]
        choices = {"rating": RATINGS, "timestamp": TIMES.get(self.time, ())}.get(kind, IDS)
        self.chance.choice(rows)[at] = self.chance.choice(choices)
        return f"{kind} value"

    def quoted_value(self, columns: list[str], rows: Rows) -> str:
        """A quote, a separator or a newline within a value, which the form may be able to write, or not."""
        at = self.chance.randrange(2) if len(columns) > 1 else 0
        row = self.chance.choice(rows)
        forms = ('{}"', '"{}', '5" {}', "{},x", "{};{}", "a\n{}", '"{}"', '""', '"', "a::b", "a\tb", "{}|")
        row[at] = self.chance.choice(forms).format(row[at], row[at])
        return "quotes in a value"


def _is_json_number(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda name: json.loads(""))
    except ValueError:
        return False
    return not text.startswith(('"', "{", "[")) and text not in ("true", "false", "null")


def _json(value: str) -> str:
    return "null" if value in ("", "NULL") else json.dumps(value, ensure_ascii=len(value) % 2 == 0)


def _double(text: str, name: str) -> float:
    """A double, as no program takes it for an id where it is larger than 8 bytes of whole numbers."""
    if name != "rating" and abs(float(text)) >= 2**63:
        raise ValueError(text)
    return float(text)


def _moment(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text or "")
    except ValueError:
        return None


def _at_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


VALUE_MUTATIONS: dict[str, Callable[[_Maker, list[str], Rows], str]] = {
    "value": _Maker.value,
    "value again": _Maker.value,
    "value once more": _Maker.value,
    "quotes in a value": _Maker.quoted_value,
}


# Mutations of rows


def _swap_columns(chance: random.Random, rows: Rows) -> None:
    a, b = chance.sample(range(len(rows[0])), 2)
    for row in rows:
        row[a], row[b] = row[b], row[a]


def _another(chance: random.Random, rows: Rows, **changes: str) -> None:
    """A copy of a row whose fields, by place, are changed."""
    row = list(chance.choice(rows))
    for at, value in changes.items():
        row[int(at[1:])] = value
    rows.insert(chance.randrange(len(rows) + 1), row)


def _one_more_one_less(chance: random.Random, rows: Rows) -> None:
    rows[0].append("1")
    rows[-1].pop()


def _all_less(chance: random.Random, rows: Rows) -> None:
    for row in rows[1:]:
        row.pop()


def _dropped(chance: random.Random, rows: Rows) -> None:
    del rows[: chance.randrange(1, len(rows))]


ROW_MUTATIONS: dict[str, Callable[[random.Random, Rows], Any]] = {
    "nothing": lambda chance, rows: None,
    "row twice": _another,
    "another user": lambda chance, rows: _another(chance, rows, _0="77"),
    "another item": lambda chance, rows: _another(chance, rows, _1="77"),
    "rows swapped": lambda chance, rows: chance.shuffle(rows),
    "columns swapped": _swap_columns,
    "field missing": lambda chance, rows: chance.choice(rows).pop(),
    "field more": lambda chance, rows: chance.choice(rows).append(chance.choice(("x", "", "1"))),
    "field more and field missing": _one_more_one_less,
    "every field missing": _all_less,
    "rows dropped": _dropped,
    "no rows": lambda chance, rows: rows.clear(),
}


# Mutations of the header


def _changed_name(chance: random.Random, header: list[str]) -> list[str]:
    at = chance.randrange(len(header))
    name = chance.choice(
        (header[at].upper(), header[at][:-1], header[at] + "x", f" {header[at]} ", "item", "", "3", '"a')
    )
    return [*header[:at], name, *header[at + 1 :]]


HEADER_MUTATIONS: dict[str, Callable[[random.Random, list[str]], list[str]]] = {
    "header there or not": lambda chance, header: header,
    "header in another order": lambda chance, header: chance.sample(header, len(header)),
    "header misspelt": _changed_name,
    "header short": lambda chance, header: header[:-1],
    "header long": lambda chance, header: [*header, chance.choice(("more", header[0]))],
    "header of our names": lambda chance, header: [
        next((ours for ours, theirs in COLUMN_NAMES.items() if theirs == name), name) for name in header
    ],
}


# Mutations of bytes


def _bytes_changed(chance: random.Random, data: bytes) -> bytes:
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(data) + 1)
        size = chance.choice((1, 1, 2, 8))
        new = chance.choice(
            (b"", bytes([chance.randrange(256)]), chance.choice(STRANGE_BYTES), data[at : at + size] * 2)
        )
        data = data[:at] + new + data[at + size * (chance.random() < 0.7) :]
    return data


def _inserted(chance: random.Random, data: bytes) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(STRANGE_BYTES) + data[at:]


def _lines_changed(chance: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    new = chance.choice(([], [lines[at]] * 2, [b"", lines[at]], [b"  ", lines[at]], [lines[at][: len(lines[at]) // 2]]))
    return b"\n".join([*lines[:at], *new, *lines[at + 1 :]])


def _end_changed(chance: random.Random, data: bytes) -> bytes:
    ends = (
        b"",
        b"\n\n",
        b"\n\n\n",
        b"\n \n",
        b"\r\n",
        b"\r\n\r\n",
        b"\n\t\t\n",
        b"\0",
        b"\x1a",
        b"\n\x1a",
        b"\n\x0c",
        b'"',
    )
    return data.rstrip(b"\n") + chance.choice(ends)


def _begin_changed(chance: random.Random, data: bytes) -> bytes:
    return (
        chance.choice((b"\xef\xbb\xbf", b"\n", b" \n", b"\xef\xbb\xbf" * 2, b"# a comment\n", b"\xff\xfe", b"\r\n"))
        + data
    )


def _line_ends_changed(chance: random.Random, data: bytes) -> bytes:
    kind = chance.randrange(4)
    if kind == 0:
        return data.replace(b"\n", b"\r")
    if kind == 1:
        return data.replace(b"\n", b"\r\r\n")
    return b"".join(
        line + (b"\n" if kind == 2 and chance.random() < 0.5 else b"\r\n") for line in data.split(b"\n")[:-1]
    )


def _encoded(chance: random.Random, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace").replace("1", "é", chance.randrange(2))
    return text.encode(chance.choice(("latin-1", "utf-16", "utf-16-le", "utf-8-sig", "utf-8", "cp1252")), "replace")


def _separated(chance: random.Random, data: bytes) -> bytes:
    old = next(part for part in (b"::", b"\t", b"|", b";", b",", b" ") if part in data + b" ")
    return data.replace(old, chance.choice((b",", b"\t", b"::", b":", b" ", b";")), chance.choice((1, 2, -1)))


def _quoted(chance: random.Random, data: bytes) -> bytes:
    """A quote that opens, closes, or stands in a field; fields in quotes; newlines within."""
    at = chance.randrange(len(data) + 1)
    end = chance.randrange(at, len(data) + 1)
    kind = chance.randrange(4)
    if kind == 0:
        return data[:at] + b'"' + data[at:]
    if kind == 1:
        return data[:at] + b'"' + data[at:end] + b'"' + data[end:]
    old = chance.choice((b"1", b"\n", b"a", b","))
    return data.replace(old, b'"' + old + (b'"' if kind == 2 else b'""'), chance.choice((1, 2, -1)))


BYTE_MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bytes changed": _bytes_changed,
    "bytes changed again": _bytes_changed,
    "strange byte": _inserted,
    "lines changed": _lines_changed,
    "end changed": _end_changed,
    "begin changed": _begin_changed,
    "line ends": _line_ends_changed,
    "encoding": _encoded,
    "separator": _separated,
    "quotes": _quoted,
    "quotes again": _quoted,
    "cut": lambda chance, data: data[: chance.randrange(len(data) + 1)],
    "nothing but blanks": lambda chance, data: chance.choice((b"", b"\n", b" ", b"\xef\xbb\xbf", b"\n\n\n", b"\r\n")),
}

"""Interactions written in many forms, and a plain reading of them."""

import csv
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa

Rows = list[dict[str, Any]]
Sequences = dict[str, list[tuple[str, int, float | None]]]


class Form(NamedTuple):
    """A file, the rows that it has, and what its entry says of them."""

    name: str
    content: str | bytes
    rows: Rows
    said: dict[str, Any]


def form(name: str, content: str | bytes, rows: Rows, **said: Any) -> Form:
    return Form(name, content, rows, said)


ALL = ("user", "item", "rating", "time")
NAMES = ["userId", "movieId", "rating", "timestamp"]
OURS = ["user", "item", "rating", "timestamp"]
START = 1_500_000_000


def some(num_items: int = 140, least: int = 4) -> Rows:
    """Interactions of 9 users in the order of time: user, item, rating, time."""
    chance = random.Random(7)
    rows = [
        {"user": user, "item": item, "rating": chance.randint(1, 10) / 2, "time": START + chance.randint(0, 10**7)}
        for user in range(11, 20)
        for item in chance.sample(range(1000, 1000 + num_items), chance.randint(least, 19))
    ]
    return sorted(rows, key=lambda row: row["time"])


def changed(rows: Rows, **change: Callable[[Any], Any]) -> Rows:
    """The same with other values of some columns."""
    return [row | {name: other(row[name]) for name, other in change.items()} for row in rows]


def plain(rows: Rows, timed: bool = True) -> Sequences:
    """The sequences, by user: what an entry has to give of rows in the file's order."""
    if timed:
        seen: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in rows:
            seen.setdefault(tuple(row.values()), row)
        rows = sorted(seen.values(), key=lambda row: row["time"])
    found: Sequences = {}
    for row in rows:
        time = int(row["time"]) if timed else 0
        found.setdefault(str(row["user"]), []).append((str(row["item"]), time, row.get("rating")))
    return {user: sequence for user, sequence in found.items() if len(sequence) >= 3}


def values(rows: Rows, *names: str) -> list[list[Any]]:
    return [[row[name] for name in names] for row in rows]


def text(rows: list[list[Any]], separator: str = ",", header: list[str] | None = None, **settings: Any) -> str:
    """Delimited text of lists of values."""
    lines = [header, *rows] if header else rows
    if len(separator) > 1:
        return "".join(separator.join(map(str, row)) + "\n" for row in lines)
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=separator, lineterminator="\n", **settings).writerows(lines)
    return buffer.getvalue()


def csv_of(rows: Rows, **change: Callable[[Any], Any]) -> str:
    """The usual columns with names, with some values written otherwise."""
    return text(values(changed(rows, **change), *ALL), header=NAMES)


def jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


def zipped(files: dict[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def column(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows]


def at(time: float) -> datetime:
    return datetime.fromtimestamp(time, UTC)


def iso(pattern: str, hours: int = 0) -> Callable[[int], str]:
    return lambda time: at(time + hours * 3600).strftime(pattern)


ROWS = some()
FEW = some(least=1)
DAYS = changed(ROWS, time=lambda time: time // 86400 * 86400)
TEXTS = changed(ROWS, user=lambda one: f"u{one:03}x", item=lambda one: f"i-{one}")
ACCENTS = changed(TEXTS, user=lambda one: f"é{one}")
AMAZON = changed(ROWS, user=lambda one: f"A{one:012}X", item=lambda one: f"B{one:09}" if one % 3 else f"000{one:06}X")
UNRATED: Rows = [{name: row[name] for name in ("user", "item", "time")} for row in ROWS]
PAIRS = {"user": column(ROWS, "user"), "item": column(ROWS, "item")}
CSV, LINES = csv_of(ROWS), text(values(ROWS, *ALL))
AGAIN = LINES[: LINES.index("\n", 300) + 1]
QUOTED = {"quoting": csv.QUOTE_ALL}
INNER = [{"user": 19, "item": one, "rating": 5, "time": 16 * 10**8} for one in ("1139", '1"138')]
BEAUTY = ["user_id", "parent_asin", "rating", "timestamp"]
RECBOLE = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
LETTERS = [[*row, *"abcdefgh"] for row in values(ROWS, *ALL)]
REVIEWS_2023 = [
    {"rating": row["rating"], "title": 'Good, \u2028 "new"', "text": "# a: b", "images": [], "asin": f"x{row['item']}"}
    | {"parent_asin": row["item"], "user_id": row["user"], "timestamp": row["time"] * 1000, "helpful_vote": 0}
    for row in AMAZON
]
REVIEWS_2018 = [
    {"overall": row["rating"], "vote": "3", "reviewTime": "09 13, 2009", "reviewerID": row["user"], "asin": row["item"]}
    | {"reviewerName": "N", "style": {"a": 1}, "unixReviewTime": row["time"]}
    for row in AMAZON
]


def map_to(*names: str | int) -> dict[str, str | int]:
    return dict(zip(OURS, names, strict=True))


def old(time: int) -> int:
    """A few times before 1970."""
    return -5 - time % 7 if time % 9 == 0 else time


FORMS: dict[str, Form] = {
    "csv with names": form("a.csv", CSV, ROWS, separator=",", header=True, columns=OURS, quotes=None, time=None),
    "csv without names": form("a.csv", LINES, ROWS, header=False, columns=OURS),
    "tab with names": form("a.tsv", text(values(ROWS, *ALL), "\t", NAMES), ROWS, separator="\t", header=True),
    "MovieLens 100K": form("u.data", text(values(ROWS, *ALL), "\t"), ROWS, separator="\t", header=False),
    "two colons": form("ratings.dat", text(values(ROWS, *ALL), "::"), ROWS, separator="::", header=False),
    "semicolons": form("a.csv", text(values(ROWS, *ALL), ";", NAMES), ROWS, separator=";", header=True),
    "bars": form("a.txt", text(values(ROWS, *ALL), "|", NAMES), ROWS, separator="|", header=True),
    "blanks": form("a.txt", text(values(ROWS, *ALL), " "), ROWS, separator=" ", header=False),
    "quotes": form("a.csv", text(values(ROWS, *ALL), header=NAMES, **QUOTED), ROWS, quotes=None),
    "tab with quotes": form("a.tsv", text(values(ROWS, *ALL), "\t", NAMES, **QUOTED), ROWS, quotes=True),
    "inner quotes": form("a.csv", CSV.replace("\n", ',5" disc\n'), ROWS, quotes=False),
    "late inner quotes": form(
        "a.csv", CSV + "".join(f"19,{row['item']},5,{row['time']}\n" for row in INNER),
        [*changed(ROWS, item=str), *INNER], quotes=False,
    ),
    "a mark and Windows' line ends": form("a.csv", "\ufeff" + CSV.replace("\n", "\r\n"), ROWS, header=True),
    "no last line end": form("a.csv", CSV.rstrip(), ROWS),
    "latin-1": form("a.csv", csv_of(ACCENTS).encode("latin-1"), ACCENTS, encoding="latin-1"),
    "utf-8": form("a.csv", csv_of(ACCENTS), ACCENTS, encoding=None),
    "text ids": form("a.csv", csv_of(TEXTS), TEXTS, header=True),
    "text ids without names": form("a.csv", text(values(TEXTS, *ALL)), TEXTS, header=False),
    "leading zeros": form("a.csv", csv_of(changed(ROWS, item="0{}".format)), changed(ROWS, item="0{}".format)),
    "milliseconds": form("a.csv", csv_of(ROWS, time=lambda time: time * 1000 + 7), ROWS, time="ms"),
    "microseconds": form("a.csv", csv_of(ROWS, time=lambda time: time * 10**6 + 7), ROWS, time="us"),
    "decimals": form("a.csv", csv_of(ROWS, time="{}.25".format), ROWS, time="decimal-s"),
    "decimals that are none": form("a.csv", csv_of(ROWS, time="{}.0".format), ROWS, time=None),
    "ISO with Z": form("a.csv", csv_of(ROWS, time=iso("%Y-%m-%dT%H:%M:%SZ")), ROWS, time="iso", zone=None),
    "ISO with an offset": form("a.csv", csv_of(ROWS, time=iso("%Y-%m-%d %H:%M:%S+02:00", 2)), ROWS, time="iso"),
    "ISO without a zone": form("a.csv", csv_of(ROWS, time=iso("%Y-%m-%d %H:%M:%S")), ROWS, time="iso", zone="UTC"),
    "dates": form("a.csv", csv_of(DAYS, time=iso("%Y-%m-%d")), DAYS, time="iso", zone="UTC"),
    "ISO without names": form(
        "a.csv", csv_of(ROWS, time=iso("%Y-%m-%dT%H:%M:%SZ")).partition("\n")[2], ROWS, header=False, time="iso"
    ),
    "no ratings": form(
        "a.csv", text(values(ROWS, "user", "item", "time"), header=["uid", "sku", "ts"]), UNRATED,
        columns=["user", "item", "timestamp"],
    ),
    "no ratings and names": form(
        "a.csv", text(values(ROWS, "user", "item", "time")), UNRATED, columns=["user", "item", "timestamp"]
    ),
    "no times": form("a.csv", text(values(ROWS, *ALL[:3]), header=NAMES[:3]), ROWS, time="none"),
    "pairs": form("a.csv", text(values(ROWS, *ALL[:2])), UNRATED, columns=["user", "item"], time="none"),
    "another order": form(
        "a.csv", text(values(ROWS, *ALL[::-1]), header=["date", "stars", "asin", "customer_id"]), ROWS,
        columns=map_to("customer_id", "asin", "stars", "date"),
    ),
    "another order, no names": form(
        "a.csv", text(values(ROWS, "time", *ALL[:3])), ROWS, columns=map_to(2, 3, 4, 1)
    ),
    "more columns": form("a.csv", CSV.replace("\n", ",note\n"), ROWS, columns=[*OURS, "note"]),
    "many columns": form(
        "a.csv", text(LETTERS, header=[*NAMES, *(f"c{place}" for place in range(8))]), ROWS, columns=map_to(*NAMES)
    ),
    "many columns, no names": form("a.csv", text(LETTERS), ROWS, columns=map_to(1, 2, 3, 4)),
    "an index, and a name twice": form(
        "a.csv", text([[0, *row, 1] for row in values(ROWS, *ALL)], header=["", *NAMES, "userId"]), ROWS,
        columns=map_to(2, 3, 4, 5),
    ),
    "Amazon 2014, ratings": form("ratings_Beauty.csv", text(values(AMAZON, *ALL)), AMAZON, columns=OURS),
    "Amazon 2018, ratings": form(
        "Beauty.csv", text(values(AMAZON, "item", "user", "rating", "time")), AMAZON, columns=map_to(2, 1, 3, 4)
    ),
    "Amazon 2023, ratings": form(
        "Beauty.csv.gz",
        gzip.compress(text(values(changed(AMAZON, time=lambda time: time * 1000), *ALL), header=BEAUTY).encode()),
        AMAZON, time="ms", columns=OURS,
    ),
    "Amazon 2023, reviews": form("Beauty.jsonl", jsonl(REVIEWS_2023), AMAZON, time="ms", columns=map_to(*BEAUTY)),
    "Amazon 2018, reviews": form(
        "Beauty.json.gz", gzip.compress(jsonl(REVIEWS_2018).encode()), AMAZON,
        columns=map_to("reviewerID", "asin", "overall", "unixReviewTime"),
    ),
    "RecBole": form("a.inter", text(values(ROWS, *ALL), "\t", RECBOLE), ROWS, columns=OURS),
    "Book-Crossing": form(
        "BX-Book-Ratings.csv", text(values(TEXTS, *ALL[:3]), ";", ["User-ID", "ISBN", "Book-Rating"], **QUOTED), TEXTS,
        separator=";", quotes=True, time="none",
    ),
    "gz": form("a.csv.gz", gzip.compress(CSV.encode()), ROWS, path="a.csv"),
    "zst": form("a.csv.zst", pa.compress(CSV.encode(), codec="zstd", asbytes=True), ROWS, path="a.csv"),
    "zip": form("a.zip", zipped({"in/a.csv": CSV, "README.txt": "What this is.\n"}), ROWS, path="in/a.csv"),
    "JSON lines": form("a.jsonl", jsonl(ROWS), ROWS, format="jsonl", columns=map_to(*ALL)),
    "JSON lines of our names": form(
        "a.jsonl.gz", gzip.compress(jsonl([dict(zip(OURS, row.values(), strict=True)) for row in ROWS]).encode()), ROWS,
        columns=OURS,
    ),
    "Parquet": form("a.parquet", parquet({name: column(ROWS, name) for name in ALL}), ROWS, format="parquet"),
    "Parquet of times": form(
        "a.parquet", parquet(PAIRS | {"timestamp": [at(row["time"]).replace(tzinfo=None) for row in ROWS]}), UNRATED,
        time="iso", zone="UTC", columns=["user", "item", "timestamp"],
    ),
    "Parquet of times with a zone": form(
        "a.parquet", parquet(PAIRS | {"ts": [at(row["time"]) for row in ROWS]}), UNRATED, time="iso", zone=None
    ),
    "Parquet of decimals": form(
        "a.parquet",
        parquet(PAIRS | {"user": [float(row["user"]) for row in ROWS], "time": [row["time"] + 0.5 for row in ROWS]}),
        UNRATED, time="decimal-s",
    ),
    "Parquet in a zip": form(
        "a.zip", zipped({"a.parquet": parquet({name: column(ROWS, name) for name in ALL})}), ROWS, format="parquet"
    ),
    "few rows of some users": form("a.csv", csv_of(FEW), FEW),
    "repeats": form("a.csv", csv_of(some(num_items=20)) + LINES, [*some(num_items=20), *ROWS]),
    "copies": form("a.csv", CSV + AGAIN, ROWS),
    "missing ratings": form(
        "a.csv", CSV.replace(",0.5,", ",,"), changed(ROWS, rating=lambda one: None if one == 0.5 else one)
    ),
    "ratings that are words": form("a.csv", CSV.replace(",0.5,", ",bad,"), UNRATED, columns={
        "user": "userId", "item": "movieId", "timestamp": "timestamp",
    }),
    "times of no meaning": form(
        "a.csv", csv_of(ROWS, time=lambda time: time - START), changed(ROWS, time=lambda time: time - START)
    ),
    "nanoseconds": form(
        "a.csv", csv_of(ROWS, time=lambda time: time * 10**9), changed(ROWS, time=lambda time: time * 1000), time="us"
    ),
    "before 1970": form("a.csv", csv_of(ROWS, time=old), changed(ROWS, time=old)),
}  # fmt: skip

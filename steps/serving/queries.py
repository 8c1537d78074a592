"""Files that ask for many recommendations: csv, json or jsonl."""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps.common.cli import StepError
from steps.common.files import read_json, read_jsonl, reading
from steps.serving.forms import history_of
from steps.serving.recommender import History
from steps.serving.run import Users
from steps.serving.titles import ID, Catalogue

_REMEDY = "give it as docs/recommend.md says"
_CSV = "a column user, or the columns history and title (or item, an id), and perhaps timestamp"


@dataclass(frozen=True)
class Query:
    """What recommendations are asked for.

    name: the user's id, the history's name, or its number in the file. understood: what typed titles were taken for.
    """

    name: str
    history: History
    understood: dict[str, str] = field(default_factory=dict)


def read_queries(path: Path, catalogue: Catalogue, users: Users) -> list[Query]:
    """The queries of a file, in its order. Raises StepError that names the file and the line or entry.

    json: a list of objects, and jsonl: an object a line, each with `user`, or with `history` as `history_of` reads it.
    csv: a column `user`; or a row for each item of a history, in the order of time, with its `history`, a name, and
    `title` or `item`, the raw data's id, and perhaps `timestamp`.
    """
    if path.suffix == ".csv":
        found = _of_csv(path, catalogue, users)
    elif path.suffix in (".json", ".jsonl"):
        objects = read_json(path, list, _REMEDY) if path.suffix == ".json" else read_jsonl(path, _REMEDY)
        found = [
            _located(f"{path}, entry {number}", _of_object, one, str(number), catalogue, users)
            for number, one in enumerate(objects, start=1)
        ]
    else:
        raise StepError(f"{path}: .csv, .json and .jsonl are read; {_REMEDY}")
    if not found:
        raise StepError(f"{path} asks for nothing; {_REMEDY}")
    return found


def _located(where: str, read: Callable[..., Any], *given: Any) -> Any:
    """What `read` gives; a StepError of it says where."""
    try:
        return read(*given)
    except StepError as error:
        raise StepError(f"{where}: {error}") from error


def _of_object(content: Any, name: str, catalogue: Catalogue, users: Users) -> Query:
    if isinstance(content, dict) and "user" in content:
        if len(content) > 1:
            raise StepError("a user's history is that of the data; leave out the other keys")
        return Query(str(content["user"]), users.history(str(content["user"])))
    return Query(name, *history_of(content, catalogue))


def _of_csv(path: Path, catalogue: Catalogue, users: Users) -> list[Query]:
    with reading(path, _REMEDY), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        columns = list(reader.fieldnames or [])
        rows = [(reader.line_num, row) for row in reader]
    ragged = next((line for line, row in rows if None in row or None in row.values()), None)
    if ragged:
        raise StepError(f"{path}, line {ragged}: it has not as many fields as the first line")
    if columns == ["user"]:
        return [Query(row["user"], _located(f"{path}, line {line}", users.history, row["user"])) for line, row in rows]
    kind = {"title", "item"} & {*columns}
    if len(kind) != 1 or {*columns} - {"timestamp"} != {"history", *kind}:
        raise StepError(f"{path}, line 1: {_CSV} are wanted, found {', '.join(columns)}")
    key = kind.pop()
    find = catalogue.find if key == "title" else catalogue.with_id
    items: dict[str, list[int]] = {}
    texts: dict[str, list[str]] = {}
    times: dict[str, list[int]] = {}
    for line, row in rows:
        items.setdefault(row["history"], []).append(_located(f"{path}, line {line}", find, row[key]))
        texts.setdefault(row["history"], []).append(row[key] if key == "title" else f"{ID}{row[key]}")
        if "timestamp" in row:
            if not row["timestamp"].isdecimal():
                raise StepError(
                    f"{path}, line {line}: timestamp {row['timestamp']!r}: whole seconds since 1970, please"
                )
            times.setdefault(row["history"], []).append(int(row["timestamp"]))
    return [
        Query(
            name,
            _located(f"{path}, history {name!r}", History, found, times.get(name)),
            catalogue.understood(texts[name], found),
        )
        for name, found in items.items()
    ]

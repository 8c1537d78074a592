"""What the keys of an entry of params/datasets.yaml have to do with each other, which its schema cannot say."""

import re
import zoneinfo
from collections.abc import Mapping
from datetime import date
from typing import Any

from steps.common.cli import StepError

_KEYS = {"interactions": ("user", "item"), "items": ("item",), "users": ("user",)}
#: What an entry may state of a data set for its card, and what else the card tells of it as it stands there.
STATED = ("licence", "citation", "url", "version", "published")
TOLD = ("title", "source", *STATED)
_PACKED = (".gz", ".zst")
_MEANT = ("user", "item", "rating", "timestamp")
_OWN = ("row", *_MEANT, "title")  # which no level is called
#: Keys of `checks` and `filters`, and the columns that they are about.
_ABOUT = {
    "rating": "rating",
    "rating_step": "rating",
    "missing_ratings": "rating",
    "min_rating": "rating",
    "time": "timestamp",
}


def check_dataset(file: str, name: str, entry: Mapping[str, Any]) -> None:
    """Raise StepError that names the file and the key if an entry contradicts itself."""
    for table, settings in entry["files"].items():
        where = f"{file}, key {name}.files.{table}"
        _check_table(where, settings)
        columns = settings["columns"]
        for key in _KEYS[table]:
            if key not in columns:
                raise StepError(f"{where}.columns: lacks {key!r}; call the column so")
        for feature, kind in settings.get("features", {}).items():
            source = kind.get("of", feature) if isinstance(kind, Mapping) else feature
            if source not in columns:
                raise StepError(f"{where}.features: {source!r} is none of its columns")
            if source != feature and feature in columns:
                raise StepError(f"{where}.features: {feature!r} is a column, and cannot be made of {source!r} too")
            if isinstance(kind, Mapping) and "pattern" in kind:
                _check_pattern(f"{where}.features.{feature}.pattern", kind["pattern"])
    _check_about(f"{file}, key {name}.files.interactions", entry)
    rules = {f"filters.{place}": rule for place, rule in enumerate(entry.get("filters", []))}
    for key, rule in {"checks": entry["checks"], **rules}.items():
        for bounds in [bounds for bounds in ("rating", "time") if bounds in rule]:
            _check_bounds(f"{file}, key {name}.{key}.{bounds}", *rule[bounds])


def _check_pattern(where: str, pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise StepError(f"{where}: {pattern!r} is no regular expression: {error}") from error
    if groups != 1:
        raise StepError(f"{where}: {pattern!r} has {groups} groups; one is the value")


def _check_about(where: str, entry: Mapping[str, Any]) -> None:
    """The interactions have the columns that checks and filters are about, and times or the file's order."""
    table = entry["files"]["interactions"]
    _check_levels(where, table)
    rules = [(f"checks.{key}", _ABOUT[key]) for key in entry["checks"] if key in _ABOUT]
    made = ["rating"] if "levels" in table else []
    for place, rule in enumerate(entry.get("filters", [])):
        about = [*rule.get("first_of", []), *(_ABOUT[key] for key in rule if key in _ABOUT)]
        rules += [(f"filters.{place}", column) for column in about if column not in made]
    for rule, column in rules:
        if column not in table["columns"]:
            raise StepError(f"{where}.columns: lacks {column!r}, which {rule} is about")
    timed = "timestamp" in table["columns"]
    if timed and table.get("time") == "none":
        raise StepError(f"{where}.time: is none, where `columns` has timestamp; say how times are written")
    if not timed and table.get("time") != "none":
        raise StepError(
            f"{where}.columns: lacks 'timestamp'; call the column so, or set `time: none` to take the file's order"
        )
    if not timed and entry["ties"] != "file-order":
        raise StepError(f"{where}.time: is none, so that there is no other order than `ties: file-order`")


def _check_levels(where: str, table: Mapping[str, Any]) -> None:
    """Levels are columns, and all that ratings are made of."""
    for name in table.get("levels", []):
        if name not in table["columns"] or name in _OWN:
            raise StepError(f"{where}.levels: {name!r} is none of `columns` that has no other meaning; name such a one")
    if "levels" in table and "rating" in table["columns"]:
        raise StepError(f"{where}.levels: are what ratings are made of, where `columns` has rating; take one of both")


def _check_bounds(where: str, low: float | str, high: float | str) -> None:
    try:
        in_order = _number(low) <= _number(high)
    except ValueError as error:
        raise StepError(f"{where}: {error}; a date is such as 2020-02-29") from error
    if not in_order:
        raise StepError(f"{where}: {low} is more than {high}; name the least first")


def _number(bound: float | str) -> float:
    """A number, or a date in seconds since 1970."""
    return (date.fromisoformat(bound) - date(1970, 1, 1)).days * 86400 if isinstance(bound, str) else bound


def _check_table(where: str, table: Mapping[str, Any]) -> None:
    for path in [table["path"]] if isinstance(table["path"], str) else table["path"]:
        if path.endswith(_PACKED):
            unpacked = path.rpartition(".")[0]
            raise StepError(f"{where}.path: download unpacks the file; name what it holds, {unpacked}")
    columns, text = table["columns"], table.get("format", "text") == "text"
    for ours, there in columns.items() if isinstance(columns, Mapping) else []:
        if isinstance(there, int) and not text:
            raise StepError(f"{where}.columns: {ours} is at place {there}; {table['format']} has names, not places")
        if isinstance(there, str) and text and not table["header"]:
            raise StepError(f"{where}.columns: {ours} is {there!r}; with `header: false` give its place, from 1")
    meant = [columns[name] for name in _MEANT if name in columns] if isinstance(columns, Mapping) else []
    for there in meant:
        if meant.count(there) > 1:
            raise StepError(f"{where}.columns: two of them are taken from {there!r}; each has a place of its own")
    if "zone" in table:
        if table.get("time") != "iso":
            raise StepError(f"{where}.zone: is of `time: iso` alone; other times are since 1970 in UTC")
        if table["zone"] not in zoneinfo.available_timezones():
            raise StepError(f"{where}.zone: {table['zone']!r} is no time zone; one is Europe/Berlin, another UTC")

"""Blocks of a raw table's rows, and what the entry of the table calls its columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

#: The columns that are more than features, in the order of typed tables.
COLUMNS = ("user", "item", "rating", "timestamp", "title")
#: Characters of a header that a message repeats.
SHOWN = 120


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


def paths(table: Mapping[str, Any]) -> list[str]:
    """The files of a table, in the order of their rows."""
    return [table["path"]] if isinstance(table["path"], str) else [*table["path"]]


def wanted_columns(table: Mapping[str, Any]) -> list[str]:
    """The columns of a table that are read: those with a meaning of their own, and what its ratings and features are
    made of."""
    sources = feature_columns(table.get("features", {})).values()
    return [name for name in named_columns(table) if name in (*COLUMNS, *table.get("levels", []), *sources)]


def feature_columns(features: Mapping[str, Any]) -> dict[str, str]:
    """The column that each of a table's features is made of: its own, or the one that it is found in."""
    return {name: name if isinstance(kind, str) else kind.get("of", name) for name, kind in features.items()}

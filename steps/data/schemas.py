"""What valid rows are, as pandera schemas, and their failures as a readable report.

Frames are collected before they are checked: on a lazy frame pandera looks at the schema alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pandera.polars as pa
import polars as pl

from steps.common.cli import StepError
from steps.data.values import TICKS, TIME_WORDS

#: How many rows a message names of those that fail a check.
EXAMPLES = 5
#: Times that are taken for mistakes, unless `checks.time` says otherwise.
USUAL_TIMES = ("1970-01-01", "2100-01-01")
_EMPTY = "(empty)"


@dataclass
class Check:
    """What a column must be, and how many rows are not: up to five of them, with the file's text."""

    column: str
    check: str
    path: str = ""  # of the file, where it is another than the interactions'
    failures: int = 0
    examples: list[tuple[int, str]] = field(default_factory=list)

    def add(self, failures: int, examples: Iterable[tuple[int, str]]) -> None:
        """Count more rows that are not."""
        self.failures += failures
        self.examples = [*self.examples, *examples][:EXAMPLES]

    def __str__(self) -> str:
        examples = ", ".join(f"row {row}: {text}" for row, text in self.examples)
        more = ", ..." if self.failures > len(self.examples) else ""
        rows = "1 row is not" if self.failures == 1 else f"{self.failures} rows are not"
        return f"{self.column} must be {self.check}: {rows} ({examples}{more})"


class Report:
    """Every check, with what failed so far."""

    def __init__(self) -> None:
        self.checks: dict[tuple[str, str, str], Check] = {}

    def check(self, column: str, check: str, path: str = "") -> Check:
        """The check of that name of a file, new if there was none."""
        return self.checks.setdefault((path, column, check), Check(column, check, path))

    def validate(self, frame: pl.DataFrame, schema: pa.DataFrameSchema, texts: pl.DataFrame, path: str = "") -> None:
        """Add what is wrong with `frame` by `schema`. texts: its rows as they are in the file, with `row`."""
        try:
            schema.validate(frame, lazy=True)
            failures = None
        except pa.errors.SchemaErrors as error:
            failures = error.failure_cases
        known = 0
        for column, names in _check_names(schema).items():
            for name in names:
                failed = pl.DataFrame() if failures is None else _failed(failures, column, name)
                places = [int(index) for index in failed["index"].head(EXAMPLES)] if len(failed) else []
                examples = [(int(texts["row"][place]), shown(texts[column][place])) for place in places]
                self.check(column, _words(schema, column, name), path).add(len(failed), examples)
                known += len(failed)
        if failures is not None and known < len(failures):
            raise StepError(f"unexpected schema failure: {failures.to_dicts()[0]}")

    @property
    def as_json(self) -> list[dict[str, Any]]:
        """Every check once, whichever files it was made of."""
        failures: dict[tuple[str, str], int] = {}
        for check in self.checks.values():
            key = (check.column, check.check)
            failures[key] = failures.get(key, 0) + check.failures
        return [{"column": column, "check": check, "failures": number} for (column, check), number in failures.items()]

    def problems(self) -> list[str]:
        """A sentence for each check that failed."""
        return [str(check) for check in self.checks.values() if check.failures]


def interactions_schema(checks: Mapping[str, Any], table: Mapping[str, Any], columns: list[str]) -> pa.DataFrameSchema:
    """The schema of interactions, row by row. checks, table: as in params/datasets.yaml. columns: those that it has."""
    time = table.get("time", "s")
    schema = {"row": pa.Column(pl.UInt32, nullable=True)}
    for name in ("user", "item"):
        schema[name] = pa.Column(nullable=False, description="not empty")
    if "timestamp" in columns:
        bounds = [str(bound) for bound in checks.get("time", USUAL_TIMES)]
        low, high = (ticks_of(bound, time) for bound in bounds)
        inside = pa.Check.in_range(low, high, error=f"from {bounds[0]} to {bounds[1]}")
        schema["timestamp"] = pa.Column(pl.Int64, nullable=False, checks=inside, description=TIME_WORDS[time])
    if "rating" in columns:
        rating = []
        if "rating" in checks:
            low, high = checks["rating"]
            rating.append(pa.Check.in_range(low, high, error=f"from {low} to {high}"))
        if "rating_step" in checks:
            rating.append(_multiple_of(checks["rating_step"]))
        missing = checks.get("missing_ratings", False)
        schema["rating"] = pa.Column(pl.Float64, nullable=missing, checks=rating, description="a number")
    for name in table.get("levels", []):
        either = pa.Check.isin([0.0, 1.0], error="0 or 1")
        schema[name] = pa.Column(pl.Float64, nullable=False, checks=either, description="0 or 1")
    return pa.DataFrameSchema(schema)


def features_schema(features: Mapping[str, Any]) -> pa.DataFrameSchema:
    """The schema of an items or users file's `features`, as in params/datasets.yaml: none has a missing value."""
    return pa.DataFrameSchema(
        {
            name: pa.Column(
                pl.String,
                nullable=False,
                checks=[_separated(kind["categories"])] if "categories" in kind else [],
                description=f"what {kind['pattern']} finds" if "pattern" in kind else "not empty",
            )
            for name, kind in features.items()
        }
    )


def ticks_of(bound: str | int, time: str) -> int:
    """A date, as YYYY-MM-DD, or a number of seconds since 1970, in ticks of a way to write times."""
    text = str(bound)
    if text.lstrip("-").isdigit():
        return int(text) * TICKS[time]
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * TICKS[time]


def shown(value: Any) -> str:
    """A value of a file in a message."""
    if value is None:
        return _EMPTY
    text = str(value)
    return text if text.isprintable() and text == text.strip() and text else repr(text)


def _separated(separator: str) -> pa.Check:
    return pa.Check(
        lambda data: data.lazyframe.select(~pl.col(data.key).str.split(separator).list.contains("")),
        name=f"values separated by {separator!r}",
    )


def _multiple_of(step: float) -> pa.Check:
    """Within a billionth of a step, as few decimal fractions are binary ones."""
    steps = pl.first() / step
    return pa.Check(
        lambda data: data.lazyframe.select(pl.col(data.key)).select((steps - steps.round()).abs() < 1e-9),
        name=f"a multiple of {step}",
    )


def _check_names(schema: pa.DataFrameSchema) -> dict[str, list[str]]:
    return {
        name: ["not_nullable"] * (not column.nullable) + [_name(check) for check in column.checks]
        for name, column in schema.columns.items()
        if column.checks or not column.nullable
    }


def _name(check: pa.Check) -> str:
    return str(check.error or check.name)  # as pandera's failure cases call it


def _words(schema: pa.DataFrameSchema, column: str, name: str) -> str:
    return str(schema.columns[column].description or "not empty") if name == "not_nullable" else name


def _failed(failures: pl.DataFrame, column: str, name: str) -> pl.DataFrame:
    in_column = (pl.col("schema_context") == "Column") & (pl.col("column") == column)
    return failures.filter(in_column & (pl.col("check") == name))

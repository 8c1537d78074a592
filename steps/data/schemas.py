"""What valid interactions are, as a pandera schema, and its failures as a readable report.

Frames are collected before they are checked: on a lazy frame pandera looks at the schema alone.
"""

from collections.abc import Mapping
from typing import Any

import pandera.polars as pa
import polars as pl

from steps.common.cli import StepError

_EXAMPLES = 5
_EMPTY = "(empty)"
_WHOLE_ROW = "user, item"  # the column that is reported for a check of whole rows
_ONCE = "once per user and item"
_FIELDS = {_ONCE: ["user", "item"]}  # the fields that such a check is about; otherwise the user


def interactions_schema(checks: dict[str, Any], known: Mapping[str, pl.Series]) -> pa.DataFrameSchema:
    """The schema of interactions: `checks` as in params/datasets.yaml; `known` has the ids of the files `items` and
    `users`, of those that there are."""
    columns = {
        "row": pa.Column(pl.UInt32),
        "user": pa.Column(nullable=False, checks=_in_file(known, "users")),
        "item": pa.Column(nullable=False, checks=_in_file(known, "items")),
        "timestamp": pa.Column(pl.Int64, nullable=False, checks=pa.Check.ge(0)),
    }
    if "rating" in checks:
        low, high = checks["rating"]
        rating_checks = [pa.Check.in_range(low, high)]
        if "rating_step" in checks:
            rating_checks.append(_multiple_of(checks["rating_step"]))
        columns["rating"] = pa.Column(pl.Float32, nullable=False, checks=rating_checks)
    frame_checks = [_enough_per_user(checks["min_user_interactions"])]
    if checks.get("unique_user_item"):
        frame_checks.append(_unique_user_item())
    return pa.DataFrameSchema(columns, checks=frame_checks)


def features_schema(features: Mapping[str, Any]) -> pa.DataFrameSchema:
    """The schema of an items or users file's `features`, as in params/datasets.yaml: none has a missing value."""
    return pa.DataFrameSchema(
        {
            name: pa.Column(
                pl.String, nullable=False, checks=[] if kind == "category" else [_separated(kind["categories"])]
            )
            for name, kind in features.items()
        }
    )


def validate(frame: pl.DataFrame, schema: pa.DataFrameSchema) -> list[dict[str, Any]]:
    """Every check of `schema` on `frame`: name, number of failures, and the rows of up to five of them."""
    try:
        schema.validate(frame, lazy=True)
        failures = None
    except pa.errors.SchemaErrors as error:
        failures = error.failure_cases
    report: list[dict[str, Any]] = []
    for column, names in _check_names(schema).items():
        for name in names:
            failed = pl.DataFrame() if failures is None else _failed(failures, column, name)
            report.append({"column": column, "check": name, "failures": len(failed), "rows": _rows(failed, frame)})
    known = sum(check["failures"] for check in report)
    if failures is not None and known < len(failures):
        raise StepError(f"unexpected schema failure: {failures.to_dicts()[0]}")
    return report


def describe(report: list[dict[str, Any]], texts: pl.DataFrame) -> str:
    """The failed checks of `validate`'s report in one line; empty if none failed.

    texts: the table's fields as they are in the file, by column and `row`. A value that does not parse is kept nowhere
    else.
    """
    parts = []
    for check in report:
        if check["failures"]:
            examples = ", ".join(f"row {row}: {_text(texts, row, check)}" for row in check["rows"])
            more = ", ..." if check["failures"] > len(check["rows"]) else ""
            parts.append(
                f"{check['column']} must be {check['check']}: {check['failures']} rows are not ({examples}{more})"
            )
    return "; ".join(parts)


def _text(texts: pl.DataFrame, row: int, check: dict[str, Any]) -> str:
    """The file's own text where a check failed."""
    found = texts.row(row - int(texts["row"][0]), named=True)
    fields = _FIELDS.get(check["check"], ["user"]) if check["column"] == _WHOLE_ROW else [check["column"]]
    shown = [_EMPTY if found[name] is None else _printable(found[name]) for name in fields]
    if check["column"] != _WHOLE_ROW:
        return shown[0]
    return ", ".join(f"{name} {text}" for name, text in zip(fields, shown, strict=True))


def _printable(text: str) -> str:
    return text if text.isprintable() and text == text.strip() and text else repr(text)


def _in_file(known: Mapping[str, pl.Series], file: str) -> list[pa.Check]:
    if file not in known:
        return []
    ids = known[file].implode()
    return [pa.Check(lambda data: data.lazyframe.select(pl.col(data.key).is_in(ids)), name=f"in the {file} file")]


def _separated(separator: str) -> pa.Check:
    return pa.Check(
        lambda data: data.lazyframe.select(~pl.col(data.key).str.split(separator).list.contains("")),
        name=f"values separated by {separator!r}",
    )


def _multiple_of(step: float) -> pa.Check:
    return pa.Check(lambda data: data.lazyframe.select(pl.col(data.key) % step == 0), name=f"multiple of {step}")


def _enough_per_user(minimum: int) -> pa.Check:
    return pa.Check(
        lambda data: data.lazyframe.select(pl.len().over("user") >= minimum), name=f"{minimum} rows or more per user"
    )


def _unique_user_item() -> pa.Check:
    return pa.Check(lambda data: data.lazyframe.select(pl.struct("user", "item").is_first_distinct()), name=_ONCE)


def _check_names(schema: pa.DataFrameSchema) -> dict[str, list[str]]:
    names = {
        name: ["not null"] * (not column.nullable) + [_name(check) for check in column.checks]
        for name, column in schema.columns.items()
    }
    return names | {_WHOLE_ROW: [_name(check) for check in schema.checks]}


def _name(check: pa.Check) -> str:
    return str(check.error or check.name)  # as pandera's failure cases call it


def _failed(failures: pl.DataFrame, column: str, name: str) -> pl.DataFrame:
    check = "not_nullable" if name == "not null" else name
    in_column = pl.col("schema_context") == "Column" if column != _WHOLE_ROW else pl.col("schema_context") != "Column"
    if column != _WHOLE_ROW:
        in_column &= pl.col("column") == column
    return failures.filter(in_column & (pl.col("check") == check))


def _rows(failed: pl.DataFrame, frame: pl.DataFrame) -> list[int]:
    return [int(frame["row"][index]) for index in failed["index"].head(_EXAMPLES)] if len(failed) else []

"""What valid interactions are, as a pandera schema, and its failures as one readable account.

Frames are collected before they are checked: on a lazy frame pandera looks at the schema alone.
"""

from typing import Any

import pandera.polars as pa
import polars as pl

from steps.common.cli import StepError

_EXAMPLES = 5


def interactions_schema(checks: dict[str, Any], catalogue: pl.Series | None) -> pa.DataFrameSchema:
    """The schema of interactions: `checks` as in params/datasets.yaml; `catalogue` holds the known item ids."""
    columns = {
        "row": pa.Column(pl.UInt32),
        "user": pa.Column(nullable=False),
        "item": pa.Column(nullable=False, checks=[] if catalogue is None else [_in_catalogue(catalogue)]),
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


def validate(frame: pl.DataFrame, schema: pa.DataFrameSchema) -> list[dict[str, Any]]:
    """Every check of `schema` on `frame`: name, number of failures, and up to five examples (row, value)."""
    try:
        schema.validate(frame, lazy=True)
        failures = None
    except pa.errors.SchemaErrors as error:
        failures = error.failure_cases
    account: list[dict[str, Any]] = []
    for column, names in _check_names(schema).items():
        for name in names:
            failed = pl.DataFrame() if failures is None else _failed(failures, column, name)
            account.append(
                {"column": column, "check": name, "failures": len(failed), "examples": _examples(failed, frame)}
            )
    known = sum(check["failures"] for check in account)
    if failures is not None and known < len(failures):
        raise StepError(f"unexpected schema failure: {failures.to_dicts()[0]}")
    return account


def describe(account: list[dict[str, Any]]) -> str:
    """The failed checks of `validate`'s account in one line; empty if none failed."""
    parts = []
    for check in account:
        if check["failures"]:
            examples = ", ".join(f"row {example['row']}: {example['value']}" for example in check["examples"])
            more = ", ..." if check["failures"] > len(check["examples"]) else ""
            parts.append(
                f"{check['column']} must be {check['check']}: {check['failures']} rows are not ({examples}{more})"
            )
    return "; ".join(parts)


def _in_catalogue(catalogue: pl.Series) -> pa.Check:
    return pa.Check(
        lambda data: data.lazyframe.select(pl.col(data.key).is_in(catalogue.implode())), name="in the items file"
    )


def _multiple_of(step: float) -> pa.Check:
    return pa.Check(lambda data: data.lazyframe.select(pl.col(data.key) % step == 0), name=f"multiple of {step}")


def _enough_per_user(least: int) -> pa.Check:
    return pa.Check(
        lambda data: data.lazyframe.select(pl.len().over("user") >= least), name=f"{least} rows or more per user"
    )


def _unique_user_item() -> pa.Check:
    return pa.Check(
        lambda data: data.lazyframe.select(pl.struct("user", "item").is_first_distinct()), name="once per user and item"
    )


def _check_names(schema: pa.DataFrameSchema) -> dict[str, list[str]]:
    names = {
        name: ["not null"] * (not column.nullable) + [_name(check) for check in column.checks]
        for name, column in schema.columns.items()
    }
    return names | {"user, item": [_name(check) for check in schema.checks]}


def _name(check: pa.Check) -> str:
    return str(check.error or check.name)  # as pandera's failure cases call it


def _failed(failures: pl.DataFrame, column: str, name: str) -> pl.DataFrame:
    check = "not_nullable" if name == "not null" else name
    in_column = pl.col("schema_context") == "Column" if column != "user, item" else pl.col("schema_context") != "Column"
    if column != "user, item":
        in_column &= pl.col("column") == column
    return failures.filter(in_column & (pl.col("check") == check))


def _examples(failed: pl.DataFrame, frame: pl.DataFrame) -> list[dict[str, Any]]:
    if failed.is_empty():
        return []
    return [
        {"row": int(frame["row"][case["index"]]), "value": case["failure_case"]}
        for case in failed.head(_EXAMPLES).iter_rows(named=True)
    ]

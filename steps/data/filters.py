"""Rules that leave rows out, as `filters` of an entry of params/datasets.yaml lists them: each counts what it drops.

Every rule takes the log of interactions and gives the one that it keeps. Logs are lazy frames over a file, so that
only counts of users and items are in memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

#: Makes a log that is read many times into one on disk.
Store = Callable[[pl.LazyFrame], pl.LazyFrame]


def min_rating(log: pl.LazyFrame, least: float, store: Store) -> pl.LazyFrame:
    """Rows with a rating of at least `least`."""
    return store(log.filter(pl.col("rating") >= least))


def between(log: pl.LazyFrame, bounds: list[int], store: Store) -> pl.LazyFrame:
    """Rows with a time from the first to the second of `bounds`, in ticks, both included."""
    return store(log.filter(pl.col("timestamp").is_between(bounds[0], bounds[1])))


def first_of(log: pl.LazyFrame, columns: list[str], store: Store) -> pl.LazyFrame:
    """Of rows that agree in `columns` the first in time, and of those at one time the first in the file."""
    order = log.select(*columns, "timestamp", "row") if "timestamp" not in columns else log.select(*columns, "row")
    keys = [name for name in ("timestamp", "row") if name not in columns]
    first = order.group_by(columns).agg(pl.col("row").sort_by(keys).first())
    return store(log.join(first.select("row"), on="row", how="semi", maintain_order="left"))


def min_interactions(log: pl.LazyFrame, least: Mapping[str, int], store: Store) -> pl.LazyFrame:
    """Rows whose user and item have at least as many rows as `least` says of each; both are counted before any of these
    rows is left out."""
    kept = {name: counts(log, name).filter(pl.col("len") >= number) for name, number in least.items()}
    for name, rows in kept.items():
        log = log.join(rows.lazy().select(name), on=name, how="semi", maintain_order="left")
    return store(log)


def k_core(log: pl.LazyFrame, least: Mapping[str, int], store: Store) -> pl.LazyFrame:
    """The same again and again, until every user and item that is left has as many rows."""
    while True:
        found = {name: counts(log, name) for name in least}
        if all(found[name].is_empty() or found[name]["len"].min() >= number for name, number in least.items()):  # type: ignore[operator]
            return log
        log = min_interactions(log, least, store)


RULES: dict[str, Callable[[pl.LazyFrame, Any, Store], pl.LazyFrame]] = {
    "min_rating": min_rating,
    "time": between,
    "first_of": first_of,
    "min_interactions": min_interactions,
    "k_core": k_core,
}


def counts(log: pl.LazyFrame, column: str) -> pl.DataFrame:
    """How many rows each user or item has: its id, `len`."""
    return log.group_by(column).agg(pl.len()).collect()


def size(log: pl.LazyFrame) -> dict[str, int]:
    """How many rows, users and items a log has."""
    return (
        log.select(rows=pl.len(), users=pl.col("user").n_unique(), items=pl.col("item").n_unique())
        .collect()
        .row(0, named=True)
    )


def apply(
    log: pl.LazyFrame, rules: list[dict[str, Any]], store: Store
) -> tuple[pl.LazyFrame, pl.DataFrame, list[dict[str, Any]]]:
    """The log without what the rules drop, in their order.

    Returns the log; the items that remain, before the rules at the end that look at users alone (which leave the
    catalogue as it is: arXiv 2402.17152's filter of Amazon Books); and of each rule what it is, and how many rows,
    users and items it drops.
    """
    report = []
    before = size(log) if rules else {}
    last = max((place for place, rule in enumerate(rules, 1) if not _of_users_alone(rule)), default=0)
    items = _items(log) if not last else pl.DataFrame()
    for place, rule in enumerate(rules, 1):
        ((name, value),) = rule.items()
        log = RULES[name](log, value, store)
        after = size(log)
        report.append({"rule": rule, "dropped": {key: before[key] - after[key] for key in before}})
        before = after
        if place == last:
            items = _items(log)
    return log, items, report


def _of_users_alone(rule: Mapping[str, Any]) -> bool:
    return list(rule) == ["min_interactions"] and list(rule["min_interactions"]) == ["user"]


def _items(log: pl.LazyFrame) -> pl.DataFrame:
    return log.select("item").unique().sort("item").collect()

"""Rules that leave rows out, as `filters` of an entry of params/datasets.yaml lists them: each counts what it drops.

Every rule takes the log of interactions and gives the one that it keeps. Logs are lazy frames over a file, so that
only counts of users and items are in memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

#: Makes a log that is read many times into one on disk.
Store = Callable[[pl.LazyFrame], pl.LazyFrame]
#: How many rows each `user` and each `item` of a log has: its id, `len`.
Tally = dict[str, pl.DataFrame]


def tally(log: pl.LazyFrame) -> Tally:
    """Counts of a log, which reads it once."""
    names = ("user", "item")
    return dict(zip(names, pl.collect_all(log.group_by(name).agg(pl.len()) for name in names), strict=True))


def size(counts: Tally) -> dict[str, int]:
    """How many rows, users and items a log has."""
    return {
        "rows": int(counts["user"]["len"].sum()),
        "users": len(counts["user"]),
        "items": len(counts["item"]),
    }


def min_rating(log: pl.LazyFrame, least: float, counts: Tally, store: Store) -> pl.LazyFrame:
    """Rows with a rating of at least `least`."""
    return store(log.filter(pl.col("rating") >= least))


def between(log: pl.LazyFrame, bounds: list[int], counts: Tally, store: Store) -> pl.LazyFrame:
    """Rows with a time from the first to the second of `bounds`, in ticks, both included."""
    return store(log.filter(pl.col("timestamp").is_between(bounds[0], bounds[1])))


def first_of(log: pl.LazyFrame, columns: list[str], counts: Tally, store: Store) -> pl.LazyFrame:
    """Of rows that agree in `columns` the first in time, and of those at one time the first in the file."""
    keys = [name for name in ("timestamp", "row") if name not in columns]
    first = log.group_by(columns).agg(pl.struct(keys).min().struct.field("row"))
    return store(log.join(first.select("row"), on="row", how="semi", maintain_order="left"))


def min_interactions(log: pl.LazyFrame, least: Mapping[str, int], counts: Tally, store: Store) -> pl.LazyFrame:
    """Rows whose user and item have at least as many rows as `least` says of each; both are counted before any of these
    rows is left out."""
    for name, number in least.items():
        kept = counts[name].filter(pl.col("len") >= number).select(name)
        log = log.join(kept.lazy(), on=name, how="semi", maintain_order="left")
    return store(log)


def k_core(log: pl.LazyFrame, least: Mapping[str, int], counts: Tally, store: Store) -> pl.LazyFrame:
    """The same again and again, until every user and item that is left has as many rows."""
    while any((counts[name]["len"] < number).any() for name, number in least.items()):
        log = min_interactions(log, least, counts, store)
        counts = tally(log)
    return log


RULES: dict[str, Callable[[pl.LazyFrame, Any, Tally, Store], pl.LazyFrame]] = {
    "min_rating": min_rating,
    "time": between,
    "first_of": first_of,
    "min_interactions": min_interactions,
    "k_core": k_core,
}


def apply(
    log: pl.LazyFrame, rules: list[dict[str, Any]], counts: Tally, store: Store
) -> tuple[pl.LazyFrame, Tally, pl.DataFrame, list[dict[str, Any]]]:
    """The log without what the rules drop, in their order.

    Returns the log and its counts; the items that remain, before the rules at the end that look at users alone (which
    leave the catalogue as it is: arXiv 2402.17152's filter of Amazon Books); and of each rule what it is, and how many
    rows, users and items it drops.
    """
    report = []
    items, before = counts["item"], size(counts)
    for place, rule in enumerate(rules):
        ((name, value),) = rule.items()
        log = RULES[name](log, value, counts, store)
        counts = tally(log)
        after = size(counts)
        report.append({"rule": rule, "dropped": {key: before[key] - after[key] for key in before}})
        before = after
        if not all(map(_of_users_alone, rules[place:])):
            items = counts["item"]
    return log, counts, items.select("item").sort("item"), report


def _of_users_alone(rule: Mapping[str, Any]) -> bool:
    return list(rule) == ["min_interactions"] and list(rule["min_interactions"]) == ["user"]

"""Rules that leave rows out, as `filters` of an entry of params/datasets.yaml lists them: each counts what it drops.

Every rule takes the log of interactions and gives the one that it keeps. Logs are lazy frames over a file, so that
only counts of users and items are in memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import polars as pl

from steps.common.cli import StepError

#: Makes a log that is read many times into one on disk.
Store = Callable[[pl.LazyFrame], pl.LazyFrame]
#: How many rows each `user` and each `item` of a log has: `key`, the id as `keys` gives it, and `len`.
Tally = dict[str, pl.DataFrame]

_SAMPLE_SEED = 0
_SEEDS = {"user": (1, 2), "item": (3, 4)}


def keys(log: pl.LazyFrame, name: str) -> pl.Expr:
    """The ids of a `user` or an `item` as numbers: texts are hashed, which makes counting and joining four times as
    fast."""
    return pl.col(name).hash(_SEEDS[name][0]) if log.collect_schema()[name] == pl.String else pl.col(name)


def tally(log: pl.LazyFrame) -> Tally:
    """Counts of a log. Raises StepError if two ids share a number, which a second hash tells."""
    found = {}
    for name, (_, seed) in _SEEDS.items():
        rows = log.select(key=keys(log, name), other=pl.col(name).hash(seed))
        if log.collect_schema()[name] == pl.String:
            counts = rows.group_by("key").agg(pl.len(), one=pl.col("other").min() == pl.col("other").max()).collect()
            if not counts["one"].all():
                raise StepError(f"two {name}s have ids with one hash, and cannot be told apart; rename one of them")
            found[name] = counts.select("key", "len")
        else:
            found[name] = rows.group_by("key").agg(pl.len()).collect()
    return found


def rows_of(log: pl.LazyFrame, name: str, kept: pl.DataFrame) -> pl.LazyFrame:
    """The rows of the users or items whose `key` is in `kept`, in the log's order."""
    return log.filter(keys(log, name).is_in(kept["key"].implode()))


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
    first = log.group_by(columns).agg(pl.col("row").sort_by(keys).first())
    return store(log.join(first.select("row"), on="row", how="semi", maintain_order="left"))


def min_interactions(log: pl.LazyFrame, least: Mapping[str, int], counts: Tally, store: Store) -> pl.LazyFrame:
    """Rows whose user and item have at least as many rows as `least` says of each; both are counted before any of these
    rows is left out."""
    kept = log
    for name, number in least.items():
        kept = rows_of(kept, name, counts[name].filter(pl.col("len") >= number))
    return store(kept)


def k_core(log: pl.LazyFrame, least: Mapping[str, int], counts: Tally, store: Store) -> pl.LazyFrame:
    """The same again and again, until every user and item that is left has as many rows."""
    while any((counts[name]["len"] < number).any() for name, number in least.items()):
        log = min_interactions(log, least, counts, store)
        counts = tally(log)
    return log


def sample_users(log: pl.LazyFrame, number: int, counts: Tally, store: Store) -> pl.LazyFrame:
    """All rows of so many users, drawn with a fixed seed from the sorted ids."""
    users = log.select("user").unique().sort("user").collect()["user"]
    chosen = np.sort(np.random.default_rng(_SAMPLE_SEED).permutation(len(users))[:number])
    return store(log.filter(pl.col("user").is_in(users.gather(chosen).implode())))


RULES: dict[str, Callable[[pl.LazyFrame, Any, Tally, Store], pl.LazyFrame]] = {
    "min_rating": min_rating,
    "time": between,
    "first_of": first_of,
    "min_interactions": min_interactions,
    "k_core": k_core,
    "sample_users": sample_users,
}


def apply(
    log: pl.LazyFrame, rules: list[dict[str, Any]], counts: Tally, store: Store
) -> tuple[pl.LazyFrame, Tally, pl.DataFrame, list[dict[str, Any]]]:
    """The log without what the rules drop, in their order.

    Returns the log and its counts; the items that remain, sorted, before the rules at the end that look at users alone
    (which leave the catalogue as it is: arXiv 2402.17152's filter of Amazon Books); and of each rule what it is, and
    how many rows, users and items it drops.
    """
    report = []
    last = max((place for place, rule in enumerate(rules, 1) if not _of_users_alone(rule)), default=0)
    items = _items(log) if not last else pl.DataFrame()
    before = size(counts)
    for place, rule in enumerate(rules, 1):
        ((name, value),) = rule.items()
        log = RULES[name](log, value, counts, store)
        counts = tally(log)
        after = size(counts)
        report.append({"rule": rule, "dropped": {key: before[key] - after[key] for key in before}})
        before = after
        if place == last:
            items = _items(log)
    return log, counts, items, report


def _items(log: pl.LazyFrame) -> pl.DataFrame:
    return log.select("item").unique().sort("item").collect()


def _of_users_alone(rule: Mapping[str, Any]) -> bool:
    return list(rule) == ["min_interactions"] and list(rule["min_interactions"]) == ["user"]

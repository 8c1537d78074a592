"""What an entry should say of a log of interactions, so that validate takes it, and what is doubtful about the log."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl

from steps.common.cli import StepError
from steps.data import filters
from steps.data.description.inference import Doubt, Times, other_unit
from steps.data.schemas import EXAMPLES, USUAL_TIMES, shown, ticks_of
from steps.data.values import TICKS

_LEAST = 3  # interactions of a user: one to train with, one for validation, one for the test
_STEPS = (1, 0.5, 0.25, 0.1)
_FEW_ITEMS = 100
_DAY_S = 86400
_AT_ONCE = 0.1  # the share of users with all rows at one time from which on it is told
_USUAL_YEARS = ("1990-01-01", "2040-01-01")
_CORE = ("user", "item", "rating", "timestamp")


@dataclass
class Proposal:
    """Keys of an entry of params/datasets.yaml, with what is to be told beside them. kept: the log behind the filters.
    lengths: of users' sequences in it."""

    checks: dict[str, Any]
    filters: list[dict[str, Any]]
    repeats: str | None
    kept: pl.DataFrame
    lengths: np.ndarray
    notes: dict[str, str] = field(default_factory=dict)
    doubts: list[Doubt] = field(default_factory=list)


def propose(log: pl.DataFrame, times: Times | None, whole: bool, shown_file: str) -> Proposal:
    """Look at a log: typed columns row, user, item, and rating and timestamp (in ticks) if there are any.

    whole: whether it is all of the file; else nothing is checked that the rest may not be. Raises StepError if no user
    has interactions enough.
    """
    columns = [name for name in _CORE if name in log.columns]
    doubts: list[Doubt] = []
    ready = log.cast({"rating": pl.Float32}) if "rating" in columns else log  # as validate keeps them
    rules, notes = _filters(ready, columns, whole, doubts)
    ready = ready if times else ready.with_columns(timestamp=pl.lit(0, pl.Int64))
    counts = filters.tally(ready.lazy())
    kept = filters.apply(ready.lazy(), rules, counts, lambda part: part.collect().lazy())[0].collect()
    if not len(kept):
        raise StepError(f"{shown_file}: of {len(log)} rows, no user has {_LEAST}; there is nothing to train with")
    lengths = kept["user"].value_counts()["count"].to_numpy()
    checks = _rating_checks(log, whole, notes, doubts)
    checks |= _time_checks(log, times, doubts) if times else {}
    checks["min_user_interactions"] = int(lengths.min()) if whole else _LEAST
    num_repeats = len(kept) - kept.select(pl.struct("user", "item").n_unique()).item()
    if num_repeats or not whole:
        notes["repeats"] = (
            f"{_share(num_repeats, len(kept))} repeat an item of their user; or recommend, to recommend them again"
        )
    else:
        checks["unique_user_item"] = True
    if len(kept) < len(log):
        doubts.append(Doubt("filters", f"the filters leave out {_share(len(log) - len(kept), len(log))}"))
    proposal = Proposal(checks, rules, "leave-out" if num_repeats or not whole else None, kept, lengths, notes, doubts)
    doubts += _about_columns(log, columns)
    doubts += _about_times(kept, times) if times else _about_order(log)
    return proposal


def _filters(
    log: pl.DataFrame, columns: list[str], whole: bool, doubts: list[Doubt]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    rules: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    copies = len(log) - log.select(pl.struct(columns).n_unique()).item()
    counted = log
    if copies and "timestamp" in columns:
        rules.append({"first_of": columns})
        notes["filters.0"] = "exact duplicates"
        doubts.append(Doubt("filters", f"{_share(copies, len(log))} are exact duplicates of another"))
        counted = log.unique(columns)
    elif copies:  # of a log without times they may be what users did again
        text = f"{_share(copies, len(log))} are exact duplicates of another; without times they count as repeats"
        doubts.append(Doubt("repeats", text))
    rows = counted["user"].value_counts()["count"]
    few, one = int((rows < _LEAST).sum()), int((rows == 1).sum())
    if few or not whole:
        notes[f"filters.{len(rules)}"] = f"{few} of {len(rows)} users have fewer"
        rules.append({"min_interactions": {"user": _LEAST}})
    if one:
        doubts.append(Doubt("filters", f"{one} of {len(rows)} users have one row"))
    return rules, notes


def _rating_checks(log: pl.DataFrame, whole: bool, notes: dict[str, str], doubts: list[Doubt]) -> dict[str, Any]:
    if "rating" not in log.columns:
        return {}
    ratings = log["rating"].drop_nulls()
    missing = len(log) - len(ratings)
    checks: dict[str, Any] = {}
    bounds = [_number(float(bound)) for bound in (ratings.min(), ratings.max())]  # type: ignore[arg-type]
    if whole:
        checks["rating"] = bounds
        scaled = {step: ratings / step for step in _STEPS}
        step = next((step for step, one in scaled.items() if ((one - one.round()).abs() < 1e-9).all()), None)
        if step and bounds[0] != bounds[1]:
            checks["rating_step"] = step
    else:
        notes["checks"] = f"ratings are {bounds[0]} to {bounds[1]} as far as was read; add `rating: {bounds}`"
    if missing or not whole:
        checks["missing_ratings"] = True
    if missing:
        doubts.append(Doubt("checks.missing_ratings", f"{_share(missing, len(log))} have no rating"))
    if bounds[0] == bounds[1]:
        doubts.append(Doubt("checks.rating", f"every rating is {bounds[0]}, which says nothing"))
    return checks


def _time_checks(log: pl.DataFrame, times: Times, doubts: list[Doubt]) -> dict[str, Any]:
    """Bounds of times, where those that validate has anyway are too narrow; doubts about units."""
    ticks, key = TICKS[times.unit], "files.interactions.time"
    low, high = int(log["timestamp"].min()), int(log["timestamp"].max())  # type: ignore[arg-type]
    span = f"from {date_of(low / ticks)} to {date_of(high / ticks)}"
    if not times.plausible:
        other = other_unit(times)
        remedy = f"{other} would fit: write them as seconds or ISO 8601" if other else "no unit fits; are they times?"
        doubts.append(Doubt(key, f"as `{times.unit}` the events are {span}; {remedy}. Their order is kept"))
    else:
        first, last = (ticks_of(bound, times.unit) for bound in _USUAL_YEARS)
        odd = int((~log["timestamp"].is_between(first, last)).sum())
        if odd:
            doubts.append(Doubt(key, f"{_share(odd, len(log))} are before 1990 or after 2039; events are {span}"))
    usual = [ticks_of(bound, times.unit) for bound in USUAL_TIMES]
    if usual[0] <= low and high <= usual[1]:
        return {}
    return {"time": [min(low // ticks, 0), max(math.ceil(high / ticks), 0)]}


def _about_columns(log: pl.DataFrame, columns: Sequence[str]) -> list[Doubt]:
    doubts = []
    where = "files.interactions.columns"
    for name in columns:
        if name != "rating" and log[name].n_unique() == 1:
            value = "" if name == "timestamp" else f", {shown(log[name][0])}"
            doubts.append(Doubt(where, f"the {name} is the same in every row{value}"))
        if name in ("user", "item"):
            doubts += [Doubt(where, text) for text in _alike(log[name])]
    num_items = log["item"].n_unique()
    if 1 < num_items < _FEW_ITEMS:
        doubts.append(Doubt(where, f"there are only {num_items} items, so that a rank among them says little"))
    return doubts


def _alike(ids: pl.Series) -> list[str]:
    """Ids that are two, and look like one: up to case, blanks, leading zeros, and a decimal that is zero."""
    if ids.dtype != pl.String:
        return []
    plain = pl.col("id").str.strip_chars().str.to_lowercase().str.replace(r"\.0+$", "").str.replace(r"^0+(.)", "$1")
    frame = ids.unique(maintain_order=True).alias("id").to_frame().with_columns(plain=plain)
    groups = frame.group_by("plain", maintain_order=True).agg("id").filter(pl.col("id").list.len() > 1)
    if not len(groups):
        return []
    first = " and ".join(repr(one) for one in groups["id"][0].to_list()[:EXAMPLES])
    count = int(groups["id"].list.len().sum())
    return [f"{count} ids of {ids.name}s look like another, such as {first}; they stay apart"]


def _about_times(kept: pl.DataFrame, times: Times) -> list[Doubt]:
    doubts = []
    if not times.zoned:
        doubts.append(Doubt("files.interactions.zone", "times name no zone; UTC is assumed"))
    moments = kept["timestamp"]
    if moments.n_unique() > 1 and (moments % (_DAY_S * TICKS[times.unit]) == 0).all():
        doubts.append(Doubt("ties", "all times are whole days; within a day the order is that of the file"))
    spans = kept.group_by("user").agg(at_once=pl.col("timestamp").min() == pl.col("timestamp").max())
    at_once = int(spans["at_once"].sum())
    if at_once > _AT_ONCE * len(spans):
        share = f"{at_once} of {len(spans)} users ({at_once / len(spans):.0%})"
        doubts.append(Doubt("ties", f"{share} have all rows at one time, which the file's order decides"))
    return doubts


def _about_order(log: pl.DataFrame) -> list[Doubt]:
    """A log without times is in time order only if it was written so."""
    before = log.select(
        user=pl.col("user").diff() >= 0 if log["user"].dtype == pl.Int64 else pl.col("user") >= pl.col("user").shift(),
        item=(pl.col("item") >= pl.col("item").shift()).over("user"),
        grouped=(pl.col("user") != pl.col("user").shift()).fill_null(True),
    )
    by_item = before["item"].drop_nulls().all()
    grouped = int(before["grouped"].sum()) == log["user"].n_unique()
    if by_item:
        how = "each user's rows are sorted by item, which is no order of time"
    elif grouped:
        how = "rows are grouped by user; see that each user's are in the order of time"
    else:
        how = "rows are sorted by nothing; see that the file was written in the order of time"
    return [Doubt("files.interactions.time", f"there are no times, and the file's order is taken: {how}")]


def date_of(seconds: float) -> str:
    """A day, for a message, whatever the number."""
    try:
        return datetime.fromtimestamp(seconds, UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):
        return f"year {1970 + seconds / (365.2425 * _DAY_S):.0f}"


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _share(part: int, of: int) -> str:
    return f"{part} of {of} rows ({part / of:.1%})"

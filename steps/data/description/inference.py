"""Which column of a table is what: by its name, else by its values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

import polars as pl

from steps.data.description.column_names import role_of
from steps.data.schemas import shown
from steps.data.values import TICKS, as_ratings, as_ticks


class Doubt(NamedTuple):
    """What may be wrong with a key of an entry, in words."""

    key: str
    text: str


#: Ids whose form says what they are: Amazon's, whose files of ratings have no names, and not one order.
_FORMS = {"item": r"^(B[0-9A-Z]{9}|\d{9}[\dX])$", "user": r"^A[0-9A-Z]{9,20}$"}
_EARLIEST, _LATEST = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (1990, 2040))
#: Other ways to write times, which no entry can say, by the seconds of one.
_OTHER_UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "nanoseconds": 1e-9}
_FEW = 21  # values that ratings have at most
_FAILING = 0.1  # the share of values from which on a column is not what its name says
_LONG = 40  # characters that no id has


@dataclass(frozen=True)
class Times:
    """How times are written. unit: a key of TICKS. zoned: whether all have a zone, if they are ISO 8601. median:
    seconds since 1970. failures: how many are written otherwise."""

    unit: str
    zoned: bool
    median: float
    failures: int

    @property
    def plausible(self) -> bool:
        return _EARLIEST <= self.median < _LATEST


@dataclass
class Found:
    """places: of columns with a meaning, from 1. named: those that their names tell. others: columns that could be the
    user or the item too."""

    places: dict[str, int] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    doubts: list[Doubt] = field(default_factory=list)


def times_of(values: pl.Series) -> Times | None:
    """How a column of times is written; None where it has none. Of the units of whole numbers it is the one that puts
    the median into 1990 to 2039, else `s`; `us` where that is the nearest of all."""
    known = values.drop_nulls()
    if not len(known) or values.dtype in (pl.Boolean, pl.Binary):
        return None
    unit, ticks = "iso", pl.Series(dtype=pl.Int64)
    best = len(known) + 1
    for way in ("iso",) if values.dtype.is_temporal() else ("s", "decimal-s", "iso"):
        found = as_ticks(known, way, "UTC")
        if found.null_count() < best:
            unit, ticks, best = way, found, found.null_count()
        if not best:
            break
    if best > _FAILING * len(known):
        return None
    median = float(ticks.median() or 0)  # type: ignore[arg-type]
    zoned = unit != "iso" or as_ticks(known, "iso").null_count() == best
    if unit == "s":
        fitting = [way for way in ("s", "ms", "us") if _EARLIEST <= median / TICKS[way] < _LATEST]
        unit = fitting[0] if fitting else "us" if median / TICKS["us"] >= _LATEST else "s"
    return Times(unit, zoned, median / TICKS[unit], best)


def other_unit(times: Times) -> str | None:
    """A way to write times that would put implausible ones into plausible years, though no entry can say it."""
    number = times.median * TICKS[times.unit]
    day, month = int(number) % 100, int(number) // 100 % 100
    if 1990 <= number // 10_000 < 2040 and 1 <= month <= 12 and 1 <= day <= 31:
        return "dates as YYYYMMDD"
    return next((unit for unit, one in _OTHER_UNITS.items() if _EARLIEST <= number * one < _LATEST), None)


def events(names: Sequence[str] | None, sample: pl.DataFrame) -> Found | None:
    """The columns of interactions: user, item, and rating and timestamp if there are any; None if it is another table.

    names: of the columns, in order, if the file has them. sample: first rows, columns "1", "2", ...
    """
    found = Found()
    named = _by_names(names, sample)
    for role in ("user", "item"):
        chosen = [place for place in named.get(role, []) if place not in found.places.values()]
        if chosen:
            found.places[role] = chosen[0]
            found.named.add(role)
            found.doubts += _others(role, chosen, names or [])
    for place in named.get("rating", []):
        if _is_number(sample[str(place)]):
            found.places["rating"] = place
            break
    for place in named.get("timestamp", []):
        if times_of(sample[str(place)]):
            found.places["timestamp"] = place
            break
    found.doubts += _refused(found, named, names or [], sample)
    _by_values(found, sample, named=bool(names))
    if not {"user", "item"} <= found.places.keys():
        return None
    return found


def entities(names: Sequence[str] | None, sample: pl.DataFrame, key: str) -> Found | None:
    """The columns of an items (`key` is item) or a users file: its id, and of items the title and genres if there are
    any."""
    named = _by_names(names, sample)
    other = "user" if key == "item" else "item"
    if other in named and key not in named:
        return None
    called_id = [place for place, name in enumerate(names or [], 1) if name.strip().lower() in ("id", "_id")]
    ids = named.get(key) or called_id
    place = ids[0] if ids else int(sample.columns[0]) if sample.columns else 0
    if not place or sample[str(place)].is_duplicated().any():
        return None
    found = Found({key: place}, {key} if named.get(key) else set())
    if key == "item":
        for role in ("title", "genres"):
            if named.get(role):
                found.places[role] = named[role][0]
        if not names:
            _titles_by_values(found, sample)
    return found


def _by_names(names: Sequence[str] | None, sample: pl.DataFrame) -> dict[str, list[int]]:
    """The places of each role, the best first, of columns that have values."""
    found: dict[str, list[tuple[int, int]]] = {}
    for place, name in enumerate(names or [], 1):
        role = role_of(name) if str(place) in sample.columns else None
        if role:
            found.setdefault(role[0], []).append((role[1], place))
    return {role: [place for _, place in sorted(places)] for role, places in found.items()}


def _others(role: str, places: list[int], names: Sequence[str]) -> list[Doubt]:
    """Doubts about columns that could be the user or item as well as the first."""
    first, *others = [shown(names[place - 1]) for place in places if role_of(names[place - 1]) is not None]
    if not others:
        return []
    text = f"{first} is taken for the {role}; it could be {' or '.join(others)} too"
    return [Doubt("files.interactions.columns", text)]


def _refused(found: Found, named: dict[str, list[int]], names: Sequence[str], sample: pl.DataFrame) -> list[Doubt]:
    """Doubts about columns that are called ratings or times, and hold none."""
    doubts = []
    for role, what in (("rating", "numbers"), ("timestamp", "times in a form that entries know")):
        if role not in found.places and named.get(role):
            place = named[role][0]
            values = sample[str(place)].drop_nulls()
            example = f" (such as {shown(values[0])[:60]})" if len(values) else ""
            text = f"{shown(names[place - 1])} holds no {what}{example}, and is left out"
            doubts.append(Doubt("files.interactions.columns", text))
    return doubts


def _by_values(found: Found, sample: pl.DataFrame, named: bool) -> None:
    """Find what no name told, among the columns that are left. Ratings only where no column has a name."""
    left = [int(name) for name in sample.columns if int(name) not in found.places.values()]
    guessed = []
    if "timestamp" not in found.places:
        timed = [place for place in left if _is_time(sample[str(place)], place > 2)]
        if timed and len(left) > len({"user", "item"} - found.places.keys()):
            found.places["timestamp"] = timed[-1]
            left.remove(timed[-1])
            guessed.append("timestamp")
    if not named:
        # Of the first two, which are most often ids, only what is written with decimals.
        early = [place for place in left[:2] if sample[str(place)].cast(pl.String).str.contains(r"\.").any()]
        ratings = [place for place in (*left[2:], *early) if _is_rating(sample[str(place)])]
        if ratings and len(left) > 2:
            found.places["rating"] = ratings[0]
            left.remove(ratings[0])
            guessed.append("rating")
    ids = [place for place in left if _is_id(sample[str(place)])]
    missing = [role for role in ("user", "item") if role not in found.places]
    if len(missing) > len(ids):
        return
    chosen = dict(zip(missing, ids, strict=False))
    why = "by place"
    if len(missing) == 2:
        chosen, why = _told_apart(chosen, sample, found.places.get("timestamp"))
    found.places |= chosen
    guessed += missing
    if guessed:
        taken = ", ".join(f"{role} from field {found.places[role]}" for role in ("user", "item") if role in guessed)
        taken = f"{taken} {why}" if taken else ""
        rest = ", ".join(f"{role} from field {found.places[role]}" for role in guessed if role not in ("user", "item"))
        both = "; ".join(filter(None, [taken, f"{rest} by its values" if rest else ""]))
        why = "no known name tells them" if named else "there are no names"
        found.doubts.append(Doubt("files.interactions.columns", f"{why}: {both}"))


def _is_time(values: pl.Series, late: bool) -> bool:
    """Whether values are times of this age. Of the first columns, which are most often ids, numbers must hardly repeat:
    ids of ten digits look like seconds."""
    times = times_of(values)
    if times is None or not times.plausible:
        return False
    return late or times.unit == "iso" or values.n_unique() > len(values) / 2


def _told_apart(chosen: dict[str, int], sample: pl.DataFrame, time: int | None) -> tuple[dict[str, int], str]:
    """Which of two columns of ids is the user, and why: by the form of ids, by times that go up in each user's rows
    alone, else the first."""
    first, second = (sample[str(place)] for place in chosen.values())
    swapped = dict(zip(chosen, reversed(chosen.values()), strict=True))
    for ids, order in ((second, chosen), (first, swapped)):
        if _match(ids, _FORMS["item"]) and _match(first if ids is second else second, _FORMS["user"]):
            return order, "by the form of Amazon's ids"
    often = second.n_unique() * 3 <= len(second)
    if often and time and _going_up(second, sample[str(time)]) > 0.99 and _going_up(first, sample[str(time)]) < 0.9:
        return swapped, f"as times go up within field {chosen['item']} alone"
    return chosen, "by place"


def _match(values: pl.Series, pattern: str) -> bool:
    known = values.drop_nulls().cast(pl.String)
    return len(known) > 0 and float(known.str.contains(pattern).mean() or 0) > 0.95  # type: ignore[arg-type]


def _going_up(ids: pl.Series, times: pl.Series) -> float:
    """The share of rows that are not before their id's row before."""
    found = times_of(times)
    if found is None:
        return 0.0
    frame = pl.DataFrame([ids.alias("id"), as_ticks(times, found.unit, "UTC").alias("time")])
    steps = frame.select(pl.col("time").diff().over("id")).to_series().drop_nulls()
    return float((steps >= 0).mean() or 0) if len(steps) else 0.0  # type: ignore[arg-type]


def _is_number(values: pl.Series) -> bool:
    known = values.drop_nulls()
    return len(known) > 0 and as_ratings(known).null_count() <= _FAILING * len(known)


def _is_rating(values: pl.Series) -> bool:
    if not _is_number(values):
        return False
    numbers = as_ratings(values.drop_nulls())
    low, high = float(numbers.min() or 0), float(numbers.max() or 0)  # type: ignore[arg-type]
    return 1 < numbers.n_unique() <= _FEW and low >= -10 and high <= 100


def _is_id(values: pl.Series) -> bool:
    """Whether values may be ids: whole numbers, or short texts without blanks; more than one."""
    known = values.drop_nulls()
    if known.dtype.is_temporal() or known.dtype == pl.Boolean or known.n_unique() < 2:
        return False
    texts = known.cast(pl.String)
    if _is_number(known):
        numbers = as_ratings(known)
        return bool((numbers == numbers.round()).all())
    odd = texts.str.contains(r"\S\s+\S") | (texts.str.len_chars() > _LONG)
    return float(odd.mean() or 0) < 0.2  # type: ignore[arg-type]


def _titles_by_values(found: Found, sample: pl.DataFrame) -> None:
    """Of an items file without names: texts that hardly repeat are titles, `A|B` are genres."""
    for name in sample.columns:
        place, texts = int(name), sample[name].drop_nulls().cast(pl.String)
        if place in found.places.values() or not len(texts) or _is_number(texts):
            continue
        parts = texts.str.split("|").explode()
        if len(parts) > 1.2 * len(texts) and parts.n_unique() < len(texts):
            found.places.setdefault("genres", place)
        elif texts.n_unique() > 0.8 * len(texts) and not _match(texts, r"^\w+://") and times_of(texts) is None:
            found.places.setdefault("title", place)

"""The tables of a file of one's own: which of its files has the interactions, the items, the users; and their rows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from steps.common.cli import StepError
from steps.data.description.column_names import listed
from steps.data.description.forms import Form, columns_setting, form_of, not_utf8, with_other_quotes
from steps.data.description.inference import Doubt, Found, Times, entities, events, times_of
from steps.data.description.opening import PART, Raw, encoding_of, fetched
from steps.data.readers import BLOCK_BYTES, read_blocks, read_table
from steps.data.schemas import EXAMPLES, shown
from steps.data.values import as_ratings, typed

T = TypeVar("T")

#: Rows that are looked at: of more than these, as of files that are too large, a part is.
ROWS = 10_000_000
_EVENTS, _ENTITIES = ("user", "item", "rating", "timestamp"), {"item": ("item", "title", "genres"), "user": ("user",)}
_GENRES = 200  # kinds of them at most
_HINTS = {
    "item": ("item", "movie", "product", "book", "song", "track", "meta", "catalog", "title"),
    "user": ("user", "customer", "member", "profile", "visitor"),
}


@dataclass
class Table:
    """A file and its form. settings: its entry in `files`, once it is known."""

    raw: Raw
    form: Form
    settings: dict[str, Any] = field(default_factory=dict)
    doubts: list[Doubt] = field(default_factory=list)


@dataclass
class Log:
    """Interactions, typed. share: how much of the file they are. left_out: columns that have no meaning."""

    table: Table
    rows: pl.DataFrame
    times: Times | None
    share: float
    left_out: list[str]


def tables_of(raws: list[Raw]) -> list[Table]:
    """The files that are tables. Raises StepError if there is none."""
    found, problem = [], None
    for raw in raws:
        try:
            found.append(Table(raw, form_of(raw)))
        except StepError as error:
            problem = problem or error
    if not found:
        assert problem is not None  # noqa: S101
        raise problem
    return found


def log_of(tables: list[Table], folder: Path) -> Log:
    """The interactions: of the table that has most of their columns, and of several the largest."""
    ranked = []
    for table in tables:
        found = events(table.form.names, table.form.sample)
        if found:
            known = {"user", "item"} <= found.named, "timestamp" in found.places, "rating" in found.places
            ranked.append(((*known, table.raw.size), table, found))
    if not ranked:
        form = tables[0].form
        has = f"it has {listed(form.names)}" if form.names else f"it has {form.num_columns} fields a line, and no names"
        raise StepError(f"{tables[0].raw.shown}, line 1: no columns of users and items found; {has}; name them so")
    _, table, found = max(ranked, key=lambda one: one[0])
    table = replace(table, raw=fetched(table.raw, folder), doubts=[*table.form.doubts])
    with table.raw.named():
        return _read_log(table, found)


def _read_log(table: Table, found: Found) -> Log:
    form, raw = table.form, table.raw
    base = dict(form.settings)
    if form.is_text and encoding_of(raw)[0] != "utf-8" and "encoding" not in base:
        base["encoding"] = "latin-1"
        table.doubts.append(not_utf8(encoding_of(raw)[1], ""))
    table.doubts = [Doubt(f"files.interactions.{one.key}", one.text) for one in table.doubts] + found.doubts
    places = dict(found.places)
    columns = {role: places[role] for role in _EVENTS if role in places}
    read = {"columns": _by_place(form, columns)}
    base, (texts, share) = _quoted(base, lambda settings: _rows_of(raw, settings | read))
    _refuse_missing(raw, texts, ("user", "item"))
    if "rating" in places:
        _drop_odd_ratings(texts, form, places, table.doubts)
    times = times_of(texts["timestamp"]) if "timestamp" in places else None
    if "timestamp" in places and times is None:
        name = _shown_column(form, places.pop("timestamp"))
        table.doubts.append(Doubt("files.interactions.columns", f"{name} holds no times, and is left out"))
    settings = {"path": raw.path, **base, "columns": columns_setting(form, places, _EVENTS)}
    if times is None:
        settings["time"] = "none"
    elif times.unit != "s":
        settings["time"] = times.unit
    if times and not times.zoned:
        settings["zone"] = "UTC"
    table.settings = settings
    rows = typed(texts.select("row", *(role for role in _EVENTS if role in places)), settings)
    if times:
        wrong = texts.filter(rows["timestamp"].is_null())
        if len(wrong):
            raise StepError(
                f"{raw.shown}, row {_rows(wrong)}: {len(wrong)} times are missing or written otherwise than the others "
                f"(such as {shown(wrong['timestamp'][0])}); correct them, or leave the rows out"
            )
    others = [name for place, name in enumerate(form.names or [], 1) if place not in places.values()]
    return Log(table, rows, times, share, others)


def _by_place(form: Form, columns: Mapping[str, int]) -> dict[str, Any]:
    """Columns of a table for a reader, whatever an entry will call them."""
    if form.is_text:
        return dict(columns)
    assert form.names is not None  # noqa: S101
    return {role: form.names[place - 1] for role, place in columns.items()}


def _quoted(base: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> tuple[dict[str, Any], T]:
    """The settings, with the other meaning of quotes if only that fits all lines; and what `read` makes of them."""
    try:
        return base, read(base)
    except StepError as error:
        if "separator" not in base:
            raise
        other = with_other_quotes(base)
        try:
            return other, read(other)
        except StepError:
            raise error from None


def _rows_of(raw: Raw, settings: dict[str, Any]) -> tuple[pl.DataFrame, float]:
    """Rows of the file, as many as are looked at, and about what share of it they are."""
    frames: list[pl.DataFrame] = []
    num_rows, num_bytes, in_lines = 0, 0, settings.get("format") != "parquet"
    for block in read_blocks(*raw.read_as(settings), lambda block: block, BLOCK_BYTES):
        if block.malformed:
            lines = ", ".join(map(str, block.malformed[:EXAMPLES]))
            raise StepError(f"{raw.local}, line {lines}: not as many fields as line 1 has; correct the file")
        if num_rows >= ROWS or (in_lines and not raw.whole and num_bytes + BLOCK_BYTES > PART):
            return pl.concat(frames), num_bytes / raw.size if in_lines else num_rows / _num_rows(raw)
        frames.append(block.frame)
        num_rows, num_bytes = num_rows + len(block.frame), num_bytes + BLOCK_BYTES
    return pl.concat(frames), 1.0


def _num_rows(raw: Raw) -> int:
    """Of a Parquet file."""
    return int(pl.scan_parquet(raw.local).select(pl.len()).collect().item())


def _refuse_missing(raw: Raw, texts: pl.DataFrame, columns: Iterable[str]) -> None:
    for name in columns:
        wrong = texts.filter(pl.col(name).is_null() | (pl.col(name).cast(pl.String) == ""))
        if len(wrong):
            raise StepError(f"{raw.shown}, row {_rows(wrong)}: {len(wrong)} rows have no {name}; leave them out")


def _rows(frame: pl.DataFrame) -> str:
    return ", ".join(map(str, frame["row"].head(EXAMPLES)))


def _drop_odd_ratings(texts: pl.DataFrame, form: Form, places: dict[str, int], doubts: list[Doubt]) -> None:
    """Leave the ratings out where some are no numbers, or none is there."""
    values = texts["rating"]
    odd = texts.filter(values.is_not_null() & as_ratings(values).is_null())
    if len(odd) or values.null_count() == len(values):
        what = f"is no number in {len(odd)} rows (row {_rows(odd)})" if len(odd) else "is empty"
        name = _shown_column(form, places.pop("rating"))
        doubts.append(Doubt("files.interactions.columns", f"{name}, the rating, {what}, and is left out"))


def _shown_column(form: Form, place: int) -> str:
    return shown(form.names[place - 1]) if form.names else f"field {place}"


def entity_of(tables: list[Table], key: str, ids: pl.Series, folder: Path) -> tuple[Table | None, list[Doubt]]:
    """The items (`key` is item) or users file of the tables, which has all ids of the interactions; else doubts that
    say why there is none."""
    where = f"files.{key}s"
    fitting, doubts = [], []
    for table in tables:
        found = entities(table.form.names, table.form.sample, key)
        if found is None:
            continue
        name = Path(table.raw.path).name
        known = [kind for kind, hints in _HINTS.items() if any(hint in name.lower() for hint in hints)]
        raw, problem = fetched(table.raw, folder), ""
        if not raw.whole:
            problem = f"{shown(raw.path)} is larger than 200 MB, and is left out unread"
        else:
            try:
                with raw.named():
                    settings, excess, missing = _entity(replace(table, raw=raw), found, key, ids)
            except StepError as error:
                problem = f"{error}; it is left out"
            else:
                if missing:
                    what = f"{len(missing)} {key}s, such as {shown(missing[0])}"
                    problem = f"{shown(raw.path)} lacks {what}, and is left out"
        if problem:
            if key in found.named or key in known:  # others are of something else
                doubts.append(Doubt("files", problem))
            continue
        rank = (key in found.named, key in known, len(known) == 0, len(found.places), -excess)
        own = [Doubt(f"{where}.{one.key}", one.text) for one in table.form.doubts]
        fitting.append((rank, replace(table, raw=raw, settings=settings, doubts=own)))
    if not fitting:
        return None, doubts
    return max(fitting, key=lambda one: one[0])[1], []


def _entity(table: Table, found: Found, key: str, ids: pl.Series) -> tuple[dict[str, Any], int, list[Any]]:
    """The table's entry, how many more ids it has than `ids`, and those of `ids` that it lacks."""
    base, form, raw = dict(table.form.settings), table.form, table.raw
    if form.is_text and encoding_of(raw)[0] != "utf-8":
        base["encoding"] = "latin-1"
    places = dict(found.places)
    read = {"columns": _by_place(form, places), "features": {"genres": "category"}}
    base, frame = _quoted(base, lambda settings: _entity_rows(raw, settings | read))
    own = frame[key]
    if own.null_count() or own.n_unique() < len(own):
        raise StepError(f"{raw.local}: has no {key}, or one twice")
    if own.dtype != ids.dtype:
        own, ids = own.cast(pl.String), ids.cast(pl.String)
    known = ids.unique(maintain_order=True)
    missing = known.filter(~known.is_in(own.implode())).to_list()
    entry = {"path": raw.path, **base}
    features = _genres(frame["genres"]) if "genres" in places else None
    if not features:
        places.pop("genres", None)
    entry["columns"] = columns_setting(form, places, _ENTITIES[key])
    if features:
        entry["features"] = {"genres": features}
    return entry, len(own) - len(known), missing


def _entity_rows(raw: Raw, settings: dict[str, Any]) -> pl.DataFrame:
    block = read_table(*raw.read_as(settings))
    if block.malformed:
        raise StepError(f"{raw.local}, line {block.malformed[0]}: not as many fields as line 1 has")
    return typed(block.frame, settings)


def _genres(values: pl.Series) -> dict[str, str] | None:
    """The feature that genres are, if each row has one at least, and there are few."""
    if values.null_count() or not len(values):
        return None
    for separator in ("|", ", ", ",", ";"):
        parts = values.str.split(separator).explode()
        if len(parts) > len(values):
            return None if (parts == "").any() or parts.n_unique() > _GENRES else {"categories": separator}
    return None if values.n_unique() > _GENRES else {"categories": "|"}

"""Typed columns from raw values: ids, ratings and times. A value that is of no such type becomes null."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

#: How times are written, and how many ticks a second of theirs has. Ticks are kept, as order needs all digits.
TICKS = {"none": 1, "s": 1, "ms": 1_000, "us": 1_000_000, "decimal-s": 1_000_000, "iso": 1_000_000}
#: The same in words, for messages.
TIME_WORDS = {
    "s": "a time in whole seconds",
    "ms": "a time in whole milliseconds",
    "us": "a time in whole microseconds",
    "decimal-s": "a time in seconds, with up to 6 decimals",
    "iso": "an ISO 8601 time with a zone",
}
# `(?-u)`: \d is a digit of ASCII.
_ISO = (
    r"(?-u)^(?<date>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?<clock>\d{2}:\d{2})(?::(?<second>\d{2})(?:[.,](?<fraction>\d{1,6}))?)?)?(?<zone>Z|z|[+-]\d{2}:?\d{2})?$"
)
_WHOLE_DECIMAL = r"(?-u)^([+-]?\d+)(?:\.0*)?$"
_DECIMAL = r"(?-u)^([+-]?)(\d+)(?:\.(\d{1,6})0*)?$"
_MOST_SECONDS = 9_000_000_000_000  # whose microseconds Int64 holds


def as_ids(values: pl.Series) -> pl.Series:
    """Int64 if every value is a whole number as one writes it, without leading zeros or signs; else String.

    03 and 3 are two ids. Of a column of floating-point numbers, as a program writes whole ones beside missing ones, 3.0
    is 3.
    """
    if values.dtype.is_float():
        value, whole = pl.first(), pl.first().cast(pl.Int64, strict=False)
        text = pl.when(whole == value).then(whole.cast(pl.String)).otherwise(value.fill_nan(None).cast(pl.String))
        values = values.to_frame().select(text.alias(values.name)).to_series()
    if values.dtype.is_integer() and values.dtype != pl.UInt64:
        return values.cast(pl.Int64)
    texts = values.cast(pl.String)
    numbers = texts.cast(pl.Int64, strict=False)
    if numbers.null_count() > texts.null_count():
        return texts
    # A number is never longer than its text, and as long only where the text is as one writes it.
    return numbers if _num_characters(numbers) == texts.str.len_bytes().sum() else texts


def _num_characters(numbers: pl.Series) -> int:
    """How many characters whole numbers have, all together."""
    values = numbers.drop_nulls().to_numpy()
    if not len(values):
        return 0
    sizes = np.abs(values).view(np.uint64)  # which holds the size of -2**63 too
    longer = sum(int(np.count_nonzero(sizes >= 10**power)) for power in range(1, len(str(int(sizes.max())))))
    return len(values) + longer + int(np.count_nonzero(values < 0))


def as_ratings(values: pl.Series) -> pl.Series:
    """Float64; null where a value is no number, or not finite as Float32, as which it is kept."""
    if not (values.dtype.is_numeric() or values.dtype == pl.String):
        return pl.Series(values.name, [None] * len(values), pl.Float64)
    numbers = values.cast(pl.Float64, strict=False)
    return numbers.to_frame().select(pl.when(pl.first().cast(pl.Float32).is_finite()).then(pl.first())).to_series()


def rating_of(levels: list[str]) -> pl.Expr:
    """Ratings (Float64) of columns of 0 and 1, such as a click and a long view: 0, or the place, from 1, of the last
    column that is 1."""
    return pl.max_horizontal(pl.col(name) * place for place, name in enumerate(levels, 1)).alias("rating")


def as_ticks(values: pl.Series, time: str, zone: str | None = None) -> pl.Series:
    """Times since 1970 as Int64, in ticks: `TICKS[time]` to a second. time: a key of TICKS. zone: of ISO 8601 times
    that name none, such as Europe/Berlin; where a clock shows an hour twice, the first is meant."""
    if values.dtype.is_temporal():
        return _of_temporal(values, time, zone)
    if time == "iso":
        return _of_iso(values.cast(pl.String), zone)
    if values.dtype.is_float():
        numbers = values.cast(pl.Float64)
        numbers = (numbers * TICKS[time]).round() if time == "decimal-s" else numbers  # it has 6 decimals until 2242
        whole = numbers.cast(pl.Int64, strict=False)
        return whole.set(whole.cast(pl.Float64) != numbers, None)
    if time == "decimal-s":
        return _of_decimals(values.cast(pl.String))
    texts = values.cast(pl.String)
    numbers = texts.cast(pl.Int64, strict=False)
    if numbers.null_count() > texts.null_count():
        numbers = texts.str.extract(_WHOLE_DECIMAL, 1).cast(pl.Int64, strict=False)
    return numbers


def _of_temporal(values: pl.Series, time: str, zone: str | None) -> pl.Series:
    """Of a Parquet column of dates or times, which says itself what it is."""
    if time != "iso" or not isinstance(values.dtype, (pl.Datetime, pl.Date)):
        return pl.Series(values.name, [None] * len(values), pl.Int64)
    times = values.cast(pl.Datetime("us")) if values.dtype == pl.Date else values
    if getattr(times.dtype, "time_zone", None) is None:
        if zone is None:
            return pl.Series(values.name, [None] * len(values), pl.Int64)
        times = times.dt.replace_time_zone(zone, ambiguous="earliest", non_existent="null")
    return times.dt.epoch("us")


def _of_decimals(texts: pl.Series) -> pl.Series:
    part = pl.col("part").struct
    sign = pl.when(part.field("1") == "-").then(-1).otherwise(1)
    seconds = part.field("2").cast(pl.Int64, strict=False)
    ticks = pl.when(seconds <= _MOST_SECONDS).then(seconds) * TICKS["decimal-s"]
    fraction = part.field("3").fill_null("0").str.pad_end(6, "0").cast(pl.Int64)
    frame = texts.str.extract_groups(_DECIMAL).alias("part").to_frame()
    return frame.select((sign * (ticks + fraction)).alias(texts.name)).to_series()


def _of_iso(texts: pl.Series, zone: str | None) -> pl.Series:
    part = pl.col("part").struct
    clock = part.field("clock").fill_null("00:00") + ":" + part.field("second").fill_null("00")
    local = (part.field("date") + " " + clock).str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="us")
    # The format admits a second 60, which is the next minute to polars, and no time to a clock without leap seconds.
    local = pl.when(part.field("second").fill_null("00") != "60").then(local)
    fraction = part.field("fraction").fill_null("0").str.pad_end(6, "0").cast(pl.Int64)
    there = part.field("zone").str.replace(":", "")
    hours, minutes = (
        there.str.slice(1, 2).cast(pl.Int64, strict=False),
        there.str.slice(3, 2).cast(pl.Int64, strict=False),
    )
    offset = (hours * 3600 + minutes * 60) * pl.when(there.str.starts_with("-")).then(-1).otherwise(1)
    offset = pl.when(there.str.to_uppercase() == "Z").then(0).when((hours < 24) & (minutes < 60)).then(offset)
    ticks = local.dt.epoch("us") + fraction
    with_zone = ticks - offset * TICKS["iso"]
    if zone is None:
        without: pl.Expr = pl.lit(None, pl.Int64)
    else:
        without = local.dt.replace_time_zone(zone, ambiguous="earliest", non_existent="null").dt.epoch("us") + fraction
    frame = texts.str.extract_groups(_ISO).alias("part").to_frame()
    return frame.select(pl.when(there.is_null()).then(without).otherwise(with_zone).alias(texts.name)).to_series()


def typed(frame: pl.DataFrame, table: Mapping[str, Any]) -> pl.DataFrame:
    """A block's columns as the entry of its table says: ids, rating and levels (Float64), timestamp (Int64, ticks),
    texts of title and features; `row` as it is."""
    parse = {
        "user": as_ids,
        "item": as_ids,
        "rating": as_ratings,
        "timestamp": lambda values: as_ticks(values, table.get("time", "s"), table.get("zone")),
        "row": lambda values: values,
        **dict.fromkeys(table.get("levels", []), as_ratings),
    }
    return pl.DataFrame(
        [parse.get(values.name, lambda texts: texts.cast(pl.String))(values) for values in frame.get_columns()]
    )

"""Ids, ratings and times from raw values: right to the digit, or null."""

from typing import Any

import polars as pl
import pytest

from steps.data.values import as_ids, as_ratings, as_ticks


@pytest.mark.parametrize(
    ("values", "time", "ticks"),
    [
        (["5", "+5", "5.", "5.0", "5.5", "٣", "1e9", "9223372036854775808", " 5"], "s", [5] * 4 + [None] * 5),
        (["5", "+5"], "ms", [5, 5]),
        (["1.5", "-1.5", "+2", "1.1234567"], "decimal-s", [1500000, -1500000, 2000000, None]),
        (["9000000000000.5", "9000000000001"], "decimal-s", [9 * 10**18 + 500000, None]),
        (["1600000000.٣", "2020-01-01"], "decimal-s", [None, None]),
        (["18446744073710"], "decimal-s", [None]),  # whose microseconds are 448384 where 8 bytes overflow
        (["2020-01-01T10:00:00.٣Z", "2020-01-01T10:00:00.3Z"], "iso", [None, 1577872800300000]),
        ([1600000000.0, 1.5, float("nan"), float("inf"), 1e300, None], "s", [1600000000] + [None] * 5),
        ([1600000000.25, float("nan"), None], "decimal-s", [1600000000250000, None, None]),
    ],
)  # fmt: skip
def test_a_time_is_exact_or_none(values: list[Any], time: str, ticks: list[int | None]) -> None:
    assert as_ticks(pl.Series("timestamp", values), time).to_list() == ticks


@pytest.mark.parametrize("values", [["1e39"], ["-1e39"], ["inf"], ["nan"], [1e39], [float("nan")]])
def test_a_rating_that_is_not_finite_as_it_is_kept_is_none(values: list[Any]) -> None:
    assert as_ratings(pl.Series("rating", values)).to_list() == [None]


def test_floating_point_ids_are_the_same_beside_any_others() -> None:
    """Whichever are in one block."""
    assert as_ids(pl.Series("item", [3.0, None, float("nan"), -0.0])).to_list() == [3, None, None, 0]
    assert as_ids(pl.Series("item", [3.0, 2.5])).to_list() == ["3", "2.5"]

"""Rules that leave rows out, against a few lines of plain Python."""

import polars as pl
import pytest

from steps.data.filters import RULES, tally

ROWS = [(1, 1, 9, 5.0), (1, 1, 7, 5.0), (1, 1, 7, 4.0), (1, 2, 3, 5.0), (2, 1, 9, 5.0), (1, 1, 9, 5.0), (1, 1, 7, 5.0)]


@pytest.mark.parametrize(
    "columns", [["user", "item"], ["user", "item", "timestamp"], ["user", "item", "rating", "timestamp"]]
)
def test_of_rows_that_agree_the_first_in_time_stays(columns: list[str]) -> None:
    log = pl.DataFrame(ROWS, schema=["user", "item", "timestamp", "rating"], orient="row").with_row_index(
        "row", offset=1
    )
    first: dict[tuple[float, ...], tuple[int, int]] = {}
    for row in log.iter_rows(named=True):
        key, place = tuple(row[name] for name in columns), (row["timestamp"], row["row"])
        first[key] = min(first.get(key, place), place)
    kept = RULES["first_of"](log.lazy(), columns, tally(log.lazy()), lambda part: part).collect()
    assert kept["row"].to_list() == sorted(row for _, row in first.values())

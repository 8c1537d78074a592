"""Validation: every failure at once, with rows; nothing written unless all is well."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from steps.common import yaml_files
from tests.conftest import step

MOVIES = "".join(f"{movie}::Movie {movie} (1999)::Drama\n" for movie in range(1, 41))


def rows(user: int, count: int = 20) -> list[str]:
    return [f"{user}::{movie}::{movie % 5 + 1}::{1000 + movie}" for movie in range(1, count + 1)]


def validate(project: Path, ratings: list[str], movies: str = MOVIES, end: str = "\n") -> str:
    """What validation prints on stderr; checks that it wrote all of its files, or none."""
    raw = project / "data/raw/demo/demo"
    raw.mkdir(parents=True)
    (raw / "ratings.dat").write_text("\n".join(ratings) + end)
    (raw / "movies.dat").write_text(movies)
    arguments = ("--dataset", "demo", "--raw", "data/raw/demo", "--output", "data/valid/demo")
    result = step("validate", *arguments, cwd=project, check=False)
    written = sorted(path.name for path in (project / "data/valid").rglob("*")) if result.returncode == 0 else []
    assert written == (["demo", "interactions.parquet", "items.parquet", "validation.json"] if written else [])
    if result.returncode:
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert not list((project / "data").rglob("*.parquet"))
    return result.stderr


def test_good_rows_keep_their_values_and_places(project: Path) -> None:
    assert validate(project, rows(1) + rows(2)) == ""
    frame = pl.read_parquet(project / "data/valid/demo/interactions.parquet")
    assert frame.schema == {
        "row": pl.UInt32, "user": pl.Int64, "item": pl.Int64, "rating": pl.Float32, "timestamp": pl.Int64,
    }  # fmt: skip
    assert frame.row(21) == (22, 2, 2, 3.0, 1002)
    report = json.loads((project / "data/valid/demo/validation.json").read_text())
    assert report["rows"] == 40
    assert all(check["failures"] == 0 for check in report["checks"])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("1::30::4", ["lines do not have 4 fields", "line 10"]),
        ("1::30::4::5::6", ["lines do not have 4 fields", "line 10"]),
        ("1::30::::2000", ["rating must be not null", "row 10"]),
        ("1::30::7::2000", ["rating must be in_range(1, 5)", "row 10: 7.0"]),
        ("1::30::2.5::2000", ["rating must be multiple of 1", "row 10: 2.5"]),
        ("1::30::3::-2", ["timestamp must be greater_than_or_equal_to(0)", "row 10: -2"]),
        ("1::30::3::soon", ["timestamp must be not null", "row 10"]),
        ("1::999::3::2000", ["item must be in the items file", "row 10: 999"]),
        ("77::30::3::2000", ["20 rows or more per user", "row 10"]),
        ("1::1::3::2000", ["once per user and item", "row 10"]),
        ("", ["lines do not have 4 fields", "line 10"]),
    ],
)
def test_a_bad_row_is_named(project: Path, bad: str, said: list[str]) -> None:
    good = rows(1) + rows(2)
    line = validate(project, [*good[:9], bad, *good[9:]])
    for part in ["ratings.dat", *said]:
        assert part in line


def test_all_failures_are_reported_at_once(project: Path) -> None:
    line = validate(project, [*rows(1), "2::3::7::100", "1::999::3::-1", "3::4"])
    expected = ["row 21: 7.0", "row 22: 999", "row 22: -1", "20 rows or more per user: 2 rows", "line 23"]
    assert [part for part in expected if part not in line] == []


def test_many_failures_show_five_and_count_all(project: Path) -> None:
    line = validate(project, rows(1) + [f"1::{movie}::9::100" for movie in range(21, 31)])
    assert "10 rows are not (row 21: 9.0, row 22: 9.0, row 23: 9.0, row 24: 9.0, row 25: 9.0, ...)" in line


def test_no_final_newline_is_fine(project: Path) -> None:
    assert validate(project, rows(1), end="") == ""


def test_an_empty_file_and_a_missing_one_are_named(project: Path) -> None:
    assert "has no rows" in validate(project, [], end="")
    (project / "data/raw/demo/demo/ratings.dat").unlink()
    arguments = ("--dataset", "demo", "--raw", "data/raw/demo", "--output", "data/valid/demo")
    assert "ratings.dat does not exist" in step("validate", *arguments, cwd=project, check=False).stderr


def test_an_item_that_stands_twice_is_refused(project: Path) -> None:
    assert "stands twice" in validate(project, rows(1), MOVIES + "3::Again::Drama\n")


def change(project: Path, **changes: Any) -> None:
    path = project / "params" / "datasets.yaml"
    datasets = yaml_files.read(path)
    datasets["demo"]["files"] |= changes
    path.write_text(yaml_files.dump(datasets))


@pytest.mark.parametrize(
    ("table", "columns", "said"),
    [
        ("interactions", ["user", "item", "rating", "when"], "files.interactions.columns lacks timestamp"),
        ("interactions", ["user", "item", "stars", "timestamp"], "files.interactions.columns lacks rating"),
        ("items", ["movie", "title", "genres"], "files.items.columns lacks item"),
    ],
)
def test_a_column_that_is_not_named_is(project: Path, table: str, columns: list[str], said: str) -> None:
    files = yaml_files.read(project / "params" / "datasets.yaml")["demo"]["files"]
    change(project, **{table: files[table] | {"columns": columns}})
    assert said in validate(project, rows(1))


def test_ids_are_texts_where_a_late_one_is_no_number(project: Path) -> None:
    """As ISBNs are, of which one in eleven ends in X."""
    isbns = [f"{1000 + number}" for number in range(119)] + ["000100039X"]
    movies = "".join(f"{isbn}::Book::Drama\n" for isbn in isbns)
    assert validate(project, [f"1::{isbn}::5::{place}" for place, isbn in enumerate(isbns)], movies) == ""
    frame = pl.read_parquet(project / "data/valid/demo/interactions.parquet")
    assert (frame.schema["user"], frame.schema["item"]) == (pl.Int64, pl.String)
    assert frame["item"].to_list() == isbns


def test_leading_zeros_tell_ids_apart(project: Path) -> None:
    movies = [str(movie) for movie in range(1, 20)] + ["007", "0007"]
    catalogue = "".join(f"{movie}::Movie::Drama\n" for movie in movies)
    assert validate(project, [f"1::{movie}::5::{place}" for place, movie in enumerate(movies)], catalogue) == ""
    assert pl.read_parquet(project / "data/valid/demo/interactions.parquet")["item"].n_unique() == 21

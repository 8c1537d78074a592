"""Validation: every failure at once, with rows; nothing written unless all is well."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from steps.common import yaml_files
from steps.common.files import sha256, write_json
from tests.conftest import step

MOVIES = "".join(f"{movie}::Movie {movie} (1999)::Drama\n" for movie in range(1, 41))
USERS = "".join(f"{user}::F::25::4::02139\n" for user in (1, 2, 3, 77))

ARGUMENTS = ("--dataset", "demo", "--raw", "data/raw/demo", "--output", "data/valid/demo")


def rows(user: int, count: int = 20) -> list[str]:
    return [f"{user}::{movie}::{movie % 5 + 1}::{1000 + movie}" for movie in range(1, count + 1)]


def validate(project: Path, ratings: list[str], movies: str = MOVIES, end: str = "\n", users: str = USERS) -> str:
    """What validation prints on stderr; checks that it wrote all of its files, or none."""
    raw = project / "data/raw/demo/demo"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "ratings.dat").write_text("\n".join(ratings) + end)
    (raw / "movies.dat").write_text(movies)
    (raw / "users.dat").write_text(users)
    hashes = {f"demo/{path.name}": sha256(path) for path in raw.iterdir()}
    write_json(raw.parent / "manifest.json", {"files": hashes})
    result = step("validate", *ARGUMENTS, cwd=project, check=False)
    written = sorted(path.name for path in (project / "data/valid").rglob("*")) if result.returncode == 0 else []
    files = ["interactions.parquet", "items.parquet", "users.parquet", "validation.json"]
    assert written == (["demo", *files] if written else [])
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
    assert (report["rows"], report["repeats"]) == (40, 0)
    assert all(check["failures"] == 0 for check in report["checks"])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("1::30::4", ["not have 4 fields", "line 10"]),
        ("1::30::4::5::6", ["not have 4 fields", "line 10"]),
        ("1::30::::2000", ["rating must be a number", "row 10: (empty)"]),
        ("1::30::7::2000", ["rating must be from 1 to 5", "row 10: 7)"]),
        ("1::30::good::2000", ["rating must be a number", "row 10: good)"]),
        ("1::30::3::2000.5", ["timestamp must be a time in whole seconds", "row 10: 2000.5)"]),
        ("1::30::2.5::2000", ["rating must be a multiple of 1", "row 10: 2.5"]),
        ("1::30::3::-2", ["timestamp must be from 1970-01-01 to 2100-01-01", "row 10: -2"]),
        ("1::30::3::soon", ["timestamp must be a time in whole seconds", "row 10: soon)"]),
        ("1::999::3::2000", ["item must be in the items file", "row 10: 999"]),
        ("77::30::3::2000", ["20 rows or more per user", "row 10: user 77)"]),
        ("1::1::3::2000", ["once per user and item", "row 10: user 1, item 1)"]),
        ("", ["not have 4 fields", "line 10"]),
    ],
)
def test_a_bad_row_is_named(project: Path, bad: str, said: list[str]) -> None:
    good = rows(1) + rows(2)
    line = validate(project, [*good[:9], bad, *good[9:]])
    for part in ["ratings.dat", *said]:
        assert part in line


def test_all_failures_are_reported_at_once(project: Path) -> None:
    line = validate(project, [*rows(1), "2::3::7::100", "1::999::3::-1", "3::4"])
    expected = ["row 21: 7)", "row 22: 999", "row 22: -1", "20 rows or more per user: 1 row", "line 23"]
    assert [part for part in expected if part not in line] == []


def test_many_failures_show_five_and_count_all(project: Path) -> None:
    line = validate(project, rows(1) + [f"1::{movie}::9::100" for movie in range(21, 31)])
    assert "10 rows are not (row 21: 9, row 22: 9, row 23: 9, row 24: 9, row 25: 9, ...)" in line


def test_no_final_newline_is_fine(project: Path) -> None:
    assert validate(project, rows(1), end="") == ""


def test_an_empty_file_and_a_missing_one_are_named(project: Path) -> None:
    assert "has no rows" in validate(project, [], end="")
    (project / "data/raw/demo/demo/ratings.dat").unlink()
    line = step("validate", *ARGUMENTS, cwd=project, check=False).stderr
    assert "ratings.dat, which data/raw/demo/manifest.json names, is missing; delete the folder" in line


def test_a_raw_file_that_download_did_not_write_is_refused_and_extra_ones_are_not(project: Path) -> None:
    assert validate(project, rows(1)) == ""
    report = json.loads((project / "data/valid/demo/validation.json").read_text())
    raw, valid = project / "data/raw/demo", project / "data/valid/demo"
    assert report["raw_files"] == {
        f"demo/{name}.dat": sha256(raw / f"demo/{name}.dat") for name in ("ratings", "movies", "users")
    }
    tables = ("interactions.parquet", "items.parquet", "users.parquet")
    assert report["files"] == {name: sha256(valid / name) for name in tables}
    (raw / "notes.txt").write_text("mine")
    step("validate", *ARGUMENTS, cwd=project)
    before = {path.name: path.read_bytes() for path in valid.iterdir()}
    with (raw / "demo/ratings.dat").open("a") as file:
        file.write("1::21::3::2000\n")
    line = step("validate", *ARGUMENTS, cwd=project, check=False).stderr
    assert "demo/ratings.dat is not the file that data/raw/demo/manifest.json describes" in line
    assert len(line.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in valid.iterdir()} == before
    write_json(raw / "manifest.json", {"files": ["demo/ratings.dat"]})
    assert "manifest.json is damaged" in step("validate", *ARGUMENTS, cwd=project, check=False).stderr
    (raw / "manifest.json").unlink()
    assert "manifest.json does not exist; run download" in step("validate", *ARGUMENTS, cwd=project, check=False).stderr


@pytest.mark.parametrize("name", ["interactions.parquet", "items.parquet", "users.parquet"])
def test_preprocess_refuses_tables_that_validate_did_not_write(project: Path, name: str) -> None:
    validate(project, rows(1))
    path = project / "data/valid/demo" / name
    content = path.read_bytes()
    arguments = ("--dataset", "demo", "--valid", "data/valid/demo", "--output", "data/processed/demo")
    for damaged in (content[:-9], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
        path.write_bytes(damaged)
        line = step("preprocess", *arguments, cwd=project, check=False).stderr
        assert f"{name} is not the file that data/valid/demo/validation.json describes" in line
        assert not (project / "data/processed").exists() or not list((project / "data/processed").iterdir())
    path.write_bytes(content)
    step("preprocess", *arguments, cwd=project)
    made_of = json.loads((project / "data/processed/demo/made_of.json").read_text())
    assert made_of[name] == sha256(path)


def test_an_item_that_stands_twice_is_refused(project: Path) -> None:
    line = validate(project, rows(1), MOVIES + "3::Again::Drama\n")
    assert "movies.dat: item must be there, and once in the file: 1 row is not (row 41: 3)" in line


def change(project: Path, **changes: Any) -> None:
    path = project / "params" / "datasets.yaml"
    datasets = yaml_files.read(path)
    datasets["demo"]["files"] |= changes
    path.write_text(yaml_files.dump(datasets))


@pytest.mark.parametrize(
    ("table", "columns", "said"),
    [
        ("interactions", ["user", "item", "rating", "when"], "files.interactions.columns: lacks 'timestamp'"),
        ("interactions", ["user", "item", "stars", "timestamp"], "files.interactions.columns: lacks 'rating'"),
        ("items", ["movie", "title", "genres"], "files.items.columns: lacks 'item'"),
        ("items", ["item", "title", "kinds"], "files.items.features: 'genres' is none of its columns"),
        ("users", ["who", "gender", "age", "occupation", "zip"], "files.users.columns: lacks 'user'"),
        (
            "users",
            ["user", "sex", "years", "occupation", "zip"],
            "files.users.features: 'gender' is none of its columns",
        ),
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
    assert validate(project, [f"1::{isbn}::5::{time}" for time, isbn in enumerate(isbns)], movies) == ""
    frame = pl.read_parquet(project / "data/valid/demo/interactions.parquet")
    assert (frame.schema["user"], frame.schema["item"]) == (pl.Int64, pl.String)
    assert frame["item"].to_list() == isbns


def test_leading_zeros_tell_ids_apart(project: Path) -> None:
    movies = [str(movie) for movie in range(1, 20)] + ["007", "0007"]
    catalogue = "".join(f"{movie}::Movie::Drama\n" for movie in movies)
    assert validate(project, [f"1::{movie}::5::{time}" for time, movie in enumerate(movies)], catalogue) == ""
    assert pl.read_parquet(project / "data/valid/demo/interactions.parquet")["item"].n_unique() == 21


def test_repeats_are_counted_where_they_are_allowed(project: Path) -> None:
    path = project / "params/datasets.yaml"
    datasets = yaml_files.read(path)
    del datasets["demo"]["checks"]["unique_user_item"]
    path.write_text(yaml_files.dump(datasets | {"demo": datasets["demo"] | {"repeats": "leave-out"}}))
    assert validate(project, [*rows(1), *rows(2), "1::3::4::2000", "1::3::4::2001", "2::7::1::2000"]) == ""
    assert json.loads((project / "data/valid/demo/validation.json").read_text())["repeats"] == 3


def test_features_are_texts_as_in_the_files(project: Path) -> None:
    users = "2::M::56::16::70072\n1::F::1::10::48067\n"
    movies = MOVIES.replace("(1999)::Drama", "(1999)::Drama|Sci-Fi", 1)
    assert validate(project, rows(1) + rows(2), movies, users=users) == ""
    valid = project / "data/valid/demo"
    table = pl.read_parquet(valid / "users.parquet")
    assert table.schema == {"user": pl.Int64, "gender": pl.String, "age": pl.String, "occupation": pl.String}
    assert table.rows() == [(2, "M", "56", "16"), (1, "F", "1", "10")]
    items = pl.read_parquet(valid / "items.parquet")
    assert items.columns == ["item", "title", "genres"]
    assert items.rows()[:2] == [(1, "Movie 1 (1999)", "Drama|Sci-Fi"), (2, "Movie 2 (1999)", "Drama")]
    report = json.loads((valid / "validation.json").read_text())
    assert report["features"] == {
        "user": {"gender": "category", "age": "category", "occupation": "category"},
        "item": {"genres": {"categories": "|"}},
    }


def test_features_change_nothing_of_the_interactions(project: Path) -> None:
    ratings = rows(1) + rows(2)
    assert validate(project, ratings) == ""
    before = (project / "data/valid/demo/interactions.parquet").read_bytes()
    path = project / "params/datasets.yaml"
    datasets = yaml_files.read(path)
    files = datasets["demo"]["files"]
    del files["users"], files["items"]["features"]
    path.write_text(yaml_files.dump(datasets))
    step("validate", *ARGUMENTS, cwd=project)
    valid = project / "data/valid/demo"
    assert sorted(file.name for file in valid.iterdir()) == ["interactions.parquet", "items.parquet", "validation.json"]
    assert (valid / "interactions.parquet").read_bytes() == before
    assert pl.read_parquet(valid / "items.parquet").columns == ["item", "title"]
    assert json.loads((valid / "validation.json").read_text())["features"] == {"user": {}, "item": {}}


@pytest.mark.parametrize(
    ("users", "movies", "said"),
    [
        ("1::F::1::10::0\n", MOVIES, "demo/ratings.dat: user must be in the users file: 20 rows are not (row 21: 2,"),
        (
            USERS + "1::F::1::10::0\n",
            MOVIES,
            "users.dat: user must be there, and once in the file: 1 row is not (row 5: 1)",
        ),
        (USERS + "::F::1::10::0\n", MOVIES, "user must be there, and once in the file: 1 row is not (row 5: (empty))"),
        (USERS + "4::F::1::10\n", MOVIES, "demo/users.dat: 1 line does not have 5 fields (line 5)"),
        (USERS + "4::::1::10::0\n", MOVIES, "demo/users.dat: gender must be not empty: 1 row is not (row 5: (empty))"),
        (USERS, MOVIES + "41::Film::\n", "demo/movies.dat: genres must be not empty: 1 row is not (row 41: (empty))"),
        (
            USERS,
            MOVIES + "41::Film::Drama\n42::Film::Drama||War\n43::Film::|War\n",
            "genres must be values separated by '|': 2 rows are not (row 42: Drama||War, row 43: |War)",
        ),
    ],
)
def test_a_bad_user_or_feature_is_named(project: Path, users: str, movies: str, said: str) -> None:
    assert said in validate(project, rows(1) + rows(2), movies, users=users)


def test_failures_of_all_files_are_reported_at_once(project: Path) -> None:
    line = validate(project, [*rows(1), "1::30::7::2000"], MOVIES + "41::Film::\n", users=USERS + "4::F::::3::0\n")
    for part in ("row 21: 7)", "age must be not empty", "genres must be not empty"):
        assert part in line


def test_user_ids_are_compared_as_texts_where_one_of_the_files_has_others(project: Path) -> None:
    assert validate(project, rows(1), users="1::F::1::10::0\nanna::M::1::10::0\n") == ""
    valid = project / "data/valid/demo"
    assert pl.read_parquet(valid / "interactions.parquet").schema["user"] == pl.String
    assert pl.read_parquet(valid / "users.parquet")["user"].to_list() == ["1", "anna"]


def test_a_file_without_one_good_line_names_the_lines(project: Path) -> None:
    change(
        project,
        interactions={**yaml_files.read(project / "params/datasets.yaml")["demo"]["files"]["interactions"]}
        | {"header": True},
    )
    line = validate(project, ["user::item::rating::timestamp", "1::2::3", "1::2"])
    assert "demo/ratings.dat: 2 lines do not have 4 fields (line 2, 3)" in line


def filtered(project: Path, *rules: dict[str, Any]) -> str:
    path = project / "params" / "datasets.yaml"
    datasets = yaml_files.read(path)
    del datasets["demo"]["checks"]["unique_user_item"]
    datasets["demo"] |= {"filters": list(rules), "repeats": "leave-out"}
    path.write_text(yaml_files.dump(datasets))
    again = ["1::1::5::900", "1::2::5::1002", "2::3::1::2000"]
    return validate(project, [*rows(1), *rows(2), *again])


def test_of_rows_that_agree_the_first_in_time_is_kept(project: Path) -> None:
    """And of those at one time the first in the file."""
    assert filtered(project, {"first_of": ["user", "item"]}) == ""
    frame = pl.read_parquet(project / "data/valid/demo/interactions.parquet")
    assert frame["row"].to_list() == [*range(2, 42)]
    assert json.loads((project / "data/valid/demo/validation.json").read_text())["filters"] == [
        {"rule": {"first_of": ["user", "item"]}, "dropped": {"rows": 3, "users": 0, "items": 0}}
    ]


@pytest.mark.parametrize("rule", [{"min_rating": 6}, {"k_core": {"user": 50}}, {"min_interactions": {"item": 9}}])
def test_filters_that_leave_nothing_are_named(project: Path, rule: dict[str, Any]) -> None:
    assert "demo/ratings.dat: filters leave none of 43 rows" in filtered(project, rule, {"first_of": ["user"]})


def with_patterns(project: Path) -> None:
    files = yaml_files.read(project / "params/datasets.yaml")["demo"]["files"]
    change(
        project,
        items=files["items"] | {"features": {"year": {"of": "title", "pattern": r"\(([0-9]{4})\)$"}}},
        users=files["users"] | {"features": {"gender": "category", "zip": {"pattern": "^(.)"}}},
    )


def test_a_feature_can_be_a_part_of_a_column(project: Path) -> None:
    with_patterns(project)
    assert validate(project, rows(1) + rows(2), users="2::M::56::16::70072\n1::F::1::10::48067\n") == ""
    valid = project / "data/valid/demo"
    assert pl.read_parquet(valid / "users.parquet").rows() == [(2, "M", "7"), (1, "F", "4")]
    assert pl.read_parquet(valid / "items.parquet").rows()[0] == (1, "Movie 1 (1999)", "1999")


def test_a_column_without_the_part_is_named(project: Path) -> None:
    with_patterns(project)
    line = validate(project, rows(1), MOVIES + "41::Film::Drama\n", users="1::F::1::10::\n")
    assert r"demo/movies.dat: year must be what \(([0-9]{4})\)$ finds: 1 row is not (row 41: Film)" in line
    assert "demo/users.dat: zip must be what ^(.) finds: 1 row is not (row 1: (empty))" in line


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ({"year": {"pattern": "(.)"}}, "features: 'year' is none of its columns"),
        ({"year": {"of": "when", "pattern": "(.)"}}, "features: 'when' is none of its columns"),
        ({"genres": {"of": "title", "pattern": "(.)"}}, "'genres' is a column, and cannot be made of 'title' too"),
        ({"genres": {"pattern": "(.)(.)"}}, "features.genres.pattern: '(.)(.)' has 2 groups; one is the value"),
        ({"genres": {"pattern": "(.)["}}, "features.genres.pattern: '(.)[' is no regular expression"),
    ],
)
def test_a_pattern_that_cannot_be_is_named(project: Path, features: dict[str, Any], said: str) -> None:
    files = yaml_files.read(project / "params/datasets.yaml")["demo"]["files"]
    change(project, items=files["items"] | {"features": features})
    assert said in validate(project, rows(1))

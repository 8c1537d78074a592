"""Text tables in bad shape: each is read right or refused in one line that names the place."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from steps.common.cli import StepError
from steps.data.readers import read_table
from steps.data.values import as_ids


def table(**changes: Any) -> dict[str, Any]:
    columns = ["user", "item", "rating", "timestamp"]
    return {"path": "t.csv", "separator": ",", "header": True, "columns": columns} | changes


def write(folder: Path, text: str | bytes) -> None:
    (folder / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())


def ids(folder: Path) -> pl.Series:
    """The items of the file, typed."""
    return as_ids(read_table(folder, table()).frame["item"])


HEADER = "userId,movieId,rating,timestamp\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (HEADER + '"1",2,3,4\n1,3,3,5\n1,4,3,6,7\n', [4]),
        (HEADER + '1,"2,5",3,4\n1,3,3\n', [3]),
        (HEADER + '1,"two\nlines",3,4\n1,3,3,5\n1,3\n', [5]),
        (HEADER + '1,"say ""hi""",3,4\n', []),
    ],
)
def test_fields_are_counted_where_some_are_quoted(text: str, lines: list[int], tmp_path: Path) -> None:
    write(tmp_path, text)
    assert read_table(tmp_path, table()).malformed == lines


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("item,user,rating,timestamp\n1,2,3,4\n", {}, "line 1: field 1 is item, where `columns` has user; list the"),
        ("user_id,item_id,Timestamp,rating\n1,2,3,4\n", {}, "line 1: field 3 is Timestamp, where `columns` has rating"),
        ("1,2,3,4\n1,3,3,5\n", {}, "line 1: holds numbers alone, where `header: true` says names; set `header: false`"),
        (HEADER.replace("movie", "item") + "1,2,3,4\n", {"header": False}, "line 1: holds the names of the columns"),
        (HEADER.encode() + b"1,caf\xe9,3,4\n", {}, "line 2: is not utf-8; set `encoding: latin-1`"),
        (HEADER + '1,2,3,4\n1,"3,3,5\n1,4,3,6\n', {}, "line 3: a quote is not closed; close it"),
        ("", {}, "has no rows"),
        ("", {"header": False}, "has no rows"),
        (HEADER, {}, "has no rows"),
        ("user,item,rating,timestamp\r1,2,3,4\r", {}, "line 1: has a carriage return alone; end lines with"),
    ],
)
def test_a_file_in_another_form_than_its_entry_says_is_refused(
    text: str | bytes, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, text)
    with pytest.raises(StepError) as refused:
        read_table(tmp_path, table(**changes))
    assert str(refused.value).startswith(f"{tmp_path / 't.csv'}")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("late", ["03", "+3", " 3", "3.0", "x"])
def test_ids_are_numbers_only_if_all_of_them_are(late: str, tmp_path: Path) -> None:
    """However late in the file another one is: it is an item of its own."""
    rows = [f"{user},{user % 7 + 1},3,{user}" for user in range(1, 300)]
    write(tmp_path, HEADER + "\n".join(rows) + "\n")
    assert ids(tmp_path).dtype == pl.Int64
    write(tmp_path, HEADER + "\n".join([*rows, f"1,{late},3,999"]) + "\n")
    items = ids(tmp_path)
    assert items.to_list() == [str(user % 7 + 1) for user in range(1, 300)] + [late]


def test_a_missing_id_stays_missing_among_numbers(tmp_path: Path) -> None:
    write(tmp_path, HEADER + "1,2,3,4\n1,,3,5\n")
    assert ids(tmp_path).to_list() == [2, None]

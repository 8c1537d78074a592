"""Text tables in bad shape: each is read right or refused in one line that names the place."""

import gzip
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from steps.common.cli import StepError
from steps.data import delimited
from steps.data.readers import read_blocks, read_table
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
        ("1,2,3,4\n1,3,3,5\n", {}, "line 1: user is 1, where `header: true` says names; set `header: false`"),
        ("anna,book,3,4\n", {}, "line 1: rating is 3, where `header: true` says names; set `header: false`"),
        (
            "anna,2020-01-01\n",
            {"columns": ["user", "timestamp"]},
            "line 1: timestamp is 2020-01-01, where `header: true`",
        ),
        (
            HEADER + "1,2,3,4\n",
            {"columns": {"user": "who", "item": 2}},
            "line 1: has the column 'who' not; it has userId",
        ),
        ('user,it"em,rating,timestamp\n1,2,3,4\n', {}, "line 1: a quote is not closed; names stand in one line"),
        (HEADER.replace("movie", "item") + "1,2,3,4\n", {"header": False}, "line 1: holds the names of the columns"),
        (HEADER.encode() + b"1,caf\xe9,3,4\n", {}, "line 2: is not utf-8; set `encoding: latin-1`"),
        (HEADER + '1,2,3,4\n1,"3,3,5\n1,4,3,6\n', {}, "line 3: a quote is not closed; close it"),
        (HEADER + '1,5",3,4\n1,"3",3,5\n1,"4",3,6\n', {}, "line 2: a quote within a field"),
        (HEADER.replace("\n", "\r\n") + '1,"2,3,4\r\n' * 3, {}, "line 3: a quote within a field"),
        (HEADER.replace("\n", "\r\n") + '1,2,3,4\r\n1,"2,3,4\r\n1,2,3,4\r\n', {}, "line 3: a quote is not closed"),
        (
            b"\xef\xbb\xbf" + HEADER.encode(),
            {"encoding": "latin-1"},
            "line 1: begins with a mark of utf-8; remove it, or",
        ),
        (HEADER + "1,2,3,4\n\ufeff2,3,3,4\n", {}, "line 3: begins with a mark of utf-8; remove it, or"),
        (gzip.compress(HEADER.encode(), mtime=0), {}, " is packed by gzip, where its entry says text"),
        (HEADER.encode("utf-16"), {"encoding": "latin-1"}, " is UTF-16, where its entry says text"),
        (b"PAR1\x15\r\x15", {}, " is a Parquet file, where its entry says text"),
        (HEADER + "1,2,3,4\n1,\0,3,4\n", {}, "line 3: has a NUL byte"),
        (HEADER.encode("utf-16-le"), {}, "line 1: has a NUL byte"),
        ("1::2::3::4\n1::2::3\x1f4\n", {"separator": "::", "header": False}, "line 2: has the control character 1F"),
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


@pytest.mark.parametrize("separator", [",", "::"])
def test_lines_without_quotes_are_not_counted_field_by_field(
    separator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes longer and gives the same."""
    monkeypatch.setattr(delimited, "_parsed_by_line", lambda *_: pytest.fail("lines are taken one by one"))
    write(tmp_path, (HEADER + "1,2,3,4\n1,,3,5\n").replace(",", separator))
    found = read_table(tmp_path, table(separator=separator))
    assert found.frame["item"].to_list() == ["2", None]


@pytest.mark.parametrize("block_bytes", [1, 30, 1 << 24])
@pytest.mark.parametrize("separator", [",", "::"])
def test_what_quotes_hold_is_as_it_was(separator: str, block_bytes: int, tmp_path: Path) -> None:
    write(
        tmp_path, HEADER.replace(",", separator) + separator.join(['"a::b,c"', '"two\nlines"', '""', '"""x"""']) + "\n"
    )
    (block,) = read_blocks(tmp_path, table(separator=separator, quotes=True), lambda block: block, block_bytes)
    assert block.frame.rows() == [(2, "a::b,c", "two\nlines", None, '"x"')]


def test_the_first_record_may_have_several_lines_where_there_are_no_names(tmp_path: Path) -> None:
    write(tmp_path, '1,"two\nlines",3,4\n1,2,3,5\n')
    assert read_table(tmp_path, table(header=False)).frame["row"].to_list() == [1, 3]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"user": 1, "item": "\\ud800"}', "surrogates not allowed"),
        ('{"user": 1, "item": NaN}', "TapeError"),
        ('{"user": 1, "item": 1e400}', "InvalidNumber"),
        ('{"user": 1, "item": 2} {"user": 1, "item": 3}', "Extra data"),
        ("", "is empty"),
        ("[]", "is no JSON object"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(line: str, said: str, tmp_path: Path) -> None:
    write(tmp_path, f'{{"user": 1, "item": "\\ud83d\\ude00"}}\n{line}\n{{"user": 1, "item": 3}}\n')
    settings = {"path": "t.csv", "format": "jsonl", "columns": ["user", "item"]}
    with pytest.raises(StepError, match=r"t\.csv, line 2: is ") as refused:
        read_table(tmp_path, settings)
    assert said in str(refused.value)


def test_an_empty_text_is_missing(tmp_path: Path) -> None:
    write(tmp_path, '{"user": "", "item": "3"}\n')
    frame = read_table(tmp_path, {"path": "t.csv", "format": "jsonl", "columns": ["user", "item"]}).frame
    assert frame.rows() == [(1, None, "3")]


def test_parquet_has_texts_in_several_types(tmp_path: Path) -> None:
    texts = pl.Series(["3", "", None])
    kinds = {"user": texts.cast(pl.Categorical), "item": texts.cast(pl.Binary), "title": texts}
    pl.DataFrame(kinds).write_parquet(tmp_path / "t.csv")
    settings = {"path": "t.csv", "format": "parquet", "columns": list(kinds)}
    assert read_table(tmp_path, settings).frame.rows() == [(1, "3", "3", "3"), (2, *[None] * 3), (3, *[None] * 3)]
    pl.DataFrame({"user": [b"\xe9"], "item": [1], "title": [1]}).write_parquet(tmp_path / "t.csv")
    with pytest.raises(StepError, match=r"t\.csv is damaged \(invalid utf8"):
        read_table(tmp_path, settings)


def test_a_panic_of_polars_is_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: Any) -> None:
        raise pl.exceptions.PanicException("called `Option::unwrap()` on a `None` value")

    write(tmp_path, '{"user": 1}')
    monkeypatch.setattr(pl, "read_parquet_schema", panic)
    with pytest.raises(StepError, match=r"t\.csv is damaged \(called"):
        read_table(tmp_path, {"path": "t.csv", "format": "parquet", "columns": ["user"]})

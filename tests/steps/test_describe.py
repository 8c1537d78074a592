"""The entry that `describe` prints of a file works at once, gives what a plain reading does, and tells its doubts."""

import codecs
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from steps import describe as step_describe
from steps.common import params, yaml_files
from steps.common.cli import StepError
from steps.data.description import opening, tables
from steps.data.description.column_names import role_of
from tests.conftest import ROOT, step
from tests.steps.forms import (
    ALL,
    CSV,
    FORMS,
    LINES,
    NAMES,
    ROWS,
    TEXTS,
    Rows,
    Sequences,
    changed,
    column,
    csv_of,
    iso,
    jsonl,
    parquet,
    plain,
    text,
    values,
    zipped,
)  # fmt: skip

MOVIES = [[item, f"Film, the {item}th", "Drama|Comedy" if item % 2 else "War"] for item in range(1000, 1140)]
PEOPLE = [[user, "F" if user % 2 else "M", 25 + user % 3] for user in range(11, 20)]


KNOWN = yaml_files.dump({name: params.load("datasets", ROOT / "params")[name] for name in ("demo", "ml-1m")})


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with params alone, which is all that the steps read of a project; of two data sets, as reading all of
    them takes longer than the step."""
    shutil.copytree(ROOT / "params", tmp_path / "house/params", ignore=shutil.ignore_patterns("local"))
    (tmp_path / "house/params/datasets.yaml").write_text(KNOWN)
    return tmp_path / "house"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def described(house: Path, *arguments: object) -> tuple[str, dict[str, Any], list[str]]:
    """What the step prints, its entry as it is read from where it belongs, and the doubts."""
    result = step("describe", *arguments, cwd=house)
    local = house / "params/local"
    (local / "experiments").mkdir(parents=True, exist_ok=True)
    (local / "datasets.yaml").write_text(result.stdout)
    (name,) = yaml_files.parse(result.stdout, "printed")
    experiment = [line[7:] for line in result.stdout.splitlines() if line.startswith("#      ")]
    (local / f"experiments/{name}.yaml").write_text("\n".join(experiment))
    assert f"experiment {name}: 7 runs" in step("check", "--experiment", name, cwd=house).stdout
    doubts = result.stderr.splitlines()
    assert sorted(doubts) == sorted(
        line.strip().replace("# ", "describe: ", 1)
        for line in result.stdout.splitlines()
        if line.lstrip().startswith("# DOUBT: ")
    )
    return result.stdout, params.load("datasets", house / "params")[name], doubts


def made(house: Path, *arguments: object) -> tuple[dict[str, Any], Sequences, Path]:
    """The entry of a file, the sequences that the steps make by it, and their folder."""
    printed, entry, _ = described(house, *arguments)
    (name,) = yaml_files.parse(printed, "printed")
    raw, valid, processed = (f"data/{kind}/{name}" for kind in ("raw", "valid", "processed"))
    step("download", "--dataset", name, "--output", raw, cwd=house)
    step("validate", "--dataset", name, "--raw", raw, "--output", valid, cwd=house)
    step("preprocess", "--dataset", name, "--valid", valid, "--output", processed, cwd=house)
    return entry, sequences(house / processed), house / processed


def sequences(folder: Path) -> Sequences:
    tensors = load_file(folder / "sequences.safetensors")
    users = pl.read_parquet(folder / "users.parquet")["raw_id"].cast(pl.String).to_list()
    items = ["", *pl.read_parquet(folder / "items.parquet")["raw_id"].cast(pl.String)]
    rated = tensors.get("rating", np.full(len(tensors["item"]), np.nan)).tolist()
    rows = [
        (items[item], time, rating if rating == rating else None)
        for item, time, rating in zip(tensors["item"], tensors["timestamp"].tolist(), rated, strict=True)
    ]
    bounds = tensors["offsets"].tolist()
    return {user: rows[begin:end] for user, begin, end in zip(users, bounds[:-1], bounds[1:], strict=True)}


@pytest.mark.parametrize("form", FORMS)
def test_the_entry_of_a_file_works_at_once(form: str, house: Path) -> None:
    name, content, rows, said = FORMS[form]
    entry, found, _ = made(house, write(house, name, content))
    table = entry["files"]["interactions"]
    assert {key: table.get(key) for key in said} == said
    expected = plain(rows, timed=table.get("time") != "none")
    assert found == expected
    assert entry["source"]["mirrors"] == [str(house)]
    assert entry["checks"]["min_user_interactions"] == min(map(len, expected.values()))
    pairs = [(user, row[0]) for user, sequence in expected.items() for row in sequence]
    assert entry["checks"].get("unique_user_item", False) == (len(set(pairs)) == len(pairs))
    ratings = [row[2] for sequence in expected.values() for row in sequence if row[2] is not None]
    assert bool(ratings) == ("rating" in entry["checks"])


def test_what_is_checked_and_trained_is_inferred(house: Path) -> None:
    _, entry, _ = described(house, write(house, "My Shop.v2.csv", CSV), "--name", "shop")
    assert entry["title"] == "My Shop.v2"
    assert entry["checks"] == {
        "rating": [0.5, 5], "rating_step": 0.5, "unique_user_item": True, "min_user_interactions": 4,
    }  # fmt: skip
    assert (entry["training"]["max_len"], entry["training"]["epochs"]) == (20, 200)
    assert list(params.load("datasets", house / "params"))[-1] == "shop"


@pytest.mark.parametrize(
    ("name", "given"),
    [("My Shop (2).csv.gz", "my-shop-2"), ("Ünïcode_.csv.gz", "n-code"), ("ml-1m.csv.gz", "ml-1m-own"),
     ("train.csv.gz", "train-own"), ("demo.csv.gz", "demo-own"), ("....csv.gz", "data"),
     ('a: "b" #c\'\n.csv.gz', "a-b-c")],
)  # fmt: skip
def test_the_name_comes_from_the_file(name: str, given: str, house: Path) -> None:
    _, entry, _ = described(house, write(house, name, gzip.compress(CSV.encode())))
    assert entry["source"]["file"] == name
    assert list(params.load("datasets", house / "params"))[-1] == given


@pytest.mark.parametrize(("rows", "dim"), [(999_999, 50), (1_000_000, 50), (10_000_000, 256)])
def test_settings_of_training_go_with_the_size(rows: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    kept = pl.DataFrame({"user": np.zeros(rows, dtype=np.int8)})
    proposal = step_describe.Proposal({}, [], None, kept, np.full(10, 150))
    training, _ = step_describe._training(proposal, 1)
    assert training["base"]["dim"] == dim
    assert training["max_len"] == 200
    schema = yaml_files.read(ROOT / "params/schemas/datasets.yaml")
    validator = params.jsonschema.Draft202012Validator(
        {"$defs": schema["$defs"], **schema["additionalProperties"]["properties"]["training"]}
    )
    assert list(validator.iter_errors(training)) == []


# Items and users


def check_entities(house: Path, entry: dict[str, Any], folder: Path, found: Sequences) -> None:
    assert found == plain(ROWS)
    items = pl.read_parquet(folder / "items.parquet")
    assert items["raw_id"].to_list() == [item for item, _, _ in MOVIES]
    assert items["title"].to_list() == [title for _, title, _ in MOVIES]
    assert entry["files"]["items"]["features"] == {"genres": {"categories": "|"}}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["features"]["item"]["genres"] == ["Comedy", "Drama", "War"]


def test_items_and_users_in_one_zip(house: Path) -> None:
    files = {
        "ml/ratings.csv": CSV,
        "ml/tags.csv": csv_of(ROWS, rating=lambda _: "fun").replace("rating", "tag"),
        "ml/links.csv": text([[item, 7, 9] for item, _, _ in MOVIES], header=["movieId", "imdbId", "tmdbId"]),
        "ml/movies.csv": text(MOVIES, header=["movieId", "title", "genres"]),
        "ml/users.csv": text(PEOPLE, header=["userId", "gender", "age"]),
        "ml/notes.csv": text([["a", "b"], ["c", "d"]]),
        "__MACOSX/ml/._ratings.csv": b"\0\1\2",
        "ml/README.txt": "Read me.\n\nAll rights reserved, by all.\n",
    }  # fmt: skip
    entry, found, folder = made(house, write(house, "latest.zip", zipped(files)))
    assert {name: table["path"] for name, table in entry["files"].items()} == {
        "interactions": "ml/ratings.csv", "items": "ml/movies.csv", "users": "ml/users.csv",
    }  # fmt: skip
    check_entities(house, entry, folder, found)


def test_items_and_users_without_names(house: Path) -> None:
    """MovieLens' older zips; parts of the interactions are there too, and the ids of users and items overlap."""
    movies = text([[item - 989, f"Café {item}", "01-Jan-1995", "", *"0101"] for item in range(1000, 1140)], "|")
    rows = changed(ROWS, item=lambda item: item - 989)
    content = text(values(rows, *ALL), "\t")
    files = {
        "ml-100k/u.user": text([[user, 24, "M", "technician", "85711"] for user in range(11, 20)], "|"),
        "ml-100k/u.genre": "unknown|0\nAction|1\n",
        "ml-100k/ua.base": content[: len(content) // 2].rpartition("\n")[0] + "\n",
        "ml-100k/u.data": content,
        "ml-100k/u.item": movies.encode("latin-1"),
        "ml-100k/mku.sh": "#!/bin/sh\nexit 0\n",
    }
    entry, found, folder = made(house, write(house, "ml-100k.zip", zipped(files)))
    assert {name: table["path"][8:] for name, table in entry["files"].items()} == {
        "interactions": "u.data", "items": "u.item", "users": "u.user",
    }  # fmt: skip
    assert entry["files"]["items"]["columns"] == {"item": 1, "title": 2}
    assert found == plain(rows)
    assert pl.read_parquet(folder / "items.parquet")["title"][0] == "Café 1000"


def test_titles_with_quotes_in_them(house: Path) -> None:
    items = write(house, "movies.csv", "movieId,title\n" + "".join(f'{item},{item}" film\n' for item, _, _ in MOVIES))
    entry, _, folder = made(house, write(house, "log.csv", CSV), "--items", items)
    assert entry["files"]["items"]["quotes"] is False
    assert pl.read_parquet(folder / "items.parquet")["title"][0] == '1000" film'


def test_items_and_users_in_files_of_their_own(house: Path) -> None:
    interactions = write(house, "log.csv", CSV)
    items = write(house, "meta.jsonl.gz", gzip.compress(jsonl([
        {"id": item, "features": [], "title": title, "genres": genres} for item, title, genres in MOVIES
    ]).encode()))  # fmt: skip
    users = write(house, "people.tsv", text(PEOPLE, "\t", ["user", "gender", "age"]))
    entry, found, folder = made(house, interactions, "--items", items, "--users", users)
    assert [source["file"] for source in entry["source"]] == ["log.csv", "meta.jsonl.gz", "people.tsv"]
    check_entities(house, entry, folder, found)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (text(MOVIES[9:], header=["movieId", "title", "genres"]), "'movies.csv' lacks"),
        (text([*MOVIES, MOVIES[0]], header=["movieId", "title", "genres"]), "has no column of items, each once"),
        (text([[1, 2, 3]], header=["a", "b", "c"]), "movies.csv"),
    ],
)
def test_items_that_do_not_fit_are_left_out(content: str, said: str, house: Path) -> None:
    items = write(house, "movies.csv", content)
    _, entry, doubts = described(house, write(house, "log.csv", CSV), "--items", items)
    assert list(entry["files"]) == ["interactions"]
    assert entry["source"]["file"] == "log.csv"
    assert any(said.replace("'", "") in line.replace("'", "") for line in doubts), doubts


# Doubts


def grouped(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: row["user"])


def of(rows: Rows, *names: str) -> str:
    return text(values(rows, *names), header=[dict(zip(ALL, NAMES, strict=True)).get(name, name) for name in names])


TWICE = [[*row, row[0] + 5] for row in values(ROWS, *ALL)]
ALIKE = changed(ROWS, item=lambda item: f"0{item - 1}" if item % 2 else str(item))
ONE_EACH = [{"user": user, "item": 1000, "rating": 3, "time": 1_500_000_000} for user in (1, 2, 3)]
#: A file, and what is said of it.
DOUBTS: dict[str, tuple[str, str]] = {
    "times in 1970": (csv_of(ROWS, time=lambda time: time - 1_500_000_000), "as `s` the events are from 1970-01-01 to"),
    "nanoseconds": (csv_of(ROWS, time=lambda time: time * 10**9), "from year 49"),
    "nanoseconds would fit": (csv_of(ROWS, time=lambda time: time * 10**9), "nanoseconds would fit"),
    "days": (csv_of(ROWS, time=lambda time: time // 86400), "days would fit"),
    "YYYYMMDD": (csv_of(ROWS, time=iso("%Y%m%d")), "dates as YYYYMMDD would fit"),
    "a few times in 1970": (csv_of(ROWS, time=lambda time: time % 9 and time), "are before 1990 or after 2039"),
    "a column of times that is none": (csv_of(ROWS, time=iso("%m %d, %Y")), "'timestamp' holds no times in a form"),
    "one user": (csv_of(ROWS, user=lambda _: 7), "the user is the same in every row, 7"),
    "one time": (csv_of(ROWS, time=lambda _: 1_500_000_000), "the timestamp is the same in every row"),
    "one rating": (csv_of(ROWS, rating=lambda _: 4), "every rating is 4, which says nothing"),
    "users of one row": (csv_of([*ROWS, *ONE_EACH]), "3 of 12 users have one row"),
    "rows left out": (csv_of([*ROWS, *ONE_EACH]), "the filters leave out 3 of"),
    "two users": (text(TWICE, header=[*NAMES, "session_id"]), "for the user; it could be session_id too"),
    "two items": (text(TWICE, header=[*NAMES, "asin"]), "asin too"),
    "zeros": (csv_of(ALIKE), "ids of items look like another, such as"),
    "blanks": (csv_of(TEXTS) + "u011x ,i-7,1,1500000000\n", "2 ids of users look like another"),
    "case": (csv_of(TEXTS) + "U011x,i-7,1,1500000000\n", "look like another, such as 'u011x' and 'U011x'"),
    "missing ratings": (CSV.replace(",0.5,", ",,"), "have no rating"),
    "copies": (CSV + LINES[: LINES.index("\n") + 1], "1 of 106 rows (0.9%) are exact duplicates of another"),
    "copies without times": (of([*ROWS, ROWS[0]], *ALL[:3]), "without times they count as repeats"),
    "no zone": (csv_of(ROWS, time=iso("%Y-%m-%d %H:%M:%S")), "times name no zone; UTC is assumed"),
    "whole days": (csv_of(ROWS, time=lambda time: time // 86400 * 86400), "all times are whole days"),
    "no times, grouped": (of(grouped(ROWS), *ALL[:3]), "rows are grouped by user"),
    "no times, in no order": (of(ROWS, *ALL[:3]), "rows are sorted by nothing"),
    "no times, by item": (of(sorted(ROWS, key=lambda row: (row["user"], row["item"])), *ALL[:3]), "sorted by item"),
    "few items": (csv_of(ROWS, item=lambda item: item % 50), "there are only 45 items"),
    "names that none knows": (text(values(ROWS, *ALL), header=["a", "b", "c", "d"]), "though none is known"),
    "names that could be a row": (text(values(TEXTS, *ALL[:2])), "is taken for a row, though it could have names"),
    "no names": (LINES, "there are no names: user from field 1, item from field 2 by place"),
    "users of one time": (csv_of(ROWS, time=lambda _: 1_500_000_000), "9 of 9 users (100%) have all rows"),
    "users in the second column": (
        text(values(grouped(ROWS), "item", "user", "time")),
        "item from field 1 as times go up within field 2 alone",
    ),
    "words for ratings": (CSV.replace(",0.5,", ",bad,"), "rating, the rating, is no number in"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DOUBTS)
def test_a_doubt_is_told(kind: str, house: Path) -> None:
    content, said = DOUBTS[kind]
    _, _, doubts = described(house, write(house, "a.csv", content))
    assert any(said.replace("'", "") in line.replace("'", "") for line in doubts), doubts


def test_a_doubt_stands_above_its_key(house: Path) -> None:
    printed, _, _ = described(house, write(house, "a.csv", csv_of(ROWS, time=iso("%Y-%m-%d %H:%M:%S"))))
    lines = [line.strip() for line in printed.splitlines()]
    assert lines[lines.index("# DOUBT: times name no zone; UTC is assumed") + 1] == "zone: UTC"


def test_a_usual_file_raises_no_doubt(house: Path) -> None:
    _, _, doubts = described(house, write(house, "a.csv", csv_of([
        row | {"item": row["item"] + shift, "user": row["user"] + shift} for row in ROWS for shift in (0, 200)
    ])))  # fmt: skip
    assert doubts == []


def test_other_bytes_than_utf_8_are_told(house: Path) -> None:
    content = csv_of(changed(TEXTS, item="{}\x80".format)).encode("latin-1")
    _, _, doubts = described(house, write(house, "a.csv", content))
    assert "line 2 is not UTF-8" in doubts[0]
    assert "iconv -f WINDOWS-1252" in doubts[0]


# What cannot be described


MANY = b"1,2,3,1500000000\n" * 5
#: A file's name and content, and what is said of it.
REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "UTF-16": ("a.csv", CSV.encode("utf-16"), "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
    "UTF-16 without a mark": ("a.csv", CSV.encode("utf-16-le"), "iconv -f UTF-16LE"),
    "UTF-32": ("a.csv", codecs.BOM_UTF32_LE + CSV.encode("utf-32-le"), "iconv -f UTF-32"),
    "zero bytes": ("a.csv", CSV.encode() + b"1,\0,3\n", "line 107: has zero bytes"),
    "nothing": ("a.csv", "", "has no rows"),
    "names alone": ("a.csv", "userId,movieId\n", "has no rows"),
    "old line ends": ("a.csv", CSV.replace("\n", "\r"), "line 1: has a carriage return alone"),
    "a remark": ("a.csv", "# all of it\n" + CSV, "line 1: has 1 fields where most lines have 4"),
    "a name over lines": ("a.csv", '"user\nId",item\n' + LINES.replace(".", "0"), "line 1: "),
    "one column": ("a.csv", "1\n2\n3\n", "line 1: none of"),
    "no users": ("a.csv", "movieId,title\n1,A long name\n2,Another name\n", "no columns of users and items found"),
    "a line too short": ("a.csv", CSV + "1,2\n", "line 107: not as many fields as line 1 has"),
    "no item": ("a.csv", CSV + "1,,3,1500000000\n", "row 107: 1 rows have no item"),
    "a user that is empty": ("a.csv", CSV + '"",7,3,1500000000\n', "row 107: 1 rows have no user"),
    "no time": ("a.csv", CSV + "1,7,3,\n", "row 107: 1 times are missing"),
    "another time": ("a.csv", CSV + "1,7,3,soon\n", "such as soon"),
    "an open quote": ("a.csv", CSV + '1,"7,3,1500000000\n1,8\n', "line 107: a quote is not closed"),
    "users of two rows": ("a.csv", "user,item\n1,2\n1,3\n2,3\n", "no user has 3"),
    "a JSON array": ("a.json", json.dumps([{"user": 1}]), "is one JSON array"),
    "JSON over lines": ("a.json", json.dumps({"user": 1}, indent=1), "line 1: is not JSON"),
    "JSON in latin-1": ("a.json", '{"user": 1, "item": "é"}\n'.encode("latin-1"), "line 1: is not UTF-8"),
    "a gz by another name": ("a.csv", gzip.compress(CSV.encode()), "is packed, as .gz files are"),
    "no gz": ("a.csv.gz", CSV, "is not what its name says, .gz"),
    "a broken gz": ("a.csv.gz", gzip.compress(CSV.encode())[:-20], "is damaged"),
    "a tar": ("a.tar.gz", gzip.compress(b"a.csv".ljust(257, b"\0") + b"ustar\0".ljust(255, b"\0")), "is a tar archive"),
    "bzip2": ("a.csv.bz2", b"BZh91AY&SY", "is packed (bzip2)"),
    "a spreadsheet": ("a.xlsx", zipped({"xl/a.xml": "<a/>"}), "is a spreadsheet; save it as CSV"),
    "an empty zip": ("a.zip", zipped({}), "has no files"),
    "a zip of a gz": ("a.zip", zipped({"a.csv.gz": gzip.compress(b"1")}), "(a.csv.gz) is packed (.gz); unpack it"),
    "a broken zip": ("a.zip", zipped({"a.csv": CSV})[:-9], "is damaged"),
    "broken Parquet": ("a.parquet", b"PAR1" + b"x" * 99, "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_described_is_refused_in_one_line(kind: str, house: Path) -> None:
    name, content, said = REFUSED[kind]
    result = step("describe", write(house, name, content), cwd=house, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"describe: {house / name}")
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.csv"], "missing.csv does not exist; name a file"),
        (["params"], "params is a folder"),
        (["a.csv", "--name", "No"], "--name No: lower-case letters"),
        (["a.csv", "--name", "ml-1m"], "--name ml-1m: a data set, experiment, study or step is called so"),
        (["a.csv", "--items", "b/a.csv"], "two files are both called a.csv"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: list[str], said: str, house: Path) -> None:
    write(house, "a.csv", CSV)
    (house / "b").mkdir()
    write(house / "b", "a.csv", text(MOVIES, header=["movieId", "title", "genres"]))
    result = step("describe", *arguments, cwd=house, check=False)
    assert result.returncode == 1
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


# Names of columns that are YAML, or end a comment


HOSTILE = [
    '!!python/object/apply:os.system ["id"]',
    "a: b # c\n- d: \"e\" 'f'",
    "---\n...\n%YAML",
    "\x1b[31m{*x, &y}\u2028",
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_names_of_any_signs_come_back(kind: str, house: Path) -> None:
    names = HOSTILE if kind != "csv" else [" ".join(name.split()) for name in HOSTILE]
    names = [f"{name} {role}" for name, role in zip(names, ("user id", "item id", "rating", "timestamp"), strict=True)]
    columns = dict(zip(names, (column(ROWS, name) for name in ALL), strict=True))
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    content = {
        "parquet": lambda: parquet({**columns, "x\n# DOUBT: y": [1] * len(ROWS)}),
        "jsonl": lambda: jsonl(rows),
        "csv": lambda: text([["-", *row.values()] for row in rows], header=["x: #", *names]),
    }[kind]()
    entry, found, _ = made(house, write(house, f"a.{kind}", content))
    assert entry["files"]["interactions"]["columns"] == dict(
        zip(("user", "item", "rating", "timestamp"), names, strict=True)
    )
    assert found == plain(ROWS)


# Large files


@pytest.mark.parametrize("packed", [False, True])
def test_of_a_large_file_a_part_is_looked_at(packed: bool, house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows may be otherwise, so that less is checked; the entry works for all of it."""
    later = changed(ROWS, user=lambda user: user + 100, rating=lambda rating: rating * 4)
    again = ROWS[0] | {"time": 1_600_000_000}
    rows = [*ROWS, *later, again, {"user": 999, "item": 5, "rating": 3, "time": 1_600_000_000}]
    content = csv_of(rows).encode()
    monkeypatch.setattr(opening, "WHOLE", len(content) - 10)
    monkeypatch.setattr(tables, "PART", 2000)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(opening, "HEAD", len(content) - 20)
    monkeypatch.setattr(opening, "_CHUNK", 64)
    path = write(house, "a.csv.gz" if packed else "a.csv", gzip.compress(content) if packed else content)
    printed, _, _ = described(house, path)
    assert "# The file is large: counts are of its first " in printed
    entry, found, _ = made(house, path)
    assert entry["filters"] == [{"min_interactions": {"user": 3}}]
    assert entry["checks"] == {"missing_ratings": True, "min_user_interactions": 3}
    assert entry["training"]["max_len"] == 200
    assert found == plain(rows)


@pytest.mark.parametrize(
    ("name", "role"),
    [("user_id", "user"), ("UID", "user"), ("reviewerID", "user"), ("anonymous_user_id", "user"), ("visitorid", "user"),
     ("itemId", "item"), ("parent_asin", "item"), ("Book-ID", "item"), ("track_id", "item"), ("SKU", "item"),
     ("review/score", "rating"), ("overall", "rating"), ("Book-Rating", "rating"), ("unixReviewTime", "timestamp"),
     ("timestamp_ms", "timestamp"), ("event_time", "timestamp"), ("createdAt", "timestamp"), ("movie title", "title"),
     ("id", None), ("release_date", None), ("helpful_vote", None), ("price", None), ("review_id", None)],
)  # fmt: skip
def test_names_tell_what_columns_are(name: str, role: str | None) -> None:
    found = role_of(name)
    assert (found[0] if found else None) == role


def test_the_step_is_a_name_that_no_experiment_can_have(house: Path) -> None:
    (house / "params/local/experiments").mkdir(parents=True)
    shutil.copyfile(house / "params/experiments/demo.yaml", house / "params/local/experiments/describe.yaml")
    with pytest.raises(StepError, match="cannot be called 'describe', as a step or folder is"):
        params.experiments(house / "params")

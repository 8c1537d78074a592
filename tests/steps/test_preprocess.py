"""Preprocessing: order, ids, split and hashes, against a few lines of plain Python."""

import hashlib
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file

from steps.common import yaml_files
from steps.common.cli import StepError
from steps.common.files import sha256, write_json
from steps.data import build as build_module
from steps.data.build import build_sequences, sorted_rows
from steps.data.readers import read_table
from steps.data.sequences import Sequences, load_sequences
from steps.data.split import split_sequences
from steps.data.split import split_sha256 as torch_split_sha256
from steps.data.split_hash import split_sha256
from steps.preprocess import write_sequences
from steps.validate import write_valid
from tests.conftest import ROOT, step


def table(rows: list[tuple[int, int, int]]) -> pl.DataFrame:
    """Rows (user, item, timestamp), in file order."""
    frame = pl.DataFrame(rows, schema={"user": pl.Int64, "item": pl.Int64, "timestamp": pl.Int64}, orient="row")
    return frame.with_row_index("row", offset=1)


def build(
    rows: pl.DataFrame, items: pl.DataFrame, ties: str = "file-order", **settings: int
) -> tuple[dict[str, np.ndarray], pl.DataFrame, pl.DataFrame, dict[str, Any]]:
    """The tensors of the file that `build_sequences` writes, and what it returns."""
    with tempfile.TemporaryDirectory() as folder:
        users, catalogue, told = build_sequences(rows.lazy(), items, Path(folder), ties, **settings)
        assert [path.name for path in Path(folder).iterdir()] == ["sequences.safetensors"]
        return load_file(Path(folder, "sequences.safetensors")), users, catalogue, told


def write(
    rows: pl.DataFrame,
    items: pl.DataFrame,
    output: Path,
    ties: str = "file-order",
    users: pl.DataFrame | None = None,
    features: dict[str, Any] | None = None,
    **told: Any,
) -> None:
    """Write the sequences of tables into the new folder `output`, as if validate had written the tables."""
    output.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        valid = Path(folder)
        tables = {"interactions": rows, "items": items} | ({} if users is None else {"users": users})
        for name, frame in tables.items():
            frame.write_parquet(valid / f"{name}.parquet")
        files = {path.name: sha256(path) for path in sorted(valid.iterdir())}
        write_sequences(valid, {"files": files, "features": features or {}, **told}, output, ties)


ITEMS = pl.DataFrame({"item": [50, 7, 30, 9, 11], "title": ["e", "a", "d", "b", "c"]})


def test_rows_are_ordered_by_time_then_by_their_order_in_the_file() -> None:
    rows = [(2, 50, 5), (1, 7, 9), (2, 7, 5), (1, 30, 3), (2, 30, 1), (2, 9, 5)]
    tensors, users, items, _ = build(table(rows), ITEMS)
    assert items.rows() == [(1, 7, "a"), (2, 9, "b"), (3, 11, "c"), (4, 30, "d"), (5, 50, "e")]
    assert users.rows() == [(0, 1), (1, 2)]
    assert tensors["offsets"].tolist() == [0, 2, 6]
    assert tensors["item"].tolist() == [4, 1, 4, 5, 1, 2]  # the tie at 5 keeps the file's order 50, 7, 9
    assert tensors["timestamp"].tolist() == [3, 9, 1, 5, 5, 5]


def test_order_of_rows_matters_only_inside_a_tie() -> None:
    rows = [(user, item, item % 3) for user in range(30) for item in (7, 9, 11, 30, 50)]
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    one, two = (build(table(order), ITEMS)[0] for order in (rows, shuffled))
    assert one["timestamp"].tolist() == two["timestamp"].tolist()
    for tensors, order in ((one, rows), (two, shuffled)):
        expected = []
        for user in range(30):
            expected += [
                item for _, item, _ in sorted((row for row in order if row[0] == user), key=lambda row: row[2])
            ]
        raw = {1: 7, 2: 9, 3: 11, 4: 30, 5: 50}
        assert [raw[item] for item in tensors["item"].tolist()] == expected


@pytest.mark.parametrize("ties", ["item-id", "shuffled"])
def test_other_tie_rules_reorder_only_ties_and_are_deterministic(ties: str) -> None:
    rows = [(user, item, item % 3) for user in range(30) for item in (50, 9, 11, 30, 7)]
    stable, other, again = (build(table(rows), ITEMS, rule)[0] for rule in ("file-order", ties, ties))
    assert other["item"].tolist() == again["item"].tolist() != stable["item"].tolist()
    assert other["timestamp"].tolist() == stable["timestamp"].tolist()
    for user in range(30):
        part = slice(5 * user, 5 * user + 5)
        pairs = list(zip(other["timestamp"][part].tolist(), other["item"][part].tolist(), strict=True))
        assert sorted(pairs) == sorted(
            zip(stable["timestamp"][part].tolist(), stable["item"][part].tolist(), strict=True)
        )
        assert ties == "shuffled" or pairs == sorted(pairs)


ROWS = [(1, 7, 1), (1, 9, 2), (1, 11, 2), (2, 7, 3), (2, 9, 4), (2, 50, 5), (2, 30, 9)]


def test_the_manifest_counts_ties_and_names_no_protocol_s_split() -> None:
    found = build(table(ROWS), ITEMS)[3]
    assert found["share_of_users_with_tied_target"] == 0.5
    assert found["share_of_rows_tied_with_the_row_before"] == round(1 / 7, 4)
    assert found["sequence_length"] == {"shortest": 3, "mean": 3.5, "longest": 4}
    assert not any("sha256" in key for key in found)


@pytest.mark.parametrize(
    ("protocol", "parts"),
    [
        (
            {"split": "leave-last-out", "report": "best"},
            {
                "train": [(0, 1, 1), (1, 1, 3), (1, 2, 4)],
                "test": [(0, 3, 2), (1, 4, 9)],
                "valid": [(0, 2, 2), (1, 5, 5)],
            },
        ),
        (
            {"split": "leave-last-out", "report": "last"},
            {"train": [(0, 1, 1), (0, 2, 2), (1, 1, 3), (1, 2, 4), (1, 5, 5)], "test": [(0, 3, 2), (1, 4, 9)]},
        ),
        (  # times 1 2 2 3 4 5 9: the sixth, 5, begins the test period, the fourth, 3, the validation period
            {"split": "temporal", "report": "best", "test_share": 0.28, "valid_share": 0.28},
            {"train": [(0, 1, 1), (0, 2, 2), (0, 3, 2)], "test": [(1, 4, 9)], "valid": [(1, 2, 4)]},
        ),
        (
            {"split": "temporal", "report": "last", "test_share": 0.28, "valid_share": 0.28},
            {"train": [(0, 1, 1), (0, 2, 2), (0, 3, 2), (1, 1, 3), (1, 2, 4)], "test": [(1, 4, 9)]},
        ),
        (
            {"task": "ranking", "split": "temporal", "report": "best", "test_share": 0.28, "valid_share": 0.28},
            {"train": [(0, 1, 1), (0, 2, 2), (0, 3, 2)], "test": [(1, 5, 5), (1, 4, 9)], "valid": [(1, 2, 4)]},
        ),
        (  # user 0 is at place 0, user 1 at 0.618
            {"split": "users", "report": "last", "test_share": 0.4, "valid_share": 0.3, "targets": 2},
            {"train": [(1, 1, 3), (1, 2, 4), (1, 5, 5), (1, 4, 9)], "test": [(0, 2, 2), (0, 3, 2)]},
        ),
        (
            {"split": "users", "report": "best", "test_share": 0.4, "valid_share": 0.3, "targets": 3},
            {"train": [], "test": [(0, 2, 2), (0, 3, 2)], "valid": [(1, 2, 4), (1, 5, 5), (1, 4, 9)]},
        ),
    ],
)
def test_the_split_is_hashed_by_the_rows_that_a_protocol_holds_out(
    protocol: dict[str, Any], parts: dict[str, list[tuple[int, int, int]]]
) -> None:
    tensors, *_ = build(table(ROWS), ITEMS)
    expected = {}
    for name, part in parts.items():
        columns = b"".join(np.array(column, dtype="<i8").tobytes() for column in zip(*part, strict=True))
        expected[name] = hashlib.sha256(columns).hexdigest()
    assert split_sha256(tensors, protocol) == expected
    data = Sequences(*(torch.tensor(tensors[name]).long() for name in ("offsets", "item", "timestamp")), 5)
    assert torch_split_sha256(data, split_sequences(data, protocol)) == expected


@pytest.mark.parametrize("report", ["best", "last"])
@pytest.mark.parametrize("task", ["retrieval", "ranking"])
@pytest.mark.parametrize("split", ["leave-last-out", "temporal", "users"])
@pytest.mark.parametrize("seed", range(5))
def test_both_implementations_of_the_split_agree(seed: int, split: str, task: str, report: str) -> None:
    random = np.random.default_rng(seed)
    rows = [
        (user, int(random.choice([7, 9, 11, 30, 50])), int(random.integers(0, 40)))
        for user in range(20)
        for _ in range(3 + user % 7)
    ]
    tensors, *_ = build(table(rows), ITEMS)
    protocol = {"split": split, "task": task, "report": report, "test_share": 0.2, "valid_share": 0.15, "targets": 5}
    data = Sequences(*(torch.tensor(tensors[name]).long() for name in ("offsets", "item", "timestamp")), 5)
    assert split_sha256(tensors, protocol) == torch_split_sha256(data, split_sequences(data, protocol))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [(user, item, 5) for user in range(9) for item in (50, 7, 30)]
    for name in ("one", "two"):
        write(table(rows), ITEMS, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    manifest = json.loads((tmp_path / "one/manifest.json").read_text())
    digest = hashlib.sha256((tmp_path / "one/sequences.safetensors").read_bytes()).hexdigest()
    assert manifest["sequences_sha256"] == digest
    assert "rating" not in load_file(tmp_path / "one/sequences.safetensors")


USERS = pl.DataFrame(
    {"user": [3, 2, 1], "age": ["18", "100", "25"], "gender": ["X", "F", "M"]}, schema_overrides={"user": pl.Int64}
)
FILMS = ITEMS.with_columns(
    decade=pl.Series(["1990s", "1980s", "1990s", "2000s", "1980s"]),
    genres=pl.Series(["War|Drama", "Drama", "War", "Sci-Fi", "Drama|Sci-Fi"]),
)
DECLARED = {
    "user": {"age": "category", "gender": "category"},
    "item": {"decade": "category", "genres": {"categories": "|"}},
}


def test_features_are_codes_in_the_order_of_the_sequences(tmp_path: Path) -> None:
    write(table(ROWS), FILMS, tmp_path / "with", users=USERS, features=DECLARED)
    write(table(ROWS), ITEMS, tmp_path / "without")
    found = load_file(tmp_path / "with/features.safetensors")
    assert {name: (array.dtype.name, array.tolist()) for name, array in found.items()} == {
        # Users 1 and 2, as user 3 has no interaction; of ages 25 and 100.
        "user/age": ("int32", [1, 2]),
        "user/gender": ("int32", [2, 1]),
        # Padding, then items 7, 9, 11, 30, 50.
        "item/decade": ("int32", [0, 1, 3, 1, 2, 2]),
        "item/genres": ("uint8", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1]]),
    }
    manifest = json.loads((tmp_path / "with/manifest.json").read_text())
    assert manifest["features"] == {
        "user": {"age": ["25", "100"], "gender": ["F", "M"]},
        "item": {"decade": ["1980s", "1990s", "2000s"], "genres": ["Drama", "Sci-Fi", "War"]},
    }
    digest = hashlib.sha256((tmp_path / "with/features.safetensors").read_bytes()).hexdigest()
    assert manifest["features_sha256"] == digest
    plain = json.loads((tmp_path / "without/manifest.json").read_text())
    assert plain == {key: value for key, value in manifest.items() if not key.startswith("features")}
    for name in ("sequences.safetensors", "items.parquet", "users.parquet"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    assert not (tmp_path / "without/features.safetensors").exists()


def test_features_of_the_same_input_have_the_same_bytes(tmp_path: Path) -> None:
    for name, users, films in (("one", USERS, FILMS), ("two", USERS.reverse(), FILMS.reverse())):
        write(table(ROWS), films, tmp_path / name, users=users, features=DECLARED)
    for path in (tmp_path / "one").iterdir():
        if path.name != "made_of.json":  # the hashes of the two
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_categories_of_one_value_are_one_column(tmp_path: Path) -> None:
    films = ITEMS.with_columns(genres=pl.lit("Drama"))
    declared = {"user": {}, "item": {"genres": {"categories": ", "}}}
    write(table(ROWS), films, tmp_path / "one", features=declared)
    found = load_file(tmp_path / "one/features.safetensors")
    assert {name: array.tolist() for name, array in found.items()} == {"item/genres": [[0], [1], [1], [1], [1], [1]]}
    assert json.loads((tmp_path / "one/manifest.json").read_text())["features"] == {"item": {"genres": ["Drama"]}}


def test_features_go_from_raw_files_to_sequences(project: Path) -> None:
    raw = project / "data/raw/demo/demo"
    raw.mkdir(parents=True)
    (raw / "users.dat").write_text("9::F::56::7::0\n8::M::1::10::0\n")
    (raw / "movies.dat").write_text("".join(f"{movie}::Film::{'War|' * (movie == 5)}Drama\n" for movie in range(1, 21)))
    ratings = [f"{user}::{movie}::{movie % 5 + 1}::{movie}\n" for user in (9, 8) for movie in range(1, 21)]
    (raw / "ratings.dat").write_text("".join(ratings))
    write_json(raw.parent / "manifest.json", {"files": {f"demo/{path.name}": sha256(path) for path in raw.iterdir()}})
    step("validate", "--dataset", "demo", "--raw", "data/raw/demo", "--output", "data/valid/demo", cwd=project)
    arguments = ("--dataset", "demo", "--valid", "data/valid/demo", "--output", "data/processed/demo")
    step("preprocess", *arguments, cwd=project)
    data, _ = load_sequences(project / "data/processed/demo", torch.device("cpu"))
    codes = {name: values.tolist() for name, values in data.user_features.items()}
    assert codes == {"gender": [2, 1], "age": [1, 2], "occupation": [2, 1]}  # of users 8, 9
    assert data.item_features["genres"].tolist() == [[0, 0], *([[1, 0]] * 4), [1, 1], *([[1, 0]] * 15)]
    assert data.rating is not None
    assert data.rating.tolist() == [movie % 5 + 1 for movie in range(1, 21)] * 2


def test_tables_validated_before_there_were_features_have_none(project: Path) -> None:
    valid = project / "data/valid/demo"
    valid.mkdir(parents=True)
    table([(1, item, item) for item in (7, 9, 11)]).write_parquet(valid / "interactions.parquet")
    ITEMS.write_parquet(valid / "items.parquet")
    write_json(valid / "validation.json", {"files": {path.name: sha256(path) for path in valid.glob("*.parquet")}})
    arguments = ("--dataset", "demo", "--valid", "data/valid/demo", "--output", "data/processed/demo")
    step("preprocess", *arguments, cwd=project)
    names = {path.name for path in (project / "data/processed/demo").iterdir()}
    assert names == {"sequences.safetensors", "users.parquet", "items.parquet", "manifest.json", "made_of.json"}


def test_a_csv_with_a_header_string_ids_and_no_catalogue_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(
        'who,what,when\nanna,"a,b",3\nbert,c,1\nanna,c,2\nanna,d,4\nbert,d,2\nbert,"a,b",3\n'
    )
    interactions = {"path": "mine.csv", "separator": ",", "header": True, "columns": ["user", "item", "timestamp"]}
    dataset = {"files": {"interactions": interactions}, "checks": {"min_user_interactions": 3}}
    valid = tmp_path / "valid"
    valid.mkdir()
    write_valid(tmp_path, dataset, valid)
    assert sorted(path.name for path in valid.iterdir()) == ["interactions.parquet", "items.parquet"]
    frame, items = (pl.read_parquet(valid / f"{name}.parquet") for name in ("interactions", "items"))
    assert frame["row"].to_list() == [2, 3, 4, 5, 6, 7]
    tensors, users, catalogue, _ = build(frame, items)
    assert users["raw_id"].to_list() == ["anna", "bert"]
    assert catalogue["raw_id"].to_list() == ["a,b", "c", "d"]
    assert tensors["item"].tolist() == [2, 1, 3, 2, 3, 1]


def test_latin_1_titles_are_read(tmp_path: Path) -> None:
    (tmp_path / "movies.dat").write_bytes("1::Amélie (2001)::Comedy\n".encode("latin-1"))
    movies = yaml_files.read(ROOT / "params/datasets.yaml")["ml-1m"]["files"]["items"]
    block = read_table(tmp_path, movies | {"path": "movies.dat"})
    assert block.frame.row(0, named=True)["title"] == "Amélie (2001)"
    assert block.malformed == []


def test_lines_with_a_wrong_number_of_fields_are_found(tmp_path: Path) -> None:
    settings = {"path": "a.dat", "separator": "::", "header": False, "columns": ["user", "item", "timestamp"]}
    for lines, expected in [(["1::2::3", "1::2::3::4", "1::2", "4::5::6"], [2, 3]), (["1::2::3"], [])]:
        (tmp_path / "a.dat").write_text("\n".join(lines))
        assert read_table(tmp_path, settings).malformed == expected
    (tmp_path / "a.dat").write_text("1::2\n1::2::3\n")
    with pytest.raises(StepError, match=r"line 1: has 2 fields where `columns` has 3"):
        read_table(tmp_path, settings)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    settings = {"path": "a.dat", "separator": "::", "header": False, "columns": ["user", "item", "timestamp"]}
    with pytest.raises(Exception, match=r"a\.dat does not exist"):
        read_table(tmp_path, settings)


@pytest.mark.parametrize("rows", ["0", "-5", "x", "1.5"])
def test_a_number_of_rows_in_memory_that_is_none_is_refused(project: Path, rows: str) -> None:
    arguments = ("--dataset", "demo", "--valid", "v", "--output", "o", f"--rows-in-memory={rows}")
    refused = step("preprocess", *arguments, cwd=project, check=False)
    assert refused.returncode == 2
    assert f"{rows!r} is no whole number from 1" in refused.stderr


@pytest.mark.parametrize("span", [3, 10**9, 2**61, 2**63 - 1])
def test_users_and_times_as_one_number_are_in_the_order_of_both(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the sort by columns, which is taken where a span of times leaves no bits for the users."""
    random = np.random.default_rng(0)
    rows = pl.DataFrame(
        {
            "user": random.integers(0, 7, 500).astype(np.uint32),
            "timestamp": random.integers(-(span // 2), span - span // 2, 500),
            "row": np.arange(500),
        }
    )
    by_columns = []
    monkeypatch.setattr(build_module, "sorted_rows", lambda *given: by_columns.append(given) or sorted_rows(*given))
    user, time, order = build_module._sorted(rows, "file-order")
    assert len(by_columns) == (span >= 2**61)
    expected = sorted_rows(rows, "file-order")
    assert order.tolist() == expected["index"].to_list()
    assert user.tolist() == expected["user"].to_list()
    assert time.tolist() == expected["timestamp"].to_list()


@pytest.mark.parametrize(("raw", "joined"), [([5, 7, 100], 0), ([5, 7, 2**40], 1), (["a", "b", "c"], 1)])
def test_numbers_near_each_other_are_looked_up_in_a_table(
    raw: list[Any], joined: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, join = [], pl.DataFrame.join
    monkeypatch.setattr(pl.DataFrame, "join", lambda *given, **how: calls.append(how) or join(*given, **how))
    look_up = build_module._ids(pl.DataFrame({"user": raw, "id": [1, 2, 3]}), "user")
    assert look_up(pl.Series("user", [raw[2], raw[0]])).to_list() == [3, 1]
    assert len(calls) == joined

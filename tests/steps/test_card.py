"""Data cards: every number of a data set that is small enough to work out by hand, the page, and Croissant metadata."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from steps.cards.numbers import map_tensors, measure, quantiles
from steps.common import params, yaml_files
from steps.common.datasets import STATED
from steps.common.files import read_json, sha256
from tests.conftest import ROOT, step

DAY, START = 86400, 1577836800  # 2020-01-01
HOSTILE = "<script>alert('x')</script> & \"more\" </title>"
#: user, item, rating, day; u3 has item 2 twice, u2's last two rows share their time.
ROWS = [
    ("u1", 1, "4", 0), ("u1", 2, "3", 1), ("u1", 3, "5", 10),
    ("u2", 1, "4", 2), ("u2", 3, "", 20), ("u2", 4, "2.5", 20),
    ("u3", 2, "5", 3), ("u3", 1, "1", 4), ("u3", 5, "5", 30), ("u3", 2, "4", 40),
]  # fmt: skip
#: Left out: the first by its time, the others as their user has no third row.
OTHERS = [("u1", 6, "3", 400), ("u4", 1, "3", 5), ("u4", 2, "3", 6)]
TINY: dict[str, Any] = {
    "title": HOSTILE,
    "source": {"file": "tiny.csv", "mirrors": ["mine"], "publisher": "/nowhere"},
    "files": {
        "interactions": {
            "path": "tiny.csv",
            "separator": ",",
            "header": True,
            "columns": ["user", "item", "rating", "timestamp"],
        }
    },
    "checks": {"missing_ratings": True, "min_user_interactions": 3},
    "filters": [{"time": ["2020-01-01", "2020-12-31"]}, {"min_interactions": {"user": 3}}],
    "ties": "file-order",
    "repeats": "recommend",
    "training": {
        "max_len": 5,
        "epochs": 1,
        "batch": 4,
        "negatives": 2,
        "dropout": 0.0,
        "base": {"dim": 4, "blocks": 1, "heads": 1, "dqk": 4, "dv": 4},
    },
}


def make(folder: Path, entry: dict[str, Any], rows: list[tuple[Any, ...]], name: str = "tiny") -> None:
    """What comes before a card, of a data set of one's own, below `folder`."""
    (folder / "mine").mkdir(parents=True, exist_ok=True)
    columns = entry["files"]["interactions"]["columns"]
    lines = [[user, str(item), rating, str(START + day * DAY)] for user, item, rating, day in rows]
    text = "\n".join(",".join(line[: len(columns)]) for line in [columns, *lines])
    (folder / "mine" / entry["source"]["file"]).write_text(text + "\n")
    if not (folder / "params").exists():
        shutil.copytree(ROOT / "params", folder / "params")
    (folder / "params/local").mkdir(exist_ok=True)
    (folder / "params/local/datasets.yaml").write_text(yaml_files.dump({name: entry}))
    prepare(folder, name)


def prepare(folder: Path, name: str) -> None:
    step("download", "--dataset", name, "--output", f"data/raw/{name}", cwd=folder)
    step("validate", "--dataset", name, "--raw", f"data/raw/{name}", "--output", f"data/valid/{name}", cwd=folder)
    given = ("--valid", f"data/valid/{name}", "--output", f"data/processed/{name}")
    step("preprocess", "--dataset", name, *given, cwd=folder)


def card(folder: Path, name: str = "tiny", output: str = "", check: bool = True) -> Any:
    """Run the step, and give what it printed on stderr."""
    kinds = [f"--{kind}={folder / 'data' / kind / name}" for kind in ("raw", "valid", "processed")]
    output = output or f"reports/datasets/{name}"
    return step("card", "--dataset", name, *kinds, "--output", folder / output, cwd=folder, check=check).stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make(folder, TINY, [*ROWS[:3], *OTHERS, *ROWS[3:]])
    card(folder)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "params").symlink_to(ROOT / "params")
    step("synthesize", "--dataset", "demo", "--output", "data/synthetic/demo.zip", cwd=folder)
    prepare(folder, "demo")
    card(folder, "demo")
    return folder


def test_every_number_is_the_one_worked_out_by_hand(tiny: Path) -> None:
    found = read_json(tiny / "reports/datasets/tiny/card.json")
    assert found["counts"] == {
        "users": 3,
        "catalogue_items": 5,
        "items_with_interactions": 5,
        "interactions": 10,
        "density": 0.6667,  # 10 / (3 * 5)
    }
    assert (found["rows"]["raw"], found["rows"]["kept"], found["rows"]["repeats"]) == (13, 10, 1)
    assert found["rows"]["filters"] == [
        {"rule": {"time": ["2020-01-01", "2020-12-31"]}, "dropped": {"rows": 1, "users": 0, "items": 1}},
        {"rule": {"min_interactions": {"user": 3}}, "dropped": {"rows": 2, "users": 1, "items": 0}},
    ]
    lengths = dict.fromkeys(("min", "p1", "p5", "p25", "median"), 3) | dict.fromkeys(("p75", "p95", "p99", "max"), 4)
    bins = [{"from": 3, "to": 3, "users": 2}, {"from": 4, "to": 5, "users": 1}]
    assert found["sequence_length"] == lengths | {"mean": 3.33, "histogram": bins}
    rows = dict.fromkeys(("min", "p1", "p5", "p25"), 1) | {"median": 2}
    rows |= dict.fromkeys(("p75", "p95", "p99", "max"), 3)
    by_rank = [{"rank": rank, "interactions": count} for rank, count in enumerate([3, 3, 2, 1, 1], 1)]
    assert found["item_popularity"] == rows | {"mean": 2.0, "by_rank": by_rank}
    assert found["ties"] == {
        "rule": "timestamp, then the raw file's row order",
        "share_of_rows_tied_with_the_row_before": 0.1,
        "share_of_users_with_tied_target": 0.3333,
    }
    assert found["time"] == {
        "first": "2020-01-01",
        "last": "2020-02-10",
        "unit": "month",
        "histogram": [{"from": "2020-01", "rows": 9}, {"from": "2020-02", "rows": 1}],
    }
    values = [(1.0, 1), (2.5, 1), (3.0, 1), (4.0, 3), (5.0, 3)]
    assert found["ratings"] == {
        "missing": 1,
        "histogram": [{"rating": rating, "rows": count} for rating, count in values],
    }
    assert found["targets"] == {
        "targets": 3,  # on days 10, 20 and 40
        "median_time": "2020-01-21",
        "share_before_the_latest_training_row_of_others": 0.6667,  # of u3, on day 30
        "share_of_training_rows_after_the_median_target": 0.1429,  # the same, of 7; u2's on day 20 is not later
        "share_in_training_only_later": 0.3333,  # u1's item 3, which u2 has on day 20
        "share_never_in_training": 0.3333,  # u2's item 4
    }


def test_files_checks_and_sources_are_told_of(tiny: Path) -> None:
    folder = tiny / "reports/datasets/tiny"
    found = read_json(folder / "card.json")
    for kind, files in found["files"].items():
        for name, about in files.items():
            path = tiny / "data" / kind / "tiny" / name
            assert about == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    assert {kind: list(files) for kind, files in found["files"].items()} == {
        "raw": ["tiny.csv"],
        "valid": ["interactions.parquet", "items.parquet"],
        "processed": ["items.parquet", "sequences.safetensors", "users.parquet"],
    }
    assert found["sources"] == [{"file": "tiny.csv", "sha256": sha256(tiny / "mine/tiny.csv")}]
    assert {"column": "user, item", "check": "3 rows or more per user"} in found["checks"]
    assert found["beside"] == {name: sha256(folder / name) for name in ("card.html", "croissant.json")}


def test_the_same_input_gives_the_same_bytes_in_blocks_of_any_size(tiny: Path) -> None:
    card(tiny, output="again/datasets/tiny")
    for path in (tiny / "reports/datasets/tiny").iterdir():
        assert path.read_bytes() == (tiny / "again/datasets/tiny" / path.name).read_bytes()
    tensors = map_tensors(tiny / "data/processed/tiny/sequences.safetensors")
    whole = measure(tensors, 5, has_times=True)
    for rows in (1, 3, 7):
        assert measure(tensors, 5, has_times=True, rows_at_once=rows) == whole
    text = (tiny / "reports/datasets/tiny/card.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_a_page_needs_no_other_file_and_names_no_machine(name: str, request: pytest.FixtureRequest) -> None:
    project = request.getfixturevalue(name)
    folder = project / "reports/datasets" / name
    for path in folder.iterdir():
        text = path.read_text()
        assert str(project) not in text
        assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|work|nowhere)\b", text)
    page = (folder / "card.html").read_text()
    assert not re.search(r"<(?:script|link|img|iframe|object|embed)\b|@import|\bsrc=", page)
    assert not re.search(r"url\((?!#)", page)
    assert set(re.findall(r"<(\w+)[^>]*?\s(?:xlink:)?href=[\"'](?!#)", page)) <= {"a"}
    ids = re.findall(r"\sid=\"([^\"]+)\"", page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#(\w+)", page)) <= set(ids)


def test_hostile_titles_are_escaped_and_what_is_not_stated_is_said_so(tiny: Path) -> None:
    page = (tiny / "reports/datasets/tiny/card.html").read_text()
    assert "<script" not in page
    assert page.count("</title>") == 1
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;more&#34;" in page
    assert "Licence: not stated." in page
    assert "Citation: not stated<" in page
    assert read_json(tiny / "reports/datasets/tiny/card.json")["title"] == HOSTILE


@pytest.mark.parametrize("url", ["javascript:alert(1)", "ftp://x", "https://x y"])
def test_an_address_is_one_of_the_web(url: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "params", tmp_path / "params", ignore=shutil.ignore_patterns("local"))
    (tmp_path / "params/local").mkdir()
    for stated in ({"url": url}, {"licence": {"name": "x", "url": url}}):
        (tmp_path / "params/local/datasets.yaml").write_text(yaml_files.dump({"tiny": TINY | stated}))
        assert "url" in card(tmp_path, check=False)


def test_data_without_times_and_ratings_have_a_card_of_the_rest(tmp_path: Path) -> None:
    table = TINY["files"]["interactions"] | {"columns": ["user", "item"], "time": "none"}
    entry = TINY | {"files": {"interactions": table}, "checks": {"min_user_interactions": 3}, "version": "2"}
    del entry["filters"]
    make(tmp_path, entry, ROWS)
    card(tmp_path)
    found = read_json(tmp_path / "reports/datasets/tiny/card.json")
    assert not {"time", "ratings"} & found.keys()
    assert found["ties"] == {"rule": "the raw file's row order: it has no times"}
    assert found["targets"] == {"targets": 3, "share_never_in_training": 0.3333}
    page = (tmp_path / "reports/datasets/tiny/card.html").read_text()
    assert "The data set has no times." in page
    assert "leaks the future" not in page


def test_folders_that_do_not_belong_together_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(tiny, folder)
    (folder / "data/processed/tiny/items.parquet").write_bytes(b"")
    assert "items.parquet is not the file" in card(folder, check=False)
    shutil.rmtree(folder / "data/raw/tiny")
    shutil.rmtree(folder / "data/valid/tiny")
    raw, valid = "data/raw/tiny", "data/valid/tiny"
    (folder / "mine/tiny.csv").write_text((folder / "mine/tiny.csv").read_text().replace("u1,1,4", "u1,1,5"))
    step("download", "--dataset", "tiny", "--output", raw, cwd=folder)
    step("validate", "--dataset", "tiny", "--raw", raw, "--output", valid, cwd=folder)
    assert "run preprocess again" in card(folder, check=False)
    shutil.rmtree(folder / valid)
    shutil.copytree(tiny / valid, folder / valid)
    assert "run validate again" in card(folder, check=False)


def test_a_quantile_is_the_least_number_that_as_many_are_at_or_below() -> None:
    for size in (1, 2, 20, 99, 100, 101, 300):
        numbers = np.sort(np.random.default_rng(size).integers(0, 50, size))
        found = quantiles(numbers)
        for name, share in {"p5": 5, "p25": 25, "median": 50, "p95": 95, "p99": 99}.items():
            enough = [number for number in numbers if 100 * (numbers <= number).sum() >= share * size]
            assert found[name] == min(enough)


def test_many_ratings_are_counted_in_bins_and_long_times_in_years() -> None:
    rating = np.append(np.arange(100, dtype=np.float32) / 10, np.float32("nan"))
    years = np.array([f"{year}-06-01" for year in range(1965, 1975)], "datetime64[s]").astype(np.int64)
    tensors = {
        "offsets": np.array([0, 90, 101]),
        "item": np.ones(101, np.int32),
        "timestamp": np.sort(np.resize(years, 101)),
        "rating": rating,
    }
    for rows in (7, 1000):
        found = measure(tensors, 1, has_times=True, rows_at_once=rows)
        assert found["ratings"]["missing"] == 1
        assert [bar["rows"] for bar in found["ratings"]["histogram"]] == [5] * 20
        assert (found["ratings"]["histogram"][0]["from"], found["ratings"]["histogram"][-1]["to"]) == (0.0, 9.9)
        assert found["time"]["unit"] == "year"
        assert found["time"]["histogram"][0] == {"from": "1965", "rows": 11}
        assert [bar["rows"] for bar in found["time"]["histogram"][1:]] == [10] * 9


@pytest.mark.parametrize(
    ("name", "unknown"),
    [("tiny", {"citeAs", "datePublished", "license", "version"}), ("demo", {"datePublished"})],
)
def test_croissant_s_own_library_takes_the_metadata_and_reads_the_records(
    name: str, unknown: set[str], request: pytest.FixtureRequest
) -> None:
    import mlcroissant  # type: ignore[import-untyped] # 2 s

    folder = request.getfixturevalue(name)
    path = folder / "reports/datasets" / name / "croissant.json"
    dataset = mlcroissant.Dataset(jsonld=path)
    issues = dataset.metadata.ctx.issues
    assert issues.errors == set()
    lacking = {re.search(r'"\S+/(\w+)" is recommended', warning)[1] for warning in issues.warnings}  # type: ignore[index]
    assert lacking == unknown
    for file in dataset.metadata.distribution:
        if "://" not in file.content_url:
            assert file.sha256 == sha256(path.parent / file.content_url)
    assert {record_set.id for record_set in dataset.metadata.record_sets} == {
        table.stem for table in (folder / "data/valid" / name).glob("*.parquet")
    }
    for table in (folder / "data/valid" / name).glob("*.parquet"):
        wanted = pl.read_parquet(table).head(500)
        records = [record for record, _ in zip(dataset.records(table.stem), range(len(wanted)), strict=False)]
        found = [{key.split("/")[1]: plain(value) for key, value in record.items()} for record in records]
        assert found == wanted.to_dicts()


def plain(value: Any) -> Any:
    """A record's value as Polars has it."""
    if isinstance(value, bytes):
        return value.decode()
    return None if isinstance(value, float) and np.isnan(value) else value


COMMITTED = sorted((ROOT / "reports/datasets").glob("*/card.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=[path.parent.name for path in COMMITTED])
def test_a_committed_card_is_whole_and_tells_what_params_say(path: Path) -> None:
    found, entry = read_json(path), params.entry("datasets", path.parent.name, ROOT / "params")
    assert found["beside"] == {name: sha256(path.with_name(name)) for name in ("card.html", "croissant.json")}
    told = {key: entry[key] for key in ("title", *STATED) if key in entry}
    assert told == {key: found[key] for key in ("title", *STATED) if key in found}, "make the card again"


def test_the_committed_card_of_the_demo_is_the_one_that_the_steps_make(demo: Path) -> None:
    ours, committed = (read_json(root / "reports/datasets/demo/card.json") for root in (demo, ROOT))
    assert {key: ours[key] for key in ours if key != "beside"} == {
        key: committed[key] for key in committed if key != "beside"
    }, "make the card again"


def test_committed_cards_are_small_and_have_no_titles_of_films() -> None:
    files = [path for card in COMMITTED for path in card.parent.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 150_000
    assert not any("Toy Story" in path.read_text() for path in files)

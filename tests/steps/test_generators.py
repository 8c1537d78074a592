"""Generated files: forms, exact counts, the same bytes however they are made, and a signal in the sequences."""

import csv
import datetime
import hashlib
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from steps.common import params, yaml_files
from steps.common.cli import StepError
from steps.data.generators import amazon, generator, walks
from steps.data.generators.amazon import AmazonRatings
from steps.data.generators.draws import Law, Lengths, below, bits, spread
from steps.data.generators.movielens import MovieLens
from steps.validate import write_valid
from tests.conftest import ROOT, step

MOVIELENS = {"seed": 7, "folder": "ml", "rows": 60_001, "users": 500}
MOVIELENS |= {"movies": 1700, "rated_movies": 1650, "largest_id": 9000}
AMAZON = {"seed": 7, "rows": 60_003, "users": 21_000, "items": 6100}
SMALL: dict[str, dict[str, Any]] = {
    "movielens-csv": {"form": "movielens-csv"} | MOVIELENS,
    "amazon-ratings": {"form": "amazon-ratings"} | AMAZON,
}
FORMS = list(SMALL)
SHA256 = {
    "movielens-csv": "43ce5ad287efd464b72f29b4261ad37625c2118963d4f35a33b839b92a59d7aa",
    "amazon-ratings": "5b7efdc8a5739e0edd0c0502d653cf4f220ab764935f731160bbb3c6332d2cf3",
}


def made(form: str, folder: Path) -> Path:
    """The small archive of a form, in `folder`."""
    path = folder / f"{form}.zip"
    generator(**SMALL[form]).write(path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("generated")
    return {form: members(made(form, folder)) for form in FORMS}


def fields(content: bytes) -> list[list[str]]:
    text = content.decode()
    assert text.endswith("\n")
    assert "\r" not in text
    return list(csv.reader(io.StringIO(text), strict=True))


@pytest.fixture(scope="module")
def ratings(contents: dict[str, dict[str, bytes]]) -> list[tuple[int, int, str, int]]:
    """MovieLens' form: user, movie, rating, timestamp of every line."""
    header, *lines = fields(contents["movielens-csv"]["ml/ratings.csv"])
    assert header == ["userId", "movieId", "rating", "timestamp"]
    assert all(len(line) == 4 and all(str(int(line[place])) == line[place] for place in (0, 1, 3)) for line in lines)
    return [(int(user), int(movie), rating, int(time)) for user, movie, rating, time in lines]


@pytest.fixture(scope="module")
def reviews(contents: dict[str, dict[str, bytes]]) -> list[tuple[str, str, str, int]]:
    """Amazon's form: user, item, rating, timestamp of every line."""
    assert list(contents["amazon-ratings"]) == ["ratings_Books.csv"]
    lines = fields(contents["amazon-ratings"]["ratings_Books.csv"])
    assert all(len(line) == 4 for line in lines)
    return [(user, item, rating, int(time)) for user, item, rating, time in lines]


def test_movielens_ratings_have_the_form_and_the_counts(ratings: list[tuple[int, int, str, int]]) -> None:
    assert len(ratings) == 60_001
    per_user = Counter(user for user, *_ in ratings)
    assert sorted(per_user) == list(range(1, 501))
    assert min(per_user.values()) == 20
    assert max(per_user.values()) == 1650 * 9254 // 26744
    assert sorted(per_user.values())[250] < 0.7 * np.mean(list(per_user.values()))
    pairs = [(user, movie) for user, movie, *_ in ratings]
    assert pairs == sorted(set(pairs))
    assert {rating for _, _, rating, _ in ratings} == {f"{half / 2:.1f}" for half in range(1, 11)}
    years = {datetime.datetime.fromtimestamp(time, datetime.UTC).year for *_, time in ratings}
    assert min(years) == 1995
    assert max(years) <= 2015
    per_movie = sorted(Counter(movie for _, movie in pairs).values(), reverse=True)
    assert len(per_movie) == 1650
    assert sum(per_movie[:165]) > 0.3 * len(ratings)  # a tenth of the movies


def test_half_of_a_users_ratings_share_the_timestamp_before(ratings: list[tuple[int, int, str, int]]) -> None:
    times = defaultdict(list)
    for user, _, _, time in ratings:
        times[user].append(time)
    pairs = [a == b for one in times.values() for a, b in itertools.pairwise(sorted(one))]
    assert 0.47 < np.mean(pairs) < 0.53


def test_movielens_movies_have_the_form_and_the_counts(
    contents: dict[str, dict[str, bytes]], ratings: list[tuple[int, int, str, int]]
) -> None:
    content = contents["movielens-csv"]["ml/movies.csv"]
    header, *movies = fields(content)
    assert header == ["movieId", "title", "genres"]
    ids = [int(movie) for movie, _, _ in movies]
    assert len(ids) == 1700
    assert ids == sorted(set(ids))
    assert ids[-1] == 9000
    assert {movie for _, movie, *_ in ratings} <= set(ids)
    assert all(re.fullmatch(r".+ \((19|20)\d\d\)", title) for _, title, _ in movies)
    with_comma = [title for _, title, _ in movies if "," in title]
    assert 0.1 < len(with_comma) / len(movies) < 0.3
    assert all(f'"{title}"'.encode() in content for title in with_comma)
    assert any('"' in title for _, title, _ in movies)
    assert not content.isascii()
    genres = Counter(genre for _, _, text in movies for genre in text.split("|"))
    assert 0 < genres["(no genres listed)"] < 50
    assert len(genres) == 20
    assert any("|" in text for _, _, text in movies)


def validated(name: str, folder: Path, expected: dict[str, int]) -> dict[str, Any]:
    """What validate tells of a small file in `folder`, by the entry of the full one, with the small one's counts."""
    entry = params.entry("datasets", name, ROOT / "params")
    (folder / "valid").mkdir()
    return write_valid(folder, entry | {"checks": entry["checks"] | {"expected": expected}}, folder / "valid")


def test_the_entry_of_the_full_file_reads_the_small_one(contents: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    (tmp_path / "ml-20m").mkdir()
    for name, content in contents["movielens-csv"].items():
        (tmp_path / "ml-20m" / Path(name).name).write_bytes(content)
    told = validated("ml-20m-form", tmp_path, {"rows": 60_001, "catalogue": 1700})
    assert (told["rows"], told["items"]) == (60_001, 1700)
    assert pl.read_parquet(tmp_path / "valid/items.parquet").columns == ["item", "title", "genres"]


def test_books_are_filtered_once_and_keep_their_catalogue(
    contents: dict[str, dict[str, bytes]], reviews: list[tuple[str, str, str, int]], tmp_path: Path
) -> None:
    """Users and items are counted on the raw table; users who then have fewer than 5 rows go, their items stay."""
    (content,) = contents["amazon-ratings"].values()
    (tmp_path / "ratings_Books.csv").write_bytes(content)
    users, items = Counter(review[0] for review in reviews), Counter(review[1] for review in reviews)
    once = [review for review in reviews if users[review[0]] >= 5 and items[review[1]] >= 5]
    left = Counter(review[0] for review in once)
    kept = [review for review in once if left[review[0]] >= 5]
    catalogue = {review[1] for review in once}
    assert len(kept) < len(once)
    assert len({review[1] for review in kept}) < len(catalogue)
    told = validated("amzn-books-form", tmp_path, {"raw_rows": len(reviews), "rows": len(kept)})
    assert [rule["dropped"]["rows"] for rule in told["filters"]] == [len(reviews) - len(once), len(once) - len(kept)]
    assert pl.read_parquet(tmp_path / "valid/items.parquet")["item"].to_list() == sorted(catalogue)
    frame = pl.read_parquet(tmp_path / "valid/interactions.parquet")
    assert frame.select("user", "item", "timestamp").rows() == [(user, item, time) for user, item, _, time in kept]


def test_amazon_ratings_have_the_form_and_the_counts(reviews: list[tuple[str, str, str, int]]) -> None:
    assert len(reviews) == 60_003
    users, items = Counter(review[0] for review in reviews), Counter(review[1] for review in reviews)
    assert (len(users), len(items)) == (21_000, 6100)
    assert len({review[:2] for review in reviews}) == len(reviews)
    assert all(re.fullmatch(r"A[A-Z0-9]{13}", user) for user in users)
    assert all(re.fullmatch(r"\d{9}[\dX]|B0[A-Z0-9]{8}", item) for item in items)
    assert {item[0] == "B" for item in items} == {item[-1] == "X" for item in items} == {False, True}
    isbns = [[10 if digit == "X" else int(digit) for digit in item] for item in items if item[0] != "B"]
    assert all(sum(digit * place for place, digit in enumerate(isbn[::-1], 1)) % 11 == 0 for isbn in isbns)
    order = [review[1] for review in reviews]
    assert order == sorted(order)
    assert {review[2] for review in reviews} == {"1.0", "2.0", "3.0", "4.0", "5.0"}
    assert all(time % 86400 == 0 for *_, time in reviews)
    years = {datetime.datetime.fromtimestamp(time, datetime.UTC).year for *_, time in reviews}
    assert years == set(range(1996, 2015))


def test_the_filter_of_books_leaves_users_and_items(reviews: list[tuple[str, str, str, int]]) -> None:
    users, items = Counter(review[0] for review in reviews), Counter(review[1] for review in reviews)
    left = [review for review in reviews if users[review[0]] >= 5 and items[review[1]] >= 5]
    assert 0.1 < len({review[0] for review in left}) / len(users) < 0.15
    assert 0.2 < len({review[1] for review in left}) / len(items) < 0.6
    assert 1 in users.values()
    assert 1 in items.values()


@pytest.mark.parametrize("form", FORMS)
def test_the_small_archive_is_what_every_machine_makes(form: str, tmp_path: Path) -> None:
    found = {sha256(made(form, tmp_path)) for _ in range(2)}
    assert found == {SHA256[form]}
    assert [path.name for path in tmp_path.iterdir()] == [f"{form}.zip"]  # rows kept meanwhile are gone


def test_one_thread_and_a_plain_processor_make_the_same(tmp_path: Path) -> None:
    dispatched = np._core._multiarray_umath
    enabled = [name for name in dispatched.__cpu_dispatch__ if dispatched.__cpu_features__.get(name)]
    variables = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "NPY_DISABLE_CPU_FEATURES": " ".join(enabled)}
    code = (
        "import sys, pathlib; from tests.steps.test_generators import *\n"
        "print(*(sha256(made(form, pathlib.Path(sys.argv[1]))) for form in FORMS))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [SHA256[form] for form in FORMS]


@pytest.mark.parametrize("form", FORMS)
def test_another_seed_makes_other_data_with_the_same_counts(form: str) -> None:
    one, other = (generator(**SMALL[form] | {"seed": seed}).walks for seed in (7, -7))
    assert one.chunk(0).item.shape == other.chunk(0).item.shape
    assert (one.chunk(0).item != other.chunk(0).item).mean() > 0.8


def test_a_chunk_made_alone_is_its_part_of_movielens(
    contents: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walks, "CHUNK_ROWS", 7000)
    whole = contents["movielens-csv"]["ml/ratings.csv"].partition(b"\n")[2]
    number = MovieLens(**MOVIELENS).walks.chunks
    assert number > 5
    parts = {chunk: MovieLens(**MOVIELENS).part(chunk) for chunk in reversed(range(number))}
    assert b"".join(parts[chunk] for chunk in range(number)) == whole


def test_a_chunk_made_alone_is_its_part_of_amazon(
    contents: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module, name in ((walks, "CHUNK_ROWS"), (amazon, "CHUNK_ROWS"), (amazon, "_BUCKET_ROWS")):
        monkeypatch.setattr(module, name, 7000)
    whole = contents["amazon-ratings"]["ratings_Books.csv"]
    number = AmazonRatings(**AMAZON).walks.chunks
    assert number > 5
    parts = [AmazonRatings(**AMAZON).part(chunk) for chunk in reversed(range(number))]
    lines = [AmazonRatings(**AMAZON).text(part).splitlines() for part in parts]
    assert sorted(itertools.chain(*lines)) == sorted(whole.splitlines())
    assert AmazonRatings(**AMAZON).text(np.sort(np.concatenate(parts))) == whole
    assert members(made("amazon-ratings", tmp_path))["ratings_Books.csv"] == whole


@pytest.mark.parametrize("form", FORMS)
def test_the_item_before_tells_more_of_the_next_than_popularity(
    form: str, ratings: list[tuple[int, int, str, int]], reviews: list[tuple[str, str, str, int]]
) -> None:
    rows: Iterable[tuple[Any, Any, str, int]] = ratings if form == "movielens-csv" else reviews
    times = defaultdict(list)
    for place, (user, item, _, time) in enumerate(rows):
        times[user].append((time, place, item))
    sequences = [[item for *_, item in sorted(one)] for one in times.values() if len(one) >= 5]
    popular, after = Counter(), defaultdict(Counter)
    for sequence in sequences:
        popular.update(sequence[:-1])
        for one, other in itertools.pairwise(sequence[:-1]):
            after[one][other] += 1
    top = {item for item, _ in popular.most_common(10)}
    by_popularity = sum(sequence[-1] in top for sequence in sequences)
    by_last = sum(sequence[-1] in dict(after[sequence[-2]].most_common(10)) for sequence in sequences)
    assert by_last > {"movielens-csv": 3, "amazon-ratings": 2}[form] * by_popularity


WRONG = [
    ("movielens-csv", {"form": "movielens"}, r"synthesize\.form: 'movielens' is not one of"),
    ("movielens-csv", {"form": None}, r"synthesize: 'form' is a required property"),
    ("movielens-csv", {"folder": None}, r"synthesize: 'folder' is a required property"),
    ("movielens-csv", {"folder": "../up"}, r"synthesize\.folder: '\.\./up' does not match"),
    ("movielens-csv", {"items": 3}, r"synthesize: .*'items' was unexpected"),
    ("amazon-ratings", {"movies": 3}, r"synthesize: .*'movies' was unexpected"),
    ("amazon-ratings", {"rows": 1e6}, r"synthesize\.rows: 1000000\.0 is not of type 'integer'"),
    ("amazon-ratings", {"items": 0}, r"synthesize\.items: 0 is less than"),
    ("amazon-ratings", {"form": "demo"}, r"synthesize: "),
]


@pytest.mark.parametrize(("form", "change", "said"), WRONG)
def test_the_schema_refuses_wrong_settings(form: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "params", tmp_path / "params", ignore=shutil.ignore_patterns("local"))
    path = tmp_path / "params/datasets.yaml"
    content = yaml_files.read(path)
    settings = {key: value for key, value in (SMALL[form] | change).items() if value is not None}
    content["demo"]["synthesize"] = settings
    path.write_text(yaml_files.dump(content))
    with pytest.raises(StepError, match=rf"datasets\.yaml, key demo\.{said}") as refused:
        params.load("datasets", tmp_path / "params")
    assert "\n" not in str(refused.value)


IMPOSSIBLE = [
    ("movielens-csv", {"rows": 500 * 20}, "rows: 10000 are too few for 500 users with 20 to"),
    ("movielens-csv", {"rows": 500 * 400}, "rows: 200000 are too many for 500 users with 20 to"),
    ("movielens-csv", {"rated_movies": 1701}, "each is at most the next one"),
    ("movielens-csv", {"largest_id": 1699}, "each is at most the next one"),
    ("movielens-csv", {"rated_movies": 25}, "25 items are too few for users with 21 different ones"),
    ("amazon-ratings", {"rows": 6000, "users": 2000}, "rows: 6000 are too few for 6100 items"),
    ("amazon-ratings", {"rows": 21_000}, "rows: 21000 are too few for 21000 users"),
    ("amazon-ratings", {"users": 2**31, "items": 2**30, "rows": 2**33}, "are too many for a row's 64 bits"),
]


@pytest.mark.parametrize(("form", "change", "said"), IMPOSSIBLE)
def test_settings_that_do_not_fit_together_are_named(form: str, change: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        generator(**SMALL[form] | change)


def test_the_step_says_whose_settings_do_not_fit(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "params", tmp_path / "params", ignore=shutil.ignore_patterns("local"))
    path = tmp_path / "params/datasets.yaml"
    content = yaml_files.read(path)
    content["demo"]["synthesize"]["movies"] = 50
    path.write_text(yaml_files.dump(content))
    result = step("synthesize", "--dataset", "demo", "--output", tmp_path / "demo.zip", cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert result.stderr.endswith("datasets.yaml, key demo.synthesize: movies: 50 are too few for mean_ratings 45\n")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "demo.zip").exists()


def test_draws_are_splitmix64s() -> None:
    state, expected = 0, []
    for _ in range(4):  # its reference implementation, from state 0
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        value = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        expected.append(value ^ (value >> 31))
    assert expected[0] == 0xE220A8397B1DCDAF  # as published
    assert bits(0, 0, np.arange(1, 5)).tolist() == expected


def test_draws_are_even_and_laws_hold() -> None:
    random = bits(3, 1, np.arange(100_000))
    assert np.bincount(below(random, 10), minlength=10).min() > 9600
    counts = np.bincount(Law.of((5, 0, 15)).draw(random))
    assert counts[1] == 0
    assert 0.245 < counts[0] / 100_000 < 0.255
    with pytest.raises(ValueError, match="2\\*\\*32"):
        Law.of((2**31, 2**31))


@pytest.mark.parametrize("number", [1, 2, 3, 10, 997, 1024])
def test_spreading_rearranges(number: int) -> None:
    assert sorted(spread(np.arange(number), number).tolist()) == list(range(number))


@pytest.mark.parametrize(("total", "number"), [(470, 10), (600, 100), (3117, 1000), (20_000, 1000), (59_999, 1000)])
def test_lengths_sum_up_exactly(total: int, number: int) -> None:
    lengths = Lengths(total, number, 3, 120).at(np.arange(number))
    assert (lengths.sum(), lengths.min(), lengths.max()) == (total, 3, 120)

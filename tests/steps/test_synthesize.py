"""The demo archive: the same bytes everywhere, in MovieLens' format, with the signal it promises."""

import hashlib
import io
import itertools
import zipfile
from collections import Counter, defaultdict

import pytest

from steps.common import yaml_files
from steps.data.generators.demo import synthesize
from tests.conftest import ROOT

SMALL = {"seed": 5, "users": 60, "movies": 120, "genres": 6, "mean_ratings": 30}


def tables(content: bytes) -> dict[str, list[list[str]]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {
            name: [line.split("::") for line in archive.read(f"demo/{name}.dat").decode().splitlines()]
            for name in ("users", "movies", "ratings")
        }


@pytest.mark.parametrize("name", ["demo", "demo-long", "demo-taste"])
def test_the_published_checksum_is_what_every_machine_makes(name: str) -> None:
    demo = yaml_files.read(ROOT / "params/datasets.yaml")[name]
    settings = {key: value for key, value in demo["synthesize"].items() if key != "form"}
    assert hashlib.sha256(synthesize(**settings)).hexdigest() == demo["source"]["sha256"]


def test_another_seed_makes_other_data() -> None:
    assert synthesize(**SMALL) == synthesize(**SMALL)
    assert synthesize(**SMALL) != synthesize(**SMALL | {"seed": 6})


def test_the_tables_have_movielens_properties() -> None:
    data = tables(synthesize(**SMALL))
    movies = {row[0] for row in data["movies"]}
    assert [len(row) for row in data["users"]] == [5] * 60
    assert len(movies) == 120
    assert max(map(int, movies)) > 120  # ids have gaps
    rated = {row[1] for row in data["ratings"]}
    assert rated < movies  # some movies are never rated
    per_user = Counter(row[0] for row in data["ratings"])
    assert len(per_user) == 60
    assert min(per_user.values()) >= 20
    assert len({(row[0], row[1]) for row in data["ratings"]}) == len(data["ratings"])
    assert {int(row[2]) for row in data["ratings"]} <= {1, 2, 3, 4, 5}


def test_gaps_decide_the_next_genre() -> None:
    data = tables(synthesize(**SMALL | {"users": 300}))
    genre = {row[0]: int(row[2].removeprefix("Genre")) for row in data["movies"]}
    users = defaultdict(list)
    for user, movie, _, time in data["ratings"]:
        users[user].append((int(time), genre[movie]))
    steps = Counter()
    for ratings in users.values():
        ratings.sort(key=lambda rating: rating[0])
        for (before, old), (after, new) in itertools.pairwise(ratings):
            gap = after - before
            kind = "burst" if gap == 0 else "days" if 86400 < gap < 20 * 86400 else "other"
            steps[kind, (new - old) % 6] += 1

    def share(kind: str, step: int) -> float:
        return steps[kind, step] / sum(count for (other, _), count in steps.items() if other == kind)

    assert share("burst", 0) > 0.6  # without signal: one in six
    assert share("days", 1) > 0.5
    assert sum(count for (kind, _), count in steps.items() if kind == "burst") > 0.2 * sum(steps.values())


def test_shorter_gaps_change_the_times_alone() -> None:
    once, six = (tables(synthesize(**SMALL, gap_divisor=divisor))["ratings"] for divisor in (1, 6))
    whole, shorter = defaultdict(list), defaultdict(list)
    for rows, times in ((once, whole), (six, shorter)):
        for user, *_, time in rows:
            times[user].append(int(time))
    assert [row[:3] for row in once] == [row[:3] for row in six]
    spans = [(max(whole[user]) - min(whole[user]), max(shorter[user]) - min(shorter[user])) for user in whole]
    assert 4 < sum(span for span, _ in spans) / sum(span for _, span in spans) < 6  # hours stay as they are


def test_taste_drifts_in_the_ratings_alone() -> None:
    """Old movies or new ones, in turns of gaps of months; and ratings before the next say nothing without its movie."""
    data = tables(synthesize(**SMALL | {"users": 300}, taste_drifts=True))
    without = tables(synthesize(**SMALL | {"users": 300}))
    assert data["movies"] == without["movies"]
    assert [(user, movie, time) for user, movie, _, time in data["ratings"]] == [
        (user, movie, time) for user, movie, _, time in without["ratings"]
    ]
    is_old = {row[0]: int(row[1][-5:-1]) < 1975 for row in data["movies"]}
    assert 0.4 < sum(is_old.values()) / len(is_old) < 0.6
    users = defaultdict(list)
    for user, movie, rating, time in data["ratings"]:
        users[user].append((int(time), is_old[movie], int(rating)))
    by_taste, liked, as_before = [], {False: [], True: []}, []
    for user, ratings in users.items():
        ratings.sort(key=lambda rating: rating[0])
        likes_old, before = int(user) % 2 == 0, ratings[0][0]
        for time, old, rating in ratings:
            if time - before > 30 * 86400:
                likes_old = not likes_old
            before = time
            assert rating in ((3, 5) if old else (2, 4))
            by_taste.append((rating >= 4) == (old == likes_old))
            liked[old].append(rating >= 4)
        engaged = [rating >= 4 for *_, rating in ratings]
        as_before += [one == other for one, other in itertools.pairwise(engaged)]
    assert sum(by_taste) / len(by_taste) == pytest.approx(5 / 6, abs=0.02)
    for values in (*liked.values(), as_before):
        assert sum(values) / len(values) == pytest.approx(1 / 2, abs=0.03)

"""The paper's stream: record by record a plain loop's, the same bytes however it is made, and what is specified."""

import math
import os
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from steps.common import params
from steps.common.files import read_json, read_jsonl, sha256
from steps.data.generators import generator, stream
from steps.data.generators.stream import Stream
from steps.data.sequences import load_sequences
from steps.data.split import split_sequences
from steps.data.streamed import write_stream
from steps.studies.stream_ceiling import ceilings, least_loss
from tests.conftest import ROOT, step
from tests.steps.runs import processed_by_its_steps
from tests.steps.test_models import make, schedule_of

SMALL = {"seed": 7, "records": 600, "length": 30, "items": 240, "categories": 7}
PAPER = {"seed": 20240221, "records": 1_000_000, "length": 128, "items": 20_000, "categories": 100}
#: For statistics: enough records, and few items, all of which come often.
MANY = Stream(seed=11, records=20_000, length=40, items=100, categories=10)
SEQUENCES_SHA256 = "a76d5f6facd014e522c264a8d8913d753d5a8ed82a6c5f03495333bd9c077082"  # of stream-small


def small(**changes: int) -> Stream:
    return Stream(**SMALL | changes)


# A plain loop, written from the paper's words and the conventions of the module's first paragraphs

WORD = 2**64


def mixed(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB % WORD
    return value ^ value >> 31


def random_bits(seed: int, stream: int, index: int) -> int:
    key = mixed((mixed(seed % WORD) + stream * 0x9E3779B97F4A7C15) % WORD)
    return mixed((index * 0x9E3779B97F4A7C15 + key) % WORD)


class Plain(NamedTuple):
    """A record: its items, its categories with what H gives them of 2**20, a in 1/1024, and how often H was asked."""

    items: list[int]
    prior: dict[int, int]
    a: int
    from_prior: list[bool]


@cache
def plain_category(seed: int, items: int, categories: int) -> list[list[int]]:
    """The items of each category, rising."""
    found: list[list[int]] = [[] for _ in range(categories)]
    for item in range(1, items + 1):
        found[(random_bits(seed, 0, item) >> 32) * categories >> 32].append(item)
    return found


def plain_record(
    record: int,
    seed: int,
    records: int,
    length: int,
    items: int,
    categories: int,
    opened: int = 60,
    least_a: int = 1,
    most_a: int = 500,
) -> Plain:
    def upto(bound: int, stream: int, index: int) -> int:
        return (random_bits(seed, stream, index) >> 32) * bound >> 32

    most = min(5, categories)
    number = 1 + upto(most, 1, record)
    left, chosen = list(range(categories)), []
    for place in range(most):
        chosen.append(left.pop(upto(len(left), 2, record * most + place)))
    cuts = sorted(upto(2**20, 3, record * most + place) for place in range(1, number))
    prior = [end - begin for begin, end in zip([0, *cuts], [*cuts, 2**20], strict=True)]
    a = least_a * 1024 + upto((most_a - least_a) * 1024 + 1, 4, record)
    largest = int(Fraction(items) * (1 - Fraction(opened, 100) * (1 - Fraction(record, records))))
    found: list[int] = []
    drawn_from: list[int] = []
    from_prior = []
    for n in range(1, length + 1):
        index = record * length + n - 1
        random = random_bits(seed, 5, index)
        drawn = (random >> 32) * (a + 1024 * (n - 1)) >> 32
        from_prior.append(drawn < a)
        if drawn < a:  # of a + n - 1 parts a
            place, below = 0, random % 2**20
            while below >= prior[place]:
                below -= prior[place]
                place += 1
            drawn_from.append(chosen[place])
        else:  # one of the n - 1 before it: category c for n_c of them
            drawn_from.append(drawn_from[(drawn - a) // 1024])
        its = [item for item in plain_category(seed, items, categories)[drawn_from[-1]] if item <= largest]
        found.append(its[upto(len(its), 6, index)])
    return Plain(found, dict(zip(chosen, prior, strict=False)), a, from_prior)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"categories": 3},
        {"categories": 1},
        {"length": 3, "seed": -1},
        {"items": 97},
        {"opened": 0, "least_a": 7, "most_a": 9},
        {"opened": 83, "least_a": 1_000_000, "most_a": 1_000_000},
    ],
)
def test_every_record_is_a_plain_loops(changes: dict[str, int]) -> None:
    found = small(**changes).part(0, 600)
    for record in range(0, 600, 13):
        assert found[record].tolist() == plain_record(record, **SMALL | changes).items, record


def test_the_papers_records_are_a_plain_loops() -> None:
    for record in (0, 531_441, 999_999):
        assert Stream(**PAPER).part(record, record + 1).tolist() == [plain_record(record, **PAPER).items]


def test_a_record_made_alone_is_the_one_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small().part(0, 600)
    for record in (0, 1, 299, 599):
        assert (small().part(record, record + 1) == whole[record]).all()
    monkeypatch.setattr(stream, "_BLOCK_ROWS", 700)
    assert len(small().blocks()) == 27
    assert (np.concatenate(list(small().parts())) == whole).all()


@pytest.mark.parametrize("cores", [1, 2, 7])
def test_blocks_and_threads_change_no_byte(cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small().write(tmp_path / "whole.zip")
    monkeypatch.setattr(stream, "_BLOCK_ROWS", 1000)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    small().write(tmp_path / "blocks.zip")
    assert (tmp_path / "blocks.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def small_entry() -> dict[str, Any]:
    return dict(params.entry("datasets", "stream-small", ROOT / "params"))


def stream_small() -> Stream:
    """The stream of the data set of this name."""
    return Stream(**{key: value for key, value in small_entry()["synthesize"].items() if key != "form"})


def test_a_plain_processor_makes_the_archive_that_is_named() -> None:
    dispatched = np._core._multiarray_umath
    enabled = [name for name in dispatched.__cpu_dispatch__ if dispatched.__cpu_features__.get(name)]
    code = (
        "import hashlib, pathlib, tempfile; from steps.data.generators import generator\n"
        "path = pathlib.Path(tempfile.mkdtemp()) / 'a.zip'\n"
        f"generator(**{small_entry()['synthesize']!r}).write(path)\n"
        "print(hashlib.sha256(path.read_bytes()).hexdigest())"
    )
    for features in ("", " ".join(enabled)):
        variables = {"NPY_DISABLE_CPU_FEATURES": features}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == small_entry()["source"]["sha256"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"items": 20, "categories": 19}, "items: 20 are too few for 19 categories: one has no open item at first"),
        ({"opened": 99}, "items: 240 are too few for 7 categories: one has no open item at first"),
        ({"opened": 100}, "opened: 100 is no percentage from 0 to 99"),
        ({"opened": -1}, "opened: -1 is no percentage from 0 to 99"),
        ({"least_a": 0}, "least_a, most_a: 0 to 500 is no range from 1 to 1000000"),
        ({"least_a": 9, "most_a": 8}, "least_a, most_a: 9 to 8 is no range from 1 to 1000000"),
        ({"most_a": 1_000_001}, "least_a, most_a: 1 to 1000001 is no range from 1 to 1000000"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**changes)


def test_the_papers_settings_are_those_that_are_not_given() -> None:
    given = small(opened=60, least_a=1, most_a=500)
    assert given == small()
    assert (given.part(0, 600) == small().part(0, 600)).all()


# What is specified


@pytest.fixture(scope="module")
def plain() -> list[Plain]:
    """Records of the small stream, whose hidden draws the plain loop tells."""
    return [plain_record(record, **SMALL) for record in range(600)]


def within(observed: float, expected: float, deviation: float) -> bool:
    """Within 4 standard deviations."""
    return abs(observed - expected) < 4 * deviation


def test_items_open_up_from_two_fifths_to_all() -> None:
    paper = Stream(**PAPER)
    assert paper.open_items(np.array([0, 500_000, 999_999])).tolist() == [8000, 14_000, 19_999]
    records = MANY.part(0, 20_000)
    largest = MANY.open_items(np.arange(20_000))
    assert (records.max(axis=1) <= largest).all()
    assert records.min() == 1
    for first in (0, 10_000, 19_000):  # all that are open do come
        assert records[first : first + 1000].max() == largest[first + 999]


@pytest.mark.parametrize("opened", [0, 30, 95])
def test_the_share_that_opens_later_is_a_setting(opened: int) -> None:
    paper = Stream(**PAPER, opened=opened)
    largest = paper.open_items(np.array([0, 500_000, 999_999]))
    expected = [Fraction(200 * (100 - opened)) + Fraction(200 * opened * r, 10**6) for r in (0, 500_000, 999_999)]
    assert largest.tolist() == [int(number) for number in expected]
    many = Stream(seed=11, records=20_000, length=40, items=1000, categories=10, opened=opened)
    for first, last in ((0, 500), (19_500, 20_000)):  # of each all that are open come, and no other
        at_most = many.open_items(np.arange(first, last))
        records = many.part(first, last)
        assert (records.max(axis=1) <= at_most).all()
        assert len(np.unique(records)) >= at_most[0] * 0.99


def test_items_are_in_categories_at_random() -> None:
    counts = np.bincount(Stream(**PAPER).category, minlength=100)
    assert (counts.sum(), len(counts)) == (20_000, 100)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert within(chi_square, 99, (2 * 99) ** 0.5)


def test_open_items_of_a_category_are_drawn_evenly() -> None:
    records = MANY.part(0, 20_000)[:, ::8]  # far apart, so that items are nearly independent
    category = MANY.category
    open_of = np.cumsum(category[:, None] == np.arange(10), axis=0)[MANY.open_items(np.arange(20_000)) - 1]
    rank = np.array([np.count_nonzero(category[: item - 1] == category[item - 1]) for item in range(1, 101)])
    share = (rank[records - 1] + 0.5) / np.take_along_axis(open_of, category[records - 1], axis=1)
    assert within(share.mean(), 0.5, (1 / 12 / share.size) ** 0.5)
    assert within((share < 0.25).mean(), 0.25, 0.01)


def test_a_record_has_one_to_five_categories_evenly() -> None:
    record = np.arange(20_000)
    cuts = MANY.cuts(record)
    number = 1 + (cuts < 1 << 20).sum(axis=0)
    assert all(within(count, 4000, (4000 * 0.8) ** 0.5) for count in np.bincount(number, minlength=6)[1:])
    chosen = MANY.chosen(record)
    assert all(len(set(one)) == 5 for one in chosen.T.tolist())
    for place in chosen:
        assert all(within(count, 2000, (2000 * 0.9) ** 0.5) for count in np.bincount(place, minlength=10))
    # Of a flat prior over k categories the mean square of a share is 2 / (k (k + 1)).
    prior = np.diff(np.pad(cuts, ((1, 1), (0, 0)), constant_values=((0, 1 << 20), (0, 0))), axis=0) / (1 << 20)
    for k in range(1, 6):
        shares = prior[:k, number == k]
        assert shares.sum(axis=0) == pytest.approx(1)
        assert (shares**2).mean(axis=1) == pytest.approx(np.full(k, 2 / (k * (k + 1))), rel=0.08)


def test_concentrations_are_even_from_1_to_500() -> None:
    a = MANY.concentration(np.arange(20_000)) / 1024
    assert 1 <= a.min() < 1.2
    assert 499.8 < a.max() <= 500
    assert all(within(count, 2000, (2000 * 0.9) ** 0.5) for count in np.histogram(a, bins=10, range=(1, 500))[0])


@pytest.mark.parametrize(("least", "most"), [(1, 1), (10, 20), (500, 500), (1_000_000, 1_000_000)])
def test_concentrations_are_in_the_range_that_is_given(least: int, most: int) -> None:
    a = Stream(**PAPER, least_a=least, most_a=most).concentration(np.arange(20_000)) / 1024
    assert least <= a.min() <= least + (most - least) / 100
    assert most - (most - least) / 100 <= a.max() <= most


def test_the_lower_the_concentration_the_more_a_record_repeats_a_category() -> None:
    def shares(a: int) -> float:
        """The mean share of the commonest category of records that have five."""
        stream = Stream(seed=11, records=2000, length=40, items=1000, categories=10, least_a=a, most_a=a)
        category = stream.category[stream.part(0, 2000) - 1]
        five = (stream.cuts(np.arange(2000)) < 1 << 20).all(axis=0)
        return float(np.mean([np.bincount(one).max() / 40 for one in category[five]]))

    found = [shares(a) for a in (1, 10, 500)]
    assert found[0] > found[1] + 0.1 > found[2] + 0.1


def test_the_prior_is_asked_with_probability_a_by_a_and_n_less_1(plain: list[Plain]) -> None:
    a = np.array([one.a for one in plain])[:, None] / 1024
    n = np.arange(1, SMALL["length"] + 1)
    chance = a / (a + n - 1)
    asked = np.array([one.from_prior for one in plain])
    deviation = (chance * (1 - chance)).sum(axis=0) ** 0.5
    assert all(
        within(found, expected, spread + 1e-9)
        for found, expected, spread in zip(asked.sum(axis=0), chance.sum(axis=0), deviation, strict=True)
    )
    assert asked[:, 0].all()
    low = a[:, 0] < 20  # where it matters most
    assert asked[low].mean() == pytest.approx(chance[low].mean(), abs=0.06)


def test_categories_come_as_the_dirichlet_process_says() -> None:
    """At each position P(c) = (a H_c + n_c) / (a + n - 1), whatever the implementation's way to draw it."""
    record = np.arange(20_000)
    cuts = MANY.cuts(record)
    prior = np.diff(np.pad(cuts, ((1, 1), (0, 0)), constant_values=((0, 1 << 20), (0, 0))), axis=0) / (1 << 20)
    a = MANY.concentration(record) / 1024
    category = MANY.category[MANY.part(0, 20_000) - 1]
    is_slot = (category[None] == MANY.chosen(record)[:, :, None]).astype(float)  # (5, B, n)
    before = np.cumsum(is_slot, axis=2) - is_slot
    low = a < 60  # where earlier positions matter
    for n in (1, 2, 3, 5, 10, 20, 40):
        chance = (a * prior + before[:, :, n - 1]) / (a + n - 1)
        assert chance.sum(axis=0) == pytest.approx(1)
        for some in (low, ~low):
            p, x = chance[:, some], is_slot[:, some, n - 1]
            # What tells n_c from H: weights that are n_c's share less H's.
            weights = [np.ones_like(p), p]
            weights[0] *= np.arange(5)[:, None] == 0
            if n > 1:
                weights.append(before[:, some, n - 1] / (n - 1) - prior[:, some])
            for weight in weights:
                variance = ((weight**2 * p).sum(axis=0) - (weight * p).sum(axis=0) ** 2).sum()
                assert within((weight * (x - p)).sum(), 0, variance**0.5 + 1e-9), n


# The data path


@pytest.fixture(scope="module")
def processed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processed_by_its_steps("stream-small", tmp_path_factory.mktemp("stream"))


def test_sequences_without_an_archive_are_those_that_preprocess_makes(processed: Path, tmp_path: Path) -> None:
    write_stream(generator(**small_entry()["synthesize"]), tmp_path / "direct")
    made, manifest = read_json(processed / "manifest.json"), read_json(tmp_path / "direct/manifest.json")
    assert manifest == {key: made[key] for key in ("catalogue_items", "users", "interactions", "sequences_sha256")}
    assert sha256(tmp_path / "direct/sequences.safetensors") == made["sequences_sha256"] == SEQUENCES_SHA256


def test_what_validate_and_preprocess_read_is_the_stream(processed: Path) -> None:
    validation = read_json(processed.parent / "valid/validation.json")
    assert (validation["rows"], validation["items"], validation["has_times"]) == (640_000, 1000, True)
    assert not any(check["failures"] for check in validation["checks"])
    sequences, _ = load_sequences(processed, torch.device("cpu"))
    records = stream_small()
    assert (sequences.num_users, sequences.num_items) == (5000, 1000)
    assert (sequences.item.view(5000, 128).numpy() == records.part(0, 5000)).all()
    assert (sequences.timestamp.view(5000, 128) == torch.arange(5000)[:, None]).all()


@pytest.mark.parametrize("model", ["hstu", "gru4rec"])
def test_one_pass_reads_the_first_nine_tenths_in_order(model: str, processed: Path) -> None:
    sequences, _ = load_sequences(processed, torch.device("cpu"))
    split = split_sequences(sequences, params.protocol_rules("stream", ROOT / "params"))
    assert list(split.held_out) == ["test"]
    assert split.held_out["test"].users.tolist() == list(range(4500, 5000))
    assert not split.held_out["test"].num_after.any()
    assert split.num_held_out.tolist() == [0] * 4500 + [128] * 500
    schedule = schedule_of(make(model), sequences, split.num_held_out, max_len=128, batch=50, schedule="one-pass")
    assert schedule.windows[0].tolist() == list(range(4500))
    assert schedule.lengths.tolist() == [127] * 4500
    if model == "hstu":
        batches = [schedule.batch(shape, inputs) for shape, inputs in schedule.epoch()]
        assert torch.cat([one.user for one in batches]).tolist() == list(range(4500))
        one = batches[1]
        assert (one.item[one.token_mask].view(50, 127) == sequences.item.view(5000, 128)[50:100, :-1]).all()
        assert (one.next_item[one.token_mask].view(50, 127) == sequences.item.view(5000, 128)[50:100, 1:]).all()
    else:
        events = torch.cat([step.inputs for step in schedule.epoch()])  # 90 records a lane, one behind the other
        assert events.shape == (90 * 127, 3, 50)
        item = sequences.item[: 4500 * 128].view(90, 50, 128).transpose(1, 2)
        assert (events[:, 0].view(90, 127, 50) == item[:, :-1]).all()
        assert (events[:, 1].view(90, 127, 50) == item[:, 1:]).all()
        assert (events[:, 2].view(90, 127, 50).sum(dim=1) == 1).all()


def test_models_are_trained_and_tested_on_the_stream(processed: Path, tmp_path: Path) -> None:
    for model in ("most-popular", "hstu-no-bias"):
        run = tmp_path / model
        arguments = ["--dataset", "stream-small", "--model", model, "--protocol", "stream", "--seed", 0]
        where = ["--data", processed, "--output", run / "config.json"]
        step("plan", "--experiment", "stream-demo", *arguments, *where, cwd=ROOT)
    runs = [tmp_path / "most-popular", tmp_path / "hstu-no-bias"]
    step("train", "--run", *runs, "--data", processed, "--device", "cpu", "--threads", 1, cwd=ROOT)
    step("evaluate", "--run", *runs, "--data", processed, "--device", "cpu", cwd=ROOT)
    popular, trained = (read_json(run / "metrics.json") for run in runs)
    (line,) = read_jsonl(runs[1] / "history.jsonl")
    assert line["train/steps"] == -(-4500 // small_entry()["training"]["batch"])
    assert set(trained["variants"]) == {"nothing/catalogue", "nothing/rated"}
    assert trained["test"] == trained["variants"]["nothing/catalogue"]
    # Of 1,000 items, in 20 categories: who knows no category hits 0.01 of the time.
    assert popular["test"]["hr@10"] < 0.03
    assert 0.06 < trained["test"]["hr@10"] < ceilings(stream_small(), 4500, 5000)["told"][0]


def test_the_ceiling_and_the_least_loss_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every record the 10 likeliest items, and the entropy, by the plain loop's hidden draws."""
    monkeypatch.setattr("steps.studies.stream_ceiling._AT_ONCE", 25)
    settings = SMALL | {"items": 1000}
    expected, loss = dict.fromkeys(("known", "told", "known, no repeats", "told, no repeats"), 0.0), 0.0
    for record in range(540, 600):
        one, largest = plain_record(record, **settings), 1000 * (4 * 600 + 6 * record) // 6000
        categories = plain_category(*(settings[name] for name in ("seed", "items", "categories")))
        of_item = {item: category for category, items in enumerate(categories) for item in items}
        for end in ("", ", no repeats"):
            chances = []
            for category, prior in one.prior.items():
                before = sum(of_item[item] == category for item in one.items[:-1])
                chance = (one.a / 1024 * prior / 2**20 + before) / (one.a / 1024 + SMALL["length"] - 1)
                its = sum(item <= largest for item in categories[category]) - (before if end else 0)
                chances += [chance / its] * its
                expected[f"told{end}"] += chance * min(1, 10 / its) / 60
            expected[f"known{end}"] += sum(sorted(chances, reverse=True)[:10]) / 60
            loss -= 0.0 if end else sum(chance * math.log(chance) for chance in chances if chance) / 60
    found = ceilings(Stream(**settings), 540, 600)
    assert {name: values[0] for name, values in found.items()} == pytest.approx(expected, rel=1e-6)
    assert least_loss(Stream(**settings), 540, 600) == pytest.approx(loss, rel=1e-9)

"""Stochastic Length: how much of a window is read, which tokens, and what the study says of it."""

from typing import Any

import pytest
import torch

from steps.common import studies
from steps.common.typed import EntryError
from steps.common.yaml_files import read as read_yaml
from steps.data.sequences import StaticShape
from steps.data.stochastic_length import chosen_positions, draw_lengths, expected_lengths, most_kept
from steps.studies import stochastic_length as study
from steps.studies import stochastic_length_report
from tests.conftest import ROOT
from tests.steps.test_models import make, schedule_of, sequences

SETTINGS: dict[str, Any] = {"alpha": 1.6, "rule": "recent"}


def test_how_many_tokens_are_kept() -> None:
    assert [most_kept(1024, alpha) for alpha in (1.6, 1.8, 2.0)] == [256, 512, 1024]
    assert most_kept(200, 1.6) == 69  # 69.3
    assert most_kept(2, 0.1) == 1
    expected = expected_lengths(torch.tensor([1, 69, 100, 200]), 200, 1.6)
    whole = [(69 / n) ** 2 for n in (100, 200)]
    by_hand = [1, 69, 69 * (1 - whole[0]) + 100 * whole[0], 69 * (1 - whole[1]) + 200 * whole[1]]
    assert expected.tolist() == pytest.approx(by_hand)


def test_drawn_lengths_are_whole_or_as_many_as_are_kept_and_as_expected_in_the_mean() -> None:
    lengths = torch.tensor([0, 5, 69, 70, 100, 200]).repeat(20_000, 1)
    drawn = draw_lengths(lengths, 200, 1.6, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[:, :3], lengths[:, :3])
    assert bool(((drawn == lengths) | (drawn == 69)).all())
    deviation = drawn.double().std(0) / len(drawn) ** 0.5
    off = (drawn.double().mean(0) - expected_lengths(lengths[0], 200, 1.6)).abs()
    assert bool((off <= 4 * deviation).all())
    assert torch.equal(draw_lengths(lengths, 200, 2.0), lengths)


def test_the_latest_tokens() -> None:
    lengths, kept = torch.tensor([5, 0, 3, 6]), torch.tensor([2, 0, 3, 6])
    chosen = chosen_positions("recent", lengths, kept, 6)
    assert chosen.tolist() == [[3, 4, 6, 6, 6, 6], [6] * 6, [0, 1, 2, 6, 6, 6], [0, 1, 2, 3, 4, 5]]


def test_tokens_at_random_are_all_alike() -> None:
    torch.manual_seed(0)
    lengths, kept = torch.full((30_000,), 5), torch.full((30_000,), 2)
    chosen = chosen_positions("random", lengths, kept, 7)
    assert bool((chosen[:, 0] < chosen[:, 1]).all())
    assert bool((chosen[:, 2:] == 7).all())
    share = torch.bincount(chosen[:, :2].flatten(), minlength=7) / len(lengths)
    assert share.tolist() == pytest.approx([0.4] * 5 + [0, 0], abs=0.012)  # four deviations


def test_older_tokens_are_drawn_by_their_weights() -> None:
    """Ages 100, 50 and 0 have the weights 1 - 100/150, 1 - 50/150 and 1: of 2 in all."""
    torch.manual_seed(0)
    times = torch.tensor([[0, 50, 100, 7]]).expand(30_000, -1)
    lengths, kept = torch.full((30_000,), 3), torch.ones(30_000, dtype=torch.int64)
    chosen = chosen_positions("weighted", lengths, kept, 4, times)[:, 0]
    share = torch.bincount(chosen, minlength=4) / len(lengths)
    assert share.tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2, 0], abs=0.012)
    equal = chosen_positions("weighted", lengths, kept, 4, torch.zeros_like(times))[:, 0]
    assert (torch.bincount(equal) / len(lengths)).tolist() == pytest.approx([1 / 3] * 3, abs=0.012)
    with pytest.raises(ValueError, match="needs the tokens' times"):
        chosen_positions("weighted", lengths, kept, 4)


@pytest.mark.parametrize("rule", ["recent", "random", "weighted"])
def test_kept_tokens_predict_the_next_item_of_the_whole_sequence(rule: Any) -> None:
    data = sequences([9, 3, 14, 2])
    users, dropped = torch.arange(4), torch.tensor([1, 0, 2, 0])
    whole = data.batch(users, dropped, 8)
    kept = torch.tensor([3, 2, 5, 1])
    batch = data.padded_batch(users, dropped, StaticShape(4, 16, 6, 8), kept, rule)
    assert batch.token_mask is not None
    assert batch.offsets.tolist() == [0, 3, 5, 10, 11, 16, 16]
    real = batch.token_mask
    assert int(real.sum()) == 11
    windows = [set(whole.index[a:b].tolist()) for a, b in zip(whole.offsets[:-1], whole.offsets[1:], strict=True)]
    for user in range(4):
        index = batch.index[batch.offsets[user] : batch.offsets[user + 1]].tolist()
        assert index == sorted(set(index))
        assert set(index) <= windows[user]
        if rule == "recent":
            assert index == sorted(windows[user])[-len(index) :]
    assert torch.equal(batch.item[real], data.item[batch.index[real]])
    assert torch.equal(batch.next_item[real], data.item[batch.index[real] + 1])
    assert torch.equal(batch.next_timestamp[real], data.timestamp[batch.index[real] + 1])


@pytest.mark.parametrize("model", ["hstu", "sasrec", "bert4rec"])
def test_training_reads_a_part_of_long_windows(model: str) -> None:
    task, data = make(model), sequences([40] * 6 + [3])
    schedule = schedule_of(task, data, torch.zeros(7, dtype=torch.int64), max_len=32, stochastic_length=SETTINGS)
    torch.manual_seed(0)
    seen = []
    for shape, inputs in schedule.epoch():
        batch = schedule.batch(shape, inputs)
        lengths = batch.offsets[1 : len(batch.user) + 1].diff(prepend=torch.zeros(1, dtype=torch.int64))
        seen += list(zip(batch.user.tolist(), lengths.tolist(), strict=True))
        assert bool(task.loss(batch).isfinite())
    assert dict(seen)[6] == 2
    assert {length for user, length in seen if user < 6} <= {most_kept(32, 1.6), 32}
    assert most_kept(32, 1.6) in dict(seen).values()


def test_event_by_event_windows_are_read_whole() -> None:
    task = make("gru4rec")
    with pytest.raises(EntryError, match="stochastic_length: does not fit"):
        schedule_of(task, sequences([9, 4]), torch.zeros(2, dtype=torch.int64), stochastic_length=SETTINGS)
    with pytest.raises(EntryError, match=r"stochastic_length\.alpha: 2\.5 is not a number above 0, at most 2"):
        schedule_of(
            make("hstu"),
            sequences([9]),
            torch.zeros(1, dtype=torch.int64),
            stochastic_length={**SETTINGS, "alpha": 2.5},
        )


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return studies.plan("stochastic-length", ROOT / "params")


def test_the_published_sparsities_are_the_paper_s(plan: dict[str, Any]) -> None:
    paper = read_yaml(ROOT / "params/paper.yaml")["stochastic_length_sparsity"]
    there = {(float(alpha), longest): value for alpha, row in paper.items() for longest, value in row.items()}
    assert {(p["alpha"], p["longest"]): p["value"] for p in plan["settings"]["nearest"]["sparsity"]} == there


def test_no_distribution_is_nearer_than_the_nearest(plan: dict[str, Any]) -> None:
    settings = plan["settings"]["nearest"]

    def worst(lengths: torch.Tensor) -> float:
        def off(alpha: float, longest: int, value: float) -> float:
            kept = expected_lengths(lengths.clamp(max=longest), longest, alpha)
            return abs(study.sparsity(kept, longest) - value)

        return max(off(**one) for one in settings["sparsity"])

    lengths = study.nearest(settings)
    assert len(lengths) == pytest.approx(settings["sequences"], abs=5)
    least = worst(lengths)
    assert 0.01 < least < 0.03
    random = torch.Generator().manual_seed(0)
    for _ in range(200):  # a step towards another distribution makes it worse
        low, high = torch.randint(1, 8193, (2,), generator=random).sort().values.tolist()
        others = torch.randint(low, high + 1, (len(lengths) // 10,), generator=random)
        assert worst(torch.cat([lengths, others])) >= least - 2e-4  # of rounding shares to sequences


def test_a_batch_is_cut_to_a_load_its_longest_windows_first() -> None:
    lengths = torch.tensor([[3, 4, 1], [3, 4, 1], [5, 5, 5]])
    assert study.load(lengths).tolist() == [26, 26, 75]
    cut = study.cut_to(lengths, torch.tensor([19.0, 26.0, 47.0]))
    assert cut.tolist() == [[3, 3, 1], [3, 4, 1], [3, 3, 3]]
    assert bool((study.load(cut) <= torch.tensor([19.0, 26.0, 47.0])).all())


def test_balanced_ranks_do_not_wait(plan: dict[str, Any]) -> None:
    sizes = plan["settings"]["balance"] | {"ranks": [4], "steps": 20, "longest": {"x": 500}}
    rows = study.balance({"part": "balance", "data": "x"}, torch.arange(1, 501), {"balance": sizes})
    slowest = {row["method"]: row["value"] for row in rows if row["metric"] == "slowest"}
    assert slowest["whole"] > 1.05
    assert slowest["balanced"] < 1.02
    assert {row["value"] for row in rows if row["metric"] == "read" and row["method"] == "whole"} == {1.0}


def test_the_report_shows_every_case(plan: dict[str, Any]) -> None:
    small = {
        "alphas": [1.6, 2.0],
        "draws": 3,
        "longest": {},
        "balance": {**plan["settings"]["balance"], "ranks": [2], "steps": 2, "longest": {"nearest": 8192}},
    }
    settings = plan["settings"] | small
    points = [one for one in settings["nearest"]["sparsity"] if one["alpha"] in (1.6, 2.0)]
    settings["nearest"] = settings["nearest"] | {"sparsity": points}
    whole = plan | {"settings": settings}
    rows = [row for case in study.cases(whole) for row in study.measure(case, whole, ROOT)]
    markdown, figure, lines = stochastic_length_report.report(
        rows, {"title": "Title", "measure": {"settings": settings}}
    )
    assert "N 8,192" in markdown
    assert "published 0.844" in markdown
    assert "| nearest   | 2       | balanced" in markdown
    assert len(figure.axes) == 2
    assert {line["part"] for line in lines} == {"sparsity", "balance"}

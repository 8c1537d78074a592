"""Exact ranks against a brute-force ranking with ties; metrics and what lies beyond against their definitions."""

import math
from typing import Any

import pytest
import torch

from steps.common.cli import StepError
from steps.common.top import top_items
from steps.data.sequences import Batch, Sequences
from steps.data.split import HeldOut, split_sequences
from steps.evaluation.beyond import beyond_accuracy
from steps.evaluation.exact_ranks import Rules, rank
from steps.evaluation.metrics import Ranks, metrics
from steps.evaluation.names import NAMES
from steps.models import Model
from tests.steps.runs import PAPER, STRICT, config

TEMPORAL = STRICT | {"name": "temporal", "split": "temporal", "test_share": 0.1, "valid_share": 0.1}

USERS, ITEMS = 40, 30


class Fixed(Model):
    """Scores every user and item by a fixed table of few values, so that ties abound."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randint(0, 6, (USERS, ITEMS + 1), generator=torch.Generator().manual_seed(3)).float()

    def score(self, batch: Batch) -> torch.Tensor:
        return self.table[batch.user]


def sequences() -> Sequences:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(3, 12, (USERS,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    item = torch.randint(1, ITEMS - 3, (int(offsets[-1]),), generator=generator)  # repeats; four items never rated
    return Sequences(offsets, item, torch.arange(len(item)), ITEMS)


def rank_by_hand(scores, seen, target, candidates) -> tuple[int, int]:
    """The best rank and the ties of the target; zeros where it is seen itself."""
    if target in seen:
        return 0, 0
    others = [item for item in candidates if item != target and item not in seen]
    higher = sum(bool(scores[item] > scores[target]) for item in others)
    return 1 + higher, sum(bool(scores[item] == scores[target]) for item in others)


def metrics_by_hand(ranks: list[tuple[int, int]]) -> dict[str, float]:
    """The definitions, as means over every rank that a random order of the ties may give."""
    found = dict.fromkeys(NAMES, 0.0)
    for best, ties in ranks:
        for one in range(best, best + ties + 1) if best else ():
            share = 1 / (ties + 1) / len(ranks)
            found["mrr"] += share / one
            for name in NAMES[:-1]:
                metric, cutoff = name.split("@")
                if one <= int(cutoff):
                    found[name] += share * (1.0 if metric == "hr" else 1 / math.log2(one + 1))
    return found


@pytest.mark.parametrize("split", ["test", "valid"])
@pytest.mark.parametrize("candidates", ["catalogue", "rated"])
@pytest.mark.parametrize("exclude", ["window", "history", "nothing"])
def test_ranks_equal_brute_force_with_ties(split: str, candidates: str, exclude: str) -> None:
    data, model, max_len = sequences(), Fixed(), 4
    num_after = {"test": 0, "valid": 1}[split]
    held_out = HeldOut(torch.arange(USERS), torch.full((USERS,), num_after))
    rules = [Rules("catalogue", "window"), Rules(candidates, exclude)]
    _, ranking = rank(model, data, held_out, rules, max_len, batch_size=7, top=3)
    found = ranking.ranks
    ranked = range(1, ITEMS + 1) if candidates == "catalogue" else sorted(set(data.item.tolist()))
    for user in range(USERS):
        items = data.item[data.offsets[user] : data.offsets[user + 1]].tolist()
        items = items if split == "test" else items[:-1]
        seen = {"window": items[:-1][-max_len:], "history": items[:-1], "nothing": []}[exclude]
        expected = rank_by_hand(model.table[user], set(seen), items[-1], ranked)
        assert (found.best[user], found.ties[user]) == expected
        allowed = [item for item in ranked if item not in seen]
        best = sorted(allowed, key=lambda item, user=user: (-float(model.table[user, item]), item))[:3]
        assert ranking.top[user].tolist() == best
    assert found.ties.any()
    assert (found.best == 0).any() == (exclude != "nothing")  # some targets are repeats


class Constant(Model):
    def score(self, batch: Batch) -> torch.Tensor:
        return torch.zeros(len(batch.user), 501)


class SeenInTheWindow(Model):
    def score(self, batch: Batch) -> torch.Tensor:
        return torch.zeros(len(batch.user), 501).index_put_((batch.sequence_id, batch.item), torch.ones(()))


@pytest.mark.parametrize("repeats", ["recommend", "leave-out"])
@pytest.mark.parametrize("protocol", [STRICT, PAPER, TEMPORAL], ids=lambda protocol: protocol["name"])
def test_models_that_know_nothing_of_the_target_score_as_chance_does(repeats: str, protocol: dict[str, Any]) -> None:
    """3,000 users draw from 500 items with replacement: one target in twelve has been seen, which tells nothing."""
    random = torch.Generator().manual_seed(6)
    lengths = torch.randint(10, 80, (3000,), generator=random)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    item = torch.randint(1, 501, (int(offsets[-1]),), generator=random)
    data = Sequences(offsets, item, torch.randint(0, 10**6, item.shape, generator=random), 500)
    data = Sequences(offsets, item, torch.cat([t.sort().values for t in data.timestamp.split(lengths.tolist())]), 500)
    rules = [Rules.of(config(protocol=protocol) | {"repeats": repeats})]
    held_out = split_sequences(data, protocol).held_out["test"]
    for model in (Constant(), SeenInTheWindow()):
        found = metrics(rank(model, data, held_out, rules, max_len=50, batch_size=256)[0].ranks)
        # Of some 3,000 users; five deviations. With the seen items but the target left out the rule has 0.1.
        for name, chance in (("hr@10", 10 / 500), ("hr@200", 200 / 460)):
            assert found[name] < chance + 5 * (chance * (1 - chance) / len(held_out.users)) ** 0.5
        if repeats == "recommend":
            assert found["hr@10"] == pytest.approx(10 / 500, abs=0 if isinstance(model, Constant) else 0.013)


@pytest.mark.parametrize("count", [1, 2, 10, 200])
def test_top_items_are_the_first_of_a_stable_sort_whatever_their_number(count: int) -> None:
    """torch.topk takes other items of equal score for 10 and for 200."""
    scores = torch.randint(0, 3, (20, 300), generator=torch.Generator().manual_seed(9)).float()
    scores[0] = 1.0
    scores[1] = -torch.inf
    scores[1, 7] = 0.0
    expected = [sorted(range(300), key=lambda column, row=row: -row[column])[:count] for row in scores.tolist()]
    assert top_items(scores, count).tolist() == expected


@pytest.mark.parametrize("top", [10, ITEMS + 9])
def test_a_top_list_holds_candidates_alone(top: int) -> None:
    """Item 2 is all that the first user has not seen; the list is longer than what can be recommended."""
    items = torch.tensor([1, *range(3, ITEMS + 1), 2])
    data = Sequences(torch.tensor([0, ITEMS]), items, torch.arange(ITEMS), ITEMS)
    held_out = HeldOut(torch.tensor([0]), torch.tensor([0]))
    (ranking,) = rank(Fixed(), data, held_out, [Rules("rated", "history")], ITEMS, 8, top=top)
    assert ranking.top.tolist() == [[2] + [0] * (top - 1)]
    found = beyond_accuracy(ranking.top, ranking.ranks, data, held_out, torch.tensor([1]))
    assert found[f"coverage@{top}"] == pytest.approx(1 / ITEMS, abs=1e-6)
    assert found[f"popularity@{top}"] == 0.0  # it is held out


def test_a_score_that_is_not_finite_is_an_error() -> None:
    model = Fixed()
    model.table[3, 5] = math.nan
    held_out = HeldOut(torch.arange(USERS), torch.zeros(USERS, dtype=torch.int64))
    with pytest.raises(StepError, match="not finite"):
        rank(model, sequences(), held_out, [Rules("rated", "history")], 4, 8)


def test_metrics_equal_their_definitions() -> None:
    ranks = [(1, 0), (1, 1), (2, 0), (10, 0), (10, 1), (0, 0), (3, 500), (150, 0), (150, 70), (201, 0), (200, 3)]
    best, ties = torch.tensor(ranks).T
    found, expected = metrics(Ranks(best, ties)), metrics_by_hand(ranks)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found["hr@1"] == pytest.approx((1 + 1 / 2) / 11, abs=1e-6)
    assert found["hr@10"] == pytest.approx((4 + 1 / 2 + 8 / 501) / 11, abs=1e-6)


def test_metrics_of_ties_are_means_over_their_orders() -> None:
    generator = torch.Generator().manual_seed(8)
    best, ties = (torch.randint(low, high, (300,), generator=generator) for low, high in ((0, 260), (0, 400)))
    ties *= best > 0
    expected = metrics_by_hand(list(zip(best.tolist(), ties.tolist(), strict=True)))
    assert metrics(Ranks(best, ties)) == pytest.approx(expected, abs=1e-6)
    assert metrics(Ranks(best.int(), ties.int())) == metrics(Ranks(best, ties))


def test_beyond_accuracy_equals_its_definitions() -> None:
    # Items 1..4 are trained on 6, 3, 2, 1 times by five users; item 5 is only ever held out; item 6 never seen.
    lists = [[1, 2, 3, 1, 4], [1, 2, 5], [1, 1, 3, 2, 1], [2, 1, 4], [3, 1, 5]]
    offsets = torch.tensor([0, *torch.tensor([len(items) for items in lists]).cumsum(0).tolist()])
    data = Sequences(offsets, torch.tensor([item for items in lists for item in items]), torch.arange(19), 6)
    users = torch.arange(5)
    held_out = HeldOut(users, torch.zeros_like(users))
    top = torch.tensor([[1, 2], [1, 3], [2, 3], [1, 2], [2, 1]])
    ranks = Ranks(torch.tensor([1, 20, 2, 3, 11]), torch.zeros(5, dtype=torch.int64))
    found = beyond_accuracy(top, ranks, data, held_out, torch.ones_like(users))
    counts = {item: sum(items[:-1].count(item) for items in lists) for item in range(1, 7)}
    assert counts == {1: 7, 2: 4, 3: 3, 4: 0, 5: 0, 6: 0}
    assert found["coverage@2"] == pytest.approx(3 / 5)
    unseen = beyond_accuracy(torch.full_like(top, 6), ranks, data, held_out, torch.ones_like(users))
    assert unseen["coverage@2"] == 0.0  # of rated items
    expected = sum(counts[item] for items in top.tolist() for item in items) / 10 / 5
    assert found["popularity@2"] == pytest.approx(expected, abs=1e-6)
    # Item 1 holds the first half of 14 interactions: head; 2 begins at 7/14: middle; 3 at 11/14 and the rest: tail.
    groups = found["by_popularity"]
    assert [groups[name]["users"] for name in ("head", "middle", "tail")] == [1, 0, 4]
    assert groups["head"]["hr@10"] == 1.0
    assert groups["tail"]["hr@10"] == pytest.approx(2 / 4)
    assert found["by_history_length"]["1-30"]["users"] == 5
    assert found["by_history_length"]["1-30"]["ndcg@10"] == metrics(ranks)["ndcg@10"]
    assert found["by_history_length"]["301-"] == {"users": 0}

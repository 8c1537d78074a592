"""Exact ranks against a brute-force ranking with ties; metrics and what lies beyond against their definitions."""

import math

import pytest
import torch

from steps.common.cli import StepError
from steps.data.holdout import Questions
from steps.data.sequences import Batch, Sequences
from steps.models import Model
from steps.ranking.beyond import beyond_accuracy
from steps.ranking.metrics import metrics
from steps.ranking.ranks import Rules, rank

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


def rank_by_hand(scores, history, target, candidates) -> float:
    rank = 1.0
    for item in candidates:
        if item != target and item not in history:
            rank += 1.0 if scores[item] > scores[target] else 0.5 if scores[item] == scores[target] else 0.0
    return rank


@pytest.mark.parametrize("split", ["test", "valid"])
@pytest.mark.parametrize("candidates", ["catalogue", "rated"])
@pytest.mark.parametrize("exclude", ["window", "history"])
def test_ranks_equal_brute_force_with_ties(split: str, candidates: str, exclude: str) -> None:
    data, model, max_len = sequences(), Fixed(), 4
    drop = {"test": 0, "valid": 1}[split]
    questions = Questions(torch.arange(USERS), torch.full((USERS,), drop))
    rules = [Rules("catalogue", "window"), Rules(candidates, exclude)]
    _, ranking = rank(model, data, questions, rules, max_len, batch_size=7, top=3)
    found = ranking.ranks
    pool = range(1, ITEMS + 1) if candidates == "catalogue" else sorted(set(data.item.tolist()))
    for user in range(USERS):
        items = data.item[data.offsets[user] : data.offsets[user + 1]].tolist()
        items = items if split == "test" else items[:-1]
        history = items[:-1][-max_len:] if exclude == "window" else items[:-1]
        assert found[user] == rank_by_hand(model.table[user], set(history), items[-1], pool)
        allowed = [item for item in pool if item not in history or item == items[-1]]
        best = sorted((float(model.table[user, item]) for item in allowed), reverse=True)[:3]
        assert model.table[user, ranking.top[user]].tolist() == best
        assert set(ranking.top[user].tolist()) <= set(allowed)
    assert (found % 1 == 0.5).any()  # ties did occur


@pytest.mark.parametrize("top", [10, ITEMS + 9])
def test_a_top_list_holds_candidates_alone(top: int) -> None:
    """Item 2 is all that the first user has not seen; the list is longer than what can be recommended."""
    items = torch.tensor([1, *range(3, ITEMS + 1), 2])
    data = Sequences(torch.tensor([0, ITEMS]), items, torch.arange(ITEMS), ITEMS)
    questions = Questions(torch.tensor([0]), torch.tensor([0]))
    (ranking,) = rank(Fixed(), data, questions, [Rules("rated", "history")], ITEMS, 8, top=top)
    assert ranking.top.tolist() == [[2] + [0] * (top - 1)]
    found = beyond_accuracy(ranking.top, ranking.ranks, data, questions, torch.tensor([1]))
    assert found[f"coverage@{top}"] == pytest.approx(1 / ITEMS, abs=1e-6)
    assert found[f"popularity@{top}"] == 0.0  # it is held out


def test_a_score_that_is_not_finite_is_an_error() -> None:
    model = Fixed()
    model.table[3, 5] = math.nan
    questions = Questions(torch.arange(USERS), torch.zeros(USERS, dtype=torch.int64))
    with pytest.raises(StepError, match="not finite"):
        rank(model, sequences(), questions, [Rules("rated", "history")], 4, 8)


def test_metrics_equal_their_definitions() -> None:
    ranks = [1.0, 1.5, 2.0, 10.0, 10.5, 50.0, 150.0, 201.0]
    found = metrics(torch.tensor(ranks))
    for cut in (1, 10, 50, 100, 200):
        assert found[f"hr@{cut}"] == pytest.approx(sum(rank <= cut for rank in ranks) / 8, abs=1e-6)
    for cut in (10, 50, 200):
        gains = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= cut)
        assert found[f"ndcg@{cut}"] == pytest.approx(gains / 8, abs=1e-6)
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 8, abs=1e-6)
    assert found["hr@10"] == 0.5


def test_beyond_accuracy_equals_its_definitions() -> None:
    # Items 1..4 are trained on 6, 3, 2, 1 times by five users; item 5 is only ever held out; item 6 never seen.
    lists = [[1, 2, 3, 1, 4], [1, 2, 5], [1, 1, 3, 2, 1], [2, 1, 4], [3, 1, 5]]
    offsets = torch.tensor([0, *torch.tensor([len(items) for items in lists]).cumsum(0).tolist()])
    data = Sequences(offsets, torch.tensor([item for items in lists for item in items]), torch.arange(19), 6)
    users = torch.arange(5)
    questions = Questions(users, torch.zeros_like(users))
    top = torch.tensor([[1, 2], [1, 3], [2, 3], [1, 2], [2, 1]])
    ranks = torch.tensor([1.0, 20.0, 2.0, 3.0, 11.0])
    found = beyond_accuracy(top, ranks, data, questions, torch.ones_like(users))
    counts = {item: sum(items[:-1].count(item) for items in lists) for item in range(1, 7)}
    assert counts == {1: 7, 2: 4, 3: 3, 4: 0, 5: 0, 6: 0}
    assert found["coverage@2"] == pytest.approx(3 / 5)
    unseen = beyond_accuracy(torch.full_like(top, 6), ranks, data, questions, torch.ones_like(users))
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

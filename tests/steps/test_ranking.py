"""Exact ranks against a brute-force ranking with ties; metrics against their definitions."""

import math

import pytest
import torch

from steps.common.cli import StepError
from steps.data.sequences import Batch, Sequences
from steps.models import Model
from steps.ranking.metrics import metrics
from steps.ranking.ranks import exact_ranks

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
    protocol = {"candidates": candidates, "exclude": exclude}
    found = exact_ranks(model, data, split, protocol, max_len, batch_size=7)
    pool = range(1, ITEMS + 1) if candidates == "catalogue" else sorted(set(data.item.tolist()))
    for user in range(USERS):
        items = data.item[data.offsets[user] : data.offsets[user + 1]].tolist()
        items = items if split == "test" else items[:-1]
        history = items[:-1][-max_len:] if exclude == "window" else items[:-1]
        assert found[user] == rank_by_hand(model.table[user], set(history), items[-1], pool)
    assert (found % 1 == 0.5).any()  # ties did occur


def test_a_score_that_is_not_finite_is_an_error() -> None:
    model = Fixed()
    model.table[3, 5] = math.nan
    with pytest.raises(StepError, match="not finite"):
        exact_ranks(model, sequences(), "test", {"candidates": "rated", "exclude": "history"}, 4, 8)


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

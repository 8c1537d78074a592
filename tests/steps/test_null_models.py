"""The check of the evaluation detects a leak."""

from typing import Any

import pytest
import torch

from steps import null_models
from steps.evaluation.metrics import Ranks
from steps.evaluation.ranks import Ranker, Ranking
from tests.steps.runs import STRICT


@pytest.mark.parametrize("repeats", ["recommend", "leave-out"])
def test_models_that_know_nothing_score_as_chance_does(repeats: str) -> None:
    assert all(row["fits"] for row in null_models.judge(null_models.generated(), STRICT, repeats))


def test_the_check_detects_that_the_target_is_the_only_seen_item_in_the_ranking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rule of many evaluations: all seen items except the target are excluded from the ranking."""
    rank = Ranker.rank

    def leaking(ranker: Ranker, model: Any) -> Any:
        finite, (ranking,) = rank(ranker, model)
        if isinstance(model, null_models.SeenInTheWindow):
            ranks = Ranks(ranking.ranks.best.clamp(min=1), ranking.ranks.ties)
            ranking = Ranking(ranks, ranking.top)
        return finite, [ranking]

    monkeypatch.setattr(Ranker, "rank", leaking)
    rows = {row["metric"]: row for row in null_models.judge(null_models.generated(), STRICT, "leave-out")}
    assert not rows["hr@10"]["fits"]
    assert rows["hr@10"]["seen in the window"] > 3 * rows["hr@10"]["random"]


def test_generated_targets_do_not_depend_on_the_history() -> None:
    data = null_models.generated()
    last = data.offsets[1:] - 1
    repeated = [
        bool((data.item[start:end] == data.item[end]).any())
        for start, end in zip(data.offsets[:-1].tolist(), last.tolist(), strict=True)
    ]
    lengths = (last - data.offsets[:-1]).double()
    expected = float((1 - (1 - 1 / data.num_items) ** lengths).mean())
    assert sum(repeated) / len(repeated) == pytest.approx(expected, abs=0.02)  # five deviations
    assert torch.equal(data.offsets.diff() >= 20, torch.ones(data.num_users, dtype=torch.bool))

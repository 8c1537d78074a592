"""The check of the evaluation finds the leak that it is there for."""

from typing import Any

import pytest
import torch

from steps.common import studies
from steps.evaluation.exact_ranks import Ranker, Ranking
from steps.evaluation.metrics import Ranks
from steps.studies import null_models
from tests.conftest import ROOT
from tests.steps.runs import STRICT

SETTINGS = studies.plan("null-models", ROOT / "params")["settings"]
SIZES = {name: SETTINGS["generated"][name] for name in ("users", "items", "shortest", "longest")}


@pytest.mark.parametrize("repeats", ["recommend", "leave-out"])
def test_the_evaluation_gives_models_that_know_nothing_what_chance_gives(repeats: str) -> None:
    assert all(row["fits"] for row in null_models.judge(null_models.generated(**SIZES), STRICT, repeats, SETTINGS))


def test_a_target_that_alone_of_the_seen_items_is_ranked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of many evaluations: all seen items are left out of the ranking but for the target."""
    rank = Ranker.rank

    def leaking(ranker: Ranker, model: Any) -> Any:
        finite, (ranking,) = rank(ranker, model)
        if isinstance(model, null_models.SeenInTheWindow):
            ranks = Ranks(ranking.ranks.best.clamp(min=1), ranking.ranks.ties)
            ranking = Ranking(ranks, ranking.top)
        return finite, [ranking]

    monkeypatch.setattr(Ranker, "rank", leaking)
    judged = null_models.judge(null_models.generated(**SIZES), STRICT, "leave-out", SETTINGS)
    rows = {row["ranking"]: row for row in judged}
    assert not rows["hr@10"]["fits"]
    assert rows["hr@10"]["seen in the window"] > 3 * rows["hr@10"]["random"]


def test_every_generated_target_is_drawn_without_regard_to_the_history() -> None:
    data = null_models.generated(**SIZES)
    last = data.offsets[1:] - 1
    repeated = [
        bool((data.item[start:end] == data.item[end]).any())
        for start, end in zip(data.offsets[:-1].tolist(), last.tolist(), strict=True)
    ]
    lengths = (last - data.offsets[:-1]).double()
    expected = float((1 - (1 - 1 / data.num_items) ** lengths).mean())
    assert sum(repeated) / len(repeated) == pytest.approx(expected, abs=0.02)  # five deviations
    assert torch.equal(data.offsets.diff() >= 20, torch.ones(data.num_users, dtype=torch.bool))

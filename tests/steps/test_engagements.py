"""The metrics of predicted probabilities, held against scikit-learn and against sums over pairs."""

import math

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from steps.evaluation import engagements
from steps.evaluation.engagements import Predictions


@pytest.fixture
def drawn() -> Predictions:
    torch.manual_seed(0)
    logit = (torch.randn(400) * 3).round() / 2  # with ties
    label = (torch.rand(400) < torch.sigmoid(logit)).long()
    return Predictions(torch.randint(0, 30, (400,)), logit, label)


def pairs(logit: torch.Tensor, label: torch.Tensor) -> float:
    """AUC by its definition."""
    above = logit[label == 1][:, None] - logit[label == 0][None, :]
    return float(((above > 0).double() + 0.5 * (above == 0).double()).mean())


def test_auc_and_log_loss_are_scikit_learns(drawn: Predictions) -> None:
    _, logit, label = drawn
    assert float(engagements.auc(logit, label)) == pytest.approx(roc_auc_score(label, logit), abs=1e-12)
    assert float(engagements.auc(logit, label)) == pytest.approx(pairs(logit, label), abs=1e-12)
    probability = torch.sigmoid(logit.double())
    assert float(engagements.log_loss(logit, label).mean()) == pytest.approx(log_loss(label, probability), abs=1e-12)


def test_gauc_is_the_weighted_mean_of_the_users_that_have_both_labels(drawn: Predictions) -> None:
    user = torch.where(drawn.user < 3, 31, drawn.user)  # of user 31 all are positive, of 0 to 2 there are none
    label = torch.where(user == 31, 1, drawn.label)
    both = [u for u in user.unique().tolist() if len(label[user == u].unique()) == 2]
    assert 31 not in both
    assert len(both) > 20
    sizes = torch.tensor([int((user == u).sum()) for u in both], dtype=torch.float64)
    values = torch.tensor([pairs(drawn.logit[user == u], label[user == u]) for u in both], dtype=torch.float64)
    expected = float((sizes * values).sum() / sizes.sum())
    assert float(engagements.gauc(user, drawn.logit, label, 40)) == pytest.approx(expected, abs=1e-12)


def test_normalized_entropy_by_hand() -> None:
    """One label in four is positive. Predicting that is worth 1, the truth nearly 0."""
    label = torch.tensor([1, 0, 0, 0])
    share = torch.full((4,), math.log(0.25 / 0.75), dtype=torch.float64)
    assert float(engagements.normalized_entropy(share, label)) == pytest.approx(1)
    half = math.log(2) / (0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert float(engagements.normalized_entropy(torch.zeros(4), label)) == pytest.approx(half)
    assert float(engagements.normalized_entropy(40 * (2 * label - 1).double(), label)) < 1e-9


def test_what_scores_all_alike_has_an_auc_of_one_half_and_alike_labels_none() -> None:
    label = torch.tensor([1, 0, 1, 0, 0])
    assert float(engagements.auc(torch.zeros(5), label)) == 0.5
    assert math.isnan(float(engagements.auc(torch.randn(5), torch.ones(5))))
    assert float(engagements.auc(torch.tensor([3.0, -1.0, 2.0, 0.0, 1.0]), label)) == 1
    assert float(engagements.auc(-torch.tensor([3.0, -1.0, 2.0, 0.0, 1.0]), label)) == 0


def test_calibration_is_the_ratio_of_what_is_predicted_to_what_is() -> None:
    logit = torch.logit(torch.tensor([0.5, 0.5, 0.2, 0.4], dtype=torch.float64))
    assert float(engagements.calibration(logit, torch.tensor([1, 0, 0, 0]))) == pytest.approx(1.6)


def test_sums_of_users_are_the_loops(drawn: Predictions) -> None:
    found = engagements.user_sums(drawn)
    assert drawn.user.unique().tolist() == list(range(30))
    positive, negative = (drawn.logit[drawn.label == value] for value in (1, 0))
    for user in range(30):
        own = [(float(s), int(y)) for u, s, y in zip(*drawn, strict=True) if u == user]
        assert (found.examples[user], found.positives[user]) == (len(own), sum(y for _, y in own))
        losses = [math.log1p(math.exp(-s if y else s)) for s, y in own]
        assert float(found.loss[user]) == pytest.approx(sum(losses), abs=1e-9)
        above = [float(((s > negative).double() + (s == negative) / 2).mean()) for s, y in own if y]
        below = [float(((positive > s).double() + (positive == s) / 2).mean()) for s, y in own if not y]
        assert float(found.above[user]) == pytest.approx(sum(above), abs=1e-9)
        assert float(found.below[user]) == pytest.approx(sum(below), abs=1e-9)
    auc = float(engagements.auc(drawn.logit, drawn.label))
    assert float(found.above.sum()) / len(positive) == pytest.approx(auc)
    assert float(found.below.sum()) / len(negative) == pytest.approx(auc)


def test_extreme_logits_cost_what_they_are() -> None:
    """No probability is rounded to 1."""
    assert engagements.log_loss(torch.tensor([80.0, -80.0]), torch.tensor([0, 1])).tolist() == pytest.approx([80, 80])


def test_reliability_has_groups_of_equal_size_in_order(drawn: Predictions) -> None:
    _, logit, label = drawn
    groups = engagements.reliability(logit, label, 7)
    assert [group["examples"] for group in groups] == [58, 57, 57, 57, 57, 57, 57]
    predicted = [group["predicted"] for group in groups]
    assert predicted == sorted(predicted)
    assert sum(group["positive"] * group["examples"] for group in groups) == pytest.approx(int(label.sum()), abs=1e-3)


def test_the_values_are_in_the_order_of_their_names(drawn: Predictions) -> None:
    user, logit, label = drawn
    found = engagements.named(engagements.engagement_values(drawn, 30).tolist())
    assert found["auc"] == pytest.approx(roc_auc_score(label, logit), abs=1e-6)
    assert found["log_loss"] == pytest.approx(float(engagements.log_loss(logit, label).mean()), abs=1e-6)
    assert found["ne"] == pytest.approx(float(engagements.normalized_entropy(logit, label)), abs=1e-6)
    assert found["gauc"] == pytest.approx(float(engagements.gauc(user, logit, label, 30)), abs=1e-6)
    assert found["calibration"] == pytest.approx(float(engagements.calibration(logit, label)), abs=1e-6)

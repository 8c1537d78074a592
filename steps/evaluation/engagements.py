"""Metrics of predicted probabilities: how well a model says whether a user engages with an item.

All are of one logit and one label, 0 or 1, an example, and computed in float64. Equal scores share their ranks, so that
a model which scores all alike has an AUC of one half.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from steps.evaluation.names import ENGAGEMENT_NAMES

#: Groups of equal size, by predicted probability, that a reliability figure has.
RELIABILITY_GROUPS = 20


class Predictions(NamedTuple):
    """Examples (K,): the user of each, int64; its logit; its label, 0 or 1."""

    user: torch.Tensor
    logit: torch.Tensor
    label: torch.Tensor


def log_loss(logit: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The cross entropy (K,) float64 of each example, in nats."""
    return F.binary_cross_entropy_with_logits(logit.double(), label.double(), reduction="none")


def normalized_entropy(logit: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over that of the share of positive labels, predicted for all (He et al. 2014, section 3).

    Infinite or not a number where all labels are alike.
    """
    share = label.double().mean()
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))
    return log_loss(logit, label).mean() / entropy


def calibration(logit: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean predicted probability over the share of positive labels: 1 is right, above predicts too many."""
    return torch.sigmoid(logit.double()).mean() / label.double().mean()


def auc(logit: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The share of pairs of a positive and a negative example that are in the right order, equal scores as half; not a
    number where all labels are alike."""
    return group_auc(torch.zeros_like(label, dtype=torch.int64), logit, label, 1)[0][0]


def group_auc(
    group: torch.Tensor, logit: torch.Tensor, label: torch.Tensor, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The AUC (G,) float64 of each group of examples, 0 to G - 1, not a number where its labels are alike; and how many
    examples each has (G,)."""
    # By group, then score: two stable sorts.
    order = logit.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    group, logit, label = group[order], logit[order], label[order].double()
    counts = _sum_by(group, torch.ones_like(label), num_groups)
    begins = torch.ones_like(group, dtype=torch.bool)
    begins[1:] = (group[1:] != group[:-1]) | (logit[1:] != logit[:-1])
    tie = begins.cumsum(0) - 1
    rank = torch.arange(1, len(group) + 1, dtype=torch.float64, device=group.device)
    size = _sum_by(tie, torch.ones_like(rank), len(group))
    mean_rank = (_sum_by(tie, rank, len(group)) / size)[tie]
    before = counts.long().cumsum(0) - counts  # of whole numbers: in deterministic mode CUDA has no other
    within = mean_rank - before[group]
    positive = _sum_by(group, label, num_groups)
    negative = counts - positive
    above = _sum_by(group, within * label, num_groups) - positive * (positive + 1) / 2
    return above / (positive * negative), counts


def gauc(group: torch.Tensor, logit: torch.Tensor, label: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The mean of the groups' AUCs by their numbers of examples, of groups with labels of both kinds (Zhou et al. 2018,
    arXiv 1706.06978, equation 6)."""
    found, counts = group_auc(group, logit, label, num_groups)
    weight = torch.where(found.isnan(), 0.0, counts)
    return (torch.where(found.isnan(), 0.0, found) * weight).sum() / weight.sum()


class UserSums(NamedTuple):
    """What each user's (U,) examples add up to, float64.

    examples, positives: how many. loss: cross entropies. own_auc: among the user's
    own, not a number where labels are alike. above: of each positive the share of all users' negatives that score lower
    (equal ones as half); below: of each negative the share of all positives that score higher. Both, added up over
    users, are AUC times the number of positives, or negatives.
    """

    examples: torch.Tensor
    positives: torch.Tensor
    loss: torch.Tensor
    own_auc: torch.Tensor
    above: torch.Tensor
    below: torch.Tensor


def user_sums(predictions: Predictions) -> UserSums:
    """The sums of the users that have examples, in the order of their numbers."""
    logit, label = predictions.logit, predictions.label
    users, user = predictions.user.unique(return_inverse=True)
    num_users = len(users)
    own_auc, examples = group_auc(user, logit, label, num_users)
    positive = logit[label == 1].sort().values
    negative = logit[label == 0].sort().values
    above = _share_below(logit, negative)
    below = 1 - _share_below(logit, positive)
    return UserSums(
        examples,
        _sum_by(user, label, num_users),
        _sum_by(user, log_loss(logit, label), num_users),
        own_auc,
        _sum_by(user, above * label, num_users),
        _sum_by(user, below * (1 - label), num_users),
    )


def _share_below(logit: torch.Tensor, ordered: torch.Tensor) -> torch.Tensor:
    """Of each logit (K,) float64 the share of the `ordered` ones that are lower, equal ones as half."""
    lower, upto = (torch.searchsorted(ordered, logit, right=right) for right in (False, True))
    return (lower + upto).double() / (2 * len(ordered))


def engagement_values(predictions: Predictions, num_users: int) -> torch.Tensor:
    """The metrics in `ENGAGEMENT_NAMES`, float64, on the device, without waiting for it."""
    user, logit, label = predictions
    return torch.stack(
        [
            normalized_entropy(logit, label),
            auc(logit, label),
            gauc(user, logit, label, num_users),
            log_loss(logit, label).mean(),
            calibration(logit, label),
        ]
    )


def named(values: list[float]) -> dict[str, float]:
    """`engagement_values`, copied to the host, by name."""
    return {name: round(value, 6) for name, value in zip(ENGAGEMENT_NAMES, values, strict=True)}


def reliability(logit: torch.Tensor, label: torch.Tensor, groups: int = RELIABILITY_GROUPS) -> list[dict[str, float]]:
    """Of groups of equal size by predicted probability, from low to high: how many examples, the mean predicted
    probability, and the share of positive labels."""
    order = logit.argsort(stable=True)
    found = []
    for part in order.tensor_split(min(groups, len(order))):
        predicted, share = torch.sigmoid(logit[part].double()).mean(), label[part].double().mean()
        found.append(
            {"examples": len(part), "predicted": round(float(predicted), 6), "positive": round(float(share), 6)}
        )
    return found


def _sum_by(group: torch.Tensor, values: torch.Tensor, num_groups: int) -> torch.Tensor:
    return torch.zeros(num_groups, dtype=torch.float64, device=values.device).index_add_(0, group, values.double())

"""Beyond accuracy: coverage and popularity of what is recommended, and metrics by group of users and of targets."""

from typing import Any

import torch

from steps.data.sequences import Sequences
from steps.data.split import HeldOut
from steps.evaluation.metrics import Ranks, metrics

#: Upper ends of the history-length groups.
HISTORY_LENGTHS = (30, 100, 300)
#: Shares of all training interactions that the most popular items of each group add up to.
POPULARITY_SHARES = (0.33, 0.67, 1.0)
_GROUP_METRICS = ("hr@10", "ndcg@10")


def beyond_accuracy(
    top: torch.Tensor, ranks: Ranks, sequences: Sequences, held_out: HeldOut, num_held_out: torch.Tensor
) -> dict[str, Any]:
    """Coverage and popularity of the recommended items (K, k), and metrics by groups of users and targets.

    top has 0 where a user has fewer candidates. coverage: the share of rated items that are recommended to anyone.
    popularity: the mean, over all recommendations, of the item's interactions in the training data, divided by the
    number of users. A group's `users` is its size; an empty group has no metrics.
    """
    counts = sequences.counts(num_held_out)
    rated = sequences.counts(torch.zeros_like(num_held_out)) > 0
    target = sequences.item[sequences.offsets[held_out.users + 1] - 1 - held_out.num_after]
    history = sequences.offsets.diff()[held_out.users] - held_out.num_after - 1
    return {
        f"coverage@{top.shape[1]}": round(int(rated[top.unique()].sum()) / int(rated.sum()), 6),
        f"popularity@{top.shape[1]}": round(float(counts[top[top > 0]].double().mean()) / sequences.num_users, 6),
        "by_history_length": _by_group(ranks, _edges(history, HISTORY_LENGTHS), _length_names()),
        "by_popularity": _by_group(ranks, _popularity_groups(counts)[target], ["head", "middle", "tail"]),
    }


def _edges(values: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    return torch.bucketize(values, torch.tensor(ends, device=values.device))


def _length_names() -> list[str]:
    starts = [1, *(end + 1 for end in HISTORY_LENGTHS)]
    return [f"{start}-{end}" for start, end in zip(starts, [*HISTORY_LENGTHS, ""], strict=True)]


def _popularity_groups(counts: torch.Tensor) -> torch.Tensor:
    """The group (V + 1,) of each item: 0 for the most popular, by their cumulative share of interactions."""
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    shares = before.double() / counts.sum().clamp(min=1)
    groups = torch.bucketize(shares, torch.tensor(POPULARITY_SHARES[:-1], device=counts.device).double(), right=True)
    return torch.empty_like(groups).scatter_(0, order, groups)


def _by_group(ranks: Ranks, group: torch.Tensor, names: list[str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for number, name in enumerate(names):
        chosen = ranks[group == number]
        found[name] = {"users": len(chosen)}
        if len(chosen):
            values = metrics(chosen)
            found[name] |= {metric: values[metric] for metric in _GROUP_METRICS}
    return found

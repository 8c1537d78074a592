"""Metrics of exact ranks, with one target per user. All are fractions, never percent.

A target that ties with t other candidates stands at each of t + 1 ranks equally often, if ties are broken at random.
Every metric is the mean over these ranks, so that a model which scores all items alike scores as chance does.
"""

import functools
from dataclasses import dataclass

import torch

HR_CUTS = (1, 10, 50, 100, 200)
NDCG_CUTS = (10, 50, 200)
NAMES = (*(f"hr@{k}" for k in HR_CUTS), *(f"ndcg@{k}" for k in NDCG_CUTS), "mrr")
#: What validation chooses an epoch by, and what `test_best` is the best of.
SELECTED_BY = "ndcg@10"


@dataclass(frozen=True)
class Ranks:
    """Where held-out targets stand among the candidates.

    best (U,) int: 1 + the candidates that score higher; 0 where the target is left out of the ranking, which is a miss.
    ties (U,) int: the other candidates that score alike. A random order of them gives each rank best..best + ties.
    """

    best: torch.Tensor
    ties: torch.Tensor

    def __len__(self) -> int:
        return len(self.best)

    def __getitem__(self, chosen: torch.Tensor) -> "Ranks":
        return Ranks(self.best[chosen], self.ties[chosen])


def hits(ranks: Ranks, k: int) -> torch.Tensor:
    """Expected HR@k (U,) float64: the share of a target's ranks that are at most k."""
    inside = torch.minimum(k + 1 - ranks.best, ranks.ties + 1).clamp(min=0)
    return _unless_left_out(ranks, inside.double() / (ranks.ties + 1))


def gains(ranks: Ranks, k: int) -> torch.Tensor:
    """Expected NDCG@k (U,) float64: the mean of 1 / log2(rank + 1) over a target's ranks, 0 beyond k."""
    sums = _discount_sums(k, ranks.best.device)
    first = (ranks.best - 1).clamp(0, k)
    last = (ranks.best + ranks.ties).clamp(0, k)
    tied = (sums[last] - sums[first]) / (ranks.ties + 1)
    alone = torch.where(ranks.best <= k, 1 / torch.log2(ranks.best.double() + 1), 0.0)
    return _unless_left_out(ranks, torch.where(ranks.ties == 0, alone, tied))


def reciprocals(ranks: Ranks) -> torch.Tensor:
    """Expected reciprocal rank (U,) float64: the mean of 1 / rank over a target's ranks."""
    best = ranks.best.double().clamp(min=1)
    # 1/a + ... + 1/b is digamma(b + 1) - digamma(a).
    tied = (torch.digamma(best + ranks.ties + 1) - torch.digamma(best)) / (ranks.ties + 1)
    return _unless_left_out(ranks, torch.where(ranks.ties == 0, 1 / best, tied))


def user_values(ranks: Ranks, name: str) -> torch.Tensor:
    """Each user's value (U,) float64 of a metric: hr@k, ndcg@k or mrr."""
    if name == "mrr":
        return reciprocals(ranks)
    kind, _, cut = name.partition("@")
    return {"hr": hits, "ndcg": gains}[kind](ranks, int(cut))


def metric_values(ranks: Ranks) -> torch.Tensor:
    """The means over users, float64, of the metrics in `NAMES`."""
    return torch.stack([user_values(ranks, name).mean() for name in NAMES])


def named(values: list[float]) -> dict[str, float]:
    """The host's copy of `metric_values`, by name."""
    return {name: round(value, 6) for name, value in zip(NAMES, values, strict=True)}


def metrics(ranks: Ranks) -> dict[str, float]:
    """`metric_values` by name."""
    return named(metric_values(ranks).tolist())


def _unless_left_out(ranks: Ranks, values: torch.Tensor) -> torch.Tensor:
    return torch.where(ranks.best > 0, values, 0.0)


@functools.cache  # kept on the device, since a CUDA graph can hold no copy from the host
def _discount_sums(k: int, device: torch.device) -> torch.Tensor:
    """Entry r is the sum of 1 / log2(rank + 1) over the ranks 1..r: (k + 1,) float64."""
    discounts = 1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64))
    return torch.cat([discounts.new_zeros(1), discounts.cumsum(0)]).to(device)

"""Metrics of exact ranks, with one target per user. All are fractions, never percent.

If ties are broken at random, a target that ties with t other candidates has each of t + 1 ranks equally often.
Every metric is the mean over these ranks, so that a model which scores all items alike scores as chance does.
"""

import functools
from dataclasses import dataclass

import torch

from steps.evaluation.names import NAMES


@dataclass(frozen=True)
class Ranks:
    """The ranks of held-out targets among the candidates.

    best (K,) int: 1 + the number of candidates with a higher score; 0 where the target is excluded from the ranking,
    which is a miss. ties (K,) int: the number of other candidates with the same score. In a random order of the ties
    the target has each rank from best to best + ties equally often.
    """

    best: torch.Tensor
    ties: torch.Tensor

    def __len__(self) -> int:
        return len(self.best)

    def __getitem__(self, selected: torch.Tensor) -> "Ranks":
        return Ranks(self.best[selected], self.ties[selected])


def hit_rate(ranks: Ranks, k: int) -> torch.Tensor:
    """Expected HR@k (K,) float64: the share of a target's ranks that are at most k."""
    inside = torch.minimum(k + 1 - ranks.best, ranks.ties + 1).clamp(min=0)
    return _zero_if_excluded(ranks, inside.double() / (ranks.ties + 1))


def ndcg(ranks: Ranks, k: int) -> torch.Tensor:
    """Expected NDCG@k (K,) float64: the mean of 1 / log2(rank + 1) over a target's ranks, 0 beyond k."""
    sums = _discount_sums(k, ranks.best.device)
    first = (ranks.best - 1).clamp(0, k)
    last = (ranks.best + ranks.ties).clamp(0, k)
    tied = (sums[last] - sums[first]) / (ranks.ties + 1)
    alone = torch.where(ranks.best <= k, 1 / torch.log2(ranks.best.double() + 1), 0.0)
    return _zero_if_excluded(ranks, torch.where(ranks.ties == 0, alone, tied))


def reciprocal_rank(ranks: Ranks) -> torch.Tensor:
    """Expected reciprocal rank (K,) float64: the mean of 1 / rank over a target's ranks."""
    best = ranks.best.double().clamp(min=1)
    # 1/a + ... + 1/b is digamma(b + 1) - digamma(a).
    tied = (torch.digamma(best + ranks.ties + 1) - torch.digamma(best)) / (ranks.ties + 1)
    return _zero_if_excluded(ranks, torch.where(ranks.ties == 0, 1 / best, tied))


def user_values(ranks: Ranks, name: str) -> torch.Tensor:
    """Each user's value (U,) float64 of a metric: hr@k, ndcg@k or mrr."""
    if name == "mrr":
        return reciprocal_rank(ranks)
    kind, _, cut = name.partition("@")
    return {"hr": hit_rate, "ndcg": ndcg}[kind](ranks, int(cut))


def metric_values(ranks: Ranks) -> torch.Tensor:
    """The means over users, float64, of the metrics in `NAMES`."""
    return torch.stack([user_values(ranks, name).mean() for name in NAMES])


def named(values: list[float]) -> dict[str, float]:
    """`metric_values`, copied to the host, by name."""
    return {name: round(value, 6) for name, value in zip(NAMES, values, strict=True)}


def metrics(ranks: Ranks) -> dict[str, float]:
    """`metric_values` by name."""
    return named(metric_values(ranks).tolist())


def _zero_if_excluded(ranks: Ranks, values: torch.Tensor) -> torch.Tensor:
    return torch.where(ranks.best > 0, values, 0.0)


@functools.cache  # kept on the device, since a CUDA graph can hold no copy from the host
def _discount_sums(k: int, device: torch.device) -> torch.Tensor:
    """Entry r is the sum of 1 / log2(rank + 1) over the ranks 1..r: (k + 1,) float64."""
    discounts = 1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64))
    return torch.cat([discounts.new_zeros(1), discounts.cumsum(0)]).to(device)

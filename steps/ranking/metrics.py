"""Metrics of exact ranks, with one target per user. All are fractions, never percent."""

import torch

HR_CUTS = (1, 10, 50, 100, 200)
NDCG_CUTS = (10, 50, 200)


NAMES = (*(f"hr@{k}" for k in HR_CUTS), *(f"ndcg@{k}" for k in NDCG_CUTS), "mrr")


def metric_values(ranks: torch.Tensor) -> torch.Tensor:
    """HR@k, NDCG@k and MRR, as `NAMES` has them, float64, of ranks (U,), counted from 1; ties make them halves.

    With one target HR@k is the share of ranks <= k, and NDCG@k the mean of 1 / log2(rank + 1) inside the cut.
    """
    ranks = ranks.double()
    gain = 1 / torch.log2(ranks + 1)
    found = [(ranks <= k).double().mean() for k in HR_CUTS]
    found += [torch.where(ranks <= k, gain, 0.0).mean() for k in NDCG_CUTS]
    return torch.stack([*found, (1 / ranks).mean()])


def named(values: list[float]) -> dict[str, float]:
    """The host's copy of `metric_values`, by name."""
    return {name: round(value, 6) for name, value in zip(NAMES, values, strict=True)}


def metrics(ranks: torch.Tensor) -> dict[str, float]:
    """`metric_values` by name."""
    return named(metric_values(ranks).tolist())

"""Metrics of exact ranks, with one target per user. All are fractions, never percent."""

import torch

HR_CUTS = (1, 10, 50, 100, 200)
NDCG_CUTS = (10, 50, 200)


def metrics(ranks: torch.Tensor) -> dict[str, float]:
    """HR@k, NDCG@k and MRR of ranks (U,), counted from 1; ties make them halves.

    With one target HR@k is the share of ranks <= k, and NDCG@k the mean of 1 / log2(rank + 1) inside the cut.
    """
    ranks = ranks.double()
    gain = 1 / torch.log2(ranks + 1)
    found = {f"hr@{k}": (ranks <= k).double().mean() for k in HR_CUTS}
    found |= {f"ndcg@{k}": torch.where(ranks <= k, gain, 0.0).mean() for k in NDCG_CUTS}
    found["mrr"] = (1 / ranks).mean()
    return {name: round(float(value), 6) for name, value in found.items()}

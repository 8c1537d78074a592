"""The items with the highest scores, with a fixed rule for equal scores."""

import torch


def top_items(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` columns (K, count) int64 with the highest scores (K, V), best first; of equal scores the smallest
    column first.

    torch.topk takes other columns of equal score for another `count`, and on another device.
    """
    lowest = scores.topk(count, dim=1).values[:, -1:]
    chosen = scores >= lowest
    crowded = (chosen.sum(1) > count).nonzero()[:, 0]  # the few rows in which others score like the last one chosen
    higher, equal = scores[crowded] > lowest[crowded], scores[crowded] == lowest[crowded]
    wanted = count - higher.sum(1, keepdim=True)
    chosen[crowded] = higher | (equal & (equal.cumsum(1) <= wanted))
    columns = chosen.nonzero()[:, 1].view(len(scores), count)  # `count` in every row, in ascending order
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)

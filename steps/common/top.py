"""The items that score highest, by a rule that also says what happens to equal scores."""

import torch


def top_items(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` columns (K, count) int64 with the highest scores (K, V), best first; of equal scores the smallest
    column first.

    torch.topk takes other columns of equal score for another `count`, and on another device.
    """
    lowest = scores.topk(count, dim=1).values[:, -1:]
    chosen = scores >= lowest
    crowded = (chosen.sum(1) > count).nonzero()[:, 0]  # the few rows in which more columns score like the last one
    higher, equal = scores[crowded] > lowest[crowded], scores[crowded] == lowest[crowded]
    wanted = count - higher.sum(1, keepdim=True)
    chosen[crowded] = higher | (equal & (equal.cumsum(1) <= wanted))
    columns = chosen.nonzero()[:, 1].view(len(scores), count)  # as many in every row, in the order of their numbers
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)

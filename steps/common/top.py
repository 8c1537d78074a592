"""The items that score highest, by a rule that also says what happens to equal scores."""

import torch


def top_items(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` columns (K, count) int64 with the highest scores (K, V), best first; of equal scores the smallest
    column first.

    torch.topk takes other columns of equal score for another `count`, and on another device.
    """
    lowest = scores.topk(count, dim=1).values[:, -1:]
    higher, equal = scores > lowest, scores == lowest
    wanted = count - higher.sum(1, keepdim=True)
    chosen = higher | (equal & (equal.cumsum(1) <= wanted))
    columns = chosen.nonzero()[:, 1].view(len(scores), count)  # as many in every row, in the order of their numbers
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)

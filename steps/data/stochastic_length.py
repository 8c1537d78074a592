"""Stochastic Length: training reads a part of each long window (arXiv 2402.17152, section 3.2).

A window of n tokens, of at most N, is read whole if n is at most K = N^(alpha/2). Of a longer one K tokens are read,
with probability 1 - K^2 / n^2; otherwise all. Attention over it costs in the mean twice N^alpha at most, instead of
N^2. Evaluation reads all. Needs torch alone.
"""

from typing import Literal

import torch

#: Which tokens are read: the latest; any, all alike; or, by the paper's weights, the less likely the older.
Rule = Literal["recent", "random", "weighted"]


def most_kept(longest: int, alpha: float) -> int:
    """K: how many tokens are read of a window that is not read whole; `longest` is N."""
    return max(1, int(longest ** (alpha / 2)))


def expected_lengths(lengths: torch.Tensor, longest: int, alpha: float) -> torch.Tensor:
    """How many tokens of windows of `lengths` are read in the mean: float64, of the same shape."""
    kept = most_kept(longest, alpha)
    lengths = lengths.double()
    whole = (kept / lengths).clamp(max=1) ** 2
    return torch.where(lengths > kept, (1 - whole) * kept + whole * lengths, lengths)


def draw_lengths(
    lengths: torch.Tensor, longest: int, alpha: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """How many tokens of windows of `lengths` are read: int64, by torch's default generator if none is given."""
    kept = most_kept(longest, alpha)
    whole = torch.rand(lengths.shape, dtype=torch.float64, generator=generator) < (kept / lengths.double()) ** 2
    return torch.where((lengths > kept) & ~whole, kept, lengths)


def chosen_positions(
    rule: Rule, lengths: torch.Tensor, kept: torch.Tensor, longest: int, times: torch.Tensor | None = None
) -> torch.Tensor:
    """The positions that are read of windows of `lengths` (B,), of each `kept` (B,) in rising order: (B, longest)
    int64, `longest` behind them. Without waiting for the device; with random numbers of its default generator.

    times: (B, longest), the tokens' times, which the rule `weighted` needs: token i is drawn, without replacement, by
    the weight 1 - f_i / sum f, where f_i is how long it was before the window's last ("feature-weighted" there).
    """
    position = torch.arange(longest, device=lengths.device)
    inside = position < lengths[:, None]
    if rule == "recent":
        order = (longest - position).double().expand(len(lengths), -1)
    else:
        # The least of exponential variables with these rates are a draw without replacement by them.
        order = torch.empty(inside.shape, dtype=torch.float64, device=lengths.device).exponential_()
        if rule == "weighted":
            if times is None:
                raise ValueError("the rule weighted needs the tokens' times")
            last = times.gather(1, (lengths - 1).clamp(min=0)[:, None])
            age = torch.where(inside, last - times, 0).double().clamp(min=0)
            # A token that holds all of the age has no weight, and comes last.
            order = order / (1 - age / age.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-9)
    rank = torch.where(inside, order, torch.inf).argsort(1).argsort(1)
    return torch.where(inside & (rank < kept[:, None]), position, longest).sort(1).values

"""Cross-entropy of all items by a matrix of logits: memory M x V, several times over."""

import torch
import torch.nn.functional as F

#: The row of the items that is padding, and the target that is left out.
PADDING = 0


def linear_cross_entropy(
    states: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    bias = items.new_zeros(len(items)) if bias is None else bias
    bias = bias.index_fill(0, torch.full((1,), PADDING, device=bias.device), -torch.inf)
    return F.cross_entropy(F.linear(states, items, bias), targets, ignore_index=PADDING)

"""The exact rank of every user's held-out item among all candidates."""

from typing import Any

import torch

from steps.common.cli import StepError
from steps.data.sequences import DROPPED, Sequences
from steps.models import Model


@torch.inference_mode()
def exact_ranks(
    model: Model, sequences: Sequences, split: str, protocol: dict[str, Any], max_len: int, batch_size: int
) -> torch.Tensor:
    """Ranks (U,) float32 of each user's target of `split`: 1 + candidates that score higher, ties counted half.

    Candidates and the seen items left out are the protocol's. The target is always a candidate. Leaves
    the model in evaluation mode. Raises StepError if a score is not finite.
    """
    model.eval()
    drop = DROPPED[split]
    candidate = _candidates(sequences, protocol["candidates"])
    ranks = []
    for users in torch.arange(sequences.num_users, device=sequences.offsets.device).split(batch_size):
        batch = sequences.batch(users, drop, max_len)
        target = batch.next_item[batch.last][:, None]
        scores = model.score(batch)
        if not torch.isfinite(scores).all():
            raise StepError("scores are not finite: training diverged; lower the learning rate")
        own = scores.gather(1, target)
        left_out = ~candidate.expand_as(scores).clone()
        if protocol["exclude"] == "history":
            left_out[sequences.histories(users, drop)] = True
        else:
            row = torch.repeat_interleave(torch.arange(len(users), device=users.device), batch.offsets.diff())
            left_out[row, batch.item] = True
        left_out.scatter_(1, target, True)
        scores = scores.masked_fill(left_out, -torch.inf)
        ranks.append(1 + (scores > own).sum(1) + 0.5 * (scores == own).sum(1))
    return torch.cat(ranks).float()


def _candidates(sequences: Sequences, rule: str) -> torch.Tensor:
    """Which items may be ranked: (num_items + 1,) bool."""
    if rule == "rated":
        return sequences.counts(drop=0) > 0
    candidate = torch.ones(sequences.num_items + 1, dtype=torch.bool, device=sequences.item.device)
    candidate[0] = False
    return candidate

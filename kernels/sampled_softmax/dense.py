"""Sampled softmax for small catalogues: all T x V cosines by one matrix product, then R of them per token."""

import torch
import torch.nn.functional as F

from .naive import MASKED_LOGIT, NORM_EPS


def sampled_softmax(
    states: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None = None,
) -> torch.Tensor:
    queries = F.normalize(states, dim=-1, eps=NORM_EPS) / temperature
    logits = queries @ F.normalize(table, dim=-1, eps=NORM_EPS).T  # (T, V)
    if log_frequency is not None:
        logits = logits - log_frequency
    chosen = logits.gather(1, torch.cat([positives[:, None], negatives], dim=1))  # (T, 1 + R)
    collision = F.pad(negatives == positives[:, None], (1, 0))
    return -F.log_softmax(chosen.masked_fill(collision, MASKED_LOGIT), dim=1)[:, 0]

"""Sampled softmax by gathering every negative's vector: memory T x R x d."""

import torch
import torch.nn.functional as F

#: What vectors are divided by is at least this (the authors' L2 normalisation).
NORM_EPS = 1e-6
#: The logit of a negative that is the positive.
MASKED_LOGIT = -5e4


def sampled_softmax(
    states: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None = None,
) -> torch.Tensor:
    # On a CPU the gradient of table[negatives] is added up by atomics, in another order each time; this one's is not.
    queries = F.normalize(states, dim=-1, eps=NORM_EPS)
    positive_vectors = F.normalize(F.embedding(positives, table), dim=-1, eps=NORM_EPS)  # (T, d)
    negative_vectors = F.normalize(F.embedding(negatives, table), dim=-1, eps=NORM_EPS)  # (T, R, d)
    positive_logits = (queries * positive_vectors).sum(-1, keepdim=True) / temperature
    negative_logits = torch.einsum("td,trd->tr", queries, negative_vectors) / temperature
    if log_frequency is not None:
        positive_logits = positive_logits - log_frequency[positives][:, None]
        negative_logits = negative_logits - log_frequency[negatives]
    negative_logits = negative_logits.masked_fill(negatives == positives[:, None], MASKED_LOGIT)
    logits = torch.cat([positive_logits, negative_logits], dim=1)
    return -F.log_softmax(logits, dim=1)[:, 0]

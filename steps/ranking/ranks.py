"""The exact rank of every held-out item among all candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steps.common.cli import StepError
from steps.data.holdout import Questions
from steps.data.sequences import Batch, Sequences
from steps.models import Model


@dataclass(frozen=True)
class Rules:
    """What may be ranked: `candidates` catalogue or rated, less the seen items of the window or the whole history."""

    candidates: str
    exclude: str

    @classmethod
    def of(cls, protocol: dict[str, Any]) -> "Rules":
        """The rules of a protocol of params/protocols.yaml."""
        return cls(protocol["candidates"], protocol["exclude"])


@dataclass(frozen=True)
class Ranking:
    """ranks (K,) float32 of the targets, counted from 1; top (K, k) int64, the k items recommended first."""

    ranks: torch.Tensor
    top: torch.Tensor


@torch.inference_mode()
def rank(
    model: Model,
    sequences: Sequences,
    questions: Questions,
    rules: Sequence[Rules],
    max_len: int,
    batch_size: int,
    top: int = 0,
) -> list[Ranking]:
    """Answer every question under each of the rules, from one scoring.

    A rank is 1 + the candidates that score higher than the target, ties counted half. The target is
    always a candidate. Leaves the model in evaluation mode. Raises StepError if a score is not finite.
    """
    model.eval()
    candidates = {rule: _candidates(sequences, rule) for rule in {rule.candidates for rule in rules}}
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in rules]
    for users, drop in zip(questions.users.split(batch_size), questions.drop.split(batch_size), strict=True):
        batch = sequences.batch(users, drop, max_len)
        target = batch.next_item[batch.last][:, None]
        scores = model.score(batch)
        if not torch.isfinite(scores).all():
            raise StepError("scores are not finite: training diverged; lower the learning rate")
        own = scores.gather(1, target)
        for rule, part in zip(rules, parts, strict=True):
            left_out = ~candidates[rule.candidates].expand_as(scores)
            left_out = left_out.index_put(_seen(sequences, batch, drop, rule.exclude), torch.tensor(True))
            left_out.scatter_(1, target, False)
            ranked = scores.masked_fill(left_out, -torch.inf)
            ahead = (ranked > own).sum(1) + 0.5 * ((ranked == own).sum(1) - 1)  # the target ties with itself
            part.append((1 + ahead, ranked.topk(top, dim=1).indices))
    return [Ranking(*(torch.cat(column) for column in zip(*part, strict=True))) for part in parts]


def _candidates(sequences: Sequences, rule: str) -> torch.Tensor:
    """Which items may be ranked: (num_items + 1,) bool."""
    if rule == "rated":
        return sequences.counts(torch.zeros_like(sequences.offsets[1:])) > 0
    candidate = torch.ones(sequences.num_items + 1, dtype=torch.bool, device=sequences.item.device)
    candidate[0] = False
    return candidate


def _seen(sequences: Sequences, batch: Batch, drop: torch.Tensor, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The seen items that are left out, as (place of the user in the batch, item)."""
    if rule == "history":
        return sequences.histories(batch.user, drop)
    places = torch.arange(len(batch.user), device=batch.user.device)
    return torch.repeat_interleave(places, batch.offsets.diff()), batch.item

"""The exact rank of every held-out item among all candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from steps.common.cli import StepError
from steps.data.holdout import Questions
from steps.data.sequences import Sequences, Size
from steps.models import Model

#: A GPU is filled by so many users at once, or by so many scores, 1 GB in float32.
_USERS_AT_ONCE = 1024
_SCORES_AT_ONCE = 2**28


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


class Ranker:
    """Questions about a data set, to be asked of a model as often as one likes.

    What the host has to know of them it finds out beforehand, so that `ask` does not wait for the device.
    """

    def __init__(
        self,
        sequences: Sequences,
        questions: Questions,
        rules: Sequence[Rules],
        max_len: int,
        batch_size: int,
        top: int = 0,
    ) -> None:
        self.sequences, self.rules, self.max_len, self.top = sequences, rules, max_len, top
        if sequences.item.device.type == "cuda":
            batch_size = max(batch_size, min(_USERS_AT_ONCE, _SCORES_AT_ONCE // (sequences.num_items + 1)))
        self._candidates = {rule: _candidates(sequences, rule) for rule in {rule.candidates for rule in rules}}
        users, drop = questions.users.split(batch_size), questions.drop.split(batch_size)
        self._batches = list(zip(users, drop, _sizes(sequences, questions, max_len, batch_size), strict=True))

    @torch.inference_mode()
    def ask(self, model: Model) -> tuple[torch.Tensor, list[Ranking]]:
        """Whether every score was finite, (), and the answers under each of the rules, from one scoring.

        A rank is 1 + the candidates that score higher than the target, ties counted half. The target is always a
        candidate. Leaves the model in evaluation mode.
        """
        model.eval()
        parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.rules]
        finite = torch.ones((), dtype=torch.bool, device=self.sequences.item.device)
        for users, drop, (size, history) in self._batches:
            batch = self.sequences.batch(users, drop, self.max_len, size)
            target = batch.next_item[batch.last][:, None]
            scores = model.score(batch)
            finite &= torch.isfinite(scores).all()
            own = scores.gather(1, target)
            for rule, part in zip(self.rules, parts, strict=True):
                left_out = ~self._candidates[rule.candidates].expand_as(scores)
                row, item = (
                    self.sequences.histories(users, drop, history)
                    if rule.exclude == "history"
                    else (batch.row, batch.item)
                )
                left_out.view(-1).index_fill_(0, row * scores.shape[1] + item, True)
                left_out.scatter_(1, target, False)
                ranked = scores.masked_fill(left_out, -torch.inf)
                ahead = (ranked > own).sum(1) + 0.5 * ((ranked == own).sum(1) - 1)  # the target ties with itself
                part.append((1 + ahead, _best(ranked, self.top)))
        return finite, [Ranking(*(torch.cat(column) for column in zip(*part, strict=True))) for part in parts]


def _best(ranked: torch.Tensor, count: int) -> torch.Tensor:
    """The items (K, count) with the highest scores, best first; 0 where there are fewer candidates."""
    values, items = ranked.topk(min(count, ranked.shape[1]), dim=1)
    return F.pad(items.masked_fill(values == -torch.inf, 0), (0, count - items.shape[1]))


def rank(
    model: Model,
    sequences: Sequences,
    questions: Questions,
    rules: Sequence[Rules],
    max_len: int,
    batch_size: int,
    top: int = 0,
) -> list[Ranking]:
    """Answer every question once, as `Ranker.ask` does; raises StepError if a score is not finite."""
    finite, rankings = Ranker(sequences, questions, rules, max_len, batch_size, top).ask(model)
    require_finite(bool(finite))
    return rankings


def require_finite(finite: bool) -> None:
    """Raise StepError if scores are not."""
    if not finite:
        raise StepError("scores are not finite: training diverged; lower the learning rate")


def _sizes(sequences: Sequences, questions: Questions, max_len: int, batch_size: int) -> list[tuple[Size, int]]:
    """Of every batch of questions, what the host must know: its size, and that of its users' whole histories."""
    lengths = sequences.window_lengths(questions.users, questions.drop, max_len).cpu()
    whole = sequences.window_lengths(questions.users, questions.drop, len(sequences.item)).cpu()
    parts = zip(lengths.split(batch_size), whole.split(batch_size), strict=True)
    return [(Size(int(part.sum()), int(part.max())), int(histories.sum())) for part, histories in parts]


def _candidates(sequences: Sequences, rule: str) -> torch.Tensor:
    """Which items may be ranked: (num_items + 1,) bool."""
    if rule == "rated":
        return sequences.counts(torch.zeros_like(sequences.offsets[1:])) > 0
    candidate = torch.ones(sequences.num_items + 1, dtype=torch.bool, device=sequences.item.device)
    candidate[0] = False
    return candidate

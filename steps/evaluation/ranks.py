"""The exact rank of every held-out item among all candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from steps.common.cli import StepError
from steps.common.top import top_items
from steps.data.sequences import Sequences, Size
from steps.data.split import Questions
from steps.evaluation.metrics import Ranks
from steps.models import Model

#: A GPU is filled by so many users at once, or by so many scores, 1 GB in float32.
_USERS_AT_ONCE = 1024
_SCORES_AT_ONCE = 2**28


@dataclass(frozen=True)
class Rules:
    """What is ranked: `candidates` catalogue or rated, without the seen items of the window or the whole history.

    exclude: window, history, or nothing, where seen items are ranked as all others.
    """

    candidates: str
    exclude: str

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Rules":
        """The rules of a run's config.json: its protocol's, unless its data set's seen items may come again."""
        return cls(config["protocol"]["candidates"], exclusions(config, (config["protocol"]["exclude"],))[0])


def exclusions(config: dict[str, Any], otherwise: Sequence[str]) -> Sequence[str]:
    """What may be left out of a run's ranking: nothing where its data set recommends repeats, else `otherwise`."""
    return ("nothing",) if config["repeats"] == "recommend" else otherwise


@dataclass(frozen=True)
class Ranking:
    """ranks (K,) of the targets; top (K, k) int64, the k items recommended first, of equal scores the smallest id."""

    ranks: Ranks
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

        A target among the seen items that are left out is left out too: a miss, as otherwise it alone would be ranked
        of all that is seen. Leaves the model in evaluation mode.
        """
        model.eval()
        parts: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = [[] for _ in self.rules]
        finite = torch.ones((), dtype=torch.bool, device=self.sequences.item.device)
        for users, drop, (size, history) in self._batches:
            batch = self.sequences.batch(users, drop, self.max_len, size)
            target = batch.next_item[batch.last][:, None]
            scores = model.score(batch)
            finite &= torch.isfinite(scores).all()
            own = scores.gather(1, target)
            for rule, part in zip(self.rules, parts, strict=True):
                left_out = ~self._candidates[rule.candidates].expand_as(scores)
                if rule.exclude != "nothing":
                    row, item = (
                        self.sequences.histories(users, drop, history)
                        if rule.exclude == "history"
                        else (batch.row, batch.item)
                    )
                    left_out.view(-1).index_fill_(0, row * scores.shape[1] + item, True)
                ranked = scores.masked_fill(left_out, -torch.inf)
                is_ranked = ~left_out.gather(1, target)[:, 0]
                best = (1 + (ranked > own).sum(1)) * is_ranked
                ties = ((ranked == own).sum(1) - 1) * is_ranked  # the target ties with itself
                part.append((best, ties, _best(ranked, self.top)))
        answers = [[torch.cat(column) for column in zip(*part, strict=True)] for part in parts]
        return finite, [Ranking(Ranks(best, ties), top) for best, ties, top in answers]


def _best(ranked: torch.Tensor, count: int) -> torch.Tensor:
    """The items (K, count) with the highest scores, best first; 0 where there are fewer candidates."""
    if not count:
        return ranked.new_zeros(len(ranked), 0, dtype=torch.int64)
    ranked = ranked.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    items = top_items(ranked, min(count, ranked.shape[1]))
    items = items.masked_fill(ranked.gather(1, items) == -torch.inf, 0)
    return F.pad(items, (0, count - items.shape[1]))


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

"""The exact rank of every held-out item among all candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from steps.common.cli import StepError
from steps.common.processes import ALONE, Processes
from steps.common.top import top_items
from steps.data.sequences import Batch, Sequences, Size
from steps.data.split import HeldOut
from steps.evaluation.metrics import Ranks
from steps.evaluation.sharded_ranks import BatchRanks, is_sharded, states_of

#: The largest batch on a GPU, in users and in scores; so many scores take 1 GB in float32.
_USERS_AT_ONCE = 1024
_SCORES_AT_ONCE = 2**28


class Scorer(Protocol):
    """What is evaluated: a module that scores every item for the last position of each window."""

    def eval(self) -> Any:
        """Leave training mode."""

    def score(self, batch: Batch) -> torch.Tensor:
        """Scores (B, num_items + 1); column 0 means nothing."""
        ...


@dataclass(frozen=True)
class Rules:
    """What is ranked. candidates: catalogue (all items) or rated (those with an interaction).

    exclude: which seen items are excluded from the ranking: those of the window, those of the whole history, or
    nothing.
    """

    candidates: str
    exclude: str

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Rules":
        """The rules of a run's config.json: its protocol's; if its data recommends repeats, nothing is excluded."""
        return cls(config["protocol"]["candidates"], exclusions(config, (config["protocol"]["exclude"],))[0])


def exclusions(config: dict[str, Any], otherwise: Sequence[str]) -> Sequence[str]:
    """The values of `exclude` for a run: nothing where its data set recommends repeats, else `otherwise`."""
    return ("nothing",) if config["repeats"] == "recommend" else otherwise


@dataclass(frozen=True)
class Ranking:
    """ranks (K,) of the targets; top (K, k) int64, the k best items, of equal scores the smallest id first."""

    ranks: Ranks
    top: torch.Tensor


class Ranker:
    """Ranks the held-out targets of a data set with a model, as often as it is called.

    What the host has to know of the data is computed beforehand, so that `rank` does not wait for the device.
    Several processes take the batches in turn, the same ones as one process, and each gets the ranks of all.
    """

    def __init__(
        self,
        sequences: Sequences,
        held_out: HeldOut,
        rules: Sequence[Rules],
        max_len: int,
        batch_size: int,
        top: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        self.processes, self.num_targets = processes, len(held_out.users)
        self.sequences, self.rules, self.max_len, self.top = sequences, rules, max_len, top
        self._num_rows = sequences.num_items + 1
        if sequences.item.device.type == "cuda":
            batch_size = max(batch_size, min(_USERS_AT_ONCE, _SCORES_AT_ONCE // (sequences.num_items + 1)))
        self._candidates = {rule: candidates(sequences, rule) for rule in {rule.candidates for rule in rules}}
        users, num_after = held_out.users.split(batch_size), held_out.num_after.split(batch_size)
        sizes = _sizes(sequences, held_out, max_len, batch_size)
        self._every = list(zip(users, num_after, sizes, strict=True))
        self._batches = self._every[processes.rank :: processes.size]
        targets = torch.arange(self.num_targets, device=sequences.item.device).split(batch_size)
        self._own = torch.cat([*targets[processes.rank :: processes.size], targets[0][:0]])

    @torch.inference_mode()
    def rank(self, model: Scorer) -> tuple[torch.Tensor, list[Ranking]]:
        """Whether every score was finite, (), and the ranking under each of the rules, from the same scores.

        A target that is among the excluded seen items is excluded too, and is a miss: otherwise it would be the only
        seen item in the ranking. Leaves the model in evaluation mode.
        """
        model.eval()
        if is_sharded(model):
            return self._rank_sharded(model)
        parts: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = [[] for _ in self.rules]
        finite = torch.ones((), dtype=torch.bool, device=self.sequences.item.device)
        for users, num_after, (size, history_size) in self._batches:
            batch = self.sequences.batch(users, num_after, self.max_len, size)
            target = batch.next_item[batch.last][:, None]
            scores = model.score(batch)
            finite &= torch.isfinite(scores).all()
            target_score = scores.gather(1, target)
            for rule, part in zip(self.rules, parts, strict=True):
                excluded = ~self._candidates[rule.candidates].expand_as(scores)
                if rule.exclude != "nothing":
                    user, item = (
                        self.sequences.histories(users, num_after, history_size)
                        if rule.exclude == "history"
                        else (batch.sequence_id, batch.item)
                    )
                    excluded.view(-1).index_fill_(0, user * scores.shape[1] + item, True)
                ranked = scores.masked_fill(excluded, -torch.inf)
                is_ranked = ~excluded.gather(1, target)[:, 0]
                best = (1 + (ranked > target_score).sum(1)) * is_ranked
                ties = ((ranked == target_score).sum(1) - 1) * is_ranked  # the target ties with itself
                part.append((best, ties, best_items(ranked, self.top)))
        if self.processes.size > 1:
            return self._of_all(finite, parts)
        rankings = [[torch.cat(column) for column in zip(*part, strict=True)] for part in parts]
        return finite, [Ranking(Ranks(best, ties), top) for best, ties, top in rankings]

    def _rank_sharded(self, model: Any) -> tuple[torch.Tensor, list[Ranking]]:
        """What `rank` returns, of a model of which each process has but its rows of the item vectors."""
        found: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in self.rules]
        wrong = torch.zeros((), dtype=torch.int64, device=self.sequences.item.device)
        for start in range(0, len(self._every), self.processes.size):
            group = self._every[start : start + self.processes.size]
            batches = [self.sequences.batch(users, after, self.max_len, size) for users, after, (size, _) in group]
            states = states_of(model, batches, self.processes)
            for (users, num_after, (_, history_size)), batch, last in zip(group, batches, states, strict=True):
                ranks = BatchRanks(model, last, batch.next_item[batch.last], self._num_rows, self.processes)
                wrong += ~ranks.finite
                for rule, part in zip(self.rules, found, strict=True):
                    seen = batch.item[:0], batch.item[:0]
                    if rule.exclude == "history":
                        seen = self.sequences.histories(users, num_after, history_size)
                    elif rule.exclude != "nothing":
                        seen = batch.sequence_id, batch.item
                    part.append(ranks.under(self._candidates[rule.candidates], *seen, self.top))
        self.processes.sum_(wrong)
        columns = [[torch.cat(column) for column in zip(*part, strict=True)] for part in found]
        return wrong == 0, [Ranking(Ranks(best, ties), top) for best, ties, top in columns]

    def _of_all(
        self, finite: torch.Tensor, parts: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]
    ) -> tuple[torch.Tensor, list[Ranking]]:
        """What `rank` returns, of the targets of all processes, from this one's batches."""
        whole = self._own.new_zeros(len(parts), self.num_targets, 2 + self.top)
        for rows, part in zip(whole, parts, strict=True):
            own = [torch.cat([best[:, None], ties[:, None], top], dim=1) for best, ties, top in part]
            rows[self._own] = torch.cat([*own, rows[:0]])
        wrong = (~finite).long()
        for tensor in (whole, wrong):
            self.processes.sum_(tensor)
        return wrong == 0, [Ranking(Ranks(rows[:, 0], rows[:, 1]), rows[:, 2:]) for rows in whole]


def best_items(ranked: torch.Tensor, count: int) -> torch.Tensor:
    """The items (K, count) with the highest scores, best first; 0 where there are fewer candidates."""
    if not count:
        return ranked.new_zeros(len(ranked), 0, dtype=torch.int64)
    ranked = ranked.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    items = top_items(ranked, min(count, ranked.shape[1]))
    items = items.masked_fill(ranked.gather(1, items) == -torch.inf, 0)
    return F.pad(items, (0, count - items.shape[1]))


def rank(
    model: Scorer,
    sequences: Sequences,
    held_out: HeldOut,
    rules: Sequence[Rules],
    max_len: int,
    batch_size: int,
    top: int = 0,
    processes: Processes = ALONE,
) -> list[Ranking]:
    """Rank every held-out target once, as `Ranker.rank` does; raises StepError if a score is not finite."""
    finite, rankings = Ranker(sequences, held_out, rules, max_len, batch_size, top, processes).rank(model)
    require_finite(bool(finite))
    return rankings


def require_finite(finite: bool) -> None:
    """Raise StepError if scores are not finite."""
    if not finite:
        raise StepError("scores are not finite: training diverged; lower the learning rate")


def _sizes(sequences: Sequences, held_out: HeldOut, max_len: int, batch_size: int) -> list[tuple[Size, int]]:
    """What the host has to know of every batch: its size, and the number of items in its users' whole histories."""
    lengths = sequences.window_lengths(held_out.users, held_out.num_after, max_len).cpu()
    whole = sequences.window_lengths(held_out.users, held_out.num_after, len(sequences.item)).cpu()
    parts = zip(lengths.split(batch_size), whole.split(batch_size), strict=True)
    return [(Size(int(part.sum()), int(part.max())), int(histories.sum())) for part, histories in parts]


def candidates(sequences: Sequences, rule: str) -> torch.Tensor:
    """Which items may be ranked: (num_items + 1,) bool."""
    if rule == "rated":
        return sequences.counts(torch.zeros_like(sequences.offsets[1:])) > 0
    candidate = torch.ones(sequences.num_items + 1, dtype=torch.bool, device=sequences.item.device)
    candidate[0] = False
    return candidate

"""Exact ranks where each of several processes has the vectors of its own items alone.

Processes take batches in turn to encode, as each alone would, and all score every batch, each its own items. What a
target's rank needs of others is its score, which is a sum over the processes of which one has a part, and how many
score higher: a sum too. The best items of all are the best of each process's best.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from steps.common.processes import Processes
from steps.common.top import top_items
from steps.data.sequences import Batch

#: Items that are scored at once. Of a catalogue with no more the product has the shape that one process's has, with
#: zeros for what others have: its scores are the same to the bit.
ITEMS_AT_ONCE = 2**20


class ShardedScorer(Protocol):
    """What is evaluated: a module of which each process has the item vectors of `own_rows`."""

    own_rows: range

    def own_vectors(self, item: torch.Tensor) -> torch.Tensor:
        """Vectors (T, d) of items, zeros where another process has them."""
        ...

    def last_states(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The last hidden states (B, d) of windows whose items have these vectors."""
        ...

    def score_rows(self, last: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Scores (B, end - first) of the items from `first` on; of another process's items they mean nothing."""
        ...


def states_of(model: ShardedScorer, batches: Sequence[Batch], processes: Processes) -> list[torch.Tensor]:
    """The last hidden states (B, d) of as many batches as there are processes, or fewer; each process encodes one."""
    found = []
    for number, batch in enumerate(batches):
        vectors = model.own_vectors(batch.item)
        processes.sum_(vectors)
        dtype = torch.promote_types(vectors.dtype, torch.get_default_dtype())
        states = torch.zeros(len(batch.user), vectors.shape[1], dtype=dtype, device=vectors.device)
        if number == processes.rank:
            states += model.last_states(vectors, batch)
        found.append(states)
    for states in found:
        processes.sum_(states)
    return found


class BatchRanks:
    """The ranks of a batch's targets (B,), and its best items. last: (B, d), the same in all processes."""

    def __init__(
        self, model: ShardedScorer, last: torch.Tensor, target: torch.Tensor, num_rows: int, processes: Processes
    ) -> None:
        self.model, self.last, self.target, self.num_rows, self.processes = model, last, target, num_rows, processes
        rows = model.own_rows
        self._is_own = (target >= rows.start) & (target < rows.stop)
        self.target_score = last.new_zeros(len(last))
        finite = torch.ones((), dtype=torch.bool, device=last.device)
        for first, end, scores in self._tiles():
            finite &= scores.isfinite().all()
            here = self._is_own & (target >= first) & (target < end)
            score = scores.gather(1, (target - first).clamp(0, end - first - 1)[:, None])[:, 0]
            self.target_score += torch.where(here, score, 0.0)
        processes.sum_(self.target_score)
        self.finite = finite

    def under(
        self, candidates: torch.Tensor, user: torch.Tensor, item: torch.Tensor, top: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """best (B,), ties (B,) and the top (B, top) of `Ranker.rank`.

        candidates: (V + 1,) bool. user, item: (H,), which items are excluded for which place in the batch.
        """
        rows, sums = self.model.own_rows, torch.zeros(3, len(self.last), dtype=torch.int64, device=self.last.device)
        target_score = self.target_score[:, None]
        values = self.last.new_full((len(self.last), top), -torch.inf)
        items = torch.zeros(len(self.last), top, dtype=torch.int64, device=self.last.device)
        for first, end, scores in self._tiles():
            place = torch.arange(first, end, device=scores.device)
            ranked_here = candidates[first:end] & (place >= rows.start) & (place < rows.stop)
            excluded = ~ranked_here.expand_as(scores)
            inside = (item >= first) & (item < end)
            excluded.view(-1).index_fill_(0, user[inside] * (end - first) + item[inside] - first, True)
            ranked = scores.masked_fill(excluded, -torch.inf)
            here = self._is_own & (self.target >= first) & (self.target < end)
            column = (self.target - first).clamp(0, end - first - 1)[:, None]
            sums[0] += (ranked > target_score).sum(1)
            sums[1] += (ranked == target_score).sum(1)
            sums[2] += here & ~excluded.gather(1, column)[:, 0]
            if top:
                values, items = _merged((values, items), _best(ranked, first, top), top)
        self.processes.sum_(sums)
        above, equal, is_ranked = sums
        if top:
            values, items = self._best_of_all(values, items, top)
        return (1 + above) * is_ranked, (equal - 1) * is_ranked, items.masked_fill(values == -torch.inf, 0)

    def _best_of_all(self, values: torch.Tensor, items: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
        every = [one.new_zeros(self.processes.size, *one.shape) for one in (values, items)]
        for whole, own in zip(every, (values, items), strict=True):
            whole[self.processes.rank] = own
            self.processes.sum_(whole)
        best = every[0][0], every[1][0]
        for other in zip(every[0][1:], every[1][1:], strict=True):
            best = _merged(best, other, top)
        return best

    def _tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """First item, end, and scores, of the stretches that this process has items of. They are the same stretches
        whatever the number of processes, so that scores do not depend on it."""
        rows = self.model.own_rows
        for first in range(rows.start // ITEMS_AT_ONCE * ITEMS_AT_ONCE, rows.stop, ITEMS_AT_ONCE):
            end = min(self.num_rows, first + ITEMS_AT_ONCE)
            if end > rows.start:
                yield first, end, self.model.score_rows(self.last, first, end)


_Best = tuple[torch.Tensor, torch.Tensor]


def _best(ranked: torch.Tensor, first: int, top: int) -> _Best:
    """Scores and ids (B, at most top) of the best of the items from `first` on."""
    ranked = ranked.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    places = top_items(ranked, min(top, ranked.shape[1]))
    return ranked.gather(1, places), places + first


def _merged(one: _Best, other: _Best, top: int) -> _Best:
    """The best of both, of equal scores the smallest id first."""
    values, items = (torch.cat(pair, dim=1) for pair in zip(one, other, strict=True))
    by_id = items.argsort(dim=1, stable=True)
    values, items = values.gather(1, by_id), items.gather(1, by_id)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :top]
    return values.gather(1, order), items.gather(1, order)


def is_sharded(model: Any) -> bool:
    """Whether this process has but its own rows of the model's item vectors."""
    return bool(getattr(model, "is_sharded", False))

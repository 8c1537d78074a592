"""A trained HSTU that ranks, over users' histories that are kept: M-FALCON for candidates of a request.

Logits are those of the training path, in which a window holds history and candidate, up to rounding.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from kernels.jagged import offsets_from_lengths
from steps.models.base import embedding_lookup
from steps.models.history_cache import HistoryCache
from steps.models.hstu import HSTU
from steps.tasks.ranking import Ranking


class CandidateRanker:
    """Scores candidates of users, whose interactions were given before. A user is a whole number."""

    def __init__(self, task: Ranking, page: int = 64) -> None:
        """task: in eval mode, with the weights that it keeps. Raises ValueError if its encoder cannot be cached."""
        if not isinstance(task.encoder, HSTU):
            raise ValueError(f"histories are kept of HSTU alone, and this is a {type(task.encoder).__name__}")
        if task.user_features is not None:
            raise ValueError("histories are kept without features, and this model reads them: take a row without")
        self.task, self.cache = task, HistoryCache(task.encoder, page)
        self._before: dict[int, torch.Tensor] = {}  # (1, d), what stands before a user's next item
        self._interleaved = task.config.tokens == "interleaved"

    @torch.no_grad()
    def append(
        self,
        users: Sequence[int],
        items: torch.Tensor,
        ratings: torch.Tensor,
        timestamps: torch.Tensor,
        offsets: torch.Tensor,
    ) -> None:
        """Let the histories of `users` (B), who are different, go on.

        items, timestamps: (T,) int64, and ratings: (T,), jagged over the users by `offsets` (B + 1,) int64. Raises
        ValueError if a history gets longer than the model reads.
        """
        if not users:
            return
        bounds = list(pairwise(offsets.tolist()))
        is_first = torch.zeros_like(items, dtype=torch.bool)
        for user, (start, end) in zip(users, bounds, strict=True):
            is_first[start:end][:1] = user not in self._before
        embeddings = embedding_lookup(self.task.items, items)
        before = self.task.before(items, ratings, is_first)
        rows, times, last = [], [], dict(self._before)
        for user, (start, end) in zip(users, bounds, strict=True):
            own, time = embeddings[start:end], timestamps[start:end]
            if start == end:
                rows.append(own)
            elif self._interleaved:  # item, action, item, action; the first item is part of its action's token
                rows.append(torch.stack([own, before[start:end]], dim=1).flatten(0, 1))
                time = time.repeat_interleave(2)
            else:
                known = [last[user]] if user in last else [torch.zeros_like(own[:1])]
                rows.append(own + torch.cat([*known, before[start : end - 1]]))
            skip = int(start < end and user not in last)
            rows[-1], time = rows[-1][skip:], time[skip:]
            times.append(time)
            if start < end:
                last[user] = before[end - 1 : end].clone()
        lengths = torch.tensor([len(row) for row in rows])
        self.cache.append(users, torch.cat(rows), torch.cat(times), offsets_from_lengths(lengths))
        self._before = last

    @torch.no_grad()
    def score(
        self,
        users: Sequence[int],
        candidates: torch.Tensor,
        offsets: torch.Tensor,
        time: torch.Tensor,
        micro_batch: int = 1024,
    ) -> torch.Tensor:
        """Logits (T,) float32 of engagement with the candidates, items (T,) int64, jagged over the users by `offsets`.

        time: (B,) int64 seconds, of each user's request. Raises ValueError for a user without any interaction, and as
        `HistoryCache.encode`.
        """
        for user in users:
            if user not in self._before:
                raise ValueError(f"user {user} has no history: append at least one interaction first")
        embeddings = embedding_lookup(self.task.items, candidates)
        if not self._interleaved:
            before = torch.cat([self._before[user] for user in users])
            embeddings = embeddings + before.repeat_interleave(offsets.diff().to(before.device), dim=0)
        states = self.cache.encode(users, embeddings, offsets, time, micro_batch)
        logits: torch.Tensor = self.task.head(states)[:, self.task.positive]
        return logits.float()

"""A trained HSTU that ranks, over users' histories that are kept: M-FALCON for candidates of a request.

Logits are those of the training path, in which a window holds history and candidate, up to rounding.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from kernels.jagged import offsets_from_lengths
from steps.common.cli import StepError
from steps.models.arguments import jagged_counts, require_tensor, user_names
from steps.models.features import FeatureEmbeddings
from steps.models.history_cache import HistoryCache
from steps.models.hstu import HSTU
from steps.serving.trained import TrainedRun, open_run
from steps.tasks.ranking import Ranking


class CandidateRanker:
    """Scores candidates of users, whose interactions were given before. A user is a whole number that fits 64 bits.

    Tensors are on the model's device, `offsets` on any. A call that is refused changes nothing.
    """

    def __init__(self, task: Ranking, page: int = 64, item_features: Mapping[str, torch.Tensor] | None = None) -> None:
        """task: in eval mode, with the weights that it keeps. item_features: by name as in `Sequences`, a row for each
        item behind one of padding, of a model that reads features.

        Raises ValueError if its encoder cannot be cached, or if features are missing.
        """
        if not isinstance(task.encoder, HSTU):
            raise ValueError(f"histories are kept of HSTU alone, and this is a {type(task.encoder).__name__}")
        self._item_features = dict(item_features or {})
        if task.item_features is not None:
            _require_features(task.item_features, self._item_features, "item_features", task.num_items + 1)
        self.task, self.cache = task, HistoryCache(task.encoder, page)
        self._before: dict[int, torch.Tensor] = {}  # (1, d), what stands before a user's next item
        self._latest: dict[int, int] = {}  # the time of a user's last interaction
        self._interleaved = task.config.tokens == "interleaved"

    @classmethod
    def from_run(cls, run: Path | str, data: Path | str, device: str = "cpu") -> "CandidateRanker":
        """What a run of a row of HSTU with `task: ranking` was trained to, in the precision of its training.

        run: runs/<experiment>/<dataset>/<model>/<protocol>/seed-N; data: its data/processed/<dataset>. Raises StepError
        that names the file if the run is not trained, the data are others, the weights are not there, or its row is not
        one that histories are kept of; and if the device is not there.
        """
        return cls.of(open_run(run, data, device))

    @classmethod
    def of(cls, trained: TrainedRun) -> "CandidateRanker":
        """The same, of a run that is open. Raises StepError as `from_run`."""
        task, file = trained.model(), trained.folder / "config.json"
        if not isinstance(task, Ranking):
            said = "no row of HSTU with `task: ranking`, and histories are kept of these alone"
            raise StepError(f"{file}: {trained.config['row']} is {said}; take the run of another row")
        try:
            return cls(task, item_features=trained.sequences.item_features)
        except ValueError as error:
            raise StepError(f"{file}, row {trained.config['row']}: {error}") from error

    @torch.no_grad()
    def append(
        self,
        users: Sequence[int],
        items: torch.Tensor,
        ratings: torch.Tensor,
        timestamps: torch.Tensor,
        offsets: torch.Tensor,
        user_features: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Let the histories of `users` (B), who are different, go on.

        items, timestamps: (T,) int64, and ratings: (T,), jagged over the users by `offsets` (B + 1,) int64, each user's
        in the order of time. user_features: by name as in `Sequences`, of B rows, of a model that reads them; they are
        read at a user's first interaction, and not wanted where all users have one.

        Raises ValueError, and keeps what was there, if a history gets longer than the model reads, for an item that the
        catalogue lacks, a rating that is no number, an earlier time than the user's interaction before, and a new
        user's feature that is missing or has a value that the model does not know; for other shapes, types or devices.
        """
        users = user_names(users)
        if not users:
            return
        self._require_tensors("interaction", items=items, ratings=ratings, timestamps=timestamps)
        require_tensor("offsets", offsets, (len(users) + 1,), torch.int64, "one more than the users")
        counts = [len(items), len(ratings), len(timestamps), int(offsets[-1])]
        if len(set(counts)) > 1:
            raise ValueError(
                f"there are {counts[0]} items, {counts[1]} ratings, {counts[2]} timestamps, and offsets end at "
                f"{counts[3]}: give one of each for every interaction"
            )
        jagged_counts(offsets, len(users), len(items), "interactions")
        bounds = list(pairwise(offsets.tolist()))
        self._require_items(users, items, offsets)
        _require(
            users,
            offsets,
            ratings.isfinite(),
            lambda at: f"the rating of item {int(items[at])} is {float(ratings[at])}: leave out what is not rated",
        )
        latest = self._checked_times(users, timestamps, offsets)
        is_first = torch.zeros_like(items, dtype=torch.bool)
        for user, (start, end) in zip(users, bounds, strict=True):
            is_first[start:end][:1] = user not in self._before
        features = self._features_of(items)
        embeddings = self.task.embed_items(items, features)
        before = self.task.before(items, ratings, is_first, features, self._users_of(users, offsets, user_features))
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
        self._before, self._latest = last, latest

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

        time: (B,) int64 seconds, of each user's request. Raises ValueError for a user without any interaction, a
        request before the user's last interaction, a candidate that the catalogue lacks, and as `HistoryCache.encode`.
        """
        users = user_names(users)
        self._require_tensors("candidate", candidates=candidates)
        self._require_tensors("user", time=time)
        jagged_counts(offsets, len(users), len(candidates), "candidates")
        for user in users:
            if user not in self._before:
                raise ValueError(f"user {user} has no history: append at least one interaction first")
        for user, asked in zip(users, time.tolist(), strict=False):  # `encode` refuses another number
            if asked < self._latest[user]:
                raise ValueError(
                    f"user {user}: the request's time {asked} is before the last interaction's, {self._latest[user]}: "
                    "ask for that time or later, as histories are kept up to their last interaction alone"
                )
        self._require_items(users, candidates, offsets)
        embeddings = self.task.embed_items(candidates, self._features_of(candidates))
        if users and not self._interleaved:
            before = torch.cat([self._before[user] for user in users])
            embeddings = embeddings + before.repeat_interleave(offsets.diff().to(before.device), dim=0)
        states = self.cache.encode(users, embeddings, offsets, time, micro_batch)
        logits: torch.Tensor = self.task.head(states)[:, self.task.positive]
        return logits.float()

    def evict(self, users: Sequence[int]) -> None:
        """Forget these users' histories. Raises ValueError, and forgets nobody, if one was never appended."""
        users = user_names(users)
        self.cache.evict(users)
        for user in users:
            self._before.pop(user, None)
            self._latest.pop(user, None)

    def _require_tensors(self, one: str, **tensors: torch.Tensor) -> None:
        """Raise ValueError unless these are (T,) int64, ratings of any type, on the model's device."""
        for name, given in tensors.items():
            dtype = None if name == "ratings" else torch.int64
            require_tensor(name, given, ("T",), dtype, f"one for every {one}", self.task.items.weight.device)

    def _features_of(self, items: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: values[items] for name, values in self._item_features.items()}

    def _users_of(
        self, users: Sequence[int], offsets: torch.Tensor, features: Mapping[str, torch.Tensor] | None
    ) -> torch.Tensor | None:
        """What each interaction's user adds to a first one (T, d); None where none is first, or nothing is added."""
        counts = offsets.diff()
        begins = torch.tensor([user not in self._before for user in users]) & (counts.cpu() > 0)
        if self.task.user_features is None or not bool(begins.any()):
            return None
        _require_features(self.task.user_features, features or {}, "user_features", len(users))
        new, given = torch.nonzero(begins)[:, 0], {}
        for name, values in (features or {}).items():
            given[name] = values[new.to(values.device)]
            most = self.task.user_features.sizes.get(name, 0)
            if values.dim() == 1 and most:
                for place in torch.nonzero((given[name] < 1) | (given[name] > most))[:1, 0].tolist():
                    raise ValueError(
                        f"user {users[int(new[place])]}: {name} is {int(given[name][place])}, of which the model knows "
                        f"1 to {most} alone"
                    )
        found = self.task.embed_users(given, len(new))
        place = torch.zeros(len(users), dtype=torch.int64).index_copy(0, new, torch.arange(len(new)))
        return found[place.repeat_interleave(counts.cpu()).to(found.device)]  # of known users any, which is not read

    def _require_items(self, users: Sequence[int], items: torch.Tensor, offsets: torch.Tensor) -> None:
        most = self.task.num_items
        _require(
            users,
            offsets,
            (items >= 1) & (items <= most),
            lambda at: f"item {int(items[at])} is not in the catalogue: give items from 1 to {most}",
        )

    def _checked_times(self, users: Sequence[int], timestamps: torch.Tensor, offsets: torch.Tensor) -> dict[int, int]:
        """The last time of every user once these are appended. Raises ValueError if one is before another."""
        time, latest = timestamps.cpu(), dict(self._latest)
        before = torch.cat([time[:1], time[:-1]])
        for user, (start, end) in zip(users, pairwise(offsets.tolist()), strict=True):
            if start < end:
                before[start] = latest.get(user, int(time[start]))
                latest[user] = int(time[end - 1])
        _require(
            users,
            offsets,
            time >= before,
            lambda at: (
                f"an interaction at {int(time[at])} follows one at {int(before[at])}: append them in the order "
                "of time, later than what was appended before, or at the same time"
            ),
        )
        return latest


def _require_features(known: FeatureEmbeddings, given: Mapping[str, torch.Tensor], what: str, count: int) -> None:
    """Raise ValueError unless `given` has `count` rows of every feature that is known."""
    for name in known.names:
        values = known.sizes[name]
        if name not in given:
            raise ValueError(f"{what}: {name} is missing; this model reads {', '.join(known.names)}")
        shape = tuple(given[name].shape)
        if shape not in ((count,), (count, values)):
            raise ValueError(f"{what}: {name} has the shape {shape}, which should be ({count},) or ({count}, {values})")


def _require(users: Sequence[int], offsets: torch.Tensor, right: torch.Tensor, say: Callable[[int], str]) -> None:
    """Raise ValueError, with what `say` says of its place, for the first that is not `right` (T,) bool."""
    for place in torch.nonzero(~right)[:1, 0].tolist():
        raise ValueError(f"user {users[bisect_right(offsets.tolist(), place) - 1]}: {say(place)}")

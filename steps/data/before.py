"""What was known of an item or a user before a moment: how often it was rated and engaged with, and its mean rating.

Only interactions of a strictly earlier time count: those of one time do not see each other, and none sees itself or the
future. Where the protocol splits by time they count whoever's they are. Where it splits by users, time does not tell
what is held out: items and all are then known by the training users' rows, and users by their own, but for targets.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from kernels.jagged.naive import sequence_and_position
from steps.data.sequences import Sequences
from steps.data.split import split_sequences

#: So many ratings at the mean of all are added to an item's or a user's own, so that a few do not say much.
SHRINKAGE = 10
#: Sums are of whole numbers, as a GPU adds floating-point numbers in any order: ratings in steps of this.
_STEP = 2.0**-16


class Known(NamedTuple):
    """Of each query (K,) float32: the number of ratings before, that of engagements, and how far the mean rating was
    from the mean of all ratings before, both with `SHRINKAGE`; 0 where there were none."""

    ratings: torch.Tensor
    engagements: torch.Tensor
    deviation: torch.Tensor


class Before:
    """Answers for items and users as of any time, by binary search, without waiting for the device.

    positive: the least rating that is an engagement. of_items, of_users (T,) bool: which interactions count for their
    item and for all, and which for their user; None: each. A missing rating counts as none. Raises ValueError if the
    data have no ratings, or if ids and times together do not fit 63 bits.
    """

    def __init__(
        self,
        sequences: Sequences,
        positive: float,
        of_items: torch.Tensor | None = None,
        of_users: torch.Tensor | None = None,
    ) -> None:
        if sequences.rating is None:
            raise ValueError("the data set has no ratings, which are counted")
        rated, time = ~sequences.rating.isnan(), sequences.timestamp
        user, _ = sequence_and_position(sequences.offsets, len(time))
        self._first = sequences.timestamp.min()
        #: Times are from 1 to this less 1; earlier and later ones are cut to 0 and to this.
        self._span = sequences.timestamp.max() - self._first + 2
        if int(self._span) * (max(sequences.num_items, sequences.num_users) + 2) >= 2**63:
            raise ValueError("the ids and times are too large to be counted together")
        rating = sequences.rating.double()
        values = torch.stack([(rating / _STEP).round().long(), (sequences.rating >= positive).long()], dim=1)
        seen, own = (rated if rows is None else rated & rows for rows in (of_items, of_users))
        self._all = self._sorted(torch.zeros_like(user)[seen], time[seen], values[seen])
        self._items = self._sorted(sequences.item[seen], time[seen], values[seen])
        self._users = self._sorted(user[own], time[own], values[own])

    def items(self, item: torch.Tensor, time: torch.Tensor) -> Known:
        """What was known of items (K,) before each time (K,)."""
        return self._known(self._items, item, time)

    def users(self, user: torch.Tensor, time: torch.Tensor) -> Known:
        """What was known of users (K,) before each time (K,)."""
        return self._known(self._users, user, time)

    def _sorted(
        self, group: torch.Tensor, time: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (N,) of group and time, rising, and the sums (N + 1, 2) of the values (N, 2) before each of them."""
        key, order = self._key(group, time).sort()
        return key, torch.nn.functional.pad(values[order].cumsum(0), (0, 0, 1, 0))

    def _key(self, group: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        since = torch.minimum((time - self._first + 1).clamp(min=0), self._span)
        return group * (self._span + 1) + since

    def _sums(
        self, table: tuple[torch.Tensor, torch.Tensor], group: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each group before each time: the number of ratings (K,), and the sums (K, 2) of its values, float64."""
        keys, sums = table
        begin = torch.searchsorted(keys, group * (self._span + 1))
        end = torch.searchsorted(keys, self._key(group, time))
        found = (sums[end] - sums[begin]).double()
        return (end - begin).double(), found

    def _known(self, table: tuple[torch.Tensor, torch.Tensor], group: torch.Tensor, time: torch.Tensor) -> Known:
        count, sums = self._sums(table, group, time)
        count_all, sums_all = self._sums(self._all, torch.zeros_like(group), time)
        total, mean = _STEP * sums[:, 0], _STEP * sums_all[:, 0] / count_all.clamp(min=1)
        deviation = (total - count * mean) / (count + SHRINKAGE)
        return Known(count.float(), sums[:, 1].float(), deviation.float())


_KEPT: WeakKeyDictionary[Sequences, dict[tuple[Any, ...], Before]] = WeakKeyDictionary()
_KEYS = ("positive", "split", "report", "test_share", "valid_share", "targets")


def before_of(sequences: Sequences, protocol: dict[str, Any]) -> Before:
    """The one `Before` of sequences under a protocol, which all models on them share: it takes 72 bytes an interaction.

    When it is made, the host waits for the device, since streams of other runs read it too.
    """
    kept, key = _KEPT.setdefault(sequences, {}), tuple(protocol.get(name) for name in _KEYS)
    if key not in kept:
        with torch.inference_mode(False):
            rows = _not_held_out(sequences, protocol) if protocol["split"] == "users" else (None, None)
            kept[key] = Before(sequences, protocol["positive"], *rows)
        if sequences.item.is_cuda:
            torch.cuda.synchronize(sequences.item.device)
    return kept[key]


def _not_held_out(sequences: Sequences, protocol: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which interactions are trained on, and which are no target (T,) bool."""
    split = split_sequences(sequences, protocol)
    user, position = sequence_and_position(sequences.offsets, len(sequences.item))
    trained = position < (sequences.offsets.diff() - split.num_held_out)[user]
    no_target = torch.ones_like(trained)
    for held_out in split.held_out.values():
        no_target[sequences.offsets[held_out.users + 1] - 1 - held_out.num_after] = False
    return trained, no_target

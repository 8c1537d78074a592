"""What was known of an item or a user before a moment: how often it was rated and engaged with, and its mean rating.

Only interactions of a strictly earlier time count, whoever's they are: those of one time do not see each other, and
none sees itself or the future.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from steps.data.sequences import Sequences

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

    positive: the least rating that is an engagement. A missing rating counts as none. Raises ValueError if the data
    have no ratings, or if ids and times together do not fit 63 bits.
    """

    def __init__(self, sequences: Sequences, positive: float) -> None:
        if sequences.rating is None:
            raise ValueError("the data set has no ratings, which are counted")
        rated = ~sequences.rating.isnan()
        time, rating = sequences.timestamp[rated], sequences.rating[rated]
        user = torch.repeat_interleave(
            torch.arange(sequences.num_users, device=time.device), sequences.offsets.diff(), output_size=len(rated)
        )[rated]
        self._first = sequences.timestamp.min()
        #: Times are from 1 to this less 1; earlier and later ones are cut to 0 and to this.
        self._span = sequences.timestamp.max() - self._first + 2
        if int(self._span) * (max(sequences.num_items, sequences.num_users) + 2) >= 2**63:
            raise ValueError("the ids and times are too large to be counted together")
        values = torch.stack([(rating.double() / _STEP).round().long(), (rating >= positive).long()], dim=1)
        self._all = self._sorted(torch.zeros_like(user), time, values)
        self._items = self._sorted(sequences.item[rated], time, values)
        self._users = self._sorted(user, time, values)

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


_KEPT: WeakKeyDictionary[Sequences, dict[float, Before]] = WeakKeyDictionary()


def before_of(sequences: Sequences, positive: float) -> Before:
    """The one `Before` of sequences, which all models on them share: it takes 72 bytes an interaction.

    When it is made, the host waits for the device, since streams of other runs read it too.
    """
    kept = _KEPT.setdefault(sequences, {})
    if positive not in kept:
        with torch.inference_mode(False):
            kept[positive] = Before(sequences, positive)
        if sequences.item.is_cuda:
            torch.cuda.synchronize(sequences.item.device)
    return kept[positive]

"""Sequences with a signal: users who walk through regions of a catalogue.

The items of a region have an order, from popular to rare. A user starts somewhere, in one of a few home regions or in
any, popular ones more often, and walks on to less popular items in small steps. A long pause ends the walk, and the
next one starts at home more often. So the next item tends to follow closely on the last one.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from steps.data.generators.draws import Array, Law, Lengths, below, bits, falling, spread

CHUNK_ROWS = 1 << 18  # what a chunk has on average
_HOMES = 3
_START_PERCENT = 40  # of new walks within a session
_HOME_PERCENT = 50
_HOME_PERCENT_AFTER_PAUSE = 90
_LONGEST_STEP = 24
# The streams of draws; those of the forms are beyond.
_KIND, _GAP, _BEGIN, _WALK, _HOME, _WHICH, _AT_HOME, _REGION, _RANK, _STEP_1, _STEP_2 = range(11)
_AGAIN = 1 << 20  # and the following, for what was drawn before


@dataclass(frozen=True)
class Gaps:
    """Kinds of time between a row and the one before: their weights, and the shortest and longest time of each.

    From kind `session` on the walk ends; the last kind is the long pause. Times count in units of the form's own.
    """

    weights: tuple[int, ...]
    shortest: tuple[int, ...]
    longest: tuple[int, ...]
    session: int


@dataclass(frozen=True)
class Chunk:
    """The rows of some users, in time order: user (from 0), item (from 0, region by region), time from the start."""

    user: Array
    item: Array
    time: Array


@dataclass(frozen=True)
class Walks:
    """`rows` rows of `users` users who have `shortest` to `longest` different items each, and all items occur.

    Regions have about `region_items` items; popularity falls with the square of the rank in a region, from
    `popular_items` on. Times lie within `period` units. Raises ValueError, which names the settings that do not fit.
    """

    seed: int
    rows: int
    users: int
    items: int
    shortest: int
    longest: int
    region_items: int
    popular_items: int
    gaps: Gaps
    period: int

    def __post_init__(self) -> None:
        if self.rows < self.items:
            raise ValueError(f"rows: {self.rows} are too few for {self.items} items")
        if 3 * self.longest > 2 * self.items:
            raise ValueError(f"{self.items} items are too few for users with {self.longest} different ones")
        if (self.chunk_users * self.items).bit_length() > 42:  # the number of a row takes the other bits
            raise ValueError(f"users, items: {self.users} and {self.items} are too many for one chunk's 64-bit keys")
        self._lengths  # noqa: B018  raises where there are none

    @cached_property
    def _lengths(self) -> Lengths:
        return Lengths(self.rows, self.users, self.shortest, self.longest)

    @property
    def chunk_users(self) -> int:
        """The users of a chunk. It changes no row: a draw hangs on the number of its row or user alone."""
        return max(1, CHUNK_ROWS * self.users // self.rows)

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.users // self.chunk_users)

    @cached_property
    def regions(self) -> int:
        """How many regions there are. The first ones have an item more than the last ones."""
        return max(1, self.items // self.region_items)

    def _size(self, region: Array) -> Array:
        return self.items // self.regions + (region < self.items % self.regions)

    def _first(self, region: Array) -> Array:
        return region * (self.items // self.regions) + np.minimum(region, self.items % self.regions)

    def places(self) -> tuple[Array, Array]:
        """The region and the rank in it of every item."""
        regions = np.arange(self.regions)
        region = np.repeat(regions, self._size(regions))
        return region, np.arange(self.items) - self._first(region)

    @cached_property
    def _region_law(self) -> Law:
        popularity = falling(self.regions, 2 + self.regions // 64, 1).cumulative
        return Law.of(np.diff(popularity, prepend=0)[spread(np.arange(self.regions), self.regions)])

    @cached_property
    def _rank_law(self) -> Law:
        return falling(-(-self.items // self.regions), self.popular_items, 2)

    @cached_property
    def _kinds(self) -> Law:
        return Law.of(self.gaps.weights)

    @cached_property
    def _first_rows(self) -> list[int]:
        """The number of rows before each chunk."""
        sums = [int(self._lengths.at(self._users_of(number)).sum()) for number in range(self.chunks)]
        return [0, *np.cumsum(sums).tolist()]

    def _users_of(self, number: int) -> Array:
        return np.arange(number * self.chunk_users, min((number + 1) * self.chunk_users, self.users))

    def chunk(self, number: int) -> Chunk:
        """The rows of chunk `number`, which need no other chunk."""
        users = self._users_of(number)
        lengths = self._lengths.at(users)
        begins = np.cumsum(lengths) - lengths
        user = np.repeat(np.arange(len(users)), lengths)
        first = self._first_rows[number]
        row = np.arange(first, first + len(user))
        kind = self._kinds.draw(bits(self.seed, _KIND, row))
        kind[begins] = len(self.gaps.weights) - 1
        time = self._times(users, user, begins, lengths, kind, row)
        region, rank = self._walk(users[user], kind, row)
        item = self._without_repeats(user, region, rank, row)
        return Chunk(users[user], item, time)

    def _times(self, users: Array, user: Array, begins: Array, lengths: Array, kind: Array, row: Array) -> Array:
        low, high = np.array(self.gaps.shortest), np.array(self.gaps.longest)
        gap = low[kind] + below(bits(self.seed, _GAP, row), (high - low + 1)[kind])
        gap[begins] = 0
        since = np.cumsum(gap)
        since -= since[begins][user]
        taken = since[begins + lengths - 1]
        shrunk = taken // self.period + 1  # for those whom the period is too short
        free = self.period - taken // shrunk
        return below(bits(self.seed, _BEGIN, users), free)[user] + since // shrunk[user]

    def _walk(self, user: Array, kind: Array, row: Array) -> tuple[Array, Array]:
        """The region and the rank of each row, some of which the user may have had before."""
        starts = (kind >= self.gaps.session) | (below(bits(self.seed, _WALK, row), 100) < _START_PERCENT)
        at = np.flatnonzero(starts)
        home = user[at] * _HOMES + below(bits(self.seed, _WHICH, row[at]), _HOMES)
        pause = kind[at] == len(self.gaps.weights) - 1
        chance = np.where(pause, _HOME_PERCENT_AFTER_PAUSE, _HOME_PERCENT)
        region = np.where(
            below(bits(self.seed, _AT_HOME, row[at]), 100) < chance,
            self._region_law.draw(bits(self.seed, _HOME, home)),
            self._region_law.draw(bits(self.seed, _REGION, row[at])),
        )
        rank = self._rank_law.draw(bits(self.seed, _RANK, row[at]))
        steps = [below(bits(self.seed, stream, row), _LONGEST_STEP) for stream in (_STEP_1, _STEP_2)]
        step = 1 + np.minimum(*steps)
        step[at] = 0
        walked = np.cumsum(step)
        of = np.cumsum(starts) - 1
        region, rank = region[of], (rank - walked[at])[of] + walked
        return region, rank % self._size(region)

    def _without_repeats(self, user: Array, region: Array, rank: Array, row: Array) -> Array:
        """The items, where those that a user had before are drawn again, and every item is put somewhere once."""
        item = self._first(region) + rank
        first, last = int(row[0]), int(row[-1]) + 1
        put = np.arange(-(-first * self.items // self.rows), -(-last * self.items // self.rows))
        fixed = np.zeros(len(row), dtype=bool)
        fixed[put * self.rows // self.items - first] = True
        item[fixed] = spread(put, self.items)
        here = np.arange(len(row))
        # A fixed one goes first; then whichever is earlier.
        taken, left = _first_of_each(user * self.items + item, here + np.where(fixed, 0, len(row)))
        left %= len(row)
        again = np.empty(0, dtype=np.uint64)
        tried = 0
        while len(left):
            tried += 1
            left.sort()
            drawn = self._drawn_again(tried, region[left], rank[left], row[left])
            key = user[left] * self.items + drawn
            new = ~(_is_in(key, taken) | _is_in(key, again))
            kept, repeated = _first_of_each(key[new], left[new])
            item[left[new]] = drawn[new]  # also the repeated ones, which are drawn again
            again = np.sort(np.concatenate([again, kept]))
            left = np.concatenate([left[~new], repeated])
        return item

    def _drawn_again(self, tried: int, region: Array, rank: Array, row: Array) -> Array:
        """Items instead of those of the rows: first a little farther on, then any popular one, at last any at all."""
        random = bits(self.seed, _AGAIN + 2 * tried, row)
        other = bits(self.seed, _AGAIN + 2 * tried + 1, row)
        if tried <= 4:
            return self._first(region) + (rank + 1 + below(random, 4 << tried)) % self._size(region)
        if tried <= 8:
            region, rank = self._region_law.draw(random), self._rank_law.draw(other)
            return self._first(region) + rank % self._size(region)
        if tried <= 20:
            region = below(random, self.regions)
            size = self._size(region)
            return self._first(region) + np.minimum(below(other, size), below(other << np.uint64(32), size))
        return below(random, self.items)


def _first_of_each(key: Array, place: Array) -> tuple[Array, Array]:
    """The different keys, sorted, and the places of those that another with a lower place has the key of."""
    width = np.uint64(int(place.max(initial=0)).bit_length())
    packed = np.sort((key.astype(np.uint64) << width) | place.astype(np.uint64))
    keys = packed >> width
    repeated = np.zeros(len(keys), dtype=bool)
    repeated[1:] = keys[1:] == keys[:-1]
    places = packed[repeated] & ((np.uint64(1) << width) - np.uint64(1))
    return keys[~repeated], places.astype(np.int64)


def _is_in(key: Array, known: Array) -> Array:
    """Whether each key is one of the sorted known ones."""
    if not len(known):
        return np.zeros(len(key), dtype=bool)
    wanted = key.astype(np.uint64)
    return known[np.minimum(known.searchsorted(wanted), len(known) - 1)] == wanted

"""A fractal expansion of sequences (Belletti et al., arXiv 1901.08910), for load tests alone: no evaluation.

An incidence matrix of users and items becomes one of `rows` x `columns` blocks. Each block is a copy of it, whose users
and items are rearranged, and of which a part is left: the larger, the more the users of that part of the matrix have of
the items of that part, the matrix itself being resized to `rows` x `columns` for it. So popularity keeps its long tail,
and nobody ever holds the whole: a user's sequence is made alone, from draws by counter. It has no times and no order
that means anything.

Here the matrix is resized by averaging, in whole numbers; the paper resizes its singular vectors.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from steps.data.generators.draws import Array, below, bits

# The streams of draws, by block, and by user and block.
_USER_FACTOR, _USER_SHIFT, _ITEM_FACTOR, _ITEM_SHIFT, _COUNT, _START = range(200, 206)


@dataclass(frozen=True)
class Expansion:
    """A load test's sequences: of `rows` times as many users, and `columns` times as many items.

    offsets: (U + 1,), item: (T,) from 1 to `items`, the sequences that are expanded, no item twice in one. length: the
    mean length wanted; shorter where a block would need more than all of a sequence. Raises ValueError where they do
    not fit.
    """

    offsets: Array
    item: Array
    items: int
    rows: int
    columns: int
    length: float
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, len(self.item), self.length) <= 0:
            raise ValueError("rows, columns and length: must be above 0, and there must be interactions to expand")
        if self.columns * self.items >= 1 << 53 or self.num_users * self.columns >= 1 << 53:
            raise ValueError("rows, columns: the expansion has 2^53 items or pairs of a user and a column, or more")

    @property
    def users(self) -> int:
        """Of the sequences that are expanded."""
        return len(self.offsets) - 1

    @property
    def num_users(self) -> int:
        return self.rows * self.users

    @property
    def num_items(self) -> int:
        return self.columns * self.items

    @cached_property
    def shares(self) -> Array:
        """Which share is left of a block: (rows, columns) float64, of a mean that gives the mean length wanted."""
        group = np.repeat(np.arange(self.users) * self.rows // self.users, np.diff(self.offsets))
        counts = np.bincount(group * self.items + self.item - 1, minlength=self.rows * self.items)
        counts = counts.reshape(self.rows, self.items).astype(np.int64)
        # How many have an item before a column's edge, which may lie within an item: in parts of 1 / columns.
        before = np.pad(counts.cumsum(1), ((0, 0), (1, 0)))
        whole, part = np.divmod(np.arange(self.columns + 1) * self.items, self.columns)
        edges = before[:, whole] * self.columns + part * np.pad(counts, ((0, 0), (0, 1)))[:, whole]
        reduced = np.diff(edges, axis=1)
        wanted = self.length * self.rows * self.users / len(self.item)  # the sum of all shares
        return np.minimum(reduced * (wanted / int(reduced.sum())), 1.0)

    @cached_property
    def _factors(self) -> tuple[Array, Array]:
        """Numbers that rearrange users, and items, when one multiplies by them."""
        users, items = (np.arange(1, number + 1) for number in (self.users, self.items))
        return users[np.gcd(users, self.users) == 1], items[np.gcd(items, self.items) == 1]

    def sequence(self, user: int) -> Array:
        """The items (n,) int64 of a user, of 0 to `num_users` - 1: from 1 to `num_items`, none twice, by column."""
        if not 0 <= user < self.num_users:
            raise ValueError(f"user {user} is none of 0 to {self.num_users - 1}")
        row, place = divmod(user, self.users)
        column = np.arange(self.columns)
        block, pair = row * self.columns + column, user * self.columns + column
        of_users, of_items = self._factors

        def drawn(stream: int, index: Array, number: int) -> Array:
            return below(bits(self.seed, stream, index), number)

        factor = of_users[drawn(_USER_FACTOR, block, len(of_users))]
        source = (factor * place + drawn(_USER_SHIFT, block, self.users)) % self.users
        length = self.offsets[source + 1] - self.offsets[source]
        chance = (bits(self.seed, _COUNT, pair) >> np.uint64(11)) / float(1 << 53)
        count = np.minimum(np.floor(self.shares[row] * length + chance).astype(np.int64), length)
        some = count > 0
        column, block, count, length = column[some], block[some], count[some], length[some]
        first = self.offsets[source[some]]
        start = (bits(self.seed, _START, pair[some]) % length.astype(np.uint64)).astype(np.int64)
        # So many of a sequence, as far apart as can be: each a different one.
        which = np.repeat(np.arange(len(count)), count)
        number = np.arange(len(which)) - (count.cumsum() - count)[which]
        taken = (start[which] + number * length[which] // count[which]) % length[which]
        item = self.item[first[which] + taken] - 1
        factor, shift = of_items[drawn(_ITEM_FACTOR, block, len(of_items))], drawn(_ITEM_SHIFT, block, self.items)
        return 1 + column[which] * self.items + (factor[which] * item + shift[which]) % self.items

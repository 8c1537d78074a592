"""A file in the form of Amazon's ratings of books (2014): `ratings_Books.csv`, no header, ordered by item.

Users walk through a catalogue (`walks.py`); times are whole days. Users come in chunks and the file is ordered by item,
so rows are kept in files of their own in between: memory does not grow with the number of rows.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from steps.data.generators.draws import Array, Law, below, bits
from steps.data.generators.lines import digits, letters, lines, write_archive
from steps.data.generators.walks import CHUNK_ROWS, Gaps, Walks

_DAY = 86400  # seconds
_BEGIN, _END = 9636, 16273  # days since 1970: May 1996, July 2014
_DAY_BITS = 13
_GAPS = Gaps(weights=(45, 25, 24, 6), shortest=(0, 1, 30, 150), longest=(0, 20, 120, 400), session=2)
_RATINGS = np.array([list(b"%d.0" % stars) for stars in range(6)], dtype=np.uint8)
_STARS = Law.of((6, 5, 11, 22, 56))
_WIDTH = 41  # the most bytes of a line
_SHARE_OF_ISBN = (10, 11)  # of the items; the others have Amazon's own numbers
_BUCKET_ROWS = 1 << 19
# The streams of draws, beyond those of the walks.
_NAME, _ISBN, _ASIN, _RATING = range(200, 204)


@dataclass(frozen=True)
class AmazonRatings:
    """The settings of the archive: `rows` ratings of exactly `users` users and `items` items.

    Raises ValueError, which names the settings that do not fit.
    """

    seed: int
    rows: int
    users: int
    items: int

    def __post_init__(self) -> None:
        if self.items.bit_length() + self.users.bit_length() + _DAY_BITS > 63:
            raise ValueError(f"users, items: {self.users} and {self.items} are too many for a row's 64 bits")
        self.walks  # noqa: B018  raises where there are none

    @cached_property
    def walks(self) -> Walks:
        """The sequences, of items in the file's order."""
        return Walks(
            seed=self.seed,
            rows=self.rows,
            users=self.users,
            items=self.items,
            shortest=1,
            longest=max(2, self.items // 54),  # 43,201 of Amazon's 2,330,066
            region_items=1024,
            popular_items=50,
            gaps=_GAPS,
            period=_END - _BEGIN,
        )

    def write(self, path: Path) -> None:
        """Write the archive to `path`, and keep rows in a folder beside it meanwhile."""
        with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
            write_archive(path, [("ratings_Books.csv", self.rows * _WIDTH, self._ratings(Path(folder)))])

    def _ratings(self, folder: Path) -> Iterator[bytes]:
        number = -(-self.rows // _BUCKET_ROWS)
        paths = [folder / str(bucket) for bucket in range(number)]
        bounds = np.arange(1, number) * self.items // number << (self._user_bits + _DAY_BITS)
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            for chunk in range(self.walks.chunks):
                packed = self.part(chunk)
                for file, some in zip(files, np.split(packed, packed.searchsorted(bounds)), strict=True):
                    file.write(some.data)
        for path in paths:
            packed = np.fromfile(path, dtype=np.int64)
            path.unlink()
            packed.sort()
            for first in range(0, len(packed), CHUNK_ROWS):
                yield self.text(packed[first : first + CHUNK_ROWS])

    @property
    def _user_bits(self) -> int:
        return self.users.bit_length()

    def part(self, number: int) -> Array:
        """The rows of chunk `number`, which need no other chunk: sorted; a number (int64) each, in the file's order."""
        chunk = self.walks.chunk(number)
        packed = (chunk.item << self._user_bits | chunk.user) << _DAY_BITS | chunk.time
        packed.sort()
        return packed

    def text(self, packed: Array) -> bytes:
        """The lines of sorted rows."""
        day = (packed & ((1 << _DAY_BITS) - 1)) + _BEGIN
        packed = packed >> _DAY_BITS
        user, item = packed & ((1 << self._user_bits) - 1), packed >> self._user_bits
        begins = np.flatnonzero(np.diff(item, prepend=-1))
        names = self._item_names(item[begins])[np.cumsum(np.diff(item, prepend=item[:1]) != 0)]
        stars = 1 + _STARS.draw(bits(self.seed, _RATING, user * self.items + item))
        # The hash is one to one, so that no two users have a name.
        ids = letters(bits(self.seed, _NAME, user), 13)
        return lines(b"A", ids, b",", names, b",", _RATINGS[stars], b",", digits(day * _DAY, 10), b"\n")

    def _item_names(self, item: Array) -> Array:
        """Numbers of 10 characters, ascending with the items: ISBNs with their check digit, then Amazon's own."""
        isbns = self.items * _SHARE_OF_ISBN[0] // _SHARE_OF_ISBN[1]
        stride, own = 10**9 // max(1, isbns), 36**8 // (self.items - isbns)
        number = item * stride + below(bits(self.seed, _ISBN, item), stride)
        text = letters(number % 10**9, 9, base=10)
        check = -(text.astype(np.int64) - ord("0")) @ np.arange(10, 1, -1) % 11
        isbn = np.column_stack([text, np.where(check == 10, ord("X"), ord("0") + check).astype(np.uint8)])
        later = np.maximum(item - isbns, 0)
        asin = letters(later * own + below(bits(self.seed, _ASIN, item), min(own, 1 << 31)), 10)
        asin[:, 0] = ord("B")
        return np.where((item < isbns)[:, None], isbn, asin)

"""The paper's synthetic stream (arXiv 2402.17152, table 2): in every record categories follow a Dirichlet process.

Each item belongs to a category drawn at random. Item ids open up: at record r of R the largest open one is
(0.4 + 0.6 r/R) of all. A record has up to 5 categories, a prior H over them, and a concentration a from 1 to 500. At
position n, counted from 1, its category is drawn from H with probability a / (a + n - 1), else category c with
probability n_c / (a + n - 1), where n_c of the record's earlier positions have it. The item is any open one of it.
The share of the items that open later, here 0.6, and the range of a are settings.

What the paper leaves open is decided so: the number of categories is uniform from 1 to 5; H is uniform over all
distributions (Dirichlet(1, ..., 1)), which the gaps between sorted uniform cuts are; items may repeat; no category
may be without an open item at the first record.

All draws are in integers. Which category n_c draws is that of an earlier position, drawn uniformly. A record needs no
record before it. The time of a record's interactions is the record's number.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from steps.data.generators.draws import Array, below, bits
from steps.data.generators.lines import digits, lines, write_archive

T = TypeVar("T")

_BLOCK_ROWS = 1 << 17  # of records made at once: what is computed of them fits a core's cache
_MOST_CATEGORIES = 5  # of a record
_UNIT = 1 << 10  # a concentration is a whole number of its parts
_LARGEST_A = 1_000_000  # with the positions added, its parts stay below 2**32, as `below` needs
_PRIOR = 1 << 20  # H is in whole numbers of its parts
# The streams of draws.
_CATEGORY, _NUMBER, _CHOSEN, _CUT, _A, _POSITION, _ITEM = range(7)


@dataclass(frozen=True)
class Stream:
    """The settings of the archive: `records` of `length` positions each, of `items` items in `categories`.

    opened: percent of the items that open after the first record, evenly. least_a, most_a: the range of a, in which it
    is uniform. Raises ValueError, which names the settings that do not fit.
    """

    seed: int
    records: int
    length: int
    items: int
    categories: int
    opened: int = 60
    least_a: int = 1
    most_a: int = 500

    def __post_init__(self) -> None:
        if not 0 <= self.opened < 100:
            raise ValueError(f"opened: {self.opened} is no percentage from 0 to 99")
        if not 1 <= self.least_a <= self.most_a <= _LARGEST_A:
            raise ValueError(f"least_a, most_a: {self.least_a} to {self.most_a} is no range from 1 to {_LARGEST_A}")
        number = np.bincount(self.category[: self.open_items(np.zeros(1, np.int64))[0]], minlength=self.categories)
        if not number.all():
            raise ValueError(
                f"items: {self.items} are too few for {self.categories} categories: one has no open item at first"
            )

    @cached_property
    def category(self) -> Array:
        """The category (items,) int64, from 0, of items 1, 2, ..."""
        return below(bits(self.seed, _CATEGORY, np.arange(1, self.items + 1)), self.categories)

    @cached_property
    def _keys(self) -> Array:
        """Category and item in one number, rising."""
        return np.sort(self.category * (self.items + 1) + np.arange(1, self.items + 1))

    def open_items(self, record: Array) -> Array:
        """The largest open item (int64) at each record."""
        return self.items * ((100 - self.opened) * self.records + self.opened * record) // (100 * self.records)

    def chosen(self, record: Array) -> Array:
        """The different categories (5, B) of each record (B,), of which it has the first ones that `cuts` leave it."""
        most = min(_MOST_CATEGORIES, self.categories)
        found = np.empty((most, len(record)), dtype=np.int64)
        for place in range(most):
            drawn = below(bits(self.seed, _CHOSEN, record * most + place), self.categories - place)
            for taken in np.sort(found[:place], axis=0):  # its place among those that are left
                drawn += drawn >= taken
            found[place] = drawn
        return found

    def cuts(self, record: Array) -> Array:
        """Where H goes on to a record's next category (4, B), of 2**20, rising; 2**20: it does not."""
        most = min(_MOST_CATEGORIES, self.categories)
        number = 1 + below(bits(self.seed, _NUMBER, record), most)
        cuts = [
            np.where(place < number, below(bits(self.seed, _CUT, record * most + place), _PRIOR), _PRIOR)
            for place in range(1, most)
        ]
        return np.sort(np.array(cuts, dtype=np.int64).reshape(most - 1, len(record)), axis=0)

    def concentration(self, record: Array) -> Array:
        """The concentration a of each record, in parts of 1/1024."""
        spread = (self.most_a - self.least_a) * _UNIT + 1
        return self.least_a * _UNIT + below(bits(self.seed, _A, record), spread)

    def part(self, first: int, last: int) -> Array:
        """The items (last - first, length) int32 of records `first` to `last` - 1, which need no other record."""
        record = np.arange(first, last)
        begin, number = self._open_items_of(record, self.chosen(record))
        position, place = np.arange(self.length)[:, None], np.arange(len(record))
        index = record * self.length + position
        of_record = self._slots(record, index) * np.int64(len(record)) + place
        rank = below(bits(self.seed, _ITEM, index), number.ravel().take(of_record))
        rank += begin.ravel().take(of_record)
        return np.ascontiguousarray(self._by_category.take(rank).T)

    def _open_items_of(self, record: Array, category: Array) -> tuple[Array, Array]:
        """Where the items of each category (K, B) begin in `_by_category`, and how many are open at its record."""
        key = category * (self.items + 1)
        begin = self._keys.searchsorted(key)
        return begin, self._keys.searchsorted(key + self.open_items(record), side="right") - begin

    @cached_property
    def _by_category(self) -> Array:
        return (self._keys % (self.items + 1)).astype(np.int32)

    def _slots(self, record: Array, index: Array) -> Array:
        """Which of its record's categories each position has: (length, B) uint8."""
        random = bits(self.seed, _POSITION, index)
        a = self.concentration(record)
        drawn = below(random, a + _UNIT * np.arange(self.length)[:, None])
        drawn -= a
        random &= np.uint64(_PRIOR - 1)  # bits that `below` does not read
        slots = np.zeros(index.shape, dtype=np.uint8)
        for cut in self.cuts(record):
            slots += random >= cut.astype(np.uint64)
        # Below 0: drawn from H; else a part of an earlier position, whose category is taken.
        drawn >>= np.int64(_UNIT.bit_length() - 1)
        source = np.where(drawn < 0, np.arange(self.length)[:, None], drawn)
        source *= len(record)
        source += np.arange(len(record))
        flat = slots.ravel()
        for position in range(1, self.length):
            slots[position] = flat.take(source[position])
        return slots

    def blocks(self) -> list[tuple[int, int]]:
        """First and last record, exclusive, of what is made at once. It changes no record."""
        size = max(1, _BLOCK_ROWS // self.length)
        return [(first, min(first + size, self.records)) for first in range(0, self.records, size)]

    def write(self, path: Path) -> None:
        """Write the archive to `path`: `stream/records.csv`, in order, and `stream/items.csv`."""
        number = len(str(self.records - 1))
        most = self.records * self.length * (2 * number + len(str(self.items)) + 3)
        write_archive(path, [("stream/records.csv", most, self._records()),
                             ("stream/items.csv", 32 * self.items + 32, [self._items()])])  # fmt: skip

    def _records(self) -> Iterator[bytes]:
        yield b"record,item,time\n"
        yield from in_order(self.blocks(), self.text)

    def text(self, first: int, last: int) -> bytes:
        """The lines of records `first` to `last` - 1."""
        record = np.repeat(digits(np.arange(first, last), len(str(last))), self.length, axis=0)
        return lines(record, b",", self._item_texts[self.part(first, last).ravel()], b",", record, b"\n")

    @cached_property
    def _item_texts(self) -> Array:
        return np.ascontiguousarray(digits(np.arange(self.items + 1), len(str(self.items))))

    def _items(self) -> bytes:
        rows = digits(np.arange(1, self.items + 1), 10), b",", digits(self.category, 10), b"\n"
        return b"item,category\n" + lines(*rows)

    def parts(self) -> Iterator[Array]:
        """All records' items, block by block, in order: (B, length) int32 each."""
        return in_order(self.blocks(), self.part)


def in_order(blocks: list[tuple[int, int]], make: Callable[[int, int], T]) -> Iterator[T]:
    """What `make` makes of each block, in order, by as many threads as there are cores; memory holds a few blocks."""
    number = os.cpu_count() or 1
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(number) as threads:
        for block in blocks:
            waiting.append(threads.submit(make, *block))
            if len(waiting) > number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

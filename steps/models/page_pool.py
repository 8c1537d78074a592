"""Pages that hold the keys, values and times of users' tokens: the memory of `history_cache.py`."""

from dataclasses import dataclass
from itertools import accumulate, islice

import torch

from kernels.jagged.naive import sequence_and_position


@dataclass(frozen=True)
class History:
    """Keys (layers, T, h, dqk), values (layers, T, h, dv) and times (T,) int64 of tokens, side by side."""

    keys: torch.Tensor
    values: torch.Tensor
    time: torch.Tensor


class PagePool:
    """A pool of slots, one a token, in pages of `page` slots. It grows when pages are short, and never shrinks.

    keys (layers, slots, h, dqk), values (layers, slots, h, dv) and time (slots,) int64 are replaced when it grows.
    """

    def __init__(self, page: int, stored: History) -> None:
        """stored: no slots yet, of the shapes, types and device that all will have."""
        self.page, self.stored = page, stored
        self._free: list[int] = []

    @property
    def page_bytes(self) -> int:
        keys, values, time = self.stored.keys, self.stored.values, self.stored.time
        layers, _, heads, dqk = keys.shape
        return self.page * (layers * heads * (dqk + values.shape[3]) * keys.itemsize + time.itemsize)

    @property
    def num_pages(self) -> int:
        """Of all pages, free ones included."""
        return len(self.stored.time) // self.page

    def pages_for(self, length: int) -> int:
        """How many pages so many tokens take."""
        return -(-length // self.page)

    def reserved(self, counts: list[int]) -> list[list[int]]:
        """So many free pages for each of several users. They stay free until `take`, and others may be given them."""
        need, pages = sum(counts), self.num_pages
        if need > len(self._free):
            more = max(need - len(self._free), pages)  # twice as many at least: then growing costs little on average
            slots = more * self.page
            keys, values = (
                torch.cat([pool, pool.new_zeros(len(pool), slots, *pool.shape[2:])], dim=1)
                for pool in (self.stored.keys, self.stored.values)
            )
            # All or nothing: memory may have been short.
            self.stored = History(keys, values, torch.cat([self.stored.time, self.stored.time.new_zeros(slots)]))
            self._free += range(pages, pages + more)
        picked = iter(self._free[len(self._free) - need :])
        return [list(islice(picked, count)) for count in counts]

    def take(self, tables: list[list[int]]) -> None:
        """Use the pages that `reserved` has just given."""
        del self._free[len(self._free) - sum(map(len, tables)) :]

    def release(self, pages: list[int]) -> None:
        """Give these pages back."""
        self._free += pages

    def slots(self, tables: list[list[int]], lengths: list[int]) -> torch.Tensor:
        """Where the first `lengths` tokens of users with these pages are: (sum of lengths,) int64."""
        owner, position = sequence_and_position(self.offsets(lengths), sum(lengths))
        pages = self.on_device([page for table in tables for page in table])
        first = self.offsets([len(table) for table in tables])
        return pages[first[owner] + position // self.page] * self.page + position % self.page

    def write(self, slots: torch.Tensor, tokens: History) -> None:
        """Store tokens in these slots (T,)."""
        self.stored.keys.index_copy_(1, slots, tokens.keys)
        self.stored.values.index_copy_(1, slots, tokens.values)
        self.stored.time.index_copy_(0, slots, tokens.time)

    def read(self, slots: torch.Tensor, to: History) -> None:
        """Copy what these slots (T,) hold into the first rows of `to`."""
        _copied(self.stored.keys, slots, to.keys)
        _copied(self.stored.values, slots, to.values)
        torch.index_select(self.stored.time, 0, slots, out=to.time[: len(slots)])

    def empty(self, rows: int) -> History:
        """Room for so many tokens, apart from the pool."""
        keys, values = (
            pool.new_empty(len(pool), rows, *pool.shape[2:]) for pool in (self.stored.keys, self.stored.values)
        )
        return History(keys, values, self.stored.time.new_empty(rows))

    def offsets(self, lengths: list[int]) -> torch.Tensor:
        """(B + 1,) int64 of sequences of these lengths, on the pool's device."""
        return self.on_device([0, *accumulate(lengths)])

    def on_device(self, numbers: list[int]) -> torch.Tensor:
        """int64, without waiting for what the device does: from pinned memory, where that makes a difference."""
        device = self.stored.time.device
        held = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
        return held.to(device, non_blocking=True)


def _copied(pool: torch.Tensor, slots: torch.Tensor, to: torch.Tensor) -> None:
    """pool[:, slots], of (layers, slots, h, d), into the first rows of `to`: in words of 8 bytes where vectors are made
    of them, as torch's kernel moves an element at a time."""
    to = to[:, : len(slots)]
    if pool.shape[3] * pool.itemsize % 8 == 0:
        pool, to = pool.view(torch.int64), to.view(torch.int64)
    torch.index_select(pool, 1, slots, out=to)

"""Tables of item vectors of which each of several processes makes, loads and saves its own rows alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernels.rowwise_table import RowwiseTable
from kernels.rowwise_table.sharded import ShardedRowwiseTable

#: A table of no more numbers is drawn in one piece, from torch's default generator.
DRAWN_WHOLE = 2**28
_DRAWN_AT_ONCE = 2**22  # numbers of a larger one, from a generator of their own
_SEEDS, _SEED_STRIDE = 2**32, 2654435761  # what torch's generator on a CPU tells apart; odd, so that no two are equal
_STD = 0.02


@dataclass(frozen=True)
class Block:
    """The `count` rows from `first` on that this process has of a table of `rows`."""

    first: int
    count: int
    rows: int

    @classmethod
    def of(cls, table: ShardedRowwiseTable) -> "Block":
        return cls(table.first, len(table.weight), table.rows)


class OwnRows:
    """Stands for a whole table in a state dict that a `ShardedRowwiseTable` loads, and has this process's rows."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __getitem__(self, _: slice) -> torch.Tensor:
        return self.rows


def rowwise_table(
    rows: int, dim: int, lr: float, dtype: torch.dtype, sharded: bool = False
) -> RowwiseTable | ShardedRowwiseTable:
    """A table of normal vectors, cut at two standard deviations; sharded: this process's rows of the same one.

    Of a large table nothing else is made: its rows come in blocks, each from a generator of its own.
    """
    large = rows * dim > DRAWN_WHOLE
    with torch.device("meta" if large else "cpu"):
        table = RowwiseTable(rows, dim, lr, dtype)
    if not large:
        nn.init.trunc_normal_(table.weight, std=_STD, a=-2 * _STD, b=2 * _STD)
        return ShardedRowwiseTable(table) if sharded else table
    own = ShardedRowwiseTable(table) if sharded else table
    own.to_empty(device="cpu")
    own.sums.zero_()
    first = own.first if isinstance(own, ShardedRowwiseTable) else 0
    seed, at_once = int(torch.randint(_SEEDS, ())), max(1, _DRAWN_AT_ONCE // dim)
    end = first + len(own.weight)
    for number in range(first // at_once, -(-end // at_once)):
        drawn = _drawn(at_once, dim, (seed + number * _SEED_STRIDE) % _SEEDS)
        start = number * at_once
        low, high = max(first, start), min(end, start + at_once)
        own.weight[low - first : high - first] = drawn[low - start : high - start]
    return own


def blocks_of(model: nn.Module) -> dict[str, Block]:
    """The entries of the model's state dict of which this process has its rows alone."""
    return {
        f"{prefix}.{name}": Block.of(module)
        for prefix, module in model.named_modules()
        if isinstance(module, ShardedRowwiseTable)
        for name in ("weight", "sums")
    }


def load_own(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict that has, of a `ShardedRowwiseTable`, this process's rows alone. Raises as torch does."""
    own: dict[str, Any] = {name: OwnRows(state[name]) for name in blocks_of(model)}
    model.load_state_dict({**state, **own})


def _drawn(rows: int, dim: int, seed: int) -> torch.Tensor:
    """Vectors (rows, dim) float32 of the same distribution, by its inverse: torch draws all again where one is too
    large, which takes several times as long."""
    found = torch.empty(rows, dim)
    share = math.erf(2 / math.sqrt(2))  # of normal numbers that are within two deviations
    found.uniform_(-share, share, generator=torch.Generator().manual_seed(seed))
    return found.erfinv_().mul_(_STD * math.sqrt(2)).clamp_(-2 * _STD, 2 * _STD)

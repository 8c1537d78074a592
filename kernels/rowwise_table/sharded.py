"""A `RowwiseTable` whose rows lie on several processes, in blocks of equal size, of which the last may be smaller.

A lookup sends row numbers to their owners and gets vectors back; its backward pass sends gradients the same way. So
each owner adds up what all processes learned of a row, and updates it once. TorchRec does it where it is installed and
fits; elsewhere all-to-alls in this file, and `update_repeated`. All processes of torch.distributed's default group take
part in all of it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import EPS, RowwiseTable, torchrec, update_repeated


class ShardedRowwiseTable(nn.Module):
    """The rows of a `RowwiseTable` that this process owns, and lookups of all rows.

    State: `weight` (own rows, dim) and `sums` (own rows,) float32. A state dict that is loaded has the whole table; one
    to be saved is that of `whole`.
    """

    weight: torch.Tensor
    sums: torch.Tensor

    def __init__(self, table: RowwiseTable) -> None:
        """Takes its rows of `table`, the same one in all processes."""
        super().__init__()
        self.rows, self.dim = table.weight.shape
        self.lr = table.lr
        self.block = -(-self.rows // dist.get_world_size())
        self.first = min(self.rows, dist.get_rank() * self.block)
        self.register_buffer("weight", self._own(table.weight).clone())
        self.register_buffer("sums", self._own(table.sums).clone())
        self._fused: tuple[Any] | None = None  # in a tuple, so that it is no submodule

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Vectors (n, dim) float32 of `rows` (n,) int64.

        Each process gives row numbers of its own choice, which ascend; n may differ between the processes, and be 0.
        Processes may ask for the same row, but one process asks for a row once. Row 0 is padding: zeros. So are numbers
        from the table's number of rows on, which may be repeated: with them behind the rows that a step wants, n need
        not depend on how many these are.
        """
        return torch.where(((rows > 0) & (rows < self.rows))[:, None], self._look_up(rows), 0.0)

    def whole(self) -> RowwiseTable:
        """The whole table, gathered into every process, on the same device."""
        found = RowwiseTable(0, self.dim, self.lr, self.weight.dtype)
        found.weight, found.sums = self._gathered(self.weight), self._gathered(self.sums)
        return found

    def _look_up(self, rows: torch.Tensor) -> torch.Tensor:
        if not torchrec.fits(self.weight, self.rows):
            anchor = self.sums.new_zeros((), requires_grad=True)
            # Where each process's rows begin among all, and where the last one's end.
            edges = torch.arange(dist.get_world_size() + 1, device=rows.device).mul_(self.block).clamp_(max=self.rows)
            found: torch.Tensor = _LookUp.apply(anchor, self.weight, self.sums, rows, edges, self.first, self.lr)
            return found
        if self._fused is None or not torchrec.holds(self._fused[0], self.weight):
            table, self.weight, self.sums = torchrec.take_over(self.weight, self.sums, self.rows, self.lr, EPS)
            self._fused = (table,)
        wanted = rows[: int((rows < self.rows).sum())]
        found = torchrec.look_up(self._fused[0], wanted)
        return nn.functional.pad(found, (0, 0, 0, len(rows) - len(wanted)))

    def _own(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.first : self.first + self.block]

    def _gathered(self, own: torch.Tensor) -> torch.Tensor:
        padded = own.new_zeros(self.block, *own.shape[1:])
        padded[: len(own)] = own
        blocks = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.all_gather(blocks, padded)
        return torch.cat(blocks)[: self.rows]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        own = {f"{prefix}{name}": self._own(state_dict[f"{prefix}{name}"]) for name in ("weight", "sums")}
        super()._load_from_state_dict(state_dict | own, prefix, *others)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        weight: torch.Tensor,
        sums: torch.Tensor,
        rows: torch.Tensor,
        edges: torch.Tensor,
        first: int,
        lr: float,
    ) -> torch.Tensor:
        """anchor: requires a gradient, so that there is a backward pass."""
        asked = torch.searchsorted(rows, edges).diff()
        answered = torch.empty_like(asked)  # how many rows each other process asks of this one
        dist.all_to_all_single(answered, asked)
        sent, received = torch.stack([asked, answered]).tolist()  # the one wait for the device
        own = _exchange(rows, sent, received) - first
        vectors = _exchange(weight.index_select(0, own), received, sent)
        ctx.table, ctx.counts = (weight, sums, own, lr), (sent, received)
        found = torch.empty(len(rows), weight.shape[1], dtype=torch.float32, device=rows.device)
        found[: len(vectors)] = vectors
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:
        weight, sums, own, lr = ctx.table
        update_repeated(weight, sums, own, _exchange(gradient, *ctx.counts), lr, EPS)
        return (None,) * 7


def _exchange(values: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """Of `values` (n, ...), sent[p] go to each process p in order; what comes, received[p] from each, in order too.

    What is behind the last that is sent stays here.
    """
    found = values.new_empty(sum(received), *values.shape[1:])
    dist.all_to_all_single(found, values[: sum(sent)].contiguous(), received, sent)
    return found

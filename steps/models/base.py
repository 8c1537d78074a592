"""What every model offers, and what the sequence models share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kernels.rowwise_table import RowwiseTable, unique
from steps.data.sequences import Batch, Layout, Sequences
from steps.models.losses import next_item_loss, scores

# torch 2.11 prefers cuDNN's attention on Hopper, some of whose kernels round the share of dropout to sixteenths.
torch.backends.cuda.enable_cudnn_sdp(False)


class Model(nn.Module, ABC):
    """A recommender: scores every item for the last position of each window."""

    @abstractmethod
    def score(self, batch: Batch) -> torch.Tensor:
        """Scores (B, num_items + 1) of every item as the next one; column 0 is padding and means nothing."""


class CountingModel(Model):
    """A model that is fitted by counting, without gradients. What it learns are buffers of any size."""

    @abstractmethod
    def fit(self, sequences: Sequences, drop: torch.Tensor) -> None:
        """Learn from all interactions but each user's last `drop` (U,)."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take the buffers as they are: their sizes depend on the data, unlike a network's."""
        if set(state_dict) != set(self.state_dict()):
            raise RuntimeError(f"expected {sorted(self.state_dict())}, found {sorted(state_dict)}")
        for name, tensor in state_dict.items():
            setattr(self, name, tensor.to(getattr(self, name).device))


class SequenceModel(Model):
    """A model with a vector per item, trained to predict the next item.

    `config` is the `model` entry of a run's config.json, `training` its `training` entry. With an `items` entry the
    item vectors are a `RowwiseTable`, which the optimiser does not hold: it learns within the backward pass. A step
    then touches the items of its batch and `pool` negatives, drawn uniformly, from which every token draws its own.

    An epoch is trained in one of two ways: over `losses`, whose shapes are whatever the data has, or over
    `static_steps` and `static_loss`, whose few shapes a CUDA graph can hold. Both are the same mathematics.
    """

    #: What matrix products are taken in between the item vectors and the states; None: in the weights' own type.
    compute: torch.dtype | None = None
    takes_low_precision = True  # whether `compute` changes anything
    blocks: nn.ModuleList

    def __init__(self, config: dict[str, Any], training: dict[str, Any], num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.dim: int = config["dim"]
        self.loss_config: dict[str, Any] = {"negatives": training["negatives"]} | config["loss"]
        self.optimizer_config: dict[str, Any] = config["optimizer"]
        self.items: nn.Embedding | RowwiseTable
        if "items" in config:
            own = config["items"]
            self.pool: int = own["pool"]
            self.items = RowwiseTable(num_items + 1, self.dim, own["lr"], getattr(torch, own["dtype"]))
        else:
            self.items = nn.Embedding(num_items + 1, self.dim)
        nn.init.trunc_normal_(self.items.weight, std=0.02, a=-0.04, b=0.04)

    @abstractmethod
    def states(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """States (T, d), one per token, not normalised, from the vectors (T, d) of the batch's items."""

    def encode(self, batch: Batch) -> torch.Tensor:
        """States (T, d), one per token, not normalised."""
        return self.states(look_up(self.items, batch.item), batch)

    @property
    def fusible(self) -> list[nn.Module]:
        """What torch.compile fuses, each part by itself."""
        return list(self.blocks)

    def compile_blocks(self) -> None:
        """Have torch.compile fuse what happens between matrix products, of whatever sizes, the next time it does."""
        import torch._dynamo  # late, since it takes a second

        # Rather than going on uncompiled without a word, where more shapes come than it compiles for.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for part in self.fusible:
            part.compile(dynamic=True)

    def uncompile_blocks(self) -> None:
        """Undo `compile_blocks`."""
        for part in self.fusible:
            part._compiled_call_impl = None

    def low_precision(self) -> torch.autocast:
        """Within it, matrix products and attention are taken in `compute`; norms and the sum of layers are not."""
        # A cached copy of a weight would outlive the step that made it.
        kind, dtype = self.items.weight.device.type, self.compute or torch.bfloat16
        return torch.autocast(kind, dtype=dtype, enabled=self.compute is not None, cache_enabled=False)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss over all tokens."""
        if isinstance(self.items, nn.Embedding):
            return next_item_loss(self.loss_config, self.encode(batch), self.items.weight, batch.next_item, batch.real)
        pool = torch.randint(1, self.num_items + 1, (self.pool,), device=batch.item.device)
        rows, place = unique(torch.cat([batch.item, batch.next_item, pool]))
        vectors = self.items(rows)
        item, next_item, pool = place.split([len(batch.item), len(batch.next_item), len(pool)])
        states = self.states(vectors.index_select(0, item), batch)
        return next_item_loss(self.loss_config, states, vectors, next_item, batch.real, pool)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it a backward pass changes nothing, not even a `RowwiseTable`."""
        if isinstance(self.items, nn.Embedding):
            yield
            return
        self.items.frozen = True
        try:
            yield
        finally:
            self.items.frozen = False

    def item_bytes(self, optimizer: torch.optim.Optimizer) -> float:
        """Bytes that the item vectors and what is kept of their gradients take, a float of the table."""
        if isinstance(self.items, RowwiseTable):
            tensors = [self.items.weight, self.items.sums]
        else:
            tensors = [self.items.weight, *optimizer.state[self.items.weight].values()]
        return sum(tensor.nbytes for tensor in tensors) / self.items.weight.numel()

    def losses(
        self, sequences: Sequences, order: torch.Tensor, drop: torch.Tensor, max_len: int, batch_size: int
    ) -> Iterator[torch.Tensor]:
        """One epoch's losses, in order, each to be followed by a step of the optimiser: one per batch of users."""
        for users in order.split(batch_size):
            yield self.loss(sequences.batch(users, drop[users], max_len))

    def steps(self, users: int, batch_size: int) -> int | None:
        """How many losses an epoch over so many users has; None where only running it tells."""
        return -(-users // batch_size)

    def static_steps(
        self, lengths: torch.Tensor, order: torch.Tensor, max_len: int, batch_size: int, bucket: int
    ) -> list[tuple[Any, torch.Tensor]]:
        """The same epoch, as a layout and an int64 tensor on the device for each step.

        lengths (U,): tokens of every user's window, on the host like `order`. A batch is padded to a multiple of
        `bucket` tokens, by rows of at most `max_len`; its tensor is its users.
        """
        spare = -(-bucket // max_len)
        tokens = [-(-int(part.sum()) // bucket) * bucket for part in lengths[order].split(batch_size)]
        batches = order.to(self.items.weight.device).split(batch_size)
        return [
            (Layout(len(users), total, len(users) + spare, max_len), users)
            for users, total in zip(batches, tokens, strict=True)
        ]

    def parts(self, layout: Any, given: torch.Tensor) -> Sequence[torch.Tensor]:
        """The tensors of the optimiser's steps, in order, that one of `static_steps` holds; usually the one."""
        return [given]

    def static_loss(self, sequences: Sequences, drop: torch.Tensor, layout: Any, given: torch.Tensor) -> torch.Tensor:
        """The loss of one of an item's `parts`, whose tensor is `given` on the device."""
        return self.loss(sequences.padded_batch(given, drop[given], layout))

    def score(self, batch: Batch) -> torch.Tensor:
        """Similarity of the last state and every item vector."""
        last = self.encode(batch)[batch.last]
        return scores(self.loss_config["similarity"], last, self.items.weight.to(last.dtype))

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over all parameters; on CUDA one whose step a graph can hold."""
        options, on_cuda = self.optimizer_config, self.items.weight.is_cuda
        return torch.optim.AdamW(
            self.parameters(),
            lr=options["lr"],
            betas=tuple(options["betas"]),
            weight_decay=options["weight_decay"],
            capturable=on_cuda,
            fused=on_cuda or None,
        )


class PositionedModel(SequenceModel):
    """A sequence model whose input is item vector x sqrt(d) + learned position vector, with dropout."""

    def __init__(self, config: dict[str, Any], training: dict[str, Any], num_items: int) -> None:
        super().__init__(config, training, num_items)
        self.positions: int = training["max_len"] + config["extra_positions"]
        self.position = nn.Embedding(self.positions, self.dim)
        self.input_dropout = nn.Dropout(training["dropout"])

    def embed(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The input (T, d). Position 0 is the window's first item."""
        return self.input_dropout(vectors * self.dim**0.5 + look_up(self.position, batch.place))


def look_up(table: nn.Embedding | RowwiseTable, index: torch.Tensor) -> torch.Tensor:
    """Rows (T, d) of a table; of a `RowwiseTable` without gradients."""
    if isinstance(table, RowwiseTable):
        return table.weight.index_select(0, index).float()
    if table.weight.is_cuda:  # where the gradient of `table(index)` sorts: 0.13 of 2.1 ms of SASRec's step on an H200
        return table.weight.index_select(0, index)
    return table(index)

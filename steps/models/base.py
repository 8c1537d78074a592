"""The interface of every model, and what the sequence models share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kernels.rowwise_table import RowwiseTable, unique
from steps.data.sequences import Batch, Sequences, StaticShape
from steps.models.losses import next_item_loss, scores

# torch 2.11 prefers cuDNN's attention on Hopper, some of whose kernels round the dropout probability to sixteenths.
torch.backends.cuda.enable_cudnn_sdp(False)


class Model(nn.Module, ABC):
    """A recommender: scores every item for the last position of each window."""

    @abstractmethod
    def score(self, batch: Batch) -> torch.Tensor:
        """Scores (B, num_items + 1) of every item as the next one; column 0 is padding and means nothing."""


class CountBasedModel(Model):
    """A model that is fitted by counting, without gradients. It learns buffers, whose sizes depend on the data."""

    @abstractmethod
    def fit(self, sequences: Sequences, num_held_out: torch.Tensor) -> None:
        """Learn from all interactions except each user's last `num_held_out` (U,)."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take the buffers in whatever size they have: it depends on the data, unlike that of a network's weights."""
        if set(state_dict) != set(self.state_dict()):
            raise RuntimeError(f"expected {sorted(self.state_dict())}, found {sorted(state_dict)}")
        for name, tensor in state_dict.items():
            setattr(self, name, tensor.to(getattr(self, name).device))


class SequenceModel(Model):
    """A model with an embedding per item, trained to predict the next item.

    `config` is the `model` entry of a run's config.json, `training` its `training` entry. With an `items` entry the
    item embeddings are a `RowwiseTable`, which the optimiser does not hold: it learns in the backward pass. A step then
    uses the items of its batch and a pool of `negative_pool` items, drawn uniformly, from which every token draws its
    negatives.

    There are two ways to train an epoch. `losses` takes batches in the shapes that the data has. `static_steps` and
    `static_loss` take the same batches padded to a few static shapes, which CUDA graphs can hold. Both compute the same
    loss.
    """

    #: The type of the matrix products between the item embeddings and the states; None: the weights' own type.
    compute_dtype: torch.dtype | None = None
    supports_low_precision = True  # whether `compute_dtype` changes anything
    blocks: nn.ModuleList

    def __init__(self, config: dict[str, Any], training: dict[str, Any], num_items: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.dim: int = config["dim"]
        self.loss_config: dict[str, Any] = {"negatives": training["negatives"]} | config["loss"]
        self.optimizer_config: dict[str, Any] = config["optimizer"]
        self.items: nn.Embedding | RowwiseTable
        if "items" in config:
            table = config["items"]
            self.negative_pool: int = table["negative_pool"]
            self.items = RowwiseTable(num_items + 1, self.dim, table["lr"], getattr(torch, table["dtype"]))
        else:
            self.items = nn.Embedding(num_items + 1, self.dim)
        nn.init.trunc_normal_(self.items.weight, std=0.02, a=-0.04, b=0.04)

    @abstractmethod
    def states(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Hidden states (T, d), one per token, not normalised, from the embeddings (T, d) of the batch's items."""

    def encode(self, batch: Batch) -> torch.Tensor:
        """Hidden states (T, d), one per token, not normalised."""
        return self.states(embedding_lookup(self.items, batch.item), batch)

    @property
    def compiled_modules(self) -> list[nn.Module]:
        """The modules that `compile_blocks` compiles, each by itself."""
        return list(self.blocks)

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile, for dynamic sizes. They are compiled when they first run."""
        import torch._dynamo  # late, since it takes a second

        # An error where a block meets more shapes than torch compiles for. By default it then runs uncompiled.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for module in self.compiled_modules:
            module.compile(dynamic=True)

    def uncompile_blocks(self) -> None:
        """Undo `compile_blocks`."""
        for module in self.compiled_modules:
            module._compiled_call_impl = None

    def autocast(self) -> torch.autocast:
        """Within it, matrix products and attention are computed in `compute_dtype`; norms and residual sums are not."""
        # Without the cache, as a cached copy of a weight would outlive the step that made it.
        kind, dtype = self.items.weight.device.type, self.compute_dtype or torch.bfloat16
        return torch.autocast(kind, dtype=dtype, enabled=self.compute_dtype is not None, cache_enabled=False)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss over all tokens."""
        if isinstance(self.items, nn.Embedding):
            states, table = self.encode(batch), self.items.weight
            return next_item_loss(self.loss_config, states, table, batch.next_item, batch.token_mask)
        pool = torch.randint(1, self.num_items + 1, (self.negative_pool,), device=batch.item.device)
        unique_items, inverse = unique(torch.cat([batch.item, batch.next_item, pool]))
        table = self.items(unique_items)
        item, next_item, pool = inverse.split([len(batch.item), len(batch.next_item), len(pool)])
        states = self.states(table.index_select(0, item), batch)
        return next_item_loss(self.loss_config, states, table, next_item, batch.token_mask, pool)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it a backward pass changes no weight and no state, not even a `RowwiseTable`'s."""
        if isinstance(self.items, nn.Embedding):
            yield
            return
        self.items.frozen = True
        try:
            yield
        finally:
            self.items.frozen = False

    def item_bytes(self, optimizer: torch.optim.Optimizer) -> float:
        """Bytes per float of the item table that its weights and their optimiser state take."""
        if isinstance(self.items, RowwiseTable):
            tensors = [self.items.weight, self.items.sums]
        else:
            tensors = [self.items.weight, *optimizer.state[self.items.weight].values()]
        return sum(tensor.nbytes for tensor in tensors) / self.items.weight.numel()

    def losses(
        self, sequences: Sequences, order: torch.Tensor, num_held_out: torch.Tensor, max_len: int, batch_size: int
    ) -> Iterator[torch.Tensor]:
        """The losses of one epoch, one per batch of users; the caller takes an optimiser step after each.

        order: the users, in the order of training. num_held_out (U,): how many of each user's last interactions are
        not trained on.
        """
        for users in order.split(batch_size):
            yield self.loss(sequences.batch(users, num_held_out[users], max_len))

    def num_steps(self, users: int, batch_size: int) -> int | None:
        """How many steps an epoch over so many users has; None if that is not known before it has run."""
        return -(-users // batch_size)

    def static_steps(
        self, lengths: torch.Tensor, order: torch.Tensor, max_len: int, batch_size: int, bucket: int
    ) -> list[tuple[Any, torch.Tensor]]:
        """The same epoch as static steps: of each its static shape, and its inputs, an int64 tensor on the device.

        lengths (U,): tokens of every user's window, on the host like `order`. A batch is padded to a multiple of
        `bucket` tokens, by padding sequences of at most `max_len`; its inputs are its users.
        """
        num_padding = -(-bucket // max_len)
        tokens = [-(-int(part.sum()) // bucket) * bucket for part in lengths[order].split(batch_size)]
        batches = order.to(self.items.weight.device).split(batch_size)
        return [
            (StaticShape(len(users), total, len(users) + num_padding, max_len), users)
            for users, total in zip(batches, tokens, strict=True)
        ]

    def micro_steps(self, shape: Any, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """The inputs of the optimiser steps that a static step consists of, in order; of most models it is one."""
        return [inputs]

    def static_loss(
        self, sequences: Sequences, num_held_out: torch.Tensor, shape: Any, inputs: torch.Tensor
    ) -> torch.Tensor:
        """The loss of one micro-step, whose `inputs` are on the device."""
        return self.loss(sequences.padded_batch(inputs, num_held_out[inputs], shape))

    def score(self, batch: Batch) -> torch.Tensor:
        """Similarity of the last hidden state and every item embedding."""
        last = self.encode(batch)[batch.last]
        return scores(self.loss_config["similarity"], last, self.items.weight.to(last.dtype))

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over all parameters; on CUDA one whose step a CUDA graph can hold."""
        options, on_cuda = self.optimizer_config, self.items.weight.is_cuda
        return torch.optim.AdamW(
            self.parameters(),
            lr=options["lr"],
            betas=tuple(options["betas"]),
            weight_decay=options["weight_decay"],
            capturable=on_cuda,
            fused=on_cuda or None,
        )


class PositionalModel(SequenceModel):
    """A sequence model whose input is item embedding x sqrt(d) + learned position embedding, with dropout.

    It has `max_len` + `output_slots` positions. The authors' code pads every sequence by these slots; here they only
    add positions.
    """

    def __init__(self, config: dict[str, Any], training: dict[str, Any], num_items: int) -> None:
        super().__init__(config, training, num_items)
        self.num_positions: int = training["max_len"] + config["output_slots"]
        self.position = nn.Embedding(self.num_positions, self.dim)
        self.input_dropout = nn.Dropout(training["dropout"])

    def embed(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The input (T, d) of the first block. Position 0 is the window's first item."""
        return self.input_dropout(embeddings * self.dim**0.5 + embedding_lookup(self.position, batch.position))


def embedding_lookup(table: nn.Embedding | RowwiseTable, index: torch.Tensor) -> torch.Tensor:
    """Rows (T, d) of an embedding table; of a `RowwiseTable` without gradients."""
    if isinstance(table, RowwiseTable):
        return table.weight.index_select(0, index).float()
    if table.weight.is_cuda:  # where the gradient of `table(index)` sorts: 0.13 of 2.1 ms of SASRec's step on an H200
        return table.weight.index_select(0, index)
    return table(index)

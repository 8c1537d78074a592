"""The interface of every model, and what the encoders share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernels.layer_norm import layer_norm
from kernels.rowwise_table import RowwiseTable
from kernels.rowwise_table.sharded import ShardedRowwiseTable
from steps.common.typed import Count, EntryError
from steps.data.sequences import Batch, Sequences

# torch 2.11 prefers cuDNN's attention on Hopper, some of whose kernels round the dropout probability to sixteenths.
torch.backends.cuda.enable_cudnn_sdp(False)


#: What embeddings of items are kept in.
ItemTable = nn.Embedding | RowwiseTable | ShardedRowwiseTable


class Model(nn.Module, ABC):
    """What a run trains or fits."""


class Recommender(Model):
    """A model of retrieval: scores every item for the last position of each window."""

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


@dataclass(frozen=True)
class HeadsConfig:
    """The sizes of an encoder whose heads share `dim`."""

    dim: Count
    blocks: Count
    heads: Count

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise EntryError(f"key model.heads: {self.heads} does not divide dim {self.dim}")


class Encoder(nn.Module, ABC):
    """Turns the item embeddings of windows into hidden states. It knows neither the items nor the loss."""

    #: The type of the matrix products; None: the weights' own type.
    compute_dtype: torch.dtype | None = None
    supports_low_precision = True  # whether `compute_dtype` changes anything
    blocks: nn.ModuleList

    @abstractmethod
    def forward(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Hidden states (T, d), one per token, not normalised, from the embeddings (T, d) of the batch's items."""

    @property
    def compiled_modules(self) -> list[nn.Module]:
        """The modules that torch.compile takes, each by itself."""
        return list(self.blocks)

    def before_compiling(self) -> None:
        """Do what torch.compile needs of this encoder first: of most nothing."""

    def autocast(self, device: torch.device) -> torch.autocast:
        """Within it, matrix products and attention are computed in `compute_dtype`; norms and residual sums are not."""
        # Without the cache, as a cached copy of a weight would outlive the step that made it.
        dtype = self.compute_dtype or torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=self.compute_dtype is not None, cache_enabled=False)


class PositionalEncoder(Encoder):
    """An encoder whose input is item embedding x sqrt(d) + learned position embedding, with dropout.

    It has `max_len` + `output_slots` positions. The authors' code pads every sequence by these slots; here they only
    add positions.
    """

    def __init__(self, dim: int, max_len: int, output_slots: int, dropout: float) -> None:
        super().__init__()
        self.dim = dim
        self.num_positions = max_len + output_slots
        self.position = nn.Embedding(self.num_positions, dim)
        self.input_dropout = nn.Dropout(dropout)

    def embed(self, embeddings: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The input (T, d) of the first block, of tokens at `position` (T,). Position 0 is the window's first item."""
        return self.input_dropout(embeddings * self.dim**0.5 + embedding_lookup(self.position, position))


class LayerNorm(nn.LayerNorm):
    """torch's layer norm of tokens (T, d), computed by this project's kernel on a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.eps, self.weight, self.bias)


def compile_modules(modules: Iterable[nn.Module]) -> None:
    """Compile each module by itself with torch.compile, for dynamic sizes. They are compiled when they first run.

    Raises TypeError for a layer of torch.nn itself, which torch would leave uncompiled and say nothing.
    """
    import torch._dynamo  # late, since it takes a second

    # By default a float, as dropout's, is a number on the host, whose kernels in C++ take half a minute to compile.
    torch._dynamo.config.specialize_float = True
    # As a constant it takes a graph of its own, and of more than 8 a module's code by default runs uncompiled from then
    # on: the runs of a search, which train together, have more settings.
    torch._dynamo.config.recompile_limit = 64
    for module in modules:
        if type(module).forward.__module__.startswith("torch.nn."):
            raise TypeError(f"torch compiles no {type(module).__name__} in place: call it from a module of your own")
        module.compile(dynamic=True)


def embedding_lookup(table: ItemTable, index: torch.Tensor) -> torch.Tensor:
    """Rows (T, d) of an embedding table; of a `RowwiseTable` without gradients."""
    if isinstance(table, ShardedRowwiseTable):
        raise TypeError("this process has but a part of the table: take the rows by a call, or the whole table first")
    if isinstance(table, RowwiseTable):
        return table.weight.index_select(0, index).float()
    if table.weight.is_cuda:  # where the gradient of `table(index)` sorts: 0.13 of 2.1 ms of SASRec's step on an H200
        return table.weight.index_select(0, index)
    return table(index)


def embedding_lookups(table: ItemTable, index: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """`embedding_lookup` of the parts of an index (T,), which are of `sizes`.

    On a GPU it is one lookup, as the gradient of each is as large as the table. On a CPU, which adds up in a fixed
    order, it is one a part, and their gradients are added up.
    """
    if table.weight.is_cuda:
        return embedding_lookup(table, index).split(sizes)
    return tuple(embedding_lookup(table, part) for part in index.split(sizes))

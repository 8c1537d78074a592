"""What every task has: item embeddings, an encoder over them, and a loss."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from kernels.rowwise_table import RowwiseTable
from kernels.rowwise_table.sharded import ShardedRowwiseTable
from steps.common.config import TrainingConfig
from steps.common.typed import Count, EntryError, NotNegative, PairBelow1, Positive, read
from steps.data.sequences import Batch, Sequences
from steps.models import Encoder, build_encoder
from steps.models.base import ItemTable, Model, compile_modules, embedding_lookup
from steps.models.large_table import rowwise_table


@dataclass(frozen=True)
class ItemsConfig:
    """Item embeddings of a large catalogue, as a `RowwiseTable`.

    A step then uses the items of its batch and a pool of `negative_pool` items, drawn uniformly, from which every token
    draws its negatives.
    """

    lr: Positive
    dtype: Literal["float16", "float32"]
    negative_pool: Count


@dataclass(frozen=True)
class OptimizerConfig:
    """The settings of the optimiser; Adagrad reads `lr` alone."""

    lr: Positive
    betas: PairBelow1
    weight_decay: NotNegative


@dataclass(frozen=True)
class TaskConfig:
    """The entries of `model` that every task reads."""

    dim: Count
    optimizer: OptimizerConfig
    items: ItemsConfig | None = None


class Task(Model, ABC):
    """What a model is trained for: a loss, over an encoder of item embeddings. The encoder knows nothing of it.

    settings: the `model` entry of a run's config.json. With an `items` entry the item embeddings are a `RowwiseTable`,
    which the optimiser does not hold: it learns in the backward pass.
    """

    schedules: ClassVar[tuple[str, ...]] = ("windows",)  # what it can be trained on, by default the first
    optimizer: ClassVar[str] = "adamw"  # of steps.training.optimizers
    supports_rowwise_items: ClassVar[bool] = False
    divisible: bool = False  # whether its loss is a mean over tokens that need their own window alone
    configs: ClassVar[tuple[type[Any], ...]] = (TaskConfig,)  # which entries of `model` it reads

    def __init__(
        self, settings: dict[str, Any], training: TrainingConfig, num_items: int, sharded: bool = False
    ) -> None:
        """sharded: of a `RowwiseTable` this is one of several processes, which has its rows alone."""
        super().__init__()
        config = read(TaskConfig, settings, "model.", others=True)
        self.num_items, self.dim = num_items, config.dim
        self.optimizer_config, self.items_config = config.optimizer, config.items
        self.items: ItemTable
        if config.items and not self.supports_rowwise_items:
            raise EntryError(f"key model.items: model {settings['model']} does not train such embeddings")
        if config.items:
            dtype = getattr(torch, config.items.dtype)
            self.items = rowwise_table(num_items + 1, self.dim, config.items.lr, dtype, sharded)
        else:
            self.items = nn.Embedding(num_items + 1, self.dim)
            nn.init.trunc_normal_(self.items.weight, std=0.02, a=-0.04, b=0.04)
        self.encoder: Encoder = self._build_encoder(settings, training)

    def _build_encoder(self, settings: dict[str, Any], training: TrainingConfig) -> Encoder:
        return build_encoder(settings, training)

    @abstractmethod
    def loss(self, batch: Any) -> torch.Tensor:
        """The mean loss of a batch as the task's schedule makes it."""

    def encode(self, batch: Batch) -> torch.Tensor:
        """Hidden states (T, d), one per token, not normalised."""
        states: torch.Tensor = self.encoder(embedding_lookup(self.items, batch.item), batch)
        return states

    def prepare(self, sequences: Sequences, num_held_out: torch.Tensor) -> None:
        """Take what the loss needs to know of the training data, before the first step: of most tasks nothing."""

    @property
    def compiled_modules(self) -> list[nn.Module]:
        """The modules that `compile_blocks` compiles, each by itself."""
        return self.encoder.compiled_modules

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile, for dynamic sizes. They are compiled when they first run."""
        import torch._dynamo  # late, since it takes a second

        # An error where a block meets more shapes than torch compiles for. By default it then runs uncompiled.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.encoder.before_compiling()
        compile_modules(self.compiled_modules)

    def uncompile_blocks(self) -> None:
        """Undo `compile_blocks`."""
        for module in self.compiled_modules:
            module._compiled_call_impl = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it a backward pass changes no weight and no state, not even a `RowwiseTable`'s."""
        if not isinstance(self.items, RowwiseTable):
            yield
            return
        self.items.frozen = True
        try:
            yield
        finally:
            self.items.frozen = False

    @property
    def is_sharded(self) -> bool:
        """Whether this process has but its rows of the item vectors."""
        return isinstance(self.items, ShardedRowwiseTable)

    def wanted_items(self, batch: Batch) -> torch.Tensor:
        """Of a table that processes share: which items (n,) the batch's loss needs vectors of, some of them often."""
        raise NotImplementedError(f"{type(self).__name__} has no table that processes share")

    def loss_of(self, batch: Batch, table: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """`loss` by vectors (u, d), of which `index` (n,) says which is whose of the `wanted_items`."""
        raise NotImplementedError(f"{type(self).__name__} has no table that processes share")

    def num_parameters(self) -> int:
        """How many numbers the model learns, those of the whole item table among them, whatever learns
        it and however many processes share it."""
        learnt = {id(parameter): parameter.numel() for parameter in self.parameters()}
        rows = self.items.rows if isinstance(self.items, ShardedRowwiseTable) else len(self.items.weight)
        learnt[id(self.items.weight)] = rows * self.items.weight.shape[1]
        return sum(learnt.values())

    def item_bytes(self, optimizer: torch.optim.Optimizer) -> float:
        """Bytes per float of the item table that its weights and their optimiser state take."""
        if isinstance(self.items, RowwiseTable | ShardedRowwiseTable):
            tensors = [self.items.weight, self.items.sums]
        else:
            tensors = [self.items.weight, *optimizer.state[self.items.weight].values()]
        return sum(tensor.nbytes for tensor in tensors) / max(1, self.items.weight.numel())

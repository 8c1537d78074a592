"""Row-wise sharded tables by TorchRec, whose shards are fbgemm_gpu's table-batched embeddings."""

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist

from ..jagged.fbgemm import root_logger_kept
from . import fbgemm

_TABLE, _FEATURE = "item_vectors", "rows"  # a table called `items` collides with a method of the module that holds it

_BAGS = 2**14  # into which the rows of a lookup are dealt


@functools.cache
def available() -> bool:
    """Whether TorchRec is installed and loads; one that is installed and does not load warns, once."""
    try:
        with root_logger_kept():
            import torchrec.distributed.embedding  # noqa: F401
    except Exception as error:  # what a library built for another torch or fbgemm_gpu raises is not its to choose
        if not (isinstance(error, ModuleNotFoundError) and error.name == "torchrec"):
            warnings.warn(f"TorchRec does not load, using torch instead: {error}", stacklevel=2)
        return False
    return True


def fits(weight: torch.Tensor, rows: int) -> bool:
    """Whether TorchRec can hold a table of so many rows, of which this process has `weight`.

    All processes answer alike: it depends on the table's type, width and device alone.
    """
    return rows > 0 and weight.shape[1] > 0 and fbgemm.takes(weight.new_empty(1, weight.shape[1])) and available()


def take_over(
    weight: torch.Tensor, sums: torch.Tensor, rows: int, lr: float, eps: float
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """TorchRec's sharded table of `rows` rows, and views of its own block of weight (n, d) and sums (n,).

    It has these values.
    """
    with root_logger_kept():
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from torchrec.distributed import comm_ops
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingEnv
        from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
        from torchrec.modules.embedding_modules import EmbeddingCollection

        comm_ops.set_gradient_division(False)  # gradients are added up over the processes, not averaged
        kind = DataType.FP16 if weight.dtype == torch.float16 else DataType.FP32
        config = EmbeddingConfig(
            name=_TABLE,
            num_embeddings=rows,
            embedding_dim=weight.shape[1],
            feature_names=[_FEATURE],
            data_type=kind,
        )
        fused = {
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": lr,
            "eps": eps,
            "output_dtype": SparseType.FP32,
        }
        sharder = EmbeddingCollectionSharder(fused_params=fused)
        whole = EmbeddingCollection([config], device=torch.device("meta"))
        size = dist.get_world_size()
        plan = construct_module_sharding_plan(
            whole,
            {_TABLE: row_wise(compute_kernel="fused")},
            sharder=sharder,
            local_size=size,
            world_size=size,
            device_type=weight.device.type,
        )
        group = dist.group.WORLD
        table = sharder.shard(whole, plan, ShardingEnv.from_process_group(group), weight.device)
    own = _weight(table)
    (state,) = table.fused_optimizer.state_dict()["state"].values()
    (momentum,) = state.values()
    own_sums = momentum.local_shards()[0].tensor
    own.copy_(weight)
    own_sums.copy_(sums)
    return table, own, own_sums


def holds(table: Any, weight: torch.Tensor) -> bool:
    """Whether `weight` is still the table's own block, not a copy on another device."""
    return bool(_weight(table).data_ptr() == weight.data_ptr())


def look_up(table: Any, rows: torch.Tensor) -> torch.Tensor:
    """Vectors (n, d) float32 of `rows` (n,), whose gradient updates the table."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    # As many bags in all processes, as TorchRec wants; not one alone, as a thread of the GPU reads a bag row by row.
    lengths = torch.full((_BAGS,), len(rows) // _BAGS, device=rows.device)
    lengths[: len(rows) % _BAGS] += 1
    found: torch.Tensor = table(KeyedJaggedTensor(keys=[_FEATURE], values=rows, lengths=lengths))[_FEATURE].values()
    return found


def _weight(table: Any) -> torch.Tensor:
    """This process's block of the table."""
    (weight,) = table.state_dict().values()
    found: torch.Tensor = weight.local_shards()[0].tensor
    return found

"""Rowwise Adagrad by fbgemm_gpu's table-batched embeddings, which update in their backward pass."""

from typing import Any

import torch

from ..jagged import fbgemm

_MULTIPLE = 4  # of floats that a row must have


def fits(weight: torch.Tensor) -> bool:
    """Whether fbgemm is to hold the table of one process: it can, and on a CPU.

    On CUDA a kernel of this package updates it, which a CUDA graph can hold.
    """
    return takes(weight) and not weight.is_cuda


def takes(weight: torch.Tensor) -> bool:
    """Whether fbgemm can hold the table: its type, size and device."""
    return (
        fbgemm.fits(weight)
        and weight.numel() > 0
        and weight.shape[1] % _MULTIPLE == 0
        and weight.dtype in (torch.float32, torch.float16)
    )


def take_over(
    weight: torch.Tensor, sums: torch.Tensor, lr: float, eps: float
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """An fbgemm table with these values, and views of its own weight (V, d) and sums (V,)."""
    with fbgemm.root_logger_kept():
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        device = (
            (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
            if weight.is_cuda
            else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        )
        table = SplitTableBatchedEmbeddingBagsCodegen(
            [(*weight.shape, *device)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=lr,
            eps=eps,
            weights_precision=SparseType.FP16 if weight.dtype == torch.float16 else SparseType.FP32,
            output_dtype=SparseType.FP32,
            pooling_mode=PoolingMode.SUM,  # of bags of one; fbgemm on a CPU has no other
            device=weight.device,
        )
    (own,), ((state, *_),) = table.split_embedding_weights(), table.split_optimizer_states()
    own.copy_(weight)
    state.copy_(sums)
    return table, own, state


def holds(table: Any, weight: torch.Tensor) -> bool:
    """Whether `weight` is still the fbgemm table's own, not a copy on another device."""
    return bool(table.split_embedding_weights()[0].data_ptr() == weight.data_ptr())


def set_rate(table: Any, lr: float) -> None:
    """The learning rate of the lookups that follow."""
    table.set_learning_rate(lr)


def look_up(table: Any, rows: torch.Tensor) -> torch.Tensor:
    """Vectors (n, d) float32 of unique rows (n,), whose gradient updates the table."""
    return table(rows, torch.arange(len(rows) + 1, device=rows.device))

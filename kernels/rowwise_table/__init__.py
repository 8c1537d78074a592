"""A large table of vectors that learns by rowwise Adagrad: two bytes a float in half precision, and four a row.

AdamW with float32 weights keeps twelve bytes a float. Here the optimiser has one number a row, the running sum of the
mean square of its gradients, and updates only the rows that a step looked up, as soon as their gradient is known.
On CUDA the kernel in `triton_op` does it; on a CPU fbgemm_gpu's table-batched embeddings where they fit; the torch twin
in `naive` elsewhere.
"""

from typing import Any

import torch
from torch import nn

from ..common import fits_triton
from . import fbgemm, naive

__all__ = ["RowwiseTable", "unique", "update", "update_repeated"]

EPS = 1e-8
_WIDEST = 8192  # a row is one tile of the Triton kernel


class RowwiseTable(nn.Module):
    """Vectors (rows, dim), looked up by row; row 0 is padding, looked up as zeros, and never changes.

    Its backward pass learns: sums[r] += mean(g^2), weight[r] -= lr g / (sqrt(sums[r]) + 1e-8), for the gradient g of
    each row looked up. Half-precision weights are rounded stochastically on CUDA, since most updates there are smaller
    than half of their last digit, and to the nearest on a CPU. State: `weight` (rows, dim) and `sums` (rows,) float32.
    """

    weight: torch.Tensor
    sums: torch.Tensor

    def __init__(self, rows: int, dim: int, lr: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.lr = lr
        #: Whether a backward pass leaves the table as it is.
        self.frozen = False
        self.register_buffer("weight", torch.empty(rows, dim, dtype=dtype))
        self.register_buffer("sums", torch.zeros(rows))
        # With the rate that it has; in a tuple, so that it is no submodule with weights of its own.
        self._fused: tuple[Any, float] | None = None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Vectors (n, dim) float32 of `rows` (n,) int64, of which only 0 may stand there twice."""
        return torch.where((rows > 0)[:, None], self._look_up(rows), 0.0)

    def _look_up(self, rows: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return self.weight.index_select(0, rows).float()
        fused = self._by_fbgemm()  # also when frozen, as in the step that comes before a capture
        if self.frozen:
            return self.weight.index_select(0, rows).float().requires_grad_()
        if fused is None:
            return naive.look_up(self.weight, self.sums, rows, self.lr, EPS, update)
        return fbgemm.look_up(fused, rows)

    def _by_fbgemm(self) -> Any:
        """fbgemm's table, which holds this one's state; None where it does not fit."""
        if not fbgemm.fits(self.weight):
            return None
        if self._fused is None or not fbgemm.holds(self._fused[0], self.weight):
            fused, self.weight, self.sums = fbgemm.take_over(self.weight, self.sums, self.lr, EPS)
            self._fused = (fused, self.lr)
        fused, lr = self._fused
        if lr != self.lr:
            fbgemm.set_rate(fused, self.lr)
            self._fused = (fused, self.lr)
        return fused


def update(
    weight: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, lr: float, eps: float
) -> None:
    """A step of rowwise Adagrad in place: the gradients (n, d) of unique `rows` (n,) of weight (V, d), with sums (V,).

    Of rows that stand there several times, which row 0 may, all gradients are 0.
    """
    _updates(weight, sums, gradient).update(weight, sums, rows, gradient, lr, eps)


def update_repeated(
    weight: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, lr: float, eps: float
) -> None:
    """`update` of rows (n,) that may stand there several times: their gradients (n, d) are added up."""
    _updates(weight, sums, gradient).update_repeated(weight, sums, rows, gradient, lr, eps)


def _updates(weight: torch.Tensor, sums: torch.Tensor, gradient: torch.Tensor) -> Any:
    """The module whose functions do an update: Triton's changes contiguous tensors in place."""
    fits = weight.shape[1] <= _WIDEST and weight.is_contiguous() and sums.is_contiguous()
    if fits_triton(weight, sums, gradient) and fits and not torch.compiler.is_compiling():
        from . import triton_op  # late: importing Triton takes time that runs on a CPU need not spend

        return triton_op
    return naive


def unique(index: torch.Tensor, behind: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The unique values of `index` (n,) in order; and the inverse (n,), each entry's position among them.

    On CUDA `behind` stands behind them to (n,), a size that is known beforehand: the host need not wait for the device.
    """
    if not index.is_cuda:
        return torch.unique(index, return_inverse=True)
    return naive.padded_unique(index, behind)

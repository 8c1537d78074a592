"""Rowwise Adagrad in torch, in shapes that a CUDA graph can hold."""

from typing import Any

import torch

_DROPPED = 13  # bits of float32's mantissa that float16 has not


def look_up(weight: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor, lr: float, eps: float) -> torch.Tensor:
    """Vectors (n, d) float32 of unique rows (n,), whose gradient updates `weight` (V, d) and `sums` (V,) in place."""
    return _LookUp.apply(sums.new_zeros((), requires_grad=True), weight, sums, rows, lr, eps)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        weight: torch.Tensor,
        sums: torch.Tensor,
        rows: torch.Tensor,
        lr: float,
        eps: float,
    ) -> torch.Tensor:
        """anchor: requires a gradient, so that there is a backward pass."""
        ctx.table = weight, sums, rows, lr, eps
        return weight.index_select(0, rows).float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:
        weight, sums, rows, lr, eps = ctx.table
        update(weight, sums, rows, gradient, lr, eps)
        return (None,) * 6


def update(
    weight: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, lr: float, eps: float
) -> None:
    """One step of rowwise Adagrad (Duchi et al. 2011, with one sum a row) on unique rows."""
    if not gradient.numel():  # no rows, or no columns to take a mean of
        return
    value, total = learnt(weight.index_select(0, rows), sums.index_select(0, rows), gradient, lr, eps)
    sums.index_copy_(0, rows, total)
    weight.index_copy_(0, rows, value)


def learnt(
    weight: torch.Tensor, sums: torch.Tensor, gradient: torch.Tensor, lr: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows (n, d) and their sums (n,) are after a step with this gradient (n, d) float32."""
    sums = sums + gradient.square().mean(1)
    rate = lr / (sums.sqrt() + eps)
    value = weight.float() - rate[:, None] * gradient
    return stochastically(value, weight.dtype) if weight.is_cuda else value.to(weight.dtype), sums


def padded_unique(index: torch.Tensor, behind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The unique values of `index` (n,) in order, with `behind` behind them to (n,); and the inverse (n,)."""
    ordered, order = index.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    position = new.cumsum(0) - 1
    values = torch.full_like(index, behind).index_put((position,), ordered)
    return values, torch.empty_like(index).index_put((order,), position)


def stochastically(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 rounded to one of its float16 neighbours, the nearer the likelier, so that the mean is the value."""
    if dtype != torch.float16:
        return value.to(dtype)
    bits = value.view(torch.int32)
    bits = bits + torch.randint_like(bits, 2**_DROPPED)
    return ((bits >> _DROPPED) << _DROPPED).view(torch.float32).half()

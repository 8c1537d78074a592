"""Rowwise Adagrad in torch, in shapes that a CUDA graph can hold."""

from collections.abc import Callable
from typing import Any

import torch

#: Bits of float32's mantissa that float16 has not.
DROPPED = 13


def look_up(
    weight: torch.Tensor,
    sums: torch.Tensor,
    rows: torch.Tensor,
    lr: float,
    eps: float,
    learn: Callable[..., None],
) -> torch.Tensor:
    """Vectors (n, d) float32 of unique rows (n,), whose gradient updates `weight` (V, d) and `sums` (V,) in place.

    learn: `update`, or what does the same faster.
    """
    return _LookUp.apply(sums.new_zeros((), requires_grad=True), weight, sums, rows, lr, eps, learn)


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
        learn: Callable[..., None],
    ) -> torch.Tensor:
        """anchor: requires a gradient, so that there is a backward pass."""
        ctx.table, ctx.learn = (weight, sums, rows, lr, eps), learn
        return weight.index_select(0, rows).float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:
        weight, sums, rows, lr, eps = ctx.table
        ctx.learn(weight, sums, rows, gradient, lr, eps)
        return (None,) * 7


def update(
    weight: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, lr: float, eps: float
) -> None:
    """One step of rowwise Adagrad (Duchi et al. 2011, with one sum a row) on unique rows."""
    if not gradient.numel():  # no rows, or no columns to take a mean of
        return
    value, total = learnt(weight.index_select(0, rows), sums.index_select(0, rows), gradient, lr, eps)
    sums.index_copy_(0, rows, total)
    weight.index_copy_(0, rows, value)


def update_repeated(
    weight: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, lr: float, eps: float
) -> None:
    """`update` of rows (n,) that may stand there several times: their gradients (n, d) are added up.

    The host does not wait for how many rows there are: n are computed, and those behind the last are the first again.
    """
    if not gradient.numel():
        return
    distinct, inverse = padded_unique(rows, 0)
    total = torch.zeros_like(gradient).index_add_(0, inverse, gradient)
    value, sum_ = learnt(weight.index_select(0, distinct), sums.index_select(0, distinct), total, lr, eps)
    place = torch.arange(len(rows), device=rows.device)
    place = torch.where(place <= inverse.max(), place, 0)
    distinct = distinct.index_select(0, place)
    sums.index_copy_(0, distinct, sum_.index_select(0, place))
    weight.index_copy_(0, distinct, value.index_select(0, place))


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
    bits = bits + torch.randint_like(bits, 2**DROPPED)
    rounded = ((bits >> DROPPED) << DROPPED).view(torch.float32)
    return torch.where(value.isnan(), value, rounded).half()  # more bits would make a number of the GPU's NaN

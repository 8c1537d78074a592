"""HSTU and softmax attention as operations of torch, forward and backward."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch

from ..common import configuration, first_derivatives_only, reverse_mode_only
from .hopper import backward as hopper_backward
from .hopper import fits as hopper_fits
from .inputs import Inputs, is_general, shape_class, token_rows
from .launch import Gradient, backward_bias, backward_kv, backward_q, forward
from .mask import Mask
from .prepare import BiasTables, Handed, Needs

#: What `attention` takes, in its order, and what it may be called without.
_ARGUMENTS = [field.name for field in fields(Inputs)]
_DEFAULTS = {field.name: field.default for field in fields(Inputs) if field.default is not MISSING}
_OPTIONAL = ("position_bias", "time_bias", "query_time", "key_time", "num_targets", "key_offsets", "query_scale")


@torch.library.custom_op("hstu::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    alpha: float,
    attention_scale: float | None,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
    max_attn_len: int,
    contextual_seq_len: int,
    num_targets: torch.Tensor | None,
    softmax: bool,
    min_full_attn_seq_len: int = 0,
    num_sink_tokens: int = 0,
    causal: bool = True,
    target_group_size: int = 1,
    key_offsets: torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output (T, h, dv); and for the backward pass lse, the logarithms of softmax's denominators (h, T), and
    `Handed`'s tensors; empty where they do not apply. `query_scale` (T,): an N for each query."""
    with torch.cuda.device_of(q):
        inputs = Inputs(
            q, k, v, offsets, max_len, alpha, attention_scale, position_bias, time_bias, query_time, key_time,
            max_attn_len, contextual_seq_len, num_targets, softmax, min_full_attn_seq_len, num_sink_tokens, causal,
            target_group_size, key_offsets, query_scale,
        )  # fmt: skip
        bias = BiasTables(inputs)
        return *forward(inputs, bias, inputs.configuration("forward")), *bias.handed


@attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    max_len: int,
    alpha: float,
    attention_scale: float | None,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    query_time: torch.Tensor | None,
    key_time: torch.Tensor | None,
    max_attn_len: int,
    contextual_seq_len: int,
    num_targets: torch.Tensor | None,
    softmax: bool,
    min_full_attn_seq_len: int = 0,
    num_sink_tokens: int = 0,
    causal: bool = True,
    target_group_size: int = 1,
    key_offsets: torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    lse = q.new_empty((q.shape[1], q.shape[0]) if softmax else (0,), dtype=torch.float32)
    mask = Mask(
        max_attn_len, contextual_seq_len, min_full_attn_seq_len, num_sink_tokens, causal, target_group_size
    )  # fmt: skip
    general = is_general(mask, num_targets, key_offsets, query_scale)
    zero = None if position_bias is None else (position_bias.shape[0] - 1) // 2
    blocks = 0, 0
    if time_bias is not None:
        config = configuration("hstu_attention.forward", shape_class(q, v, max_len, True), q.device)
        blocks = config["block_m"], config["block_n"]
    handed = Handed.empty(
        q, k, offsets, max_len, Needs(zero, time_bias is not None, not general, num_targets is not None, *blocks)
    )
    return v.new_empty(*q.shape[:2], v.shape[2]), lse, *handed


@torch.library.custom_op("hstu::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    given: Sequence[bool],
    max_len: int,
    alpha: float,
    attention_scale: float | None,
    mask: Sequence[int],
    softmax: bool,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, and the gradients of both tables (empty for a table that is not there).

    Args:
        grad: of the output.
        outputs: what `attention` returned; its first is read for softmax alone.
        tensors: q, k, v, offsets, then of `_OPTIONAL` those `given`.
        mask: `Mask`'s numbers.
    """
    q, k, v, offsets, *rest = tensors
    there = iter(rest)
    optional: dict[str, Any] = {name: next(there) if one else None for name, one in zip(_OPTIONAL, given, strict=True)}
    position_bias, time_bias = optional["position_bias"], optional["time_bias"]
    output, lse, *handed = outputs
    with torch.cuda.device_of(q):
        if not q.numel() or not max_len:
            tables = [lse.new_empty(0) if t is None else torch.zeros_like(t) for t in (position_bias, time_bias)]
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), tables[0], tables[1]
        numbers: dict[str, Any] = dict(zip(Mask._fields, mask, strict=True))
        numbers["causal"] = bool(numbers["causal"])
        inputs = Inputs(q, k, v, offsets, max_len, alpha, attention_scale, softmax=softmax, **optional, **numbers)
        grad = token_rows(grad)
        bias = BiasTables(inputs, Handed(*handed))
        if not deterministic and hopper_fits(inputs, grad):
            sums, dk, dv, dp, dw = hopper_backward(inputs, bias, grad)
            return (
                sums.to(q.dtype),
                dk,
                dv,
                lse.new_empty(0) if dp is None or position_bias is None else dp.to(position_bias.dtype),
                lse.new_empty(0) if dw is None or time_bias is None else dw.to(time_bias.dtype),
            )
        delta = (inputs.multiplied(grad) * output.float()).sum(-1).T.contiguous() if softmax else None
        gradient = Gradient(grad, lse, delta)
        config = inputs.configuration("bwd_dkdv")
        # One pass that adds dq as it goes, in no fixed order; or a second kernel for dq.
        added = not deterministic and bool(config["add_dq"]) and not inputs.history_sees_targets
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if added else None
        dk, dv, by_key = backward_kv(inputs, bias, config, gradient, dq)
        by_query = None
        if dq is None:
            dq, by_query = backward_q(inputs, bias, inputs.configuration("bwd_dq"), gradient)
        dp = dw = None
        if inputs.biased:
            config = inputs.configuration("bias_gradient")
            dp, dw = backward_bias(inputs, bias, config, gradient, (by_key, by_query), deterministic)
        return (
            dq.to(q.dtype),
            dk,
            dv,
            lse.new_empty(0) if dp is None or position_bias is None else dp.to(position_bias.dtype),
            lse.new_empty(0) if dw is None or time_bias is None else dw.to(time_bias.dtype),
        )


@attention_backward.register_fake
def _(
    grad: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    given: Sequence[bool],
    *_numbers: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, _, *rest = tensors
    there, lse = iter(rest), outputs[1]
    dp, dw = ((one := next(there)).new_empty(one.shape) if here else lse.new_empty(0) for here in given[:2])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dp, dw


def gradients(
    grad: torch.Tensor, outputs: Sequence[torch.Tensor], arguments: Sequence[Any], deterministic: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attention_backward` of what `attention` returned and took, in its order."""
    named = _DEFAULTS | dict(zip(_ARGUMENTS, arguments, strict=False))
    q, k, v, offsets, max_len, alpha, attention_scale = arguments[:7]
    optional = [named[name] for name in _OPTIONAL]
    tensors = [q, k, v, offsets, *(tensor for tensor in optional if tensor is not None)]
    given = [tensor is not None for tensor in optional]
    mask = [int(named[name]) for name in Mask._fields]
    return attention_backward(
        grad, list(outputs), tensors, given, max_len, alpha, attention_scale, mask, named["softmax"], deterministic
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
    ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
    softmax = inputs[_ARGUMENTS.index("softmax")]
    ctx.num_outputs = len(output)
    ctx.save_for_backward(
        *(value for value in inputs if isinstance(value, torch.Tensor)),
        output[0] if softmax else output[0].new_empty(0),
        *output[1:],
    )


def _backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    reverse_mode_only("attention", grad)
    saved = ctx.saved_tensors
    tensors, outputs = iter(saved[: -ctx.num_outputs]), saved[-ctx.num_outputs :]
    inputs = [next(tensors) if flag else other for flag, other in zip(ctx.is_tensor, ctx.others, strict=True)]
    dq, dk, dv, dp, dw = gradients(grad, outputs, inputs, torch.are_deterministic_algorithms_enabled())
    found: list[torch.Tensor | None] = [None] * len(inputs)
    found[:3] = dq, dk, dv
    found[7] = dp if inputs[7] is not None else None
    found[8] = dw if inputs[8] is not None else None
    return tuple(found)


attention.register_autograd(_backward, setup_context=_setup_context)
first_derivatives_only("attention", attention_backward)

"""Sampled softmax in Triton: item vectors are gathered once, in the forward pass, and never stored per token.

With N = T (1 + R) drawn items:

- Forward, one program per token: an online softmax over blocks of negatives. Like attention's weighted sum
  of values, the sum of the vectors weighted by their softmax is accumulated in the same pass. It is the
  gradient of the state up to the factor that arrives in the backward pass, so no second gather is needed.
- Backward, table: the drawn items are sorted, and each item sums its own stretch of the sorted list. No
  atomics, so the order of additions is fixed and gradients repeat bit by bit. Popular items have long
  stretches; every aligned chunk that lies within one item is therefore summed by a program of its own first.

Saved for the backward pass, in float32: N logits, the gradients of the states (T x d), two numbers per token.
Scratch of the backward pass: 36 N bytes while sorting (int32 keys and int64 places: in, out and in the sort's
own buffer), later 20 N and N / chunk partial sums of d numbers; V offsets. At T = 16,000, R = 128, d = 50 this
counts to 12 MB and 74 MB. All gathered vectors in float32 would be 413 MB, several times over.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ..common import configuration, first_derivatives_only, reverse_mode_only
from .naive import MASKED_LOGIT, NORM_EPS

#: Places of the sorted list that one program of the weight kernel takes.
_BLOCK_PLACES = 512
_NORM_EPS = tl.constexpr(NORM_EPS)
_MASKED_LOGIT = tl.constexpr(MASKED_LOGIT)


@triton.jit(do_not_specialize=["item_count"])
def softmax_norm_kernel(
    table, inverse_norms, item_count, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ITEMS: tl.constexpr
):
    """1 / max(norm, eps) of every row of the table: once per item rather than once per draw."""
    items = tl.program_id(0).to(tl.int64) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    columns = tl.arange(0, BLOCK_D)
    mask = (items < item_count)[:, None] & (columns < D)[None, :]
    vectors = tl.load(table + items[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    norms = tl.sqrt_rn(tl.sum(vectors * vectors, axis=1))
    tl.store(inverse_norms + items, tl.div_rn(1.0, tl.maximum(norms, _NORM_EPS)), mask=items < item_count)


@triton.jit
def _through_norm(gradient, unit, norm):
    """Gradient of x from that of x / max(norm, eps): below eps the divisor is a constant."""
    along = tl.where(norm >= _NORM_EPS, tl.sum(gradient * unit, axis=0), 0.0)
    return (gradient - along * unit) / tl.maximum(norm, _NORM_EPS)


@triton.jit  # negative_count is specialised by divisibility: by 16, ids load in vectors, and masks are simple
def softmax_forward_kernel(
    states,
    table,
    inverse_norms,
    positives,
    negatives,
    log_frequency,  # or None
    losses,
    logits,
    maxima,
    scales,
    state_gradients,
    temperature,
    negative_count,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_NEGATIVES: tl.constexpr,
):
    """Loss of one token, the gradient of its state, and what the backward pass needs for the table.

    With M the largest logit, column 0 of `logits` gets the sum of exp(logit - M) over the negatives, the
    other columns the negatives' logits. Then the derivatives of the loss by the logits are, over a common
    divisor (part of `scales`), -column 0 for the positive and exp(logit - M) for a negative: no 1 - p, which
    would cancel for a token that is predicted well.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    positive = tl.load(positives + token).to(tl.int32)
    positive_vector = tl.load(table + positive.to(tl.int64) * D + columns, mask=inside, other=0.0).to(tl.float32)
    positive_vector *= tl.load(inverse_norms + positive)
    state = tl.load(states + token * D + columns, mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(state * state, axis=0))
    unit = tl.div_rn(state, tl.maximum(norm, _NORM_EPS))
    query = tl.div_rn(unit, temperature)
    positive_logit = tl.sum(query * positive_vector, axis=0)
    if log_frequency is not None:
        positive_logit -= tl.load(log_frequency + positive).to(tl.float32)

    slots = tl.arange(0, BLOCK_NEGATIVES)
    token_negatives = negatives + token * negative_count
    token_logits = logits + token * (negative_count + 1)
    maximum = positive_logit
    negative_total = 0.0
    pull = tl.zeros([BLOCK_D], dtype=tl.float32)
    next_items = tl.load(token_negatives + slots, mask=slots < negative_count, other=0)
    for start in range(0, negative_count, BLOCK_NEGATIVES):
        drawn = start + slots
        valid = drawn < negative_count
        items = next_items.to(tl.int32)  # item 0 where not valid
        following = drawn + BLOCK_NEGATIVES  # loaded while this block's vectors are
        next_items = tl.load(token_negatives + following, mask=following < negative_count, other=0)
        # Zeros where not valid: a weight of zero times an item that is not finite is not zero.
        inverse = tl.load(inverse_norms + items, mask=valid, other=0.0)
        rows = table + items.to(tl.int64)[:, None] * D + columns[None, :]
        vectors = tl.load(rows, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        logit = tl.sum(query[None, :] * vectors, axis=1) * inverse
        if log_frequency is not None:
            logit -= tl.load(log_frequency + items).to(tl.float32)
        # Its weight, exp(-5e4 - maximum), is 0 in float32 for any temperature above 1e-4, and so is its gradient.
        logit = tl.where(items == positive, _MASKED_LOGIT, logit)
        tl.store(token_logits + 1 + drawn, logit, mask=valid)
        logit = tl.where(valid, logit, float("-inf"))
        block_maximum = tl.maximum(maximum, tl.max(logit, axis=0))
        shrink = tl.exp(maximum - block_maximum)
        weights = tl.exp(logit - block_maximum)
        negative_total = negative_total * shrink + tl.sum(weights, axis=0)
        pull = pull * shrink + tl.sum((weights * inverse)[:, None] * vectors, axis=0)
        maximum = block_maximum

    total = tl.exp(positive_logit - maximum) + negative_total
    tl.store(losses + token, tl.log(total) + (maximum - positive_logit))
    scale = 1.0 / (temperature * total)
    gradient = (pull - negative_total * positive_vector) * scale
    tl.store(state_gradients + token * D + columns, _through_norm(gradient, unit, norm), mask=inside)
    tl.store(token_logits, negative_total)
    tl.store(maxima + token, maximum)
    tl.store(scales + token, scale / tl.maximum(norm, _NORM_EPS))


@triton.jit(do_not_specialize=["draw_count", "logit_count"])
def softmax_weight_kernel(
    order, logits, maxima, scales, tokens, weights, draw_count, logit_count, BLOCK_PLACES: tl.constexpr
):
    """Token of every place in the sorted list, and by what its state is multiplied in the item's gradient."""
    places = tl.program_id(0) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)
    valid = places < draw_count
    draws = tl.load(order + places, mask=valid, other=0).to(tl.int32)  # 32 bits: the division is shorter
    token = draws // logit_count
    saved = tl.load(logits + draws, mask=valid, other=0.0)
    weight = tl.exp(saved - tl.load(maxima + token, mask=valid, other=0.0))
    weight = tl.where(draws == token * logit_count, -saved, weight)
    tl.store(weights + places, weight * tl.load(scales + token, mask=valid, other=0.0), mask=valid)
    tl.store(tokens + places, token, mask=valid)


@triton.jit
def _weighted_sum(tokens, weights, places, valid, states, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum of weight * state over these places of the sorted list."""
    columns = tl.arange(0, BLOCK_D)
    token = tl.load(tokens + places, mask=valid, other=0)
    weight = tl.load(weights + places, mask=valid, other=0.0)
    rows = states + token.to(tl.int64)[:, None] * D + columns[None, :]
    vectors = tl.load(rows, mask=valid[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)
    return tl.sum(weight[:, None] * vectors, axis=0)


@triton.jit
def softmax_chunk_kernel(
    drawn,
    tokens,
    weights,
    states,
    chunk_sums,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DRAWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sum one aligned chunk of the sorted list if it belongs to one item. Nobody reads the others' sums."""
    chunk = tl.program_id(0)
    begin = chunk * CHUNK
    if tl.load(drawn + begin) == tl.load(drawn + begin + CHUNK - 1):
        columns = tl.arange(0, BLOCK_D)
        sums = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, CHUNK, BLOCK_DRAWS):
            index = start + tl.arange(0, BLOCK_DRAWS)
            sums += _weighted_sum(tokens, weights, begin + index, index < CHUNK, states, D, BLOCK_D)
        tl.store(chunk_sums + chunk.to(tl.int64) * D + columns, sums, mask=columns < D)


@triton.jit
def softmax_item_kernel(
    offsets,
    tokens,
    weights,
    states,
    chunk_sums,
    table,
    table_gradient,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DRAWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradient of one item's vector, from its stretch of the sorted list: head, whole chunks, tail."""
    item = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    begin = tl.load(offsets + item)
    end = tl.load(offsets + item + 1)
    gradient = tl.zeros([BLOCK_D], dtype=tl.float32)
    if begin < end:  # else nobody drew it
        vector = tl.load(table + item * D + columns, mask=inside, other=0.0).to(tl.float32)
        first_chunk = (begin + CHUNK - 1) // CHUNK
        last_chunk = end // CHUNK  # exclusive; without a whole chunk it is at most the first
        head_end = tl.minimum(first_chunk * CHUNK, end)
        tail_begin = tl.maximum(last_chunk * CHUNK, head_end)
        head = head_end - begin
        loose = head + end - tail_begin
        index = tl.arange(0, BLOCK_DRAWS)
        for start in range(0, loose, BLOCK_DRAWS):
            draw = start + index
            places = tl.where(draw < head, begin + draw, tail_begin + draw - head)
            gradient += _weighted_sum(tokens, weights, places, draw < loose, states, D, BLOCK_D)
        for start in range(first_chunk, last_chunk, BLOCK_DRAWS):
            chunks = start + index
            rows = chunk_sums + chunks.to(tl.int64)[:, None] * D + columns[None, :]
            inside_chunks = (chunks < last_chunk)[:, None] & inside[None, :]
            gradient += tl.sum(tl.load(rows, mask=inside_chunks, other=0.0), axis=0)
        norm = tl.sqrt_rn(tl.sum(vector * vector, axis=0))
        gradient = _through_norm(gradient, vector / tl.maximum(norm, _NORM_EPS), norm)
    tl.store(table_gradient + item * D + columns, gradient, mask=inside)


@torch.library.custom_op("hstu::sampled_softmax_forward", mutates_args=())
def _forward(
    states: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (T,); what the kernel saves: logits (T, 1 + R), maxima (T,), scales (T,), state gradients (T, d)."""
    (tokens, dim), items = states.shape, len(table)
    if items >= 2**31:
        raise ValueError(f"a table of {items} rows: the kernels count them in 32 bits")
    outputs = _forward_outputs(states, table, positives, negatives, temperature, log_frequency)
    table = table.contiguous()
    inverse_norms = torch.empty(items, dtype=torch.float32, device=table.device)
    norm_sizes = _sizes(dim, configuration("sampled_softmax_norms", _width(dim), states.device))
    sizes = _sizes(dim, configuration("sampled_softmax_forward", _width(dim), states.device))
    with torch.cuda.device_of(states):
        blocks = triton.cdiv(items, norm_sizes["BLOCK_ITEMS"])
        softmax_norm_kernel[(blocks,)](table, inverse_norms, items, **norm_sizes)
        softmax_forward_kernel[(tokens,)](
            states.contiguous(),
            table,
            inverse_norms,
            positives.contiguous(),
            negatives.contiguous(),
            None if log_frequency is None else log_frequency.contiguous(),
            *outputs,
            temperature,
            negatives.shape[1],
            **sizes,
        )
    return outputs


@_forward.register_fake
def _forward_outputs(
    states: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, dim = states.shape
    shapes: list[tuple[int, ...]] = [(tokens,), (tokens, 1 + negatives.shape[1]), (tokens,), (tokens,), (tokens, dim)]
    losses, logits, maxima, scales, gradients = (states.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return losses, logits, maxima, scales, gradients


@torch.library.custom_op("hstu::sampled_softmax_table_gradient", mutates_args=())
def _table_gradient(
    states: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    logits: torch.Tensor,
    maxima: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the table (V, d); `scales` are the forward pass's, times the gradient of each token's loss."""
    items, dim = table.shape
    sizes = _sizes(dim, configuration("sampled_softmax_table", _width(dim), states.device))
    if logits.numel() > 2**31 - sizes["CHUNK"]:  # counts are rounded up to whole chunks
        raise ValueError(f"{logits.numel()} draws: the kernels count them in 32 bits")
    drawn, order = torch.sort(torch.cat([positives[:, None].int(), negatives.int()], dim=1).flatten(), stable=True)
    boundaries = torch.arange(items + 1, dtype=torch.int32, device=table.device)
    offsets = torch.searchsorted(drawn, boundaries, out_int32=True)

    chunks = len(drawn) // sizes["CHUNK"]
    chunk_sums = torch.empty((chunks, dim), dtype=torch.float32, device=table.device)
    weights = torch.empty(len(drawn), dtype=torch.float32, device=table.device)
    sorted_tokens = torch.empty_like(drawn)
    gradient = torch.empty_like(table, memory_format=torch.contiguous_format)
    sums = (sorted_tokens, weights, states.contiguous(), chunk_sums)
    with torch.cuda.device_of(states):
        softmax_weight_kernel[(triton.cdiv(len(drawn), _BLOCK_PLACES),)](
            order,
            logits,
            maxima,
            scales.contiguous(),
            sorted_tokens,
            weights,
            len(drawn),
            logits.shape[1],
            BLOCK_PLACES=_BLOCK_PLACES,
        )
        softmax_chunk_kernel[(chunks,)](drawn, *sums, **sizes)
        softmax_item_kernel[(items,)](offsets, *sums, table.contiguous(), gradient, **sizes)
    return gradient


@_table_gradient.register_fake
def _(states: torch.Tensor, table: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(table, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    states, table, positives, negatives, *_ = inputs
    _, *saved = output
    ctx.save_for_backward(states, table, positives, negatives, *saved)
    ctx.set_materialize_grads(False)  # no zeros for the outputs that only the backward pass uses


def _backward(ctx: Any, gradient: torch.Tensor, *of_saved: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    reverse_mode_only("sampled_softmax", gradient)
    # Only a derivative of this function itself sends gradients to what it saved.
    if any(other is not None for other in of_saved):
        raise RuntimeError("sampled_softmax in Triton has first derivatives only")
    states, table, positives, negatives, logits, maxima, scales, state_gradients = ctx.saved_tensors
    of_states = of_table = None
    if ctx.needs_input_grad[0]:
        of_states = (gradient[:, None] * state_gradients).to(states.dtype)
    if ctx.needs_input_grad[1]:
        of_table = _table_gradient(states, table, positives, negatives, logits, maxima, gradient * scales)
    return of_states, of_table, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)
first_derivatives_only("sampled_softmax", _table_gradient)


def sampled_softmax(
    states: torch.Tensor,
    table: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float,
    log_frequency: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.sampled_softmax.sampled_softmax`: (T,) losses, in float32.

    Derivatives are first ones only, and a second one raises RuntimeError; log_frequency gets none.
    """
    return _forward(states, table, positives, negatives, temperature, log_frequency)[0]


def _width(dim: int) -> str:
    """The class of shapes in the table of launch parameters."""
    return "narrow" if dim <= 64 else "wide"


def _sizes(dim: int, launch: Mapping[str, int]) -> dict[str, int]:
    """What a kernel is compiled for: its constants, in capitals, and num_warps."""
    constants = {name if name == "num_warps" else name.upper(): value for name, value in launch.items()}
    return {"D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)), **constants}

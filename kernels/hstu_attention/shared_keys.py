"""Programs that share the keys of one tile of queries, for inference, where tiles of queries are too few for a device:
how many they are, what each adds up, and how what they found is joined."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common import tf32_allowed
from ..tensor_cores import operand
from .activations import exp_of, silu
from .arguments import Flags, Shape
from .mask import Mask

#: A score without weight, and the maximum of none.
LOWEST = tl.constexpr(-1e30)
_JOIN_BLOCK = 16  # queries of a program of `join_kernel`
# So many warps a multiprocessor are wanted, each program has so many tiles of keys at least, and a tile of queries so
# many programs at most.
_WARPS, _FEWEST_TILES, _MOST_SPLITS = 16, 4, 64
_MULTIPROCESSORS = 132  # where there is no device: Hopper's


class Sums(NamedTuple):
    """What a program has added up for its queries: weighted values (BLOCK_M, BLOCK_DV), and softmax's maxima and sums
    of weights (BLOCK_M, 1)."""

    acc: Any
    m_i: Any
    l_i: Any


class Parts(NamedTuple):
    """Softmax's maxima and sums (splits, T, h) of what programs that share keys found; None for what a call does not
    need."""

    maxima: Any
    sums: Any


@triton.jit
def add_tile(sums, x, v_tile, FLAGS):
    """`sums` with a tile of scores and values. Queries may see no key of it: what softmax adds up for them before their
    first real maximum vanishes with that."""
    PRECISION: tl.constexpr = FLAGS.PRECISION
    acc, m_i, l_i = sums.acc, sums.m_i, sums.l_i
    if FLAGS.SOFTMAX:
        m_new = tl.maximum(m_i, tl.max(x, 1)[:, None])
        weights = exp_of(x - m_new)
        shrink = exp_of(m_i - m_new)
        l_i = l_i * shrink + tl.sum(weights, 1)[:, None]
        acc = acc * shrink
        m_i = m_new
    else:
        weights = silu(x, FLAGS.APPROXIMATE_TANH)
    weights = operand(weights, v_tile.dtype, PRECISION)
    acc = tl.dot(weights, v_tile, acc, input_precision=PRECISION)
    return Sums(acc, m_i, l_i)


@triton.jit
def store_found(
    sums, output, parts, i, is_query, split, tokens, head, heads, attention_scale, length, SHAPE, SPLIT, FLAGS
):
    """Writes the outputs of tokens i that `is_query` marks; SPLIT: what one of several programs found. `length`: N
    where it is the sequence's own."""
    acc = sums.acc
    row = i.to(tl.int64)[:, None]
    if SPLIT:
        row += split.to(tl.int64) * tokens
    inside = is_query[:, None]
    if FLAGS.SOFTMAX:
        if SPLIT:
            tl.store(parts.maxima + row * heads + head, sums.m_i, mask=inside)
            tl.store(parts.sums + row * heads + head, sums.l_i, mask=inside)
        else:
            acc = acc / sums.l_i
    elif FLAGS.QUERY_SCALE:
        acc = acc / tl.load(attention_scale + i, mask=is_query, other=1.0)[:, None]
    else:
        if FLAGS.BY_LENGTH:
            attention_scale = length.to(tl.float32)
        acc = acc / attention_scale
    columns = tl.arange(0, SHAPE.BLOCK_DV)[None, :]
    tl.store(
        output + (row * heads + head) * SHAPE.DV + columns,
        acc.to(output.dtype.element_ty),
        mask=inside & (columns < SHAPE.DV),
    )


@triton.jit(do_not_specialize=["tokens", "splits"])
def join_kernel(
    found, parts, output, tokens, splits, heads, BLOCK: tl.constexpr, SHAPE: tl.constexpr, SOFTMAX: tl.constexpr
):
    """Grid: blocks of queries x heads. The sum of what the programs found, (splits, T, h, dv), always in one order."""
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    head = tl.program_id(0) % heads
    i = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)[:, None]
    is_query = i < tokens
    columns = tl.arange(0, BLOCK_DV)[None, :]
    inside = is_query & (columns < SHAPE.DV)
    row = i.to(tl.int64) * heads + head
    apart = tokens.to(tl.int64) * heads
    acc = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    if SOFTMAX:
        m = tl.full([BLOCK, 1], LOWEST, tl.float32)
        total = tl.zeros([BLOCK, 1], tl.float32)
        for split in range(0, splits):
            m = tl.maximum(m, tl.load(parts.maxima + row + split * apart, mask=is_query, other=0.0))
    for split in range(0, splits):
        part = tl.load(found + (row + split * apart) * SHAPE.DV + columns, mask=inside, other=0.0)
        if SOFTMAX:
            shrink = exp_of(tl.load(parts.maxima + row + split * apart, mask=is_query, other=0.0) - m)
            total += tl.load(parts.sums + row + split * apart, mask=is_query, other=1.0) * shrink
            part = part * shrink
        acc += part
    if SOFTMAX:
        acc = acc / total
    tl.store(output + row * SHAPE.DV + columns, acc.to(output.dtype.element_ty), mask=inside)


def inference_flags(
    q: torch.Tensor,
    mask: Mask,
    softmax: bool,
    position_bias: torch.Tensor | None,
    time_bias: torch.Tensor | None,
    attention_scale: float | None,
    query_scale: torch.Tensor | None = None,
) -> Flags:
    """What there is to do for queries behind stored keys."""
    return Flags(
        POSITION=position_bias is not None,
        TIME=time_bias is not None,
        TARGETS=False,
        WINDOW=mask.max_attn_len > 0,
        PREFIX=False,
        FULL=False,
        SINKS=mask.num_sink_tokens > 0,
        BIDIRECTIONAL=False,
        GROUPS=mask.target_group_size > 1,
        KEY_OFFSETS=False,
        QUERY_SCALE=query_scale is not None,
        GENERAL=False,
        WHOLE=False,
        BY_LENGTH=attention_scale is None and query_scale is None,
        SOFTMAX=softmax,
        DESCRIPTOR=False,
        PRECISION="tf32" if q.is_cuda and tf32_allowed() else "ieee",
        APPROXIMATE_TANH=q.is_cuda and q.dtype == torch.bfloat16,
        MMA_LAYOUT=False,
        INLINE_ASM=q.is_cuda,
    )


def num_splits(
    tokens: int, sequences: int, heads: int, keys: int, config: Mapping[str, int], device: torch.device
) -> int:
    """How many programs share the stored keys of a tile of queries: so many that the device is busy, from shapes alone,
    so that results are the same each time. `keys`: that a query sees at most."""
    programs = max(triton.cdiv(tokens, config["block_m"]), min(sequences, tokens)) * heads
    wanted = _WARPS * _multiprocessors(device) // (programs * config["num_warps"])
    return max(1, min(wanted, triton.cdiv(keys, config["block_n"]) // _FEWEST_TILES, _MOST_SPLITS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def room_for_found(output: torch.Tensor, splits: int, softmax: bool) -> tuple[torch.Tensor, Parts]:
    """Where programs write what they find: the output itself (T, h, dv), if none share keys."""
    if splits == 1:
        return output, Parts(None, None)
    found = torch.empty(splits, *output.shape, dtype=torch.float32, device=output.device)
    parts = (found.new_empty(found.shape[:3]) if softmax else None for _ in range(2))
    return found, Parts(*parts)


def join(found: torch.Tensor, parts: Parts, output: torch.Tensor, shape: Shape, softmax: bool) -> None:
    """Write to the output (T, h, dv) what programs that share keys found."""
    if found is output:
        return
    tokens, heads, _ = output.shape
    join_kernel[(triton.cdiv(tokens, _JOIN_BLOCK) * heads,)](
        found, parts, output, tokens=tokens, splits=len(found), heads=heads, BLOCK=_JOIN_BLOCK, SHAPE=shape,
        SOFTMAX=softmax,
    )  # fmt: skip

"""Rows of at most SHORT tokens, as MovieLens has them: five launches, forward and backward, where launches are what
takes the time. README.md draws it.

The band holds the whole row here, so all kernels find bias and mask there.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .activations import silu, silu_and_derivative
from .arguments import Strides, Tokens
from .bias_tiles import BAND_BLOCK, HIDDEN, first_near_key
from .inputs import SHORT, Inputs, token_rows
from .prepare import BAND_TILE, Handed, fill_band
from .tiles import one_over_n, sequence_of, store_tile

_WIDEST_HEAD = 64
_MOST_HEADS = 4096  # so that a row's programs fit a launch's second dimension
_SUM_PROGRAMS = 1024
_WIDTH = tl.constexpr(2 * BAND_BLOCK.value)  # of the band, and of one table's sums


class Row(NamedTuple):
    """What the programs of a row share."""

    sequence: Any
    band: Any  # (n, 256): `band_kernel`; anything without a bias
    alpha: Any
    scale: Any  # 1/N


class Operands(NamedTuple):
    """Pointers of what the backward pass reads, and the strides of all."""

    q: Any
    k: Any
    v: Any
    do: Any
    strides: Any


class Vectors(NamedTuple):
    """One head's vectors of a row: a pointer to the first, and elements from one to the next. A row's places then fit
    32 bits, which take half the registers; the kernels keep many."""

    first: Any
    stride: Any


@triton.jit
def _vectors(source, token_stride, head_stride, head, sequence):
    return Vectors(source + sequence.start * token_stride + head * head_stride, token_stride)


@triton.jit
def _load(vectors, first, row, BLOCK, DIM, BLOCK_DIM):
    """(BLOCK, BLOCK_DIM): tokens from position `first`; zero beyond the row."""
    position, column = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_DIM)
    inside = (position < row.sequence.n)[:, None]
    if DIM != BLOCK_DIM:
        inside = inside & (column < DIM)[None, :]
    return tl.load(vectors.first + (position[:, None] * vectors.stride + column[None, :]), mask=inside, other=0.0)


@triton.jit
def _place(query, key):
    """Where a row's part of the band has a pair."""
    return query * _WIDTH + key - first_near_key(query)


@triton.jit
def _load_bias(row, query, key):
    """Biases and mask of queries and keys expanded to a tile."""
    return tl.load(row.band + _place(query, key), mask=query < row.sequence.n, other=HIDDEN).to(tl.float32)


@triton.jit
def _biased(x, row, query, key, FLAGS):
    """Scores with bias and mask, of queries and keys expanded to a tile."""
    if FLAGS.POSITION or FLAGS.TIME:
        x += _load_bias(row, query, key)
    else:
        x = tl.where(key <= query, x, HIDDEN)
    return x


@triton.jit
def _row(sequences, band, alpha, attention_scale, FLAGS):
    """The row of a program: the first dimension of its grid."""
    sequence = sequence_of(sequences, tl.program_id(0), 0, 0, 0, 0, 1, FLAGS)
    if FLAGS.POSITION or FLAGS.TIME:
        band += sequence.start * _WIDTH
    return Row(sequence, band, alpha, one_over_n(attention_scale, sequence, FLAGS))


@triton.jit(do_not_specialize=["num_tiles"])
def short_forward_kernel(
    q, k, v, output, sequences, band, strides, alpha, attention_scale, heads, num_tiles,
    SHAPE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, tiles of queries x heads), the last tiles, which have the most keys, first."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DQK: tl.constexpr = SHAPE.BLOCK_DQK
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    head = tl.program_id(1) % heads
    first = (num_tiles - 1 - tl.program_id(1) // heads) * BLOCK_M
    row = _row(sequences, band, alpha, attention_scale, FLAGS)
    sequence = row.sequence
    if first >= sequence.n:
        return
    Q = _vectors(q, strides.q_token, strides.q_head, head, sequence)
    K = _vectors(k, strides.k_token, strides.k_head, head, sequence)
    V = _vectors(v, strides.v_token, strides.v_head, head, sequence)
    i = first + tl.arange(0, BLOCK_M)
    q_tile = _load(Q, first, row, BLOCK_M, SHAPE.DQK, BLOCK_DQK)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for key in range(0, tl.minimum(first + BLOCK_M, sequence.n), BLOCK_N):
        k_tile = _load(K, key, row, BLOCK_N, SHAPE.DQK, BLOCK_DQK)
        v_tile = _load(V, key, row, BLOCK_N, SHAPE.DV, BLOCK_DV)
        j = key + tl.arange(0, BLOCK_N)
        x = _biased(tl.dot(q_tile, tl.trans(k_tile)) * alpha, row, i[:, None], j[None, :], FLAGS)
        acc = tl.dot(silu(x, FLAGS.APPROXIMATE_TANH).to(v_tile.dtype), v_tile, acc)
    OUT = Tokens(output, strides.o_token, strides.o_head, head)
    store_tile(OUT, acc * row.scale, first, sequence, BLOCK_M, SHAPE.DV, BLOCK_DV)


@triton.jit
def _operands(operands, head, sequence):
    """Q, K, V and the output's gradient of one head."""
    strides = operands.strides
    return (
        _vectors(operands.q, strides.q_token, strides.q_head, head, sequence),
        _vectors(operands.k, strides.k_token, strides.k_head, head, sequence),
        _vectors(operands.v, strides.v_token, strides.v_head, head, sequence),
        _vectors(operands.do, strides.o_token, strides.o_head, head, sequence),
    )


@triton.jit
def _query_gradients(operands, dq, row, first, head, heads, SHAPE, FLAGS):
    """dq of a tile of queries from position `first`."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DQK: tl.constexpr = SHAPE.BLOCK_DQK
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    sequence = row.sequence
    Q, K, V, DO = _operands(operands, head, sequence)
    q_tile = _load(Q, first, row, BLOCK_M, SHAPE.DQK, BLOCK_DQK)
    do_tile = _load(DO, first, row, BLOCK_M, SHAPE.DV, BLOCK_DV)
    i = first + tl.arange(0, BLOCK_M)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_DQK], tl.float32)
    for key in range(0, tl.minimum(first + BLOCK_M, sequence.n), BLOCK_N):
        k_tile = _load(K, key, row, BLOCK_N, SHAPE.DQK, BLOCK_DQK)
        v_tile = _load(V, key, row, BLOCK_N, SHAPE.DV, BLOCK_DV)
        j = key + tl.arange(0, BLOCK_N)
        x = _biased(tl.dot(q_tile, tl.trans(k_tile)) * row.alpha, row, i[:, None], j[None, :], FLAGS)
        _, dact = silu_and_derivative(x, FLAGS.APPROXIMATE_TANH)
        ds = tl.dot(do_tile, tl.trans(v_tile)) * dact
        # float16 ends at 65,504: there the score gradients take 1/N at once, elsewhere with the last product.
        if q_tile.dtype == tl.float16:
            ds *= row.scale
        dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile)
    dq_tile *= row.alpha if q_tile.dtype == tl.float16 else row.alpha * row.scale
    DQ = Tokens(dq, heads * SHAPE.DQK, SHAPE.DQK, head)
    store_tile(DQ, dq_tile, first, sequence, BLOCK_M, SHAPE.DQK, BLOCK_DQK)


@triton.jit
def _score_gradients(operands, gradients, row, first, key, heads, SHAPE, FLAGS):
    """The score gradients of queries from position `first` and keys from position `key`, summed over heads, which share
    the bias: it is loaded once."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    sequence = row.sequence
    i = first + tl.arange(0, BLOCK_M)
    j = key + tl.arange(0, BLOCK_N)
    bias = _load_bias(row, i[:, None], j[None, :])
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in range(heads):
        Q, K, V, DO = _operands(operands, head, sequence)
        q_tile = _load(Q, first, row, BLOCK_M, SHAPE.DQK, SHAPE.BLOCK_DQK)
        k_tile = _load(K, key, row, BLOCK_N, SHAPE.DQK, SHAPE.BLOCK_DQK)
        v_tile = _load(V, key, row, BLOCK_N, SHAPE.DV, SHAPE.BLOCK_DV)
        do_tile = _load(DO, first, row, BLOCK_M, SHAPE.DV, SHAPE.BLOCK_DV)
        x = tl.dot(q_tile, tl.trans(k_tile)) * row.alpha + bias
        _, dact = silu_and_derivative(x, FLAGS.APPROXIMATE_TANH)
        total += tl.dot(do_tile, tl.trans(v_tile)) * dact
    pointers = gradients + sequence.start * _WIDTH + _place(i[:, None], j[None, :])
    tl.store(pointers, total * row.scale, mask=(i < sequence.n)[:, None])


@triton.jit
def _key_gradients(operands, dk, dv, row, first, head, heads, SHAPE, FLAGS):
    """dk and dv of a tile of keys from position `first`. Scores are held transposed, (keys, queries), so that weights
    and score gradients enter their products from registers."""
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    BLOCK_DQK: tl.constexpr = SHAPE.BLOCK_DQK
    BLOCK_DV: tl.constexpr = SHAPE.BLOCK_DV
    sequence = row.sequence
    Q, K, V, DO = _operands(operands, head, sequence)
    k_tile = _load(K, first, row, BLOCK_N, SHAPE.DQK, BLOCK_DQK)
    v_tile = _load(V, first, row, BLOCK_N, SHAPE.DV, BLOCK_DV)
    j = first + tl.arange(0, BLOCK_N)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_DQK], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for query in range(first // BLOCK_M * BLOCK_M, sequence.n, BLOCK_M):
        q_tile = _load(Q, query, row, BLOCK_M, SHAPE.DQK, BLOCK_DQK)
        do_tile = _load(DO, query, row, BLOCK_M, SHAPE.DV, BLOCK_DV)
        i = query + tl.arange(0, BLOCK_M)
        x = _biased(tl.dot(k_tile, tl.trans(q_tile)) * row.alpha, row, i[None, :], j[:, None], FLAGS)
        weights, dact = silu_and_derivative(x, FLAGS.APPROXIMATE_TANH)
        dv_tile = tl.dot(weights.to(do_tile.dtype), do_tile, dv_tile)
        ds = tl.dot(v_tile, tl.trans(do_tile)) * dact
        if q_tile.dtype == tl.float16:
            ds *= row.scale
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile)
    dk_tile *= row.alpha if k_tile.dtype == tl.float16 else row.alpha * row.scale
    DK = Tokens(dk, heads * SHAPE.DQK, SHAPE.DQK, head)
    DV = Tokens(dv, heads * SHAPE.DV, SHAPE.DV, head)
    store_tile(DK, dk_tile, first, sequence, BLOCK_N, SHAPE.DQK, BLOCK_DQK)
    store_tile(DV, dv_tile * row.scale, first, sequence, BLOCK_N, SHAPE.DV, BLOCK_DV)


@triton.jit(do_not_specialize=["query_tiles", "key_tiles"])
def short_backward_kernel(
    q, k, v, do, dq, dk, dv, gradients, sequences, band, strides, alpha, attention_scale, heads, query_tiles, key_tiles,
    SHAPE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv; and, with a bias, the score gradients summed over heads, (T, 256) float32 in the band's places.

    Each is written by one program, so that nothing is added in memory, for the price of the scores taken three times.
    Grid (sequences, programs): with a bias, for each tile of queries and of keys; for each tile of queries and head,
    the last first, which have the most keys; for each tile of keys and head.
    """
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    BLOCK_N: tl.constexpr = SHAPE.BLOCK_N
    row = _row(sequences, band, alpha, attention_scale, FLAGS)
    sequence = row.sequence
    operands = Operands(q, k, v, do, strides)
    program = tl.program_id(1)
    if FLAGS.POSITION or FLAGS.TIME:
        first, key = program // key_tiles * BLOCK_M, program % key_tiles * BLOCK_N
        if (program < query_tiles * key_tiles) & (first < sequence.n) & (key < first + BLOCK_M):
            _score_gradients(operands, gradients, row, first, key, heads, SHAPE, FLAGS)
        program -= query_tiles * key_tiles
    if program >= 0:
        head = program % heads
        if program < query_tiles * heads:
            first = (query_tiles - 1 - program // heads) * BLOCK_M
            if first < sequence.n:
                _query_gradients(operands, dq, row, first, head, heads, SHAPE, FLAGS)
        else:
            first = (program // heads - query_tiles) * BLOCK_N
            if first < sequence.n:
                _key_gradients(operands, dk, dv, row, first, head, heads, SHAPE, FLAGS)


@triton.jit(do_not_specialize=["num_sequences", "splits"])
def short_sums_kernel(
    gradients, near_buckets, sums, offsets, num_sequences, splits,
    POSITION: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the score gradients: (programs, 2, 256) float32, by distance i - j, and by time bucket.

    A program takes, of every num_programs / splits-th sequence, every splits-th tile of BLOCK queries. Columns here are
    the distances, along which buckets come in runs: as in `band_gradient_kernel`, a group of 16 is added up, and where
    a run ends its sum goes to one bucket and is taken from the next.
    """
    program, groups = tl.program_id(0), tl.num_programs(0) // splits
    back = tl.arange(0, _WIDTH)
    position_sums = sums + program.to(tl.int64) * (2 * _WIDTH)
    time_sums = position_sums + _WIDTH
    if TIME:
        tl.store(time_sums + back, tl.zeros([_WIDTH], tl.float32))
        tl.debug_barrier()  # other threads add there
    by_distance = tl.zeros([BLOCK, _WIDTH], tl.float32)
    for index in range(program // splits, num_sequences, groups):
        start = tl.load(offsets + index)
        n = (tl.load(offsets + index + 1) - start).to(tl.int32)
        for first in range(program % splits * BLOCK, n, splits * BLOCK):
            i = first + tl.arange(0, BLOCK)
            seen = (back[None, :] <= i[:, None]) & (i < n)[:, None]
            pair = ((start + i) * _WIDTH + i - first_near_key(i))[:, None] - back[None, :]
            gradient = tl.load(gradients + pair, mask=seen, other=0.0)
            by_distance += gradient
            if TIME:
                bucket = tl.load(near_buckets + pair, mask=seen, other=0).to(tl.int32)
                within = seen & (back[None, :] < i[:, None]) & (back % 16 < 15)[None, :]
                following = tl.load(near_buckets + pair - 1, mask=within, other=0).to(tl.int32)
                total = tl.cumsum(tl.reshape(gradient, [BLOCK, _WIDTH // 16, 16]), 2)
                total = tl.reshape(total, [BLOCK, _WIDTH])
                ends = seen & ((bucket != following) | (within == 0))
                tl.atomic_add(time_sums + bucket, total, mask=ends, sem="relaxed")
                tl.atomic_add(time_sums + following, -total, mask=within & (bucket != following), sem="relaxed")
    if POSITION:
        tl.store(position_sums + back, tl.sum(by_distance, 0))


@triton.jit(do_not_specialize=["programs", "position_blocks", "positions"])
def short_tables_kernel(
    sums, dp, dw, programs, position_blocks, positions, BUCKETS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The tables' gradients, of `positions` and BUCKETS entries, from `short_sums_kernel`'s; grid (blocks of dp, then
    of dw). Entries of distances that no row has are zero."""
    if tl.program_id(0) < position_blocks:
        entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        column = (positions - 1) // 2 - entry
        inside = (column >= 0) & (column < _WIDTH)
    else:
        entry = (tl.program_id(0) - position_blocks) * BLOCK + tl.arange(0, BLOCK)
        column = _WIDTH + entry
        inside = entry < BUCKETS
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, programs, ROWS):
        program = first + tl.arange(0, ROWS)
        pointers = sums + program[:, None] * (2 * _WIDTH) + column[None, :]
        total += tl.load(pointers, mask=(program < programs)[:, None] & inside[None, :], other=0.0)
    value = tl.sum(total, 0)
    if tl.program_id(0) < position_blocks:
        tl.store(dp + entry, value.to(dp.dtype.element_ty), mask=entry < positions)
    else:
        tl.store(dw + entry, value.to(dw.dtype.element_ty), mask=inside)


def fits(q: torch.Tensor, v: torch.Tensor, max_len: int, general: bool, softmax: bool) -> bool:
    """Whether a call goes to these kernels. (float32 does not: sums for the tables want other products.)"""
    small = max(q.shape[2], v.shape[2]) <= _WIDEST_HEAD and q.shape[1] <= _MOST_HEADS and max_len <= SHORT
    return small and not (general or softmax) and q.dtype in (torch.float16, torch.bfloat16)


def room(q: torch.Tensor, biased: bool, timed: bool) -> Handed:
    """What the forward pass hands over, not filled: the band and its buckets."""
    band = q.new_empty(q.shape[0] if biased else 0, _WIDTH.value)
    buckets = q.new_empty(q.shape[0] if timed else 0, _WIDTH.value, dtype=torch.uint8)
    nothing = [q.new_empty(0, 0, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.int32)]
    return Handed(band, buckets, *nothing)


def forward(inputs: Inputs) -> tuple[torch.Tensor, Handed]:
    """The output (T, h, dv), and what the backward pass reads."""
    output = inputs.v.new_empty(inputs.v.shape)
    inputs.q, inputs.k, inputs.v = _near(inputs.q), _near(inputs.k), _near(inputs.v)
    handed = room(inputs.q, inputs.biased, inputs.timed)
    if not inputs.q.numel() or not inputs.max_len:
        return output, handed
    if inputs.biased:
        fill_band(inputs, handed)
    config = inputs.configuration("short_forward")
    tiles = triton.cdiv(inputs.max_len, config["block_m"])
    short_forward_kernel[(inputs.num_sequences, tiles * inputs.q.shape[1])](
        output=output, num_tiles=tiles, **_arguments(inputs, handed, config, output)
    )
    return output, handed


def backward(
    inputs: Inputs, handed: Handed, grad: torch.Tensor, tables: tuple[torch.Tensor | None, torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, and the gradients of both `tables` (empty for a table that is not there), each in its tensor's type;
    in no fixed order of additions where there is a time bias."""
    grad = _near(token_rows(grad))
    inputs.q, inputs.k, inputs.v = _near(inputs.q), _near(inputs.k), _near(inputs.v)
    heads = inputs.q.shape[1]
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (inputs.q, inputs.k, inputs.v))
    gradients = handed.band.new_empty(handed.band.shape, dtype=torch.float32) if inputs.biased else None
    config = inputs.configuration("short_backward")
    query_tiles, key_tiles = (triton.cdiv(inputs.max_len, config[name]) for name in ("block_m", "block_n"))
    programs = (query_tiles + key_tiles) * heads + (query_tiles * key_tiles if inputs.biased else 0)
    short_backward_kernel[(inputs.num_sequences, programs)](
        do=grad,
        dq=dq,
        dk=dk,
        dv=dv,
        gradients=gradients,
        query_tiles=query_tiles,
        key_tiles=key_tiles,
        **_arguments(inputs, handed, config, grad),
    )
    dp, dw = (grad.new_empty(0, dtype=torch.float32) if one is None else one.new_empty(one.shape) for one in tables)
    if gradients is not None:
        _fill_table_gradients(inputs, handed, gradients, dp, dw)
    return dq, dk, dv, dp, dw


def _fill_table_gradients(
    inputs: Inputs, handed: Handed, gradients: torch.Tensor, dp: torch.Tensor, dw: torch.Tensor
) -> None:
    """Writes the tables' gradients, of which one may be empty."""
    tiles = triton.cdiv(inputs.max_len, BAND_TILE)
    splits = max(1, min(tiles, _SUM_PROGRAMS // inputs.num_sequences))
    programs = min(inputs.num_sequences, _SUM_PROGRAMS) * splits
    sums = gradients.new_empty(programs, 2, _WIDTH.value)
    # The limit is so high that ptxas, which aims for more blocks a multiprocessor by itself, spills nothing.
    short_sums_kernel[(programs,)](
        gradients, handed.near_buckets, sums, inputs.offsets, inputs.num_sequences, splits,
        POSITION=inputs.position_bias is not None, TIME=inputs.timed, BLOCK=BAND_TILE, num_warps=8, maxnreg=128,
    )  # fmt: skip
    block = 16
    position_blocks, time_blocks = triton.cdiv(len(dp), block), triton.cdiv(len(dw), block)
    short_tables_kernel[(position_blocks + time_blocks,)](
        sums, dp, dw, programs, position_blocks, len(dp), BUCKETS=len(dw), BLOCK=block, ROWS=256,
    )  # fmt: skip


def _near(tensor: torch.Tensor) -> torch.Tensor:
    """Tokens (T, h, d) so near to each other that a row's places fit 32 bits."""
    return tensor if tensor.stride(0) < 2**31 // (2 * SHORT) else tensor.contiguous()


def _arguments(inputs: Inputs, handed: Handed, config: dict[str, int], output: torch.Tensor) -> dict[str, Any]:
    """What both passes' kernels take; `output`, or its gradient, for its strides."""
    rows = (inputs.q, inputs.k, inputs.v, output)
    return {
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "sequences": inputs.sequences,
        "band": handed.band,
        "strides": Strides(*(stride for tensor in rows for stride in tensor.stride()[:2])),
        "alpha": inputs.alpha,
        "attention_scale": 1.0 if inputs.attention_scale is None else inputs.attention_scale,
        "heads": inputs.q.shape[1],
        "SHAPE": inputs.shape(config),
        "FLAGS": inputs.flags(False, False),
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
        "maxnreg": config.get("maxnreg"),
    }

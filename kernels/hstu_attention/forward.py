"""Forward kernels: one program is one tile of queries of one row and head, and walks over the keys it sees."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from ..tensor_cores import operand
from .tiles import (
    add_time_steps,
    exp_of,
    first_near_key,
    load_rows,
    one_over_n,
    row_of_program,
    silu,
    tile_bias,
    unpack_tile,
    visible,
)

#: Masked scores and the first running maximum of softmax: finite, so that no difference of two is undefined.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def key_tiles(first_query, end_query, history, prefix, window, BLOCK, WINDOW, PREFIX, TARGETS):
    """The tiles of keys that some query in [first_query, end_query) sees, as four numbers for `key_tile`:
    how many; how many of them hold the prefix a window would cut off; the next tile; and the history's tiles end."""
    reach = end_query
    if PREFIX:
        reach = tl.maximum(reach, prefix)
    past = tl.cdiv(tl.minimum(reach, history), BLOCK)
    begin = 0
    cut_off = 0
    if WINDOW:
        begin = tl.minimum(tl.maximum(tl.minimum(first_query, history) - window, 0) // BLOCK, past)
        if PREFIX:
            cut_off = tl.minimum(tl.cdiv(prefix, BLOCK), begin)
    count = cut_off + past - begin
    if TARGETS:
        own = tl.maximum(first_query // BLOCK, past)
        count += tl.maximum(tl.cdiv(end_query, BLOCK) - own, 0)
    return count, cut_off, begin, past


@triton.jit
def key_tile(index, first_query, cut_off, begin, past, BLOCK):
    """The place of the index-th of those tiles: prefix, then history, then the targets' own."""
    tile = tl.where(index < cut_off, index, begin + index - cut_off)
    own = tl.maximum(first_query // BLOCK, past) + index - cut_off - (past - begin)
    return tl.where(tile < past, tile, own) * BLOCK


@triton.jit
def _attend(
    total, top, mass, q_tile, key,
    k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
    position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time, since, key_since,
    first, last, regular, value, i, history, prefix, window, alpha,
    DQK, DV, BLOCK_DQK, BLOCK_DV, ROWS, BLOCK, POSITION, TIME, TARGETS, WINDOW, PREFIX,
    NEAR, MASKED, CUT, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
):  # fmt: skip
    """One tile of keys from place `key`: adds its weighted values to `total`. CUT: it may end beyond the row."""
    k_tile = load_rows(
        k, start + key, start + n, head, stride_kt, stride_kh, BLOCK, DQK, BLOCK_DQK, DESCRIPTOR, CUT, PRECISION
    )
    j = key + tl.arange(0, BLOCK)
    bias = tile_bias(
        position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time, start, n, i, j,
        tl.minimum(history, n - 1), value, POSITION, TIME, TARGETS or WINDOW or PREFIX, NEAR, DIAGONALS,
        ROWS, BLOCK, True, ASSEMBLY,
    )  # fmt: skip
    x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * alpha + bias
    if TIME and not (NEAR or TARGETS or WINDOW or PREFIX):
        if last > first:
            x = add_time_steps(
                x,
                time_bias,
                bucket_edges,
                since,
                key_since,
                query_time,
                key_time,
                start,
                n,
                i,
                j,
                first,
                last,
                regular,
                True,
            )
    if SOFTMAX:
        if MASKED:
            seen = visible(i[:, None], j[None, :], history, prefix, window, TARGETS, WINDOW, PREFIX)
            x = tl.where(seen & (j < n)[None, :], x, -float("inf"))
        highest = tl.maximum(top, tl.max(x, 1))
        weights = exp_of(x - highest[:, None])
        shrink = exp_of(top - highest)
        mass = mass * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None]
        top = highest
    else:
        weights = silu(x, FAST)
        if MASKED:
            weights = tl.where(
                visible(i[:, None], j[None, :], history, prefix, window, TARGETS, WINDOW, PREFIX), weights, 0.0
            )
    v_tile = load_rows(
        v, start + key, start + n, head, stride_vt, stride_vh, BLOCK, DV, BLOCK_DV, DESCRIPTOR, CUT, PRECISION
    )
    total = tl.dot(operand(weights, v_tile.dtype, PRECISION), v_tile, total, input_precision=PRECISION)
    return total, top, mass


@triton.jit(do_not_specialize=["num_tiles", "tiles_width", "total_tokens", "window", "prefix", "position_zero"])
def forward_kernel(
    q, k, v, output, log_mass, offsets, num_targets,
    position_bias, spread, time_bias, bucket_edges, band, query_time, key_time, since, tiles_buckets, tiles_width,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    alpha, normaliser, num_tiles, heads, total_tokens, position_zero, window, prefix,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITION: tl.constexpr, TIME: tl.constexpr, TARGETS: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
    BY_LENGTH: tl.constexpr, SOFTMAX: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, DIAGONALS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the longest row x heads, rows). The last tiles of a row have the most keys and start first."""
    head = tl.program_id(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    start, n, history, prefix = row_of_program(offsets, num_targets, tl.program_id(1), prefix, TARGETS)
    first = tile * BLOCK_M
    if first >= n:
        return
    i = first + tl.arange(0, BLOCK_M)
    q_tile = load_rows(
        q, start + first, start + n, head, stride_qt, stride_qh, BLOCK_M, DQK, BLOCK_DQK, DESCRIPTOR, False, PRECISION
    )
    total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], _LOWEST, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    times_since = i
    key_since = since
    if TIME:
        key_since = since + total_tokens
        times_since = tl.load(since + start + i, mask=i < n, other=0)
    end = tl.minimum(first + BLOCK_M, n)
    whole = end
    if DESCRIPTOR:  # the row's last tile of keys, where it is not full, is CUT, after the others
        whole = tl.minimum(end, n // BLOCK_N * BLOCK_N)
    if TARGETS or WINDOW or PREFIX:
        count, cut_off, begin, past = key_tiles(first, end, history, prefix, window, BLOCK_N, WINDOW, PREFIX, TARGETS)
        for index in range(count):
            total, top, mass = _attend(
                total, top, mass, q_tile, key_tile(index, first, cut_off, begin, past, BLOCK_N),
                k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, True, True, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
    elif TIME:
        # Buckets of the next tile are looked up while the current one's products run. Near the diagonal the band
        # brings bias and mask.
        far = tl.maximum(first_near_key(first), 0)
        tiles_of_row = tiles_buckets + (start // BLOCK_M + tl.program_id(1) + tile) * tiles_width
        low, high, regular, value = unpack_tile(tl.load(tiles_of_row), time_bias)
        for key in range(0, far, BLOCK_N):
            following = tl.load(tiles_of_row + key // BLOCK_N + 1)
            total, top, mass = _attend(
                total, top, mass, q_tile, key,
                k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                times_since, key_since, low, high, regular, value, i, history, prefix, window, alpha,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, False, False, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
            low, high, regular, value = unpack_tile(following, time_bias)
        for key in range(far, whole, BLOCK_N):
            total, top, mass = _attend(
                total, top, mass, q_tile, key,
                k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                True, False, False, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
        if DESCRIPTOR:
            if whole < end:
                total, top, mass = _attend(
                    total, top, mass, q_tile, whole,
                    k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                    position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                    times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha,
                    DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                    True, False, True, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
                )  # fmt: skip
    else:
        diagonal = first // BLOCK_N * BLOCK_N
        for key in range(0, diagonal, BLOCK_N):
            total, top, mass = _attend(
                total, top, mass, q_tile, key,
                k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, False, False, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
        for key in range(diagonal, whole, BLOCK_N):
            total, top, mass = _attend(
                total, top, mass, q_tile, key,
                k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, True, False, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
        if DESCRIPTOR:
            if whole < end:
                total, top, mass = _attend(
                    total, top, mass, q_tile, whole,
                    k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                    position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                    times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha,
                    DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                    False, True, True, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
                )  # fmt: skip

    if SOFTMAX:
        total = total / mass[:, None]
        tl.store(log_mass + head.to(tl.int64) * total_tokens + start + i, top + tl.log(mass), mask=i < n)
    else:
        total = total * one_over_n(normaliser, n, history, BY_LENGTH)
    columns = tl.arange(0, BLOCK_DV)
    tl.store(
        output + (start + i).to(tl.int64)[:, None] * stride_ot + head * stride_oh + columns[None, :],
        total.to(output.dtype.element_ty),
        mask=(i < n)[:, None] & (columns < DV)[None, :],
    )

"""Backward kernels: gradients of keys and values (and of queries by addition), of queries alone, of the bias tables."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from ..tensor_cores import operand
from .forward import key_tile, key_tiles
from .tiles import (
    BAND_BLOCK,
    HIDDEN,
    add_time_steps,
    add_to_entries,
    exp_of,
    first_near_key,
    load_band,
    load_rows,
    one_over_n,
    row_of_program,
    silu_and_slope,
    small_buckets,
    tile_bias,
    unpack_tile,
    visible,
)


@triton.jit
def _weights_and_slopes(x, seen, log_mass, MASKED, SOFTMAX, FAST):
    """Weights of a tile and their derivatives by the score; softmax's derivative still lacks (dP - delta)."""
    if SOFTMAX:
        weights = exp_of(x - log_mass)
        slopes = weights
    else:
        weights, slopes = silu_and_slope(x, FAST)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
        slopes = tl.where(seen, slopes, 0.0)
    return weights, slopes


@triton.jit
def _collect(
    dk, dv, target_sum, self_sum, k_tile, v_tile, query,
    q, grad, dq, start, n, head, heads, stride_qt, stride_qh, stride_gt, stride_gh, log_mass, delta, total_tokens,
    position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time, since, key_since,
    first, last, regular, value, j, history, prefix, window, alpha, scale,
    DQK, DV, BLOCK_DQK, BLOCK_DV, ROWS, BLOCK, POSITION, TIME, TARGETS, WINDOW, PREFIX,
    NEAR, MASKED, CUT, SOFTMAX, ADD_DQ, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
):  # fmt: skip
    """One tile of queries from place `query`. Scores are held transposed, (keys, queries), so that weights and score
    gradients enter their products from registers. CUT: the tile may end beyond the row."""
    q_tile = load_rows(
        q, start + query, start + n, head, stride_qt, stride_qh, BLOCK, DQK, BLOCK_DQK, DESCRIPTOR, CUT, PRECISION
    )
    i = query + tl.arange(0, BLOCK)
    bias = tile_bias(
        position_bias, position_zero, spread, time_bias, bucket_edges, band, key_time, query_time, start, n, j, i,
        tl.minimum(history, n - 1), value, POSITION, TIME, TARGETS or WINDOW or PREFIX, NEAR, DIAGONALS,
        ROWS, BLOCK, False, ASSEMBLY,
    )  # fmt: skip
    x = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * alpha + bias
    if TIME and not (NEAR or TARGETS or WINDOW or PREFIX):
        if last > first:
            x = add_time_steps(
                x,
                time_bias,
                bucket_edges,
                key_since,
                since,
                key_time,
                query_time,
                start,
                n,
                j,
                i,
                first,
                last,
                regular,
                False,
            )
    if TIME and not (MASKED or NEAR):  # only the last tile has queries beyond the row
        x += tl.where(i < n, 0.0, HIDDEN)[None, :]
    seen = visible(i[None, :], j[:, None], history, prefix, window, TARGETS, WINDOW, PREFIX)
    seen = seen & (i < n)[None, :] & (j < n)[:, None]
    mass = tl.zeros([BLOCK], tl.float32)
    if SOFTMAX:
        mass = tl.load(log_mass + head.to(tl.int64) * total_tokens + start + i, mask=i < n, other=0.0)
    weights, slopes = _weights_and_slopes(x, seen, mass[None, :], MASKED, SOFTMAX, FAST)
    grad_tile = load_rows(
        grad, start + query, start + n, head, stride_gt, stride_gh, BLOCK, DV, BLOCK_DV, DESCRIPTOR, CUT, PRECISION
    )
    dv = tl.dot(operand(weights, grad_tile.dtype, PRECISION), grad_tile, dv, input_precision=PRECISION)
    dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
    if SOFTMAX:
        dp -= tl.load(delta + head.to(tl.int64) * total_tokens + start + i, mask=i < n, other=0.0)[None, :]
    # float16 ends at 65,504: there the score gradients take 1/N at once, elsewhere with the last product.
    ds = dp * slopes * scale if q_tile.dtype == tl.float16 else dp * slopes
    if TARGETS and POSITION:
        by_target = (i >= history)[None, :]
        own = i[None, :] == j[:, None]
        target_sum += tl.sum(tl.where(by_target & (own == 0), ds, 0.0), 1)
        self_sum += tl.sum(tl.where(by_target & own, ds, 0.0), 1)
    ds = operand(ds, q_tile.dtype, PRECISION)
    dk = tl.dot(ds, q_tile, dk, input_precision=PRECISION)
    if ADD_DQ:
        dq_tile = tl.dot(tl.trans(ds), k_tile, input_precision=PRECISION)
        dq_tile *= alpha if q_tile.dtype == tl.float16 else alpha * scale
        if DESCRIPTOR:
            if CUT:  # what is added beyond the row is nothing, though the row's own keys be not finite
                dq_tile = tl.where((i < n)[:, None], dq_tile, 0.0)
            dq.atomic_add([start.to(tl.int32) + query, head * DQK], dq_tile)
        else:
            columns = tl.arange(0, BLOCK_DQK)
            tl.atomic_add(
                dq + (start + i).to(tl.int64)[:, None] * (heads * DQK) + head * DQK + columns[None, :],
                dq_tile, mask=(i < n)[:, None] & (columns < DQK)[None, :], sem="relaxed",
            )  # fmt: skip
    return dk, dv, target_sum, self_sum


@triton.jit(do_not_specialize=["num_tiles", "tiles_width", "total_tokens", "window", "prefix", "position_zero"])
def key_gradient_kernel(
    q, k, v, grad, dq, dk, dv, log_mass, delta, target_sums, self_sums, offsets, num_targets,
    position_bias, spread, time_bias, bucket_edges, band, query_time, key_time, since, tiles_buckets, tiles_width,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    alpha, normaliser, num_tiles, heads, total_tokens, position_zero, window, prefix,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITION: tl.constexpr, TIME: tl.constexpr, TARGETS: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
    BY_LENGTH: tl.constexpr, SOFTMAX: tl.constexpr, ADD_DQ: tl.constexpr, DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, DIAGONALS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """dk, dv of one tile of keys of one row and head; grid as the forward kernel's, first tiles first.

    With ADD_DQ each tile's share of dq is added to a float32 buffer, in no fixed order.
    """
    head = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    start, n, history, prefix = row_of_program(offsets, num_targets, tl.program_id(1), prefix, TARGETS)
    first = tile * BLOCK_N
    if first >= n:
        return
    scale = one_over_n(normaliser, n, history, BY_LENGTH)
    if SOFTMAX:
        scale = 1.0
    j = first + tl.arange(0, BLOCK_N)
    k_tile = load_rows(
        k, start + first, start + n, head, stride_kt, stride_kh, BLOCK_N, DQK, BLOCK_DQK, DESCRIPTOR, ADD_DQ, PRECISION
    )
    v_tile = load_rows(
        v, start + first, start + n, head, stride_vt, stride_vh, BLOCK_N, DV, BLOCK_DV, DESCRIPTOR, ADD_DQ, PRECISION
    )
    times_since = j
    if TIME:
        times_since = tl.load(since + total_tokens + start + j, mask=j < n, other=0)
    dk_sum = tl.zeros([BLOCK_N, BLOCK_DQK], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    target_sum = tl.zeros([BLOCK_N], tl.float32)
    self_sum = tl.zeros([BLOCK_N], tl.float32)

    end = tl.minimum(first + BLOCK_N, n)
    begin = first // BLOCK_M
    if TARGETS or WINDOW or PREFIX:
        stop = n
        if WINDOW:
            last_seen = tl.minimum(end, history) - 1 + window
            stop = tl.where(last_seen >= history, n, tl.minimum(last_seen + 1, n))
        if TARGETS:
            stop = tl.where(first >= history, end, tl.maximum(stop, end))
        if PREFIX:
            begin = tl.where(first < prefix, 0, begin)
            stop = tl.where(first < prefix, n, stop)
        for tile in range(begin, tl.cdiv(stop, BLOCK_M)):
            dk_sum, dv_sum, target_sum, self_sum = _collect(
                dk_sum, dv_sum, target_sum, self_sum, k_tile, v_tile, tile * BLOCK_M,
                q, grad, dq, start, n, head, heads, stride_qt, stride_qh, stride_gt, stride_gh,
                log_mass, delta, total_tokens,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                since, times_since, 0, 0, True, 0.0, j, history, prefix, window, alpha, scale,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_N, BLOCK_M, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, True, True, SOFTMAX, ADD_DQ, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
    elif TIME:
        # As in the forward kernel: the band near the diagonal, and buckets one tile ahead.
        tiles = tl.cdiv(n, BLOCK_M)
        full = tiles
        if DESCRIPTOR:  # the row's last tile of queries, where it is not full, is CUT
            full = n // BLOCK_M
        rest = tl.minimum((first // BAND_BLOCK + 2) * BAND_BLOCK // BLOCK_M, tiles)
        for tile in range(begin, tl.minimum(rest, full)):
            dk_sum, dv_sum, target_sum, self_sum = _collect(
                dk_sum, dv_sum, target_sum, self_sum, k_tile, v_tile, tile * BLOCK_M,
                q, grad, dq, start, n, head, heads, stride_qt, stride_qh, stride_gt, stride_gh,
                log_mass, delta, total_tokens,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                since, times_since, 0, 0, True, 0.0, j, history, prefix, window, alpha, scale,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_N, BLOCK_M, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                True, False, False, SOFTMAX, ADD_DQ, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
        entry = tiles_buckets + (start // BLOCK_M + tl.program_id(1)) * tiles_width + first // BLOCK_N
        # Tiles of a row times tiles of the longest pass 2^31 at 3 million tokens.
        following = tl.load(entry + tl.minimum(rest, tiles - 1).to(tl.int64) * tiles_width)
        low, high, regular, value = unpack_tile(following, time_bias)
        for tile in range(rest, full):
            following = tl.load(entry + tl.minimum(tile + 1, tiles - 1).to(tl.int64) * tiles_width)
            dk_sum, dv_sum, target_sum, self_sum = _collect(
                dk_sum, dv_sum, target_sum, self_sum, k_tile, v_tile, tile * BLOCK_M,
                q, grad, dq, start, n, head, heads, stride_qt, stride_qh, stride_gt, stride_gh,
                log_mass, delta, total_tokens,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                since, times_since, low, high, regular, value, j, history, prefix, window, alpha, scale,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_N, BLOCK_M, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, False, False, SOFTMAX, ADD_DQ, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
            low, high, regular, value = unpack_tile(following, time_bias)
        if DESCRIPTOR:
            if full < tiles:
                if full < rest:
                    dk_sum, dv_sum, target_sum, self_sum = _collect(
                        dk_sum, dv_sum, target_sum, self_sum, k_tile, v_tile, full * BLOCK_M,
                        q, grad, dq, start, n, head, heads, stride_qt, stride_qh, stride_gt, stride_gh,
                        log_mass, delta, total_tokens,
                        position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                        since, times_since, 0, 0, True, 0.0, j, history, prefix, window, alpha, scale,
                        DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_N, BLOCK_M, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                        True, False, True, SOFTMAX, ADD_DQ, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
                    )  # fmt: skip
                else:
                    dk_sum, dv_sum, target_sum, self_sum = _collect(
                        dk_sum, dv_sum, target_sum, self_sum, k_tile, v_tile, full * BLOCK_M,
                        q, grad, dq, start, n, head, heads, stride_qt, stride_qh, stride_gt, stride_gh,
                        log_mass, delta, total_tokens,
                        position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                        since, times_since, low, high, regular, value, j, history, prefix, window, alpha, scale,
                        DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_N, BLOCK_M, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                        False, False, True, SOFTMAX, ADD_DQ, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
                    )  # fmt: skip
    else:
        # Two kinds of tiles are masked: those across the diagonal, and the row's last one where it is not full.
        tiles = tl.cdiv(n, BLOCK_M)
        full = tiles
        if DESCRIPTOR:  # the row's last tile of queries, where it is not full, is CUT
            full = n // BLOCK_M
        rest = tl.cdiv(end, BLOCK_M)
        whole = tl.maximum(n // BLOCK_M - rest, 0)
        for index in range(full - begin - whole):
            tile = tl.where(begin + index < rest, begin + index, begin + index + whole)
            dk_sum, dv_sum, target_sum, self_sum = _collect(
                dk_sum, dv_sum, target_sum, self_sum, k_tile, v_tile, tile * BLOCK_M,
                q, grad, dq, start, n, head, heads, stride_qt, stride_qh, stride_gt, stride_gh,
                log_mass, delta, total_tokens,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                since, times_since, 0, 0, True, 0.0, j, history, prefix, window, alpha, scale,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_N, BLOCK_M, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, True, False, SOFTMAX, ADD_DQ, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
        if DESCRIPTOR:
            if full < tiles:
                dk_sum, dv_sum, target_sum, self_sum = _collect(
                    dk_sum, dv_sum, target_sum, self_sum, k_tile, v_tile, full * BLOCK_M,
                    q, grad, dq, start, n, head, heads, stride_qt, stride_qh, stride_gt, stride_gh,
                    log_mass, delta, total_tokens,
                    position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                    since, times_since, 0, 0, True, 0.0, j, history, prefix, window, alpha, scale,
                    DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_N, BLOCK_M, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                    False, True, True, SOFTMAX, ADD_DQ, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
                )  # fmt: skip
        for tile in range(rest, rest + whole):
            dk_sum, dv_sum, target_sum, self_sum = _collect(
                dk_sum, dv_sum, target_sum, self_sum, k_tile, v_tile, tile * BLOCK_M,
                q, grad, dq, start, n, head, heads, stride_qt, stride_qh, stride_gt, stride_gh,
                log_mass, delta, total_tokens,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                since, times_since, 0, 0, True, 0.0, j, history, prefix, window, alpha, scale,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_N, BLOCK_M, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, False, False, SOFTMAX, ADD_DQ, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip

    dk_sum *= alpha if k_tile.dtype == tl.float16 else alpha * scale
    dv_sum *= scale
    token = (start + j).to(tl.int64)
    columns = tl.arange(0, BLOCK_DQK)
    tl.store(
        dk + token[:, None] * (heads * DQK) + head * DQK + columns[None, :], dk_sum.to(dk.dtype.element_ty),
        mask=(j < n)[:, None] & (columns < DQK)[None, :],
    )  # fmt: skip
    columns = tl.arange(0, BLOCK_DV)
    tl.store(
        dv + token[:, None] * (heads * DV) + head * DV + columns[None, :], dv_sum.to(dv.dtype.element_ty),
        mask=(j < n)[:, None] & (columns < DV)[None, :],
    )  # fmt: skip
    if TARGETS and POSITION:
        scale = 1.0 if k_tile.dtype == tl.float16 else scale
        tl.store(target_sums + head.to(tl.int64) * total_tokens + token, target_sum * scale, mask=j < n)
        tl.store(self_sums + head.to(tl.int64) * total_tokens + token, self_sum * scale, mask=j < n)


@triton.jit
def _query_gradient(
    dq, q_tile, grad_tile, mass, delta, key,
    k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
    position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time, since, key_since,
    first, last, regular, value, i, history, prefix, window, alpha, scale,
    DQK, DV, BLOCK_DQK, BLOCK_DV, ROWS, BLOCK, POSITION, TIME, TARGETS, WINDOW, PREFIX,
    NEAR, MASKED, CUT, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
):  # fmt: skip
    """One tile of keys from place `key`: adds its share to dq. CUT: it may end beyond the row."""
    k_tile = load_rows(
        k, start + key, start + n, head, stride_kt, stride_kh, BLOCK, DQK, BLOCK_DQK, DESCRIPTOR, CUT, PRECISION
    )
    v_tile = load_rows(
        v, start + key, start + n, head, stride_vt, stride_vh, BLOCK, DV, BLOCK_DV, DESCRIPTOR, CUT, PRECISION
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
    dp = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
    seen = visible(i[:, None], j[None, :], history, prefix, window, TARGETS, WINDOW, PREFIX) & (j < n)[None, :]
    _, slopes = _weights_and_slopes(x, seen, mass[:, None], MASKED, SOFTMAX, FAST)
    if SOFTMAX:
        dp -= delta[:, None]
    ds = dp * slopes * scale if q_tile.dtype == tl.float16 else dp * slopes
    return tl.dot(operand(ds, k_tile.dtype, PRECISION), k_tile, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_tiles", "tiles_width", "total_tokens", "window", "prefix", "position_zero"])
def query_gradient_kernel(
    q, k, v, grad, dq, log_mass, delta, offsets, num_targets,
    position_bias, spread, time_bias, bucket_edges, band, query_time, key_time, since, tiles_buckets, tiles_width,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    alpha, normaliser, num_tiles, heads, total_tokens, position_zero, window, prefix,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITION: tl.constexpr, TIME: tl.constexpr, TARGETS: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr,
    BY_LENGTH: tl.constexpr, SOFTMAX: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, DIAGONALS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, in one fixed order of additions; recomputes scores: 7 products in all instead of 5."""
    head = tl.program_id(0) // num_tiles
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    start, n, history, prefix = row_of_program(offsets, num_targets, tl.program_id(1), prefix, TARGETS)
    first = tile * BLOCK_M
    if first >= n:
        return
    scale = one_over_n(normaliser, n, history, BY_LENGTH)
    if SOFTMAX:
        scale = 1.0
    i = first + tl.arange(0, BLOCK_M)
    q_tile = load_rows(
        q, start + first, start + n, head, stride_qt, stride_qh, BLOCK_M, DQK, BLOCK_DQK, DESCRIPTOR, False, PRECISION
    )
    grad_tile = load_rows(
        grad, start + first, start + n, head, stride_gt, stride_gh, BLOCK_M, DV, BLOCK_DV, DESCRIPTOR, False, PRECISION
    )
    mass = tl.zeros([BLOCK_M], tl.float32)
    deltas = tl.zeros([BLOCK_M], tl.float32)
    if SOFTMAX:
        mass = tl.load(log_mass + head.to(tl.int64) * total_tokens + start + i, mask=i < n, other=0.0)
        deltas = tl.load(delta + head.to(tl.int64) * total_tokens + start + i, mask=i < n, other=0.0)
    times_since = i
    key_since = since
    if TIME:
        key_since = since + total_tokens
        times_since = tl.load(since + start + i, mask=i < n, other=0)
    dq_sum = tl.zeros([BLOCK_M, BLOCK_DQK], tl.float32)

    end = tl.minimum(first + BLOCK_M, n)
    whole = end
    if DESCRIPTOR:  # the row's last tile of keys, where it is not full, is CUT, after the others
        whole = tl.minimum(end, n // BLOCK_N * BLOCK_N)
    if TARGETS or WINDOW or PREFIX:
        count, cut_off, begin, past = key_tiles(first, end, history, prefix, window, BLOCK_N, WINDOW, PREFIX, TARGETS)
        for index in range(count):
            dq_sum = _query_gradient(
                dq_sum, q_tile, grad_tile, mass, deltas, key_tile(index, first, cut_off, begin, past, BLOCK_N),
                k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha, scale,
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
            dq_sum = _query_gradient(
                dq_sum, q_tile, grad_tile, mass, deltas, key,
                k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                times_since, key_since, low, high, regular, value, i, history, prefix, window, alpha, scale,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, False, False, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
            low, high, regular, value = unpack_tile(following, time_bias)
        for key in range(far, whole, BLOCK_N):
            dq_sum = _query_gradient(
                dq_sum, q_tile, grad_tile, mass, deltas, key,
                k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha, scale,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                True, False, False, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
        if DESCRIPTOR:
            if whole < end:
                dq_sum = _query_gradient(
                    dq_sum, q_tile, grad_tile, mass, deltas, whole,
                    k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                    position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                    times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha, scale,
                    DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                    True, False, True, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
                )  # fmt: skip
    else:
        diagonal = first // BLOCK_N * BLOCK_N
        for key in range(0, diagonal, BLOCK_N):
            dq_sum = _query_gradient(
                dq_sum, q_tile, grad_tile, mass, deltas, key,
                k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha, scale,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, False, False, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
        for key in range(diagonal, whole, BLOCK_N):
            dq_sum = _query_gradient(
                dq_sum, q_tile, grad_tile, mass, deltas, key,
                k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha, scale,
                DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                False, True, False, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
            )  # fmt: skip
        if DESCRIPTOR:
            if whole < end:
                dq_sum = _query_gradient(
                    dq_sum, q_tile, grad_tile, mass, deltas, whole,
                    k, v, start, n, head, stride_kt, stride_kh, stride_vt, stride_vh,
                    position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                    times_since, key_since, 0, 0, True, 0.0, i, history, prefix, window, alpha, scale,
                    DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, POSITION, TIME, TARGETS, WINDOW, PREFIX,
                    False, True, True, SOFTMAX, DESCRIPTOR, PRECISION, FAST, DIAGONALS, ASSEMBLY,
                )  # fmt: skip

    dq_sum *= alpha if q_tile.dtype == tl.float16 else alpha * scale
    columns = tl.arange(0, BLOCK_DQK)
    tl.store(
        dq + (start + i).to(tl.int64)[:, None] * (heads * DQK) + head * DQK + columns[None, :],
        dq_sum.to(dq.dtype.element_ty),
        mask=(i < n)[:, None] & (columns < DQK)[None, :],
    )


@triton.jit
def _add_to_buckets(
    time_sum, time_sums, tile_sum, seen, packed, low, high, scale, since, query_time, key_time, bucket_edges,
    small_edges, start, n, i, j, total_tokens, DIAGONALS, DETERMINISTIC, ASSEMBLY,
):  # fmt: skip
    """Adds a tile's score gradients, summed over heads, to the bucket sums: to `time_sum` (256,), a bucket a pass, or,
    where there are many buckets and not DETERMINISTIC, to `time_sums` in memory, element by element."""
    slot = tl.arange(0, 256)
    if low == high:
        time_sum += tl.where(slot == low, tl.sum(tile_sum) * scale, 0.0)
    elif packed >= 131072:
        passed = tl.load(since + start + i, mask=i < n, other=0)[:, None]
        passed -= tl.load(since + total_tokens + start + j, mask=j < n, other=0)[None, :]
        bucket_tile = small_buckets(tl.abs(passed), small_edges, ASSEMBLY)
        if DETERMINISTIC or high - low < 4:
            for bucket in range(low, high + 1):
                in_bucket = tl.sum(tl.where(bucket_tile == bucket, tile_sum, 0.0))
                time_sum += tl.where(slot == bucket, in_bucket * scale, 0.0)
        else:
            add_to_entries(time_sums, bucket_tile, tile_sum * scale, seen, ASSEMBLY and DIAGONALS)
    else:
        query_times = tl.load(query_time + start + i, mask=i < n, other=0)[:, None]
        key_times = tl.load(key_time + start + j, mask=j < n, other=0)[None, :]
        for bucket in range(low, high + 1):
            inside = tl.abs(query_times - key_times) >= tl.load(bucket_edges + bucket)
            inside &= tl.abs(query_times - key_times) < tl.load(bucket_edges + bucket + 1)
            in_bucket = tl.sum(tl.where(inside, tile_sum, 0.0))
            time_sum += tl.where(slot == bucket, in_bucket * scale, 0.0)
    return time_sum


@triton.jit(
    do_not_specialize=[
        "rows",
        "tiles_width",
        "total_tokens",
        "row_splits",
        "tile_splits",
        "copies",
        "lowest",
        "window",
        "prefix",
        "position_zero",
    ]
)
def bias_gradient_kernel(
    q, k, v, grad, position_sums, time_sums, band_gradient, log_mass, delta, offsets, num_targets,
    position_bias, spread, time_bias, bucket_edges, small_edges, band, query_time, key_time, since, tiles_buckets,
    tiles_width, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    alpha, normaliser, rows, row_splits, tile_splits, copies, lowest, heads, total_tokens, position_zero, window,
    prefix,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, POSITION: tl.constexpr, TIME: tl.constexpr,
    TARGETS: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, BY_LENGTH: tl.constexpr,
    SOFTMAX: tl.constexpr, DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, DIAGONALS: tl.constexpr, ASSEMBLY: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Sums of score gradients for the bias tables, by the tiles' distance from the diagonal.

    Grid (distances x row splits x tile splits): a program takes every row_splits-th row and, of each, every
    tile_splits-th of the tiles whose first query is `distance` BLOCK_N beyond their first key. On these, an element's
    place in the tile decides its j - i, so the position sums stay one (BLOCK_M, BLOCK_N) tile however many go in;
    heads share the bias, so bucket sums are taken of their sum. Near the diagonal, where a tile has many buckets, this
    sum is written to `band_gradient`, from which `band_gradient_kernel` takes the bucket sums; under other masks than
    the causal one such tiles add to the bucket sums element by element, or, DETERMINISTIC, take a pass a bucket.

    Adds to position sums (distances, BLOCK_M, BLOCK_N), DETERMINISTIC (distances, splits, BLOCK_M, BLOCK_N), and to
    time sums (copies, 256), DETERMINISTIC with a copy for each program: no two programs add to one place then.
    """
    GENERAL: tl.constexpr = TARGETS or WINDOW or PREFIX
    BANDED: tl.constexpr = TIME and not GENERAL
    splits = row_splits * tile_splits
    distance = lowest + tl.program_id(0) // splits
    tile_split = tl.program_id(0) % splits // row_splits
    program = tl.program_id(0).to(tl.int64)
    RATIO: tl.constexpr = BLOCK_M // BLOCK_N
    slot = tl.arange(0, 256)
    position_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    time_sum = tl.zeros([256], tl.float32)
    for row in range(tl.program_id(0) % row_splits, rows, row_splits):
        start, n, history, prefix_here = row_of_program(offsets, num_targets, row, prefix, TARGETS)
        scale = one_over_n(normaliser, n, history, BY_LENGTH)
        if SOFTMAX:
            scale = 1.0
        last_place = tl.minimum(history, n - 1)
        tile_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        packed, low, high, regular, value, near = 0, 0, 0, True, 0.0, False
        first_tile = tl.cdiv(tl.maximum(distance, 0), RATIO)
        end_tile = tl.minimum(tl.cdiv(n, BLOCK_M), tl.cdiv(tl.maximum(tl.cdiv(n, BLOCK_N) + distance, 0), RATIO))
        if PREFIX:
            if distance <= -RATIO:  # all keys after all queries: only within the prefix
                seen_tiles = tl.maximum(tl.cdiv(prefix_here, BLOCK_N) + distance, 0)
                end_tile = tl.minimum(end_tile, tl.cdiv(seen_tiles, RATIO))
        tiles = tl.maximum(end_tile - first_tile, 0)
        tiles = tl.cdiv(tl.maximum(tiles - tile_split, 0), tile_splits)
        for index in range(tiles * heads):
            tile = first_tile + tile_split + index // heads * tile_splits
            head = index % heads
            query = tile * BLOCK_M
            key_tile = tile * RATIO - distance
            key = key_tile * BLOCK_N
            q_tile = load_rows(
                q,
                start + query,
                start + n,
                head,
                stride_qt,
                stride_qh,
                BLOCK_M,
                DQK,
                BLOCK_DQK,
                DESCRIPTOR,
                False,
                PRECISION,
            )
            k_tile = load_rows(
                k,
                start + key,
                start + n,
                head,
                stride_kt,
                stride_kh,
                BLOCK_N,
                DQK,
                BLOCK_DQK,
                DESCRIPTOR,
                False,
                PRECISION,
            )
            grad_tile = load_rows(
                grad,
                start + query,
                start + n,
                head,
                stride_gt,
                stride_gh,
                BLOCK_M,
                DV,
                BLOCK_DV,
                DESCRIPTOR,
                False,
                PRECISION,
            )
            v_tile = load_rows(
                v,
                start + key,
                start + n,
                head,
                stride_vt,
                stride_vh,
                BLOCK_N,
                DV,
                BLOCK_DV,
                DESCRIPTOR,
                False,
                PRECISION,
            )
            i = query + tl.arange(0, BLOCK_M)
            j = key + tl.arange(0, BLOCK_N)
            if head == 0:
                tile_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                row_since, key_since = i, since
                if TIME:
                    row_since = tl.load(since + start + i, mask=i < n, other=0)
                    key_since = since + total_tokens
                    packed = tl.load(tiles_buckets + (start // BLOCK_M + row + tile) * tiles_width + key_tile)
                    low, high, regular, value = unpack_tile(packed, time_bias)
                if BANDED:
                    near = key >= first_near_key(query)
                    if near:
                        bias = load_band(band, start, n, i[:, None], j[None, :])
                if not near:
                    bias = tile_bias(
                        position_bias, position_zero, spread, time_bias, bucket_edges, band, query_time, key_time,
                        start, n, i, j, last_place, value, POSITION, TIME, GENERAL, False, False,
                        BLOCK_M, BLOCK_N, True, ASSEMBLY,
                    )  # fmt: skip
                    if BANDED:
                        if high > low:
                            bias = add_time_steps(
                                bias, time_bias, bucket_edges, row_since, key_since, query_time, key_time, start, n,
                                i, j, low, high, regular, True,
                            )  # fmt: skip
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * alpha + bias
            dp = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
            mass = tl.zeros([BLOCK_M], tl.float32)
            if SOFTMAX:
                lane = head.to(tl.int64) * total_tokens + start + i
                mass = tl.load(log_mass + lane, mask=i < n, other=0.0)
                dp -= tl.load(delta + lane, mask=i < n, other=0.0)[:, None]
            _, slopes = _weights_and_slopes(x, x, mass[:, None], False, SOFTMAX, FAST)
            tile_sum += dp * slopes
            if head == heads - 1:
                # Heads share the mask too, so it waits for their sum.
                seen = visible(i[:, None], j[None, :], history, prefix_here, window, TARGETS, WINDOW, PREFIX)
                seen = seen & (i < n)[:, None] & (j < n)[None, :]
                tile_sum = tl.where(seen, tile_sum, 0.0)
                if BANDED:
                    if near:
                        place = (start + i)[:, None] * (2 * BAND_BLOCK) + (j[None, :] - first_near_key(i)[:, None])
                        tl.store(band_gradient + place, tile_sum * scale, mask=(i < n)[:, None])
                if TIME:
                    if not near:
                        time_sum = _add_to_buckets(
                            time_sum, time_sums + program % copies * 256, tile_sum, seen, packed, low, high, scale,
                            since, query_time, key_time, bucket_edges, small_edges, start, n, i, j, total_tokens,
                            DIAGONALS, DETERMINISTIC, ASSEMBLY,
                        )  # fmt: skip
                if POSITION:
                    if TARGETS:  # their sums are taken by key, in the kernel of the keys' gradients
                        tile_sum = tl.where((i < history)[:, None], tile_sum, 0.0)
                    position_sum += tile_sum * scale
    if POSITION:
        place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        copy = program if DETERMINISTIC else program // splits
        tl.atomic_add(position_sums + copy * BLOCK_M * BLOCK_N + place, position_sum, sem="relaxed")
    if TIME:
        tl.atomic_add(time_sums + program % copies * 256 + slot, time_sum, sem="relaxed")


@triton.jit(do_not_specialize=["distances", "lowest", "position_zero"])
def diagonal_sum_kernel(
    position_sums, gradient, distances, lowest, position_zero, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dp from the tiles (distances, BLOCK_M, BLOCK_N) of position sums; grid (distances + BLOCK_M / BLOCK_N,).

    A program sums for i - j = window BLOCK_N + t, 0 <= t < BLOCK_N. In a tile `above` distances nearer, these are the
    elements whose row is above BLOCK_N + t beyond their column.
    """
    window = lowest - 1 + tl.program_id(0)
    row = tl.arange(0, BLOCK_M)[:, None]
    t = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for above in tl.static_range(-1, BLOCK_M // BLOCK_N):
        tile = window - above - lowest
        column = row - above * BLOCK_N - t[None, :]
        if (tile >= 0) & (tile < distances):
            pointers = position_sums + tile.to(tl.int64) * BLOCK_M * BLOCK_N + row * BLOCK_N + column
            total += tl.sum(tl.load(pointers, mask=(column >= 0) & (column < BLOCK_N), other=0.0), 0)
    index = position_zero - (window * BLOCK_N + t)
    tl.store(gradient + index, total, mask=(index >= 0) & (index <= 2 * position_zero))

"""Kernels that prepare the biases, once for all heads."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from .tiles import (
    BAND_BLOCK,
    HIDDEN,
    LONGEST_SPAN,
    approximate_bucket,
    buckets,
    entries,
    first_near_key,
    spread_center,
)


@triton.jit(do_not_specialize=["zero"])
def spread_kernel(position_bias, spread, zero, BLOCK: tl.constexpr):
    """The position table as `position_diagonals` reads it: zeros around it; once more, shifted by one; both reversed.

    Grid (blocks of the width,); writes (4, width) float32.
    """
    center = spread_center(zero)
    width = 2 * center + 2
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for shift in tl.static_range(2):
        entry = place + shift - (center - zero)
        inside = (entry >= 0) & (entry <= 2 * zero)
        forwards = tl.load(position_bias + entry, mask=inside, other=0.0)
        backwards = tl.load(position_bias + 2 * zero - entry, mask=inside, other=0.0)
        tl.store(spread + shift * width + place, forwards, mask=place < width)
        tl.store(spread + (2 + shift) * width + place, backwards, mask=place < width)


@triton.jit(do_not_specialize=["position_zero"])
def band_kernel(
    band, near_buckets, offsets, position_bias, time_bias, bucket_edges, query_time, key_time, position_zero,
    POSITION: tl.constexpr, BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Biases and causal mask near the diagonal: (T, 2 BAND_BLOCK), key `first_near_key(query) + column`; and the time
    buckets, uint8, zero where a query does not see the key.

    Near the diagonal a tile has many buckets. Here each element's is computed once, for all heads and for all kernels
    of both passes. Grid (tiles of BLOCK queries, rows).
    """
    start = tl.load(offsets + tl.program_id(1))
    n = (tl.load(offsets + tl.program_id(1) + 1) - start).to(tl.int32)
    first = tl.program_id(0) * BLOCK
    i = first + tl.arange(0, BLOCK)
    if first < n:
        query_times = tl.load(query_time + start + i, mask=i < n, other=0)[:, None]
        for chunk in range(0, 2 * BAND_BLOCK, BAND_BLOCK):
            j = first_near_key(first) + chunk + tl.arange(0, BAND_BLOCK)
            value = tl.full([BLOCK, BAND_BLOCK], HIDDEN, tl.float32)
            bucket = tl.zeros([BLOCK, BAND_BLOCK], tl.int32)
            if first_near_key(first) + chunk >= 0:
                key_times = tl.load(key_time + start + j, mask=j < n, other=0)[None, :]
                bucket = buckets(query_times, key_times, bucket_edges, ASSEMBLY)
                bias = entries(time_bias, bucket, ASSEMBLY)
                if POSITION:
                    index = tl.maximum(j[None, :] - tl.minimum(i, n - 1)[:, None] + position_zero, 0)
                    bias += tl.load(position_bias + tl.minimum(index, 2 * position_zero))
                value = tl.where(j[None, :] <= i[:, None], bias, HIDDEN)
                bucket = tl.where(j[None, :] <= i[:, None], bucket, 0)
            place = (start + i)[:, None] * (2 * BAND_BLOCK) + (chunk + tl.arange(0, BAND_BLOCK))[None, :]
            tl.store(band + place, value.to(band.dtype.element_ty), mask=(i < n)[:, None])
            tl.store(near_buckets + place, bucket.to(tl.uint8), mask=(i < n)[:, None])


@triton.jit(do_not_specialize=["copies"])
def band_gradient_kernel(
    band_gradient, near_buckets, time_sums, offsets, copies, BLOCK: tl.constexpr, DETERMINISTIC: tl.constexpr
):  # fmt: skip
    """Adds the gradients of the band's biases, (T, 2 BAND_BLOCK) float32 and written where a query sees the key, to
    bucket sums (copies, 256).

    Times are sorted in most rows, so that a query's keys of one bucket stand side by side: where a run of equal
    buckets ends, the sum of its group of 16 keys up to there is added to this bucket, and taken from the next. (Over
    longer groups, rounding errors of the sum would show in the difference.) Grid (tiles of BLOCK queries, rows).
    DETERMINISTIC takes a pass over the tile a bucket instead, and a copy a program.
    """
    row, tile = tl.program_id(1), tl.program_id(0)
    start = tl.load(offsets + row)
    n = (tl.load(offsets + row + 1) - start).to(tl.int32)
    first = tile * BLOCK
    if first < n:
        program = row.to(tl.int64) * tl.num_programs(0) + tile
        sums = time_sums + (program % copies) * 256
        i = first + tl.arange(0, BLOCK)
        column = tl.arange(0, 2 * BAND_BLOCK)
        key = (first_near_key(i))[:, None] + column[None, :]
        seen = (key >= 0) & (key <= i[:, None]) & (i < n)[:, None]
        place = (start + i)[:, None] * (2 * BAND_BLOCK) + column[None, :]
        gradient = tl.load(band_gradient + place, mask=seen, other=0.0)
        bucket = tl.load(near_buckets + place, mask=seen, other=0).to(tl.int32)
        if DETERMINISTIC:
            slot = tl.arange(0, 256)
            total = tl.zeros([256], tl.float32)
            for index in range(tl.max(bucket) + 1):
                total += tl.where(slot == index, tl.sum(tl.where(bucket == index, gradient, 0.0)), 0.0)
            tl.store(sums + slot, total)
        else:
            within = seen & (key < i[:, None]) & (column % 16 < 15)[None, :]
            following = tl.load(near_buckets + place + 1, mask=within, other=0).to(tl.int32)
            groups = tl.reshape(gradient, [BLOCK, 2 * BAND_BLOCK // 16, 16])
            total = tl.reshape(tl.cumsum(groups, 2), [BLOCK, 2 * BAND_BLOCK])
            tl.atomic_add(sums + bucket, total, mask=seen & ((bucket != following) | ~within), sem="relaxed")
            tl.atomic_add(sums + following, -total, mask=within & (bucket != following), sem="relaxed")


@triton.jit(do_not_specialize=["tokens"])
def relative_time_kernel(
    query_time, key_time, offsets, since, query_ranges, key_ranges, tokens,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Times since the row's first key, (2, T) int32, queries' and keys', cut at LONGEST_SPAN; and their least and
    greatest in tiles of BLOCK_M queries and of BLOCK_N keys, (slots, 2) int32.

    A row's tiles start at slot offset // BLOCK_M + row, which leaves each row room enough. Grid (tiles of BLOCK, rows).
    """
    row, tile = tl.program_id(1), tl.program_id(0)
    start = tl.load(offsets + row)
    n = tl.load(offsets + row + 1) - start
    i = tile * BLOCK + tl.arange(0, BLOCK)
    if tile * BLOCK < n:
        origin = tl.load(key_time + start)
        query_since = _cut(tl.load(query_time + start + i, mask=i < n, other=0) - origin)
        key_since = _cut(tl.load(key_time + start + i, mask=i < n, other=0) - origin)
        tl.store(since + start + i, query_since, mask=i < n)
        tl.store(since + tokens + start + i, key_since, mask=i < n)
        _store_ranges(query_ranges, query_since, start, n, row, tile, BLOCK_M, BLOCK)
        _store_ranges(key_ranges, key_since, start, n, row, tile, BLOCK_N, BLOCK)


@triton.jit
def _cut(seconds):
    return tl.minimum(tl.maximum(seconds, -LONGEST_SPAN), LONGEST_SPAN).to(tl.int32)


@triton.jit
def _store_ranges(ranges, since, start, n, row, tile, SIZE, BLOCK):
    """Least and greatest of every SIZE of the BLOCK values."""
    i = tile * BLOCK + tl.arange(0, BLOCK)
    parts = tl.arange(0, BLOCK // SIZE)
    slots = start // SIZE + row + tile * (BLOCK // SIZE) + parts
    inside = tile * BLOCK + parts * SIZE < n
    low = tl.min(tl.reshape(tl.where(i < n, since, LONGEST_SPAN), [BLOCK // SIZE, SIZE]), 1)
    high = tl.max(tl.reshape(tl.where(i < n, since, -LONGEST_SPAN), [BLOCK // SIZE, SIZE]), 1)
    tl.store(ranges + 2 * slots, low, mask=inside)
    tl.store(ranges + 2 * slots + 1, high, mask=inside)


@triton.jit(do_not_specialize=["width"])
def tile_bucket_kernel(
    offsets, query_ranges, key_ranges, tiles, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Which buckets a tile of BLOCK_M queries and BLOCK_N keys has: (query tile slots, width) int32.

    An entry packs the first, the last (8 bits each), whether no query is before a key (a bit, only with the next),
    and whether the int32 times since the row's first key were not cut. One entry for some thousands of scores.
    Grid (chunks of key tiles x query tiles of the longest row, rows).
    """
    chunks = tl.cdiv(width, BLOCK)
    row, tile, chunk = tl.program_id(1), tl.program_id(0) // chunks, tl.program_id(0) % chunks
    start = tl.load(offsets + row)
    n = tl.load(offsets + row + 1) - start
    if tile * BLOCK_M < n:
        slot = start // BLOCK_M + row + tile
        query_low, query_high = tl.load(query_ranges + 2 * slot), tl.load(query_ranges + 2 * slot + 1)
        key_tile = chunk * BLOCK + tl.arange(0, BLOCK)
        pointers = key_ranges + 2 * (start // BLOCK_N + row + key_tile)
        inside = key_tile * BLOCK_N < n
        key_low, key_high = tl.load(pointers, mask=inside, other=0), tl.load(pointers + 1, mask=inside, other=0)
        near = tl.maximum(tl.maximum(query_low - key_high, key_low - query_high), 0).to(tl.float32)
        far = tl.maximum(tl.maximum(query_high - key_low, key_high - query_low), 0).to(tl.float32)
        # Wider by more than the errors of logarithm and conversion, so that an element at an edge is counted in.
        first = approximate_bucket(near * (1 - 1e-5), ASSEMBLY)
        last = approximate_bucket(far * (1 + 1e-5), ASSEMBLY)
        whole = (tl.minimum(key_low, query_low) > -LONGEST_SPAN) & (tl.maximum(key_high, query_high) < LONGEST_SPAN)
        first, last = tl.where(whole, first, 0), tl.where(whole, last, 128)
        flags = 65536 * (whole & (query_low >= key_high)).to(tl.int32) + 131072 * whole.to(tl.int32)
        tl.store(tiles + slot * width + key_tile, first + 256 * last + flags, mask=key_tile < width)

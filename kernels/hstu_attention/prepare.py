"""What is made of the bias tables and times before a pass, once for all heads: README.md draws it."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .arguments import Tables
from .assembly import approximate_bucket, entries
from .bias_tiles import (
    BAND_BLOCK,
    LONGEST_SPAN,
    PADDING,
    exact_bucket,
    first_near_key,
    spread_center,
    stored_hidden,
)
from .inputs import Inputs, bucket_edges, launch_grid
from .tiles import sequence_id

#: Queries of a program near the diagonal, beside 128 or 256 keys: 64-bit times and sums along a row take many
#: registers.
BAND_TILE = 8


@triton.jit(do_not_specialize=["zero"])
def spread_kernel(position_bias, spread, zero, BLOCK: tl.constexpr):
    """The position table as `position_diagonals` reads it: zeros around it; once more, shifted by one; both reversed.

    Grid (blocks of the width,); writes (4, width) float32.
    """
    center = spread_center(zero)
    width = 2 * center + 2
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for shift in tl.static_range(2):
        entry = index + shift - (center - zero)
        inside = (entry >= 0) & (entry <= 2 * zero)
        forwards = tl.load(position_bias + entry, mask=inside, other=0.0)
        backwards = tl.load(position_bias + 2 * zero - entry, mask=inside, other=0.0)
        tl.store(spread + shift * width + index, forwards, mask=index < width)
        tl.store(spread + (2 + shift) * width + index, backwards, mask=index < width)


@triton.jit(do_not_specialize=["position_zero"])
def band_kernel(
    band, near_buckets, offsets, position_bias, time_bias, edges, query_time, key_time, position_zero,
    POSITION: tl.constexpr, BLOCK: tl.constexpr, INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """Biases and causal mask near the diagonal: (T, 2 BAND_BLOCK), key `first_near_key(query) + column`; and the time
    buckets, uint8, zero where a query does not see the key.

    Near the diagonal a tile has many buckets. Here each element's is computed once, for all heads and for all kernels
    of both passes. Grid: tiles of BLOCK queries of `launch_grid`.
    """
    STORED: tl.constexpr = stored_hidden(band.dtype.element_ty)
    index = sequence_id()
    start = tl.load(offsets + index)
    n = (tl.load(offsets + index + 1) - start).to(tl.int32)
    first = tl.program_id(0) * BLOCK
    i = first + tl.arange(0, BLOCK)
    if first < n:
        query_times = tl.load(query_time + start + i, mask=i < n, other=0)[:, None]
        for chunk in range(0, 2 * BAND_BLOCK, BAND_BLOCK):
            j = first_near_key(first) + chunk + tl.arange(0, BAND_BLOCK)
            value = tl.full([BLOCK, BAND_BLOCK], STORED, tl.float32)
            bucket = tl.zeros([BLOCK, BAND_BLOCK], tl.int32)
            if first_near_key(first) + chunk >= 0:
                key_times = tl.load(key_time + start + j, mask=j < n, other=0)[None, :]
                bucket = exact_bucket(query_times - key_times, edges, INLINE_ASM)
                bias = entries(time_bias, bucket, INLINE_ASM)
                if POSITION:
                    entry = tl.maximum(j[None, :] - tl.minimum(i, n - 1)[:, None] + position_zero, 0)
                    bias += tl.load(position_bias + tl.minimum(entry, 2 * position_zero))
                value = tl.where(j[None, :] <= i[:, None], bias, STORED)
                bucket = tl.where(j[None, :] <= i[:, None], bucket, 0)
            slot = (start + i)[:, None] * (2 * BAND_BLOCK) + (chunk + tl.arange(0, BAND_BLOCK))[None, :]
            tl.store(band + slot, value.to(band.dtype.element_ty), mask=(i < n)[:, None])
            tl.store(near_buckets + slot, bucket.to(tl.uint8), mask=(i < n)[:, None])


@triton.jit
def add_runs(sums, gradient, bucket, buckets, seen, before, column, BLOCK):
    """Adds gradients of the band's biases, (BLOCK, 2 BAND_BLOCK), to bucket sums (256,).

    Times are sorted in most sequences, so that a query's keys of one bucket stand side by side: where a run of equal
    buckets ends, the sum of its group of 16 keys up to there is added to this bucket, and taken from the next. (Over
    longer groups, rounding errors of the sum would show in the difference.) `buckets` are pointers of `bucket`;
    `before`: where the next key is one that the query sees.
    """
    within = seen & before & (column % 16 < 15)[None, :]
    following = tl.load(buckets + 1, mask=within, other=0).to(tl.int32)
    groups = tl.reshape(gradient, [BLOCK, 2 * BAND_BLOCK // 16, 16])
    total = tl.reshape(tl.cumsum(groups, 2), [BLOCK, 2 * BAND_BLOCK])
    tl.atomic_add(sums + bucket, total, mask=seen & ((bucket != following) | ~within), sem="relaxed")
    tl.atomic_add(sums + following, -total, mask=within & (bucket != following), sem="relaxed")


@triton.jit(do_not_specialize=["copies"])
def band_gradient_kernel(
    band_gradient, near_buckets, time_sums, offsets, copies, BLOCK: tl.constexpr, DETERMINISTIC: tl.constexpr
):  # fmt: skip
    """Adds the gradients of the band's biases, (T, 2 BAND_BLOCK) float32 and written where a query sees the key, to
    bucket sums (copies, 256).

    DETERMINISTIC takes a pass over the tile a bucket instead of `add_runs`, and a copy a program. Grid: tiles of BLOCK
    queries of `launch_grid`.
    """
    index, tile = sequence_id(), tl.program_id(0)
    start = tl.load(offsets + index)
    n = (tl.load(offsets + index + 1) - start).to(tl.int32)
    first = tile * BLOCK
    if first < n:
        program = index.to(tl.int64) * tl.num_programs(0) + tile
        sums = time_sums + (program % copies) * 256
        i = first + tl.arange(0, BLOCK)
        column = tl.arange(0, 2 * BAND_BLOCK)
        key = (first_near_key(i))[:, None] + column[None, :]
        seen = (key >= 0) & (key <= i[:, None]) & (i < n)[:, None]
        pair = (start + i)[:, None] * (2 * BAND_BLOCK) + column[None, :]
        gradient = tl.load(band_gradient + pair, mask=seen, other=0.0)
        bucket = tl.load(near_buckets + pair, mask=seen, other=0).to(tl.int32)
        if DETERMINISTIC:
            slot = tl.arange(0, 256)
            total = tl.zeros([256], tl.float32)
            for one in range(tl.max(bucket) + 1):
                total += tl.where(slot == one, tl.sum(tl.where(bucket == one, gradient, 0.0)), 0.0)
            tl.store(sums + slot, total)
        else:
            add_runs(sums, gradient, bucket, near_buckets + pair, seen, key < i[:, None], column, BLOCK)


@triton.jit(do_not_specialize=["tokens"])
def relative_time_kernel(
    query_time, key_time, offsets, key_offsets, since, query_ranges, key_ranges, in_tiles, cut, tokens,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Times since the sequence's first key, int32, cut at LONGEST_SPAN: the queries', and from `tokens` on the keys';
    and their least and greatest in tiles of BLOCK_M queries and of BLOCK_N keys, (slots, 2) int32.

    The tiles of sequence b start at slot s // BLOCK_M + b, where s is its first key, which leaves each sequence room
    enough: both sides count by the keys' positions (`Sequence`). `in_tiles` (slots, BLOCK_M) int32, if given, are the
    queries' times once more, in their slots; and `cut` (sequences,) int32, zero before, is set where a sequence has
    times that were cut.
    Grid: tiles of BLOCK of `launch_grid`.
    """
    index, tile = sequence_id(), tl.program_id(0)
    start, key_start, first, n = _sides(offsets, key_offsets, index)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    if tile * BLOCK < n:
        origin = tl.load(key_time + key_start)
        query = (i >= first) & (i < n)
        query_since = _cut(tl.load(query_time + start + i, mask=query, other=0) - origin)
        key_since = _cut(tl.load(key_time + key_start + i, mask=i < n, other=0) - origin)
        tl.store(since + start + i, query_since, mask=query)
        tl.store(since + tokens + key_start + i, key_since, mask=i < n)
        if in_tiles is not None:
            tl.store(in_tiles + (start // BLOCK_M + index) * BLOCK_M + i, query_since, mask=i < n)
            far = tl.maximum(tl.abs(query_since), tl.abs(key_since)) >= LONGEST_SPAN
            if tl.max((far & (i < n)).to(tl.int32)) > 0:
                tl.store(cut + index, 1)
        _store_ranges(query_ranges, query_since, query, n, key_start // BLOCK_M + index, tile, BLOCK_M, BLOCK)
        _store_ranges(key_ranges, key_since, i < n, n, key_start // BLOCK_N + index, tile, BLOCK_N, BLOCK)


@triton.jit
def _sides(offsets, key_offsets, index):
    """Of a sequence: the tokens of a query and of a key at position 0, the first query's position, and the length."""
    start = tl.load(offsets + index)
    n = tl.load(offsets + index + 1) - start
    key_start, first = start, n * 0
    if key_offsets is not None:
        queries = n
        key_start = tl.load(key_offsets + index)
        n = tl.load(key_offsets + index + 1) - key_start
        first = tl.maximum(n - queries, 0)
        start = start + queries - n
    return start, key_start, first, n


@triton.jit
def _cut(seconds):
    return tl.minimum(tl.maximum(seconds, -LONGEST_SPAN), LONGEST_SPAN).to(tl.int32)


@triton.jit
def _store_ranges(ranges, since, there, n, slot, tile, SIZE, BLOCK):
    """Least and greatest of every SIZE of the BLOCK values that are there; the sequence's first go to `slot`."""
    parts = tl.arange(0, BLOCK // SIZE)
    slots = slot + tile * (BLOCK // SIZE) + parts
    inside = tile * BLOCK + parts * SIZE < n
    low = tl.min(tl.reshape(tl.where(there, since, LONGEST_SPAN), [BLOCK // SIZE, SIZE]), 1)
    high = tl.max(tl.reshape(tl.where(there, since, -LONGEST_SPAN), [BLOCK // SIZE, SIZE]), 1)
    tl.store(ranges + 2 * slots, low, mask=inside)
    tl.store(ranges + 2 * slots + 1, high, mask=inside)


@triton.jit(do_not_specialize=["width"])
def tile_bucket_kernel(
    offsets, key_offsets, query_ranges, key_ranges, tiles, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """Which buckets a tile of BLOCK_M queries and BLOCK_N keys has: (query tile slots, width) int32.

    An entry packs the first, the last (8 bits each), whether no query is before a key (a bit, only with the next),
    and whether the int32 times since the sequence's first key were not cut. One entry for some thousands of scores.
    Grid: chunks of key tiles x query tiles of the longest sequence of `launch_grid`.
    """
    chunks = tl.cdiv(width, BLOCK)
    index, tile, chunk = sequence_id(), tl.program_id(0) // chunks, tl.program_id(0) % chunks
    _, start, first_query, n = _sides(offsets, key_offsets, index)
    if (tile * BLOCK_M < n) & ((tile + 1) * BLOCK_M > first_query):
        slot = start // BLOCK_M + index + tile
        query_low, query_high = tl.load(query_ranges + 2 * slot), tl.load(query_ranges + 2 * slot + 1)
        key_tile = chunk * BLOCK + tl.arange(0, BLOCK)
        pointers = key_ranges + 2 * (start // BLOCK_N + index + key_tile)
        inside = key_tile * BLOCK_N < n
        key_low, key_high = tl.load(pointers, mask=inside, other=0), tl.load(pointers + 1, mask=inside, other=0)
        near = tl.maximum(tl.maximum(query_low - key_high, key_low - query_high), 0).to(tl.float32)
        far = tl.maximum(tl.maximum(query_high - key_low, key_high - query_low), 0).to(tl.float32)
        # Wider by more than the errors of logarithm and conversion, so that an element at an edge is counted in.
        first = approximate_bucket(near * (1 - 1e-5), INLINE_ASM)
        last = approximate_bucket(far * (1 + 1e-5), INLINE_ASM)
        whole = (tl.minimum(key_low, query_low) > -LONGEST_SPAN) & (tl.maximum(key_high, query_high) < LONGEST_SPAN)
        first, last = tl.where(whole, first, 0), tl.where(whole, last, 128)
        flags = 65536 * (whole & (query_low >= key_high)).to(tl.int32) + 131072 * whole.to(tl.int32)
        tl.store(tiles + slot * width + key_tile, first + 256 * last + flags, mask=key_tile < width)


class TileBuckets(NamedTuple):
    """What kernels with tiles of so many queries and keys read of the times; empty where there are none."""

    since: torch.Tensor  # (T + T') int32
    tiles: torch.Tensor  # (query tile slots, key tiles) int32


class Needs(NamedTuple):
    """What decides the shapes of `Handed`."""

    position_zero: int | None  # None without a position bias
    timed: bool  # there is a time bias
    causal: bool  # under the causal mask alone
    targets: bool
    block_m: int  # of the forward kernel
    block_n: int


class Handed(NamedTuple):
    """What the forward pass hands over to the backward pass; empty tensors for what a call does not need.

    The last three take 16 bytes a (2P - 1), 8 bytes a token, and 4 bytes a tile, beside 768 bytes a token of the first
    two; made a second time they would take three launches.
    """

    band: torch.Tensor  # (T, 2 BAND_BLOCK)
    near_buckets: torch.Tensor  # (T, 2 BAND_BLOCK) uint8
    spread: torch.Tensor  # (4, width) float32
    since: torch.Tensor
    tiles: torch.Tensor  # for the forward kernel's tiles; the backward kernels mostly have the same

    @classmethod
    def empty(cls, q: torch.Tensor, k: torch.Tensor, offsets: torch.Tensor, max_len: int, needs: "Needs") -> "Handed":
        """Room for what a call needs. Symbolic sizes remain so."""
        tokens = q.shape[0]
        band = q.new_empty(tokens if needs.timed and needs.causal else 0, 2 * BAND_BLOCK.value)
        near_buckets = torch.empty_like(band, dtype=torch.uint8)
        spread = q.new_empty(0, 0, dtype=torch.float32)
        if needs.position_zero is not None and not needs.targets:
            spread = q.new_empty(4, spread_width(needs.position_zero), dtype=torch.float32)
        since, tiles = q.new_empty(0, dtype=torch.int32), q.new_empty(0, 0, dtype=torch.int32)
        if needs.timed:
            since = q.new_empty(tokens + k.shape[0], dtype=torch.int32)
            slots = k.shape[0] // needs.block_m + offsets.shape[0]
            tiles = q.new_empty(slots, (max_len + needs.block_n - 1) // needs.block_n, dtype=torch.int32)
        return cls(band, near_buckets, spread, since, tiles)


def spread_width(zero: int) -> int:
    """Entries of one of the four copies in a spread table."""
    return 2 * (zero + PADDING.value + zero % 2) + 2


def spread_table(position_bias: torch.Tensor) -> torch.Tensor:
    """(4, width) float32 of (2P - 1,) float32: what `spread_kernel` makes."""
    spread = position_bias.new_empty(4, spread_width((len(position_bias) - 1) // 2))
    _fill_spread(position_bias, spread)
    return spread


def _fill_spread(position_bias: torch.Tensor, spread: torch.Tensor) -> None:
    zero = (len(position_bias) - 1) // 2
    spread_kernel[(triton.cdiv(spread.shape[1], 256),)](position_bias, spread, zero, BLOCK=256)


class BiasTables:
    """The tables of one call, made at the first need, or, in the backward pass, handed over."""

    def __init__(self, inputs: Inputs, handed: Handed | None = None) -> None:
        self.inputs = inputs
        config = inputs.configuration("forward")
        blocks = config["block_m"], config["block_n"]
        self.handed = handed or self._make(*blocks)
        self._tile_buckets = {blocks: TileBuckets(self.handed.since, self.handed.tiles)}

    def tables(self, block_m: int, block_n: int) -> tuple[Tables, int]:
        """The kernels' argument, for tiles of block_m queries and block_n keys; and the width of its `tiles`."""
        inputs, handed = self.inputs, self.handed
        since, tiles = self.tile_buckets(block_m, block_n)
        pointers = Tables(
            inputs.position_bias, _present(handed.spread), inputs.time_bias,
            bucket_edges(inputs.q.device) if inputs.timed else None, _present(handed.band), inputs.query_time,
            inputs.key_time, _present(since), _present(tiles),
        )  # fmt: skip
        return pointers, tiles.shape[1] if inputs.timed else 0

    def tile_buckets(self, block_m: int, block_n: int) -> TileBuckets:
        if (block_m, block_n) not in self._tile_buckets:
            since, tiles = self.handed.since, self.handed.tiles
            if self.inputs.timed:
                slots = len(self.inputs.k) // block_m + self.inputs.num_sequences + 1
                tiles = tiles.new_empty(slots, triton.cdiv(self.inputs.max_len, block_n))
                since = torch.empty_like(since)
                self.fill_tiles(block_m, block_n, since, len(self.inputs.q), tiles)
            self._tile_buckets[block_m, block_n] = TileBuckets(since, tiles)
        return self._tile_buckets[block_m, block_n]

    def _make(self, block_m: int, block_n: int) -> Handed:
        inputs = self.inputs
        zero = None if inputs.position_bias is None else inputs.position_zero
        needs = Needs(zero, inputs.timed, not inputs.general, inputs.num_targets is not None, block_m, block_n)
        handed = Handed.empty(inputs.q, inputs.k, inputs.offsets[: inputs.num_sequences + 1], inputs.max_len, needs)
        if not len(inputs.q) or not inputs.max_len:
            return handed
        if inputs.position_bias is not None and handed.spread.numel():
            _fill_spread(inputs.position_bias, handed.spread)
        if handed.band.numel():
            band_kernel[launch_grid(triton.cdiv(inputs.max_len, BAND_TILE), inputs.num_sequences)](
                handed.band, handed.near_buckets, inputs.offsets, inputs.position_bias, inputs.time_bias,
                bucket_edges(inputs.q.device), inputs.query_time, inputs.key_time, inputs.position_zero,
                POSITION=inputs.position_bias is not None, BLOCK=BAND_TILE, INLINE_ASM=inputs.q.is_cuda,
            )  # fmt: skip
        if inputs.timed:
            self.fill_tiles(block_m, block_n, handed.since, len(inputs.q), handed.tiles)
        return handed

    def fill_tiles(
        self,
        block_m: int,
        block_n: int,
        since: torch.Tensor,
        first_key: int,
        tiles: torch.Tensor,
        in_tiles: torch.Tensor | None = None,
        cut: torch.Tensor | None = None,
    ) -> None:
        """Writes `TileBuckets`' tensors, keys' times from `first_key` on; and, for Hopper, what `relative_time_kernel`
        says of the other two."""
        inputs = self.inputs
        query_ranges = since.new_empty(len(tiles), 2)
        key_ranges = since.new_empty(len(inputs.k) // block_n + inputs.num_sequences + 1, 2)
        block, width = max(block_m, block_n), tiles.shape[1]
        relative_time_kernel[launch_grid(triton.cdiv(inputs.max_len, block), inputs.num_sequences)](
            inputs.query_time, inputs.key_time, inputs.offsets, inputs.key_offsets, since, query_ranges, key_ranges,
            in_tiles, cut, first_key, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK=block,
        )  # fmt: skip
        programs = triton.cdiv(inputs.max_len, block_m) * triton.cdiv(width, 32)
        tile_bucket_kernel[launch_grid(programs, inputs.num_sequences)](
            inputs.offsets, inputs.key_offsets, query_ranges, key_ranges, tiles, width,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK=32, INLINE_ASM=inputs.q.is_cuda,
        )  # fmt: skip


def _present(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor if tensor.numel() else None

"""The bias of one tile of scores, as README.md draws it.

Tiles are (queries, keys) or, in the backward pass over keys, (keys, queries): what belongs to a tile's rows and columns
comes as two `Side`s, so that one function serves both.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from .arguments import Buckets
from .assembly import approximate_bucket, diagonal_entries, entries

#: Zeros on both sides of a spread position table: tiles may reach this far beyond a sequence.
PADDING = tl.constexpr(256)
#: Queries of one block of this many see the biases of keys in their block and the one before through the band.
BAND_BLOCK = tl.constexpr(128)
#: The band's mask: a bias that makes silu and its derivative zero, exactly, and softmax's weight. Any score is small
#: beside it; and it is finite, since silu of minus infinity is no number.
HIDDEN = tl.constexpr(-1e30)
#: Times since their sequence's first key are cut here, at 17 years; a tile that has any such compares the times
#: themselves. Two of them are up to 2^30 apart, and so is the edge of a bucket, whose sum with one of them must fit 32
#: bits.
LONGEST_SPAN = tl.constexpr(1 << 29)


@triton.jit
def times_since(since, start, position, there, FLAGS):
    """Times since the first key of the tile that a program keeps: of the tokens from `start` on at positions that are
    there; without times, whatever."""
    values = position
    if FLAGS.TIME:
        values = tl.load(since + start + position, mask=there, other=0)
    return values


@triton.jit
def tile_bias(
    bias, sequence, rows, columns, w_first, ROWS, COLUMNS, FLAGS, NEAR, STEPS, MMA_LAYOUT, ROWS_ARE_QUERIES
):  # fmt: skip
    """What a tile's scores start from, (ROWS, COLUMNS). Taken before the product, so that its loads are under
    way meanwhile.

    NEAR the diagonal, under the causal mask alone and with times: the whole bias and the mask, from the band. Else
    positions, and the bias of times: STEPS, `w_first`, w of the tile's first bucket, to which `add_time_steps` adds; or
    element by element.
    """
    row, column = tl.expand_dims(rows.position, 1), tl.expand_dims(columns.position, 0)
    query, key = row, column
    if not ROWS_ARE_QUERIES:
        query, key = column, row
    if NEAR:
        x = load_band(bias.tables.band, sequence, query, key)
    else:
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        if FLAGS.POSITION:
            # Targets all stand at one position.
            if MMA_LAYOUT and (not FLAGS.GENERAL or (STEPS and not FLAGS.TARGETS)):
                x = position_diagonals(
                    bias.tables.spread, bias.position_zero, row, column, COLUMNS, ROWS_ARE_QUERIES, FLAGS.INLINE_ASM
                )
            else:
                x = position_entries(bias, sequence, query, key, FLAGS)
        if FLAGS.TIME:
            if STEPS:
                x += w_first
            else:
                row_times, column_times = _times(rows, columns, sequence, ROWS_ARE_QUERIES, FLAGS)
                bucket = exact_bucket(row_times - column_times, bias.tables.edges, FLAGS.INLINE_ASM)
                x += entries(bias.tables.time, bucket, FLAGS.INLINE_ASM)
    return x


@triton.jit
def _tokens(rows, columns, sequence, ROWS_ARE_QUERIES, FLAGS):
    """Of a tile's rows (R, 1) and columns (1, C): their tokens, and where these are there."""
    row, column = tl.expand_dims(rows.position, 1), tl.expand_dims(columns.position, 0)
    row_start, column_start = sequence.start, sequence.start
    row_inside, column_inside = row < sequence.n, column < sequence.n
    if FLAGS.KEY_OFFSETS:
        if ROWS_ARE_QUERIES:
            column_start = sequence.key_start
            row_inside = row_inside & (row >= sequence.first)
        else:
            row_start = sequence.key_start
            column_inside = column_inside & (column >= sequence.first)
    return row_start + row, row_inside, column_start + column, column_inside


@triton.jit
def _times(rows, columns, sequence, ROWS_ARE_QUERIES, FLAGS):
    """int64 times of a tile's rows (R, 1) and columns (1, C)."""
    row, row_inside, column, column_inside = _tokens(rows, columns, sequence, ROWS_ARE_QUERIES, FLAGS)
    row_times = tl.load(rows.time + row, mask=row_inside, other=0)
    return row_times, tl.load(columns.time + column, mask=column_inside, other=0)


@triton.jit
def position_entries(bias, sequence, i, j, FLAGS):
    """p[j - i], element by element, of tokens clamped to where the sequence's last one stands: targets all stand there,
    and tokens beyond the sequence, which are masked, must not read beyond the table."""
    last = tl.minimum(sequence.history, sequence.n - 1)
    index = tl.minimum(j, last) - tl.minimum(i, last) + bias.position_zero
    return entries(bias.tables.position, index, FLAGS.INLINE_ASM)


@triton.jit
def spread_center(zero):
    """Where p[0] stands in a spread table: even, with at least PADDING entries more than the table has before it."""
    return zero + PADDING + (zero & 1)


@triton.jit
def position_diagonals(spread, zero, row, column, COLUMNS, ROWS_ARE_QUERIES, INLINE_ASM, TRIAL=False):
    """p[key - query] for a tile of rows and columns as Hopper's tensor cores lay it out, from `spread_kernel`'s table.

    A lookup an element takes about as many instructions as all else that an element needs (10.0 instead of 5.3 in a
    (128, 64) tile); this takes a third of a load.
    In odd rows a pair's first entry has an odd index, which lies on 8 bytes in the shifted copy.
    """
    center = spread_center(zero)
    odd = row & 1
    copy = odd if ROWS_ARE_QUERIES else odd + 2
    base = spread + copy.to(tl.int64) * (2 * center + 2) + (center - row - odd)
    return diagonal_entries(base, column, COLUMNS, INLINE_ASM, TRIAL)


@triton.jit
def exact_bucket(seconds, edges, INLINE_ASM):
    """bucket(seconds), exactly, either sign: an approximate one, moved by the edges on its two sides.

    `edges` (130,): the least second of every bucket, then the largest number; int64, or, for int32 seconds, which take
    half the registers, int32 and cut at the largest of these.
    """
    seconds = tl.abs(seconds)
    bucket = approximate_bucket(seconds.to(tl.float32), INLINE_ASM)
    up = seconds >= entries(edges, bucket + 1, INLINE_ASM)
    down = seconds < entries(edges, bucket, INLINE_ASM)
    return bucket + up.to(tl.int32) - down.to(tl.int32)


@triton.jit
def unpack_tile(packed, table):
    """The buckets of a tile from its entry in the table that `tile_bucket_kernel` wrote."""
    first = packed & 255
    return Buckets(first, (packed >> 8) & 255, (packed >> 16) & 1 == 1, tl.load(table + first))


@triton.jit
def past_edge(row_since, column_since, edge, ROWS_ARE_QUERIES):
    """Where query_time - key_time >= edge, for a tile of rows and columns: one comparison an element."""
    if ROWS_ARE_QUERIES:
        past = column_since <= row_since - edge
    else:
        past = column_since >= row_since + edge
    return past


@triton.jit
def add_time_steps(x, tables, sequence, rows, columns, buckets, ROWS_ARE_QUERIES, FLAGS):
    """x + w[bucket(query_time - key_time)] - w[first] for a tile whose buckets are first to last.

    Buckets grow by 35 % each, so a tile far from the diagonal has one or a few. At each edge between two the bias
    takes a step. Tiles of sequences that are not sorted, or span more than 17 years, compare the times themselves.
    `rows` have their times since the first key, `columns` a pointer of theirs.
    """
    if not buckets.regular:
        row_times, column_times = _times(rows, columns, sequence, ROWS_ARE_QUERIES, FLAGS)
        for bucket in range(buckets.first + 1, buckets.last + 1):
            edge = tl.load(tables.edges + bucket)
            past = (column_times <= row_times - edge) | (column_times >= row_times + edge)
            x += tl.where(past, tl.load(tables.time + bucket) - tl.load(tables.time + bucket - 1), 0.0)
    else:
        _, _, column, column_inside = _tokens(rows, columns, sequence, ROWS_ARE_QUERIES, FLAGS)
        row_since = tl.expand_dims(rows.since, 1)
        column_since = tl.load(columns.since + column, mask=column_inside, other=0)
        for bucket in range(buckets.first + 1, buckets.last + 1):
            past = past_edge(row_since, column_since, tl.load(tables.edges + bucket).to(tl.int32), ROWS_ARE_QUERIES)
            x += tl.where(past, tl.load(tables.time + bucket) - tl.load(tables.time + bucket - 1), 0.0)
    return x


@triton.jit
def first_near_key(query):
    """The first key whose bias a query finds in the band: that of the block of queries before its own."""
    return query // BAND_BLOCK * BAND_BLOCK - BAND_BLOCK


@triton.constexpr_function
def stored_hidden(dtype):
    """HIDDEN as a band of a type holds it: float16 ends at 65,504, so there it is infinite."""
    return float("-inf") if dtype == tl.float16 else HIDDEN.value


@triton.jit
def band_pointers(band, sequence, query, key):
    """Where a band (T, 2 BAND_BLOCK) has what belongs to queries and keys, expanded to a tile."""
    return band + (sequence.start + query) * (2 * BAND_BLOCK) + (key - first_near_key(query))


@triton.jit
def load_band(band, sequence, query, key):
    """The biases of queries and keys; HIDDEN beyond the sequence."""
    pointers = band_pointers(band, sequence, query, key)
    STORED: tl.constexpr = stored_hidden(band.dtype.element_ty)
    return tl.load(pointers, mask=query < sequence.n, other=STORED).to(tl.float32)


@triton.jit
def finite(x, band):
    """Scores with the band's biases, of which float16 ones hide with minus infinity: silu needs a finite number. After
    the product, as a tile of the band would take more shared memory on its way through registers."""
    if band.dtype.element_ty == tl.float16:
        x = tl.maximum(x, HIDDEN, propagate_nan=tl.PropagateNan.ALL)
    return x

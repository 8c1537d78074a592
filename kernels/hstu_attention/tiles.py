"""What the attention kernels do with one tile of queries i and keys j: load it, mask it, add its bias, weigh it.

Tiles are (queries, keys) or, in the backward pass over keys, (keys, queries): index vectors come expanded, so
that one function serves both. Positions are places within a row. Targets, a row's last tokens, all stand at
`history`, the place of the first of them.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from ..tensor_cores import operand

#: Zeros on both sides of a spread position table: tiles may reach this far beyond a row.
PADDING = tl.constexpr(256)
#: Queries of one block of this many see the biases of keys in their block and the one before through the band.
BAND_BLOCK = tl.constexpr(128)
#: A bias that makes silu and its slope zero, exactly: the band's mask.
HIDDEN = tl.constexpr(-30000.0)
#: Times since their row's first key are cut here, at 17 years; a tile that has any such compares the times themselves.
#: Two of them are up to 2^30 apart, and so is the edge of a bucket, whose sum with one of them must fit 32 bits.
LONGEST_SPAN = tl.constexpr(1 << 29)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(source, first, end, head, stride_t, stride_h, BLOCK, DIM, BLOCK_DIM, DESCRIPTOR, CUT, PRECISION):
    """(BLOCK, BLOCK_DIM): tokens first.. of one head. Tokens from `end` on are zero, or, loaded through a tensor
    descriptor and not CUT, those of the next row, which may be anything: no sum may go over them, since zero times
    what is not finite is not zero. CUT takes a tile through registers on its way to a product."""
    if DESCRIPTOR:
        tile = source.load([first.to(tl.int32), head * DIM])
        if CUT:
            tile = tl.where((first + tl.arange(0, BLOCK) < end)[:, None], tile, 0.0)
    else:
        rows = first + tl.arange(0, BLOCK)
        columns = tl.arange(0, BLOCK_DIM)
        inside = (rows < end)[:, None]
        if DIM != BLOCK_DIM:
            inside = inside & (columns < DIM)[None, :]
        pointers = source + rows.to(tl.int64)[:, None] * stride_t + head * stride_h + columns[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return operand(tile, tile.dtype, PRECISION)


@triton.jit
def visible(i, j, history, prefix, window, TARGETS, WINDOW, PREFIX):
    """Whether query i sees key j."""
    seen = j <= i
    if TARGETS:
        seen = seen & ((j < history) | (i == j))
    if WINDOW:
        seen = seen & (tl.minimum(i, history) - tl.minimum(j, history) <= window)
    if PREFIX:
        seen = seen | (j < prefix)
    return seen


@triton.jit
def row_of_program(offsets, num_targets, row, prefix, TARGETS):
    """(start, n, history, prefix) of a row: first token, length, tokens before its targets, prefix within these."""
    start = tl.load(offsets + row)
    n = (tl.load(offsets + row + 1) - start).to(tl.int32)
    history = n
    if TARGETS:
        history = tl.maximum(n - tl.load(num_targets + row).to(tl.int32), 0)
    return start, n, history, tl.minimum(prefix, history)


@triton.jit
def one_over_n(normaliser, n, history, BY_LENGTH):
    """1/N: a constant, or of the row's own length, its targets counted as one."""
    if BY_LENGTH:
        normaliser = tl.maximum(tl.where(n > history, history + 1, n), 1).to(tl.float32)
    return 1.0 / normaliser


@triton.jit
def entries(base, index, ASSEMBLY):
    """Entries of a small float32 table for a whole tile of indices.

    In assembly, because tl.load would stage the tile through shared memory, as it does operands of a product:
    68 KiB more for a (128, 64) tile in three stages.
    """
    if ASSEMBLY:
        values = tl.inline_asm_elementwise(
            "{ .reg .u64 address; mad.wide.s32 address, $2, 4, $1; ld.global.nc.f32 $0, [address]; }",
            "=f,l,r",
            [base.to(tl.int64), index],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        values = tl.load(base + index)
    return values


@triton.jit
def position_entries(table, zero, i, j, last, ASSEMBLY):
    """p[j - i] of tokens clamped to `last`, where the row's last token stands: targets all stand there, and tokens
    beyond the row, which are masked, must not read beyond the table."""
    return entries(table, tl.minimum(j, last) - tl.minimum(i, last) + zero, ASSEMBLY)


@triton.jit
def spread_center(zero):
    """Where f(0) stands in a spread table: even, with at least PADDING entries more than the table has before it."""
    return zero + PADDING + (zero & 1)


def _diagonal_loads(columns: int) -> str:
    """Assembly for `position_diagonals`: the values of 4 * columns / 8 tile elements that one thread holds.

    They are columns c, c + 1 of rows r and r + 8, then the same eight columns on, and so on. On a diagonal row r + 8
    has what row r has eight columns before, so `columns / 8 + 1` loads of two entries serve them all, at constant
    distances from one address. A thread that finds other places reads address 0, which stops the program (a trap
    would keep the compiler from overlapping the matrix products).
    """
    groups = columns // 8
    elements = 4 * groups
    lines = [
        "{ .reg .u64 address, below; .reg .s32 last; .reg .pred good; .reg .f32 "
        + ", ".join(f"x{t}, y{t}" for t in range(groups + 1))
        + ";",
        f"add.s32 last, ${2 * elements}, {columns - 7};",
        f"add.u64 below, ${elements}, -32;",
        f"setp.eq.s32 good, last, ${3 * elements - 1};",
        f"setp.eq.and.u64 good, below, ${elements + 2}, good;",
        f"mad.wide.s32 address, ${2 * elements}, 4, ${elements};",
        "selp.b64 address, address, 0, good;",
    ]
    lines += [f"ld.global.nc.v2.f32 {{x{t}, y{t}}}, [address+{32 * (t - 1)}];" for t in range(groups + 1)]
    for t in range(groups):
        values = (f"x{t + 1}", f"y{t + 1}", f"x{t}", f"y{t}")
        lines += [f"mov.f32 ${4 * t + place}, {value};" for place, value in enumerate(values)]
    return "\n".join([*lines, "}"])


def _constraints(columns: int) -> str:
    elements = columns // 2
    return ",".join(["=f"] * elements + ["l"] * elements + ["r"] * elements)


_LOADS_64 = tl.constexpr(_diagonal_loads(64))
_LOADS_32 = tl.constexpr(_diagonal_loads(32))
_CONSTRAINTS_64 = tl.constexpr(_constraints(64))
_CONSTRAINTS_32 = tl.constexpr(_constraints(32))


@triton.jit
def position_diagonals(spread, zero, row, column, COLUMNS, ROWS_ARE_QUERIES, ASSEMBLY):
    """p[key - query] for a tile of rows and columns as Hopper's tensor cores lay it out, from `spread_kernel`'s table.

    A lookup an element takes about as many instructions as all else that an element needs (10.0 instead of 5.3 in a
    (128, 64) tile); this takes a third of a load.
    In odd rows a pair's first entry has an odd index, which lies on 8 bytes in the shifted copy.
    """
    center = spread_center(zero)
    odd = row & 1
    copy = odd if ROWS_ARE_QUERIES else odd + 2
    base = spread + copy.to(tl.int64) * (2 * center + 2) + (center - row - odd)
    if not ASSEMBLY:
        values = tl.load(base + column)
    elif COLUMNS == 32:
        values = tl.inline_asm_elementwise(
            _LOADS_32, _CONSTRAINTS_32, [base.to(tl.int64), column], dtype=tl.float32, is_pure=True, pack=16
        )
    else:
        values = tl.inline_asm_elementwise(
            _LOADS_64, _CONSTRAINTS_64, [base.to(tl.int64), column], dtype=tl.float32, is_pure=True, pack=32
        )
    return values


@triton.jit
def approximate_bucket(seconds, ASSEMBLY):
    """Bucket 0..128 of float32 seconds, as int32; within 1e-5 of a bucket's edge, either side.

    One special-function call: the logarithm is taken times 1/0.301 onto 2^23, rounding down, where the lowest bits
    of the sum are the bucket.
    """
    if ASSEMBLY:
        bucket = tl.inline_asm_elementwise(
            """{
            .reg .f32 s;
            abs.f32 s, $1;
            max.f32 s, s, 0f3F800000;
            lg2.approx.ftz.f32 s, s;
            fma.rm.f32 s, s, 0f40136150, 0f4B000000;
            mov.b32 $0, s;
            and.b32 $0, $0, 255;
            min.s32 $0, $0, 128;
            }""",
            "=r,f",
            [seconds],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        steps = tl.log2(tl.maximum(tl.abs(seconds), 1.0)) * 2.3028145
        bucket = tl.minimum(tl.floor(steps).to(tl.int32), 128)
    return bucket


@triton.jit
def buckets(query_time, key_time, edges, ASSEMBLY):
    """bucket(query_time - key_time) of int64 times, exactly: an approximate one, moved by the edges on its two sides.

    `edges` (130,) int64: the least second of every bucket, then the largest number.
    """
    seconds = tl.abs(query_time - key_time)
    bucket = approximate_bucket(seconds.to(tl.float32), ASSEMBLY)
    up = seconds >= _longs(edges, bucket + 1, ASSEMBLY)
    down = seconds < _longs(edges, bucket, ASSEMBLY)
    return bucket + up.to(tl.int32) - down.to(tl.int32)


@triton.jit
def small_buckets(passed, edges, ASSEMBLY):
    """As `buckets`, of int32 seconds, with half the registers. `edges` (130,) int32, cut at the largest number."""
    bucket = approximate_bucket(passed.to(tl.float32), ASSEMBLY)
    up = passed >= _ints(edges, bucket + 1, ASSEMBLY)
    down = passed < _ints(edges, bucket, ASSEMBLY)
    return bucket + up.to(tl.int32) - down.to(tl.int32)


@triton.jit
def _ints(base, index, ASSEMBLY):
    """As `entries`, of an int32 table."""
    if ASSEMBLY:
        values = tl.inline_asm_elementwise(
            "{ .reg .u64 address; mad.wide.s32 address, $2, 4, $1; ld.global.nc.s32 $0, [address]; }",
            "=r,l,r",
            [base.to(tl.int64), index],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        values = tl.load(base + index)
    return values


@triton.jit
def add_to_entries(base, index, value, mask, ASSEMBLY):
    """base[index] += value for a whole tile, atomically, in no fixed order. ASSEMBLY: one address after the other,
    because all of a tile's at once take 64 registers of every thread; only for layouts that hold each element once."""
    if ASSEMBLY:
        tl.inline_asm_elementwise(
            """{
            .reg .u64 address;
            .reg .pred some;
            mad.wide.s32 address, $2, 4, $1;
            setp.ne.f32 some, $3, 0f00000000;
            @some red.relaxed.gpu.global.add.f32 [address], $3;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,f",
            [base.to(tl.int64), index, tl.where(mask, value, 0.0)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_add(base + index, value, mask=mask, sem="relaxed")


@triton.jit
def _longs(base, index, ASSEMBLY):
    """As `entries`, of an int64 table."""
    if ASSEMBLY:
        values = tl.inline_asm_elementwise(
            "{ .reg .u64 address; mad.wide.s32 address, $2, 8, $1; ld.global.nc.s64 $0, [address]; }",
            "=l,l,r",
            [base.to(tl.int64), index],
            dtype=tl.int64,
            is_pure=True,
            pack=1,
        )
    else:
        values = tl.load(base + index)
    return values


@triton.jit
def time_entries(table, edges, query_time, key_time, ASSEMBLY):
    """w[bucket(query_time - key_time)], element by element."""
    return entries(table, buckets(query_time, key_time, edges, ASSEMBLY), ASSEMBLY)


@triton.jit
def unpack_tile(packed, table):
    """(first bucket, last bucket, whether times since the row's first key decide, w[first]) of a tile's entry in the
    table that `tile_bucket_kernel` wrote."""
    first = packed & 255
    return first, (packed >> 8) & 255, (packed >> 16) & 1 == 1, tl.load(table + first)


@triton.jit
def past_edge(row_since, column_since, edge, ROWS_ARE_QUERIES):
    """Where query_time - key_time >= edge, for a tile of rows and columns: one comparison an element."""
    if ROWS_ARE_QUERIES:
        past = column_since <= row_since - edge
    else:
        past = column_since >= row_since + edge
    return past


@triton.jit
def add_time_steps(
    x, table, edges, row_since, since, row_time, column_time, start, n, row_place, column_place, first, last, regular,
    ROWS_ARE_QUERIES,
):  # fmt: skip
    """x + w[bucket(query_time - key_time)] - w[first] for a tile whose buckets are first to last.

    Buckets grow by 35 % each, so a tile far from the diagonal has one or a few. At each edge between two the bias
    takes a step. Tiles of rows that are not sorted, or span more than 17 years, compare the times themselves.
    """
    row, column = tl.expand_dims(row_place, 1), tl.expand_dims(column_place, 0)
    if not regular:
        row_times = tl.load(row_time + start + row, mask=row < n, other=0)
        column_times = tl.load(column_time + start + column, mask=column < n, other=0)
        for bucket in range(first + 1, last + 1):
            edge = tl.load(edges + bucket)
            past = (column_times <= row_times - edge) | (column_times >= row_times + edge)
            x += tl.where(past, tl.load(table + bucket) - tl.load(table + bucket - 1), 0.0)
    else:
        row_passed = tl.expand_dims(row_since, 1)
        column_passed = tl.load(since + start + column, mask=column < n, other=0)
        for bucket in range(first + 1, last + 1):
            past = past_edge(row_passed, column_passed, tl.load(edges + bucket).to(tl.int32), ROWS_ARE_QUERIES)
            x += tl.where(past, tl.load(table + bucket) - tl.load(table + bucket - 1), 0.0)
    return x


@triton.jit
def silu(x, FAST):
    """x sigmoid(x); FAST: as x/2 (1 + tanh(x/2)), one special-function call instead of an exponential and a division.
    Its error, 2^-11 of tanh, is below bfloat16's rounding, not below float16's."""
    if FAST:
        half = 0.5 * x
        value = half + half * _tanh(half)
    else:
        value = x * tl.sigmoid(x)
    return value


@triton.jit
def silu_and_slope(x, FAST):
    """silu(x) and its derivative: sigma + silu(x) (1 - sigma)."""
    if FAST:
        sigma = 0.5 + 0.5 * _tanh(0.5 * x)
    else:
        sigma = tl.sigmoid(x)
    value = x * sigma
    return value, sigma + value * (1.0 - sigma)


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp_of(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def tile_bias(
    position_bias, zero, spread, time_bias, bucket_edges, band, row_time, column_time, start, n,
    row_place, column_place, last_place, value,
    POSITION, TIME, GENERAL, NEAR, DIAGONALS, ROWS, COLUMNS, ROWS_ARE_QUERIES, ASSEMBLY,
):  # fmt: skip
    """What a tile's scores start from; rows are queries and columns keys, or the reverse. Taken before the product, so
    that its loads are under way meanwhile.

    GENERAL (other masks than the causal one): the whole bias, element by element. NEAR the diagonal, with times: the
    whole bias and the mask, from the band. Else positions, and `value`: w of the tile's first bucket.
    """
    row, column = tl.expand_dims(row_place, 1), tl.expand_dims(column_place, 0)
    query, key = row, column
    if not ROWS_ARE_QUERIES:
        query, key = column, row
    if NEAR:
        bias = load_band(band, start, n, query, key)
    else:
        bias = tl.zeros([ROWS, COLUMNS], tl.float32)
        if POSITION:
            if DIAGONALS and not GENERAL:
                bias = position_diagonals(spread, zero, row, column, COLUMNS, ROWS_ARE_QUERIES, ASSEMBLY)
            else:
                bias = position_entries(position_bias, zero, query, key, last_place, ASSEMBLY)
        if TIME:
            if GENERAL:
                row_times = tl.load(row_time + start + row, mask=row < n, other=0)
                column_times = tl.load(column_time + start + column, mask=column < n, other=0)
                bias += time_entries(time_bias, bucket_edges, row_times, column_times, ASSEMBLY)
            else:
                bias += value
    return bias


@triton.jit
def first_near_key(query):
    """The first key whose bias a query finds in the band: that of the block of queries before its own."""
    return query // BAND_BLOCK * BAND_BLOCK - BAND_BLOCK


@triton.jit
def load_band(band, start, n, query, key):
    """The biases of queries and keys, expanded to a tile; HIDDEN beyond the row."""
    pointers = band + (start + query) * (2 * BAND_BLOCK) + (key - first_near_key(query))
    return tl.load(pointers, mask=query < n, other=HIDDEN).to(tl.float32)

"""Backward kernel for Hopper in Gluon: one sweep over the queries, five products.

A program has 128 keys of one sequence and head, and walks over the queries that see them, 64 at a time. Four groups of
warps share the work:

    producer         copies tiles of q and of the output's gradient into a ring of shared memory; with a bias, adds up
                     ds for the tables besides
    two score groups 64 keys each: scores and weights, held transposed (keys, queries); dv and dk in registers; score
                     gradients ds into shared memory
    dq group         dq of the tile from ds, added to memory by the copy engine

Tokens are read through ragged descriptors, which end where a sequence does: what is beyond is zero, and nothing of
another sequence enters a product.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, assignment"

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .bias_tiles import BAND_BLOCK
from .gluon_names import async_add, async_load, async_store, barrier
from .hopper_position import (
    add_distances,
    added_diagonals,
    diagonals,
    position_bias,
    program_position,
    zero_diagonals,
)
from .hopper_time import (
    BUCKETS,
    LANES,
    NEAR,
    TileTimes,
    TimePointers,
    add_buckets,
    add_times,
    in_band,
    load_key_since,
    packed_buckets,
)

#: Where a ragged descriptor ends: row BILLION - n + i of its third dimension is a sequence's row i.
BILLION = gl.constexpr(1 << 30)
#: Keys of a score group; two groups a program.
GROUP = gl.constexpr(64)


class Sizes(NamedTuple):
    """Constants of a compiled kernel."""

    M: int  # queries of a step
    DQK: int
    DV: int
    STAGES: int  # of the ring of q and do
    BUFFERS: int  # for score gradients
    DQ_COLUMNS: int  # of dq at a time
    POSITION: bool  # there is a position bias
    TIME: bool  # there is a time bias
    BY_LENGTH: bool  # divides by the sequence's own length


class Memory(NamedTuple):
    """Tiles in shared memory."""

    k: Any  # (2, 1, 1, GROUP, DQK)
    v: Any  # (2, 1, 1, GROUP, DV)
    q: Any  # (STAGES, 1, 1, M, DQK)
    do: Any  # (STAGES, 1, 1, M, DV)
    ds: Any  # (2 BUFFERS, 1, 1, GROUP, M)
    dq: Any  # (1, 1, M, DQK) float32
    since: Any  # (STAGES, 1, M) int32: times of the queries
    band: Any  # (2 STAGES, 1, 1, M, GROUP): bias and mask near the diagonal
    weights: Any  # (256, 1) float32: of time buckets
    edges: Any  # (256, 1) int32


class Barriers(NamedTuple):
    """Of each tile that groups hand over: it is there; it was read."""

    kept: Any  # k and v
    q: Any  # (STAGES,)
    do: Any  # (STAGES,)
    read: Any  # (STAGES,): q and do
    ds: Any  # (BUFFERS,)
    ds_read: Any  # (BUFFERS,)


class Queries(NamedTuple):
    """Descriptors of what groups read of tiles of queries."""

    q: Any
    do: Any
    since: Any  # (slots, M)
    band: Any
    slot: Any  # of the sequence's first tile in `since`


class Place(NamedTuple):
    """What a program works on."""

    end: Any  # the sequence's last token, and one
    n: Any  # length
    first: Any  # key
    head: Any
    begin: Any  # tiles of queries
    tiles: Any


@gluon.jit
def _ragged(place, row, column):
    """Coordinates of a sequence's row in a ragged descriptor."""
    return [BILLION, place.end, BILLION - place.n + row, column]


@gluon.jit
def _load_kept(memory, barriers, place, k, v, SIZES: gl.constexpr):
    """Begins to copy the keys and values."""
    mbarrier.expect(barriers.kept, 2 * GROUP * (SIZES.DQK + SIZES.DV) * 2)
    for half in gl.static_range(2):
        row = place.first + half * GROUP
        async_load(k, _ragged(place, row, place.head * SIZES.DQK), barriers.kept, memory.k.index(half))
        async_load(v, _ragged(place, row, place.head * SIZES.DV), barriers.kept, memory.v.index(half))


@gluon.jit
def _load_step(step, memory, barriers, place, queries, SIZES: gl.constexpr):
    """Begins to copy what groups read of one tile of queries."""
    M: gl.constexpr = SIZES.M
    tile = place.begin + step
    stage = step % SIZES.STAGES
    mbarrier.wait(barriers.read.index(stage), (step // SIZES.STAGES & 1) ^ 1)
    there = barriers.q.index(stage)
    if SIZES.TIME:
        if in_band(tile * M, place.first):
            mbarrier.expect(there, M * SIZES.DQK * 2 + M * 4 + 2 * M * GROUP * 2)
            column = place.first - (tile * M // BAND_BLOCK * BAND_BLOCK - BAND_BLOCK)
            for half in gl.static_range(2):
                row = _ragged(place, tile * M, column + half * GROUP)
                async_load(queries.band, row, there, memory.band.index(2 * stage + half))
        else:
            mbarrier.expect(there, M * SIZES.DQK * 2 + M * 4)
        async_load(queries.since, [queries.slot + tile, 0], there, memory.since.index(stage))
    else:
        mbarrier.expect(there, M * SIZES.DQK * 2)
    async_load(queries.q, _ragged(place, tile * M, place.head * SIZES.DQK), there, memory.q.index(stage))
    mbarrier.expect(barriers.do.index(stage), M * SIZES.DV * 2)
    row = _ragged(place, tile * M, place.head * SIZES.DV)
    async_load(queries.do, row, barriers.do.index(stage), memory.do.index(stage))


@gluon.jit
def _producer(memory, barriers, place, k, v, queries, SIZES: gl.constexpr):
    _load_kept(memory, barriers, place, k, v, SIZES)
    for step in range(place.tiles - place.begin):
        _load_step(step, memory, barriers, place, queries, SIZES)


@gluon.jit
def _silu_and_derivative(x):
    # Not pure, so that scores are read before the next product's fence: else ptxas lets products wait for each other.
    tanh = gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=gl.float32, is_pure=False, pack=1
    )
    sigma = 0.5 + 0.5 * tanh
    value = x * sigma
    return value, sigma + value * (1.0 - sigma)


@gluon.jit
def _bfloat16(x):
    """x in bfloat16, before the next product's fence, as an operand in registers must be."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=False, pack=2
    )


@gluon.jit
def _flat(tile, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile (1, 1, ROWS, COLUMNS) as products take it."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], tile.dtype)
    return tile._reinterpret(tile.dtype, [ROWS, COLUMNS], LAYOUT)


@gluon.jit
def _scores(k, q, zeros, M: gl.constexpr, DQK: gl.constexpr):
    """Begins the product of keys and a tile of queries."""
    return warpgroup_mma(k, _flat(q, M, DQK).permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def _biased(s, alpha, position, pointers, times, band, place, query, key, CUT: gl.constexpr, SIZES: gl.constexpr):
    """Scores with their bias and mask."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZES.M, 16])
    x = s * alpha
    if SIZES.TIME:
        if in_band(query, key):
            x = x + _flat(band, SIZES.M, GROUP).permute([1, 0]).load(SCORES).to(gl.float32)
        else:
            if SIZES.POSITION:
                x = x + position_bias(position, query, key)
            x = add_times(x, pointers, times, query, key, place.n, CUT)
    else:
        if SIZES.POSITION:
            x = x + position_bias(position, query, key)
        if query < place.first + 2 * GROUP:
            i = query + gl.arange(0, SIZES.M, gl.SliceLayout(0, SCORES))
            j = key + gl.arange(0, GROUP, gl.SliceLayout(1, SCORES))
            x = gl.where(gl.expand_dims(j, 1) <= gl.expand_dims(i, 0), x, -30000.0)
    return x


@gluon.jit
def _step(
    state, step, memory, barriers, place, position, pointers, since, alpha, group, NEXT: gl.constexpr,
    CUT: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    """One tile of queries. `state`: its scores, and dk and dv so far. NEXT: calculates the scores of the next one."""
    M: gl.constexpr = SIZES.M
    DQK: gl.constexpr = SIZES.DQK
    DV: gl.constexpr = SIZES.DV
    STAGES: gl.constexpr = SIZES.STAGES
    BUFFERS: gl.constexpr = SIZES.BUFFERS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    OF_DV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    OF_DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQK, 16])
    s, packed, dk, dv = state
    k = _flat(memory.k.index(group), GROUP, DQK)
    v = _flat(memory.v.index(group), GROUP, DV)
    stage = step % STAGES
    zeros = gl.zeros([GROUP, M], gl.float32, SCORES)
    do = _flat(memory.do.index(stage), M, DV)
    mbarrier.wait(barriers.do.index(stage), step // STAGES & 1)
    dp = warpgroup_mma(v, do.permute([1, 0]), zeros, use_acc=False, is_async=True)
    query, key = (place.begin + step) * M, place.first + group * GROUP
    times, band = 0, 0
    if SIZES.TIME:
        times = TileTimes(packed, memory.since.index(stage), since, memory.weights, memory.edges)
        band = memory.band.index(2 * stage + group)
        if NEXT:
            packed = packed_buckets(pointers, step + 1, group)
    x = _biased(s, alpha, position, pointers, times, band, place, query, key, CUT, SIZES)
    weights, dact = _silu_and_derivative(x)
    weights = gl.convert_layout(_bfloat16(weights), gl.DotOperandLayout(0, OF_DV, 2))
    dv = warpgroup_mma(weights, do, dv, is_async=True)
    if NEXT:
        following = (step + 1) % STAGES
        mbarrier.wait(barriers.q.index(following), (step + 1) // STAGES & 1)
        s = _scores(k, memory.q.index(following), zeros, M, DQK)
        dp = warpgroup_mma_wait(2, [dp])
    else:
        dp = warpgroup_mma_wait(1, [dp])
    ds = _bfloat16(dp * dact)
    dk = warpgroup_mma(
        gl.convert_layout(ds, gl.DotOperandLayout(0, OF_DK, 2)), _flat(memory.q.index(stage), M, DQK), dk, is_async=True
    )
    buffer = step % BUFFERS
    mbarrier.wait(barriers.ds_read.index(buffer), (step // BUFFERS & 1) ^ 1)
    _flat(memory.ds.index(2 * buffer + group), GROUP, M).store(ds)
    fence_async_shared()
    barrier()
    mbarrier.arrive(barriers.ds.index(buffer))
    # None may be under way when the loop begins again: ptxas would let all wait for each other.
    if NEXT:
        s, dk, dv = warpgroup_mma_wait(0, [s, dk, dv])
    else:
        dk, dv = warpgroup_mma_wait(0, [dk, dv])
    barrier()
    mbarrier.arrive(barriers.read.index(stage))
    return s, packed, dk, dv


@gluon.jit
def _score_group(
    memory, barriers, place, position, pointers, since, dk_out, dv_out, alpha, scale, group: gl.constexpr,
    CUT: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = SIZES.M
    DQK: gl.constexpr = SIZES.DQK
    DV: gl.constexpr = SIZES.DV
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    OF_DV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    OF_DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQK, 16])
    k = _flat(memory.k.index(group), GROUP, DQK)
    dk = gl.zeros([GROUP, DQK], gl.float32, OF_DK)
    dv = gl.zeros([GROUP, DV], gl.float32, OF_DV)
    mbarrier.wait(barriers.kept, 0)
    steps = place.tiles - place.begin
    zeros = gl.zeros([GROUP, M], gl.float32, SCORES)
    mbarrier.wait(barriers.q.index(0), 0)
    s = warpgroup_mma_wait(0, [_scores(k, memory.q.index(0), zeros, M, DQK)])
    packed, key_since = 0, 0
    if SIZES.TIME:
        packed = packed_buckets(pointers, 0, group)
        key_since = load_key_since(since, place.first + group * GROUP, place.n)
    for step in range(steps - 1):
        s, packed, dk, dv = _step(
            (s, packed, dk, dv), step, memory, barriers, place, position, pointers, key_since, alpha, group, True, CUT,
            SIZES,
        )  # fmt: skip
    _, _, dk, dv = _step(
        (s, packed, dk, dv), steps - 1, memory, barriers, place, position, pointers, key_since, alpha, group, False,
        CUT, SIZES,
    )  # fmt: skip
    # v is read by this group alone; k by the dq group too, up to its last tile.
    _flat(memory.v.index(group), GROUP, DV).store((dv * scale).to(gl.bfloat16))
    mbarrier.wait(barriers.ds_read.index((steps - 1) % SIZES.BUFFERS), (steps - 1) // SIZES.BUFFERS & 1)
    k.store((dk * (alpha * scale)).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    row = place.first + group * GROUP
    async_store(dv_out, _ragged(place, row, place.head * DV), memory.v.index(group))
    async_store(dk_out, _ragged(place, row, place.head * DQK), memory.k.index(group))
    tma.store_wait(0)


@gluon.jit
def _dq_group(memory, barriers, place, k, v, queries, dq, factor, PRODUCES: gl.constexpr, SIZES: gl.constexpr):
    """PRODUCES: it is the producer too."""
    M: gl.constexpr = SIZES.M
    DQK: gl.constexpr = SIZES.DQK
    COLUMNS: gl.constexpr = SIZES.DQ_COLUMNS
    AHEAD: gl.constexpr = SIZES.STAGES - 1
    OF_DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    zeros = gl.zeros([M, COLUMNS], gl.float32, OF_DQ)
    out = _flat(memory.dq, M, DQK)
    steps = place.tiles - place.begin
    if PRODUCES:
        _load_kept(memory, barriers, place, k, v, SIZES)
        for step in gl.static_range(AHEAD):
            if step < steps:
                _load_step(step, memory, barriers, place, queries, SIZES)
    for step in range(steps):
        if PRODUCES:
            if step + AHEAD < steps:
                _load_step(step + AHEAD, memory, barriers, place, queries, SIZES)
        buffer = step % SIZES.BUFFERS
        mbarrier.wait(barriers.ds.index(buffer), step // SIZES.BUFFERS & 1)
        low, high = _flat(memory.ds.index(2 * buffer), GROUP, M), _flat(memory.ds.index(2 * buffer + 1), GROUP, M)
        for column in gl.static_range(0, DQK, COLUMNS):
            low_k = _flat(memory.k.index(0), GROUP, DQK).slice(column, COLUMNS, dim=1)
            high_k = _flat(memory.k.index(1), GROUP, DQK).slice(column, COLUMNS, dim=1)
            sums = warpgroup_mma(low.permute([1, 0]), low_k, zeros, use_acc=False, is_async=True)
            sums = warpgroup_mma(high.permute([1, 0]), high_k, sums, is_async=True)
            sums = warpgroup_mma_wait(0, [sums])
            if column == 0:
                tma.store_wait(0)
            barrier()
            if column + COLUMNS == DQK:
                mbarrier.arrive(barriers.ds_read.index(buffer))
            out.slice(column, COLUMNS, dim=1).store(sums * factor)
        fence_async_shared()
        barrier()
        async_add(dq, _ragged(place, (place.begin + step) * M, place.head * DQK), memory.dq)
    tma.store_wait(0)


@gluon.jit
def _position_group(memory, barriers, place, position, k, v, queries, scale, SIZES: gl.constexpr):
    """The producer of calls with a position bias, which adds up score gradients for its table besides."""
    M: gl.constexpr = SIZES.M
    AHEAD: gl.constexpr = SIZES.STAGES - 1
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    # The lower keys of a step are as far from their queries as the higher ones of the next; and the last diagonal of
    # those is the first of the next.
    waiting = zero_diagonals()
    steps = place.tiles - place.begin
    _load_kept(memory, barriers, place, k, v, SIZES)
    for step in gl.static_range(AHEAD):
        if step < steps:
            _load_step(step, memory, barriers, place, queries, SIZES)
    for step in range(steps):
        if step + AHEAD < steps:
            _load_step(step + AHEAD, memory, barriers, place, queries, SIZES)
        buffer = step % SIZES.BUFFERS
        query = (place.begin + step) * M
        mbarrier.wait(barriers.ds.index(buffer), step // SIZES.BUFFERS & 1)
        high = _flat(memory.ds.index(2 * buffer + 1), GROUP, M).load(SCORES)
        sums = added_diagonals(diagonals(high.to(gl.float32)), waiting)
        add_distances(position, query, place.first + GROUP, sums, scale, 8)
        last = sums[8]
        low = _flat(memory.ds.index(2 * buffer), GROUP, M).load(SCORES)
        sums = diagonals(low.to(gl.float32))
        barrier()
        mbarrier.arrive(barriers.ds_read.index(buffer))
        waiting = (sums[0] + last, sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7], sums[8])
    add_distances(position, (place.tiles - 1) * M, place.first, waiting, scale, 9)


@gluon.jit
def _table_group(
    memory, barriers, place, position, pointers, since, near, scale, CUT: gl.constexpr, SIZES: gl.constexpr
):  # fmt: skip
    """Adds up score gradients for the time table, and the position table if there is one."""
    M: gl.constexpr = SIZES.M
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    low_packed, high_packed = packed_buckets(pointers, 0, 0), packed_buckets(pointers, 0, 1)
    low_since = load_key_since(since, place.first, place.n)
    high_since = load_key_since(since, place.first + GROUP, place.n)
    steps = place.tiles - place.begin
    for step in range(steps):
        buffer = step % SIZES.BUFFERS
        stage = step % SIZES.STAGES
        query = (place.begin + step) * M
        following = gl.minimum(step + 1, steps - 1)
        next_low, next_high = packed_buckets(pointers, following, 0), packed_buckets(pointers, following, 1)
        mbarrier.wait(barriers.ds.index(buffer), step // SIZES.BUFFERS & 1)
        for half in range(2):
            key = place.first + half * GROUP
            packed, key_since = gl.where(half == 0, low_packed, high_packed), gl.where(half == 0, low_since, high_since)
            times = TileTimes(packed, memory.since.index(stage), key_since, memory.weights, memory.edges)
            if query < key + NEAR:
                if query >= key:
                    column = place.head * NEAR + query - key
                    async_store(near, _ragged(place, key, column), memory.ds.index(2 * buffer + half))
            ds = _flat(memory.ds.index(2 * buffer + half), GROUP, M).load(SCORES)
            if SIZES.POSITION:
                add_distances(position, query, key, diagonals(ds.to(gl.float32)), scale, 9)
            if query >= key + NEAR:
                add_buckets(pointers, times, query, key, place.n, ds, scale, CUT)
        low_packed, high_packed = next_low, next_high
        tma.store_wait(0)
        barrier()
        mbarrier.arrive(barriers.ds_read.index(buffer))
        mbarrier.arrive(barriers.read.index(stage))


@gluon.jit
def _with_times(
    memory, barriers, place, position, pointers, since, k, v, queries, dq, dk, dv, near, alpha, scale, factor,
    CUT: gl.constexpr, SIZES: gl.constexpr, SCORE_REGISTERS: gl.constexpr, DQ_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The groups of calls with a time bias. CUT: some of the sequence's times need 64 bits."""
    gl.warp_specialize(
        [
            (
                _score_group,
                (memory, barriers, place, position, pointers, since, dk, dv, alpha, scale, 0, CUT, SIZES),
            ),
            (
                _score_group,
                (memory, barriers, place, position, pointers, since, dk, dv, alpha, scale, 1, CUT, SIZES),
            ),
            (_dq_group, (memory, barriers, place, k, v, queries, dq, factor, True, SIZES)),
            (_table_group, (memory, barriers, place, position, pointers, since, near, scale, CUT, SIZES)),
        ],
        [4, 4, 4],
        [SCORE_REGISTERS, DQ_REGISTERS, OTHER_REGISTERS],
    )


@gluon.jit(do_not_specialize=["num_tiles", "zero", "blocks", "width"])
def hopper_backward_kernel(
    q, k, v, do, dq, dk, dv, since, band, near, offsets, alpha, attention_scale, num_tiles, spread, sums, times, zero,
    blocks, width, COPIES: gl.constexpr, SIZES: gl.constexpr, SCORE_REGISTERS: gl.constexpr, DQ_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk, dv, and dq by addition; with a position bias adds score gradients to `sums` (COPIES, blocks, 8, 8), of which
    `position_gradient_kernel` makes the table's gradient. Grid: tiles of 128 keys of the longest sequence x heads of
    `launch_grid`."""
    M: gl.constexpr = SIZES.M
    DQK: gl.constexpr = SIZES.DQK
    DV: gl.constexpr = SIZES.DV
    STAGES: gl.constexpr = SIZES.STAGES
    BUFFERS: gl.constexpr = SIZES.BUFFERS
    head = gl.program_id(0) // num_tiles
    first = gl.program_id(0) % num_tiles * (2 * GROUP)
    sequence = gl.program_id(2).to(gl.int64) * gl.num_programs(1) + gl.program_id(1)
    start, end = gl.load(offsets + sequence), gl.load(offsets + sequence + 1)
    n = (end - start).to(gl.int32)
    if first < n:
        scale = 1.0 / attention_scale
        if SIZES.BY_LENGTH:
            scale = 1.0 / n.to(gl.float32)
        place = Place(end.to(gl.int32), n, first, head, first // M, gl.cdiv(n, M))
        copy = (sequence + gl.program_id(0)) % COPIES
        position = program_position(spread, sums, zero, blocks, copy)
        DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, GROUP, M], gl.bfloat16)
        SINCE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, M], gl.int32)
        TABLE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        OF_TABLES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        memory = Memory(
            gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, GROUP, DQK], k.layout),
            gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, GROUP, DV], v.layout),
            gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, M, DQK], q.layout),
            gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, M, DV], do.layout),
            gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, 1, 1, GROUP, M], DS_LAYOUT),
            gl.allocate_shared_memory(gl.float32, [1, 1, M, DQK], dq.layout),
            gl.allocate_shared_memory(gl.int32, [STAGES if SIZES.TIME else 1, 1, M], SINCE),
            gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES if SIZES.TIME else 1, 1, 1, M, GROUP], DS_LAYOUT),
            gl.allocate_shared_memory(gl.float32, [256, 1], TABLE),
            gl.allocate_shared_memory(gl.int32, [256, 1], TABLE),
        )
        BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
        barriers = Barriers(
            gl.allocate_shared_memory(gl.int64, [1], BARRIER),
            gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
            gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
            gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
            gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER),
            gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER),
        )
        mbarrier.init(barriers.kept, count=1)
        for stage in gl.static_range(STAGES):
            mbarrier.init(barriers.q.index(stage), count=1)
            mbarrier.init(barriers.do.index(stage), count=1)
            mbarrier.init(barriers.read.index(stage), count=3 if SIZES.TIME else 2)
        for buffer in gl.static_range(BUFFERS):
            mbarrier.init(barriers.ds.index(buffer), count=2)
            mbarrier.init(barriers.ds_read.index(buffer), count=2 if SIZES.POSITION or SIZES.TIME else 1)
        fence_async_shared()
        barrier()
        factor = alpha * scale
        slot = (start // M + sequence).to(gl.int32)
        queries = Queries(q, do, since, band, slot)
        row = (slot + place.begin).to(gl.int64) * width
        pointers = TimePointers(
            times.tiles + row + first // GROUP,
            width,
            times.query_time + start,
            times.key_time + start,
            times.edges,
            times.sums + copy * (BUCKETS * LANES),
        )
        key_since = times.key_since + start
        if SIZES.TIME:
            bucket = gl.arange(0, 256, OF_TABLES)
            weights = gl.load(times.weights + bucket, mask=bucket < BUCKETS, other=0.0)
            memory.weights._reinterpret(gl.float32, [256], TABLE).store(weights)
            edges = gl.load(times.small_edges + bucket, mask=bucket <= BUCKETS, other=0)
            memory.edges._reinterpret(gl.int32, [256], TABLE).store(edges)
            barrier()
            if gl.load(times.cut + sequence) == 0:
                _with_times(
                    memory, barriers, place, position, pointers, key_since, k, v, queries, dq, dk, dv, near, alpha,
                    scale, factor, False, SIZES, SCORE_REGISTERS, DQ_REGISTERS, OTHER_REGISTERS,
                )  # fmt: skip
            else:
                _with_times(
                    memory, barriers, place, position, pointers, key_since, k, v, queries, dq, dk, dv, near, alpha,
                    scale, factor, True, SIZES, SCORE_REGISTERS, DQ_REGISTERS, OTHER_REGISTERS,
                )  # fmt: skip
        elif SIZES.POSITION:
            gl.warp_specialize(
                [
                    (
                        _score_group,
                        (memory, barriers, place, position, pointers, key_since, dk, dv, alpha, scale, 0, False, SIZES),
                    ),
                    (
                        _score_group,
                        (memory, barriers, place, position, pointers, key_since, dk, dv, alpha, scale, 1, False, SIZES),
                    ),
                    (_dq_group, (memory, barriers, place, k, v, queries, dq, factor, False, SIZES)),
                    (_position_group, (memory, barriers, place, position, k, v, queries, scale, SIZES)),
                ],
                [4, 4, 4],
                [SCORE_REGISTERS, DQ_REGISTERS, OTHER_REGISTERS],
            )
        else:
            gl.warp_specialize(
                [
                    (
                        _score_group,
                        (memory, barriers, place, position, pointers, key_since, dk, dv, alpha, scale, 0, False, SIZES),
                    ),
                    (
                        _score_group,
                        (memory, barriers, place, position, pointers, key_since, dk, dv, alpha, scale, 1, False, SIZES),
                    ),
                    (_dq_group, (memory, barriers, place, k, v, queries, dq, factor, False, SIZES)),
                    (_producer, (memory, barriers, place, k, v, queries, SIZES)),
                ],
                [4, 4, 1],
                [SCORE_REGISTERS, DQ_REGISTERS, OTHER_REGISTERS],
            )

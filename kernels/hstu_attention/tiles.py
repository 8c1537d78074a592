"""Where a program finds its sequence, the tiles of keys it walks over, and the mask.

A token's position is its number among its sequence's keys. Its place is what the mask counts by: prefix tokens all
stand at 0, and targets, a sequence's last tokens, at `end`, where the history ends.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from ..tensor_cores import operand
from .arguments import Sequence, TileRuns, WholeTiles


@triton.jit
def load_tile(tokens, first, end, BLOCK, DIM, BLOCK_DIM, CUT, FLAGS, begin=0, CUT_BELOW=False):
    """(BLOCK, BLOCK_DIM): tokens first.. of one head. Tokens from `end` on are zero, or, loaded through a tensor
    descriptor and not CUT, those of the next sequence, which may be anything: no sum may go over them, since zero times
    what is not finite is not zero. CUT takes a tile through registers on its way to a product. CUT_BELOW, not through a
    descriptor: tokens before `begin` are zero too."""
    PRECISION: tl.constexpr = FLAGS.PRECISION
    if FLAGS.DESCRIPTOR:
        tile = tokens.source.load([first.to(tl.int32), tokens.head * DIM])
        if CUT:
            tile = tl.where((first + tl.arange(0, BLOCK) < end)[:, None], tile, 0.0)
    else:
        index = first + tl.arange(0, BLOCK)
        columns = tl.arange(0, BLOCK_DIM)
        inside = (index < end)[:, None]
        if CUT_BELOW:
            inside = inside & (index >= begin)[:, None]
        if DIM != BLOCK_DIM:
            inside = inside & (columns < DIM)[None, :]
        rows = tokens.source + index.to(tl.int64)[:, None] * tokens.token_stride + tokens.head * tokens.head_stride
        tile = tl.load(rows + columns[None, :], mask=inside, other=0.0)
    return operand(tile, tile.dtype, PRECISION)


@triton.jit
def sequence_id():
    """The sequence of a program of `inputs.launch_grid`."""
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


@triton.jit
def sequence_of(sequences, index, window, prefix, full, sinks, group, FLAGS):
    """The index-th sequence."""
    start = tl.load(sequences.offsets + index)
    n = (tl.load(sequences.offsets + index + 1) - start).to(tl.int32)
    key_start = start
    first = n * 0
    if FLAGS.KEY_OFFSETS:
        queries = n
        key_start = tl.load(sequences.key_offsets + index)
        n = (tl.load(sequences.key_offsets + index + 1) - key_start).to(tl.int32)
        first = tl.maximum(n - queries, 0)
        start = start + queries - n
    history = n
    if FLAGS.TARGETS:
        # In 64 bits, as there may be more targets than 32 bits count.
        history = tl.maximum(n.to(tl.int64) - tl.load(sequences.num_targets + index), 0).to(tl.int32)
    end = history
    if FLAGS.PREFIX:
        end = history - prefix + 1
    return Sequence(start, key_start, first, n, history, end, window, prefix, full, sinks, group)


@triton.jit
def load_queries(tokens, first, sequence, BLOCK, DIM, BLOCK_DIM, CUT, FLAGS):
    """`load_tile` of queries, or of their gradients, from position `first`."""
    start = sequence.start
    return load_tile(
        tokens, start + first, start + sequence.n, BLOCK, DIM, BLOCK_DIM, CUT, FLAGS, start + sequence.first,
        FLAGS.KEY_OFFSETS,
    )  # fmt: skip


@triton.jit
def load_keys(tokens, first, sequence, BLOCK, DIM, BLOCK_DIM, CUT, FLAGS):
    """`load_tile` of keys, or of values, from position `first`."""
    start = sequence.key_start
    return load_tile(tokens, start + first, start + sequence.n, BLOCK, DIM, BLOCK_DIM, CUT, FLAGS)


@triton.jit
def is_query(i, sequence, FLAGS):
    """Where positions, expanded to a tile, are those of a query."""
    inside = i < sequence.n
    if FLAGS.KEY_OFFSETS:
        inside = inside & (i >= sequence.first)
    return inside


@triton.jit
def one_over_n(attention_scale, sequence, FLAGS):
    """1/N: a constant, or of the sequence's own length, its targets counted as one; 1 for softmax, and where each query
    has its own."""
    if FLAGS.QUERY_SCALE:
        scale = 1.0
    else:
        if FLAGS.BY_LENGTH:
            n, history = sequence.n, sequence.history
            attention_scale = tl.maximum(tl.where(n > history, history + 1, n), 1).to(tl.float32)
        scale = 1.0 / attention_scale
        if FLAGS.SOFTMAX:
            scale = 1.0
    return scale


@triton.jit
def one_over_n_of(attention_scale, i, sequence, FLAGS):
    """As `one_over_n`, or, QUERY_SCALE, that of every query i, expanded to a tile."""
    if FLAGS.QUERY_SCALE:
        scale = 1.0 / tl.load(attention_scale + sequence.start + i, mask=is_query(i, sequence, FLAGS), other=1.0)
    else:
        scale = one_over_n(attention_scale, sequence, FLAGS)
    return scale


@triton.jit
def place(position, sequence, FLAGS):
    """Where the mask lets a token at a position stand."""
    if FLAGS.PREFIX:
        position = tl.maximum(position - sequence.prefix + 1, 0)
    if FLAGS.PREFIX or FLAGS.TARGETS:
        position = tl.minimum(position, sequence.end)
    return position


@triton.jit
def visible(i, j, sequence, FLAGS):
    """Whether query i sees key j: vectors expanded to (queries, keys), or to (keys, queries). Keys beyond the sequence
    are not looked after."""
    if not FLAGS.GENERAL:
        seen = j <= i
    else:
        query, key = place(i, sequence, FLAGS), place(j, sequence, FLAGS)
        distance = query - key
        if FLAGS.BIDIRECTIONAL:
            distance = tl.abs(distance)
        if FLAGS.PREFIX or FLAGS.TARGETS:
            seen = distance > 0
        else:
            seen = distance >= 0
        if FLAGS.WINDOW:
            near = distance <= sequence.window
            if FLAGS.FULL:
                near = near | (query >= sequence.end - sequence.full)
            if FLAGS.SINKS:
                near = near | (j < sequence.sinks)
            seen = seen & near
        if FLAGS.PREFIX or FLAGS.TARGETS:
            seen = seen | (i == j)
        if FLAGS.PREFIX:
            seen = seen | ((query == 0) & (key < sequence.end))
        if FLAGS.GROUPS:
            history, group = sequence.history, sequence.group
            together = (i >= history) & (j >= history) & ((i - history) // group == (j - history) // group)
            if not FLAGS.BIDIRECTIONAL:
                together = together & (j <= i)
            seen = seen | together
        if FLAGS.KEY_OFFSETS:
            seen = seen & (i >= sequence.first)
    return seen


@triton.jit
def _first_at(at, sequence, FLAGS):
    """The first position whose place is `at` or beyond."""
    position = at
    if FLAGS.PREFIX:
        position = tl.where(at > 0, at + sequence.prefix - 1, 0)
    return tl.maximum(position, 0)


@triton.jit
def _past(at, sequence, FLAGS):
    """The first position whose place is beyond `at`."""
    position = at + 1
    if FLAGS.PREFIX:
        position = at + sequence.prefix
    return tl.where(at >= sequence.end, sequence.n, tl.minimum(position, sequence.n))


@triton.jit
def _whole_group(position, sequence, FLAGS):
    """Where the group of the target before `position` ends."""
    if FLAGS.GROUPS:
        history, group = sequence.history, sequence.group
        position = tl.minimum(history + tl.cdiv(position - history, group) * group, sequence.n)
    return position


@triton.jit
def _tiles_between(tile, begin, end, BLOCK):
    """How many tiles the range [begin, end), which may be empty, has from `tile` on."""
    return tl.where(end > begin, tl.maximum(tl.cdiv(end, BLOCK) - tile, 0), 0)


@triton.jit
def _runs(begin, end, second, second_end, third, third_end, BLOCK):
    """The tiles of three ranges of positions, of which the later ones begin later; each tile once."""
    first_tile = begin // BLOCK
    count = _tiles_between(first_tile, begin, end, BLOCK)
    past = first_tile + count
    second_tile = tl.maximum(second // BLOCK, past)
    second_count = _tiles_between(second_tile, second, second_end, BLOCK)
    past = tl.where(second_count > 0, second_tile + second_count, past)
    third_tile = tl.maximum(third // BLOCK, past)
    third_count = _tiles_between(third_tile, third, third_end, BLOCK)
    return TileRuns(first_tile, count, second_tile, second_count, third_tile, third_count)


@triton.jit
def tile_of(index, runs):
    """The index-th tile."""
    later = index - runs.first_count
    tile = tl.where(later < runs.second_count, runs.second + later, runs.third + later - runs.second_count)
    return tl.where(later < 0, runs.first + index, tile)


@triton.jit
def tile_count(runs):
    return runs.first_count + runs.second_count + runs.third_count


@triton.jit
def has_tile(tile, runs):
    found = (tile >= runs.first) & (tile < runs.first + runs.first_count)
    found = found | ((tile >= runs.second) & (tile < runs.second + runs.second_count))
    return found | ((tile >= runs.third) & (tile < runs.third + runs.third_count))


@triton.jit
def key_tiles(begin_query, end_query, sequence, BLOCK, FLAGS):
    """The tiles of keys that some query in [begin_query, end_query) sees: those of the sinks, of what is near, and of
    the targets' own."""
    history = sequence.history
    if FLAGS.KEY_OFFSETS:
        begin_query = tl.maximum(begin_query, sequence.first)
    begin, sinks, own, own_end = history * 0, history * 0, history * 0, history * 0
    past = tl.minimum(end_query, history)
    if FLAGS.BIDIRECTIONAL:
        past = tl.where(begin_query < history, sequence.n, history)
    if FLAGS.WINDOW:
        whole = past
        last = place(end_query - 1, sequence, FLAGS)
        begin = _first_at(place(begin_query, sequence, FLAGS) - sequence.window, sequence, FLAGS)
        if FLAGS.BIDIRECTIONAL:
            past = tl.minimum(past, _past(last + sequence.window, sequence, FLAGS))
        if FLAGS.FULL:
            full = last >= sequence.end - sequence.full
            begin, past = tl.where(full, 0, begin), tl.where(full, whole, past)
        if FLAGS.SINKS:
            sinks = tl.minimum(sequence.sinks, whole)
    if FLAGS.PREFIX:
        past = tl.where(begin_query < sequence.prefix, tl.maximum(past, history), past)
    if FLAGS.TARGETS:
        if FLAGS.GROUPS:
            own = tl.maximum(begin_query - history, 0) // sequence.group * sequence.group + history
        else:
            own = tl.maximum(begin_query, history)
        own_end = tl.where(end_query > history, end_query, 0)
        if FLAGS.BIDIRECTIONAL:
            own_end = tl.where(end_query > history, _whole_group(end_query, sequence, FLAGS), 0)
    return _runs(history * 0, sinks, begin, past, own, own_end, BLOCK)


@triton.jit
def query_tiles(begin_key, end_key, sequence, BLOCK, FLAGS):
    """The tiles of queries that see some key in [begin_key, end_key): those of the prefix, those near, and the newest
    of the history with the targets."""
    n, history = sequence.n, sequence.history
    begin, stop = begin_key, n
    prefix, full = history * 0, n
    only_targets = begin_key >= history
    if FLAGS.BIDIRECTIONAL:
        begin = begin_key * 0
    if FLAGS.WINDOW:
        last = place(tl.minimum(end_key, tl.maximum(history, 1)) - 1, sequence, FLAGS)
        stop = _past(last + sequence.window, sequence, FLAGS)
        if FLAGS.BIDIRECTIONAL:
            begin = _first_at(place(begin_key, sequence, FLAGS) - sequence.window, sequence, FLAGS)
        if FLAGS.SINKS:
            sink = begin_key < sequence.sinks
            stop = tl.where(sink, n, stop)
            if FLAGS.BIDIRECTIONAL:
                begin = tl.where(sink, 0, begin)
        if FLAGS.FULL:
            full = _first_at(sequence.end - sequence.full, sequence, FLAGS)
            if FLAGS.BIDIRECTIONAL:
                begin = tl.minimum(begin, full)
    if FLAGS.TARGETS:
        stop = tl.where(end_key > history, tl.maximum(stop, _whole_group(end_key, sequence, FLAGS)), stop)
        stop = tl.where(only_targets, _whole_group(end_key, sequence, FLAGS), stop)
        full = tl.where(only_targets, n, full)
    if FLAGS.PREFIX:
        prefix = tl.where(only_targets, 0, tl.minimum(sequence.prefix, n))
    first = history * 0
    if FLAGS.KEY_OFFSETS:
        first = sequence.first
        begin = tl.maximum(begin, first)
        full = tl.maximum(full, first)
    return _runs(first, prefix, begin, stop, full, n, BLOCK)


@triton.jit
def whole_key_tiles(begin_query, end_query, runs, sequence, BLOCK, FLAGS):
    """Of `key_tiles`, tiles that are seen whole: of the history, as far as all these queries see it. Sinks are of the
    first run, what is near of the second."""
    history = sequence.history
    if FLAGS.KEY_OFFSETS:
        begin_query = tl.maximum(begin_query, sequence.first)
    begin, sinks = history * 0, history * 0
    past = tl.minimum(begin_query, history)
    if FLAGS.BIDIRECTIONAL:
        past = history
    if FLAGS.PREFIX:  # of a history that is shorter, tokens see themselves alone
        past = tl.where(sequence.end > 0, past, 0)
    if FLAGS.WINDOW:
        if FLAGS.SINKS:
            sinks = tl.minimum(sequence.sinks, past)
        near = place(begin_query, sequence, FLAGS)
        begin = _first_at(place(end_query - 1, sequence, FLAGS) - sequence.window, sequence, FLAGS)
        end = past
        if FLAGS.BIDIRECTIONAL:
            end = tl.minimum(past, _past(near + sequence.window, sequence, FLAGS))
        if FLAGS.FULL:
            full = near >= sequence.end - sequence.full
            begin, end = tl.where(full, 0, begin), tl.where(full, past, end)
        past = end
    sink_count = tl.minimum(sinks // BLOCK, runs.first_count)
    tile = tl.maximum(tl.cdiv(begin, BLOCK), runs.second)
    end_tile = tl.minimum(past // BLOCK, runs.second + runs.second_count)
    count = tl.maximum(end_tile - tile, 0)
    return WholeTiles(history * 0, sink_count, runs.first_count + tile - runs.second, count)


@triton.jit
def whole_query_tiles(begin_key, end_key, runs, sequence, BLOCK, FLAGS):
    """Of `query_tiles`, tiles of queries that all see all of these keys, of the history: near ones are of the second
    run, the newest of the third. `end_key` is where the tile ends, though the sequence end before: keys beyond it have
    scores without a bound, so that a cut tile is masked."""
    n, history = sequence.n, sequence.history
    begin, end, full = end_key, n, n
    if FLAGS.BIDIRECTIONAL:
        begin = end_key * 0
    if FLAGS.WINDOW:
        if FLAGS.FULL:
            full = tl.maximum(begin, _first_at(sequence.end - sequence.full, sequence, FLAGS))
        everywhere = begin
        end = _past(place(begin_key, sequence, FLAGS) + sequence.window, sequence, FLAGS)
        if FLAGS.BIDIRECTIONAL:
            begin = _first_at(place(end_key - 1, sequence, FLAGS) - sequence.window, sequence, FLAGS)
        if FLAGS.SINKS:
            sink = end_key <= sequence.sinks
            begin, end = tl.where(sink, everywhere, begin), tl.where(sink, n, end)
    nobody = end_key > history
    if FLAGS.PREFIX:
        nobody = nobody | (sequence.end <= 0)
    begin, full = tl.where(nobody, n, begin), tl.where(nobody, n, full)
    if FLAGS.KEY_OFFSETS:
        begin, full = tl.maximum(begin, sequence.first), tl.maximum(full, sequence.first)
    tile = tl.maximum(tl.cdiv(begin, BLOCK), runs.second)
    count = tl.maximum(tl.minimum(end // BLOCK, runs.second + runs.second_count) - tile, 0)
    newest = tl.maximum(tl.cdiv(full, BLOCK), runs.third)
    newest_count = tl.maximum(tl.minimum(n // BLOCK, runs.third + runs.third_count) - newest, 0)
    before = runs.first_count + runs.second_count
    return WholeTiles(runs.first_count + tile - runs.second, count, before + newest - runs.third, newest_count)


@triton.jit
def whole_count(whole):
    return whole.first_count + whole.second_count


@triton.jit
def whole_tile_of(index, whole, runs):
    """The index-th tile that is seen whole."""
    later = index - whole.first_count
    return tile_of(tl.where(later < 0, whole.first + index, whole.second + later), runs)


@triton.jit
def other_tile_of(index, whole, runs):
    """The index-th tile that is not."""
    index += tl.where(index >= whole.first, whole.first_count, 0)
    index += tl.where(index >= whole.second, whole.second_count, 0)
    return tile_of(index, runs)


@triton.jit
def store_tile(tokens, tile, first, sequence, BLOCK, DIM, BLOCK_DIM, OF_KEYS=False, CUT_BELOW=False):
    """Writes (BLOCK, BLOCK_DIM) of one head from position `first` on, as far as the sequence reaches. CUT_BELOW: from
    its first query on."""
    position = first + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_DIM)
    start = sequence.start
    if OF_KEYS:
        start = sequence.key_start
    index = (start + position).to(tl.int64)
    rows = tokens.source + index[:, None] * tokens.token_stride + tokens.head * tokens.head_stride
    inside = position < sequence.n
    if CUT_BELOW:
        inside = inside & (position >= sequence.first)
    tl.store(
        rows + columns[None, :],
        tile.to(tokens.source.dtype.element_ty),
        mask=inside[:, None] & (columns < DIM)[None, :],
    )

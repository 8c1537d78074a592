"""Where a program finds its sequence, the tiles of keys it walks over, and the mask.

Positions are places within a sequence. Targets, a sequence's last tokens, all stand at `history`, the position of the
first of them.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from ..tensor_cores import operand
from .arguments import Sequence


@triton.jit
def load_tile(tokens, first, end, BLOCK, DIM, BLOCK_DIM, CUT, FLAGS):
    """(BLOCK, BLOCK_DIM): tokens first.. of one head. Tokens from `end` on are zero, or, loaded through a tensor
    descriptor and not CUT, those of the next sequence, which may be anything: no sum may go over them, since zero times
    what is not finite is not zero. CUT takes a tile through registers on its way to a product."""
    PRECISION: tl.constexpr = FLAGS.PRECISION
    if FLAGS.DESCRIPTOR:
        tile = tokens.source.load([first.to(tl.int32), tokens.head * DIM])
        if CUT:
            tile = tl.where((first + tl.arange(0, BLOCK) < end)[:, None], tile, 0.0)
    else:
        index = first + tl.arange(0, BLOCK)
        columns = tl.arange(0, BLOCK_DIM)
        inside = (index < end)[:, None]
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
def sequence_of(sequences, index, window, prefix, FLAGS):
    """The index-th sequence."""
    start = tl.load(sequences.offsets + index)
    n = (tl.load(sequences.offsets + index + 1) - start).to(tl.int32)
    history = n
    if FLAGS.TARGETS:
        history = tl.maximum(n - tl.load(sequences.num_targets + index).to(tl.int32), 0)
    return Sequence(start, n, history, tl.minimum(prefix, history), window)


@triton.jit
def one_over_n(attention_scale, sequence, FLAGS):
    """1/N: a constant, or of the sequence's own length, its targets counted as one; 1 for softmax."""
    if FLAGS.BY_LENGTH:
        n, history = sequence.n, sequence.history
        attention_scale = tl.maximum(tl.where(n > history, history + 1, n), 1).to(tl.float32)
    scale = 1.0 / attention_scale
    if FLAGS.SOFTMAX:
        scale = 1.0
    return scale


@triton.jit
def visible(i, j, sequence, FLAGS):
    """Whether query i sees key j: vectors expanded to (queries, keys), or to (keys, queries)."""
    history = sequence.history
    seen = j <= i
    if FLAGS.TARGETS:
        seen = seen & ((j < history) | (i == j))
    if FLAGS.WINDOW:
        seen = seen & (tl.minimum(i, history) - tl.minimum(j, history) <= sequence.window)
    if FLAGS.PREFIX:
        seen = seen | (j < sequence.prefix)
    return seen


@triton.jit
def key_tiles(first_query, end_query, sequence, BLOCK, FLAGS):
    """The tiles of keys that some query in [first_query, end_query) sees, as four numbers for `key_tile`:
    how many; how many of them hold the prefix a window would cut off; the next tile; and the history's tiles end."""
    history, prefix = sequence.history, sequence.prefix
    reach = end_query
    if FLAGS.PREFIX:
        reach = tl.maximum(reach, prefix)
    past = tl.cdiv(tl.minimum(reach, history), BLOCK)
    begin = 0
    cut_off = 0
    if FLAGS.WINDOW:
        begin = tl.minimum(tl.maximum(tl.minimum(first_query, history) - sequence.window, 0) // BLOCK, past)
        if FLAGS.PREFIX:
            cut_off = tl.minimum(tl.cdiv(prefix, BLOCK), begin)
    count = cut_off + past - begin
    if FLAGS.TARGETS:
        own = tl.maximum(first_query // BLOCK, past)
        count += tl.maximum(tl.cdiv(end_query, BLOCK) - own, 0)
    return count, cut_off, begin, past


@triton.jit
def key_tile(index, first_query, cut_off, begin, past, BLOCK):
    """The position of the index-th of those tiles: prefix, then history, then the targets' own."""
    tile = tl.where(index < cut_off, index, begin + index - cut_off)
    own = tl.maximum(first_query // BLOCK, past) + index - cut_off - (past - begin)
    return tl.where(tile < past, tile, own) * BLOCK


@triton.jit
def query_tiles(first_key, end_key, sequence, BLOCK, FLAGS):
    """The tiles of queries that see some key in [first_key, end_key): the first of them, and where they end."""
    n, history = sequence.n, sequence.history
    begin = first_key // BLOCK
    stop = n
    if FLAGS.WINDOW:
        last_seen = tl.minimum(end_key, history) - 1 + sequence.window
        stop = tl.where(last_seen >= history, n, tl.minimum(last_seen + 1, n))
    if FLAGS.TARGETS:
        stop = tl.where(first_key >= history, end_key, tl.maximum(stop, end_key))
    if FLAGS.PREFIX:
        begin = tl.where(first_key < sequence.prefix, 0, begin)
        stop = tl.where(first_key < sequence.prefix, n, stop)
    return begin, tl.cdiv(stop, BLOCK)


@triton.jit
def store_tile(tokens, tile, first, sequence, BLOCK, DIM, BLOCK_DIM):
    """Writes (BLOCK, BLOCK_DIM) of one head from position `first` on, as far as the sequence reaches."""
    position = first + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_DIM)
    index = (sequence.start + position).to(tl.int64)
    rows = tokens.source + index[:, None] * tokens.token_stride + tokens.head * tokens.head_stride
    tl.store(
        rows + columns[None, :],
        tile.to(tokens.source.dtype.element_ty),
        mask=(position < sequence.n)[:, None] & (columns < DIM)[None, :],
    )

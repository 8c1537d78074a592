"""The tuples that kernels and their helpers take, so that none takes sixty arguments.

From the host come pointers (`Sequences`, `Tables`), strides (`Strides`) and constants (`Shape`, `Flags`). A kernel
makes the others of them. Outside stay tensors of tokens, of which Triton takes descriptors as arguments of their own
only, and whole numbers that differ from batch to batch: within a tuple each would be specialised, and the kernel
compiled again.

Up to Triton 3.7 a constant of a tuple is a bare number or text: where it stands in a list, as a shape, and where a text
is passed on, it must have a name of its own first. And no helper of 3.6 can return a tuple that holds None.
"""

from typing import Any, NamedTuple

#: The arguments of kernels that say what a mask is; those of `Sequence` that have these names.
MASK_NUMBERS = ("window", "prefix", "full", "sinks", "group")


class Sequences(NamedTuple):
    """Pointers of what there is one of for each sequence."""

    offsets: Any  # (B + 1,) int64
    num_targets: Any  # (B,) int64, or None
    key_offsets: Any  # (B + 1,) int64, or None where they are the queries'


class Tables(NamedTuple):
    """Pointers of the bias tables, and of what `prepare` makes of them; None for what a call does not need."""

    position: Any  # (2P - 1,) float32
    spread: Any  # (4, width) float32: `spread_kernel`
    time: Any  # (129,) float32
    edges: Any  # (130,) int64: the least second of every bucket, then the largest number
    band: Any  # (T, 2 BAND_BLOCK): `band_kernel`
    query_time: Any  # (T,) int64
    key_time: Any  # (T,) int64
    since: Any  # (T + T') int32: `relative_time_kernel`
    tiles: Any  # (query tile slots, key tiles) int32: `tile_bucket_kernel`


class Strides(NamedTuple):
    """Elements from a token to the next, and from a head to the next; `o` is the output, or its gradient."""

    q_token: int
    q_head: int
    k_token: int
    k_head: int
    v_token: int
    v_head: int
    o_token: int
    o_head: int


class Shape(NamedTuple):
    """Constants: head dimensions, the widths of their tiles, and queries and keys a tile."""

    DQK: int
    DV: int
    BLOCK_DQK: int
    BLOCK_DV: int
    BLOCK_M: int
    BLOCK_N: int


class Flags(NamedTuple):
    """Constants: what there is to do, and how."""

    POSITION: bool  # there is a position bias
    TIME: bool  # there is a time bias
    TARGETS: bool
    WINDOW: bool
    PREFIX: bool
    FULL: bool  # the history's newest queries see beyond the window
    SINKS: bool  # the first keys are seen from beyond it
    BIDIRECTIONAL: bool  # not causal
    GROUPS: bool  # targets see others of their group
    KEY_OFFSETS: bool  # rows have keys of their own number
    QUERY_SCALE: bool  # each query has an N of its own
    GENERAL: bool  # one of the last nine: more than the causal mask and one N
    WHOLE: bool  # of these masks, and of rows long enough: most tiles that all see have a loop without the mask
    BY_LENGTH: bool  # N is the sequence's own length
    SOFTMAX: bool  # instead of silu
    DESCRIPTOR: bool  # tokens are loaded through tensor descriptors
    PRECISION: str  # of float32 products: tf32 or ieee
    APPROXIMATE_TANH: bool  # silu by one special-function call
    MMA_LAYOUT: bool  # score tiles are in the layout of Hopper's tensor cores: `position_diagonals` may build on it
    INLINE_ASM: bool  # the assembly, not what it stands for


class Sequence(NamedTuple):
    """What a program works on, and all that its masks depend on.

    Positions are keys'. A sequence's last query stands where its last key does, so that both sides end at n; of two
    lengths, queries begin at another position than keys.
    """

    start: Any  # the token of a query at position 0
    key_start: Any  # that of a key there
    first: Any  # the first query's position, if none is before the first key
    n: Any  # length
    history: Any  # tokens before the targets, which all stand at this position
    end: Any  # where the history ends in places, which the mask counts: `tiles.place`
    window: Any
    prefix: Any
    full: Any
    sinks: Any
    group: Any


class TileRuns(NamedTuple):
    """Three runs of tiles, one behind the other."""

    first: Any  # tile
    first_count: Any
    second: Any
    second_count: Any
    third: Any
    third_count: Any


class WholeTiles(NamedTuple):
    """Of the tiles of `TileRuns`, counted one behind the other, two ranges of which every query sees every key."""

    first: Any  # index
    first_count: Any
    second: Any
    second_count: Any


class Tokens(NamedTuple):
    """One head's vectors: (T, h, d)."""

    source: Any  # a pointer, or a tensor descriptor
    token_stride: Any
    head_stride: Any
    head: Any


class Bias(NamedTuple):
    """Tables as a program reads them."""

    tables: Any
    position_zero: Any  # index of p[0]
    key_since: Any  # of `tables.since`, what belongs to keys


class Side(NamedTuple):
    """Queries or keys of a tile."""

    position: Any  # (tile,) within the sequence
    time: Any  # pointer (T,) int64
    since: Any  # times since the sequence's first key: those of the program's own tile; of the others a pointer (T,)


class Buckets(NamedTuple):
    """Into which time buckets a tile's pairs fall."""

    first: Any
    last: Any
    regular: Any  # int32 times since the sequence's first key decide
    w_first: Any  # the bias of the first

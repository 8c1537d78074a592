"""Which tiles the kernels visit under a mask: all that somebody sees, each once, and none between two intervals."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import random
from typing import Any

import pytest
import torch
from drawn_masks import offsets_of, random_mask

from kernels.hstu_attention import naive
from kernels.hstu_attention.mask import Mask

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
inputs_module = pytest.importorskip("kernels.hstu_attention.inputs", exc_type=ImportError)
tiles = pytest.importorskip("kernels.hstu_attention.tiles", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_M, BLOCK_N = 32, 16


@triton.jit(do_not_specialize=["window", "prefix", "full", "sinks", "group"])
def visits_kernel(
    by_query, by_key, by_bias, whole_by_query, whole_by_key, sequences, window, prefix, full, sinks, group, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """How often each tile (queries, keys) is visited by programs of queries, of keys, and of the biases' gradients; and
    how often by the first two as one that is seen whole."""
    sequence = tiles.sequence_of(sequences, tl.program_id(0), window, prefix, full, sinks, group, FLAGS)
    n = sequence.n
    grid = tl.program_id(0) * width * width
    for tile in range(tl.cdiv(n, BLOCK_M)):
        runs = tiles.key_tiles(tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, n), sequence, BLOCK_N, FLAGS)
        whole = tiles.whole_key_tiles(
            tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, n), runs, sequence, BLOCK_N, FLAGS
        )
        for index in range(tiles.tile_count(runs) - tiles.whole_count(whole)):
            tl.atomic_add(by_query + grid + tile * width + tiles.other_tile_of(index, whole, runs), 1)
        for index in range(tiles.whole_count(whole)):
            tl.atomic_add(by_query + grid + tile * width + tiles.whole_tile_of(index, whole, runs), 1)
            tl.atomic_add(whole_by_query + grid + tile * width + tiles.whole_tile_of(index, whole, runs), 1)
        for key_tile in range(tl.cdiv(n, BLOCK_N)):
            tl.store(by_bias + grid + tile * width + key_tile, tiles.has_tile(key_tile, runs).to(tl.int32))
    for key_tile in range(tl.cdiv(n, BLOCK_N)):
        first = key_tile * BLOCK_N
        runs = tiles.query_tiles(first, tl.minimum(first + BLOCK_N, n), sequence, BLOCK_M, FLAGS)
        whole = tiles.whole_query_tiles(first, first + BLOCK_N, runs, sequence, BLOCK_M, FLAGS)
        for index in range(tiles.tile_count(runs) - tiles.whole_count(whole)):
            tl.atomic_add(by_key + grid + tiles.other_tile_of(index, whole, runs) * width + key_tile, 1)
        for index in range(tiles.whole_count(whole)):
            tl.atomic_add(by_key + grid + tiles.whole_tile_of(index, whole, runs) * width + key_tile, 1)
            tl.atomic_add(whole_by_key + grid + tiles.whole_tile_of(index, whole, runs) * width + key_tile, 1)


def visits(
    queries: list[int], keys: list[int], mask: Mask, targets: list[int] | None
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Of every sequence's tiles (B, tiles, tiles) the numbers of visits, three times; those as seen whole, twice; which
    somebody sees; and which every query of the tile sees whole, keys being in the sequence; or whose queries, being in
    it, all see every key of."""
    width = -(-max(*queries, *keys, 1) // BLOCK_N)
    zeros = torch.zeros(sum(queries), 1, 16, device=DEVICE), torch.zeros(sum(keys), 1, 16, device=DEVICE)
    of_queries, of_keys = offsets_of(queries).to(DEVICE), offsets_of(keys).to(DEVICE)
    num_targets = None if targets is None else torch.tensor(targets, device=DEVICE)
    key_offsets = None if queries == keys else of_keys
    call: Any = inputs_module.Inputs(
        zeros[0], zeros[1], zeros[1], of_queries, width * BLOCK_N, 1.0, 1.0, None, None, None, None, softmax=False,
        num_targets=num_targets, key_offsets=key_offsets, **mask._asdict(),
    )  # fmt: skip
    found = [torch.zeros(len(keys), width, width, dtype=torch.int32, device=DEVICE) for _ in range(5)]
    visits_kernel[(len(keys),)](
        *found, call.sequences, mask.max_attn_len, mask.contextual_seq_len, mask.min_full_attn_seq_len,
        mask.num_sink_tokens, mask.target_group_size, width, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        FLAGS=call.flags(False, False),
    )  # fmt: skip
    seen = torch.zeros(len(keys), width * BLOCK_M, width * BLOCK_N, dtype=torch.bool, device=DEVICE)
    visible = naive.visible(of_queries, width * BLOCK_N, mask, num_targets, key_offsets)
    for row, (nq, nk) in enumerate(zip(queries, keys, strict=True)):
        blind = max(nq - nk, 0)  # queries stand at keys' positions
        seen[row, nk - nq + blind : nk, :nk] = visible[row if len(visible) > 1 else 0, blind:nq, :nk]
    # What a program of queries makes for one that is not there is thrown away.
    there = torch.zeros_like(seen)
    for row, (nq, nk) in enumerate(zip(queries, keys, strict=True)):
        there[row, max(nk - nq, 0) : nk] = True
    tiled = [x.view(len(keys), width, BLOCK_M, width, BLOCK_N) for x in (seen, seen | ~there)]
    whole = [tiled[1].all(4).all(2), tiled[0].all(4).all(2)]
    return found[:3], found[3:], tiled[0].any(4).any(2), whole


def test_all_that_is_seen_is_visited_once() -> None:
    draw = random.Random(0)
    for _ in range(300 if DEVICE == "cuda" else 60):
        keys = [draw.randint(0, 150) for _ in range(3)]
        queries = [draw.randint(0, 150) for _ in range(3)] if draw.random() < 0.5 else keys
        targets = [draw.randint(0, 80) for _ in range(3)] if draw.random() < 0.5 else None
        mask = random_mask(draw, targets is not None, most=60)
        found, as_whole, seen, whole = visits(queries, keys, mask, targets)
        for kind, times in zip(("queries", "keys", "biases"), found, strict=True):
            where = f"{kind}: {mask}, {queries}, {keys}, {targets}"
            assert (times[seen] == 1).all(), where
            assert (times <= 1).all(), where
        for kind, times, all_see in zip(("queries", "keys"), as_whole, whole, strict=True):
            assert (times[~all_see] == 0).all(), f"{kind}: {mask}, {queries}, {keys}, {targets}"


@pytest.mark.parametrize(
    ("mask", "targets"),
    [
        (Mask(max_attn_len=20), None),
        (Mask(max_attn_len=20, num_sink_tokens=17), None),
        (Mask(max_attn_len=40, num_sink_tokens=3), None),
        (Mask(max_attn_len=20, num_sink_tokens=17), [70, 0]),
        (Mask(max_attn_len=20, num_sink_tokens=17, target_group_size=16), [70, 0]),
        (Mask(max_attn_len=20, num_sink_tokens=17, causal=False), None),
        (Mask(max_attn_len=20, min_full_attn_seq_len=9), None),
        (Mask(max_attn_len=20, contextual_seq_len=9), None),
        (Mask(contextual_seq_len=40), [70, 3]),
    ],
    ids=str,
)
def test_what_nobody_sees_is_not_visited(mask: Mask, targets: list[int] | None) -> None:
    """Programs of queries and those of keys."""
    found, _, seen, _ = visits([300, 211], [300, 211], mask, targets)
    for kind, times in zip(("queries", "keys", "biases"), found, strict=True):
        assert torch.equal(times, seen.int()), kind


@pytest.mark.parametrize(
    ("mask", "targets"),
    [
        (Mask(max_attn_len=100), None),
        (Mask(max_attn_len=100, num_sink_tokens=32), None),
        (Mask(max_attn_len=100, num_sink_tokens=32, causal=False), None),
        (Mask(), [70, 0]),
        (Mask(causal=False), [70, 0]),
    ],
    ids=str,
)
def test_what_all_see_takes_no_mask(mask: Mask, targets: list[int] | None) -> None:
    """Of the history, where sinks end with a tile."""
    lengths = [300, 211]
    _, as_whole, seen, whole = visits(lengths, lengths, mask, targets)
    history = torch.tensor(lengths, device=DEVICE) - torch.tensor(targets or [0, 0], device=DEVICE)
    key_end = (torch.arange(seen.shape[2], device=DEVICE) + 1) * BLOCK_N
    for kind, times, all_see in zip(("queries", "keys"), as_whole, whole, strict=True):
        assert torch.equal(times == 1, all_see & seen & (key_end <= history[:, None, None])), kind
        assert (times == 1).any(), kind

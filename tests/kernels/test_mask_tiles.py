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
    by_query, by_key, by_bias, sequences, window, prefix, full, sinks, group, width, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """How often each tile (queries, keys) is visited by programs of queries, of keys, and of the biases' gradients."""
    sequence = tiles.sequence_of(sequences, tl.program_id(0), window, prefix, full, sinks, group, FLAGS)
    n = sequence.n
    grid = tl.program_id(0) * width * width
    for tile in range(tl.cdiv(n, BLOCK_M)):
        runs = tiles.key_tiles(tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, n), sequence, BLOCK_N, FLAGS)
        for index in range(tiles.tile_count(runs)):
            tl.atomic_add(by_query + grid + tile * width + tiles.tile_of(index, runs), 1)
        for key_tile in range(tl.cdiv(n, BLOCK_N)):
            tl.store(by_bias + grid + tile * width + key_tile, tiles.has_tile(key_tile, runs).to(tl.int32))
    for key_tile in range(tl.cdiv(n, BLOCK_N)):
        first = key_tile * BLOCK_N
        runs = tiles.query_tiles(first, tl.minimum(first + BLOCK_N, n), sequence, BLOCK_M, FLAGS)
        for index in range(tiles.tile_count(runs)):
            tl.atomic_add(by_key + grid + tiles.tile_of(index, runs) * width + key_tile, 1)


def visits(
    queries: list[int], keys: list[int], mask: Mask, targets: list[int] | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of every sequence's tiles the numbers of visits, three times (B, tiles, tiles), and which somebody sees."""
    width = -(-max(*queries, *keys, 1) // BLOCK_N)
    zeros = torch.zeros(sum(queries), 1, 16, device=DEVICE), torch.zeros(sum(keys), 1, 16, device=DEVICE)
    of_queries, of_keys = offsets_of(queries).to(DEVICE), offsets_of(keys).to(DEVICE)
    num_targets = None if targets is None else torch.tensor(targets, device=DEVICE)
    key_offsets = None if queries == keys else of_keys
    call: Any = inputs_module.Inputs(
        zeros[0], zeros[1], zeros[1], of_queries, width * BLOCK_N, 1.0, 1.0, None, None, None, None, softmax=False,
        num_targets=num_targets, key_offsets=key_offsets, **mask._asdict(),
    )  # fmt: skip
    found = [torch.zeros(len(keys), width, width, dtype=torch.int32, device=DEVICE) for _ in range(3)]
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
    return found, seen.view(len(keys), width, BLOCK_M, width, BLOCK_N).any(4).any(2)


def test_all_that_is_seen_is_visited_once() -> None:
    draw = random.Random(0)
    for _ in range(300 if DEVICE == "cuda" else 60):
        keys = [draw.randint(0, 150) for _ in range(3)]
        queries = [draw.randint(0, 150) for _ in range(3)] if draw.random() < 0.5 else keys
        targets = [draw.randint(0, 80) for _ in range(3)] if draw.random() < 0.5 else None
        mask = random_mask(draw, targets is not None, most=60)
        found, seen = visits(queries, keys, mask, targets)
        for kind, times in zip(("queries", "keys", "biases"), found, strict=True):
            where = f"{kind}: {mask}, {queries}, {keys}, {targets}"
            assert (times[seen] == 1).all(), where
            assert (times <= 1).all(), where


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
    found, seen = visits([300, 211], [300, 211], mask, targets)
    for kind, times in zip(("queries", "keys", "biases"), found, strict=True):
        assert torch.equal(times, seen.int()), kind

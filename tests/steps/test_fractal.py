"""The expansion for load tests: its blocks are the matrix rearranged, its shares the matrix resized."""

import tracemalloc
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from steps.data.generators.draws import bits
from steps.data.generators.fractal import Expansion

#: 5 users with 1 to 6 of 7 items.
SEQUENCES = [[3], [1, 2, 3, 4, 5, 6], [7, 1], [2, 3, 1], [1, 5, 7, 2]]
OFFSETS = np.array([0, 1, 7, 9, 12, 16])
ITEM = np.array([item for sequence in SEQUENCES for item in sequence])


def small(**changes: Any) -> Expansion:
    return Expansion(OFFSETS, ITEM, 7, **({"rows": 3, "columns": 4, "length": 1e6} | changes))


def large() -> Expansion:
    """2,000 users with 1 to 60 of 300 items, of which the first are the most popular."""
    random = np.random.default_rng(0)
    chances = 1 / np.arange(1, 301)
    lengths = random.integers(1, 61, 2000)
    item = [1 + random.choice(300, length, replace=False, p=chances / chances.sum()) for length in lengths]
    return Expansion(np.concatenate([[0], lengths.cumsum()]), np.concatenate(item), 300, 4, 50, 40.0)


def test_a_whole_block_is_the_matrix_with_users_and_items_rearranged() -> None:
    expansion = small(length=1e6)
    expansion.__dict__["shares"] = np.ones((3, 4))
    matrix = np.zeros((15, 28), dtype=int)
    for user in range(15):
        matrix[user, expansion.sequence(user) - 1] += 1
    assert matrix.max() == 1
    original = np.zeros((5, 7), dtype=int)
    for user, sequence in enumerate(SEQUENCES):
        original[user, np.array(sequence) - 1] = 1
    # The same users, each as often, whatever the items are called: their numbers of items shared with each other.
    shared = sorted((original @ original.T).ravel())
    seen = set()
    for row in range(3):
        for column in range(4):
            block = matrix[5 * row : 5 * row + 5, 7 * column : 7 * column + 7]
            assert sorted((block @ block.T).ravel()) == shared
            assert sorted(block.sum(0)) == sorted(original.sum(0))
            seen.add(block.tobytes())
    assert len(seen) > 6  # and not all alike


def test_shares_are_the_matrix_resized_by_averaging() -> None:
    # Users 0 to 2 are the first half, 3 and 4 the other; 7 items in two columns: the fourth is half in each.
    reduced = np.array([[2 + 1 + 2 + 0.5, 0.5 + 1 + 1 + 1], [2 + 2 + 1, 1 + 1]])
    found = small(rows=2, columns=2, length=0.32).shares  # in all 0.32 x 2 x 5 / 16 = 0.2
    np.testing.assert_allclose(found, 0.2 * reduced / 16, rtol=1e-14)
    # More columns than items: 14 halves of items.
    wide = small(rows=1, columns=14, length=0.32).shares
    np.testing.assert_allclose(wide, [0.1 * np.repeat([4, 3, 3, 1, 2, 1, 2], 2) / 32], rtol=1e-14)


def test_sequences_have_the_mean_length_wanted_and_no_item_twice() -> None:
    expansion = large()
    assert (expansion.num_users, expansion.num_items) == (8000, 15_000)
    sequences = [expansion.sequence(user) for user in range(8000)]
    assert all(len(np.unique(one)) == len(one) for one in sequences)
    every = np.concatenate(sequences)
    assert 1 <= every.min() <= every.max() <= 15_000
    capped = expansion.shares.sum() * len(expansion.item) / 8000  # what a share of 1 at most leaves of the 40
    assert len(every) / 8000 == pytest.approx(capped, rel=0.02)
    # A column has as many interactions as its share says; popularity has a long tail over all items.
    of_column = np.bincount((every - 1) // 300, minlength=50)
    np.testing.assert_allclose(of_column / len(every), expansion.shares.sum(0) / expansion.shares.sum(), atol=0.01)
    popular = np.sort(np.bincount(every, minlength=15_001)[1:])[::-1]
    assert popular[:1500].sum() > 0.4 * len(every)


def test_a_user_is_made_alone_the_same_everywhere() -> None:
    expansion = large()
    last = expansion.sequence(7999)
    for user in (0, 5):
        expansion.sequence(user)
    assert np.array_equal(expansion.sequence(7999), last)
    assert not np.array_equal(replace(expansion, seed=1).sequence(7999), last)


def test_a_sequence_is_that_of_a_plain_twin() -> None:
    """Another way through the same draws, an interaction at a time, in Python's own numbers."""
    expansion = small(length=3.5)

    def draw(stream: int, index: int) -> int:
        return int(bits(0, stream, np.array([index]))[0])

    def below(stream: int, index: int, number: int) -> int:
        return (draw(stream, index) >> 32) * number >> 32

    for user in range(15):
        row, place = user // 5, user % 5
        found = []
        for column in range(4):
            block, pair = row * 4 + column, user * 4 + column
            of_users = [1, 2, 3, 4][below(200, block, 4)]  # all numbers that share no factor with 5 users, or 7 items
            source = SEQUENCES[(of_users * place + below(201, block, 5)) % 5]
            of_items = [1, 2, 3, 4, 5, 6][below(202, block, 6)]
            wanted = Fraction(float(expansion.shares[row, column])) * len(source) + Fraction(
                draw(204, pair) >> 11, 2**53
            )
            count, start = min(int(wanted), len(source)), draw(205, pair) % len(source)
            for number in range(count):
                item = source[(start + number * len(source) // count) % len(source)]
                found.append(1 + 7 * column + (of_items * (item - 1) + below(203, block, 7)) % 7)
        assert expansion.sequence(user).tolist() == found


@pytest.mark.parametrize(("rows", "columns", "items"), [(16, 16_384, 438_173_696), (20, 36_864, 985_890_816)])
def test_sizes_that_the_authors_of_hstu_generate_need_little_memory(rows: int, columns: int, items: int) -> None:
    """Of MovieLens-20M's 26,744 rated movies: 438 and 986 million."""
    item = np.arange(100_000) * 37 % 26_744 + 1
    tracemalloc.start()
    try:
        expansion = Expansion(np.arange(0, 100_001, 10), item, 26_744, rows, columns, 2000.0)
        found = expansion.sequence(expansion.num_users - 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert expansion.num_items == items
    assert 1500 < len(found) < 2500
    assert 0.9 * items < found.max() <= items
    assert peak < 100e6


@pytest.mark.parametrize("changes", [{"rows": 0}, {"length": 0.0}, {"columns": 1 << 51}])
def test_what_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rows, columns"):
        small(**changes)
    with pytest.raises(ValueError, match="user 15 is none of 0 to 14"):
        small().sequence(15)

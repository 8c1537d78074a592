"""Draws by counter: a hash of seed, stream and index, in integers alone.

A draw needs no draw before it, so that any part of a file can be made alone, and it is the same on every machine.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def bits(seed: int, stream: int, index: Array) -> Array:
    """64 random bits for each index (non-negative whole numbers), as uint64: the hash of splitmix64.

    Different seeds or streams give unrelated bits; different indices of one stream never the same ones.
    """
    key = _mixed((_mixed(seed & _MASK) + stream * _GOLDEN) & _MASK)
    found = index.astype(np.uint64)
    found *= np.uint64(_GOLDEN)
    found += np.uint64(key)
    found ^= found >> np.uint64(30)
    found *= np.uint64(_MIX_1)
    found ^= found >> np.uint64(27)
    found *= np.uint64(_MIX_2)
    found ^= found >> np.uint64(31)
    return found


def below(random: Array, bound: int | Array) -> Array:
    """Whole numbers (int64) from 0 to `bound` - 1, with bounds under 2**32, of the upper 32 of 64 random bits."""
    upper = random >> np.uint64(32)
    upper *= np.asarray(bound, dtype=np.uint64)
    upper >>= np.uint64(32)
    return upper.view(np.int64)


def spread(index: Array, number: int) -> Array:
    """A rearrangement of 0 to `number` - 1 (under 2**31) whose neighbours lie far apart: multiples of the golden ratio.

    Any stretch of indices gets values evenly from the whole range.
    """
    factor = max(1, number * 618_034 // 1_000_000)
    while gcd(factor, number) > 1:
        factor += 1
    return index.astype(np.int64) * factor % number


@dataclass(frozen=True)
class Law:
    """A distribution over 0, 1, ...: the cumulative sums of whole weights, of at most 2**32 - 1 in all."""

    cumulative: Array

    @classmethod
    def of(cls, weights: Array | list[int] | tuple[int, ...]) -> "Law":
        cumulative = np.cumsum(np.asarray(weights, dtype=np.int64))
        if cumulative[-1] >= 1 << 32:
            raise ValueError("the weights of a law sum up to 2**32 or more")
        return cls(cumulative)

    def draw(self, random: Array) -> Array:
        """A value (int64) for each 64 random bits."""
        return self.cumulative.searchsorted(below(random, int(self.cumulative[-1])), side="right")


def falling(number: int, scale: int, power: int) -> Law:
    """The law over 0 to `number` - 1 whose weights fall like 1 / (value + scale) ** power, with power 1 or 2."""
    values = np.arange(number, dtype=np.int64) + scale
    return Law.of((1 << 30) * scale // values // values if power == 2 else (1 << 26) // values)


class Lengths:
    """Heavy-tailed lengths of `number` sequences, at least `shortest` and at most `longest`, of `total` in all.

    They follow a Lomax distribution with exponent 2, cut at the longest, which at least one sequence has. Many are
    short and few long: with the mean of MovieLens-20M, 144.4, the median is 72 (68 there).
    Raises ValueError, which names the settings, if no such lengths are in reach.
    """

    def __init__(self, total: int, number: int, shortest: int, longest: int) -> None:
        self._number, self._longest = number, longest
        extra, span = total - number * shortest, longest - shortest
        if span < 1 or extra < span:
            raise ValueError(f"rows: {total} are too few for {number} users with {shortest} to {longest} rows each")
        low, high = 2.0**-10, 2.0**40
        if int(_exceeding(high, number, span).sum()) <= extra:
            raise ValueError(f"rows: {total} are too many for {number} users with {shortest} to {longest} rows each")
        for _ in range(110):  # halves what lies between until the two are neighbours in float64
            middle = (low + high) / 2
            if int(_exceeding(middle, number, span).sum()) <= extra:
                low = middle
            else:
                high = middle
        counts = _exceeding(low, number, span)
        everywhere, rest = divmod(extra - int(counts.sum()), span)
        counts += everywhere
        counts[:rest] += 1
        if everywhere < 0 or counts[0] > number:
            raise ValueError(f"rows: {total} are too few for {number} users with {shortest} to {longest} rows each")
        self._exceeding = counts[::-1].copy()  # ascending

    def at(self, index: Array) -> Array:
        """The lengths (int64) of the sequences `index`, of 0 to number - 1; long ones are spread among short ones."""
        return self._longest - self._exceeding.searchsorted(spread(index, self._number), side="right")


def _exceeding(scale: float, number: int, span: int) -> Array:
    """How many of `number` exceed the shortest by 1, 2, ... `span` or more; one at least."""
    shares = 1.0 / (1.0 + np.arange(1, span + 2, dtype=np.float64) / scale)
    shares *= shares
    counts = np.floor(number * (shares[:-1] - shares[-1]) / (1.0 - shares[-1])).astype(np.int64)
    return np.maximum(counts, 1)


def _mixed(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)

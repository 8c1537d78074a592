"""What the best predictor of a generated stream reaches: no model can expect more.

`known` knows each record's prior, concentration and categories, and every item's category. `told` is also told the
category of the item that comes. `, no repeats`: the same of a stream in which no item comes twice in a record, which
this one is not. Needs NumPy alone.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from steps.data.generators.stream import Stream

CUTS = (10, 50, 200)
#: What reports call the predictors `known` and `told`.
KNOWN, TOLD = "knows all but the next", "is told the next category"
_AT_ONCE = 1000  # records; more would only take memory


def expected(stream: Stream, first: int, last: int) -> dict[str, list[float]]:
    """`ceilings` of records `first` to `last` - 1, some at a time."""
    starts = range(first, last, _AT_ONCE)
    ends = [min(start + _AT_ONCE, last) for start in starts]
    parts = [ceilings(stream, start, end) for start, end in zip(starts, ends, strict=True)]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    return {name: np.average([part[name] for part in parts], axis=0, weights=sizes).tolist() for name in parts[0]}


def least_loss(stream: Stream, first: int, last: int) -> float:
    """The expected cross-entropy, in nats, of `known` at the last items of records `first` to `last` - 1: no model can
    expect less."""
    total = 0.0
    for start in range(first, last, _AT_ONCE):
        chance, num_open, _ = _outlook(stream, start, min(start + _AT_ONCE, last))
        total -= float((chance * np.log(np.where(chance > 0, chance / num_open, 1))).sum())
    return total / (last - first)


def ceilings(stream: Stream, first: int, last: int) -> dict[str, list[float]]:
    """The expected HR at `CUTS` of the last items of records `first` to `last` - 1: `known` of the first predictor,
    `told` of the second; `known, no repeats` and `told, no repeats`."""
    chance, num_open, before = _outlook(stream, first, last)
    found: dict[str, list[float]] = {}
    for end, size in (("", num_open), (", no repeats", np.maximum(num_open - before, 1))):
        order = np.argsort(-chance / size, axis=0)  # the categories whose items are likeliest first
        each, sizes = np.take_along_axis(chance / size, order, axis=0), np.take_along_axis(size, order, axis=0)
        ahead = np.cumsum(sizes, axis=0) - sizes
        for k in CUTS:
            hits = (np.clip(k - ahead, 0, sizes) * each).sum(axis=0)
            found.setdefault(f"known{end}", []).append(float(hits.mean()))
            hits = (chance * np.minimum(1, k / size)).sum(axis=0)
            found.setdefault(f"told{end}", []).append(float(hits.mean()))
    return found


def _outlook(stream: Stream, first: int, last: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Of each record's categories (categories of a record, last - first): the chance that the last item is of one, how
    many of its items are open, and how many came before."""
    record = np.arange(first, last)
    items = stream.part(first, last)
    chosen, cuts = stream.chosen(record), stream.cuts(record)
    prior = np.diff(np.pad(cuts, ((1, 1), (0, 0)), constant_values=((0, 1 << 20), (0, 0))), axis=0) / (1 << 20)
    a = stream.concentration(record) / 1024
    before = (stream.category[items[:, :-1] - 1] == chosen[:, :, None]).sum(axis=2)
    chance = (a * prior + before) / (a + stream.length - 1)
    is_of = stream.category[:, None] == np.arange(stream.categories)
    num_open = np.cumsum(is_of, axis=0)[stream.open_items(record)[:, None] - 1, chosen.T].T
    return chance, num_open, before

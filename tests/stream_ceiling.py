"""What the best predictor of a generated stream reaches under protocol stream: no model can expect more.

`python tests/stream_ceiling.py` prints HR@k of the last item of the records that are tested, for one that knows each
record's prior, concentration and categories, and every item's category; and for one that, beside these, is told the
category of the item that comes. Then the same of a stream in which no item comes twice in a record, which this one is
not. `--dataset stream-small` is of the small one. Not collected by pytest.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from steps.common import params  # noqa: E402
from steps.data.generators.stream import Stream  # noqa: E402

CUTS = (10, 50, 200)


def ceilings(stream: Stream, first: int, last: int) -> dict[str, list[float]]:
    """The expected HR at `CUTS` of the last items of records `first` to `last` - 1: `known` of the first predictor,
    `told` of the second; `known, no repeats` and `told, no repeats`."""
    record = np.arange(first, last)
    items = stream.part(first, last)
    chosen, cuts = stream.chosen(record), stream.cuts(record)
    prior = np.diff(np.pad(cuts, ((1, 1), (0, 0)), constant_values=((0, 1 << 20), (0, 0))), axis=0) / (1 << 20)
    a = stream.concentration(record) / 1024
    before = (stream.category[items[:, :-1] - 1] == chosen[:, :, None]).sum(axis=2)
    chance = (a * prior + before) / (a + stream.length - 1)
    is_of = stream.category[:, None] == np.arange(stream.categories)
    num_open = np.cumsum(is_of, axis=0)[stream.open_items(record)[:, None] - 1, chosen.T].T
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="stream")
    settings = dict(params.entry("datasets", parser.parse_args().dataset, ROOT / "params")["synthesize"])
    settings.pop("form")
    stream = Stream(**settings)
    size, parts = 1000, []
    for first in range(stream.records - stream.records // 10, stream.records, size):
        parts.append(ceilings(stream, first, min(first + size, stream.records)))
    for name in parts[0]:
        means = np.mean([part[name] for part in parts], axis=0)
        print(name, "  ".join(f"HR@{k} {mean:.4f}" for k, mean in zip(CUTS, means, strict=True)))


if __name__ == "__main__":
    main()

"""The numbers of processed sequences, whatever their size.

Sequences are mapped, not loaded. Memory holds some 60 bytes for each user, 30 for each item, and a block of rows.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

#: Rows that are in memory at once.
ROWS_AT_ONCE = 1 << 20
#: Per cent of users or items at or below a quantile, by its name.
QUANTILES = {"min": 0, "p1": 1, "p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}
_KINDS = {"I64": np.int64, "I32": np.int32, "F32": np.float32}
_NEVER = np.iinfo(np.int64).max
_MOST_MONTHS = 60  # of which a histogram has a bar each; of a longer time it has years
_MOST_RATINGS, _BINS = 20, 20  # values that have a bar each, and how many bars more of them get

Tensors = Mapping[str, np.ndarray]


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The one-dimensional arrays of a safetensors file, mapped read-only."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: np.memmap(path, _KINDS[entry["dtype"]], "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
        if entry["shape"] != [0]
        else np.empty(0, _KINDS[entry["dtype"]])
        for name, entry in header.items()
    }


def measure(tensors: Tensors, catalogue: int, has_times: bool, rows_at_once: int = ROWS_AT_ONCE) -> dict[str, Any]:
    """The numbers of sequences, as card.json has them.

    tensors: as `steps.data.build` writes them; no user is without rows. catalogue: how many items there are.
    has_times: whether timestamps say when.

    A target is a user's last row; a training row is any other.
    """
    lengths = np.diff(tensors["offsets"])
    targets = tensors["offsets"][1:] - 1
    target_items = tensors["item"][targets]
    times = _Times(tensors, lengths, targets) if has_times else None
    per_item = np.zeros(catalogue + 1, np.int64)
    first_trained = np.full(catalogue + 1, _NEVER) if times else None
    for start, end, is_training in _blocks(targets, len(tensors["item"]), rows_at_once):
        item = tensors["item"][start:end]
        per_item += np.bincount(item, minlength=catalogue + 1)
        if times and first_trained is not None:
            time = tensors["timestamp"][start:end]
            times.add(time, time[is_training])
            np.minimum.at(first_trained, item[is_training], time[is_training])
    popularity = np.sort(per_item[per_item > 0])
    trained = (per_item - np.bincount(target_items, minlength=catalogue + 1))[target_items] > 0
    users, rated, rows = len(lengths), len(popularity), int(lengths.sum())
    found: dict[str, Any] = {
        "counts": {
            "users": users,
            "catalogue_items": catalogue,
            "items_with_interactions": rated,
            "interactions": rows,
            "density": float(f"{rows / users / rated:.4g}"),
        },
        "sequence_length": quantiles(np.sort(lengths)) | {"histogram": _histogram(lengths)},
        "item_popularity": quantiles(popularity) | {"by_rank": _by_rank(popularity[::-1])},
        "targets": {"targets": users, "share_never_in_training": _share((~trained).sum(), users)},
    }
    if times and first_trained is not None:
        found["time"] = times.span()
        only_later = trained & (first_trained[target_items] > times.targets)
        found["targets"] |= times.leaks(rows - users) | {
            "share_in_training_only_later": _share(only_later.sum(), users)
        }
    if "rating" in tensors:
        found["ratings"] = _ratings(tensors["rating"], rows_at_once)
    return found


def quantiles(ordered: np.ndarray) -> dict[str, Any]:
    """Of whole numbers in ascending order: for each share the least number that as many are at or below; the mean."""
    places = {name: max(-(-percent * len(ordered) // 100) - 1, 0) for name, percent in QUANTILES.items()}
    return {name: int(ordered[place]) for name, place in places.items()} | {"mean": round(float(ordered.mean()), 2)}


class _Times:
    """What timestamps say of targets and training rows, of which blocks are added one by one."""

    def __init__(self, tensors: Tensors, lengths: np.ndarray, targets: np.ndarray) -> None:
        self.targets = tensors["timestamp"][targets]
        self._first = int(tensors["timestamp"][tensors["offsets"][:-1]].min())
        self._last = int(self.targets.max())
        self._median = int(quantiles(np.sort(self.targets))["median"])
        self._latest = tensors["timestamp"][targets[lengths > 1] - 1].max(initial=np.iinfo(np.int64).min)
        months = _periods(np.array([self._first, self._last]), "M")
        self._unit = "M" if np.diff(months)[0] < _MOST_MONTHS else "Y"
        self._period = int(_periods(np.array([self._first]), self._unit)[0])
        count = int(_periods(np.array([self._last]), self._unit)[0]) - self._period + 1
        self._rows = np.zeros(count, np.int64)
        self._after_median = 0

    def add(self, times: np.ndarray, training: np.ndarray) -> None:
        """Count a block's rows: the times of all, and of those that are trained on."""
        self._rows += np.bincount(_periods(times, self._unit) - self._period, minlength=len(self._rows))
        self._after_median += int((training > self._median).sum())

    def span(self) -> dict[str, Any]:
        """First and last event, and how many there are in each month or year."""
        names = np.arange(self._period, self._period + len(self._rows)).astype(f"datetime64[{self._unit}]").astype(str)
        return {
            "first": _date(self._first),
            "last": _date(self._last),
            "unit": {"M": "month", "Y": "year"}[self._unit],
            "histogram": [{"from": str(name), "rows": int(rows)} for name, rows in zip(names, self._rows, strict=True)],
        }

    def leaks(self, training_rows: int) -> dict[str, Any]:
        """How much of what is trained on lies in the targets' future."""
        earlier = self.targets < self._latest  # which is another user's then: a target is no earlier than its user's
        return {
            "median_time": _date(self._median),
            "share_before_the_latest_training_row_of_others": _share(earlier.sum(), len(self.targets)),
            "share_of_training_rows_after_the_median_target": _share(self._after_median, training_rows),
        }


def _blocks(targets: np.ndarray, num_rows: int, rows_at_once: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Where blocks of rows begin and end, and which of their rows are no targets."""
    for start in range(0, num_rows, rows_at_once):
        end = min(start + rows_at_once, num_rows)
        is_training = np.ones(end - start, bool)
        first, after = np.searchsorted(targets, [start, end])
        is_training[targets[first:after] - start] = False
        yield start, end, is_training


def _periods(times: np.ndarray, unit: str) -> np.ndarray:
    """The months or years since 1970 of times in seconds."""
    return times.astype("datetime64[s]").astype(f"datetime64[{unit}]").astype(np.int64)


def _date(time: int) -> str:
    return str(np.datetime64(time, "s").astype("datetime64[D]"))


def _share(part: Any, whole: int) -> float:
    return round(float(part) / whole, 4) if whole else 0.0


def _half_octaves(largest: int) -> np.ndarray:
    """1, 2, 3, 4, 6, 8, 12, ...: two for each doubling, the last above `largest`."""
    powers = np.arange(2 * int(largest).bit_length() + 1)
    edges = np.unique(np.ceil(2.0 ** (powers / 2)).astype(np.int64))
    return edges[: np.searchsorted(edges, largest, side="right") + 1]


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """How many users have sequences from a length to another, both included, without the empty bins at both ends."""
    edges = _half_octaves(int(lengths.max()))
    edges = edges[np.searchsorted(edges, lengths.min(), side="right") - 1 :]
    users = np.bincount(np.searchsorted(edges, lengths, side="right") - 1, minlength=len(edges) - 1)
    bins = zip(edges[:-1], edges[1:] - 1, users, strict=True)
    return [{"from": int(low), "to": int(high), "users": int(count)} for low, high, count in bins]


def _by_rank(descending: np.ndarray) -> list[dict[str, int]]:
    """How many interactions items of some ranks have: the most popular is 1."""
    ranks = np.unique(np.minimum(_half_octaves(len(descending)), len(descending)))
    return [{"rank": int(rank), "interactions": int(descending[rank - 1])} for rank in ranks]


def _ratings(rating: np.ndarray, rows_at_once: int) -> dict[str, Any]:
    """How many rows have each rating, or, of many different ones, a rating in each of some bins of equal width."""
    missing, low, high = 0, np.inf, -np.inf
    counted: dict[np.float32, int] | None = {}
    for start in range(0, len(rating), rows_at_once):
        block = rating[start : start + rows_at_once]
        there = block[~np.isnan(block)]
        missing += len(block) - len(there)
        low, high = min(low, there.min(initial=np.inf)), max(high, there.max(initial=-np.inf))
        if counted is not None:
            for value, rows in zip(*np.unique(there, return_counts=True), strict=True):
                counted[value] = counted.get(value, 0) + int(rows)
                if len(counted) > _MOST_RATINGS:
                    counted = None
                    break
    if counted is not None:
        values = [{"rating": _plain(value), "rows": counted[value]} for value in sorted(counted)]
        return {"missing": missing, "histogram": values}
    edges = np.linspace(low, high, _BINS + 1)
    rows_of = np.zeros(_BINS, np.int64)
    for start in range(0, len(rating), rows_at_once):
        block = rating[start : start + rows_at_once].astype(np.float64)
        rows_of += np.histogram(block[~np.isnan(block)], edges)[0]
    bins = zip(edges[:-1], edges[1:], rows_of, strict=True)
    return {
        "missing": missing,
        "histogram": [{"from": _plain(a), "to": _plain(b), "rows": int(rows)} for a, b, rows in bins],
    }


def _plain(value: Any) -> float:
    """As few digits as say which float32 it is."""
    return float(str(np.float32(value)))

"""Interactions into sequences, with their counts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from steps.data.log import Writer, batches
from steps.data.tensors import TensorFile

#: How rows of one user with equal timestamps are ordered.
TIES = {
    "file-order": "timestamp, then the raw file's row order",
    "item-id": "timestamp, then raw item id",
    "shuffled": "timestamp, then a fixed random order, as an unstable sort might leave it",
}
#: The same where the file has no times.
NO_TIMES = "the raw file's row order: it has no times"
#: Rows that are sorted at once; more are parted by users on disk.
ROWS_IN_MEMORY = 24_000_000
_SHUFFLE_SEED = 0
_KEY_BITS = 63
_PARTS = 12  # parts that make `rows_in_memory`: several are in memory at once, with what is made of them
_MOST_PARTS = 256  # files that are open at once
_LARGEST_TABLE = 1 << 26  # entries of a table by raw id, which is faster than a join


def build_sequences(
    log: pl.LazyFrame,
    items: pl.DataFrame,
    folder: Path,
    ties: str = "file-order",
    ticks_per_second: int = 1,
    rows_in_memory: int = ROWS_IN_MEMORY,
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, Any]]:
    """Jagged sequences with contiguous ids, in `sequences.safetensors` in `folder`.

    Args:
        log: user, item, rating (optional), timestamp (in ticks), row; in the raw file's order.
        items: the catalogue: item, title.
        ties: a key of TIES.
        rows_in_memory: a larger log is parted by users into files in `folder`, which are sorted one after the other.

    The file has offsets (U + 1,) int64; item (T,) int32, from 1 in the order of raw ids, 0 is padding; timestamp (T,)
    int64, seconds; rating (T,) float32 where the data has ratings, NaN where one is missing. Users are in the order of
    their raw ids, a user's rows in time order, equal times as `ties` says.

    Returns:
        users: id, raw id; id is the index into offsets.
        items: id, raw id, title.
        counts and ties of the sequences, for `manifest.json`.
    """
    catalogue = items.sort("item").with_row_index("id", offset=1)
    users = log.group_by("user").agg(pl.len()).sort("user").collect().with_row_index("id")
    offsets = np.concatenate([[0], np.cumsum(users["len"].to_numpy(), dtype=np.int64)]).astype(np.int64)
    num_rows = int(offsets[-1])
    columns: dict[str, tuple[Any, int]] = {
        "offsets": (np.int64, len(offsets)),
        "timestamp": (np.int64, num_rows),
        "item": (np.int32, num_rows),
    }
    if "rating" in log.collect_schema():
        columns["rating"] = (np.float32, num_rows)
    tied, last_tied = 0, 0
    times_rated = np.zeros(len(catalogue) + 1, dtype=np.int64)
    with TensorFile(folder / "sequences.safetensors", columns) as tensors:
        tensors.write("offsets", 0, offsets)
        for start, rows in _parts(log, users, catalogue, offsets, folder, ties, rows_in_memory):
            user, time, order = _sorted(rows, ties)
            item = rows["item"].to_numpy()[order]
            times_rated += np.bincount(item, minlength=len(times_rated))
            tensors.write("item", start, item)
            tensors.write("timestamp", start, time // ticks_per_second)
            if "rating" in columns:
                tensors.write("rating", start, rows["rating"].fill_null(np.nan).to_numpy()[order])
            same = np.zeros(len(rows), dtype=bool)
            same[1:] = (time[1:] == time[:-1]) & (user[1:] == user[:-1])
            tied += int(np.count_nonzero(same))
            last_tied += int(np.count_nonzero(same[:-1] & (user[1:] != user[:-1]))) + int(same[-1])
    lengths = np.diff(offsets)
    told = {
        "users": len(lengths),
        "rated_items": int(np.count_nonzero(times_rated)),
        "interactions": num_rows,
        "sequence_length": {
            "shortest": int(lengths.min()),
            "mean": round(float(lengths.mean()), 2),
            "longest": int(lengths.max()),
        },
        "share_of_users_with_tied_target": round(last_tied / len(lengths), 4),
        "share_of_rows_tied_with_the_row_before": round(tied / num_rows, 4),
    }
    return (
        users.select("id", pl.col("user").alias("raw_id")),
        catalogue.select("id", pl.col("item").alias("raw_id"), "title"),
        told,
    )


def _sorted(rows: pl.DataFrame, ties: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User and time of each row in the sequences' order, and the order itself: indices into `rows`.

    Users and times that fit 64 bits together are sorted as one number, five times as fast.
    """
    user, time = rows["user"].to_numpy(), rows["timestamp"].to_numpy()
    first = int(time.min())
    bits = (int(time.max()) - first).bit_length()
    if ties == "file-order" and bits + int(user.max()).bit_length() <= _KEY_BITS:
        keys = (user.astype(np.uint64) << np.uint64(bits)) | (time - first).astype(np.uint64)
        order = np.argsort(keys, kind="stable")  # rows are in the file's order
    else:
        order = sorted_rows(rows, ties)["index"].to_numpy()
    return user[order], time[order], order


def sorted_rows(rows: pl.DataFrame, ties: str) -> pl.DataFrame:
    """The rows in the sequences' order, with `index`, their place in `rows`."""
    return rows.with_row_index("index").sort("user", "timestamp", *_TIE_KEYS[ties], "row")


_TIE_KEYS = {"file-order": [], "item-id": ["item", "rating"], "shuffled": ["shuffled"]}


def _parts(
    log: pl.LazyFrame,
    users: pl.DataFrame,
    catalogue: pl.DataFrame,
    offsets: np.ndarray,
    folder: Path,
    ties: str,
    rows_in_memory: int,
) -> Iterator[tuple[int, pl.DataFrame]]:
    """The rows of one user after the other, as ids, in parts: where a part begins in the sequences, and its rows, which
    are not yet sorted."""
    coded = _coded(log, users, catalogue, ties)
    num_rows = int(offsets[-1])
    if num_rows <= rows_in_memory:
        yield 0, pl.concat(coded)
        return
    first_users = [0]
    rows_of_part = max(rows_in_memory // _PARTS, -(-num_rows // _MOST_PARTS))
    while offsets[first_users[-1]] < num_rows:
        limit = offsets[first_users[-1]] + rows_of_part
        first_users.append(max(int(np.searchsorted(offsets, limit, side="right")) - 1, first_users[-1] + 1))
    writers = [Writer(folder / f"part-{number}.parquet") for number in range(len(first_users) - 1)]
    for frame in coded:
        number = pl.Series("part", np.searchsorted(first_users, frame["user"].to_numpy(), side="right") - 1)
        for (part,), rows in frame.with_columns(number).partition_by("part", as_dict=True, include_key=False).items():
            writers[part].write(rows)
    for writer, first in zip(writers, first_users[:-1], strict=True):
        yield int(offsets[first]), writer.close().collect()
        writer.path.unlink()


def _coded(log: pl.LazyFrame, users: pl.DataFrame, catalogue: pl.DataFrame, ties: str) -> Iterator[pl.DataFrame]:
    """The log block by block with ids: user from 0, item from 1."""
    user_ids, item_ids = _ids(users, "user"), _ids(catalogue, "item")
    order: np.ndarray | None = None
    if ties == "shuffled":
        order = np.random.default_rng(_SHUFFLE_SEED).permutation(int(users["len"].sum()))
    start = 0
    for frame in batches(log):
        frame = frame.with_columns(user_ids(frame["user"]), item_ids(frame["item"]))
        if order is not None:
            frame = frame.with_columns(shuffled=pl.Series(order[start : start + len(frame)]))
            start += len(frame)
        elif "rating" not in frame.columns and ties == "item-id":
            frame = frame.with_columns(rating=pl.lit(None, pl.Float32))
        yield frame


def _ids(table: pl.DataFrame, key: str) -> Callable[[pl.Series], pl.Series]:
    """Looks up the ids (UInt32) of raw ids in a table of both."""
    raw, ids = table[key], table["id"].cast(pl.UInt32)
    span = int(raw[-1]) - int(raw[0]) + 1 if raw.dtype == pl.Int64 else 0
    if not 0 < span <= _LARGEST_TABLE:
        known = pl.DataFrame({key: raw, "id": ids})
        return lambda values: values.to_frame().join(known, on=key, how="left", maintain_order="left")["id"].alias(key)
    first = int(raw[0])
    found = np.zeros(span, dtype=np.uint32)
    found[raw.to_numpy() - first] = ids.to_numpy()
    return lambda values: pl.Series(key, found[values.to_numpy() - first])

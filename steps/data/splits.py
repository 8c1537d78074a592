"""Interactions into sequences, and the three-way split, with a content hash of every part."""

import hashlib
from typing import Any

import numpy as np
import polars as pl

#: How rows of one user with equal timestamps are ordered.
TIES = {
    "file-order": "timestamp, then the raw file's row order",
    "item-id": "timestamp, then raw item id",
    "shuffled": "timestamp, then a fixed random order, as an unstable sort might leave it",
}
_SHUFFLE_SEED = 0
SPLIT_RULE = "per user: last = test, second last = validation, all before = training"


def build_sequences(
    interactions: pl.DataFrame, items: pl.DataFrame, ties: str = "file-order"
) -> tuple[dict[str, np.ndarray], pl.DataFrame, pl.DataFrame]:
    """Jagged sequences with contiguous ids.

    Args:
        interactions: user, item, rating (optional), timestamp, row.
        items: the catalogue: item, title.
        ties: a key of TIES.

    Returns:
        tensors: offsets (U + 1,) int64; item (T,) int32, from 1 in the order of raw ids, 0 is padding;
            timestamp (T,) int64, seconds; rating (T,) float32 where the data has ratings. Users are in
            the order of their raw ids, a user's rows in time order, equal times as `ties` says.
        users: id, raw id; id is the place in offsets.
        items: id, raw id, title.
    """
    catalogue = items.sort("item").with_row_index("id", offset=1)
    ordered = (
        interactions.join(catalogue.select("id", "item"), on="item", how="left", maintain_order="left")
        .sort("user", "timestamp", _tie_key(ties, len(interactions)), "row")
        .select("user", "id", "timestamp", *(["rating"] if "rating" in interactions.columns else []))
    )
    lengths = ordered.group_by("user", maintain_order=True).len()
    tensors: dict[str, np.ndarray] = {
        "offsets": np.concatenate([[0], np.cumsum(lengths["len"].to_numpy(), dtype=np.int64)]).astype(np.int64),
        "item": ordered["id"].to_numpy().astype(np.int32),
        "timestamp": ordered["timestamp"].to_numpy().astype(np.int64),
    }
    if "rating" in ordered.columns:
        tensors["rating"] = ordered["rating"].to_numpy().astype(np.float32)
    users = lengths.select(pl.col("user").alias("raw_id")).with_row_index("id")
    return tensors, users, catalogue.select("id", pl.col("item").alias("raw_id"), "title")


def _tie_key(ties: str, rows: int) -> pl.Series | str:
    if ties == "shuffled":
        return pl.Series(np.random.default_rng(_SHUFFLE_SEED).permutation(rows))
    return {"file-order": "row", "item-id": "id"}[ties]


def describe_split(tensors: dict[str, np.ndarray], ties: str = "file-order") -> dict[str, Any]:
    """Counts, ties, rules and content hashes of the split, for `manifest.json`.

    A hash is the SHA-256 of (user, item, timestamp) of the part's rows as little-endian int64 columns,
    so two data sets hash alike exactly if they hold out the same rows in the same order.
    """
    offsets, item, timestamp = tensors["offsets"], tensors["item"], tensors["timestamp"]
    lengths = np.diff(offsets)
    user = np.repeat(np.arange(len(lengths)), lengths)
    from_end = np.repeat(offsets[1:], lengths) - np.arange(len(item))  # 1 = last
    same_as_before = np.zeros(len(item), dtype=bool)
    same_as_before[1:] = (timestamp[1:] == timestamp[:-1]) & (user[1:] == user[:-1])
    columns = [column.astype("<i8") for column in (user, item, timestamp)]
    parts = {"test": from_end == 1, "valid": from_end == 2, "train": from_end > 2}
    return {
        "users": len(lengths),
        "rated_items": len(np.unique(item)),
        "interactions": len(item),
        "sequence_length": {
            "shortest": int(lengths.min()),
            "mean": round(float(lengths.mean()), 2),
            "longest": int(lengths.max()),
        },
        "share_of_users_with_tied_target": round(float(same_as_before[offsets[1:] - 1].mean()), 4),
        "share_of_rows_tied_with_the_row_before": round(float(same_as_before.mean()), 4),
        "rules": {"ties": TIES[ties], "split": SPLIT_RULE},
        "sha256": {name: _hash(columns, rows) for name, rows in parts.items()},
    }


def _hash(columns: list[np.ndarray], rows: np.ndarray) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column[rows]).data)
    return digest.hexdigest()

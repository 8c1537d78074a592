"""Interactions into sequences, their counts, and content hashes of what a protocol trains on and holds out."""

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
        users: id, raw id; id is the index into offsets.
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


def describe(tensors: dict[str, np.ndarray], ties: str = "file-order") -> dict[str, Any]:
    """Counts and ties of the sequences, for `manifest.json`."""
    offsets, item, timestamp = tensors["offsets"], tensors["item"], tensors["timestamp"]
    lengths = np.diff(offsets)
    user = np.repeat(np.arange(len(lengths)), lengths)
    same_as_before = np.zeros(len(item), dtype=bool)
    same_as_before[1:] = (timestamp[1:] == timestamp[:-1]) & (user[1:] == user[:-1])
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
        "rules": {"ties": TIES[ties]},
    }


def split_sha256(tensors: dict[str, np.ndarray], protocol: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of the rows that a protocol of params/protocols.yaml trains on, tests on, and validates on, if any.

    Of (user, item, timestamp) as little-endian int64 columns, so two runs have the same hashes exactly if they hold out
    the same rows in the same order. `steps.data.split`, which train and evaluate use, computes the same hashes with
    code of its own, on purpose: a wrong split in one of the two shows as hashes that differ. Without torch, which plan
    does not import.
    """
    offsets, times = tensors["offsets"], tensors["timestamp"]
    lengths = np.diff(offsets)
    user = np.repeat(np.arange(len(lengths)), lengths)
    from_end = np.repeat(offsets[1:], lengths) - np.arange(len(times))  # 1 = the user's last row
    validates = protocol["report"] == "best"
    if protocol["split"] == "leave-last-out":
        parts = {"train": from_end > (2 if validates else 1), "test": from_end == 1}
        if validates:
            parts["valid"] = from_end == 2
    else:
        ordered = np.sort(times)
        test_share, valid_share = protocol["test_share"], protocol["valid_share"] if validates else 0.0
        test_start = ordered[int(len(times) * (1 - test_share))]
        train_end = ordered[int(len(times) * (1 - test_share - valid_share))]
        last = np.append(user[1:] != user[:-1], True)
        before_test = times < test_start
        last_before_test = before_test & (last | np.append(~before_test[1:], True))
        has_history = from_end < np.repeat(lengths, lengths)
        parts = {"train": times < train_end, "test": last & ~before_test & has_history}
        if validates:
            parts["valid"] = last_before_test & (times >= train_end) & has_history
    columns = [column.astype("<i8") for column in (user, tensors["item"], times)]
    return {name: _hash(columns, rows) for name, rows in parts.items()}


def _hash(columns: list[np.ndarray], rows: np.ndarray) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column[rows]).data)
    return digest.hexdigest()

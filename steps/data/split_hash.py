"""Content hashes of what a protocol trains on and holds out."""

import hashlib
from typing import Any

import numpy as np


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
    elif protocol["split"] == "users":
        # Of whole numbers to 2**32, as 2**32 over the golden ratio spreads them.
        place = user.astype(np.uint32) * np.uint32(2654435769) / 2**32
        upto = protocol["test_share"] + (protocol["valid_share"] if validates else 0.0)
        predicted = (from_end <= protocol["targets"]) & (from_end < np.repeat(lengths, lengths))
        parts = {"train": place >= upto, "test": (place < protocol["test_share"]) & predicted}
        if validates:
            parts["valid"] = (place >= protocol["test_share"]) & (place < upto) & predicted
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
        if protocol.get("task") == "ranking":
            parts["test"] = ~before_test & has_history
            if validates:
                parts["valid"] = before_test & (times >= train_end) & has_history
    columns = [user, tensors["item"], times]
    return {name: _hash(columns, rows) for name, rows in parts.items()}


def _hash(columns: list[np.ndarray], rows: np.ndarray) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(column[rows].astype("<i8", copy=False).data)
    return digest.hexdigest()

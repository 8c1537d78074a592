"""Sequences of a generated stream without an archive, on a machine that has NumPy alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from steps.common.files import atomic_path, sha256, write_json
from steps.data.tensors import TensorFile


class Stream(Protocol):
    """`records` of `length` interactions each, in the order of time, of items 1 to `items`."""

    @property
    def records(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def items(self) -> int: ...

    def parts(self) -> Iterator[np.ndarray]:
        """Their items (B, length), block by block."""


def write_stream(stream: Stream, folder: Path) -> None:
    """Make `folder` with `sequences.safetensors`, to the byte what preprocess makes of the stream's archive, and what
    train needs of its `manifest.json`. A record is a user, and its number the time. Memory holds a few blocks."""
    rows = stream.records * stream.length
    columns = {"offsets": (np.int64, stream.records + 1), "timestamp": (np.int64, rows), "item": (np.int32, rows)}
    with atomic_path(folder) as partial:
        partial.mkdir()
        path, first = partial / "sequences.safetensors", 0
        with TensorFile(path, columns) as tensors:
            tensors.write("offsets", 0, np.arange(stream.records + 1) * stream.length)
            for items in stream.parts():
                time = np.repeat(np.arange(first, first + len(items)), stream.length)
                tensors.write("timestamp", first * stream.length, time)
                tensors.write("item", first * stream.length, items.ravel())
                first += len(items)
        counts = {"catalogue_items": stream.items, "users": stream.records, "interactions": rows}
        write_json(partial / "manifest.json", counts | {"sequences_sha256": sha256(path)})

"""Tensors larger than memory: a safetensors file that is filled part by part."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_CODES = {np.int64: "I64", np.int32: "I32", np.float32: "F32"}
_ALIGNMENT = 8  # of the header's end


@contextmanager
def tensors_to_fill(path: Path, columns: Mapping[str, tuple[Any, int]]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of a new safetensors file, to be written within the block.

    columns: a NumPy type and a length for each one-dimensional array. The bytes are those that `safetensors.numpy.save`
    writes of the same arrays: wide types first, then by name.
    """
    order = sorted(columns, key=lambda name: (-np.dtype(columns[name][0]).itemsize, columns[name][0] is np.int32, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        kind, length = columns[name]
        start, end = end, end + length * np.dtype(kind).itemsize
        header[name] = {"dtype": _CODES[kind], "shape": [length], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(begin + end)
    arrays: dict[str, np.ndarray] = {}
    for name in order:
        kind, length = columns[name]
        position = begin + header[name]["data_offsets"][0]
        empty = np.empty(0, kind)
        arrays[name] = np.memmap(path, kind, "r+", position, (length,)) if length else empty
    yield arrays

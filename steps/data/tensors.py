"""Tensors larger than memory: a safetensors file that is filled part by part."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_CODES = {np.int64: "I64", np.int32: "I32", np.float32: "F32"}
_ALIGNMENT = 8  # of the header's end


class TensorFile:
    """A new safetensors file of one-dimensional arrays, which `write` fills.

    The bytes are those that `safetensors.numpy.save` writes of the same arrays: wide types first, then by name.
    """

    def __init__(self, path: Path, columns: Mapping[str, tuple[Any, int]]) -> None:
        """columns: a NumPy type and a length for each array."""
        header: dict[str, Any] = {}
        end = 0
        for name in sorted(columns, key=lambda name: _rank(columns[name][0], name)):
            kind, length = columns[name]
            start, end = end, end + length * np.dtype(kind).itemsize
            header[name] = {"dtype": _CODES[kind], "shape": [length], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._types = {name: np.dtype(kind) for name, (kind, _) in columns.items()}
        self._begins = {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(8 + len(text) + end)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Put `values` into the array `name`, from index `start` on."""
        kind = self._types[name]
        self._file.seek(self._begins[name] + start * kind.itemsize)
        self._file.write(np.ascontiguousarray(values, dtype=kind).data)


def _rank(kind: Any, name: str) -> tuple[int, bool, str]:
    return -np.dtype(kind).itemsize, kind is np.int32, name

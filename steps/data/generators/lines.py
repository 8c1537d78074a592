"""Text from arrays, byte by byte, and archives whose bytes depend on their content alone."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from steps.data.generators.draws import Array

_LETTERS = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)


def lines(*fields: Array | bytes) -> bytes:
    """Lines of fields side by side: `digits` and the like, one row a line, or the same bytes in every line."""
    rows = max(len(field) for field in fields if not isinstance(field, bytes))
    parts = [np.frombuffer(field, np.uint8)[None] if isinstance(field, bytes) else field for field in fields]
    found = np.concatenate([np.broadcast_to(part, (rows, part.shape[1])) for part in parts], axis=1).ravel()
    return found[found != 0].tobytes()


def digits(values: Array, width: int) -> Array:
    """Whole numbers under 2**32 in decimal, as rows of `width` bytes; zero bytes, which `lines` drops, in front."""
    found = np.empty((width, len(values)), dtype=np.uint8)
    left = values.astype(np.uint32)
    for place in reversed(range(width)):
        rest = left // np.uint32(10)
        found[place] = left - rest * np.uint32(10) + np.uint32(ord("0"))
        if place < width - 1:
            found[place][left == 0] = 0
        left = rest
    return found.T


def letters(values: Array, width: int, base: int = 36) -> Array:
    """Numbers (uint64) in base 36 or 10, as rows of exactly `width` bytes of 0-9A-Z."""
    found = np.empty((width, len(values)), dtype=np.uint8)
    left = values.astype(np.uint64)
    for place in reversed(range(width)):
        rest = left // np.uint64(base)
        found[place] = _LETTERS[(left - rest * np.uint64(base)).view(np.int64)]
        left = rest
    return found.T


def write_archive(path: Path, members: Iterable[tuple[str, int, Iterable[bytes]]]) -> None:
    """Write a zip of members, each with its name, the most bytes it can have, and its content piece by piece.

    Fixed dates and no compression, whose bytes vary between zlib builds.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, most, pieces in members:
            member = zipfile.ZipInfo(name, date_time=(2000, 1, 1, 0, 0, 0))
            member.create_system = 3
            member.external_attr = 0o644 << 16
            # Only where it may be needed: Python 3.11.4 changed the header it makes.
            with archive.open(member, "w", force_zip64=most > zipfile.ZIP64_LIMIT) as file:
                for piece in pieces:
                    file.write(piece)

"""Parts of a text file that end with a line, in UTF-8, whatever the file's size: what text readers parse."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from steps.common.cli import StepError

LINE_END = b"\n"
QUOTE = b'"'
MARK = b"\xef\xbb\xbf"  # which some programs put at the begin of a file in UTF-8
_NO_TEXT = {
    b"\x1f\x8b": "packed by gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"PK\3\4": "a zip archive",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_LONGEST_RECORD = 1 << 26  # bytes; beyond it a quote was not closed
_CHUNK = 1 << 24  # bytes that are read at once to find a line's number


def records(path: Path, block_bytes: int, quote: bytes | None) -> Iterator[bytes]:
    """Parts of a file that end with a line, which no quotes span; empty lines at the file's end are left out."""
    rest = b""
    with path.open("rb") as file:
        _check_text(file, path)
        while chunk := _read(file, block_bytes, path):
            content = rest + chunk
            end = _last_end(content, quote)
            rest = content[end:]
            if end:
                yield content[:end]
            if len(rest) > _LONGEST_RECORD:
                what = "a quote is not closed" if quote and quote in rest else "the line is longer than 64 MB"
                line = line_at(path, file.tell()) - rest.count(LINE_END)
                raise StepError(f"{path}, line {line}: {what}; correct the file")
    if rest.strip(b" \t\n"):
        yield rest + LINE_END


def _check_text(file: BinaryIO, path: Path) -> None:
    """Raise StepError if a file begins as files of another kind do."""
    begin = file.read(4)
    file.seek(0)
    for mark, kind in _NO_TEXT.items():
        if begin.startswith(mark):
            raise StepError(f"{path} is {kind}, where its entry says text; convert it, or correct `path` or `format`")


def _read(file: BinaryIO, size: int, path: Path) -> bytes:
    """The next bytes of a file, with line ends that are one byte."""
    chunk = file.read(size)
    if b"\r" not in chunk:
        return chunk
    if chunk.endswith(b"\r"):
        chunk += file.read(1)
    start = file.tell() - len(chunk)
    chunk = chunk.replace(b"\r\n", LINE_END)
    if b"\r" in chunk:
        line = line_at(path, start) + chunk.count(LINE_END, 0, chunk.index(b"\r"))
        raise StepError(f"{path}, line {line}: has a carriage return alone; end lines with \\n or \\r\\n")
    return chunk


def line_at(path: Path, position: int) -> int:
    """The number of the line that has the byte at `position`, for a message."""
    line = 1
    with path.open("rb") as file:
        while position > 0 and (chunk := file.read(min(position, _CHUNK))):
            line += chunk.count(LINE_END)
            position -= len(chunk)
    return line


def count(content: bytes, byte: bytes) -> int:
    """As `content.count(byte)`, four times as fast where there are many."""
    return int(np.count_nonzero(np.frombuffer(content, dtype=np.uint8) == byte[0]))


def _last_end(content: bytes, quote: bytes | None) -> int:
    """Where the last line with values ends that no quotes span; 0 if there is none. Empty lines behind it are not part
    of it: they may be the file's last."""
    if quote is None or quote not in content:
        end = content.rfind(LINE_END) + 1
        if content[max(end - 2, 0) : end].strip():  # the usual case, without a copy
            return end
        last = len(content[:end].rstrip(b" \t\n"))
        return content.find(LINE_END, last) + 1 if last else 0
    text = np.frombuffer(content, dtype=np.uint8)
    ends = np.flatnonzero(text == LINE_END[0])
    ends = ends[outside(ends, np.flatnonzero(text == quote[0]))]
    last = len(content[: ends[-1] + 1].rstrip(b" \t\n")) if len(ends) else 0
    return int(ends[np.searchsorted(ends, last)]) + 1 if last else 0


def outside(positions: np.ndarray, quotes: np.ndarray) -> np.ndarray:
    """Which positions are not within quotes: an even number of quotes is before them."""
    even: np.ndarray = np.searchsorted(quotes, positions) % 2 == 0
    return even


def as_utf8(content: bytes, encoding: str, path: Path, line: int) -> bytes:
    """Lines, of which `line` is the number of the first, in UTF-8 and without a mark of it."""
    if b"\0" in content:
        line += content.count(LINE_END, 0, content.index(b"\0"))
        raise StepError(
            f"{path}, line {line}: has a NUL byte, as damaged files have, and UTF-16; correct or convert it"
        )
    if content.isascii():
        return content
    if line == 1 and encoding == "utf-8":
        content = content.removeprefix(MARK)
    marked = content.find(LINE_END + MARK) + 1
    if marked or content.startswith(MARK):  # polars leaves it out where a block begins with it
        line += content.count(LINE_END, 0, marked)
        raise StepError(f"{path}, line {line}: begins with a mark of utf-8; remove it, or set `encoding: utf-8`")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line += content.count(LINE_END, 0, error.start)
        other = "`encoding: latin-1`, or convert it" if encoding == "utf-8" else "`encoding: utf-8`"
        raise StepError(f"{path}, line {line}: is not {encoding}; set {other}") from None
    return content if encoding == "utf-8" else text.encode()

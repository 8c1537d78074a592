"""The files that download makes of a file of one's own, and as much of their content as one looks at."""

import codecs
import gzip
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from steps.common.cli import StepError
from steps.common.files import reading

#: Bytes: a file up to the first is looked at as a whole; of a larger one the second. Forms show in the third.
WHOLE, PART, HEAD = 200_000_000, 100_000_000, 1 << 21
_CHUNK = 1 << 20
_PARQUET = b"PAR1"
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip", b"PK\x05\x06": ".zip"}
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}
_WIDE = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
         codecs.BOM_UTF16_BE: "UTF-16"}  # fmt: skip
_TAR = (257, b"ustar")
_DAMAGED = "fetch or pack it again"


@dataclass(frozen=True)
class Raw:
    """A file as download leaves it.

    source: the file that it comes from. path: what entries call it. local: where its content is, or the begin of it.
    whole: whether all of it is looked at. size: bytes, unpacked; what is known of it.
    """

    source: Path
    path: str
    local: Path
    whole: bool
    size: int

    @property
    def shown(self) -> str:
        """The file in a message."""
        return str(self.source) if self.local == self.source else f"{self.source} ({self.path})"

    def read_as(self, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """The folder and the entry of a table with which `read_blocks` reads the content."""
        return self.local.parent, {**settings, "path": self.local.name}

    @contextmanager
    def named(self) -> Iterator[None]:
        """Within it messages name the file, not the place of its content."""
        try:
            yield
        except StepError as error:
            raise StepError(str(error).replace(str(self.local), self.shown)) from error

    def head(self) -> bytes:
        """The first bytes of the content."""
        with self.local.open("rb") as file:
            return file.read(HEAD)


def opened(source: Path, folder: Path) -> list[Raw]:
    """The files that download makes of `source`, with the begin of each in `folder`. Raises StepError if it is of a
    kind that download cannot unpack."""
    if source.is_dir():
        raise StepError(f"{source} is a folder; name a file, or a zip of the folder")
    with reading(source, "name a file"), source.open("rb") as file:
        begin = file.read(8)
    ending = next((ending for magic, ending in _PACKED.items() if begin.startswith(magic)), "")
    if ending == ".zip" and source.suffix in (".xlsx", ".ods", ".xlsm"):
        raise StepError(f"{source} is a spreadsheet; save it as CSV")
    named = source.suffix if source.suffix in _PACKED.values() else ""
    if ending != named:
        what = f"is packed, as {ending} files are; call it so" if ending else f"is not what its name says, {named}"
        raise StepError(f"{source} {what}")
    if not source.stem or "\\" in source.name:
        raise StepError(f"{source}: rename the file, in letters and digits")
    if not ending:
        size = source.stat().st_size
        return [Raw(source, source.name, source, size <= WHOLE, size)]
    if ending != ".zip":
        return [fetched(Raw(source, source.name.removesuffix(ending), source, False, 0), folder, HEAD)]
    with reading(source, _DAMAGED), zipfile.ZipFile(source) as archive:
        members = [member for member in archive.infolist() if member.file_size and _is_data(member.filename)]
    if not members:
        raise StepError(f"{source} has no files")
    return [fetched(Raw(source, one.filename, source, False, one.file_size), folder, HEAD) for one in members]


def fetched(raw: Raw, folder: Path, limit: int = WHOLE) -> Raw:
    """The same with its content, up to about `limit` bytes, in `folder`; a file that is not packed stays where it is.
    Of Parquet, which is read from its end, all of it."""
    if raw.source.suffix not in _PACKED.values():
        return raw
    with (
        reading(raw.source, _DAMAGED),
        _content(raw) as content,
        tempfile.NamedTemporaryFile(dir=folder, delete=False) as file,
    ):
        local, copied = Path(file.name), 0
        while copied <= limit and (chunk := content.read(_CHUNK)):
            file.write(chunk)
            copied += len(chunk)
            if copied == len(chunk) and chunk.startswith(_PARQUET):
                shutil.copyfileobj(content, file)
                copied += file.tell() - copied
                break
    return replace(raw, local=local, whole=copied <= WHOLE and copied <= limit, size=max(raw.size, copied))


def _content(raw: Raw) -> Any:
    if raw.source.suffix == ".gz":
        return gzip.open(raw.source)
    if raw.source.suffix == ".zst":
        return pa.CompressedInputStream(pa.OSFile(str(raw.source)), "zstd")
    return _member(raw)


@contextmanager
def _member(raw: Raw) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(raw.source) as archive, archive.open(raw.path) as content:
        yield content


def _is_data(name: str) -> bool:
    """Whether a member of a zip may be a table: no folder, and none of the files that systems put beside."""
    return not name.endswith("/") and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def check_text(raw: Raw, head: bytes) -> None:
    """Raise StepError that says what to do if the content is of a kind that no entry can describe."""
    for begin, name in (_OTHERS | _PACKED).items():
        if head.startswith(begin):
            raise StepError(f"{raw.shown} is packed ({name}); unpack it, and name what it holds")
    if head[_TAR[0] :].startswith(_TAR[1]):
        raise StepError(f"{raw.shown} is a tar archive; unpack it, and name the file in it, or make a zip of it")
    wide = next((name for begin, name in _WIDE.items() if head.startswith(begin)), None)
    if wide is None and b"\0" in head:
        text = head[:_CHUNK]
        halves = [half.count(0) * 2 / max(len(half), 1) for half in (text[::2], text[1::2])]
        wide = "UTF-16LE" if halves[1] > 1 else "UTF-16BE" if halves[0] > 1 else None
        if wide is None:
            line = head.count(b"\n", 0, head.index(b"\0")) + 1
            raise StepError(f"{raw.shown}, line {line}: has zero bytes, and so is no text; export it as CSV")
    if wide:
        raise StepError(f"{raw.shown} is {wide}; convert it: iconv -f {wide} -t UTF-8 OLD > NEW")


def encoding_of(raw: Raw) -> tuple[str, int]:
    """`utf-8`, or else `latin-1` with the first line that is not UTF-8, of as much as is looked at."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, left = 1, WHOLE if raw.whole else PART
    with reading(raw.local, "name a file"), raw.local.open("rb") as file:
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            left -= len(chunk)
            begun = len(decoder.getstate()[0])
            try:
                if begun or not chunk.isascii():
                    decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return "latin-1", line + chunk.count(b"\n", 0, max(error.start - begun, 0))
            line += chunk.count(b"\n")
    return ("utf-8", 0) if not (raw.whole and decoder.getstate()[0]) else ("latin-1", line)


def is_parquet(head: bytes) -> bool:
    return head.startswith(_PARQUET)

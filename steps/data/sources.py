"""Where raw files come from: the publisher, then mirrors; and how archives are unpacked safely."""

import errno
import glob
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa
import requests

from steps.common.cli import StepError
from steps.common.files import sha256
from steps.common.progress import progress

MIRROR_VARIABLE = "HSTU_DATA_MIRROR"
_CHUNK = 1 << 16  # bytes; what a broken connection can lose
_TIMEOUT_S = (5, 60)  # to connect, between two bytes
_SMALL, _LARGEST_RATIO = 1 << 30, 100  # bytes that any file may hold, and how many times its own that a larger one may
_ENCRYPTED = 1  # the bit of a zip member's flags


def fetch(source: dict[str, Any], partial: Path) -> tuple[Path, str]:
    """Bring `source["file"]`, with the checksum that `source` names, to a path beside `partial`.

    Tries the publisher, then `source["mirrors"]`, then the environment variable HSTU_DATA_MIRROR; a
    mirror is a URL, a file, or a folder that holds the file. An interrupted download resumes where it stopped, from
    the same source alone. A download with another checksum is deleted, and the next source is tried. A source without
    a checksum takes what it finds.
    Returns the path and the file's SHA-256. Raises StepError that lists why each source failed.
    """
    locations = [source.get("publisher"), *source.get("mirrors", []), os.environ.get(MIRROR_VARIABLE)]
    kind = next((kind for kind in ("sha256", "md5") if kind in source), None)
    failures = []
    for location in filter(None, locations):
        own = partial.with_name(f"{partial.name}.{hashlib.sha256(location.encode()).hexdigest()[:12]}.download")
        resumed = own.exists()
        try:
            _copy(location, source["file"], own)
            if kind and _digest(own, kind) != source[kind] and resumed:  # its first part may be of an older file
                own.unlink()
                _copy(location, source["file"], own)
        except (OSError, requests.RequestException) as error:  # the partial file stays: the next run resumes it
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            failures.append(f"{location}: {_short(error)}")
            continue
        if not kind or (found := _digest(own, kind)) == source[kind]:
            for other in partial.parent.glob(f"{glob.escape(partial.name)}.*.download"):
                if other != own:
                    other.unlink()
            return own, sha256(own)
        failures.append(
            f"{location}: {own.stat().st_size} bytes with {kind} {found}, expected {source[kind]} "
            "(truncated, changed, or params/datasets.yaml is out of date)"
        )
        own.unlink()
    raise StepError(
        f"cannot get {source['file']} ({'; '.join(failures) or 'no source named'}). Set {MIRROR_VARIABLE} to a "
        "folder, file or URL that has it"
    )


def unpack(packed: Path, name: str, folder: Path) -> None:
    """Put what the file `packed`, called `name`, holds into `folder`: the members of a .zip or .tar.gz, what another
    .gz or a .zst file holds under its name without that ending, or the file itself.

    Raises StepError if it is damaged, or would grow beyond what data do: a hundredfold, and 1 GiB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limit = max(_SMALL, _LARGEST_RATIO * packed.stat().st_size)
    if name.endswith(".zip"):
        _extract(packed, name, folder, limit)
        return
    if name.endswith(".tar.gz"):
        _extract_tar(packed, name, folder, limit)
        return
    target = folder / name.removesuffix(".gz").removesuffix(".zst")
    if target.exists():
        raise StepError(f"{name}: another file of the source is called {target.name} too; not unpacked")
    if target.name == name:
        shutil.copyfile(packed, target)
        return
    try:
        # Closed one by one, as neither closes what it reads from.
        with packed.open("rb") as file, _decompressed(file, name) as content, target.open("wb") as output:
            _copy_within(content, output, limit, name)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise StepError(f"{name} is damaged or not what its name says: {error}. Fetch it again") from error


def _decompressed(file: IO[bytes], name: str) -> Any:
    return gzip.GzipFile(fileobj=file) if name.endswith(".gz") else pa.CompressedInputStream(file, "zstd")


def _copy_within(content: Any, output: IO[bytes], limit: int, name: str) -> int:
    """Copy at most `limit` bytes. Returns how many; raises StepError if there are more."""
    written = 0
    while chunk := content.read(_CHUNK):
        written += len(chunk)
        if written > limit:
            raise StepError(
                f"{name} grows beyond {limit} bytes, which data do not; if these do, unpack it, and name what it holds"
            )
        output.write(chunk)
    return written


def _extract(archive: Path, called: str, folder: Path, limit: int) -> None:
    """Unpack a zip file member by member; every name is checked before the first member is written."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.filename.endswith("/")]
            if not members:
                raise StepError(f"{called} holds no files. Fetch it again")
            names = Counter(member.filename for member in members)
            for member in members:
                _check_member(called, member, names)
            for member in members:
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(member) as content, target.open("xb") as output:
                    limit -= _copy_within(content, output, limit, called)  # checks the member's CRC at its end
    except FileExistsError as error:
        raise StepError(f"{called}: {error.filename} is there twice; not unpacked") from error
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        ValueError,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
    ) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the disk
            raise
        raise StepError(f"{called} is damaged or not a zip archive: {error}. Fetch it again") from error


def _extract_tar(archive: Path, called: str, folder: Path, limit: int) -> None:
    """Unpack a tar file that gzip packed, in one pass: it may be large. Each member is checked before it is written."""
    num_files = 0
    try:
        with archive.open("rb") as packed, gzip.GzipFile(fileobj=packed) as content:
            with tarfile.open(fileobj=content, mode="r|") as file:
                for member in file:
                    if member.isdir():
                        continue
                    _check_name(called, member.name)
                    if not member.isreg():
                        raise StepError(f"{called}: member {member.name!r} is a link or no file; not unpacked")
                    target = folder / member.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("xb") as output:
                        limit -= _copy_within(file.extractfile(member), output, limit, called)
                    num_files += 1
            while content.read(_CHUNK):  # to the end, where the checksum of all stands
                pass
    except FileExistsError as error:
        raise StepError(f"{called}: {error.filename} is there twice; not unpacked") from error
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the disk
            raise
        raise StepError(f"{called} is damaged or not a tar archive in gzip: {error}. Fetch it again") from error
    if not num_files:
        raise StepError(f"{called} holds no files. Fetch it again")


def _check_name(called: str, member: str) -> None:
    name = PurePosixPath(member.replace("\\", "/"))
    if not name.parts or name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
        raise StepError(f"{called}: member {member!r} would be written outside its folder; not unpacked")


def _check_member(called: str, member: zipfile.ZipInfo, names: Counter[str]) -> None:
    _check_name(called, member.filename)
    if stat.S_ISLNK(member.external_attr >> 16):
        raise StepError(f"{called}: member {member.filename!r} is a link; not unpacked")
    if member.flag_bits & _ENCRYPTED:
        raise StepError(f"{called}: member {member.filename!r} needs a password; unpack it, and name what it holds")
    if names[member.filename] > 1:
        raise StepError(f"{called}: member {member.filename!r} is there {names[member.filename]} times; not unpacked")


def _copy(location: str, name: str, partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    if location.startswith(("http://", "https://")):
        _download(location if location.endswith(name) else f"{location.rstrip('/')}/{name}", partial)
        return
    path = Path(location).expanduser()
    shutil.copyfile(path / name if path.is_dir() else path, partial)


def _download(url: str, partial: Path) -> None:
    """Append to `partial` what it lacks of `url`; from the start where the server cannot resume."""
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, stream=True, timeout=_TIMEOUT_S, headers=headers) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # nothing is missing; the checksum says whether it is right
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        left = int(response.headers.get("Content-Length", 0)) or None
        bar = progress(total=left, unit="B", unit_scale=True, desc=partial.name)
        with partial.open("ab" if resumed else "wb") as file, bar:
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=kind != "md5")).hexdigest()


def _short(error: Exception) -> str:
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)

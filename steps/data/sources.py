"""Where raw files come from: the publisher, then mirrors; and how an archive is unpacked safely."""

import errno
import glob
import hashlib
import os
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import requests

from steps.common.cli import StepError
from steps.common.files import sha256
from steps.common.progress import progress

MIRROR_VARIABLE = "HSTU_DATA_MIRROR"
_CHUNK = 1 << 16  # bytes; what a broken connection can lose
_TIMEOUT_S = (5, 60)  # to connect, between two bytes


def fetch(source: dict[str, Any], partial: Path) -> Path:
    """Bring `source["file"]`, with the SHA-256 that `source` names, to a path beside `partial`, which it returns.

    Tries the publisher, then `source["mirrors"]`, then the environment variable HSTU_DATA_MIRROR; a
    mirror is a URL, a file, or a folder that holds the file. An interrupted download resumes where it stopped, from
    the same source alone. A download with another SHA-256 is deleted, and the next source is tried.
    Raises StepError that lists why each source failed.
    """
    locations = [source.get("publisher"), *source.get("mirrors", []), os.environ.get(MIRROR_VARIABLE)]
    failures = []
    for location in filter(None, locations):
        own = partial.with_name(f"{partial.name}.{hashlib.sha256(location.encode()).hexdigest()[:12]}.download")
        resumed = own.exists()
        try:
            found = _fetched(location, source["file"], own)
            if found != source["sha256"] and resumed:  # its first part may be of an older file
                own.unlink()
                found = _fetched(location, source["file"], own)
        except (OSError, requests.RequestException) as error:  # the partial file stays: the next run resumes it
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            failures.append(f"{location}: {_short(error)}")
            continue
        if found == source["sha256"]:
            for other in partial.parent.glob(f"{glob.escape(partial.name)}.*.download"):
                if other != own:
                    other.unlink()
            return own
        failures.append(
            f"{location}: {own.stat().st_size} bytes with sha256 {found}, expected {source['sha256']} "
            "(truncated, changed, or params/datasets.yaml is out of date)"
        )
        own.unlink()
    raise StepError(
        f"cannot get {source['file']} ({'; '.join(failures) or 'no source named'}). Set {MIRROR_VARIABLE} to a "
        "folder, file or URL that has it"
    )


def _fetched(location: str, name: str, partial: Path) -> str:
    _copy(location, name, partial)
    return sha256(partial)


def extract(archive: Path, folder: Path) -> None:
    """Unpack the zip file `archive` into the new folder `folder`, member by member.

    Raises StepError if the archive is damaged or a member is a link or would land outside `folder`;
    every name is checked before the first member is written.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            for member in members:
                _check_member(archive, member)
            folder.mkdir(parents=True)
            for member in members:
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(member) as content, target.open("wb") as output:
                    shutil.copyfileobj(content, output, _CHUNK)  # checks the member's CRC at its end
    except (zipfile.BadZipFile, EOFError) as error:
        raise StepError(f"{archive.name} is damaged or not a zip archive: {error}. Fetch it again") from error


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
        raise StepError(f"{archive.name}: member {member.filename!r} would be written outside its folder; not unpacked")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise StepError(f"{archive.name}: member {member.filename!r} is a link; not unpacked")


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


def _short(error: Exception) -> str:
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)

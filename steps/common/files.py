"""Files that are either complete or absent, and errors that name them."""

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from steps.common.cli import StepError
from steps.common.locks import lock_of, locked

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary file or folder name beside `path`, renamed to `path` when the block succeeds.

    If the block fails the temporary is removed and `path` keeps what it had. A process that is killed leaves the
    temporary, never a half-written `path`; the next one that writes `path` removes it. Of two processes that write
    `path` the second waits for the first. Raises StepError that names `path` if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path) as alone:
            if alone:
                for stale in path.parent.glob(f".{glob.escape(path.name)}.*-*.partial*"):
                    _remove(stale)  # with what a library put beside it, such as SQLite's journal
            yield temporary
            if temporary.is_dir() and path.is_dir():
                shutil.rmtree(path)  # os.replace cannot replace a folder that is not empty
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # as where the folder cannot be made
            _remove(temporary)
        if isinstance(error, OSError):
            name_written(path, temporary, error)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Within it whatever goes wrong with reading the file `path` becomes a StepError that names it and the remedy."""
    try:
        yield
    except StepError:
        raise
    except FileNotFoundError as error:
        raise StepError(f"{path} does not exist; {remedy}") from error
    except OSError as error:
        raise StepError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from error
    except Exception as error:  # of a parser, each of which has its own
        raise StepError(f"{path} is damaged ({error}); {remedy}") from error


def read_json(path: Path, kind: type[Any] = dict, remedy: str = "make it again") -> Any:
    """The content of the JSON file `path`: an object, or what else the `kind` is.

    Raises StepError that names the file if it is missing, damaged or of another kind.
    """
    content = _parsed(_text(path, remedy), str(path), remedy)
    if not isinstance(content, kind):
        raise StepError(f"{path} holds a {type(content).__name__} where a {kind.__name__} belongs; {remedy}")
    return content


def read_jsonl(path: Path, remedy: str = "train again") -> list[dict[str, Any]]:
    """The objects of the JSON-lines file `path`, in order.

    Raises StepError that names file and line if one is damaged or no object.
    """
    return parse_jsonl(_text(path, remedy), str(path), remedy)


def parse_jsonl(text: str, source: str, remedy: str) -> list[dict[str, Any]]:
    """The objects of JSON lines, in order. Raises StepError that names the source and line of a damaged one."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = _parsed(line, f"{source}, line {number},", remedy)
        if not isinstance(entry, dict):
            raise StepError(f"{source}, line {number}, is no JSON object; {remedy}")
        found.append(entry)
    return found


def sha256(path: Path) -> str:
    """The SHA-256 of the file `path`, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(path: Path, remedy: str) -> str:
    with reading(path, remedy):
        return path.read_text(encoding="utf-8")


def _parsed(text: str, source: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise StepError(f"{source} is not JSON ({error}); {remedy}") from error


def name_written(path: Path, temporary: Path, error: OSError) -> None:
    """Raise StepError for an error of writing `path`, by way of `temporary`; one of another file names that itself."""
    full = error.errno in _DISK_FULL or any(os.strerror(number) in str(error) for number in _DISK_FULL)
    if full:
        raise StepError(f"cannot write {path}: the disk is full; make room and run the same command again") from error
    if error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(temporary):
        raise StepError(f"cannot write {path}: {error.strerror or error}") from error
    if Path(os.fsdecode(error.filename)) in (path, path.parent, lock_of(path)):
        raise StepError(f"cannot write {path}: {error.filename}: {error.strerror}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

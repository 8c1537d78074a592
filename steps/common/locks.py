"""One process at a time: locks of the kernel's, which a process that dies gives back."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_NONE_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # as file systems of clusters answer that know no locks


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Within it no other process that asks is within it for the same output `path`, whose folder must exist.

    Waits for a process that is, and says so on stderr. The lock is a hidden file beside `path`, there only while
    somebody holds it or was killed. Yields whether there is a lock: some file systems have none.
    """
    lock = lock_of(path)
    file = _acquire(lock, path)
    try:
        yield file is not None
    finally:
        if file is not None:
            lock.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone, and makes a new one
            file.close()


def lock_of(path: Path) -> Path:
    """The hidden file beside `path` that is locked for it."""
    return path.with_name(f".{path.name}.lock")


def _acquire(lock: Path, path: Path) -> IO[str] | None:
    said = False
    while True:
        file = lock.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                step = Path(sys.argv[0]).stem
                print(f"{step}: another process works on {path}; waiting", file=sys.stderr, flush=True)
            said = True
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            file.close()
            if error.errno not in _NONE_HERE:
                raise
            lock.unlink(missing_ok=True)
            return None
        if _is(file, lock):
            return file
        file.close()


def _is(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one of that name, which its last holder may have removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

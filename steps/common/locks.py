"""One process at a time: file locks, which the operating system releases when a process dies."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # on file systems without locks, as some clusters have


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of the output `path`, whose folder must exist: only one process at a time can.

    Waits if another process holds it, and says so on stderr. The lock is a hidden file beside `path`, which remains
    only if its holder was killed. Yields whether there is a lock: some file systems do not support them.
    """
    lock = lock_of(path)
    file = _acquire(lock, path)
    try:
        yield file is not None
    finally:
        if file is not None:
            # While it is held: a waiting process sees that it is gone, and makes a new one.
            lock.unlink(missing_ok=True)
            file.close()


def lock_of(path: Path) -> Path:
    """The lock file of `path`, hidden beside it."""
    return path.with_name(f".{path.name}.lock")


def _acquire(lock: Path, path: Path) -> IO[str] | None:
    reported = False
    while True:
        file = lock.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not reported:
                step = Path(sys.argv[0]).stem
                print(f"{step}: another process works on {path}; waiting", file=sys.stderr, flush=True)
            reported = True
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            file.close()
            if error.errno not in _UNSUPPORTED:
                raise
            lock.unlink(missing_ok=True)
            return None
        if _is_file(file, lock):
            return file
        file.close()


def _is_file(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one at `path`: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

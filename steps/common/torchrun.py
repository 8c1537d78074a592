"""What torchrun started: its store, and how the processes of a run end together, on one machine or on several.

torchrun ends the processes of its own machine when one of them ends, and knows little of other machines. So each
process says in the store that it lives, and looks at what the others say.
"""

import functools
import os
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from steps.common.cli import StepError
from steps.common.provenance import content_sha256

ENDED = (
    "another process of this run ended, or torchrun was stopped: all stop; the same command goes on from what is "
    "saved, also with another number of processes"
)
_CONNECTING = timedelta(seconds=20)  # to torchrun's store, which is there before this process, unless it was killed
_BEGINNING_S = 300.0  # for all processes to load their code, which may lie on a slow disk
_POLL_S, _TICK_S = 0.05, 1.0
_SILENT_TICKS = 60  # of a process that says nothing, until it is taken for ended
_UNWINDING_S = 5.0  # for the main thread to say why it fails, and to remove what it was writing
_STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # what torchrun hands on, beside SIGINT


def started() -> bool:
    """Whether torchrun started this process and others, and keeps a store that outlives each of them.

    Not where a cluster sets the variables that say how many, but nobody keeps a store.
    """
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ["WORLD_SIZE"]) > 1


def connected() -> tuple[Any, int, int]:
    """torchrun's store, by a connection that one thread may use at a time; the rank of this process, and how many.

    What is in it is of this attempt: torchrun keeps its store when it starts processes again. Raises StepError where
    the others do not begin.
    """
    store, rank, size = _connection()
    return dist.PrefixStore(_attempt(), store), rank, size  # type: ignore[attr-defined]


def main_connection() -> tuple[Any, int, int]:
    """`connected()` of the main thread, always the same; where it fails, it is tried once: it takes a while."""
    if isinstance(found := _main_connection(), Exception):
        raise found
    return found


@functools.cache
def _main_connection() -> tuple[Any, int, int] | Exception:
    try:
        return connected()
    except (RuntimeError, ValueError, StepError) as error:
        return error


def first_to_end(store: Any = None) -> bool:
    """Whether no other process of this run has failed or printed its help before: it says why, the others nothing.

    store: a connection to torchrun's, if not the one of the main thread.
    """
    if not started():
        return True
    try:
        return int((store or main_connection()[0]).add("ended", 1)) == 1
    except (RuntimeError, ValueError, StepError):  # the store has ended too, or there is none
        return _first_here()


class Others:
    """What the store says of the others. A thread asks: where the store's machine is out of reach there is no answer,
    and torch's store has no limit for that."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.torchrun = os.getppid()
        self.asked = 0  # how often there was an answer
        self.ended = False
        self.finished = threading.Event()  # then nothing is asked any more

    def watch(self) -> None:
        """Say each second that this process lives, and ask whether one has failed, or the next one is silent.

        A process looks at the next one alone: where that is silent it ends, says so, and the others see it. It looks at
        its own torchrun too, without which it would go on where the store is of another machine.
        """
        seen, silent = 0, 0
        while not self.finished.wait(_TICK_S):
            try:
                self.store.add(f"lives/{self.rank}", 1)
                ended, lives = (self.store.add(key, 0) for key in ("ended", f"lives/{(self.rank + 1) % self.size}"))
            except RuntimeError:  # the store has ended, and torchrun with it
                ended = not self.finished.is_set()
                lives = seen
            seen, silent = lives, silent + 1 if lives == seen else 0
            self.asked += 1
            if ended or silent >= _SILENT_TICKS or os.getppid() != self.torchrun:
                self.ended = True
                return


def end_with_others() -> threading.Event:
    """End at SIGTERM, which torchrun sends when another process of this machine has ended, and the other signals that
    stop it; at Ctrl-C, if this process has not ended by itself; and when a process has failed or fallen silent, here or
    on another machine, or its torchrun has been killed: this last until the event is set.

    A thread does it: the main one may wait for NCCL or the store, and runs no signal handler meanwhile.
    """
    others = Others(*connected())  # of their own: the main thread may wait in the other connection
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in _STOPS:
        signal.signal(number, lambda *_: None)

    def end() -> None:
        wait_for_end(others, read)
        if _within(_UNWINDING_S, lambda: first_to_end(others.store), _first_here()):
            print(f"{Path(sys.argv[0]).stem}: {ENDED}", file=sys.stderr, flush=True)
        os._exit(1)

    for work in (others.watch, end):
        threading.Thread(target=work, daemon=True).start()
    return others.finished


def wait_for_end(others: Others, signals: int) -> None:
    """Return when this process is to end. signals: a file descriptor that gives the number of each signal."""
    asked, silent = 0, 0
    while True:
        if select.select([signals], [], [], _TICK_S)[0]:
            number = os.read(signals, 1)[0]
            if number == signal.SIGINT:
                time.sleep(_UNWINDING_S)
            if number in (*_STOPS, signal.SIGINT):
                return
        elif others.finished.is_set():
            continue
        elif others.ended:
            time.sleep(_UNWINDING_S)
            return
        else:
            asked, silent = others.asked, silent + 1 if others.asked == asked else 0
            if silent >= _SILENT_TICKS:
                return


def _within(seconds: float, work: Callable[[], bool], otherwise: bool) -> bool:
    """What `work` finds, if it does so within these seconds."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else otherwise


def _first_here() -> bool:
    """Of the processes of this machine, where they cannot ask which is to speak."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _connection() -> tuple[Any, int, int]:
    store, rank, size = next(rendezvous("env://", timeout=_CONNECTING))
    store.set_timeout(default_pg_timeout)
    return store, rank, size


@functools.cache
def _attempt() -> str:
    return agreed(*_connection(), _BEGINNING_S)


def agreed(store: Any, rank: int, size: int, seconds: float) -> str:
    """A name that all processes find, which is another each time that torchrun starts them.

    Not TORCHELASTIC_RESTART_COUNT: it differs between machines where the processes of one failed and those of another
    did not. Each process puts a word of its own into the store, the first one lists the words, and all wait until as
    many have found their own in the list: it may hold the word of a process that has ended. Raises StepError if they
    have not within so many seconds.
    """
    own, found, deadline = uuid.uuid4().hex, "", time.monotonic() + seconds
    words = [f"word/{other}" for other in range(size)]
    store.set(words[rank], own)
    while time.monotonic() < deadline:
        if rank == 0 and store.check(words):
            store.set("words", " ".join(word.decode() for word in store.multi_get(words)))
        if store.check(["words"]):
            listed = store.get("words").decode().split()
            if len(listed) == size and listed[rank] == own:
                name = content_sha256(listed)
                if name != found:
                    store.add(f"{name}/here", 1)
                    found = name
                if store.add(f"{name}/here", 0) == size:
                    return name
        time.sleep(_POLL_S)
    raise StepError(f"of {size} processes not all have begun within {seconds:.0f} s: see what the others say")

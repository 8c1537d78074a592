"""The processes that train one run together, as torchrun starts them: what they sum and tell each other, and how they
end together.

Sums go through gloo or NCCL, which give up after minutes. What processes tell goes through torchrun's store, where one
may wait for another that hashes a large file: if a process ends, torchrun ends the others.
A process alone needs none of it: it sums nothing and waits for nobody.
"""

import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from steps.common.cli import StepError
from steps.common.provenance import commit, content_sha256

_LONG = timedelta(days=30)  # for a lock that another training holds, and for files of any size
_CONNECTING = timedelta(seconds=20)  # to torchrun's store, which is there before this process, unless it was killed
_DIGITS, _SHOWN = 8, 300  # characters that are shown: of a hash, and of what gloo and NCCL say
_UNWINDING_S = 5.0  # from Ctrl-C on, for the main thread to remove what it was writing
_ENDED = (
    "another process of this run ended, or torchrun was stopped: all stop; the same command goes on from what is "
    "saved, also with another number of processes"
)


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `size`. All call its methods in the same order.

    store: torchrun's own, which outlives each of them.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    _count: Iterator[int] = field(default_factory=itertools.count)

    @property
    def writes(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> None:
        """Put the sum over all processes into `tensor`, the same bytes in each. Raises StepError if one has ended."""
        if self.size > 1:
            with self.explaining():
                dist.all_reduce(tensor)

    def gathered(self, text: str) -> list[str]:
        """The texts of all processes, by rank. Waits for all, however late they are. Raises StepError if torchrun has
        ended."""
        if self.size == 1:
            return [text]
        number = next(self._count)
        keys = [f"told/{number}/{rank}" for rank in range(self.size)]
        with self.explaining():
            self.store.set(keys[self.rank], text)
            self.store.wait(keys, _LONG)
            return [told.decode() for told in self.store.multi_get(keys)]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gathered("")

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return any(self.gathered("yes" if here else ""))

    def told(self, text: str) -> str:
        """The text of the process that writes."""
        return self.gathered(text)[0]

    def say(self, line: str) -> None:
        """Print a line of this process alone: on stderr, with its rank, where it is not the one that prints."""
        if self.writes:
            print(line, flush=True)
        else:
            print(f"rank {self.rank}: {line}", file=sys.stderr, flush=True)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Within it an error of waiting for another process becomes a StepError that says so."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl")):
                told = " ".join(str(error).split())[:_SHOWN]  # as by NCCL that finds no memory to share
                known = "by peer" in told or isinstance(error, dist.DistNetworkError)
                raise StepError(_ENDED if known else f"{_ENDED} ({told})") from error
            raise

    def require_equal(self, content: Any, what: str) -> None:
        """Raise StepError unless all processes have the same JSON values, of which the words say what they are."""
        found = self.gathered("none" if content is None else content_sha256(content)[:_DIGITS])
        for rank, other in enumerate(found):
            if other != found[0]:
                raise StepError(
                    f"{what} differs between the processes: rank 0 has {found[0]}, rank {rank} has {other} (by hash); "
                    "all need the same files"
                )

    @contextmanager
    def first_alone(self, held: Any) -> Iterator[None]:
        """Hold the context `held` in the process that writes; the others go on once it is held, however late."""
        with held if self.writes else nullcontext():
            self.wait()
            yield


ALONE = Processes()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started with this one, which may sum within it; `ALONE` without torchrun.

    All but the one that writes print nothing. Where one fails all end. Raises StepError if WORLD_SIZE says that there
    are several without torchrun.
    """
    if not _started_by_torchrun():
        if (size_said := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
            raise StepError(
                f"the environment variable WORLD_SIZE is {size_said}, but there is no store of torchrun: start the "
                "processes by torchrun, or unset WORLD_SIZE to start one alone"
            )
        yield ALONE
        return
    with ALONE.explaining():
        store, rank, size = _main_connection()
        _end_when_stopped()
        on_cuda = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=_connected()[0],  # NCCL's threads use it too
            rank=rank,
            world_size=size,
            device_id=device if on_cuda else None,
        )
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process lives)
    processes = Processes(rank, size, store)
    yield processes
    processes.wait()  # for the one that writes, before NCCL ends together
    dist.destroy_process_group()


def first_to_end(store: Any = None) -> bool:
    """Whether no other process of this run has failed or printed its help before: it says why, the others nothing.

    store: a connection to torchrun's, if not the one of the main thread.
    """
    if not _started_by_torchrun():
        return True
    try:
        return int((store or _main_connection()[0]).add("ended", 1)) == 1
    except (RuntimeError, ValueError):  # the store has ended too, or there is none
        return os.environ.get("RANK", "0") == "0"


def device_of_process(device: torch.device) -> torch.device:
    """The device that this process computes on, where `device` is picked: on CUDA each process has one of its own.

    Raises StepError if there are too few, or if `device` has a number.
    """
    if not _started_by_torchrun() or device.type != "cuda":
        return device
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.index is not None or number >= count:
        raise StepError(
            f"each process needs a CUDA device of its own, and this machine shows {count} of them to process {number}; "
            "start as many processes as devices, and give --device no number"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)  # where Triton launches its kernels
    return device


def require_one_run(processes: Processes, runs: int) -> None:
    """Raise StepError if several processes are given several runs."""
    if processes.size > 1 and runs > 1:
        raise StepError(f"{processes.size} processes work on one run together; give one --run, or leave out torchrun")


def require_one_source(processes: Processes, files: Mapping[str, Any]) -> None:
    """Raise StepError unless all processes have the same code, and the same contents of these files, by name."""
    if processes.size > 1:
        for what, content in {**files, "the commit of the code": commit()}.items():
            processes.require_equal(content, what)


def _started_by_torchrun() -> bool:
    """Not where a cluster sets the variables that say how many, but nobody keeps a store that outlives a process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ["WORLD_SIZE"]) > 1


def _connected() -> tuple[Any, int, int]:
    """torchrun's store, by a connection that one thread may use at a time; the rank of this process, and how many."""
    store, rank, size = next(rendezvous("env://", timeout=_CONNECTING))
    store.set_timeout(default_pg_timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # whose entries are not those of the one before
    own = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
    return own, rank, size


_main_connection = functools.cache(_connected)


def _end_when_stopped() -> None:
    """End at SIGTERM, which torchrun sends to all others when a process has ended; and at Ctrl-C, if this process has
    not ended by itself.

    A thread does it: the main one may wait for NCCL or the store, and runs no signal handler meanwhile.
    """
    store, _, _ = _connected()  # of its own: the main thread may wait in the other
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while (number := os.read(read, 1)[0]) not in (signal.SIGTERM, signal.SIGINT):
            pass
        if number == signal.SIGINT:
            time.sleep(_UNWINDING_S)
        if first_to_end(store):
            print(f"{Path(sys.argv[0]).stem}: {_ENDED}", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

"""The processes that train one run together, as torchrun starts them: what they sum, and how they end together.

A process alone needs none of it: it sums nothing and waits for nobody.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from steps.common.cli import StepError

_LONG = timedelta(days=30)  # for a lock that another training holds
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

    @property
    def writes(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> None:
        """Put the sum over all processes into `tensor`, the same bytes in each. Raises StepError if one has ended."""
        if self.size > 1:
            with self.explaining():
                dist.all_reduce(tensor)

    def wait(self) -> None:
        """Wait until all processes are here. Raises StepError if one has ended."""
        self.sum_(torch.zeros(1))

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        found = torch.tensor(float(here))
        self.sum_(found)
        return bool(found)

    def told(self, text: str) -> str:
        """The text of the process that writes."""
        found = [text]
        if self.size > 1:
            with self.explaining():
                dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Within it an error of waiting for another process becomes a StepError that says so."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl")):
                raise StepError(_ENDED) from error
            raise

    def require_equal(self, number: int, what: str) -> None:
        """Raise StepError unless all processes have the same number, of which the words say what it is."""
        found = torch.zeros(self.size, dtype=torch.int64)
        found[self.rank] = number
        self.sum_(found)
        if len(found.unique()) > 1:
            raise StepError(f"{what} differs between the processes: {found.tolist()}; all need the same code and files")

    @contextmanager
    def first_alone(self, held: Any) -> Iterator[None]:
        """Hold the context `held` in the process that writes; the others go on once it is held, however late."""
        if not self.writes:
            self.store.wait(["held"], _LONG)
            yield
            return
        with held:
            if self.store is not None:
                self.store.set("held", "")
            yield


ALONE = Processes()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started with this one, which may sum within it; `ALONE` without torchrun.

    All but the one that writes print nothing. Where one fails, the first to fail says why, and all end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store, rank, size = next(rendezvous("env://"))
    _end_when_stopped(store)
    try:
        on_cuda = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            device_id=device if on_cuda else None,
        )
        if rank > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process lives)
        yield Processes(rank, size, store)
        dist.destroy_process_group()
    except Exception:
        if not _is_first(store):
            sys.exit(1)
        raise


def device_of_process(device: torch.device) -> torch.device:
    """The device that this process computes on, where `device` is picked: on CUDA each process has one of its own.

    Raises StepError if there are too few, or if `device` has a number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or device.type != "cuda":
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


def _is_first(store: Any) -> bool:
    """Whether no other process has failed before."""
    try:
        return int(store.add("failed", 1)) == 1
    except RuntimeError:  # the store has ended too
        return True


def _end_when_stopped(store: Any) -> None:
    """End at SIGTERM, which torchrun sends to all others when a process has ended.

    A thread does it: the main one may wait for NCCL, and runs no signal handler meanwhile.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while os.read(read, 1) != bytes([signal.SIGTERM]):
            pass
        if _is_first(store):
            print(f"{Path(sys.argv[0]).stem}: {_ENDED}", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

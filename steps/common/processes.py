"""The processes that train one run together, as torchrun starts them: what they sum and tell each other.

Sums go through gloo or NCCL, which give up after minutes. What processes tell goes through torchrun's store, where one
may wait for another that hashes a large file: if a process ends, all end (steps/common/torchrun.py).
A process alone needs none of it: it sums nothing and waits for nobody.
"""

import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from steps.common import torchrun
from steps.common.cli import StepError
from steps.common.provenance import commit, content_sha256

_LONG = timedelta(days=30)  # for a lock that another training holds, and for files of any size
_DIGITS, _SHOWN = 8, 300  # characters that are shown: of a hash, and of what gloo and NCCL say


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
                raise StepError(torchrun.ENDED if known else f"{torchrun.ENDED} ({told})") from error
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
    if not torchrun.started():
        if (size_said := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
            raise StepError(
                f"the environment variable WORLD_SIZE is {size_said}, but there is no store of torchrun: start the "
                "processes by torchrun, or unset WORLD_SIZE to start one alone"
            )
        yield ALONE
        return
    with ALONE.explaining():
        store, rank, size = torchrun.main_connection()
        finished = torchrun.end_with_others()
        on_cuda = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=torchrun.connected()[0],  # NCCL's threads use it too
            rank=rank,
            world_size=size,
            device_id=device if on_cuda else None,
        )
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process lives)
    processes = Processes(rank, size, store)
    try:
        yield processes
        processes.wait()  # for the one that writes, before NCCL ends together
    except KeyboardInterrupt as error:  # other machines do not know of it
        raise StepError(torchrun.ENDED) from error
    finished.set()
    dist.destroy_process_group()


def device_of_process(device: torch.device) -> torch.device:
    """The device that this process computes on, where `device` is picked: on CUDA each process has one of its own.

    Raises StepError if there are too few, or if `device` has a number.
    """
    if not torchrun.started() or device.type != "cuda":
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

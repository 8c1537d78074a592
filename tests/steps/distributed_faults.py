"""Trains as `steps.train`, with a fault in one of the processes: `RANK FAULT [PATH] -- arguments of train`."""

import errno
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kernels.rowwise_table import naive
from steps.common import config, torchrun
from steps.models import weights
from steps.training import checkpoint, distributed, loop
from steps.training.checkpoint import StateWriter
from steps.training.distributed import SharedExecution
from steps.training.stream import RunStream


class Replayed:
    """Stands for a CUDA graph: does again what was captured, by the buffers that it had then."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.replay = work


def captured(fails: bool) -> None:
    """Steps are captured, on a CPU as on CUDA, if that does not fail."""
    init = SharedExecution.__init__
    on_cuda = RunStream.capture

    def begun(self: Any, *given: Any) -> None:
        init(self, *given)
        self.capture = True

    def capture(self: RunStream, work: Callable[[], Any], *given: Any, **how: Any) -> Any:
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return on_cuda(self, work, *given, **how) if self.device.type == "cuda" else (Replayed(work), None)

    distributed.unique = naive.padded_unique  # as on CUDA, in a size that is known beforehand
    SharedExecution.__init__ = begun  # type: ignore[method-assign]
    RunStream.capture = capture  # type: ignore[method-assign, assignment]


def joined_for_10_s(join: Callable[..., None], *given: Any, **how: Any) -> None:
    join(*given, **how)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=10))


def slow_to_hash() -> None:
    """The first time longer than another process waits in a sum."""
    digest = checkpoint._digest

    def slowly(*given: Any) -> str:
        checkpoint._digest = digest
        time.sleep(15)
        return digest(*given)

    checkpoint._digest = slowly


def raised(*_: Any, **how: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def killed_at_the_second_state(mark: Path, *others: int) -> None:
    """While another process waits for this one at the store. It leaves a mark, and is killed no second time."""
    save, calls = StateWriter.save_together, []

    def called(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 2 and not mark.exists():
            mark.touch()
            for process in (*others, os.getpid()):
                os.kill(process, signal.SIGKILL)
        save(*given)

    StateWriter.save_together = called  # type: ignore[method-assign]


def main() -> None:
    end = sys.argv.index("--")
    rank, fault, *path = sys.argv[1:end]
    sys.argv = ["train", *sys.argv[end + 1 :]]
    here = int(rank) == int(os.environ["RANK"])
    if fault == "lost":
        torchrun._SILENT_TICKS = 15
    if fault == "capture":
        captured(fails=here)
    if fault == "hash":
        dist.init_process_group = partial(joined_for_10_s, dist.init_process_group)
    if here:
        if fault == "state":
            read = checkpoint.read_state
            loop.read_state = lambda _, *given: read(Path(path[0]), *given)
        if fault == "config":
            read_config = config.read_config
            config.read_config = lambda _: read_config(Path(path[0]))
        if fault == "hash":
            slow_to_hash()
        if fault == "disk":
            weights._write_own = raised
        if fault == "killed":
            killed_at_the_second_state(Path(path[0]))
        if fault == "lost":
            killed_at_the_second_state(Path(path[0]), os.getppid())
        if fault == "step":
            SharedExecution._add_gradients = raised  # type: ignore[method-assign]
    runpy.run_module("steps.train", run_name="__main__")


if __name__ == "__main__":
    main()

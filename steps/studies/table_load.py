"""A load test, no evaluation: lookups and updates of a large rowwise table that processes share by rows.

The item ids are those of a fractal expansion of a data set: they have its long tail, no times, and no order that means
anything. torchrun starts the processes of a case, a GPU each, and `measured` is what each of them does, by our table or
by fbgemm_gpu's, which TorchRec shares out among several processes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kernels.jagged import fbgemm as fbgemm_gpu
from kernels.rowwise_table import RowwiseTable, fbgemm, torchrec
from kernels.rowwise_table.sharded import ShardedRowwiseTable
from steps.common.cli import StepError
from steps.common.processes import Processes
from steps.data.generators.draws import below, bits
from steps.data.generators.fractal import Expansion
from steps.data.sequences import load_sequences
from steps.studies.rows import PART, Row, row
from steps.studies.started import found_by_processes, require_devices

OURS, FBGEMM = "ours", "fbgemm"
PARTS = ("lookup", "all-to-all", "update")
_WARM_UP = 2
_WHO = 300  # the stream of draws of a step's users


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Data, expansion, whose table, and processes."""
    given = plan["settings"]
    return [
        {"data": data, **expansion, "by": by, "processes": processes}
        for data in plan["data"]["processed"]
        for expansion in given["expansions"]
        for by in expansion["by"]
        for processes in given["processes"]
    ]


def require(cases: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    """Raise StepError unless there is a GPU for every process, and what the cases' tables are by."""
    require_devices(cases, plan)
    most = max((case["processes"] for case in cases if case["by"] == FBGEMM), default=0)
    for needed, name, there in ((1, "fbgemm_gpu", fbgemm_gpu.available), (2, "TorchRec", torchrec.available)):
        if most >= needed and not there():
            raise StepError(
                f"{name} is not installed, or does not load; install the extra `distributed`, or measure our table "
                "alone, as by --only by=ours"
            )


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: of a process that takes longest, milliseconds of a step and its parts; and counts and bytes."""
    found = found_by_processes("table_load", case, plan, data)
    digest = found.pop("data_sha256")
    return [row(case, name, value, unit, data_sha256=digest) for name, (value, unit) in found.items()]


def table_of(
    rows: int, dim: int, lr: float, device: torch.device, processes: Processes
) -> RowwiseTable | ShardedRowwiseTable:
    """A float16 table of random vectors, of which this process makes no more than its own rows."""
    with torch.device("meta"):
        whole = RowwiseTable(rows, dim, lr, torch.float16)
        table = whole if processes.size == 1 else ShardedRowwiseTable(whole)
    table.to_empty(device=device)
    table.weight.normal_(std=0.02)
    table.sums.zero_()
    return table


def _by_fbgemm(table: RowwiseTable | ShardedRowwiseTable) -> bool:
    """Whether fbgemm_gpu can hold the table, as it does from now on."""
    if isinstance(table, ShardedRowwiseTable):
        return torchrec.fits(table.weight, table.rows)
    fbgemm.fits = fbgemm.takes  # also on CUDA, where trainings of one process have a kernel instead
    return fbgemm.takes(table.weight)


def ids_of(expansion: Expansion, users: int, step: int, processes: Processes) -> torch.Tensor:
    """The items, each once, that one process looks up in a step: those of some users' sequences."""
    index = torch.arange(users).numpy() + (step * processes.size + processes.rank) * users
    who = below(bits(expansion.seed, _WHO, index), expansion.num_users)
    return torch.cat([torch.from_numpy(expansion.sequence(int(user))) for user in who]).unique()


class Watch:
    """Seconds of the all-to-alls that happen `within` it, and the bytes that they send to other processes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.sent = device, 0.0, 0

    def now(self) -> float:
        """Seconds, once the device has done all that it was told to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def within(self) -> Iterator[None]:
        exchange = dist.all_to_all_single

        def watched(output: torch.Tensor, values: torch.Tensor, received: Any = None, sent: Any = None) -> None:
            begun = self.now()
            exchange(output, values, received, sent)
            self.seconds += self.now() - begun
            own = len(values) // dist.get_world_size() if sent is None else sent[dist.get_rank()]
            self.sent += (len(values) - own) * values[:1].nbytes

        dist.all_to_all_single = watched  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.all_to_all_single = exchange


def measured(asked: dict[str, Any], device: torch.device, processes: Processes) -> dict[str, Any]:
    """What a case's rows are made of: values and units by their names, and the hash of the data."""
    case, given = asked["case"], asked["plan"]["settings"]
    if case["by"] == OURS:
        for other in (fbgemm, torchrec):
            setattr(other, "fits", lambda *_: False)  # noqa: B010  (mypy knows no other way)
    sequences, digest = load_sequences(Path(asked["data"], "processed", case["data"]), torch.device("cpu"))
    arrays = sequences.offsets.numpy(), sequences.item.numpy()
    expansion = Expansion(*arrays, sequences.num_items, case["rows"], case["columns"], given["length"])
    begun = time.perf_counter()
    batches = [ids_of(expansion, given["users"], step, processes) for step in range(_WARM_UP + given["steps"])]
    making = time.perf_counter() - begun
    table = table_of(expansion.num_items + 1, given["dim"], given["lr"], device, processes)
    if case["by"] == FBGEMM and not _by_fbgemm(table):
        raise StepError(
            f"fbgemm_gpu takes no float16 table of width {given['dim']} on {device.type}; measure our table "
            "alone, as by --only by=ours"
        )
    for ids in batches[:_WARM_UP]:
        seconds_of_step(table, ids, given["dim"], Watch(device))
    step, watch, seconds = 0.0, Watch(device), [0.0, 0.0, 0.0]
    for ids in batches[_WARM_UP:]:
        step += seconds_of_step(table, ids, given["dim"], Watch(device))
    watched = batches[_WARM_UP:] if case["by"] == OURS else []  # `Watch` knows no exchanges of TorchRec
    for ids in watched:  # apart, as the host waits between the parts
        found = parts_of_step(table, ids, given["dim"], watch)
        seconds = [one + more for one, more in zip(seconds, found, strict=True)]
    times = torch.tensor([step, *seconds, making], dtype=torch.float64)
    sizes = torch.tensor([sum(map(len, batches[_WARM_UP:])), watch.sent, sum(one.nbytes for one in table.buffers())])
    if processes.size > 1:
        dist.all_reduce(times, dist.ReduceOp.MAX)
        dist.all_reduce(sizes, dist.ReduceOp.MAX)
    ms = [round(1e3 * value / given["steps"], 4) for value in times.tolist()]
    counts = [round(value / given["steps"], 1) for value in sizes.tolist()]
    told = {
        "table rows": (expansion.num_items + 1, "rows"),
        "table": (int(sizes[2]), "B"),
        "ids": (counts[0], "rows"),
        "step": (ms[0], "ms"),
        "making ids": (round(1e3 * float(times[4]) / len(batches), 4), "ms"),
    }
    if watched:
        told["sent"] = (counts[1], "B")
        told |= {f"{PART}{name}": (value, "ms") for name, value in zip(PARTS, ms[1:4], strict=True)}
    return told | {"data_sha256": digest}


def seconds_of_step(table: torch.nn.Module, ids: torch.Tensor, dim: int, watch: Watch) -> float:
    """Seconds of a lookup of ids (n,) and the update by a gradient (n, dim)."""
    ids, gradient = _on(watch.device, ids, dim)
    begun = watch.now()
    table(ids).backward(gradient)
    return watch.now() - begun


def parts_of_step(table: torch.nn.Module, ids: torch.Tensor, dim: int, watch: Watch) -> tuple[float, float, float]:
    """The same of lookup, all-to-all, and update."""
    ids, gradient = _on(watch.device, ids, dim)
    with watch.within():
        begun, before = watch.now(), watch.seconds
        vectors = table(ids)
        looked_up, between = watch.now(), watch.seconds
        vectors.backward(gradient)
        ended = watch.now()
    first, second = between - before, watch.seconds - between
    return looked_up - begun - first, first + second, ended - looked_up - second


def _on(device: torch.device, ids: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids, and a gradient of theirs, on the device; all processes begin together."""
    ids = ids.to(device)
    if dist.is_initialized():
        dist.barrier()
    return ids, torch.full((len(ids), dim), 1e-3, device=device)

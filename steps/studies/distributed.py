"""What several processes win and lose in training one run: steps and their parts, waiting, and time to a quality.

Steps are those of HSTU-large on sequences in MovieLens-20M's form, made in place, with a table that AdamW learns, of
which all processes have a copy, and one of rowwise Adagrad, of which each has a block. They run as in training, on CUDA
as graphs; those of one process are compiled too if its training is long, those of several never. torchrun starts the
processes of a case, a GPU each. The table is ours, not TorchRec's. Needs torch, numpy and safetensors alone.
"""

import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from kernels.rowwise_table import fbgemm, torchrec
from kernels.rowwise_table.sharded import ShardedRowwiseTable
from steps.common.device import pick_precision
from steps.common.processes import Processes
from steps.data.generators.movielens import MovieLens
from steps.data.sequences import Sequences, load_sequences
from steps.studies.rows import PART, Row, row
from steps.studies.started import found_by_processes, require_devices
from steps.studies.training_speed import by_part
from steps.training.distributed import PartOfWindows
from steps.training.execution import Mode
from steps.training.loop import Training, train_together
from steps.training.schedule import Step

SCALING, BALANCE, QUALITY = "scaling", "balance", "quality"
ADAMW, ROWWISE = "AdamW", "rowwise Adagrad"
BY_COST, AT_RANDOM = "by cost", "at random"
#: The parts of a step. `waiting`: for another process, before what all do together.
PARTS = ("lookup", "all-to-all", "attention", "sum of gradients", "waiting", "rest")
#: Metric, value, unit, and repetition.
_Found = tuple[str, float, str, int | None]

require = require_devices


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps by table, windows and processes; steps of long windows by how they are shared out; trainings."""
    given = plan["settings"]
    found: list[dict[str, Any]] = []
    for config in _configs(plan, "steps"):
        for processes in given["processes"]:
            for windows in dict.fromkeys((given["windows_each"] * processes, given["windows"])):
                found.append({"kind": SCALING, "table": table_of(config), "windows": windows, "processes": processes})
    for processes, shared in itertools.product(given["processes"], (BY_COST, AT_RANDOM)):
        if processes > 1:
            windows = given["balance"]["windows_each"] * processes
            found.append({"kind": BALANCE, "shared": shared, "windows": windows, "processes": processes})
    for name in dict.fromkeys(config["row"] for config in _configs(plan, QUALITY)):
        found += [{"kind": QUALITY, "model": name, "processes": processes} for processes in given["processes"]]
    return found


def table_of(config: dict[str, Any]) -> str:
    """What a run's item vectors are learned by."""
    return ROWWISE if "items" in config["model"] else ADAMW


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case, of which `step_rows` and `trainings` say what they are."""
    found = found_by_processes("distributed", case, plan, data)
    digest = found.get("data_sha256")
    return [row(case, *one[:3], repetition=one[3], data_sha256=digest) for one in found["rows"]]


def measured(asked: dict[str, Any], device: torch.device, processes: Processes) -> dict[str, Any]:
    """What the rows of a case are made of."""
    for other in (fbgemm, torchrec):
        setattr(other, "fits", lambda *_: False)  # noqa: B010  (mypy knows no other way)
    case, plan = asked["case"], asked["plan"]
    given = plan["settings"]
    if case["kind"] == QUALITY:
        configs = [config for config in _configs(plan, QUALITY) if config["row"] == case["model"]]
        return trainings(configs, given["quality"], Path(asked["data"]), device, processes)
    wanted = case.get("table", ADAMW)
    config = deepcopy(next(one for one in _configs(plan, "steps") if table_of(one) == wanted))
    config["training"]["batch"] = case["windows"]
    if case["kind"] == BALANCE:
        config["training"]["max_len"] = given["balance"]["max_len"]
    (form,) = plan["generated"].values()
    sequences = generated(form["synthesize"], given["users"], device)
    return {"rows": step_rows(config, sequences, given, processes, case.get("shared") == AT_RANDOM)}


def generated(synthesize: dict[str, Any], users: int, device: torch.device) -> Sequences:
    """At least so many of the form's users, by time, and of one time by movie; a movie's item is its place by id."""
    form = MovieLens(**{key: value for key, value in synthesize.items() if key != "form"})
    chunks = [form.walks.chunk(number) for number in range(min(form.walks.chunks, -(-users // form.walks.chunk_users)))]
    user, item, moment = (np.concatenate([getattr(one, name) for one in chunks]) for name in ("user", "item", "time"))
    movie = form.movie_of_item[item]
    order = np.lexsort((movie, moment, user))
    arrays = np.concatenate([[0], np.bincount(user).cumsum()]), 1 + movie[order], moment[order]
    offsets, items, timestamp = (torch.from_numpy(array).to(device) for array in arrays)
    return Sequences(offsets, items, timestamp, form.movies)


def at_random(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Equally many windows for each part, in the order of the batch, which is random."""
    edges = [len(costs) * part // parts for part in range(parts + 1)]
    return [list(range(first, end)) for first, end in itertools.pairwise(edges)]


def step_rows(
    config: dict[str, Any],
    sequences: Sequences,
    given: dict[str, Any],
    processes: Processes,
    randomly: bool = False,
) -> list[_Found]:
    """A step of the process that takes longest, as CUDA graphs and launched from Python; its parts and the share of it
    that a process waits, means over the processes; the largest load over the mean; bytes. randomly: share windows out
    so.

    Not compiled, as a long training by one process is: steps of several are not, and are compared with it."""
    device = sequences.item.device
    found: list[_Found] = []
    on_cuda: dict[str, Mode] = {"step": "graph", "step from Python": "eager"}
    modes: dict[str, Mode] = on_cuda if device.type == "cuda" else {"step": "eager"}
    for name, mode in modes.items():
        with tempfile.TemporaryDirectory() as folder:
            dtype = pick_precision("bf16", device)[1]
            training = Training(config, sequences, "", Path(folder), dtype, mode, processes=processes)
        if randomly and isinstance(training.schedule, PartOfWindows):
            training.schedule.share_out = at_random
        with training.stream.active():
            training.model.train()
            torch.manual_seed(0)
            steps = training.schedule.epoch()[: given["steps"]]
            run(training, steps)  # compiles kernels, captures graphs
            found.append((name, round(float(by_process([run(training, steps)], processes).max()), 4), "ms", None))
            if name == "step":
                found += _about(training, steps, given["profiled"])
        del training
        gc.collect()  # graphs are cycles, whose memory would be missing
    return found


def _about(training: Training, steps: list[Step], profiled: int) -> list[_Found]:
    """All that is measured of steps beside their time."""
    processes = training.processes
    parts = by_process(list(parts_of_step(training, steps, profiled).values()), processes).mean(0)
    max_len, lengths_of = training.settings.max_len, training.sequences.window_lengths
    lengths = [lengths_of(step.inputs[0], step.inputs[1], max_len).cpu().double() for step in steps]
    loads = by_process([float((own**2).sum()) for own in lengths], processes)
    tokens = by_process([float(own.sum()) for own in lengths], processes).sum(0).mean()
    found: list[_Found] = [
        *((PART + part, round(float(value), 4), "ms", None) for part, value in zip(PARTS, parts, strict=True)),
        ("idle", round(float(parts[PARTS.index("waiting")] / parts.sum()), 4), "of 1", None),
        ("load", round(float((loads.amax(0) / loads.mean(0)).mean()), 4), "of the mean", None),
        ("tokens", round(float(tokens), 1), "tokens", None),
        ("item bytes", round(training.model.item_bytes(training.optimizer), 4), "B", None),
    ]
    if training.device.type == "cuda":
        peak = by_process([torch.cuda.max_memory_allocated(training.device)], processes).max()
        found.append(("peak", int(peak), "B", None))
    return found


def run(training: Training, steps: list[Step]) -> float:
    """Milliseconds of a step, the mean over these, once all processes begin."""
    training.processes.wait()
    begun = _now(training.device)
    for number, step in enumerate(steps):
        training.execution(step, number)
    return 1e3 * (_now(training.device) - begun) / len(steps)


def by_process(values: list[float], processes: Processes) -> torch.Tensor:
    """The values of each process: (processes, n) float64."""
    found = torch.zeros(processes.size, len(values), dtype=torch.float64)
    found[processes.rank] = torch.tensor(values, dtype=torch.float64)
    processes.sum_(found)
    return found


class Timeline:
    """Which part of a step begins when: by events on a CUDA device, by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moments: list[tuple[Any, str]] = []
        self._within = [PARTS[-1]]
        self._mark()

    def begin(self, part: str) -> None:
        self._within.append(part)
        self._mark()

    def end(self) -> None:
        self._within.pop()
        self._mark()

    def milliseconds(self) -> dict[str, float]:
        """Of each part, until now: they add up to the whole."""
        self._mark()
        _now(self.device)
        found = dict.fromkeys(PARTS, 0.0)
        for (before, part), (after, _) in itertools.pairwise(self._moments):
            found[part] += before.elapsed_time(after) if self.device.type == "cuda" else 1e3 * (after - before)
        return found

    def _mark(self) -> None:
        moment: Any = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._moments.append((moment, self._within[-1]))


def parts_of_step(training: Training, steps: list[Step], profiled: int) -> dict[str, float]:
    """Milliseconds of a step by part, the mean over these, which add up to a step that is watched.

    On CUDA attention is the time of its kernels, and so are lookups in a table that is not shared.
    """
    training.processes.wait()
    timeline = Timeline(training.device)
    with watched(training, timeline):
        for number, step in enumerate(steps):
            training.execution(step, number)
        found = {part: value / len(steps) for part, value in timeline.milliseconds().items()}
    if training.device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(training, steps[:profiled])
        times = {event.key: event.self_device_time_total / 1e3 / profiled for event in profile.key_averages()}
        kernels = by_part(times)
        told = {"attention": sum(ms for part, ms in kernels.items() if part.startswith("attention"))}
        if not isinstance(training.model.items, ShardedRowwiseTable):
            told["lookup"] = kernels.get("item vectors", 0.0)
        for part, ms in told.items():
            found[part] += ms
            found["rest"] -= ms
    return found


@contextmanager
def watched(training: Training, timeline: Timeline) -> Iterator[None]:
    """Within it the steps of a training mark their parts: what processes do together, with a wait for the last of them
    before it; lookups in a shared table; and on a CPU all lookups, and attention."""
    items, together, on_cpu = training.model.items, dist.all_reduce, training.device.type == "cpu"

    def marked(part: str, call: Callable[..., Any], waits: bool = False) -> Callable[..., Any]:
        def during(*arguments: Any) -> Any:
            if waits:
                timeline.begin("waiting")
                together(torch.zeros(1, device=training.device))
                timeline.end()
            timeline.begin(part)
            found = call(*arguments)
            timeline.end()
            if part == "lookup" and found.grad_fn is not None:  # whose backward pass is one node
                found.grad_fn.register_prehook(lambda *_: timeline.begin(part))
                found.grad_fn.register_hook(lambda *_: timeline.end())
            if part == "attention" and found.requires_grad:
                found.register_hook(lambda _: timeline.begin(part))
                torch.autograd.graph.register_multi_grad_hook(arguments[:3], lambda _: timeline.end())
            return found

        return during

    wanted: list[tuple[Any, str, str, bool]] = []
    if training.processes.size > 1:
        wanted += [(dist, "all_to_all_single", "all-to-all", True), (dist, "all_reduce", "sum of gradients", True)]
    if isinstance(items, ShardedRowwiseTable) or on_cpu:
        wanted.append((items, "forward" if isinstance(items, torch.nn.Embedding) else "_look_up", "lookup", False))
    if on_cpu:
        wanted += [(block, "attend", "attention", False) for block in training.model.encoder.blocks]
    with ExitStack() as patches:
        for owner, name, part, waits in wanted:
            patches.enter_context(patch.object(owner, name, marked(part, getattr(owner, name), waits)))
        yield


def trainings(
    configs: list[dict[str, Any]], wanted: dict[str, Any], data: Path, device: torch.device, processes: Processes
) -> dict[str, Any]:
    """By seed, as its repetition: the best value of the metric on validation, and, where the target was reached, after
    how many epochs and seconds of training it was. The first seed is trained for an epoch before, which is not kept."""
    sequences, digest = load_sequences(data / "processed" / configs[0]["dataset"], device)
    found: list[_Found] = []
    for number, config in enumerate([configs[0], *configs]):
        config = deepcopy(config)
        config["training"] |= {"epochs": wanted["epochs"] if number else 1, "eval_every": 1}
        config["training"].pop("patience", None)
        with tempfile.TemporaryDirectory() as folder:
            dtype = pick_precision("bf16", device)[1]
            training = Training(config, sequences, digest, Path(folder), dtype, processes=processes)
            for _, failure in train_together([training]):
                if failure is not None:
                    raise failure
        if not number:
            continue
        quality = [line[f"valid/{wanted['metric']}"] for line in training.history]
        found.append(("best", max(quality), "fraction", config["seed"]))
        reached = next((index for index, value in enumerate(quality) if value >= wanted["target"]), None)
        if reached is not None:
            seconds = sum(line["train/seconds"] for line in training.history[: reached + 1])
            found.append(("epochs", reached + 1, "epochs", config["seed"]))
            found.append(("seconds", round(seconds, 3), "s", config["seed"]))
    return {"rows": found, "data_sha256": digest}


def _configs(plan: dict[str, Any], measured: str) -> list[dict[str, Any]]:
    """The configs of the runs of which this is measured."""
    return [config for group in plan["runs"] if group["measured"] == measured for config in group["configs"]]


def _now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""Where the time of a training goes, and how far it is from what the device could do.

A single step is timed on users whose windows are all full, which is the longest a step can take: as CUDA graphs of the
kernels that torch.compile makes, as CUDA graphs without it, and launched one kernel at a time; on a CPU the last alone.
Whole trainings run all their epochs on a data set, one after the other. Beside them stand the device's roofs.
"""

import gc
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from steps.common.device import pick_precision
from steps.data.sequences import Sequences, load_sequences
from steps.studies.kernels import roofs
from steps.studies.rows import KERNEL, PART, ROOFS, Row, row
from steps.training.execution import Mode
from steps.training.loop import Training, train_together

#: Parts of a step by words in the names of their kernels; the first that fits counts.
PARTS = {
    "attention, forward": [
        "forward_kernel",
        "band_kernel",
        "relative_time",
        "tile_bucket",
        "spread_kernel",
        "flash_fwd",
        "fmha_cutlassF",
    ],
    "attention, backward": ["bwd_dkdv", "bwd_dq", "hopper_backward", "flash_bwd", "fmha_cutlassB"],
    "attention, bias gradients": ["bias_gradient", "band_gradient", "diagonal_sum", "position_gradient"],
    "projection": ["projection_"],
    "norms and gate": ["norm_gate_", "layer_norm", "LayerNorm", "GammaBeta"],
    "loss": [
        "softmax_",
        "cross_entropy_",
        "SoftMax",
        "nll_loss",
        "radixSort",
        "RadixSort",
        "DeviceScan",
        "DeviceRadix",
    ],
    "matrix products": ["gemm", "cutlass", "nvjet", "cublas"],
    "item vectors": ["embedding", "indexSelect", "index_elementwise", "krn_partial", "sum_and_scatter", "rowwise_"],
    "optimiser": ["multi_tensor", "FusedAdam", "fused_adam"],
    "random numbers": ["distribution", "random"],
}
_SHAPE = ("blocks", "dim", "heads", "dqk", "dv")
_KERNELS, _NAME = 25, 100  # the longest, by as many letters of their names
_OWN = (
    "projection_",
    "norm_gate_",
    "layer_norm_",
    "softmax_",
    "cross_entropy_",
)  # whose forward kernels are not attention's


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The roofs, a single step of every run with `items`, and every run that is to be trained whole."""
    found: list[dict[str, Any]] = [{"kind": ROOFS}]
    for group in plan["runs"]:
        for config in group["configs"]:
            kind = {"kind": "training"} if group.get("whole") else {"kind": "step", "items": group["items"]}
            found.append({**kind, "model": config["row"], "config": config})
    return found


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: the roofs; a step's time, memory, parts and longest kernels; or what a whole training took."""
    if case["kind"] == ROOFS:
        return roofs(case, plan["device"], plan["settings"]["ceilings"])
    if case["kind"] == "training":
        return measure_training(case["config"], torch.device(plan["device"]), data)
    settings = plan["settings"]
    return measure_steps(case["config"], case["items"], settings["steps"], settings["profiled"], plan["device"])


def part_of(kernel: str) -> str:
    """The part of the step that a kernel belongs to."""
    for part, words in PARTS.items():
        own = any(word in kernel for word in _OWN)
        if any(word in kernel for word in words) and not (own and part.startswith("attention")):
            return part
    return "element-wise and other"


def full_sequences(items: int, users: int, max_len: int, device: torch.device) -> Sequences:
    """Users with just so many interactions that every training window is full; a minute to a month apart."""
    generator = torch.Generator().manual_seed(0)
    length = max_len + 3  # two may be held out
    item = torch.randint(1, items + 1, (users * length,), generator=generator)
    gaps = 60 * torch.exp(2 * torch.randn(users, length, generator=generator, dtype=torch.float64))
    timestamp = gaps.long().cumsum(1).flatten() + 10**9
    offsets = torch.arange(0, users * length + 1, length)
    return Sequences(offsets.to(device), item.to(device), timestamp.to(device), items)


def least(config: dict[str, Any], items: int) -> dict[str, float]:
    """Floating-point operations and bytes that an HSTU step with full windows cannot do without.

    Operations: every product forward, twice backward; attention at half, 2.5 times backward. Bytes: AdamW reads
    weight, gradient and two moments, and writes all but the gradient; a rowwise table's are not counted. In every layer
    U, V, Q and K, in bf16, are written once and read twice forward, and read twice backward, where their gradients are
    written once and read twice; attention's result and its gradient pass four times, the float32 residual six.
    """
    model, training = config["model"], config["training"]
    heads, dqk, dv, dim, blocks = (model[name] for name in ("heads", "dqk", "dv", "dim", "blocks"))
    tokens, n = training["batch"] * training["max_len"], training["max_len"]
    mixed, inner = heads * 2 * (dqk + dv), heads * dv
    attention = 2 * heads * (dqk + dv) * training["batch"] * n * n / 2
    layer = 3 * 2 * tokens * dim * (mixed + inner) + 3.5 * attention
    loss = 3 * 2 * tokens * (training["negatives"] + 1) * dim
    parameters = blocks * dim * (mixed + inner) + (0 if "items" in model else (items + 1) * dim)
    traffic = blocks * tokens * (2 * (8 * mixed + 4 * inner) + 4 * 6 * dim)
    return {"flops": blocks * layer + loss, "bytes": traffic + 7 * 4 * parameters}


def time_steps(training: Training, count: int, profiled: int) -> tuple[list[float], dict[str, float]]:
    """Milliseconds of `count` steps; and milliseconds of a step by kernel, means over `profiled`, none on a CPU.

    On CUDA from one event to the next, as steps are queued; on a CPU from one return to the next.
    """
    step = training.schedule.steps(torch.arange(training.settings.batch))[0]
    at_once = len(training.schedule.micro_steps(step.inputs))
    on_cuda = training.device.type == "cuda"
    with training.stream.active():
        training.model.train()
        for seed in range(3):
            training.execution(step, seed)
        if not on_cuda:
            clock = [time.perf_counter()]
            for seed in range(count):
                training.execution(step, seed)
                clock.append(time.perf_counter())
            return [1000 * (after - before) / at_once for before, after in itertools.pairwise(clock)], {}
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for seed, event in enumerate(events[1:]):
            training.execution(step, seed)
            event.record()
        torch.cuda.synchronize()
        times = [before.elapsed_time(after) / at_once for before, after in itertools.pairwise(events)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for seed in range(profiled):
                training.execution(step, seed)
            torch.cuda.synchronize()
    of_all = {event.key: event.self_device_time_total / 1000 for event in profile.key_averages()}
    kernels = {name: ms / profiled / at_once for name, ms in of_all.items()}
    return times, {name: ms for name, ms in sorted(kernels.items(), key=lambda kernel: -kernel[1]) if ms}


def by_part(kernels: dict[str, float]) -> dict[str, float]:
    """Milliseconds of a step by part, the longest first."""
    parts: dict[str, float] = {}
    for kernel, ms in kernels.items():
        parts[part_of(kernel)] = parts.get(part_of(kernel), 0.0) + ms
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def longest(kernels: dict[str, float]) -> dict[str, float]:
    """Milliseconds of the kernels that take most; those whose names begin alike, as templates' do, are one."""
    found: dict[str, float] = {}
    for kernel, ms in kernels.items():
        found[kernel[:_NAME]] = found.get(kernel[:_NAME], 0.0) + ms
    return dict(sorted(found.items(), key=lambda kernel: -kernel[1])[:_KERNELS])


def measure_steps(config: dict[str, Any], items: int, steps: int, profiled: int, name: str) -> list[Row]:
    """Rows of a single step: compiled and captured, captured, and launched kernel by kernel."""
    device = torch.device(name)
    on_cuda = device.type == "cuda"
    precision, compute = pick_precision("bf16", device)
    training = config["training"]
    sequences = full_sequences(items, training["batch"], training["max_len"], device)
    found = []
    modes: tuple[Mode, ...] = ("compiled", "graph", "eager") if on_cuda else ("eager",)
    for mode in modes:
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            run = Training(config, sequences, "", Path(folder), compute, mode)
            times, kernels = time_steps(run, steps, profiled)
        axes = {"kind": "step", "model": config["row"]} | {size: config["model"][size] for size in _SHAPE}
        axes |= {"max_len": training["max_len"], "items": items, "negatives": training["negatives"]}
        axes |= {"batch": training["batch"], "captured": run.execution.capture}
        axes |= {"compiled": run.execution.compiled, "precision": precision}
        found.append(row(axes, "step", round(statistics.median(times), 4), "ms"))
        if on_cuda:
            found.append(row(axes, "peak", torch.cuda.max_memory_allocated(), "B"))
        if config["model"]["model"] == "hstu":
            bounds = least(config, items)
            found += [
                row(axes, "least operations", bounds["flops"], "FLOP"),
                row(axes, "least bytes", bounds["bytes"], "B"),
            ]
        found += [row(axes, PART + part, round(ms, 4), "ms") for part, ms in by_part(kernels).items()]
        found += [row(axes, KERNEL + kernel, round(ms, 4), "ms") for kernel, ms in longest(kernels).items()]
        del run
        gc.collect()  # compiled models are cycles, whose memory would count as the next one's
    return found


def measure_training(config: dict[str, Any], device: torch.device, data: Path) -> list[Row]:
    """Rows of a whole training, alone on the device: seconds without its own evaluations, epochs, and memory."""
    sequences, digest = load_sequences(data / "processed" / config["dataset"], device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        training = Training(config, sequences, digest, Path(folder), pick_precision("bf16", device)[1])
        for _, failure in train_together([training]):
            if failure is not None:
                raise failure
    axes = {"kind": "training", "experiment": config["experiment"], "data": config["dataset"]}
    axes |= {"protocol": config["protocol"]["name"], "models": config["row"], "runs_at_once": 1}
    seconds = round(sum(line["train/seconds"] for line in training.history), 3)
    found = [row(axes, "longest", seconds, "s", data_sha256=digest)]
    found.append(
        row(axes, "epochs", training.done, "epochs", low=training.done, high=training.done, data_sha256=digest)
    )
    if device.type == "cuda":
        peak = max(line["train/peak_bytes"] for line in training.history)
        found.append(row(axes, "peak", peak, "B", data_sha256=digest))
    return found

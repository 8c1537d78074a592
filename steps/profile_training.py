"""Where the time of a training step goes, and how far it is from what the GPU could do.

Trains the run of a `config.json` on users whose windows are all full, which is the longest a step can take: as CUDA
graphs of the kernels that torch.compile makes, as CUDA graphs without it, and launched one kernel at a time. Adds rows
to a list like `reports/speed/train.json`, in place of older ones of the same case; `--set model.dim=256` and the like
make other shapes. Needs a CUDA GPU, torch, numpy and safetensors alone.
"""

import argparse
import gc
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError, run_step
from steps.common.device import compute_type, device_name
from steps.common.dotted import set_entry
from steps.common.files import read_json, write_json
from steps.common.provenance import commit
from steps.data.sequences import Sequences
from steps.training.loop import Training

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
    "attention, backward": ["bwd_dkdv", "bwd_dq", "flash_bwd", "fmha_cutlassB"],
    "attention, bias gradients": ["bias_gradient", "band_gradient", "diagonal_sum"],
    "projection": ["projection_"],
    "norms and gate": ["norm_gate_", "layer_norm", "LayerNorm", "GammaBeta"],
    "loss": ["softmax_", "SoftMax", "nll_loss", "radixSort", "RadixSort", "DeviceScan", "DeviceRadix"],
    "matrix products": ["gemm", "cutlass", "nvjet", "cublas"],
    "item vectors": ["embedding", "indexSelect", "index_elementwise", "krn_partial", "sum_and_scatter"],
    "optimiser": ["multi_tensor", "FusedAdam", "fused_adam"],
    "random numbers": ["distribution", "random"],
}
_SHAPE = ("blocks", "dim", "heads", "dqk", "dv")
_KERNELS, _NAME = 25, 100  # the longest, by as many letters of their names
_OWN = ("projection_", "norm_gate_", "layer_norm_", "softmax_")  # whose forward kernels are not attention's


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


def time_steps(training: Training, count: int) -> tuple[list[float], dict[str, float]]:
    """Milliseconds of `count` steps, each from one event to the next; and milliseconds of a step by kernel."""
    batch, max_len = training.config["training"]["batch"], training.config["training"]["max_len"]
    static, order = training.static, torch.arange(batch)
    if static is None:
        raise TypeError("steps are static on CUDA")
    lengths = torch.full((batch,), max_len)
    layout, given = training.model.static_steps(lengths, order, max_len, batch, 256)[0]
    at_once = len(training.model.parts(layout, given))
    with training.place.entered():
        training.model.train()
        for seed in range(3):
            static(layout, given, seed)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for seed, event in enumerate(events[1:]):
            static(layout, given, seed)
            event.record()
        torch.cuda.synchronize()
        times = [before.elapsed_time(after) / at_once for before, after in itertools.pairwise(events)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for seed in range(5):
                static(layout, given, seed)
            torch.cuda.synchronize()
    kernels = {event.key: event.self_device_time_total / 5000 / at_once for event in profile.key_averages()}
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


def measure(config: dict[str, Any], items: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of one config: compiled and captured, captured, and launched kernel by kernel."""
    device = torch.device("cuda")
    precision, compute = compute_type("bf16", device)
    training = config["training"]
    sequences = full_sequences(items, training["batch"], training["max_len"], device)
    rows = []
    for captured, compiled in ((True, True), (True, False), (False, False)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run = Training(config, sequences, "", folder, compute, static=True, capture=captured, compiled=compiled)
        times, kernels = time_steps(run, steps)
        rows.append(
            {
                "model": config["row"],
                "shape": {name: config["model"][name] for name in _SHAPE}
                | {"max_len": training["max_len"], "items": items, "negatives": training["negatives"]},
                "batch": training["batch"],
                "captured": run.static is not None and run.static.capture,
                "compiled": run.static is not None and run.static.compiled,
                "step_ms": round(statistics.median(times), 4),
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "parts_ms": {part: round(ms, 4) for part, ms in by_part(kernels).items()},
                "kernels_ms": {name: round(ms, 4) for name, ms in longest(kernels).items()},
                "least": least(config, items) if config["model"]["model"] == "hstu" else None,
                "precision": precision,
                "device": device_name(device),
                "commit": commit(),
            }
        )
        del run
        gc.collect()  # compiled models are cycles, whose memory would count as the next one's
    return rows


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old rows but those measured again, then the new."""

    def case(row: dict[str, Any]) -> list[Any]:
        return [row[name] for name in ("model", "shape", "batch", "captured", "compiled", "precision", "device")]

    return [row for row in old if case(row) not in [case(other) for other in new]] + new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="a run's config.json, which plan writes")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="dotted keys of the config to change")
    parser.add_argument("--items", required=True, type=int, help="items of the catalogue")
    parser.add_argument("--steps", type=int, default=30, help="steps to time")
    parser.add_argument("--output", required=True, type=Path, help="json of rows to write, or to add to")


def main(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise StepError("no CUDA device: a step is profiled where it trains fast")
    torch.backends.cuda.matmul.allow_tf32 = True
    config = read_json(args.config)
    for setting in args.set:
        key, _, value = setting.partition("=")
        try:
            set_entry(config, key, json.loads(value))
        except KeyError:
            raise StepError(f"--set {setting}: {args.config} has no key {key}") from None
    rows = measure(config, args.items, args.steps, args.output.parent)
    write_json(args.output, merged(read_json(args.output, list) if args.output.exists() else [], rows))
    for row in rows:
        how = f"captured {row['captured']}, compiled {row['compiled']}"
        print(f"{row['model']}, {how}: {row['step_ms']} ms, {row['peak_bytes'] / 2**20:.0f} MiB")
        for part, ms in row["parts_ms"].items():
            print(f"  {part}: {ms:.3f} ms")


if __name__ == "__main__":
    run_step("profile_training", __doc__, add_arguments, main)

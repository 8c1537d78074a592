"""Choose the attention kernels' launch parameters on the GPU at hand, and write them into the table.

    python -m kernels.tools.tune --log tuning.json [--dims 64 32] [--lengths short]

Every shape class is timed on one representative shape, each kernel by itself, as replays of a CUDA graph.
Candidates compile side by side in worker processes first; one that does not compile, or does not fit, drops out.
"""

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.testing

from ..common import TABLE, write_table
from ..hstu_attention import launch
from ..hstu_attention.inputs import Inputs, shape_class
from ..hstu_attention.prepare import BiasTables
from .cases import attention_inputs, lengths_of

KERNELS = ("forward", "bwd_dkdv", "bwd_dq", "bias_gradient")
NAMES = ("block_m", "block_n", "num_warps", "num_stages", "descriptor", "maxnreg", "add_dq")
Config = dict[str, int]


def candidates(kernel: str, dim: int, length: str, biased: bool) -> Iterator[Config]:
    """Launch parameters worth trying: (queries, keys, warps, stages, register limit)."""
    match kernel:
        case "forward" if dim <= 64:
            sizes = [(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2)]
        case "forward":
            sizes = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2)]
        case "bwd_dkdv" if dim <= 64:
            sizes = [(128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 2), (64, 32, 4, 2)]
        case "bwd_dkdv":
            sizes = [(64, 64, 8, 2), (32, 64, 4, 2), (64, 128, 8, 2), (32, 32, 4, 2), (32, 64, 8, 2)]
        case "bwd_dq" if dim <= 64:
            sizes = [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
        case "bwd_dq":
            sizes = [(64, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
        case _:
            sizes = [(64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
            sizes += [(64, 64, 4, 3), (128, 64, 8, 3)] if dim <= 64 else []
    descriptors = [int(torch.cuda.get_device_capability()[0] >= 9)]
    if length == "short" and dim <= 32:  # small tiles gain least from descriptors, and every row has a last tile to cut
        descriptors = sorted({0, *descriptors})
    for (m, n, warps, stages), descriptor in itertools.product(sizes, descriptors):
        if length == "short" and max(m, n) == 128:
            continue
        limits = (0, 128, 168) if biased and (m, n, warps) == (64, 64, 4) and kernel != "bias_gradient" else (0,)
        for limit in limits:
            config = {"block_m": m, "block_n": n, "num_warps": warps, "num_stages": stages, "descriptor": descriptor}
            config |= {"maxnreg": limit} if limit else {}
            if kernel == "bwd_dkdv":
                yield config | {"add_dq": 1}
                yield config | {"add_dq": 0}
            else:
                yield config


class Call(NamedTuple):
    """A call of the class's representative shape."""

    inputs: Inputs
    bias: BiasTables
    gradient: launch.Gradient


def make_call(dim: int, dtype: torch.dtype, length: str, biased: bool, small: bool) -> Call:
    """MovieLens' shape for short sequences, 16 of 2,048 tokens for long ones."""
    torch.manual_seed(0)
    batch, longest = (128, 211) if length == "short" else (16, 2048)
    lengths = lengths_of(2 if small else batch, longest, length == "short" and not small, "cuda")
    heads = max(1, min(8, 256 // dim))
    inputs = Inputs(**attention_inputs(lengths, heads, dim, dim, dtype, "both" if biased else "none"))
    grad = torch.randn_like(inputs.v)
    return Call(inputs, BiasTables(inputs), launch.Gradient(grad, grad.new_empty(0, dtype=torch.float32), None))


def run(call: Call, kernel: str, config: Config) -> None:
    """Launch one kernel as the operation would."""
    inputs, bias, gradient = call
    match kernel:
        case "forward":
            launch.forward(inputs, bias, config)
        case "bwd_dkdv":
            dq = torch.zeros(inputs.q.shape, device="cuda") if config["add_dq"] else None
            launch.backward_kv(inputs, bias, config, gradient, dq)
            if dq is not None:
                dq.to(inputs.q.dtype)
        case "bwd_dq":
            launch.backward_q(inputs, bias, config, gradient)
        case "bias_gradient":
            launch.backward_bias(inputs, bias, config, gradient, (None, None), deterministic=False)


def compiles(job: tuple[str, int, torch.dtype, str, bool, Config]) -> str:
    """Compile a candidate into Triton's cache; the reason where it does not work."""
    kernel, dim, dtype, length, biased, config = job
    call = make_call(dim, dtype, length, biased, small=True)
    try:
        run(call, kernel, config)
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler says, the candidate is out
        return f"{type(error).__name__}: {str(error)[:120]}"
    return ""


def measure(job: tuple[str, int, torch.dtype, str, bool, Config], call: Call) -> dict[str, Any]:
    """A row of the log: the candidate, its class and its time."""
    kernel, dim, dtype, length, biased, config = job
    milliseconds = triton.testing.do_bench_cudagraph(lambda: run(call, kernel, config), rep=6)
    row = {"kernel": kernel, "dim": dim, "dtype": str(dtype), "length": length, "biased": biased}
    inputs = call.inputs
    return row | config | {"class": shape_class(inputs.q, inputs.v, inputs.max_len, inputs.biased), "ms": milliseconds}


def best(log: list[dict[str, Any]]) -> dict[str, dict[str, Config]]:
    """The fastest candidate of every kernel and class."""
    chosen: dict[str, dict[str, Config]] = {}
    for name in {row["class"] for row in log}:
        rows = [row for row in log if row["class"] == name]

        def fastest(kernel: str, add_dq: int | None = None, rows: list[dict[str, Any]] = rows) -> dict[str, Any]:
            those = (row for row in rows if row["kernel"] == kernel and (add_dq is None or row["add_dq"] == add_dq))
            return min(those, key=lambda row: row["ms"])

        for kernel in {row["kernel"] for row in rows}:
            row = fastest(kernel)
            if kernel == "bwd_dkdv":  # adding dq on the way has to beat a pass without it and the kernel for dq
                alone = fastest(kernel, 0)["ms"] + fastest("bwd_dq")["ms"]
                row = fastest(kernel, int(fastest(kernel, 1)["ms"] <= alone))
            chosen.setdefault(f"hstu_attention.{kernel}", {})[name] = {key: row[key] for key in NAMES if key in row}
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 32, 16, 128, 256])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"])
    parser.add_argument("--lengths", nargs="*", default=["short", "long"], choices=["short", "long"])
    parser.add_argument("--log", type=Path, required=True, help="every timing, as json")
    parser.add_argument("--table", type=Path, default=TABLE, help="configuration table to update")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
    log: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, _quiet) as pool:
        for dim, dtype in itertools.product(args.dims, args.dtypes):
            jobs = [
                (kernel, dim, getattr(torch, dtype), length, biased, config)
                for length in args.lengths
                for biased in (False, True)
                for kernel in KERNELS
                if biased or kernel != "bias_gradient"
                for config in candidates(kernel, dim, length, biased)
            ]
            reasons = list(pool.map(compiles, jobs))
            calls: dict[tuple[Any, ...], Call] = {}
            for job, reason in zip(jobs, reasons, strict=True):
                if reason:
                    print("left out:", job, reason, flush=True)
                    continue
                if job[1:5] not in calls:
                    calls.clear()
                    calls[job[1:5]] = make_call(*job[1:5], small=False)
                log.append(measure(job, calls[job[1:5]]))
            # After every dimension, so that an interrupted run leaves what it has.
            args.log.write_text(json.dumps(log))
            write_table(args.table, capability, best(log))
            print(f"{dim} {dtype}: {len(jobs)} candidates, {reasons.count('')} of them timed", flush=True)


def _quiet() -> None:
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()

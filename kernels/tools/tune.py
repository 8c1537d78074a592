"""Choose the attention kernels' launch parameters on the GPU at hand, and write them into the table.

    python -m kernels.tools.tune --log tuning.json

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
from typing import Any

import torch
import triton
import triton.testing

from ..common import TABLE, write_table
from ..hstu_attention.triton_op import _Launch, shape_class
from .cases import attention_inputs, lengths_of

KERNELS = ("forward", "key_gradient", "query_gradient", "bias_gradient")
NAMES = ("block_m", "block_n", "num_warps", "num_stages", "descriptor", "maxnreg", "add_dq")
Config = dict[str, int]


def candidates(kernel: str, dim: int, length: str, biased: bool) -> Iterator[Config]:
    """Launch parameters worth trying: (queries, keys, warps, stages, register limit)."""
    match kernel:
        case "forward" if dim <= 64:
            sizes = [(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2)]
        case "forward":
            sizes = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2)]
        case "key_gradient" if dim <= 64:
            sizes = [(128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 2), (64, 32, 4, 2)]
        case "key_gradient":
            sizes = [(64, 64, 8, 2), (32, 64, 4, 2), (64, 128, 8, 2), (32, 32, 4, 2), (32, 64, 8, 2)]
        case "query_gradient" if dim <= 64:
            sizes = [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
        case "query_gradient":
            sizes = [(64, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
        case _:
            sizes = [(64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)]
            sizes += [(64, 64, 4, 3), (128, 64, 8, 3)] if dim <= 64 else []
    descriptor = int(torch.cuda.get_device_capability()[0] >= 9)
    for m, n, warps, stages in sizes:
        if length == "short" and max(m, n) == 128:
            continue
        limits = (0, 128, 168) if biased and (m, n, warps) == (64, 64, 4) and kernel != "bias_gradient" else (0,)
        for limit in limits:
            config = {"block_m": m, "block_n": n, "num_warps": warps, "num_stages": stages, "descriptor": descriptor}
            config |= {"maxnreg": limit} if limit else {}
            if kernel == "key_gradient":
                yield config | {"add_dq": 1}
                yield config | {"add_dq": 0}
            else:
                yield config


def make_launch(dim: int, dtype: torch.dtype, length: str, biased: bool, small: bool) -> _Launch:
    """A launch of the class's representative shape: MovieLens' for short rows, 16 rows of 2,048 for long ones."""
    torch.manual_seed(0)
    rows, longest = (128, 211) if length == "short" else (16, 2048)
    lengths = lengths_of(2 if small else rows, longest, length == "short" and not small, "cuda")
    heads = max(1, min(8, 256 // dim))
    launch = _Launch(**attention_inputs(lengths, heads, dim, dim, dtype, "both" if biased else "none"))
    launch.grad = torch.randn_like(launch.v)  # type: ignore[attr-defined]
    return launch


def run(launch: _Launch, kernel: str, config: Config) -> None:
    """Launch one kernel as the operation would."""
    grad = launch.grad  # type: ignore[attr-defined]
    log_mass = grad.new_empty(0, dtype=torch.float32)
    match kernel:
        case "forward":
            launch.forward(config)
        case "key_gradient":
            dq = torch.zeros(launch.q.shape, device="cuda") if config["add_dq"] else None
            launch.key_gradient(config, grad, log_mass, None, dq)
            if dq is not None:
                dq.to(launch.q.dtype)
        case "query_gradient":
            launch.query_gradient(config, grad, log_mass, None)
        case "bias_gradient":
            launch.bias_gradient(config, False, grad, log_mass, None, None, None)


def compiles(job: tuple[str, int, torch.dtype, str, bool, Config]) -> str:
    """Compile a candidate into Triton's cache; the reason where it does not work."""
    kernel, dim, dtype, length, biased, config = job
    launch = make_launch(dim, dtype, length, biased, small=True)
    try:
        run(launch, kernel, config)
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler says, the candidate is out
        return f"{type(error).__name__}: {str(error)[:120]}"
    return ""


def measure(job: tuple[str, int, torch.dtype, str, bool, Config], launch: _Launch) -> dict[str, Any]:
    """A row of the log: the candidate, its class and its time."""
    kernel, dim, dtype, length, biased, config = job
    milliseconds = triton.testing.do_bench_cudagraph(lambda: run(launch, kernel, config), rep=6)
    row = {"kernel": kernel, "dim": dim, "dtype": str(dtype), "length": length, "biased": biased}
    return row | config | {"class": shape_class(launch.q, launch.v, launch.max_len, launch.biased), "ms": milliseconds}


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
            if kernel == "key_gradient":  # adding dq on the way has to beat a pass without it and the kernel for dq
                alone = fastest(kernel, 0)["ms"] + fastest("query_gradient")["ms"]
                row = fastest(kernel, int(fastest(kernel, 1)["ms"] <= alone))
            chosen.setdefault(f"hstu_attention.{kernel}", {})[name] = {key: row[key] for key in NAMES if key in row}
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 32, 16, 128, 256])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"])
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
                for length in ("short", "long")
                for biased in (False, True)
                for kernel in KERNELS
                if biased or kernel != "bias_gradient"
                for config in candidates(kernel, dim, length, biased)
            ]
            reasons = list(pool.map(compiles, jobs))
            launches: dict[tuple[Any, ...], _Launch] = {}
            for job, reason in zip(jobs, reasons, strict=True):
                if reason:
                    print("left out:", job, reason, flush=True)
                    continue
                if job[1:5] not in launches:
                    launches.clear()
                    launches[job[1:5]] = make_launch(*job[1:5], small=False)
                log.append(measure(job, launches[job[1:5]]))
            # After every dimension, so that an interrupted run leaves what it has.
            args.log.write_text(json.dumps(log))
            write_table(args.table, capability, best(log))
            print(f"{dim} {dtype}: {len(jobs)} candidates, {reasons.count('')} of them timed", flush=True)


def _quiet() -> None:
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()

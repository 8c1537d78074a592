"""All Triton kernels, with the table's launch parameters, compile for GPUs that nobody here has, and fit them."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from ahead_of_time import CASES

ROOT = Path(__file__).resolve().parents[2]
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: A few spilled registers cost less than smaller tiles would.
STACK = 1024
TENSOR_MEMORY = 512
PROCESSES = 2
#: What is compiled for the GPUs that nothing is tuned for; the others get all cases.
REPRESENTATIVE = [
    "attention d 64",
    "attention d 64, masks",
    "attention d 25, short",
    "attention d 50, short, fp32",
    "attention d 256",
    "sampled softmax d 50, fp32",
    "norm gate D 256",
    "projection d 50, fp32",
    "projection d 256",
]


def ahead_of_time(*arguments: object) -> list[dict[str, Any]]:
    """The lines of the script, in a process of its own: kernels of this one may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("ahead_of_time.py")), *map(str, arguments)]
    result = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, check=False)
    # Where the compiler ended the process, the kernel at work is on stderr.
    assert result.returncode == 0, f"{arguments} ended with {result.returncode}:\n{result.stderr[-3000:]}"
    return [json.loads(line) for line in result.stdout.splitlines()]


def compiled(capability: int, cases: list[str]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(PROCESSES) as pool:
        shares = [cases[place::PROCESSES] for place in range(PROCESSES)]
        return [line for lines in pool.map(lambda share: ahead_of_time(capability, *share), shares) for line in lines]


def problems(line: dict[str, Any], capability: int) -> str:
    if "error" in line:
        return line["error"]
    limits = {"shared": SHARED[capability], "stack": STACK, "tensor_memory": TENSOR_MEMORY}
    return ", ".join(f"{name} {line[name]} > {limit}" for name, limit in limits.items() if line[name] > limit)


@pytest.mark.parametrize("capability", SHARED, ids="sm_{}".format)
def test_kernels_compile_and_fit(capability: int) -> None:
    cases = list(CASES) if capability == 90 else REPRESENTATIVE
    lines = compiled(capability, cases)
    assert {line["case"] for line in lines} == set(cases)
    wrong = [(line["case"], line["kernel"], problems(line, capability)) for line in lines]
    wrong = [(case, kernel, found) for case, kernel, found in wrong if found]
    assert not wrong, "\n".join(f"{case}: {kernel}: {found}" for case, kernel, found in wrong)


def test_sequence_lengths_do_not_trigger_recompilation() -> None:
    """Tokens, rows and the longest length change from batch to batch; the keys of the compiled kernels must not."""
    first: dict[tuple[str, int], dict[str, Any]] = {}
    sizes: dict[str, set[tuple[int, ...]]] = {}
    for line in ahead_of_time(90, "--keys"):
        one = first.setdefault((line["case"], line["launch"]), line)
        sizes.setdefault(line["case"], set()).add(tuple(line["lengths"]))
        where = f"{line['case']}: {line['kernel']}: lengths {one['lengths']}, {line['lengths']}"
        assert line["kernel"] == one["kernel"], where
        changed = {name: (one["key"][name], value) for name, value in line["key"].items() if one["key"][name] != value}
        assert not changed, f"{where}: {changed}"
    assert all(len(lengths) > 1 for lengths in sizes.values())
    kernels = {line["kernel"].split(".")[-1] for line in first.values()}
    assert {"forward_kernel", "key_gradient_kernel"} <= kernels

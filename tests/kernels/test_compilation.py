"""All Triton kernels, with the table's launch parameters, compile for GPUs that nobody here has, and fit them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from ahead_of_time import CASES

ROOT = Path(__file__).resolve().parents[2]
# What a block may take: bytes of shared memory, bytes of a thread's stack, columns of tensor memory.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_OF_OTHERS = 99 * 1024  # sm_86, sm_89 and sm_120, which are given no wide float32 heads
STACK = 1024  # a few spilled registers cost less than smaller tiles would
TENSOR_MEMORY = 512
# What is compiled for the GPUs that nothing is tuned for; Hopper gets all cases.
REPRESENTATIVE = [
    "attention d 64",
    "attention d 256",
    "attention d 256, fp32",
    "attention d 256, fp32, deterministic",
    "sampled softmax d 50, fp32",
    "linear cross-entropy d 50, fp32",
    "linear cross-entropy d 256, fp32",
    "attention d 64, all masks",
    "attention d 64, both ways",
    "attention d 64, keys",
    "attention d 25, short",
    "attention d 73 and 8",
    "cached attention d 64",
    "appended attention d 64",
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


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[int, list[Future[list[dict[str, Any]]]]]]:
    """Lines of the script for every GPU, from a process for each two processors."""
    cases, processes = list(CASES), max(2, (os.cpu_count() or 1) // 2)
    shares = {90: [cases[one::processes] for one in range(processes)], 100: [REPRESENTATIVE], 80: [REPRESENTATIVE]}
    with ThreadPoolExecutor(processes) as pool:
        yield {
            capability: [pool.submit(ahead_of_time, capability, *share) for share in of_gpu]
            for capability, of_gpu in shares.items()
        }


def problems(line: dict[str, Any], capability: int) -> str:
    if "error" in line:
        return line["error"]
    anywhere = capability == 80 and not line["case"].startswith("attention d 256, fp32")
    limits = {
        "shared": SHARED_OF_OTHERS if anywhere else SHARED[capability],
        "stack": STACK,
        "tensor_memory": TENSOR_MEMORY,
        "unset": 0,
    }
    return ", ".join(f"{name} {line[name]} > {limit}" for name, limit in limits.items() if line[name] > limit)


@pytest.mark.parametrize("capability", [90, 100, 80], ids="sm_{}".format)
def test_kernels_compile_and_fit(capability: int, compiled: dict[int, list[Future[list[dict[str, Any]]]]]) -> None:
    lines = [line for share in compiled[capability] for line in share.result()]
    assert {line["case"] for line in lines} == set(CASES if capability == 90 else REPRESENTATIVE)
    wrong = [(line["case"], line["kernel"], problems(line, capability)) for line in lines]
    wrong = [(case, kernel, found) for case, kernel, found in wrong if found]
    assert not wrong, "\n".join(f"{case}: {kernel}: {found}" for case, kernel, found in wrong)


@pytest.fixture(scope="module")
def keys() -> list[dict[str, Any]]:
    return ahead_of_time(90, "--keys")


def test_every_kernel_has_a_case(keys: list[dict[str, Any]]) -> None:
    folder = ROOT / "kernels"
    defined = {
        ".".join([*path.relative_to(folder).with_suffix("").parts, name])
        for path in folder.rglob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert defined == {line["kernel"] for line in keys}


def test_sequence_lengths_do_not_trigger_recompilation(keys: list[dict[str, Any]]) -> None:
    """Tokens, rows and the longest length change from batch to batch; the keys of the compiled kernels must not."""
    first: dict[tuple[str, int], dict[str, Any]] = {}
    for line in keys:
        one = first.setdefault((line["case"], line["launch"]), line)
        where = f"{line['case']}: {line['kernel']}: lengths {one['lengths']}, {line['lengths']}"
        assert line["kernel"] == one["kernel"], where
        changed = {name: (one["key"][name], value) for name, value in line["key"].items() if one["key"][name] != value}
        assert not changed, f"{where}: {changed}"
    assert len(keys) == 3 * len(first)  # that many lengths

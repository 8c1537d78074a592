#!/usr/bin/env bash
# triton 3.7.1: the interpreter runs kernels that the compiler refuses, where a value changes its type on the way.
#
# In one kernel a variable is int64 before a loop and int32 after its first turn; in the other a helper returns blocks of
# two shapes, and a value decides which. With TRITON_INTERPRET=1 both give the right numbers. Compiled (for sm_90; no GPU
# is needed) both are refused. So tests that run interpreted do not show that a kernel compiles.
#
# Seen: interpreted [10] and [4.0, 4.0]; compiled: CompilationError, CompilationError
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat >kernels.py <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def changing(output, count):
    place = tl.load(output)  # int64
    for _ in range(count):
        place = place.to(tl.int32) + 5
    tl.store(output, place)


@triton.jit
def halved(x):
    if tl.sum(x) > 0:
        return tl.sum(tl.reshape(x, [2, 4]), 1)
    return x


@triton.jit
def returning(source, output):
    place = tl.arange(0, 8)
    sums = halved(tl.load(source + place))
    tl.store(output + tl.arange(0, 2), sums)
PYTHON
TRITON_INTERPRET=1 python - <<'PYTHON'
import torch
from kernels import changing, returning

place = torch.zeros(1, dtype=torch.int64)
changing[(1,)](place, 2)
sums = torch.zeros(2)
returning[(1,)](torch.ones(8), sums)
print("interpreted", place.tolist(), "and", sums.tolist())
assert place.tolist() == [10] and sums.tolist() == [4.0, 4.0]
PYTHON
python - <<'PYTHON'
import triton
from kernels import changing, returning
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled(kernel: object, **signature: str) -> str:
    try:
        triton.compile(ASTSource(kernel, signature), target=GPUTarget("cuda", 90, 32))
    except Exception as error:
        return type(error).__name__
    return "compiled"


found = [
    compiled(changing, output="*i64", count="i32"),
    compiled(returning, source="*fp32", output="*fp32"),
]
print("compiled:", ", ".join(found))
assert found == ["CompilationError", "CompilationError"], "changed: the compiler takes a kernel"
PYTHON

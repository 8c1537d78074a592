#!/usr/bin/env bash
# triton 3.6.0: a jitted function cannot return a tuple that holds None; 3.7.1 can.
#
# None in a named tuple that the kernel itself builds, or that it is called with, compiles in both. When a helper with
# @triton.jit returns such a tuple, 3.6.0 takes None for a value of a tensor and ends with a CompilationError; where an
# input is optional, helpers have to return something else for it, such as 0.
#
# Seen: 3.6.0: built compiles, returned cannot convert None of type <class 'NoneType'> to tensor;
#       3.7.1: built compiles, returned compiles
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment triton==3.6.0
cat > tuples.py <<'PYTHON'
import sys
import typing

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


class Pair(typing.NamedTuple):
    first: tl.tensor
    second: tl.tensor


@triton.jit
def pair_of(pointer):
    return Pair(None, pointer)


@triton.jit
def built(pointer):
    pair = Pair(None, pointer)
    tl.store(pair.second, 1.0)


@triton.jit
def returned(pointer):
    pair = pair_of(pointer)
    tl.store(pair.second, 1.0)


def outcome(kernel):
    source = triton.compiler.ASTSource(fn=kernel, signature={"pointer": "*fp32"}, constexprs={})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except triton.compiler.errors.CompilationError as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return str(error)
    return "compiles"


found = [outcome(kernel) for kernel in (built, returned)]
print(f"{triton.__version__}: built {found[0]}, returned {found[1]}")
assert found[0] == "compiles"
assert (found[1] == "compiles") == (sys.argv[1] == "works"), "changed"
PYTHON
export TRITON_CACHE_DIR=$PWD/cache
python tuples.py fails
python -m pip install --quiet --disable-pip-version-check triton==3.7.1
python tuples.py works

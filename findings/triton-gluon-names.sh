#!/usr/bin/env bash
# triton 3.6.0, 3.7.1, 3.9.0: no spelling of a Gluon kernel that copies a tile and waits for its warps compiles with all.
#
# `gl.thread_barrier` of 3.6 is `gl.barrier` from 3.7 on; the copy engine's `tma.async_copy_global_to_shared` is
# `tma.async_load` in 3.9, where the old name is still there and raises when a kernel is compiled. In none of the three do
# both spellings work. The copy engine's addition to memory (`tma.async_atomic_add`) has a name in the language in 3.9
# alone, though the compiler's builder has the operation in all three.
#
# Seen: triton 3.6.0: thread_barrier, async_copy_global_to_shared; addition: builder
#       triton 3.7.1: barrier, async_copy_global_to_shared; addition: builder
#       triton 3.9.0: barrier, async_load; addition: builder, language
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment numpy==2.4.6
cat >names.py <<'PYTHON'
import sys

import triton
from triton._C.libtriton import gluon_ir
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def thread_barrier():
    gl.thread_barrier()


@gluon.jit
def barrier():
    gl.barrier()


@gluon.jit
def async_copy_global_to_shared(descriptor):
    tile = gl.allocate_shared_memory(gl.float32, [64, 32], descriptor.layout)
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(done, count=1)
    mbarrier.expect(done, 64 * 32 * 4)
    tma.async_copy_global_to_shared(descriptor, [0, 0], done, tile)
    mbarrier.wait(done, 0)


@gluon.jit
def async_load(descriptor):
    tile = gl.allocate_shared_memory(gl.float32, [64, 32], descriptor.layout)
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(done, count=1)
    mbarrier.expect(done, 64 * 32 * 4)
    tma.async_load(descriptor, [0, 0], done, tile)
    mbarrier.wait(done, 0)


def compiles(kernel: object, signature: dict[str, str]) -> bool:
    """Whether it does; where it does not, for the name alone that the kernel is called by."""
    try:
        triton.compile(GluonASTSource(kernel, signature), target=GPUTarget("cuda", 90, 32))
    except Exception as error:
        assert f"no attribute '{kernel.__name__}'" in str(error) or f"{kernel.__name__} has been removed" in str(error)
        return False
    return True


LAYOUT = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2, transposed=False, fp4_padded=False"
names = [kernel.__name__ for kernel in (thread_barrier, barrier) if compiles(kernel, {})]
described = {"descriptor": f"tensordesc<fp32[64, 32],{LAYOUT}, cga_layout=[])>"}
names += [kernel.__name__ for kernel in (async_copy_global_to_shared, async_load) if compiles(kernel, described)]
where = ["builder"] * hasattr(gluon_ir.GluonOpBuilder, "create_async_tma_reduce")
where += ["language"] * hasattr(tma, "async_atomic_add")
found = f"{', '.join(names)}; addition: {', '.join(where)}"
print(f"triton {triton.__version__}: {found}")
assert found == sys.argv[1], "changed"
PYTHON
for release in "3.6.0|thread_barrier, async_copy_global_to_shared; addition: builder" \
    "3.7.1|barrier, async_copy_global_to_shared; addition: builder" \
    "3.9.0|barrier, async_load; addition: builder, language"; do
    python -m pip install --quiet --disable-pip-version-check "triton==${release%%|*}"
    python names.py "${release#*|}"
done

"""Gluon's names that differ between the versions of Triton, each under one name here."""
# Builtins of the language have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, attr-defined"

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

#: Waits for all warps of a partition.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
#: Copies a tile from global to shared memory.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
#: Copies a tile from shared to global memory.
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def async_add(descriptor, coordinates, source, _semantic=None):
    """Adds a tile in shared memory to global memory: the copy engine's reduction, which Gluon 3.6 and 3.7 do not name.
    `tma.store_wait` waits for it as for a store."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)

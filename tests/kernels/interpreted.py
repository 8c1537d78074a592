"""What tests need of Triton's interpreter beyond running kernels."""

import contextlib
import ctypes
import importlib
import inspect
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def _interpreter() -> Any:
    return importlib.import_module("triton.runtime.interpreter")


def _builder() -> Any:
    return _interpreter().interpreter_builder


def patch_once_a_launch() -> None:
    """From now on a launch puts the interpreter's functions into Triton's language once.

    Triton does it again at every call of a function within the kernel, which changes nothing, and takes two fifths of
    the time. A module's functions see `tl`, those of Triton's own library `tl.core`: each is done once.
    """
    interpreter = _interpreter()
    original = getattr(interpreter, "_patch_lang", None)
    if original is None or not hasattr(interpreter, "_LangPatchScope"):  # another version of Triton
        return
    languages = (interpreter.tl, interpreter.tl.core)
    done: set[tuple[bool, ...]] = set()

    class Launch(interpreter._LangPatchScope):
        def restore(self) -> None:
            done.clear()
            super().restore()

    def patch_lang(function: Any) -> Any:
        seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        which = tuple(any(value is language for value in seen) for language in languages)
        if which in done:
            return interpreter._LangPatchScope()
        scope = original(function)
        launch = Launch()
        launch._changes = scope._changes
        done.add(which)
        return launch

    interpreter._patch_lang = patch_lang


@contextlib.contextmanager
def descriptor_additions() -> Iterator[None]:
    """Within: atomic additions through a tensor descriptor, which the interpreter lacks; they end where it ends."""
    builder = _builder()

    def reduce(kind: Any, descriptor: Any, value: Any, indices: Any) -> None:
        pointers, inside = descriptor.materialize_pointers(indices)
        if not isinstance(inside, np.ndarray):  # from Triton 3.9 on
            inside = inside.data
        for pointer, number in zip(pointers.data[inside], value.data[inside], strict=True):
            place = np.ctypeslib.as_array((ctypes.c_float * 1).from_address(int(pointer)))
            place += number

    present = getattr(builder, "create_descriptor_reduce", None)
    builder.create_descriptor_reduce = reduce
    try:
        yield
    finally:
        if present is None:
            del builder.create_descriptor_reduce
        else:
            builder.create_descriptor_reduce = present


@contextlib.contextmanager
def as_program(index: tuple[int, ...], grid: tuple[int, ...]) -> Iterator[None]:
    """Within: kernels, launched with one program, take it for that one of a larger grid."""
    builder = _builder()
    index, grid = ((*given, 0, 0)[:3] for given in (index, grid))

    def place(*_: int) -> None:
        builder.grid_dim, builder.grid_idx = tuple(max(1, size) for size in grid), index

    builder.set_grid_dim = builder.set_grid_idx = place
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


def sparse(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros, of which only the pages that are written take memory."""
    size = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    return torch.frombuffer(pages, dtype=dtype).view(shape)

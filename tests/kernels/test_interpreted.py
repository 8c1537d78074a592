"""The interpreter as tests use it: faster, and with the same results."""

import importlib
import os
from typing import Any

import pytest
import torch

tl = pytest.importorskip("triton.language")
attention = pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter")


def test_a_launch_patches_the_language_once_for_all_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for modules that see `tl`, `tl.core` or both of them, however many functions the kernel calls."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):
        pytest.skip("another version of Triton")
    patched, launched = [0], [0]
    patch, launch = interpreter._patch_lang_tensor, interpreter.GridExecutor.__call__

    def counted_patch(*args: Any) -> Any:
        patched[0] += 1
        return patch(*args)

    def counted_launch(*args: Any, **named: Any) -> Any:
        launched[0] += 1
        before = tl.load
        launch(*args, **named)
        assert tl.load is before  # restored

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", counted_patch)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted_launch)
    q, k, v = torch.randn(3, 40, 1, 16)
    offsets = torch.tensor([0, 30, 40])
    nothing = (None, None, None, None, 0, 0, None)
    found = [attention.attention(q, k, v, offsets, 30, 0.25, 30.0, *nothing, False)[0] for _ in range(2)]
    assert torch.equal(*found)
    assert 0 < patched[0] <= 4 * launched[0]  # both count twice

"""What does not fit the kernels is left to torch, with a word."""

import json
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernels
from kernels import common, layer_norm, linear_cross_entropy, norm_gate, projection, sampled_softmax
from kernels import hstu_attention as attention
from kernels.common import _warn, do_without, fits_triton, tf32_allowed, triton_available
from kernels.hstu_attention import hstu_attention, runs_in_triton


def test_each_reason_is_given_once() -> None:
    _warn.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for reason in ("one", "two", "one"):
            do_without(reason)
    assert [str(warning.message) for warning in seen] == [
        f"{reason}; torch does the work, more slowly" for reason in ("one", "two")
    ]


def test_tensors_on_a_cpu_do_not_fit_and_nobody_is_warned() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fits_triton(torch.zeros(2), None)


@pytest.mark.parametrize(
    ("cuda", "dtypes", "reason"),
    [
        ((True, False), (torch.float32, torch.float32), "not all tensors are on CUDA"),
        ((False, True), (torch.float32, torch.float64), "not all tensors are on CUDA"),
        ((True, True), (torch.float32, torch.float64), "take no torch.float64"),
        ((True, True), (torch.float32, torch.float32), "Triton is not installed"),
    ],
)
def test_the_reason_given_is_the_one_that_holds(
    cuda: tuple[bool, bool], dtypes: tuple[torch.dtype, torch.dtype], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "triton_available", lambda: False)
    _warn.cache_clear()
    tensors: Any = [SimpleNamespace(is_cuda=flag, dtype=dtype) for flag, dtype in zip(cuda, dtypes, strict=True)]
    with pytest.warns(UserWarning, match=reason):
        assert not fits_triton(*tensors)


def test_triton_is_not_for_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    triton_available.cache_clear()
    try:
        assert not triton_available()
    finally:
        triton_available.cache_clear()


def test_triton_is_not_for_gpus_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(common, "_devices", lambda: [SimpleNamespace(major=9), SimpleNamespace(major=7)])
    triton_available.cache_clear()
    try:
        assert not triton_available()
    finally:
        triton_available.cache_clear()


@pytest.mark.parametrize(("dim", "kib", "fits"), [(129, 100, False), (129, 164, True), (128, 100, True)])
def test_wide_float32_heads_need_a_large_shared_memory(
    dim: int, kib: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [SimpleNamespace(shared_memory_per_multiprocessor=size * 1024) for size in (228, kib)]
    monkeypatch.setattr(common, "_devices", lambda: devices)
    monkeypatch.setattr("kernels.hstu_attention.fits_triton", lambda *_: True)
    _warn.cache_clear()
    q = torch.zeros(3, 1, dim)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert runs_in_triton(q, q, q) is fits
        assert runs_in_triton(q.half(), q.half(), q.half())
    assert ["shared memory" in str(warning.message) for warning in seen] == ([] if fits else [True])


#: Operations, each as one call on tokens (5, 16), their offsets and numbers.
OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "layer_norm": lambda x, *_: layer_norm.layer_norm(x, 1e-6),
    "linear_cross_entropy": lambda x, _, i: linear_cross_entropy.linear_cross_entropy(x, x, i, x[:, 0]),
    "norm_gate": lambda x, *_: norm_gate.norm_gate(x, x, 0.1, True),
    "projection": lambda x, *_: projection.projection(x, x.new_ones(16, 24)),
    "sampled_softmax": lambda x, _, i: sampled_softmax.sampled_softmax(x, x, i, i.flip(0)[:, None], 0.05),
    "hstu_attention": lambda x, o, _: attention.hstu_attention(*[x[:, None]] * 3, o, 5),
    "softmax_attention": lambda x, o, _: attention.softmax_attention(*[x[:, None]] * 3, o, 5),
    "cached_attention": lambda x, o, _: attention.cached_attention(*[x[:, None]] * 3, o, *[x[:, None]] * 2, o, 5, 5),
    "appended_attention": lambda x, o, _: attention.appended_attention(*[x[:, None]] * 3, o, o, 5, 5),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_on_cuda_triton_does_the_work(
    name: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not torch, which gives the same. On a CPU: of tensors that fit, as those on CUDA do."""
    pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU")  # see conftest.py
    module = attention if name.endswith("_attention") else getattr(kernels, name)

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("torch does the work")

    for twin in (module.naive, sampled_softmax.dense):
        if hasattr(twin, name):
            monkeypatch.setattr(twin, name, refuse)
    if device == "cpu":
        monkeypatch.setattr(module, "fits_triton", lambda *_: True)
    for one in (projection, linear_cross_entropy):
        monkeypatch.setattr(one, "tf32_allowed", lambda: True)  # else float32 is torch's
    numbers = torch.arange(5, device=device)
    found = OPERATIONS[name](torch.ones(5, 16, device=device, dtype=dtype), numbers.new_tensor([0, 5]), numbers)
    assert found.isfinite().all()


def test_a_launch_has_what_the_table_says_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every entry of a capability is of a class that the default has, as others are never asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    common._capability.cache_clear()
    try:
        for operation, rows in json.loads(common.TABLE.read_text()).items():
            for shape_class, own in rows.get("sm_90", {}).items():
                assert shape_class in rows["default"]
                found = common.configuration(operation, shape_class, torch.device("cuda", 0))
                assert found == rows["default"][shape_class] | own
    finally:
        common._capability.cache_clear()


@pytest.mark.parametrize("newer", [False, True], ids=["allow_tf32", "fp32_precision"])
def test_tf32_is_read_after_either_setting_and_by_compiled_code(newer: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + 1 if tf32_allowed() else x - 1, fullgraph=True, backend="eager")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed in (False, True, False):
            if newer:
                matmul.fp32_precision = "tf32" if allowed else "ieee"
            else:
                matmul.allow_tf32 = allowed
            assert tf32_allowed() == allowed
            assert compiled(torch.zeros(1)).item() == (1 if allowed else -1)
    finally:
        matmul.allow_tf32 = False  # leaves torch in the state that tests of either setting may start from
        matmul.fp32_precision = before


@pytest.mark.gpu
def test_what_does_not_fit_on_cuda_is_said_and_done_by_torch() -> None:
    _warn.cache_clear()
    q = torch.randn(5, 1, 300, device="cuda")
    offsets = torch.tensor([0, 5], device="cuda")
    with pytest.warns(UserWarning, match="at most 256 dimensions"):
        wide = hstu_attention(q, q, q, offsets, 5)
    with pytest.warns(UserWarning, match="take no torch.float64"):
        exact = hstu_attention(q.double(), q.double(), q.double(), offsets, 5)
    torch.testing.assert_close(wide.double(), exact, rtol=1e-4, atol=1e-2)

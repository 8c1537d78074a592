"""What does not fit the kernels is left to torch, with a word."""

import warnings

import pytest
import torch

from kernels.common import _warn, do_without, fits_triton
from kernels.hstu_attention import hstu_attention


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

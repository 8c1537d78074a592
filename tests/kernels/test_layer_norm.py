"""Layer norm: Triton against float64, its affine gradients, its extremes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_no_worse

from kernels.layer_norm import layer_norm, naive

triton_op = pytest.importorskip("kernels.layer_norm.triton_op", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
NAMES = ("output", "dx", "d bias table weight", "d bias table bias")


def results(function, x: torch.Tensor, affine: list[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    """The value of function and its gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *affine)]
    out = function(leaves[0], 1e-6, *(leaves[1:] or (None, None)))
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def check(tokens: int, width: int, dtype: torch.dtype, affine: bool, seed: int = 0) -> None:
    torch.manual_seed(seed)
    x, gradient = (torch.randn(tokens, width).to(DEVICE, dtype) for _ in range(2))
    parameters = [torch.randn(width).to(DEVICE, dtype) for _ in range(2 if affine else 0)]
    ours, low = (results(f, x, parameters, gradient) for f in (triton_op.layer_norm, naive.layer_norm))
    exact = results(naive.layer_norm, x.double(), [p.double() for p in parameters], gradient.double())
    assert all(tensor.dtype == dtype for tensor in ours)
    assert_no_worse(ours, low, exact, NAMES[: len(ours)])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(0, 25), (1, 50), (70, 50), (33, 256), (5, 1000)])
def test_values_and_gradients_are_as_exact_as_torch(tokens: int, width: int, affine: bool, dtype: torch.dtype) -> None:
    check(tokens, width, dtype, affine)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 90),
    width=st.integers(2, 130),
    dtype=st.sampled_from(TYPES),
    affine=st.booleans(),
    seed=st.integers(0, 999),
)
def test_other_shapes(tokens: int, width: int, dtype: torch.dtype, affine: bool, seed: int) -> None:
    check(tokens, width, dtype, affine, seed)


def test_parameters_may_be_strided() -> None:
    x, gradient = (torch.randn(9, 25, device=DEVICE) for _ in range(2))
    both = torch.randn(25, 2, device=DEVICE)
    strided = results(triton_op.layer_norm, x, [both[:, 0], both[:, 1]], gradient)
    for ours, same in zip(strided, results(triton_op.layer_norm, x, list(both.T.contiguous()), gradient), strict=True):
        assert torch.equal(ours, same)


def test_torch_knows_the_operator() -> None:
    x, weight, bias = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((6, 25), (25,), (25,)))
    torch.library.opcheck(triton_op.layer_norm, (x, 1e-6, weight, bias))
    torch.library.opcheck(triton_op.layer_norm, (x, 1e-6, None, None))


def test_on_the_cpu_it_is_torch() -> None:
    x = torch.randn(7, 25)
    assert torch.equal(layer_norm(x, 1e-8), torch.nn.functional.layer_norm(x, (25,), eps=1e-8))


def test_inputs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(T, D\)"):
        layer_norm(torch.zeros(2, 3, 4), 1e-6)
    with pytest.raises(ValueError, match="both"):
        layer_norm(torch.zeros(2, 3), 1e-6, torch.ones(3))
    for wrong in (torch.ones(2), torch.ones(1), torch.ones(1, 3)):
        with pytest.raises(ValueError, match=r"weight must be \(3,\)"):
            layer_norm(torch.zeros(2, 3), 1e-6, wrong, torch.ones(3))
        with pytest.raises(ValueError, match=r"bias must be \(3,\)"):
            layer_norm(torch.zeros(2, 3), 1e-6, torch.ones(3), wrong)

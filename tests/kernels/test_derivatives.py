"""Operations that go to Triton have first derivatives in reverse mode, and no other: these are refused, not zero."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

from kernels import hstu_attention as attention
from kernels import layer_norm, linear_cross_entropy, norm_gate, projection, sampled_softmax

pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, DIM = 6, 16
OFFSETS = torch.tensor([0, 4, 6], device=DEVICE)
TIMES = torch.arange(TOKENS, device=DEVICE) ** 3


def numbers(*shape: int) -> torch.Tensor:
    return (1.3 * torch.arange(1, 1 + math.prod(shape), device=DEVICE)).sin().view(shape)


def _attend(name: str, which: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Attention as a function of one of q, k, v and both tables, each of the size of x's beginning."""

    def call(x: torch.Tensor) -> torch.Tensor:
        tensors = [numbers(TOKENS, 1, DIM)] * 3 + [numbers(7), numbers(129)]
        shape = tensors[which].shape
        tensors[which] = x.flatten()[: shape.numel()].view(shape)
        tables = {"position_bias": tensors[3], "time_bias": tensors[4], "query_time": TIMES, "key_time": TIMES}
        if name == "cached_attention":
            stored = [numbers(TOKENS, 1, DIM)] * 2
            tables |= {"position_bias": None, "time_bias": None} if which < 3 else {"position_bias": None}
            tables |= {"query_time": TIMES[:2], "key_time": TIMES[:2]}
            return attention.cached_attention(
                *tensors[:3], OFFSETS, *stored, OFFSETS, 4, 4, cached_time=TIMES, **tables
            )
        if name == "appended_attention":
            return attention.appended_attention(*tensors[:3], OFFSETS, OFFSETS, 4, 4, **tables)
        return getattr(attention, name)(*tensors[:3], OFFSETS, 4, **tables)

    return call


def _sample(x: torch.Tensor) -> torch.Tensor:
    indices = torch.arange(TOKENS, device=DEVICE)
    return sampled_softmax.sampled_softmax(
        x[:TOKENS], numbers(8, DIM), indices, indices.flip(0)[:, None].expand(-1, 3), 0.05
    )


def _all_items(x: torch.Tensor, which: int) -> torch.Tensor:
    """Of states, items and bias, x's beginning is one."""
    tensors = [numbers(TOKENS, DIM), numbers(9, DIM), numbers(9)]
    shape = tensors[which].shape
    tensors[which] = x.flatten()[: shape.numel()].view(shape)
    return linear_cross_entropy.linear_cross_entropy(*tensors[:2], torch.arange(TOKENS, device=DEVICE), tensors[2])


OPERATIONS = {
    "layer_norm": lambda x: layer_norm.layer_norm(x, 1e-6),
    "norm_gate": lambda x: norm_gate.norm_gate(x.flip(1), x, 0.0, True),
    "projection": lambda x: projection.projection(x, numbers(DIM, 24)),
    "sampled_softmax": _sample,
    **{
        f"linear_cross_entropy, {name}": functools.partial(_all_items, which=which)
        for which, name in enumerate(("states", "items", "bias"))
    },
    **{f"hstu_attention, {name}": _attend("hstu_attention", place) for place, name in ((0, "q"), (2, "v"), (3, "p"))},
    "softmax_attention, k": _attend("softmax_attention", 1),
    "softmax_attention, w": _attend("softmax_attention", 4),
    "cached_attention, q": _attend("cached_attention", 0),
    "cached_attention, w": _attend("cached_attention", 4),
    "appended_attention, k": _attend("appended_attention", 1),
    "appended_attention, p": _attend("appended_attention", 3),
}
TRAINED = {name: call for name, call in OPERATIONS.items() if "cached" not in name and "appended" not in name}


@pytest.fixture(autouse=True)
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layer_norm, linear_cross_entropy, norm_gate, projection, sampled_softmax, attention):
        monkeypatch.setattr(module, "fits_triton", lambda *_: True)
    for module in (projection, linear_cross_entropy):
        monkeypatch.setattr(module, "_fused", lambda _: True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_is_refused(name: str) -> None:
    operation, x = OPERATIONS[name], numbers(9, DIM)
    message = rf"{name.split(',')[0]} in Triton has no forward-mode derivative.*reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(operation, (x,), (x,))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: torch.func.vmap(operation)(x[None]), (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=message):
            operation(forward_ad.make_dual(x, x))
        assert operation(x).isfinite().all()  # what has no tangent has no derivative to lose


@pytest.mark.parametrize("name", TRAINED)
def test_a_forward_mode_derivative_of_gradients_is_refused(name: str) -> None:
    x = numbers(9, DIM).requires_grad_()
    out = TRAINED[name](x)
    with forward_ad.dual_level():
        gradient = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.autograd.grad(out, x, gradient)


@pytest.mark.parametrize("name", TRAINED)
def test_a_second_derivative_is_refused(name: str) -> None:
    x = numbers(9, DIM).requires_grad_()
    (first,) = torch.autograd.grad(TRAINED[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="in Triton has first derivatives only"):
        torch.autograd.grad(first.square().sum(), x)


@pytest.mark.parametrize("name", ["layer_norm", "sampled_softmax", "linear_cross_entropy, items", "hstu_attention, q"])
def test_the_check_is_traced_in_one_graph(name: str) -> None:
    """With fake tensors, too. (Inside torch.compile, layer_norm is torch's.)"""
    torch.compiler.reset()
    x = numbers(9, DIM)
    compiled = torch.compile(TRAINED[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), TRAINED[name](x))

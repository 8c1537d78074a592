"""Rotary embeddings: torch by a loop, Triton against float64."""

import pytest
import torch
from tolerance import assert_no_worse

from kernels.rotary import naive, rotary

triton_op = pytest.importorskip("kernels.rotary.triton_op", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
NAMES = ("q", "k", "v", "dqkv")


def inputs(tokens: int, heads: int, width: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """qkv, cosines and sines of any angles, and the gradients of q, k and v."""
    angle = 100 * torch.randn(tokens, width // 2, dtype=torch.float64)
    of_angles = [part.to(DEVICE, torch.promote_types(dtype, torch.float32)) for part in (angle.cos(), angle.sin())]
    gradients = [torch.randn(tokens, heads, width).to(DEVICE, dtype) for _ in range(3)]
    return [torch.randn(tokens, 3, heads, width).to(DEVICE, dtype), *of_angles, *gradients]


def results(function, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *gradients: torch.Tensor):
    """q, k and v, and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    outputs = function(qkv, cos, sin)
    return [*(output.detach() for output in outputs), torch.autograd.grad(outputs, qkv, gradients)[0]]


def by_loop(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each pair of features as the real and the imaginary part of a number, which the angle turns."""
    tokens, _, heads, width = qkv.shape
    turned = qkv.clone()
    for token in range(tokens):
        for pair in range(width // 2):
            turn = complex(cos[token, pair], sin[token, pair])
            for part in range(2):
                for head in range(heads):
                    first, second = qkv[token, part, head, [pair, pair + width // 2]].tolist()
                    number = complex(first, second) * turn
                    turned[token, part, head, pair] = number.real
                    turned[token, part, head, pair + width // 2] = number.imag
    return turned.unbind(1)


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_torch_turns_each_pair_by_its_angle(width: int) -> None:
    qkv, cos, sin = inputs(4, 2, width)[:3]
    q, k, v = naive.rotary(qkv, cos, sin)
    for ours, expected in zip((q, k, v), by_loop(qkv, cos, sin), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)
    assert torch.equal(v, qkv[:, 2])
    if width % 2:
        assert torch.equal(q[..., -1], qkv[:, 0, :, -1])
    torch.testing.assert_close(k.norm(dim=-1), qkv[:, 1].norm(dim=-1))


@pytest.mark.parametrize("width", [2, 5, 8])
def test_the_gradient_of_torch_is_that_of_differences(width: int) -> None:
    qkv, cos, sin = inputs(3, 2, width)[:3]
    assert torch.autograd.gradcheck(lambda x: naive.rotary(x, cos, sin), qkv.requires_grad_())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "width"),
    [(0, 2, 8), (1, 1, 2), (70, 1, 50), (33, 3, 6), (9, 8, 64), (5, 2, 256), (3, 1, 1000), (2, 48, 100)],
)
def test_values_and_gradients_are_as_exact_as_torch(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    arguments = inputs(tokens, heads, width, dtype)
    ours, low = (results(f, *arguments) for f in (triton_op.rotary, naive.rotary))
    exact = results(naive.rotary, *(tensor.double() for tensor in arguments))
    assert all(tensor.dtype == dtype for tensor in ours)
    assert_no_worse(ours, low, exact, NAMES)
    assert torch.equal(ours[2], arguments[0][:, 2])
    assert torch.equal(ours[3][:, 2], arguments[-1])


def test_the_values_are_no_copy_and_rows_of_a_head_have_no_gaps() -> None:
    """As FlashAttention needs, which reads rows of 16 bytes."""
    qkv, cos, sin = inputs(6, 3, 8, torch.float16)[:3]
    for function in (triton_op.rotary, naive.rotary):
        q, k, v = function(qkv, cos, sin)
        assert v.data_ptr() == qkv[:, 2].data_ptr()
        for tensor in (q, k, v):
            assert tensor.stride()[1:] == (8, 1)
            assert tensor.stride(0) % 8 == 0
            assert tensor.data_ptr() % 16 == 0


def test_gradients_and_angles_may_be_strided() -> None:
    qkv, cos, sin, *gradients = inputs(5, 2, 8, torch.float32)
    together = torch.stack(gradients, dim=2)
    both = torch.stack([cos, sin], dim=2)
    strided = results(triton_op.rotary, qkv, *both.unbind(2), *together.unbind(2))
    for ours, same in zip(strided, results(triton_op.rotary, qkv, cos, sin, *gradients), strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_output_alone_may_have_a_gradient(used: int) -> None:
    qkv, cos, sin, gradient, *_ = inputs(5, 2, 8, torch.float32)
    found = []
    for function in (triton_op.rotary, naive.rotary):
        leaf = qkv.clone().requires_grad_()
        found.append(torch.autograd.grad(function(leaf, cos, sin)[used], leaf, gradient)[0])
    torch.testing.assert_close(*found)


def test_torch_knows_the_operators() -> None:
    qkv, cos, sin, *gradients = inputs(6, 2, 8, torch.float32)
    torch.library.opcheck(triton_op.rotary_forward, (qkv, cos, sin))
    torch.library.opcheck(triton_op.rotary_backward, (*gradients, cos, sin))


def test_second_and_forward_mode_derivatives_are_refused() -> None:
    qkv, cos, sin, *gradients = inputs(2, 1, 4, torch.float32)
    leaves = [gradient.requires_grad_() for gradient in gradients]
    outputs = triton_op.rotary(qkv.requires_grad_(), cos, sin)
    (first,) = torch.autograd.grad(outputs, qkv, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="rotary in Triton has first derivatives only"):
        torch.autograd.grad(first.sum(), leaves)


def test_inputs_that_make_no_sense_are_refused() -> None:
    good = torch.zeros(3, 3, 2, 8)
    for wrong in (torch.zeros(3, 3, 16), torch.zeros(3, 2, 2, 8)):
        with pytest.raises(ValueError, match=r"qkv must be \(T, 3, H, D\)"):
            rotary(wrong, torch.zeros(3, 4), torch.zeros(3, 4))
    for wrong in (torch.zeros(1, 4), torch.zeros(3, 8), torch.zeros(3, 1, 1, 4)):
        with pytest.raises(ValueError, match=r"cos must be \(3, 4\)"):
            rotary(good, wrong, torch.zeros(3, 4))
        with pytest.raises(ValueError, match=r"sin must be \(3, 4\)"):
            rotary(good, torch.zeros(3, 4), wrong)


@pytest.mark.gpu
def test_on_the_gpu_it_is_triton_and_a_graph_of_it_follows_its_input() -> None:
    qkv, cos, sin, *gradients = inputs(50, 4, 32, torch.bfloat16)
    leaf = qkv.clone().requires_grad_()
    assert type(rotary(leaf, cos, sin)[0].grad_fn).__name__ == "_RotaryBackward"

    def work() -> tuple[torch.Tensor, ...]:
        outputs = rotary(leaf, cos, sin)
        return *(output.detach() for output in outputs), torch.autograd.grad(outputs, leaf, gradients)[0]

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        leaf.mul_(-2)
        gradients[0].mul_(3)
    graph.replay()
    for ours, expected in zip(captured, work(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
def test_an_odd_width_is_torchs() -> None:
    qkv, cos, sin = inputs(5, 2, 7, torch.bfloat16)[:3]
    for ours, expected in zip(rotary(qkv, cos, sin), naive.rotary(qkv, cos, sin), strict=True):
        assert torch.equal(ours, expected)

"""The projection: Triton against float64, its extremes, its limits."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_no_worse

from kernels.norm_gate.naive import LAYER_NORM_EPS
from kernels.projection import naive, projection

triton_op = pytest.importorskip("kernels.projection.triton_op", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
NAMES = ("output", "dx", "dweight")
# The gradients of bias and of the norm's weight and bias are, as a bias table's, sums of many terms that cancel.
VECTORS = ("d bias table bias", "d bias table norm weight", "d bias table norm bias")


def inputs(tokens: int, d: int, k: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """x, the weight, and the gradient of the result."""
    torch.manual_seed(seed)
    tensors = (torch.randn(tokens, d), torch.randn(d, k) / d**0.5, torch.randn(tokens, k))
    return [x.to(DEVICE, dtype) for x in tensors]


def results(function, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The value of a function of all tensors but the last, which is its gradient; and theirs."""
    *inputs, gradient = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def versions(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The results of Triton, of the naive version, and of the naive version in float64."""
    double = [x.double() for x in tensors]
    return [results(triton_op.projection, *tensors), *(results(naive.projection, *x) for x in (tensors, double))]


def assert_as_exact_as_naive(tensors: list[torch.Tensor]) -> None:
    ours, low, exact = versions(tensors)
    assert all(x.dtype == tensors[0].dtype for x in ours)
    assert_no_worse(ours, low, exact, NAMES)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("tokens", "d", "k"), [(0, 25, 40), (1, 50, 200), (70, 25, 100), (130, 50, 200), (33, 256, 96), (17, 300, 70)]
)
def test_values_and_gradients_are_as_exact_as_torch(tokens: int, d: int, k: int, dtype: torch.dtype) -> None:
    assert_as_exact_as_naive(inputs(tokens, d, k, dtype))


@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(0, 70),
    d=st.integers(8, 130),
    k=st.integers(1, 130),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 999),
)
def test_other_shapes(tokens: int, d: int, k: int, dtype: torch.dtype, seed: int) -> None:
    assert_as_exact_as_naive(inputs(tokens, d, k, dtype, seed))


def ranking_inputs(
    tokens: int, d: int, k: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """x and the weight; bias, the norm's weight and its bias; the gradient of the result."""
    x, weight, gradient = inputs(tokens, d, k, dtype)
    return [x, weight], [torch.randn(n).to(DEVICE, dtype) for n in (k, d, d)], gradient


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("silu_columns", [None, 0, 17])
@pytest.mark.parametrize("given", ["bias", "norm", "both", "neither"])
def test_bias_affine_norm_and_silu_of_some_columns(given: str, silu_columns: int | None, dtype: torch.dtype) -> None:
    """The 17th column is within a tile of columns."""
    which = {"bias": [0], "norm": [1, 2], "both": [0, 1, 2], "neither": []}[given]

    def call(function, x, weight, *vectors) -> torch.Tensor:
        options = dict(zip(which, vectors, strict=True))
        return function(x, weight, *(options.get(i) for i in range(3)), silu_columns)

    for tokens, d, k in ((0, 25, 40), (1, 50, 60), (150, 30, 100)):
        tensors, vectors, gradient = ranking_inputs(tokens, d, k, dtype)
        every = [*tensors, *(vectors[i] for i in which), gradient]
        fused, plain = (functools.partial(call, module.projection) for module in (triton_op, naive))
        ours, low, exact = results(fused, *every), results(plain, *every), results(plain, *(x.double() for x in every))
        assert all(x.dtype == dtype for x in ours)
        assert_no_worse(ours, low, exact, [*NAMES, *(VECTORS[i] for i in which)])


def test_the_ranking_projection_by_hand() -> None:
    """Rows of two channels, whose norm is -1 and 1: times 2 and 3, plus 1; their sum plus a bias; silu of a column."""
    x = torch.tensor([[0.0, 100.0], [20.0, -20.0]], device=DEVICE)
    weight, bias = torch.ones(2, 3, device=DEVICE), torch.tensor([0.0, 10.0, 20.0], device=DEVICE)
    norm = {"norm_weight": torch.tensor([2.0, 3.0]), "norm_bias": torch.tensor([1.0, 1.0])}
    norm = {name: tensor.to(DEVICE) for name, tensor in norm.items()}
    # (-2 + 1) + (3 + 1) = 3 and (2 + 1) + (-3 + 1) = 1; silu(z) = z / (1 + exp(-z))
    expected = torch.tensor([[3 / (1 + torch.e**-3), 13.0, 23.0], [1 / (1 + torch.e**-1), 11.0, 21.0]], device=DEVICE)
    for function in (projection, naive.projection, triton_op.projection):
        torch.testing.assert_close(function(x, weight, bias, **norm, silu_columns=1), expected)


def test_rows_and_gradients_may_be_strided() -> None:
    x, weight, gradient = inputs(20, 50, 40, torch.float32)
    wide = torch.cat([x, x], 1)[:, :50]
    tall = weight.T.contiguous().T
    ours = results(triton_op.projection, wide, tall, gradient.T.contiguous().T)
    for result, expected in zip(ours, results(triton_op.projection, x, weight, gradient), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.gpu
def test_tf32_where_torch_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    for shape in ((130, 50, 200), (70, 256, 512)):
        for name, ours, low, exact in zip(NAMES, *versions(inputs(*shape, torch.float32)), strict=True):
            # On top of twice the error: TF32 keeps 10 bits of a factor, which may be rounded here and cut there.
            error, allowed = ((x.double() - exact).abs().max() for x in (ours, low))
            assert error <= 2 * allowed + 2**-10 * exact.abs().max(), name


@pytest.mark.gpu
def test_it_is_the_same_every_time_and_in_a_cuda_graph() -> None:
    x, weight, gradient = inputs(1000, 64, 256, torch.bfloat16)
    expected = results(projection, x, weight, gradient)
    for result, again in zip(expected, results(projection, x, weight, gradient), strict=True):
        assert torch.equal(result, again)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = projection(x, weight)
    graph.replay()
    assert torch.equal(out, expected[0])


def test_constant_rows_give_zero_and_a_finite_gradient() -> None:
    # A mean of 64 equal values is exact; of 50 it may be off by 3e-7, which 1 / sqrt(eps) = 1e3 makes 3e-4.
    x, weight, gradient = inputs(5, 64, 40, torch.float32)
    x[:] = torch.tensor([0.0, 1.0, -2.5, 2.0, 3.0], device=DEVICE)[:, None]
    out, dx, dweight = results(triton_op.projection, x, weight, gradient)
    dxhat = gradient / 2 @ weight.T
    expected = (dxhat - dxhat.mean(1, keepdim=True)) / LAYER_NORM_EPS**0.5
    for result, truth in ((out, torch.zeros_like(out)), (dx, expected), (dweight, torch.zeros_like(weight))):
        torch.testing.assert_close(result, truth, rtol=1e-4, atol=3e-3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # 1 / (1 + inf), interpreted
def test_large_products_saturate() -> None:
    x, weight, gradient = inputs(9, 25, 40, torch.float32)
    for result in results(triton_op.projection, 1e4 * x, 1e3 * weight, gradient):
        assert torch.isfinite(result).all()
    assert_as_exact_as_naive([1e4 * x, 1e3 * weight, gradient])


def test_torch_knows_the_operator() -> None:
    x, weight, _ = inputs(5, 25, 40, torch.float32)
    torch.library.opcheck(triton_op.projection, (x.requires_grad_(), weight.requires_grad_()))
    tensors, vectors, _ = ranking_inputs(5, 25, 40, torch.float32)
    torch.library.opcheck(
        triton_op.projection, tuple(x.requires_grad_() for x in tensors + vectors), {"silu_columns": 9}
    )


def test_it_compiles_in_one_graph() -> None:
    tensors = inputs(6, 25, 40, torch.float32)
    compiled = torch.compile(lambda x, weight: triton_op.projection(x, weight), fullgraph=True, backend="eager")
    for ours, theirs in zip(results(triton_op.projection, *tensors), results(compiled, *tensors), strict=True):
        assert torch.equal(ours, theirs)


def test_on_the_cpu_it_is_torch() -> None:
    x, weight, _ = (tensor.cpu() for tensor in inputs(7, 25, 40, torch.float32))
    assert torch.equal(projection(x, weight), naive.projection(x, weight))


def test_inputs_that_make_no_sense_are_refused() -> None:
    x, weight, _ = inputs(3, 8, 10, torch.float32)
    with pytest.raises(ValueError, match=r"\(T, d\) and \(d, K\)"):
        projection(x, weight[1:])
    with pytest.raises(ValueError, match="one type"):
        projection(x, weight.half())
    with pytest.raises(ValueError, match=r"bias must be \(10,\), not \(8,\)"):
        projection(x, weight, x[0])
    with pytest.raises(ValueError, match="both be given"):
        projection(x, weight, norm_weight=x[0])
    with pytest.raises(ValueError, match=r"norm_bias must be \(8,\), not \(10,\)"):
        projection(x, weight, norm_weight=x[0], norm_bias=weight[0])
    with pytest.raises(ValueError, match="silu_columns must be in 0 to 10, not 11"):
        projection(x, weight, silu_columns=11)

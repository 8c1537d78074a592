"""The gate: Triton against float64, its dropout mask, its limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_no_worse

from kernels.norm_gate import naive, norm_gate

triton_op = pytest.importorskip("kernels.norm_gate.triton_op", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# The gradients of weight and bias are, as a bias table's, sums of many terms that cancel.
NAMES = ("output", "du", "dattended", "d bias table weight", "d bias table bias")
#: Keywords of the gate, and entries of weight and bias: "D", "heads" or none.
OPTIONS = {
    "affine": ({}, "D"),
    "heads": ({"heads": 3}, None),
    "affine heads": ({"heads": 3}, "heads"),
    "one affine head": ({"heads": 1}, "heads"),
    "concatenated": ({"concat_ux": True}, None),
    "affine, concatenated": ({"concat_ux": True}, "D"),
    "affine heads, concatenated": ({"heads": 3, "concat_ux": True}, "heads"),
}


def inputs(tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """u, a view of a wider tensor; attended; the gradient of the result."""
    torch.manual_seed(seed)
    mixed = torch.randn(tokens, width + 9).to(DEVICE, dtype)
    attended, gradient = (torch.randn(tokens, width).to(DEVICE, dtype) for _ in range(2))
    return [mixed[:, :width], attended, gradient]


def results(function, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The value of a function of all tensors but the last, which is its gradient; and theirs."""
    *inputs, gradient = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def assert_as_exact_as_naive(fused, plain, tensors: list[torch.Tensor]) -> None:
    """`fused` against `plain`, in the type of the tensors and in float64."""
    ours, low, exact = (
        results(fused, *tensors),
        results(plain, *tensors),
        results(plain, *(x.double() for x in tensors)),
    )
    assert all(x.dtype == tensors[0].dtype for x in ours)
    assert_no_worse(ours, low, exact, NAMES[: len(ours)])


def without_dropout(u: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    return triton_op.norm_gate(u, attended, 0.5, training=False)


def plain(u: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    return naive.norm_gate(u, attended, 0.5, training=False)


def seed_tensor(seed: int) -> torch.Tensor:
    return torch.tensor([seed], device=DEVICE)


def mask(tokens: int, width: int, dropout: float, seed: int) -> torch.Tensor:
    """What the seed keeps, read off the gate of inputs without zeros."""
    _, attended, _ = inputs(tokens, width, torch.float32)
    return triton_op.norm_gate_forward(torch.ones_like(attended), attended, seed_tensor(seed), dropout) != 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("tokens", "width"), [(0, 25), (1, 50), (21, 25), (37, 50), (5, 256), (3, 600)])
def test_values_and_gradients_are_as_exact_as_torch(tokens: int, width: int, dtype: torch.dtype) -> None:
    assert_as_exact_as_naive(without_dropout, plain, inputs(tokens, width, dtype))


@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(0, 70),
    width=st.integers(8, 130),
    dtype=st.sampled_from(TYPES),
    dropout=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 2**63 - 1),
)
def test_with_a_mask_as_well(tokens: int, width: int, dtype: torch.dtype, dropout: float, seed: int) -> None:
    kept = mask(tokens, width, dropout, seed)

    def masked(u: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return plain(u, attended) * kept / (1 - dropout)

    def fused(u: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return triton_op.norm_gate_forward(u, attended, seed_tensor(seed), dropout)

    assert_as_exact_as_naive(fused, masked, inputs(tokens, width, dtype, seed % 1000))


def option_inputs(name: str, tokens: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """u, attended, weight and bias where there are any, and the gradient of the result."""
    named, entries = OPTIONS[name]
    u, attended, _ = inputs(tokens, width, dtype)
    size = {"D": width, "heads": named.get("heads"), None: None}[entries]
    affine = [] if size is None else [torch.randn(size).to(DEVICE, dtype) for _ in range(2)]
    gradient = torch.randn(tokens, 3 * width if named.get("concat_ux") else width).to(DEVICE, dtype)
    return [u, attended, *affine, gradient]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_as_exact_as_torch(name: str, dropout: float, dtype: torch.dtype) -> None:
    """Tokens that fill no block, and more than a program sums up."""
    named, _ = OPTIONS[name]
    named = {"heads": None, "concat_ux": False} | named
    seed = seed_tensor(7) if dropout else None
    for tokens, width in ((0, 24), (3, 9), (150, 51), (2, 1200)):
        tensors = option_inputs(name, tokens, width, dtype)
        ones = [torch.ones_like(x) for x in tensors[:-1]]
        ones[1] = inputs(tokens, width, torch.float32)[1]  # has no zeros, nor has its norm plus a bias of 9
        ones[3:] = [9 * x for x in ones[3:]]
        affine = [None, None] if len(ones) == 2 else ones[2:]
        kept = triton_op.norm_gate_forward(ones[0], ones[1], seed, dropout, *affine, **named) != 0

        def masked(u, attended, weight=None, bias=None, kept=kept) -> torch.Tensor:
            return naive.norm_gate(u, attended, 0.0, True, weight, bias, **named) * kept / (1 - dropout)

        def fused(u, attended, weight=None, bias=None) -> torch.Tensor:
            return triton_op.norm_gate_forward(u, attended, seed, dropout, weight, bias, **named)

        assert_as_exact_as_naive(fused, masked, tensors)


def test_the_ranking_gate_by_hand() -> None:
    """Two heads of two channels, whose norm is -1 and 1, with a weight and a bias each: [u, attended, gate]."""
    u = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=DEVICE)
    attended = torch.tensor([[0.0, 200.0, 50.0, -50.0]], device=DEVICE)
    weight, bias = torch.tensor([2.0, 3.0], device=DEVICE), torch.tensor([10.0, 20.0], device=DEVICE)
    expected = [1.0, 2.0, 3.0, 4.0, 0.0, 200.0, 50.0, -50.0, 1 * (10 - 2), 2 * (10 + 2), 3 * (20 + 3), 4 * (20 - 3)]
    for function in (norm_gate, naive.norm_gate, triton_op.norm_gate):
        out = function(u, attended, 0.5, False, weight, bias, heads=2, concat_ux=True)
        torch.testing.assert_close(out, torch.tensor([expected], device=DEVICE))
        layer = function(u, attended, 0.0, True, weight[[0, 0, 1, 1]], bias[[0, 0, 1, 1]])
        exact = torch.nn.functional.layer_norm(attended, (4,), weight[[0, 0, 1, 1]], bias[[0, 0, 1, 1]], 1e-6) * u
        torch.testing.assert_close(layer, exact)


def test_parts_and_heads_are_dropped_independently() -> None:
    """Of [u, attended, gate] of two heads: six blocks of columns, each with a mask of its own."""
    u, attended, _ = inputs(1000, 50, torch.float32)
    out = triton_op.norm_gate_forward(
        torch.ones_like(u),
        attended,
        seed_tensor(3),
        0.3,
        torch.ones(2, device=DEVICE),
        torch.full((2,), 9.0, device=DEVICE),
        2,
        True,
    )
    kept = (out != 0).view(1000, 6, 25)
    deviation = (0.3 * 0.7 / kept[:, 0].numel()) ** 0.5
    for part in range(6):
        assert abs(float(kept[:, part].double().mean()) - 0.7) < 5 * deviation
        for other in range(part):
            agree = float((kept[:, part] == kept[:, other]).double().mean())
            assert abs(agree - (0.7**2 + 0.3**2)) < 5 * (0.58 * 0.42 / kept[:, 0].numel()) ** 0.5
    gate = triton_op.norm_gate_forward(torch.ones_like(u), attended, seed_tensor(3), 0.3)
    both = triton_op.norm_gate_forward(torch.ones_like(u), attended, seed_tensor(3), 0.3, concat_ux=True)
    assert torch.equal(gate, both[:, 100:])


def test_constant_rows_have_no_gate_and_a_finite_gradient() -> None:
    u, attended, gradient = inputs(6, 50, torch.float32)
    attended[:] = torch.tensor([0.0, 1.0, -2.5, 2.0, 0.0, 3.0], device=DEVICE)[:, None]
    out, du, dattended = results(without_dropout, u, attended, gradient)
    # The layer norm divides by sqrt(eps) = 1e-3: a mean that is off by a few 1e-7 is a result off by a few 1e-4.
    expected = (gradient * u - (gradient * u).mean(1, keepdim=True)) / naive.LAYER_NORM_EPS**0.5
    for result, truth in ((out, torch.zeros_like(u)), (du, torch.zeros_like(u)), (dattended, expected)):
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=3e-3)


@pytest.mark.parametrize("dropout", [0.2, 0.75])
def test_the_mask_keeps_as_many_as_it_should(dropout: float) -> None:
    kept = mask(1000, 50, dropout, seed=1)
    for some in (kept, *(kept[:, i::4] for i in range(4)), *(kept[i::3] for i in range(3))):
        deviation = (dropout * (1 - dropout) / some.numel()) ** 0.5
        assert abs(float(some.double().mean()) - (1 - dropout)) < 5 * deviation
    for shifted in (kept.roll(1, 0), *(kept.roll(i, 1) for i in (1, 2, 3, 4, 24))):  # neighbours are independent
        together = dropout * (1 - dropout)
        deviation = (together * (1 - together) / kept.numel()) ** 0.5
        assert abs(float((kept & ~shifted).double().mean()) - together) < 5 * deviation


def test_the_mask_depends_on_seed_row_and_column_alone() -> None:
    kept = mask(40, 50, 0.5, seed=2)
    assert torch.equal(kept, mask(40, 50, 0.5, seed=2))
    assert torch.equal(kept[:7], mask(7, 50, 0.5, seed=2))
    assert not torch.equal(kept, mask(40, 50, 0.5, seed=3))
    assert not torch.equal(kept, mask(40, 50, 0.5, seed=2 + 2**32))
    assert not torch.equal(kept[:20], kept[20:])


def test_gradients_are_zero_exactly_where_the_output_is() -> None:
    u, attended, gradient = inputs(33, 50, torch.float32)
    torch.manual_seed(5)
    out, du, _ = results(lambda *x: triton_op.norm_gate(*x, 0.3, training=True), u, attended, gradient)
    assert torch.equal(out == 0, du == 0)
    assert (out == 0).any()


def test_torch_manual_seed_determines_the_draw() -> None:
    u, attended, _ = inputs(20, 25, torch.float32)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws += [triton_op.norm_gate(u, attended, 0.5, training=True) for _ in range(2)]
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[4])


def test_without_dropout_nothing_is_drawn() -> None:
    u, attended, _ = inputs(3, 25, torch.float32)
    state = torch.cuda.get_rng_state if DEVICE == "cuda" else torch.get_rng_state
    before = state()
    for function in (norm_gate, triton_op.norm_gate):
        torch.testing.assert_close(function(u, attended, 0.0, True), function(u, attended, 0.9, False))
    assert torch.equal(before, state())


@pytest.mark.parametrize("dropout", [None, 0.4])
@pytest.mark.parametrize("name", [None, "affine, concatenated", "affine heads, concatenated"])
def test_torch_knows_the_operator(name: str | None, dropout: float | None) -> None:
    tensors = inputs(5, 24, torch.float32) if name is None else option_inputs(name, 5, 24, torch.float32)
    u, attended, *affine = (x.detach().requires_grad_() for x in tensors[:-1])
    seed = None if dropout is None else seed_tensor(1)
    named = {} if name is None else OPTIONS[name][0]
    torch.library.opcheck(triton_op.norm_gate_forward, (u, attended, seed, dropout or 0.0, *affine), named)


@pytest.mark.parametrize("name", [None, "affine heads, concatenated"])
def test_it_compiles_in_one_graph(name: str | None) -> None:
    tensors = inputs(6, 24, torch.float32) if name is None else option_inputs(name, 6, 24, torch.float32)
    named = {} if name is None else OPTIONS[name][0]
    outcomes = []
    for function in (triton_op.norm_gate, torch.compile(triton_op.norm_gate, fullgraph=True, backend="eager")):

        def gate(u, attended, *affine, function=function) -> torch.Tensor:
            return function(u, attended, 0.5, True, *affine, **named)

        torch.manual_seed(3)
        outcomes.append(results(gate, *tensors))
    for ours, compiled in zip(*outcomes, strict=True):
        assert torch.equal(ours, compiled)


@pytest.mark.gpu
def test_each_replay_of_a_cuda_graph_draws_anew() -> None:
    u, attended, _ = inputs(200, 50, torch.float32)
    norm_gate(u, attended, 0.5, True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = norm_gate(u, attended, 0.5, True)
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(out.clone())
    assert not torch.equal(*draws)


def test_inputs_that_make_no_sense_are_refused() -> None:
    u, attended, _ = inputs(3, 8, torch.float32)
    with pytest.raises(ValueError, match="one shape"):
        norm_gate(u[:2], attended, 0.5, True)
    with pytest.raises(ValueError, match="dropout must be in"):
        norm_gate(u, attended, 1.0, True)
    with pytest.raises(ValueError, match="heads must divide the 8 channels, not be 3"):
        norm_gate(u, attended, 0.5, True, heads=3)
    with pytest.raises(ValueError, match="both be given"):
        norm_gate(u, attended, 0.5, True, u[0])
    with pytest.raises(ValueError, match=r"weight must be \(2,\), not \(8,\)"):
        norm_gate(u, attended, 0.5, True, u[0], u[0], heads=2)

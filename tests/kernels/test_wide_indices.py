"""Products of program ids, rows and strides beyond 32 bits: the kernels' last program, on memory that is not there but
for what it touches; interpreted, integer overflow is an error besides."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted import as_program, sparse

from kernels.hstu_attention import time_bucket

op = pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)
inputs = pytest.importorskip("kernels.hstu_attention.inputs", exc_type=ImportError)
prepare = pytest.importorskip("kernels.hstu_attention.prepare", exc_type=ImportError)
layer_norm = pytest.importorskip("kernels.layer_norm.triton_op", exc_type=ImportError)
linear_cross_entropy = pytest.importorskip("kernels.linear_cross_entropy.triton_op", exc_type=ImportError)
norm_gate = pytest.importorskip("kernels.norm_gate.triton_op", exc_type=ImportError)
projection = pytest.importorskip("kernels.projection.triton_op", exc_type=ImportError)
rowwise_table = pytest.importorskip("kernels.rowwise_table.triton_op", exc_type=ImportError)
sampled_softmax = pytest.importorskip("kernels.sampled_softmax.triton_op", exc_type=ImportError)

ROWS = 65_535
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter")


@pytest.fixture(autouse=True)
def overflow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32-bit additions and products, in the interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import interpreter_builder

        monkeypatch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, debug=True))


@interpreted
def test_band_programs_of_many_rows() -> None:
    """A copy of the bucket sums for each of 65,535 x 129 programs, of which the last adds up one token."""
    grid = (129, ROWS)
    copies = grid[0] * grid[1]
    sums = sparse(copies, 256)
    offsets = torch.zeros(ROWS + 1, dtype=torch.int64)
    offsets[-1] = 1025  # its last tile is the row's one token from place 1,024 on
    gradient, buckets = torch.zeros(1025, 256), torch.zeros(1025, 256, dtype=torch.uint8)
    gradient[1024, 128], buckets[1024, 128] = 2.5, 7
    with as_program((128, ROWS - 1), grid):
        prepare.band_gradient_kernel[(1,)](gradient, buckets, sums, offsets, copies, BLOCK=8, DETERMINISTIC=True)
    assert sums[-1, 7] == 2.5
    assert sums[-1].sum() == 2.5


@interpreted
def test_bucket_tables_of_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's tiles times the table's width: here few tiles and a width of 2^29."""
    torch.manual_seed(0)
    tokens, width = 300, 2**29
    q, k, v, grad = torch.randn(4, tokens, 1, 16)
    times = torch.arange(tokens) ** 2
    arguments = (
        q, k, v, torch.tensor([0, tokens]), tokens, 0.2, 9.0, None, torch.randn(129), times, times, 0, 0, None, False
    )  # fmt: skip

    def gradients() -> tuple[torch.Tensor, ...]:
        call = op.Inputs(*arguments)
        config = call.configuration("bwd_dkdv") | {"block_m": 64, "block_n": 64}
        gradient = op.Gradient(grad, grad.new_empty(0), None)
        return op.backward_kv(call, op.BiasTables(call), config, gradient, None)[:2]

    expected = gradients()
    original = prepare.BiasTables.tile_buckets

    def wide(tables: Any, block_m: int, block_n: int) -> Any:
        since, tiles = original(tables, block_m, block_n)
        spread = sparse(len(tiles), width, dtype=torch.int32)
        spread[:, : tiles.shape[1]] = tiles
        return prepare.TileBuckets(since, spread)

    monkeypatch.setattr(prepare.BiasTables, "tile_buckets", wide)
    assert all(map(torch.equal, gradients(), expected))


@interpreted
def test_attention_to_tokens_beyond_32_bits() -> None:
    """2^31 and more elements of q, k and v: their last row, in the kernels' programs for it and head 0."""
    torch.manual_seed(0)
    tokens, heads, dim, n = 2**26 + 64, 2, 16, 8
    few = torch.randn(4, n, heads, dim).half()
    many = [sparse(tokens, heads, dim, dtype=torch.float16) for _ in few]
    for tensor, values in zip(many, few, strict=True):
        tensor[-n:] = values
    table = torch.randn(2 * n - 1)
    found = []
    for (q, k, v, grad), offsets in ((few, [0, 0, n]), (many, [0, tokens - n, tokens])):
        others = (n, 0.25, 8.0, table, None, None, None, 0, 0, None, False)
        call = op.Inputs(q, k, v, torch.tensor(offsets), *others)
        bias, gradient = op.BiasTables(call), op.Gradient(grad, torch.empty(0), None)
        with as_program((0, 1), (heads, 2)):
            output, _ = op.forward(call, bias, call.configuration("forward"))
            dk, dv, _ = op.backward_kv(call, bias, call.configuration("bwd_dkdv"), gradient, None)
            dq, _ = op.backward_q(call, bias, call.configuration("bwd_dq"), gradient)
        found.append([tensor[-n:, 0].clone() for tensor in (output, dq, dk, dv)])
    for large, small in zip(*found, strict=True):
        assert torch.equal(large, small)


@interpreted
def test_tokens_beyond_32_bits() -> None:
    """Layer norm, gate and projection of 2^31 and some tokens: the last program."""
    torch.manual_seed(0)
    tokens, width, rows = 2**31 + 5, 2, 8
    last = (tokens - 1) // rows
    grid, common = (last + 1,), {"tokens": tokens, "D": width}
    x, u, out, dx, du = (sparse(tokens, width, dtype=torch.float16) for _ in range(5))
    x[-5:], u[-5:] = torch.randn(2, 5, width)
    with as_program((last,), grid):
        blocks = {"ROWS": rows, "COLUMNS": 16}
        layer_norm.layer_norm_forward_kernel[(1,)](x, None, None, out, **common, **blocks, EPS=1e-6, AFFINE=False)
        expected = torch.nn.functional.layer_norm(x[-5:].float(), (width,), eps=1e-6)
        torch.testing.assert_close(out[-5:].float(), expected, rtol=1e-3, atol=1e-3)
        layer_norm.layer_norm_backward_kernel[(1,)](u, x, None, dx, None, **common, **blocks, EPS=1e-6, AFFINE=False)
        assert dx[-5:].isfinite().all()
        gate = {"threshold": 0, "scale": 1.0, "U_STRIDE": width, "HEADS": 1, "DROPOUT": False, "AFFINE": "none"}
        gate |= {"CONCAT_UX": False}
        norm_gate.norm_gate_forward_kernel[(1,)](u, x, None, None, None, out, **common, **gate, **blocks)
        torch.testing.assert_close(out[-5:].float(), u[-5:].float() * expected, rtol=1e-2, atol=1e-2)
        norm_gate.norm_gate_backward_kernel[(1,)](
            u, u, x, None, None, None, du, dx, None, **common, **gate, **blocks, STEPS=1
        )
        torch.testing.assert_close(du[-5:].float(), u[-5:].float() * expected, rtol=1e-2, atol=1e-2)


@interpreted
def test_projections_of_many_tokens() -> None:
    """The first and the last of 2^31 and more: of how many are left, 32 bits would keep a negative number."""
    torch.manual_seed(0)
    tokens, columns, rows = 2**31 + 3, 1, 16
    last = (tokens - 1) // rows
    blocks = {
        "D": 2,
        "K": columns,
        "SILU_COLUMNS": columns,
        "BIAS": False,
        "AFFINE": False,
        "BLOCK_T": rows,
        "BLOCK_D": 16,
        "BLOCK_K": 16,
        "PRECISION": "ieee",
    }
    x, out = sparse(tokens, 2, dtype=torch.float16), sparse(tokens, columns, dtype=torch.float16)
    x[-3:] = torch.randn(3, 2)
    weight = torch.randn(2, columns).half()
    for program in (0, last):
        x[:3] = x[-3:]
        with as_program((program,), (last + 1,)):
            projection.projection_forward_kernel[(1,)](x, weight, None, None, None, out, tokens, **blocks)
        part = out[-3:] if program else out[:3]
        expected = projection_by_torch(x[-3:].float(), weight.float())
        torch.testing.assert_close(part.float(), expected, rtol=1e-2, atol=1e-2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["update", "update_repeated"])
def test_rows_of_a_table_beyond_32_bits(name: str, dtype: torch.dtype) -> None:
    """2^31 and more of them, and more elements than that."""
    torch.manual_seed(0)
    count, width = 2**31 + 5, 2
    weight, sums = sparse(count, width, dtype=dtype), sparse(count)
    rows, gradient = torch.tensor([3, count - 1, count - 4]), torch.tensor([[0.25, 0.5], [1.0, -2.0], [3.0, 4.0]])
    getattr(rowwise_table, name)(weight, sums, rows, gradient, 0.5, 1e-8)
    assert torch.equal(sums[rows], gradient.square().mean(1))
    expected = -0.5 * gradient / sums[rows].sqrt()[:, None]
    torch.testing.assert_close(weight[rows].float(), expected, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=0)
    assert not weight[-3:-1].any()


@interpreted
def test_gradients_of_a_table_beyond_32_bits() -> None:
    """The last program of a lookup of 2^31 elements and more."""
    torch.manual_seed(0)
    n, width, rows = 2**26 + 3, 32, 32
    last = (n - 1) // rows
    gradient, index, order = sparse(n, width), sparse(n, dtype=torch.int64), sparse(n, dtype=torch.int64)
    gradient[-3:] = torch.randn(3, width)
    index[-3:], order[-3:] = torch.tensor([5, 6, 6]), torch.tensor([n - 1, n - 3, n - 2])
    for given, expected in ((None, [gradient[-3]]), (order, [gradient[-1], gradient[-3] + gradient[-2]])):
        weight, sums = torch.zeros(9, width), torch.zeros(9)
        with as_program((last,), (last + 1,)):
            rowwise_table.rowwise_adagrad_kernel[(1,)](
                weight, sums, index, given, gradient, None, n, 1.0, 1e-8, D=width, ROWS=rows, COLUMNS=width,
                REPEATED=given is not None, STOCHASTIC=False,
            )  # fmt: skip
        torch.testing.assert_close(sums[5 : 5 + len(expected)], torch.stack(expected).square().mean(1))


@interpreted
def test_cross_entropy_of_states_and_items_beyond_32_bits() -> None:
    """2^31 and more elements of each: the last states with the last items, and the other way round."""
    torch.manual_seed(0)
    dim, few, block = 256, 16, 16
    count = 2**31 // dim + few
    sizes = {"D": dim, "BLOCK_D": dim, "BLOCK_ROWS": block, "PRECISION": "ieee"}
    states, items = sparse(count, dim), sparse(count, dim)
    states[-few:], items[-few:] = torch.randn(2, few, dim) / dim**0.5
    last, programs = count // block - 1, 2
    share = count // block - 1  # of the second program, one step
    targets, offsets = sparse(count, dtype=torch.int64), sparse(count)
    targets[-few:] = count - 1 - torch.arange(few)
    maxima, sums, pulls = sparse(programs, count), sparse(programs, count), sparse(programs, count, dim)
    with as_program((last, 1), (last + 1, programs)):
        linear_cross_entropy.cross_entropy_forward_kernel[(1,)](
            states, items, offsets, targets, maxima, sums, pulls, count, count, share, BLOCK_ITEMS=block, **sizes
        )
    logits = states[-few:] @ items[-few:].T
    others = logits.exp() * (1 - torch.eye(few).flip(0))
    found = sums[1, -few:] * 2 ** maxima[1, -few:]
    torch.testing.assert_close(found, others.sum(1))
    torch.testing.assert_close(pulls[1, -few:] / sums[1, -few:, None], others @ items[-few:] / found[:, None])
    marks, normalisers, misses, partial = sparse(count, dtype=torch.int32), sparse(count), sparse(count), sparse(count)
    with as_program((last,), (last + 1,)):
        sizes_of_sums = {"D": dim, "BLOCK_D": dim, "BLOCK_ROWS": block}
        outputs = (normalisers, misses, marks, gradients := sparse(count, dim), partial)
        linear_cross_entropy.cross_entropy_join_kernel[(1,)](
            states, items, None, targets, maxima, sums, pulls, *outputs, count, count, programs, **sizes_of_sums
        )
    # The first program's part is empty: zeros, of which a weight of 2^0 is as it is.
    expected = torch.autograd.functional.jacobian(
        lambda x: torch.nn.functional.cross_entropy(x @ items[-few:].T, targets[-few:] - count + few, reduction="sum"),
        states[-few:],
    )
    torch.testing.assert_close(gradients[-few:], expected)
    of_items, of_bias = sparse(programs, count, dim), sparse(programs, count)
    with as_program((last, 1), (last + 1, programs)):
        linear_cross_entropy.cross_entropy_items_kernel[(1,)](
            states, items, offsets, normalisers, misses, marks, torch.tensor(2.0), of_items, of_bias,
            count, count, share, BLOCK_ITEMS=block, **sizes,
        )  # fmt: skip
    one_hot = torch.eye(few).flip(0)
    weight = 2 * (logits.softmax(1) - one_hot)
    torch.testing.assert_close(of_items[1, -few:], weight.T @ states[-few:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_bias[1, -few:], weight.sum(0), rtol=1e-5, atol=1e-6)
    summed, summed_bias = sparse(count, dim), sparse(count)
    with as_program((last,), (last + 1,)):
        linear_cross_entropy.cross_entropy_sum_kernel[(1,)](
            of_items, of_bias, summed, summed_bias, count, programs, **sizes_of_sums
        )
    torch.testing.assert_close(summed[-few:], of_items[1, -few:])
    torch.testing.assert_close(summed_bias[-few:], of_bias[1, -few:])


def projection_by_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(torch.nn.functional.layer_norm(x, x.shape[1:], eps=1e-6) @ weight)


@interpreted
def test_rows_of_a_gate_far_apart() -> None:
    """U as a view whose rows are 2^28 elements apart."""
    torch.manual_seed(0)
    stride, rows = 2**28, 16
    u = sparse(rows * stride, dtype=torch.float16).as_strided((rows, 2), (stride, 1))
    u.copy_(torch.randn(rows, 2))
    attended = torch.randn(rows, 2)
    out = torch.empty(rows, 2)
    norm_gate.norm_gate_forward_kernel[(1,)](
        u, attended, None, None, None, out, rows, 0, 1.0, U_STRIDE=stride, D=2, HEADS=1, ROWS=rows, COLUMNS=16,
        DROPOUT=False, AFFINE="none", CONCAT_UX=False,
    )  # fmt: skip
    torch.testing.assert_close(out, u.float() * torch.nn.functional.layer_norm(attended, (2,), eps=1e-6))


def test_what_is_counted_in_32_bits_is_refused_beyond() -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    for q, longest in ((empty(1, 2**27, 16), 1), (empty(1, 1, 16), 2**31 - 1), (empty(1, 2**15, 16), 2**20)):
        with pytest.raises(ValueError, match="counts in 32 bits"):
            inputs.check_sizes(q, q, longest)
    inputs.check_sizes(empty(1, 2**10, 256), empty(1, 2**10, 256), 2**20)
    assert not inputs.describable(torch.empty((), device="meta").expand(2**31, 1, 16))
    scalars, draws = empty(1).expand(2**20), empty(1).expand(2**20, 2**11)
    with pytest.raises(ValueError, match="32 bits"):
        sampled_softmax._table_gradient._init_fn(
            empty(2**20, 4), empty(9, 4), scalars, draws[:, 1:], draws, scalars, scalars
        )
    with pytest.raises(ValueError, match="32 bits"):
        sampled_softmax._forward._init_fn(empty(1, 4), empty(1).expand(2**31, 4), scalars, draws, 0.05, None)

    for rows, items in ((2**31, 9), (1, 2**31)):
        with pytest.raises(ValueError, match="32 bits"):
            linear_cross_entropy._forward._init_fn(
                empty(1, 4).expand(rows, 4), empty(1, 4).expand(items, 4), empty(1).expand(rows), None
            )


@pytest.mark.gpu
def test_deterministic_time_gradients_of_many_rows() -> None:
    """65,535 rows of which the last has 1,032 tokens: 8.45 million band programs, 8.7 GB of bucket sums."""
    torch.manual_seed(0)
    tokens = 1032
    offsets = torch.zeros(ROWS + 1, dtype=torch.int64, device="cuda")
    offsets[-1] = tokens
    q, k, v, grad = torch.randn(4, tokens, 1, 16, device="cuda", dtype=torch.bfloat16)
    table = torch.randn(129, device="cuda", requires_grad=True)
    times = (torch.rand(tokens, device="cuda") * 10**4).long().cumsum(0)
    found = []
    for deterministic, rows in ((True, offsets), (False, offsets[-2:])):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            output, *_ = op.attention(q, k, v, rows, tokens, 0.25, 1.0, None, table, times, times, 0, 0, None, False)
            found.append(torch.autograd.grad(output, table, grad)[0])
        finally:
            torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_131072_tokens(dtype: torch.dtype) -> None:
    """The last queries' outputs and gradients, against those queries over all keys in torch."""
    torch.manual_seed(0)
    n, few, dim = 131_072, 64, 16
    q, k, v, grad = torch.randn(4, n, 1, dim, device="cuda", dtype=dtype)
    grad[:-few] = 0  # so that the last queries alone have gradients
    times = (torch.rand(n, device="cuda") * 100).long().cumsum(0)
    position, time = torch.randn(2 * n - 1, device="cuda"), torch.randn(129, device="cuda")
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    offsets = torch.tensor([0, n], device="cuda")
    output, *_ = op.attention(*leaves, offsets, n, 0.25, 64.0, position, time, times, times, 0, 0, None, False)
    dq, dk, dv = torch.autograd.grad(output, leaves, grad)
    exact = [tensor[:, 0].double().requires_grad_() for tensor in (q[-few:], k, v)]
    i, j = torch.arange(n - few, n, device="cuda")[:, None], torch.arange(n, device="cuda")
    bias = position[(j - i).clamp(max=0) + n - 1] + time[time_bucket(times[-few:, None] - times)]
    weights = torch.nn.functional.silu(0.25 * exact[0] @ exact[1].T + bias) * (j <= i) / 64.0
    expected = weights @ exact[2]
    wanted = torch.autograd.grad(expected, exact, grad[-few:, 0].double())
    for ours, right in zip((output[-few:], dq[-few:], dk, dv), (expected.detach(), *wanted), strict=True):
        error = (ours[:, 0].double() - right).norm() / right.norm()
        assert error < 2e-2, error

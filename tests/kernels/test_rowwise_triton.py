"""The rowwise table's kernel against the torch version; its rounding; what it leaves alone; that it does the work."""

import os
from collections.abc import Callable

import pytest
import torch

from kernels import rowwise_table
from kernels.rowwise_table import EPS, RowwiseTable, fbgemm, naive

triton_op = pytest.importorskip("kernels.rowwise_table.triton_op", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, LR = 40, 0.05
UNIQUE = [3, 0, 39, 7, 0, 21, 8, 0]
REPEATED = [9, 3, 3, 0, 9, 0, 9, 39, 9]
Update = Callable[..., None]


def table(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A table and its sums."""
    torch.manual_seed(width)
    return (0.1 * torch.randn(ROWS, width)).to(DEVICE, dtype), torch.rand(ROWS).to(DEVICE)


def gradient_of(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Drawn, and 0 where a row is 0."""
    return torch.where((rows > 0).cpu()[:, None], torch.randn(len(rows), width), 0.0).to(DEVICE)


def neighbours(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float16 values between which float32 values, normal in float16, lie: towards 0, and away from it."""
    bits = value.view(torch.int32) >> naive.DROPPED << naive.DROPPED
    return bits.view(torch.float32), (bits + (1 << naive.DROPPED)).view(torch.float32)


@pytest.mark.parametrize("width", [1, 3, 50, 64, 128, 200, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "given"), [("update", UNIQUE), ("update_repeated", REPEATED), ("update_repeated", UNIQUE)]
)
def test_it_updates_as_torch(name: str, given: list[int], dtype: torch.dtype, width: int) -> None:
    (weight, sums), (exact, exact_sums) = table(width, dtype), table(width, dtype)
    exact = exact.float()
    before = weight.clone()
    for step in range(2):
        rows = torch.tensor(given, device=DEVICE)[step:]
        gradient = gradient_of(rows, width)
        getattr(triton_op, name)(weight, sums, rows, gradient, LR, EPS)
        getattr(naive, name)(exact, exact_sums, rows, gradient, LR, EPS)
        torch.testing.assert_close(sums, exact_sums, rtol=1e-6, atol=1e-9)
        if dtype == torch.float32:
            torch.testing.assert_close(weight, exact, rtol=1e-6, atol=1e-6)
        else:
            spacing = exact.abs().clamp(min=2.0**-14) * 2.0**-10
            assert ((weight.float() - exact).abs() <= spacing + 1e-6).all()
            exact.copy_(weight)  # rounding errors are one step's
    others = [row for row in range(ROWS) if row not in given or row == 0]
    assert torch.equal(weight[others], before[others])
    assert not torch.equal(weight[3], before[3])


def test_the_first_row_learns_where_it_is_no_padding() -> None:
    """As row 0 of a block does, which a process has of a shared table."""
    rows = torch.tensor([0, 5, 0], device=DEVICE)
    weight, sums = table(8, torch.float32)
    before, gradient = weight.clone(), torch.ones(3, 8, device=DEVICE)
    sums.zero_()
    triton_op.update_repeated(weight, sums, rows, gradient, LR, EPS)
    assert sums[[0, 5]].tolist() == [4.0, 1.0]  # of gradients 2 and 1
    torch.testing.assert_close(before[[0, 5]] - weight[[0, 5]], torch.full((2, 8), LR, device=DEVICE))


def test_epsilon_is_added_to_the_root() -> None:
    """Of a gradient as small as it, where a row has learnt nothing yet: half the rate."""
    weight, sums = torch.zeros(2, 8, device=DEVICE), torch.zeros(2, device=DEVICE)
    triton_op.update(weight, sums, torch.tensor([1], device=DEVICE), torch.full((1, 8), EPS, device=DEVICE), LR, EPS)
    torch.testing.assert_close(weight[1], torch.full((8,), -LR / 2, device=DEVICE))


def test_equal_rows_behind_the_last_one_are_not_read() -> None:
    """Memory behind the rows may hold anything, that row too."""
    ordered, gradient = torch.full((8,), 5, device=DEVICE), torch.ones(8, 4, device=DEVICE)
    weight, sums = torch.zeros(6, 4, device=DEVICE), torch.zeros(6, device=DEVICE)
    triton_op._launch(weight, sums, ordered[:3], torch.arange(8, device=DEVICE)[:3], gradient[:3], LR, EPS)
    assert sums[5].item() == 9.0  # of gradient 3


@pytest.mark.parametrize("name", ["update", "update_repeated"])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (3, 0), (0, 0)])
def test_nothing_is_a_size_like_others(rows: int, width: int, name: str) -> None:
    weight, sums = table(width, torch.float16)
    before = weight.clone(), sums.clone()
    nothing = torch.zeros(rows, width, device=DEVICE)
    getattr(triton_op, name)(weight, sums, torch.arange(rows, device=DEVICE), nothing, LR, EPS)
    assert torch.equal(weight, before[0])
    assert torch.equal(sums, before[1])


@pytest.mark.parametrize("n", [1, 127, 128, 129])
def test_numbers_of_rows_about_those_of_a_program(n: int) -> None:
    """Programs of 64 rows; a row whose gradients lie in three programs' places, and one of each other row."""
    for rows in (torch.arange(1, n + 1), torch.cat([torch.full((n,), 5), torch.arange(6, 6 + n)])):
        results = []
        for module in (triton_op, naive):
            torch.manual_seed(n)
            weight, sums = torch.randn(n + 6, 8).to(DEVICE), torch.rand(n + 6).to(DEVICE)
            gradient = torch.randn(len(rows), 8).to(DEVICE)
            module.update_repeated(weight, sums, rows.to(DEVICE), gradient, LR, EPS)
            results.append((weight, sums))
        for ours, twin in zip(*results, strict=True):
            torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["update", "update_repeated"])
def test_without_a_gradient_every_bit_stays(name: str) -> None:
    """All float16 but those that are no number; and what torch makes of them."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(-1, 32)
    values = values[~values.isnan().any(1)].to(DEVICE)
    weight, sums = values.clone(), torch.zeros(len(values), device=DEVICE)
    rows = torch.arange(len(values), device=DEVICE)
    getattr(triton_op, name)(weight, sums, rows, torch.zeros(len(values), 32, device=DEVICE), LR, EPS)
    assert torch.equal(weight.view(torch.int16), values.view(torch.int16))
    assert not sums.any()
    rounded = naive.stochastically(values.float(), torch.float16)
    assert torch.equal(rounded.view(torch.int16), values.view(torch.int16))


def set_to(value: torch.Tensor, seed: int) -> torch.Tensor:
    """What the kernel makes, in float16, of float32 (n, d): 0 less a gradient that rowwise Adagrad takes as it is."""
    torch.manual_seed(seed)
    weight = torch.zeros(value.shape, dtype=torch.float16, device=DEVICE)
    sums = torch.full((len(value),), 2.0**60, device=DEVICE)  # so that no gradient changes them
    rows = torch.arange(len(value), device=DEVICE)
    triton_op.update(weight, sums, rows, -value.to(DEVICE), 2.0**30, 1.0)
    return weight.cpu()


def test_rounding_goes_to_a_neighbour_and_is_right_on_average() -> None:
    value = torch.tensor([0.0201, -0.3333, 1.0, 0.0, 0.70001, 60_001.0])[:, None].expand(-1, 50).contiguous()
    found = torch.stack([set_to(value, seed) for seed in range(200)], 1).flatten(1).double()  # (6, 10,000)
    low, high = (bound[:, :1].double() for bound in neighbours(value))
    assert ((found == low) | (found == high)).all()
    share = ((value[:, :1] - low) / (high - low)).squeeze(1)  # of those rounded away from 0
    mean = ((found - low) / (high - low)).mean(1)
    assert ((mean - share).abs() <= 5 * (share * (1 - share) / found.shape[1]).sqrt()).all()
    assert torch.equal(mean[[2, 3]], share[[2, 3]])


def test_draws_of_rows_and_columns_are_their_own() -> None:
    """Half of all are rounded up, in each column, and two rows or columns agree in half of the cases."""
    up, others = (set_to(torch.full((500, 64), 1 + 2.0**-11), seed) > 1 for seed in (0, 1))
    assert not torch.equal(up, others)
    assert ((up.double().mean(0) - 0.5).abs() < 5 * 0.5 / 500**0.5).all()
    for shift in (1, 2, 3, 4, 5, 16):
        assert abs(float((up[:, shift:] == up[:, :-shift]).double().mean()) - 0.5) < 0.02
        assert abs(float((up[shift:] == up[:-shift]).double().mean()) - 0.5) < 0.02


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's
def test_what_float16_does_not_hold_is_what_torch_makes_of_it() -> None:
    """Past the largest it is infinite, just past it the likelier the farther; and what is no number stays none."""
    value = torch.tensor([65504.0, 65512.0, 65528.0, 65535.9, 65536.0, 1e5, -1e5])
    value = value[:, None].expand(-1, 2000).contiguous()
    ours = set_to(value, 0).isinf().double().mean(1)
    twin = naive.stochastically(value, torch.float16).isinf().double().mean(1)
    torch.testing.assert_close(ours, twin, rtol=0, atol=0.08)
    assert ours[[0, 4, 5, 6]].tolist() == [0, 1, 1, 1]
    assert set_to(torch.full((3, 8), torch.nan), 0).isnan().all()


def test_not_a_number_stays_one() -> None:
    """Also the NaN that a GPU makes, all of whose bits but the sign are set."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1]).to(torch.int32)
    value = bits.view(torch.float32)[:, None].expand(-1, 100).contiguous()
    assert naive.stochastically(value, torch.float16).isnan().all()
    weight, sums = torch.zeros(3, 100, dtype=torch.float16, device=DEVICE), torch.ones(3, device=DEVICE)
    triton_op.update(weight, sums, torch.arange(3, device=DEVICE), value.to(DEVICE), LR, EPS)
    assert weight.isnan().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_on_cuda_the_kernel_does_the_work(
    deterministic: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not torch, which gives the same. On a CPU: of tensors that fit, as those on CUDA do."""
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("the kernel runs on CUDA here")
        monkeypatch.setattr(rowwise_table, "fits_triton", lambda *_: True)
        monkeypatch.setattr(fbgemm, "fits", lambda _: False)
    monkeypatch.setattr(naive, "learnt", lambda *_: pytest.fail("torch does the work"))
    learns = RowwiseTable(ROWS, 8, LR, dtype).to(device)
    learns.weight.fill_(1.0)
    torch.use_deterministic_algorithms(deterministic)
    try:
        learns(torch.tensor([3, 0, 7], device=device)).sum().backward()
        again = torch.tensor([7, 3, 7], device=device)
        gradient = torch.ones(3, 8, device=device)
        rowwise_table.update_repeated(learns.weight, learns.sums, again, gradient, LR, EPS)
    finally:
        torch.use_deterministic_algorithms(False)
    assert learns.sums[[0, 3, 7]].tolist() == [0, 2, 5]
    assert (learns.weight[[3, 7]] < 1).all()


@pytest.mark.parametrize("why", ["wide", "strided", "on a CPU"])
def test_what_does_not_fit_is_left_to_torch(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why != "on a CPU":
        monkeypatch.setattr(rowwise_table, "fits_triton", lambda *_: True)
    width = rowwise_table._WIDEST + 1 if why == "wide" else 8
    weight = torch.zeros(2, 2 * width)[:, ::2] if why == "strided" else torch.zeros(2, width)
    assert rowwise_table._updates(weight, torch.zeros(2), torch.zeros(1, width)) is naive


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no bfloat16")
def test_bfloat16_is_rounded_to_the_nearest() -> None:
    (weight, sums), (exact, exact_sums) = table(50, torch.bfloat16), table(50, torch.bfloat16)
    rows = torch.tensor(UNIQUE, device=DEVICE)
    gradient = gradient_of(rows, 50)
    triton_op.update(weight, sums, rows, gradient, LR, EPS)
    naive.update(exact, exact_sums, rows, gradient, LR, EPS)
    torch.testing.assert_close(weight, exact, rtol=2.0**-7, atol=1e-6)
    torch.testing.assert_close(sums, exact_sums)


@pytest.mark.gpu
def test_equal_steps_give_equal_bytes() -> None:
    """The gradients of a row are added up in one order."""
    torch.manual_seed(0)
    rows, gradient = torch.randint(0, 500, (4000,), device="cuda"), torch.randn(4000, 64, device="cuda")
    found = []
    for _ in range(5):
        torch.manual_seed(1)
        weight, sums = torch.ones(500, 64, dtype=torch.float16, device="cuda"), torch.ones(500, device="cuda")
        triton_op.update_repeated(weight, sums, rows, gradient, LR, EPS)
        found.append((weight, sums))
    assert all(torch.equal(*pair) for one in found[1:] for pair in zip(found[0], one, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 16, 50, 64, 100, 200, 256, 600, 1024, 8192])
@pytest.mark.parametrize("name", ["update", "update_repeated"])
def test_many_rows_at_once(name: str, width: int) -> None:
    """So many programs that they do not all run together: no thread reads a sum that another has written."""
    torch.manual_seed(width)
    n = min(50_000, 2**25 // width)
    rows = torch.randperm(n, device="cuda") if name == "update" else torch.randint(0, n // 2, (n,), device="cuda")
    gradient = torch.randn(n, width, device="cuda")
    start = 0.1 * torch.randn(n, width, device="cuda"), torch.rand(n, device="cuda")
    (weight, sums), (exact, exact_sums) = ([tensor.clone() for tensor in start] for _ in range(2))
    for _ in range(3):
        getattr(triton_op, name)(weight, sums, rows, gradient, LR, EPS)
        getattr(naive, name)(exact, exact_sums, rows, gradient, LR, EPS)
    torch.testing.assert_close(sums, exact_sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["update", "update_repeated"])
def test_each_replay_of_a_cuda_graph_draws_anew(name: str) -> None:
    weight, sums = torch.zeros(64, 50, dtype=torch.float16, device="cuda"), torch.full((64,), 2.0**60, device="cuda")
    rows, gradient = torch.arange(64, device="cuda"), torch.full((64, 50), -1 - 2.0**-11, device="cuda")

    def step() -> None:
        weight.zero_()
        getattr(triton_op, name)(weight, sums, rows, gradient, 2.0**30, 1.0)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(weight.clone())
    assert not torch.equal(*draws)
    for drawn in draws:
        assert ((drawn == 1) | (drawn == 1 + 2.0**-10)).all()
        assert abs(float((drawn > 1).double().mean()) - 0.5) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["update", "update_repeated"])
def test_the_host_does_not_wait(name: str) -> None:
    weight, sums = torch.zeros(64, 50, dtype=torch.float16, device="cuda"), torch.zeros(64, device="cuda")
    rows, gradient = torch.arange(64, device="cuda"), torch.ones(64, 50, device="cuda")
    getattr(triton_op, name)(weight, sums, rows, gradient, LR, EPS)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(triton_op, name)(weight, sums, rows, gradient, LR, EPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")

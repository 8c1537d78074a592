"""The jagged operations: fbgemm and its torch twin give the same values and gradients."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import jagged
from kernels.jagged import fbgemm, naive

ROOT = Path(__file__).resolve().parents[2]
IMPLEMENTATIONS = [naive, *([fbgemm] if fbgemm.available() else [])]
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64]
needs_fbgemm = pytest.mark.skipif(not fbgemm.available(), reason="fbgemm_gpu is not installed")

lengths_lists = st.lists(st.integers(0, 7), min_size=1, max_size=6)


@given(lengths=lengths_lists, dim=st.integers(1, 5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_padded_rows_hold_their_values_and_zeros_behind(lengths: list[int], dim: int) -> None:
    offsets = jagged.offsets_from_lengths(torch.tensor(lengths))
    values = torch.randn(sum(lengths), dim)
    padded = jagged.to_padded(values, offsets, 8)
    assert padded.shape == (len(lengths), 8, dim)
    start = 0
    for row, length in zip(padded, lengths, strict=True):
        assert torch.equal(row[:length], values[start : start + length])
        assert not row[length:].any()
        start += length
    assert torch.equal(jagged.to_jagged(padded, offsets), values)
    for module in IMPLEMENTATIONS:
        assert torch.equal(module.to_jagged(padded, offsets, len(values)), values)


@given(lengths=lengths_lists)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_sequences_and_positions_of_values_are_counted(lengths: list[int]) -> None:
    sequence_id, position = naive.sequence_and_position(naive.offsets_from_lengths(torch.tensor(lengths)), sum(lengths))
    assert sequence_id.tolist() == [number for number, length in enumerate(lengths) for _ in range(length)]
    assert position.tolist() == [place for length in lengths for place in range(length)]
    assert sequence_id.dtype == position.dtype == torch.int64


@given(lengths=lengths_lists, dim=st.integers(1, 5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_padding_with_a_given_index_is_padding_in_values_and_gradients(lengths: list[int], dim: int) -> None:
    offsets = naive.offsets_from_lengths(torch.tensor(lengths))
    sequence_id, position = naive.sequence_and_position(offsets, sum(lengths))
    results = []
    for index in (None, sequence_id * 7 + position):
        values = torch.arange(float(sum(lengths) * dim)).view(-1, dim).requires_grad_()
        padded = naive.to_padded(values, offsets, 7, index)
        torch.manual_seed(0)
        results.append((padded, *torch.autograd.grad(padded, values, torch.randn_like(padded))))
    for given_index, found in zip(*results, strict=True):
        assert torch.equal(given_index, found)


@given(lengths=lengths_lists, dim=st.integers(1, 4), data=st.data())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_selected_rows_are_those_rows_in_that_order(lengths: list[int], dim: int, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    offsets = naive.offsets_from_lengths(torch.tensor(lengths))
    results = []
    for operations in (naive, *([fbgemm] if fbgemm.available() else [])):
        values = torch.randn(sum(lengths), dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
        selected, selected_offsets = operations.select_rows(values, offsets, torch.tensor(chosen))
        expected = torch.cat([values[offsets[row] : offsets[row + 1]] for row in chosen])
        assert torch.equal(selected, expected)
        assert selected_offsets.diff().tolist() == [lengths[row] for row in chosen]
        results.append(torch.autograd.grad(selected, values, 2 * selected.detach())[0])
    torch.testing.assert_close(results[0], results[-1])


@needs_fbgemm
@given(lengths=lengths_lists, dim=st.integers(1, 5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_fbgemm_equals_its_twin_in_values_and_gradients(lengths: list[int], dim: int) -> None:
    counts = torch.tensor(lengths)
    offsets = naive.offsets_from_lengths(counts)
    assert torch.equal(fbgemm.offsets_from_lengths(counts), offsets)
    results = []
    for operations in (fbgemm, naive):
        values = torch.arange(float(sum(lengths) * dim)).view(-1, dim).requires_grad_()
        padded = operations.to_padded(values, offsets, 7)
        back = operations.to_jagged(padded * 2, offsets)
        torch.manual_seed(0)
        gradients = torch.autograd.grad([padded, back], values, [torch.randn_like(padded), torch.randn_like(back)])
        results.append((padded, back, *gradients))
    for ours, twin in zip(*results, strict=True):
        assert torch.equal(ours, twin)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_where_it_is_installed_fbgemm_does_the_work(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All four operations; its twin would give the same, so that nobody saw that it never does."""
    with fbgemm.root_logger_kept():
        library = pytest.importorskip("fbgemm_gpu")
    if device == "cuda" and library.__variant__ == "cpu":
        pytest.skip("fbgemm_gpu is the CPU build")
    for name in ("offsets_from_lengths", "to_padded", "to_jagged", "select_rows"):
        monkeypatch.setattr(naive, name, lambda *_: pytest.fail("torch does the work"))
    values = torch.ones(5, 2, device=device).to(dtype)
    assert fbgemm.fits(values)
    offsets = jagged.offsets_from_lengths(torch.tensor([2, 0, 3], device=device))
    padded = jagged.to_padded(values, offsets, 3)
    assert torch.equal(jagged.to_jagged(padded, offsets, 5), values)
    assert len(jagged.select_rows(values, offsets, torch.tensor([2, 0], device=device))[0]) == 5


@pytest.mark.parametrize(
    ("columns", "device", "by"),
    [
        (0, "cuda", "torch"),
        (1, "cuda", "fbgemm"),
        (1024, "cuda", "fbgemm"),
        (1025, "cuda", "torch"),
        (1025, "cpu", "fbgemm"),
    ],
)
def test_widths_at_which_fbgemm_selects_no_rows_on_cuda_go_to_the_twin(
    columns: int, device: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fbgemm, "_fits_device", lambda _: True)
    for module, name in ((fbgemm, "fbgemm"), (naive, "torch")):
        monkeypatch.setattr(module, "select_rows", lambda *_, name=name: name)
    values: Any = SimpleNamespace(
        is_cuda=device == "cuda", device=torch.device(device), dtype=torch.float32, shape=(3, columns)
    )
    assert jagged.select_rows(values, OFFSETS, ROWS) == by


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [0, 1024, 1025])
def test_rows_of_any_width_are_selected_on_cuda(columns: int) -> None:
    values = torch.randn(3, columns, device="cuda", requires_grad=True)
    offsets, rows = OFFSETS.cuda(), ROWS.cuda()
    selected, starts = jagged.select_rows(values, offsets, rows)
    assert torch.equal(selected, values[[2, 0, 1, 0, 1]])
    assert starts.tolist() == [0, 1, 3, 5]
    (gradient,) = torch.autograd.grad(selected.sum(), values)
    assert torch.equal(gradient, torch.tensor([2.0, 2.0, 1.0], device="cuda")[:, None].expand(3, columns))


def test_types_fbgemm_lacks_go_to_the_twin() -> None:
    offsets = torch.tensor([0, 2, 3])
    values = torch.randn(3, 2, dtype=torch.float64)
    assert not fbgemm.fits(values)
    assert torch.equal(jagged.to_jagged(jagged.to_padded(values, offsets, 2), offsets), values)


def test_a_build_that_does_not_fit_warns_and_leaves_the_work_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def broken(name: str, *arguments: object, **options: object) -> object:
        if name == "fbgemm_gpu":
            raise OSError("undefined symbol: _ZN3c10")
        return real(name, *arguments, **options)

    fbgemm.available.cache_clear()
    monkeypatch.setattr(builtins, "__import__", broken)
    try:
        with pytest.warns(UserWarning, match="does not fit this torch"):
            assert not fbgemm.fits(torch.zeros(1))
    finally:
        monkeypatch.undo()
        fbgemm.available.cache_clear()


OFFSETS, ROWS = torch.tensor([0, 2, 2, 3]), torch.tensor([2, 0, 0])
#: Each differentiable operation on values (3, 2), and how often its output holds each of the three.
OPERATIONS: dict[str, tuple[Callable[[ModuleType, torch.Tensor], torch.Tensor], list[int]]] = {
    "to_padded": (lambda module, values: module.to_padded(values, OFFSETS, 4), [1, 1, 1]),
    "to_jagged": (
        lambda module, values: module.to_jagged(torch.stack([values[:2], values[1:], values[[2, 0]]]), OFFSETS),
        [1, 1, 1],
    ),
    "select_rows": (lambda module, values: module.select_rows(values, OFFSETS, ROWS)[0], [2, 2, 1]),
}


@pytest.mark.parametrize("module", IMPLEMENTATIONS, ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_of_every_order_are_right(name: str, module: ModuleType) -> None:
    """d^n/dx^n of the sum of y^4, where y are the values, each taken `count` times: count 4 x^3, 12 x^2, 24 x, 24."""
    operation, counts = OPERATIONS[name]
    count = torch.tensor(counts)[:, None].float()
    values = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-1.5, 2.0]], requires_grad=True)
    derivative = (operation(module, values) ** 4).sum()
    for factor, power in ((4.0, 3), (12.0, 2), (24.0, 1)):
        (derivative,) = torch.autograd.grad(derivative.sum(), values, create_graph=True)
        torch.testing.assert_close(derivative, count * factor * values**power)


@needs_fbgemm
@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_derivatives_through_fbgemm_are_refused(name: str) -> None:
    values = torch.ones(3, 2)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(lambda given: OPERATIONS[name][0](fbgemm, given), (values,), (values,))
    _, tangent = torch.func.jvp(lambda given: OPERATIONS[name][0](naive, given), (values,), (values,))
    assert tangent.sum() == 2 * sum(OPERATIONS[name][1])


@needs_fbgemm
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_and_under_inference_mode_fbgemm_gives_the_same(name: str, dtype: torch.dtype) -> None:
    def call(values: torch.Tensor) -> torch.Tensor:
        return OPERATIONS[name][0](fbgemm, values * 2) * 3

    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=name == "to_padded")
    values = torch.tensor([[1, -2], [3, 5], [-1, 2]]).to(dtype)
    with torch.inference_mode():
        expected = OPERATIONS[name][0](naive, values * 2) * 3
        assert torch.equal(call(values), expected)
    values.requires_grad_(dtype.is_floating_point)
    found = compiled(values)
    assert torch.equal(found.detach(), expected)
    if dtype.is_floating_point:
        (gradient,) = torch.autograd.grad(found.sum(), values)
        assert torch.equal(gradient, 6 * torch.tensor(OPERATIONS[name][1])[:, None].expand(3, 2).to(dtype))


@pytest.mark.parametrize("module", IMPLEMENTATIONS, ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [2, 0, 1]], ids=str)
def test_nothing_is_a_size_like_others(lengths: list[int], dim: int, dtype: torch.dtype, module: ModuleType) -> None:
    """No rows, rows of no values, values of no columns, no rows selected: forward and backward."""
    offsets = module.offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))
    assert offsets.tolist() == [sum(lengths[:row]) for row in range(len(lengths) + 1)]

    def leaf(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype).requires_grad_(dtype.is_floating_point)

    def check(found: torch.Tensor, shape: tuple[int, ...], given: torch.Tensor, times: list[int]) -> None:
        assert found.shape == shape
        assert found.dtype == dtype
        if dtype.is_floating_point:
            (gradient,) = torch.autograd.grad(found.sum(), given)
            rows = gradient.reshape(len(times), dim)
            assert torch.equal(rows, torch.tensor(times, dtype=dtype)[:, None].expand(-1, dim))

    for width in (0, 3) if not sum(lengths) else (3,):
        values, padded = leaf(sum(lengths), dim), leaf(len(lengths), width, dim)
        check(module.to_padded(values, offsets, width), (len(lengths), width, dim), values, [1] * sum(lengths))
        held = [int(place < length) for length in lengths for place in range(width)]
        check(module.to_jagged(padded, offsets), (sum(lengths), dim), padded, held)
    for rows in ([], [0], [0, 0]) if lengths else ([],):
        values = leaf(sum(lengths), dim)
        selected, starts = module.select_rows(values, offsets, torch.tensor(rows, dtype=torch.int64))
        assert starts.tolist() == [lengths[0] * count for count in range(len(rows) + 1)] if lengths else [0]
        times = [len(rows)] * sum(lengths[:1]) + [0] * sum(lengths[1:])
        check(selected, (len(rows) * sum(lengths[:1]), dim), values, times)


@pytest.mark.parametrize("module", IMPLEMENTATIONS, ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_row_given_often_adds_up_in_half_precision(dtype: torch.dtype, module: ModuleType) -> None:
    values = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    selected, _ = module.select_rows(values, torch.tensor([0, 1, 2]), torch.zeros(5000, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(selected, values, torch.ones_like(selected))
    assert torch.equal(gradient[0], torch.tensor(5000.0, dtype=dtype).expand(4))


@needs_fbgemm
@pytest.mark.parametrize("configured", [False, True])
def test_loading_fbgemm_leaves_the_root_logger_as_it_was(configured: bool) -> None:
    code = f"""
import logging, torch
root = logging.getLogger()
if {configured}:
    logging.basicConfig(level=logging.ERROR)
before = list(root.handlers), root.level
from kernels.jagged import fbgemm
from kernels.rowwise_table import RowwiseTable
assert fbgemm.available()
assert (root.handlers, root.level) == before, root.handlers
table = RowwiseTable(10, 8, 0.1, torch.float32)
table.weight.fill_(1.0)
for table.lr in (0.1, 0.2):
    table(torch.tensor([1, 2])).sum().backward()
assert table._fused is not None
assert (root.handlers, root.level) == before, root.handlers
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("error", "warned"),
    [
        (ModuleNotFoundError("No module named 'fbgemm_gpu'", name="fbgemm_gpu"), False),
        (ModuleNotFoundError("No module named 'numpy'", name="numpy"), True),
        (AttributeError("module 'torch' has no attribute 'x'"), True),
    ],
    ids=["not installed", "lacks a package", "another torch"],
)
def test_fbgemm_is_left_out_without_a_word_only_where_it_is_not_installed(
    error: Exception, warned: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    import builtins

    real = builtins.__import__

    def broken(name: str, *arguments: object, **options: object) -> object:
        if name == "fbgemm_gpu":
            raise error
        return real(name, *arguments, **options)

    fbgemm.available.cache_clear()
    monkeypatch.setattr(builtins, "__import__", broken)
    try:
        assert not fbgemm.available()
    finally:
        monkeypatch.undo()
        fbgemm.available.cache_clear()
    assert ["does not fit this torch" in str(warning.message) for warning in recwarn] == ([True] if warned else [])

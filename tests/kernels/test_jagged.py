"""The jagged operations: fbgemm and its torch twin give the same values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import jagged
from kernels.jagged import fbgemm, naive

lengths_lists = st.lists(st.integers(0, 7), min_size=1, max_size=6)


@given(lengths=lengths_lists, dim=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
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


@given(lengths=lengths_lists, dim=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_padding_with_a_given_index_is_padding_in_values_and_gradients(lengths: list[int], dim: int) -> None:
    offsets = naive.offsets_from_lengths(torch.tensor(lengths))
    row, place = naive.row_and_place(offsets, sum(lengths))
    results = []
    for index in (None, row * 7 + place):
        values = torch.arange(float(sum(lengths) * dim)).view(-1, dim).requires_grad_()
        padded = naive.to_padded(values, offsets, 7, index)
        torch.manual_seed(0)
        results.append((padded, *torch.autograd.grad(padded, values, torch.randn_like(padded))))
    for given_index, found in zip(*results, strict=True):
        assert torch.equal(given_index, found)


@given(lengths=lengths_lists, dim=st.integers(1, 4), data=st.data())
@settings(max_examples=50, deadline=None)
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


@pytest.mark.skipif(not fbgemm.available(), reason="fbgemm_gpu is not installed")
@given(lengths=lengths_lists, dim=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
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

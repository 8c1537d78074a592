"""The masks: by hand, by a loop over pairs, and in the Triton kernels against the torch version."""

import itertools
import random
from typing import Any

import pytest
import torch
from drawn_masks import offsets_of, random_mask
from masks_by_hand import TABLES, Table

from kernels.hstu_attention import cached_attention, grouped, hstu_attention, naive, softmax_attention
from kernels.hstu_attention.mask import Mask, cut_mask


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.settings}: {table.rows}")
def test_masks_by_hand(table: Table) -> None:
    """Alone, and behind another sequence in a wider padding."""
    seen, keys = table.seen(), table.num_keys()
    wanted = torch.tensor(seen).view(len(seen), keys)
    for before in ([], [7]):
        queries, of_keys = offsets_of([*before, len(seen)]), offsets_of([*before, keys])
        targets = None if table.targets() is None else torch.tensor([*before, table.targets()])
        key_offsets = None if len(seen) == keys else of_keys
        width = max(len(seen), keys) + 3 * len(before)
        found = naive.visible(queries, width, Mask(**table.options()), targets, key_offsets)[-1]
        assert torch.equal(found[: len(seen), :keys], wanted)


def sees(i: int, j: int, keys: int, targets: int, mask: Mask) -> bool:
    """The rule, for one pair of positions."""
    history = max(keys - targets, 0)
    prefix = mask.contextual_seq_len
    end = history - (prefix - 1 if prefix > 0 else 0)

    def place(position: int) -> int:
        return min(max(position - prefix + 1, 0) if prefix > 0 else position, end)

    if i < 0:
        return False
    if i == j:
        return True
    if (
        i >= history
        and j >= history
        and (i - history) // mask.target_group_size == (j - history) // mask.target_group_size
        and (j < i or not mask.causal)
    ):
        return True
    if prefix > 0 and place(i) == 0 and place(j) < end:
        return True
    distance = place(i) - place(j) if mask.causal else abs(place(i) - place(j))
    if distance <= 0:
        return False
    if mask.max_attn_len == 0 or distance <= mask.max_attn_len:
        return True
    newest = mask.min_full_attn_seq_len > 0 and place(i) >= end - mask.min_full_attn_seq_len
    return newest or j < mask.num_sink_tokens


def test_masks_pair_by_pair() -> None:
    draw = random.Random(0)
    for _ in range(500):
        keys = [draw.randint(0, 12) for _ in range(3)]
        queries = [draw.randint(0, 12) for _ in range(3)] if draw.random() < 0.5 else keys
        targets = [draw.randint(0, 6) for _ in range(3)] if draw.random() < 0.5 else None
        mask = random_mask(draw, targets is not None)
        found = naive.visible(
            offsets_of(queries), 12, mask, None if targets is None else torch.tensor(targets),
            None if queries is keys else offsets_of(keys),
        )  # fmt: skip
        found = found.expand(3, 12, 12)
        for row in range(3):
            for r in range(queries[row]):
                i = keys[row] - queries[row] + r
                wanted = [sees(i, j, keys[row], targets[row] if targets else 0, mask) for j in range(keys[row])]
                assert found[row, r, : keys[row]].tolist() == wanted, (mask, keys, queries, targets, row, r)


def test_all_rows_of_up_to_six_tokens() -> None:
    """Every number of tokens and of targets, under every mask of small numbers."""
    rows = [(n, m) for n in range(7) for m in range(n + 1)]
    lengths, targets = map(list, zip(*rows, strict=True))
    windows = [(0, 0, 0), *itertools.product((1, 2, 4), (0, 1, 2), (0, 1, 3))]
    for (window, full, sinks), prefix, causal, group in itertools.product(windows, range(5), (True, False), (1, 2, 3)):
        mask = Mask(window, prefix, full, sinks, causal, group)
        found = naive.visible(offsets_of(lengths), 6, mask, torch.tensor(targets))
        for row, (n, m) in enumerate(rows):
            wanted = [[sees(i, j, n, m, mask) for j in range(n)] for i in range(n)]
            assert found[row, :n, :n].tolist() == wanted, (mask, n, m)


def attention_inputs(queries: list[int], keys: list[int]) -> dict[str, Any]:
    torch.manual_seed(sum(queries) + 3 * sum(keys))
    q, k = torch.randn(sum(queries), 2, 3).double(), torch.randn(sum(keys), 2, 3).double()
    v = torch.randn(sum(keys), 2, 4).double()
    return {
        "q": q, "k": k, "v": v, "offsets": offsets_of(queries), "max_len": max(*queries, *keys),
        "position_bias": torch.randn(41).double(), "time_bias": torch.randn(naive.TIME_BUCKETS).double(),
        "query_time": torch.randint(0, 10**6, (len(q),)), "key_time": torch.randint(0, 10**6, (len(k),)),
        "key_offsets": offsets_of(keys),
    }  # fmt: skip


@pytest.mark.parametrize("attend", [hstu_attention, softmax_attention])
def test_appended_queries_have_the_outputs_of_the_whole_sequence(attend: Any) -> None:
    whole = attention_inputs([9, 4, 0, 6], [9, 4, 0, 6])
    whole.pop("key_offsets")
    lengths, appended = [9, 4, 0, 6], [2, 4, 0, 1]
    last = torch.cat([torch.arange(9)[-2:], 9 + torch.arange(4), 13 + torch.arange(6)[-1:]])
    part = whole | {"q": whole["q"][last], "offsets": offsets_of(appended), "key_offsets": offsets_of(lengths)}
    part["query_time"] = whole["query_time"][last]
    masks = [{}, {"max_attn_len": 2, "num_sink_tokens": 1}, {"contextual_seq_len": 2}, {"causal": False}]
    for options in (*masks, {"num_targets": torch.tensor([3, 1, 0, 2]), "target_group_size": 2}):
        torch.testing.assert_close(attend(**part, **options), attend(**whole, **options)[last])


@pytest.mark.parametrize("attend", [hstu_attention, softmax_attention])
def test_queries_before_the_first_key_are_zero(attend: Any) -> None:
    given = attention_inputs([5, 3, 2], [2, 0, 4])
    for name in ("q", "k", "v", "position_bias", "time_bias"):
        given[name].requires_grad_()
    output = attend(**given)
    blind = torch.tensor([0, 1, 2, 5, 6, 7])
    assert (output[blind] == 0).all()
    assert (output[[3, 4, 8, 9]] != 0).all()
    output.square().sum().backward()
    assert (given["q"].grad[blind] == 0).all()
    assert all(given[name].grad.isfinite().all() for name in ("q", "k", "v", "position_bias", "time_bias"))


def test_an_attention_scale_for_each_query() -> None:
    given = attention_inputs([4, 2], [5, 3])
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.5, 10.0])
    expected = hstu_attention(**given, attention_scale=1.0) / scale.double()[:, None, None]
    torch.testing.assert_close(hstu_attention(**given, attention_scale=scale), expected)
    with pytest.raises(ValueError, match=r"attention_scale must be \(6,\)"):
        hstu_attention(**given, attention_scale=scale[1:])
    with pytest.raises(ValueError, match="attention_scale gets no gradient"):
        hstu_attention(**given, attention_scale=scale.requires_grad_())


def test_own_length_is_that_of_the_keys() -> None:
    given = attention_inputs([2, 1], [5, 3])
    by_hand = torch.tensor([4.0, 4.0, 3.0])  # of five, two targets count as one
    options = {"num_targets": torch.tensor([2, 0])}
    expected = hstu_attention(**given, **options, attention_scale=by_hand)
    torch.testing.assert_close(hstu_attention(**given, **options), expected)


@pytest.mark.parametrize("name", ["hstu_attention", "softmax_attention"])
def test_rows_grouped_by_length_give_the_same_with_keys_of_their_own(name: str) -> None:
    queries, keys = [20, 1, 0, 3, 2, 5, 1, 4], [3, 19, 2, 1, 0, 4, 2, 1]
    given = attention_inputs(queries, keys) | {"max_attn_len": 3, "num_targets": torch.arange(8) % 3}
    if name == "hstu_attention":
        given["attention_scale"] = torch.arange(1.0, 1 + sum(queries))
    attend = getattr(naive, name)
    torch.testing.assert_close(grouped.by_length(attend, **given), attend(**given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_full_attn_seq_len": 2}, "min_full_attn_seq_len lifts the window, and there is none"),
        ({"num_sink_tokens": 2}, "num_sink_tokens lifts the window, and there is none"),
        ({"target_group_size": 2}, "target_group_size groups targets, and there are none"),
        ({"target_group_size": 0, "num_targets": torch.ones(2, dtype=torch.int64)}, "must be at least 1, not 0"),
        ({"max_attn_len": 2, "num_sink_tokens": -1}, "num_sink_tokens must not be negative"),
        ({"max_attn_len": 2, "min_full_attn_seq_len": -1}, "min_full_attn_seq_len must not be negative"),
        ({"key_offsets": torch.tensor([0, 5])}, r"key_offsets must be \(3,\)"),
        ({"key_offsets": None}, r"must be \(T, h, dqk\), \(T, h, dqk\) and \(T, h, dv\)"),
        ({"key_time": torch.zeros(6, dtype=torch.int64)}, r"key_time must be \(8,\)"),
    ],
)
def test_masks_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    given = attention_inputs([4, 2], [5, 3])
    for attend in (hstu_attention, softmax_attention):
        with pytest.raises(ValueError, match=message):
            attend(**given | options)


def test_a_cache_refuses_sinks_without_a_window() -> None:
    given = attention_inputs([1], [2])
    k, v = given["k"][:1], given["v"][:1]
    with pytest.raises(ValueError, match="num_sink_tokens lifts the window"):
        cached_attention(
            given["q"], k, v, offsets_of([1]), given["k"], given["v"], offsets_of([2]), 1, 2, num_sink_tokens=1
        )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # 1 / (1 + inf), interpreted
@pytest.mark.parametrize("attend", [hstu_attention, softmax_attention])
def test_masks_are_compiled_into_one_graph(attend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators forward and backward, with shapes that change: what they say of theirs is right."""
    pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)
    monkeypatch.setattr("kernels.hstu_attention.fits_triton", lambda *_: True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for queries, keys in (([5, 0, 7], [6, 2, 7]), ([9, 3], [2, 4])):
        given = attention_inputs(queries, keys)
        given |= {"num_targets": torch.tensor([2, 0, 9][: len(keys)]), "target_group_size": 2, "causal": False}
        given |= {"max_attn_len": 2, "num_sink_tokens": 1, "min_full_attn_seq_len": 1, "contextual_seq_len": 2}
        if attend is hstu_attention:
            given["attention_scale"] = torch.arange(1.0, 1 + sum(queries))
        names = ("q", "k", "v", "position_bias", "time_bias")
        given = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in given.items()}
        given |= {name: given[name].float().requires_grad_() for name in names}
        found, expected = (version(**given) for version in (compiled, attend))
        torch.testing.assert_close(found, expected)
        wanted = [given[name] for name in names]
        one, other = (torch.autograd.grad(output.square().sum(), wanted) for output in (found, expected))
        for name, ours, same in zip(names, one, other, strict=True):
            torch.testing.assert_close(ours, same, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("name", ["max_attn_len", "num_sink_tokens", "min_full_attn_seq_len", "target_group_size"])
@pytest.mark.parametrize("number", [2**31 - 1, 2**40])
def test_numbers_that_mean_no_limit_are_cut_to_ones_that_mean_the_same(name: str, number: int) -> None:
    offsets, targets = torch.tensor([0, 7, 9]), torch.tensor([3, 1])
    mask = Mask(max_attn_len=2)._replace(**{name: number})
    cut = cut_mask(mask, 7)
    assert max(cut._replace(causal=True)) <= 8
    assert torch.equal(naive.visible(offsets, 7, mask, targets), naive.visible(offsets, 7, cut, targets))


def test_a_prefix_longer_than_every_sequence_stays_so_when_it_is_cut() -> None:
    offsets = torch.tensor([0, 7, 9])
    mask = Mask(contextual_seq_len=2**40)
    assert torch.equal(naive.visible(offsets, 7, mask, None), naive.visible(offsets, 7, cut_mask(mask, 7), None))

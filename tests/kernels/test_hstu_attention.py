"""HSTU attention against the equations, written out as loops in float64."""

import inspect
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels.hstu_attention import (
    TIME_BUCKETS,
    appended_attention,
    cached_attention,
    grouped,
    hstu_attention,
    naive,
    softmax_attention,
    time_bucket,
)


def bucket_by_hand(seconds: int) -> int:
    return min(max(math.floor(math.log(max(1, abs(seconds))) / 0.301), 0), 128)


def attention_by_hand(q, k, v, offsets, alpha, attention_scale, position, time, query_time, key_time):
    """O_i = sum_j silu(alpha q_i.k_j + p[j - i] + w[bucket(tq_i - tk_j)]) / N v_j, one number at a time."""
    output = torch.zeros_like(v)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        n = attention_scale or end - start
        for head in range(v.shape[1]):
            for i in range(start, end):
                for j in range(start, i + 1):
                    score = alpha * sum(float(a) * float(b) for a, b in zip(q[i, head], k[j, head], strict=True))
                    if position is not None:
                        score += float(position[(len(position) - 1) // 2 + j - i])
                    if time is not None:
                        score += float(time[bucket_by_hand(int(query_time[i] - key_time[j]))])
                    output[i, head] += score / (1 + math.exp(-score)) / n * v[j, head]
    return output


def inputs(lengths: list[int], heads: int = 2, dqk: int = 3, dv: int = 4):
    torch.manual_seed(sum(lengths))
    total = sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    q, k = torch.randn(2, total, heads, dqk, dtype=torch.float64)
    v = torch.randn(total, heads, dv, dtype=torch.float64)
    position = torch.randn(2 * 211 - 1, dtype=torch.float64)
    time = torch.randn(TIME_BUCKETS, dtype=torch.float64)
    key_time = torch.randint(0, 10**6, (total,))
    key_time[1::3] = key_time[0]  # equal timestamps
    query_time = key_time.roll(-1)
    query_time[-1] = key_time[-1] + 2**62  # beyond the last bucket, and beyond 32 bits
    return q, k, v, offsets, position, time, query_time, key_time


@pytest.mark.parametrize("lengths", [[1], [5, 0, 1, 7], [2, 2, 2]])
@pytest.mark.parametrize("attention_scale", [211.0, None])
@pytest.mark.parametrize("biases", ["none", "position", "time", "both"])
def test_values_equal_the_equations(lengths: list[int], attention_scale: float | None, biases: str) -> None:
    q, k, v, offsets, position, time, query_time, key_time = inputs(lengths)
    position = position if biases in ("position", "both") else None
    time = time if biases in ("time", "both") else None
    expected = attention_by_hand(q, k, v, offsets, 0.7, attention_scale, position, time, query_time, key_time)
    options = {"alpha": 0.7, "attention_scale": attention_scale, "query_time": query_time, "key_time": key_time}
    output = hstu_attention(q, k, v, offsets, max(lengths), position_bias=position, time_bias=time, **options)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    # A wider padding changes nothing.
    wider = hstu_attention(q, k, v, offsets, 211, position_bias=position, time_bias=time, **options)
    torch.testing.assert_close(wider, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
def test_softmax_attention_equals_torch_with_the_bias_as_a_mask(biased: bool) -> None:
    q, k, v, offsets, position, time, query_time, key_time = inputs([5, 1, 9])
    bias = {"position_bias": position, "time_bias": time, "query_time": query_time, "key_time": key_time}
    output = softmax_attention(q, k, v, offsets, 12, alpha=0.3, **(bias if biased else {}))
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        mask = torch.full((end - start, end - start), -torch.inf, dtype=torch.float64).triu(1)
        if biased:
            for i in range(end - start):
                for j in range(i + 1):
                    seconds = int(query_time[start + i] - key_time[start + j])
                    mask[i, j] += position[210 + j - i] + time[bucket_by_hand(seconds)]
        heads = [tensor[start:end].transpose(0, 1) for tensor in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(output[start:end], expected.transpose(0, 1), rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    q, k, v, offsets, position, time, query_time, key_time = inputs([4, 1, 3], heads=1, dqk=2, dv=2)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v, position[200:221].clone(), time)]

    def attention(q, k, v, position, time):
        options = {"position_bias": position, "time_bias": time, "query_time": query_time, "key_time": key_time}
        return hstu_attention(q, k, v, offsets, 4, attention_scale=5.0, **options)

    assert torch.autograd.gradcheck(attention, tensors)


def test_buckets_equal_the_formula_on_every_edge_and_beyond() -> None:
    edges = [math.ceil(math.exp(0.301 * bucket)) + shift for bucket in range(1, 100) for shift in (-1, 0, 1)]
    seconds = [0, 1, 2, *edges, 10**15, 10**17, 2**62]
    expected = [bucket_by_hand(value) for value in seconds]
    assert time_bucket(torch.tensor(seconds)).tolist() == expected
    assert time_bucket(-torch.tensor(seconds)).tolist() == expected
    assert expected[-1] == 128


def test_time_bias_without_times_is_an_error() -> None:
    q, k, v, offsets, _, time, _, _ = inputs([3])
    with pytest.raises(ValueError, match="query_time and key_time"):
        hstu_attention(q, k, v, offsets, 3, time_bias=time)


@pytest.mark.gpu
def test_time_bias_gradient_on_cuda_equals_the_cpu_and_its_deterministic_twin() -> None:
    *_, time, query_time, key_time = inputs([64, 3, 50])
    q, k, v, offsets, *_ = inputs([64, 3, 50])

    def gradient(device: str) -> torch.Tensor:
        table = time.to(device).requires_grad_()
        options = {"time_bias": table, "query_time": query_time.to(device), "key_time": key_time.to(device)}
        output = hstu_attention(q.to(device), k.to(device), v.to(device), offsets.to(device), 64, **options)
        return torch.autograd.grad(output.square().sum(), table)[0].cpu()

    expected = gradient("cpu")
    torch.testing.assert_close(gradient("cuda"), expected)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.testing.assert_close(gradient("cuda"), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["hstu_attention", "softmax_attention"])
@pytest.mark.parametrize("masks", [False, True])
def test_rows_grouped_by_length_give_the_same(name: str, masks: bool) -> None:
    lengths = [30, 3, 1, 0, 17, 8, 29, 4, 2]
    *tensors, offsets, position, time, query_time, key_time = inputs(lengths)
    options = {"position_bias": position, "time_bias": time, "query_time": query_time, "key_time": key_time}
    options |= {"attention_scale": None} if name == "hstu_attention" else {}
    if masks:
        options |= {"max_attn_len": 5, "contextual_seq_len": 2}
        options |= {"num_targets": torch.tensor([4, 0, 1, 0, 17, 2, 0, 1, 1])}
    attend, calls = getattr(naive, name), []

    def counted(*args, **named):
        calls.append(args[4])
        return attend(*args, **named)

    leaves = [*tensors, position, time]
    found = []
    for function in (attend, lambda *args, **named: grouped.by_length(counted, *args, **named)):
        for tensor in leaves:
            tensor.requires_grad_().grad = None
        output = function(*tensors, offsets, 30, **options)
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        found.append([output.detach(), *(tensor.grad for tensor in leaves)])
    assert len(calls) == 4
    assert max(calls) == 30
    assert min(calls) < 5
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    ("lengths", "padded_to"), [([9, 10, 10, 9], [10]), ([10, 1, 6, 3], [1, 3, 6, 10])], ids=["like", "unlike"]
)
def test_on_a_cpu_rows_are_grouped_unless_they_are_of_like_length(
    lengths: list[int], padded_to: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, offsets, *_ = inputs(lengths)
    attend, calls = naive.hstu_attention, []

    def counted(*args, **named):
        calls.append(args[4])
        return attend(*args, **named)

    monkeypatch.setattr(naive, "hstu_attention", counted)
    torch.testing.assert_close(hstu_attention(q, k, v, offsets, 10), attend(q, k, v, offsets, 10))
    assert calls == padded_to


def test_what_fits_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument under its own name: the operation takes them by place."""
    op = pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)
    q, k, v, offsets, position, time, query_time, key_time = inputs([5, 0, 7])
    given = {
        "q": q, "k": k, "v": v, "offsets": offsets, "max_len": 7, "alpha": 0.5, "position_bias": position,
        "time_bias": time, "query_time": query_time, "key_time": key_time, "max_attn_len": 3, "contextual_seq_len": 2,
        "num_targets": torch.tensor([1, 0, 2]), "min_full_attn_seq_len": 1, "num_sink_tokens": 4, "causal": False,
        "target_group_size": 6, "key_offsets": offsets.clone(),
    }  # fmt: skip
    names = list(inspect.signature(op.attention._init_fn).parameters)
    monkeypatch.setattr("kernels.hstu_attention.fits_triton", lambda *_: True)
    monkeypatch.setattr(op, "attention", lambda *found: (dict(zip(names, found, strict=True)),))
    silu, softmax = ({"softmax": one, "query_scale": None} for one in (False, True))
    each = torch.ones(len(q))
    assert hstu_attention(**given, attention_scale=9.0) == given | silu | {"attention_scale": 9.0}
    by_query = silu | {"attention_scale": None, "query_scale": each}
    assert hstu_attention(**given, attention_scale=each) == given | by_query
    assert softmax_attention(**given) == given | softmax | {"attention_scale": None}


def cached_inputs() -> dict[str, object]:
    q, k, v, offsets, position, time, query_time, _ = inputs([2, 0, 3])
    _, cached_k, cached_v, cached_offsets, *_, cached_time = inputs([6, 4, 1])
    return {
        "q": q, "k": k, "v": v, "offsets": offsets, "cached_k": cached_k, "cached_v": cached_v,
        "cached_offsets": cached_offsets, "max_len": 3, "max_cached_len": 6, "alpha": 0.5, "attention_scale": 9.0,
        "softmax": False, "position_bias": position, "time_bias": time, "query_time": query_time[2:],
        "key_time": query_time[:3], "cached_time": cached_time, "max_attn_len": 4, "num_sink_tokens": 1,
        "target_group_size": 2,
    }  # fmt: skip


def test_what_fits_goes_to_triton_with_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = pytest.importorskip("kernels.hstu_attention.cached", exc_type=ImportError)
    given = cached_inputs()
    names = list(inspect.signature(cached.cached_attention._init_fn).parameters)
    monkeypatch.setattr("kernels.hstu_attention.fits_triton", lambda *_: True)
    monkeypatch.setattr(cached, "cached_attention", lambda *found: dict(zip(names, found, strict=True)))
    found = cached_attention(**given)
    times = [given.pop(name) for name in ("query_time", "key_time", "cached_time")]
    assert found == given | {"times": times, "query_scale": None}


@pytest.mark.parametrize("softmax", [False, True])
def test_cached_attention_on_a_cpu_is_the_torch_version(softmax: bool) -> None:
    given = cached_inputs() | {"softmax": softmax}
    expected = naive.cached_attention(**given)
    assert torch.equal(cached_attention(**given), expected)
    # And each of its arguments counts.
    for name in ("alpha", "max_attn_len", "target_group_size", *(() if softmax else ("attention_scale",))):
        assert not torch.equal(cached_attention(**given | {name: 1}), expected), name


def appended_inputs() -> dict[str, object]:
    q, _, _, offsets, position, time, query_time, _ = inputs([2, 0, 3])
    _, k, v, key_offsets, *_, key_time = inputs([6, 4, 3])
    return {
        "q": q, "k": k, "v": v, "offsets": offsets, "key_offsets": key_offsets, "max_new": 3, "max_len": 6,
        "alpha": 0.5, "attention_scale": 9.0, "softmax": False, "position_bias": position, "time_bias": time,
        "query_time": query_time, "key_time": key_time, "max_attn_len": 2, "num_sink_tokens": 1,
    }  # fmt: skip


def test_what_fits_goes_to_triton_with_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    appended = pytest.importorskip("kernels.hstu_attention.appended", exc_type=ImportError)
    given = appended_inputs()
    names = list(inspect.signature(appended.appended_attention._init_fn).parameters)
    monkeypatch.setattr("kernels.hstu_attention.fits_triton", lambda *_: True)
    monkeypatch.setattr(appended, "appended_attention", lambda *found: dict(zip(names, found, strict=True)))
    assert appended_attention(**given) == given


@pytest.mark.parametrize("softmax", [False, True])
def test_appended_attention_on_a_cpu_is_attention_with_keys_of_their_own_number(softmax: bool) -> None:
    given = appended_inputs() | {"softmax": softmax}
    found = appended_attention(**given)
    others = {name: value for name, value in given.items() if name not in ("max_new", "softmax")}
    if softmax:
        del others["attention_scale"]
    assert torch.equal(found, (softmax_attention if softmax else hstu_attention)(**others))
    for name in ("alpha", "max_attn_len", "num_sink_tokens", *(() if softmax else ("attention_scale",))):
        assert not torch.equal(appended_attention(**given | {name: 3}), found), name
    for change in ({"q": given["q"][:, :1]}, {"max_new": -1}, {"key_time": None}, {"max_attn_len": 0}):
        with pytest.raises(ValueError, match=r"q, k and v|must not be negative|needs query_time|lifts the window"):
            appended_attention(**given | change)


WRONG = {
    "k": (lambda given: {"k": given["k"][1:]}, "q, k and v"),
    "q": (lambda given: {"q": given["q"][:, 0], "k": given["k"][:, 0]}, "q, k and v"),
    "v": (lambda given: {"v": given["v"][:, 1:]}, "q, k and v"),
    "position_bias": (lambda _: {"position_bias": torch.zeros(9, dtype=torch.float64)}, "at least 1[13] entries"),
    "time_bias": (lambda given: {"time_bias": given["time_bias"][1:]}, r"time_bias must be \(129,\)"),
    "query_time": (lambda given: {"query_time": given["query_time"][1:]}, "query_time"),
    "key_time": (lambda given: {"key_time": given["key_time"][1:]}, "key_time"),
    "max_attn_len": (lambda _: {"max_attn_len": -1}, "must not be negative"),
    "type of q": (lambda given: {"q": given["q"].float()}, "q, k and v must be floats of one type, not torch.float32"),
    "type of v": (lambda given: {"v": given["v"].half()}, "q, k and v must be floats of one type"),
    "types of q, k and v": (lambda given: {name: given[name].long() for name in "qkv"}, "q, k and v must be floats"),
    "type of offsets": (lambda given: {"offsets": given["offsets"].float()}, "^offsets must be int64, not torch.float"),
    "type of query_time": (lambda given: {"query_time": given["query_time"].double()}, "query_time must be int64"),
    "type of key_time": (lambda given: {"key_time": given["key_time"].float()}, "key_time must be int64"),
    "type of position_bias": (
        lambda given: {"position_bias": given["position_bias"].long()},
        "position_bias must be of",
    ),
    "type of time_bias": (lambda given: {"time_bias": given["time_bias"].int()}, "time_bias must be of floats"),
    "even position_bias": (
        lambda given: {"position_bias": given["position_bias"][1:]},
        r"position_bias must be \(2P - 1",
    ),
    "type of max_len": (lambda _: {"max_len": 7.0}, "max_len must be an int, not a float"),
    "max_len on a device": (lambda _: {"max_len": torch.tensor(7)}, "max_len must be an int, not a Tensor"),
    "type of max_attn_len": (lambda _: {"max_attn_len": 3.0}, "max_attn_len must be an int"),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *WRONG.values(),
        (lambda _: {"contextual_seq_len": -1}, "must not be negative"),
        (lambda _: {"num_targets": torch.tensor([1, 1])}, r"num_targets must be \(3,\)"),
        (lambda _: {"num_targets": torch.tensor([1.0, 0.0, 1.0])}, "num_targets must be int64"),
        (lambda _: {"num_targets": torch.tensor([True, False, True])}, "num_targets must be int64"),
        (lambda given: {"key_offsets": given["offsets"].float()}, "key_offsets must be int64"),
        (lambda _: {"contextual_seq_len": 1.0}, "contextual_seq_len must be an int"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(change, message: str) -> None:
    names = ("q", "k", "v", "offsets", "position_bias", "time_bias", "query_time", "key_time")
    given = dict(zip(names, inputs([5, 0, 7]), strict=True)) | {"max_len": 7}
    for attend in (hstu_attention, softmax_attention):
        attend(**given)
        with pytest.raises(ValueError, match=message):
            attend(**given | change(given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *WRONG.values(),
        (lambda given: {"cached_k": given["cached_k"][1:]}, "cached_k and cached_v"),
        (lambda given: {"cached_k": given["cached_k"][:, 1:]}, "cached_k and cached_v"),
        (lambda given: {"cached_v": given["cached_v"][..., 1:]}, "cached_k and cached_v"),
        (lambda given: {"cached_offsets": given["cached_offsets"][1:]}, "of one length"),
        (lambda given: {"cached_time": given["cached_time"][1:]}, "cached_time"),
        (lambda given: {"cached_time": given["cached_time"].double()}, "cached_time must be int64"),
        (lambda given: {"cached_k": given["cached_k"].float()}, "cached_k and cached_v must be torch.float64 as q"),
        (lambda given: {"cached_v": given["cached_v"].half()}, "cached_k and cached_v must be torch.float64 as q"),
        (lambda given: {"cached_offsets": given["cached_offsets"].float()}, "cached_offsets must be int64"),
        (lambda _: {"max_cached_len": 6.0}, "max_cached_len must be an int"),
    ],
)
def test_cached_inputs_that_make_no_sense_are_refused(change, message: str) -> None:
    given = cached_inputs()
    with pytest.raises(ValueError, match=message):
        cached_attention(**given | change(given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(WRONG[name] for name in WRONG if "of max_len" not in name),
        (lambda _: {"max_new": 3.0}, "max_new must be an int"),
        (lambda _: {"attention_scale": torch.ones(4)}, "attention_scale must be a number or None"),
        (lambda given: {"key_offsets": given["key_offsets"].float()}, "key_offsets must be int64"),
    ],
)
def test_new_tokens_that_make_no_sense_are_refused(change, message: str) -> None:
    given = appended_inputs()
    with pytest.raises(ValueError, match=message):
        appended_attention(**given | change(given))


def test_more_targets_than_tokens_are_a_row_of_targets() -> None:
    q, k, v, offsets, position, *_ = inputs([5, 0, 7])
    options = {"position_bias": position, "max_attn_len": 3, "contextual_seq_len": 2}
    for attend in (hstu_attention, softmax_attention):
        expected, found = (
            attend(q, k, v, offsets, 7, num_targets=torch.tensor(targets), **options)
            for targets in ([5, 0, 2], [9, 4, 2])
        )
        assert torch.equal(found, expected)


def test_bucket_edges_do_not_stay_fake() -> None:
    naive._kept_bucket_starts.cache_clear()
    for _ in range(2):  # before and after the real ones are kept
        with FakeTensorMode():
            assert time_bucket(torch.zeros(3, dtype=torch.int64)).shape == (3,)
        assert time_bucket(torch.tensor([0, 2])).tolist() == [bucket_by_hand(0), bucket_by_hand(2)]


@pytest.mark.parametrize("fullgraph_of", [hstu_attention, softmax_attention])
def test_checks_are_traced_without_graph_breaks(fullgraph_of, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)
    monkeypatch.setattr("kernels.hstu_attention.fits_triton", lambda *_: True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = torch.compile(fullgraph_of, fullgraph=True, backend="eager", dynamic=True)
    for lengths in ([5, 0, 7], [9, 3], [30]):
        q, k, v, offsets, position, time, *times = (tensor.to(device) for tensor in inputs(lengths))
        arguments = [tensor.float() for tensor in (q, k, v)]
        options = {"position_bias": position.float(), "time_bias": time.float()}
        options |= {"query_time": times[0], "key_time": times[1]}
        expected = fullgraph_of(*arguments, offsets, max(lengths), **options)
        torch.testing.assert_close(compiled(*arguments, offsets, max(lengths), **options), expected)

"""HSTU attention against the equations, written out as loops in float64."""

import math

import pytest
import torch

from kernels.hstu_attention import TIME_BUCKETS, grouped, hstu_attention, naive, softmax_attention, time_bucket


def bucket_by_hand(seconds: int) -> int:
    return min(max(math.floor(math.log(max(1, abs(seconds))) / 0.301), 0), 128)


def attention_by_hand(q, k, v, offsets, alpha, normaliser, position, time, query_time, key_time):
    """O_i = sum_j silu(alpha q_i.k_j + p[j - i] + w[bucket(tq_i - tk_j)]) / N v_j, one number at a time."""
    output = torch.zeros_like(v)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        n = normaliser or end - start
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
@pytest.mark.parametrize("normaliser", [211.0, None])
@pytest.mark.parametrize("biases", ["none", "position", "time", "both"])
def test_values_equal_the_equations(lengths: list[int], normaliser: float | None, biases: str) -> None:
    q, k, v, offsets, position, time, query_time, key_time = inputs(lengths)
    position = position if biases in ("position", "both") else None
    time = time if biases in ("time", "both") else None
    expected = attention_by_hand(q, k, v, offsets, 0.7, normaliser, position, time, query_time, key_time)
    options = {"alpha": 0.7, "normaliser": normaliser, "query_time": query_time, "key_time": key_time}
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
        return hstu_attention(q, k, v, offsets, 4, normaliser=5.0, **options)

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
    options |= {"normaliser": None} if name == "hstu_attention" else {}
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


def test_rows_of_like_length_are_not_grouped() -> None:
    q, k, v, offsets, *_ = inputs([9, 10, 10, 9])
    expected = naive.hstu_attention(q, k, v, offsets, 10)
    assert torch.equal(hstu_attention(q, k, v, offsets, 10), expected)

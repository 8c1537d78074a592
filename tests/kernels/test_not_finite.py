"""One user's NaN or infinity stays there: all other rows have the values and gradients they have without it."""

import contextlib
from typing import Any

import pytest
import torch
from interpreted import descriptor_additions

from kernels.hstu_attention import naive

op = pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)
cached = pytest.importorskip("kernels.hstu_attention.cached", exc_type=ImportError)
layer_norm = pytest.importorskip("kernels.layer_norm.triton_op", exc_type=ImportError)
norm_gate = pytest.importorskip("kernels.norm_gate.triton_op", exc_type=ImportError)
projection = pytest.importorskip("kernels.projection.triton_op", exc_type=ImportError)
sampled_softmax = pytest.importorskip("kernels.sampled_softmax.triton_op", exc_type=ImportError)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HEADS, DIM = (2 if ON_GPU else 1), 16
KINDS = {
    "plain": {},
    "position": {"position": True},
    "times": {"position": True, "times": True},
    "softmax": {"softmax": True},
    "softmax, times": {"softmax": True, "times": True},
    "masks": {"position": True, "times": True, "masks": True},
    "masks, rows without targets": {"position": True, "masks": True, "fewest": 10},
    "softmax, masks": {"softmax": True, "masks": True},
    "both ways": {"position": True, "times": True, "masks": True, "both_ways": True},
}


def attention_inputs(
    lengths: list[int], dtype: torch.dtype, position: bool = False, times: bool = False, softmax: bool = False,
    masks: bool = False, both_ways: bool = False, keys: list[int] | None = None, fewest: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """both_ways: masks that are not causal, with groups and an N for each query; keys: of rows, of their own number;
    fewest: tokens of rows that have targets."""
    torch.manual_seed(0)
    of_keys = keys or lengths
    tokens, key_tokens, longest = sum(lengths), sum(of_keys), max(*lengths, *of_keys)
    q, grad = torch.randn(2, tokens, HEADS, DIM).to(DEVICE, dtype)
    k, v = torch.randn(2, key_tokens, HEADS, DIM).to(DEVICE, dtype)
    time = (torch.rand(max(tokens, key_tokens) + 1) ** 6 * 10**5).long().cumsum(0).to(DEVICE)
    return {
        "q": q, "k": k, "v": v, "grad": grad,
        "offsets": torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=DEVICE), "max_len": longest,
        "alpha": DIM**-0.5, "attention_scale": 50.0,
        "position_bias": torch.randn(2 * longest - 1).to(DEVICE, dtype) if position else None,
        "time_bias": torch.randn(129).to(DEVICE, dtype) if times else None,
        "query_time": time[1 : tokens + 1] if times else None, "key_time": time[:key_tokens] if times else None,
        "max_attn_len": 70 if masks else 0, "contextual_seq_len": 5 if masks else 0,
        "num_targets": torch.tensor([min(4, n) * (n >= fewest) for n in lengths], device=DEVICE) if masks else None,
        "softmax": softmax, "causal": not both_ways, "target_group_size": 2 if both_ways else 1,
        "query_scale": 1 + torch.rand(tokens).to(DEVICE) if both_ways else None,
        "key_offsets": None if keys is None else torch.tensor([0, *torch.tensor(keys).cumsum(0)], device=DEVICE),
    }  # fmt: skip


def attention(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Output, dq, dk and dv, and, with a position bias, its gradient."""
    inputs = dict(inputs)
    grad = inputs.pop("grad")
    names = [name for name in ("q", "k", "v", "position_bias") if inputs[name] is not None]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    output, *_ = op.attention(**inputs | leaves)
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad)]


def check(kind: str, lengths: list[int], bad: int, dtype: torch.dtype, keys: list[int] | None = None) -> None:
    """NaN in the first token of row `bad` and infinity in its last one, in q, k, v and the gradient."""
    inputs = attention_inputs(lengths, dtype, **KINDS[kind], keys=keys)
    of_keys = keys or lengths
    others, spoilt = {}, dict(inputs)
    for names, counts in ((("q", "grad"), lengths), (("k", "v"), of_keys)):
        first = sum(counts[:bad])
        last = first + counts[bad] - 1
        for name in names:
            spoilt[name] = inputs[name].clone()
            spoilt[name][last] = torch.inf
            spoilt[name][first] = torch.nan
            others[name] = torch.ones(sum(counts), dtype=torch.bool, device=DEVICE)
            others[name][first : last + 1] = False
    # On a GPU, additions to dq come in no fixed order.
    close = {"rtol": 1e-2, "atol": 1e-2} if ON_GPU else {"rtol": 0, "atol": 0}
    # Of the table, what stands for distances that only other rows have.
    longest = inputs["max_len"]
    farther = torch.arange(2 * longest - 1, device=DEVICE) < longest - of_keys[bad]
    kept = {"output": others["q"], "dq": others["q"], "dk": others["k"], "dv": others["v"], "dp": farther}
    found, clean = attention(spoilt), attention(inputs)
    assert not all(result.isfinite().all() for result in found)
    for name, ours, same in zip(kept, found, clean, strict=False):
        where = kept[name]
        torch.testing.assert_close(ours[where], same[where], **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(params=[0, 1], ids=["pointers", "descriptors"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How tiles are loaded, whatever the table prefers."""
    original = op.Inputs.configuration
    monkeypatch.setattr(
        op.Inputs, "configuration", lambda *given: original(*given) | {"descriptor": request.param, "add_dq": 1}
    )
    return request.param


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("deterministic", [False, True], ids=["added dq", "separate dq"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_attention(kind: str, deterministic: bool, loads: int) -> None:
    """Rows that fill no tile, before the bad row and behind it; on a GPU two have tiles far from the diagonal."""
    if loads and ON_GPU and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need Hopper")
    if not ON_GPU and kind in ("position", "softmax, masks"):
        pytest.skip("interpreted, a case takes seconds")
    lengths = [300, 5, 40, 300, 70] if ON_GPU else [20, 9, 11]
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        with descriptor_additions() if loads and not ON_GPU else contextlib.nullcontext():
            check(kind, lengths, 2 if ON_GPU else 1, torch.float16 if ON_GPU else torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("deterministic", [False, True], ids=["added dq", "separate dq"])
@pytest.mark.parametrize("bad", [0, 1, 2], ids=["fewer queries than keys", "more queries than keys", "last row"])
@pytest.mark.parametrize("kind", ["plain", "softmax, times", "masks", "both ways"])
def test_in_attention_to_keys_of_their_own_number(
    kind: str, bad: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of queries begins before its row's first one, in the bad row, and rows' queries and keys lie apart."""
    original = op.Inputs.configuration
    monkeypatch.setattr(op.Inputs, "configuration", lambda *given: original(*given) | {"add_dq": 1})
    lengths, keys = ([40, 300, 70], [300, 90, 200]) if ON_GPU else ([9, 20, 11], [23, 8, 30])
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        check(kind, lengths, bad, torch.float16 if ON_GPU else torch.float32, keys)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(ON_GPU, reason="there `test_in_attention` has such tiles")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("tile", [(64, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "times", "softmax, times"])
def test_in_attention_far_from_the_diagonal(kind: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through descriptors; rows whose last tiles, of queries and of keys, are cut at other places, beyond the band."""
    original = op.Inputs.configuration

    def configuration(inputs: Any, kernel: str) -> dict[str, int]:
        blocks = {"block_m": max(tile) if kernel == "bias_gradient" else tile[0], "block_n": tile[1]}
        return original(inputs, kernel) | blocks | {"descriptor": 1, "add_dq": 1}

    monkeypatch.setattr(op.Inputs, "configuration", configuration)
    with descriptor_additions():
        check(kind, [300, 9, 70], 1, torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("softmax", [False, True], ids=["silu", "softmax"])
def test_in_cached_attention(softmax: bool) -> None:
    torch.manual_seed(0)
    offsets, cached_offsets = torch.tensor([0, 3, 5, 9], device=DEVICE), torch.tensor([0, 10, 17, 40], device=DEVICE)
    clean = [torch.randn(n, 1, DIM, device=DEVICE) for n in (9, 9, 9, 40, 40)]
    bad = [tensor.clone() for tensor in clean]
    for tensor, rows in zip(bad, (offsets, offsets, offsets, cached_offsets, cached_offsets), strict=True):
        tensor[rows[1] : rows[2]] = torch.nan

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *stored: torch.Tensor) -> torch.Tensor:
        return cached.cached_attention(
            q, k, v, offsets, *stored, cached_offsets, 4, 23, 0.3, None, softmax, None, None, [], 0
        )

    found, expected = attend(*bad), attend(*clean)
    assert found[3:5].isnan().all()
    assert torch.equal(found[:3], expected[:3])
    assert torch.equal(found[5:], expected[5:])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("version", ["triton", "naive"])
@pytest.mark.parametrize("softmax", [False, True], ids=["silu", "softmax"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("spoilt", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_of_a_candidate(value: float, spoilt: str, group: int, softmax: bool, version: str) -> None:
    """Seen by itself and by those behind it in its group, not by its user's other candidates."""
    torch.manual_seed(0)
    offsets, cached_offsets = torch.tensor([0, 2, 10], device=DEVICE), torch.tensor([0, 10, 17], device=DEVICE)
    clean = {name: torch.randn(10, 1, DIM, device=DEVICE) for name in "qkv"}
    stored = [torch.randn(17, 1, DIM, device=DEVICE) for _ in range(2)]
    bad = dict(clean)
    bad[spoilt] = clean[spoilt].clone()
    bad[spoilt][2 + 4] = value  # the second of the group 3, 4, 5

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if version == "naive":
            return naive.cached_attention(
                q, k, v, offsets, *stored, cached_offsets, 8, 10, softmax=softmax, target_group_size=group
            )
        return cached.cached_attention(
            q, k, v, offsets, *stored, cached_offsets, 8, 10, 1.0, None, softmax, None, None, [], 0, 0, group
        )

    found, expected = attend(**bad), attend(**clean)
    reached = {6, 7} if group == 3 and spoilt != "q" else {6}
    others = [row for row in range(10) if row not in reached]
    assert torch.equal(found[others], expected[others])
    if value is torch.nan or spoilt == "v":
        assert not any(found[row].isfinite().any() for row in reached)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "operation",
    [
        lambda x, w: layer_norm.layer_norm(x, 1e-6, w[0], w[1]),
        lambda x, w: norm_gate.norm_gate(x, x.flip(1), 0.0, True),
        lambda x, w: projection.projection(x, w.T),
    ],
    ids=["layer norm", "gate", "projection"],
)
def test_in_operations_on_tokens(operation) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(20, 24, device=DEVICE), torch.randn(40, 24, device=DEVICE)
    others = torch.arange(20, device=DEVICE) != 7
    found = []
    for spoil in (0.0, torch.nan):
        leaf = x.clone()
        leaf[7] += spoil
        leaf.requires_grad_()
        out = operation(leaf, weight)
        found.append([out.detach()[others], torch.autograd.grad(out, leaf, torch.ones_like(out))[0][others]])
    for clean, ours in zip(*found, strict=True):
        assert torch.equal(clean, ours)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("of", ["state", "item"])
def test_in_sampled_softmax(of: str) -> None:
    """Token 0 and item 0, whose vectors fill what a block lacks."""
    torch.manual_seed(0)
    tokens, items = 7, 9
    states, table = torch.randn(tokens, 20, device=DEVICE), torch.randn(items, 20, device=DEVICE)
    positives, negatives = torch.randint(3, items, (tokens,)), torch.randint(3, items, (tokens, 5))
    positives[0], negatives[0] = 1, 2  # which no other token draws; and nobody draws item 0
    found = []
    for spoil in (0.0, torch.nan):
        leaves = [states.clone(), table.clone()]
        leaves[0 if of == "state" else 1][0] += spoil
        for leaf in leaves:
            leaf.requires_grad_()
        losses = sampled_softmax.sampled_softmax(*leaves, positives.to(DEVICE), negatives.to(DEVICE), 0.05)
        of_states, of_table = torch.autograd.grad(losses, leaves, torch.ones_like(losses))
        found.append([losses.detach()[1:], of_states[1:], of_table[3:]])
    for clean, ours in zip(*found, strict=True):
        assert torch.equal(clean, ours)

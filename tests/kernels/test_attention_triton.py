"""The Triton attention kernels against the torch version: values and all gradients, on a GPU or interpreted."""

import contextlib
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tolerance import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.hstu_attention import naive

op = pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)
cached = pytest.importorskip("kernels.hstu_attention.cached", exc_type=ImportError)
appended = pytest.importorskip("kernels.hstu_attention.appended", exc_type=ImportError)
launch = pytest.importorskip("kernels.hstu_attention.launch", exc_type=ImportError)
inputs_module = pytest.importorskip("kernels.hstu_attention.inputs", exc_type=ImportError)
value_block = pytest.importorskip("kernels.hstu_attention.inputs", exc_type=ImportError).value_block
mma_layout = pytest.importorskip("kernels.hstu_attention.mma_layout", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
# The interpreter's bfloat16 product is wrong, and its float32 has no TF32.
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
EXAMPLES = 6 if ON_GPU else 2  # of each kind of attention and bias; the first is empty
NAMES = ("output", "dq", "dk", "dv", "d position_bias", "d time_bias")


@pytest.fixture(autouse=True)
def tf32() -> Any:
    """float32 products on tensor cores; the naive version's are rounded likewise, by `TF32`."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (40, 0, 1, 70)
    heads: int = 2
    dqk: int = 12
    dv: int = 20
    bias: str = "both"
    times: str = "sorted"
    softmax: bool = False
    attention_scale: float | None = 64.0
    window: int = 0
    prefix: int = 0
    targets: tuple[int, ...] | None = None
    full: int = 0
    sinks: int = 0
    causal: bool = True
    group: int = 1
    keys: tuple[int, ...] | None = None  # of each sequence, where they are not `lengths`
    scale_by_query: bool = False

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of both versions; tensors that want a gradient are float64 values that `dtype` holds exactly."""
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.dqk)
        keys = self.lengths if self.keys is None else self.keys
        total, total_keys, longest = sum(self.lengths), sum(keys), max(*self.lengths, *keys)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).double().to(DEVICE)

        def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
            return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]).to(DEVICE)

        key_time, query_time = self._times(max(total, total_keys), generator)
        key_time, query_time = key_time[:total_keys], query_time[:total]
        bias = self.bias
        return {
            "q": random(total, self.heads, self.dqk),
            "k": random(total_keys, self.heads, self.dqk),
            "v": random(total_keys, self.heads, self.dv),
            "position_bias": random(2 * longest + 5) if bias in ("position", "both") else None,
            "time_bias": random(naive.TIME_BUCKETS) if bias in ("time", "both") else None,
            "offsets": offsets(self.lengths),
            "max_len": longest,
            "alpha": self.dqk**-0.5,
            "attention_scale": self.attention_scale,
            "query_time": query_time.to(DEVICE),
            "key_time": key_time.to(DEVICE),
            "max_attn_len": self.window,
            "contextual_seq_len": self.prefix,
            "num_targets": None if self.targets is None else torch.tensor(self.targets).to(DEVICE),
            "min_full_attn_seq_len": self.full,
            "num_sink_tokens": self.sinks,
            "causal": self.causal,
            "target_group_size": self.group,
            "key_offsets": None if self.keys is None else offsets(self.keys),
            # Of one size, as the largest error of a sum must not be that of a single query.
            "query_scale": 32 + 64 * random(total).float().sigmoid() if self.scale_by_query else None,
            "grad": random(total, self.heads, self.dv),
        }

    def _times(self, total: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(key times, query times); a query's is the next token's."""
        match self.times:
            case "equal":
                times = torch.full((total + 1,), 10**9)
            case "far":  # gaps from a second to beyond 32 bits
                times = (10 ** (11 * torch.rand(total + 1, generator=generator))).long().cumsum(0)
            case "random":
                times = torch.randint(0, 10**7, (total + 1,), generator=generator)
            case "decades apart":  # both ways: to 32 bits only one of them would fit
                keys = torch.full((total,), -(10**9)).index_fill_(0, torch.tensor([0]), 0)
                return keys, torch.tensor([-9 * 10**8, 10**9]).repeat(total)[:total]
            case "unknown":  # more than any bucket begins at, as a time that stands for none may be
                keys = torch.arange(total)
                return keys, torch.where(keys % 3 == 1, 2**62 + 5, keys + 60)
            case _:
                times = (torch.rand(total + 1, generator=generator) ** 6 * 10**5).long().cumsum(0) + 10**9
                times = times.flip(0) if self.times == "reversed" else times
        return times[:-1], times[1:]


class TF32(TorchDispatchMode):
    """Within: operands of float32 products are rounded to TF32 first, which cuBLAS does or not as it sees fit."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.ops.aten.bmm.default and args[0].dtype == torch.float32:
            args = [((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for tensor in args]
        return func(*args, **(kwargs or {}))


def run(version: str, case: Case, inputs: dict[str, Any], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and all gradients, in `dtype`."""
    arguments = dict(inputs)
    grad = arguments.pop("grad").to(dtype)
    wanted = [name for name in ("q", "k", "v", "position_bias", "time_bias") if arguments[name] is not None]
    for name in wanted:
        arguments[name] = arguments[name].to(dtype).requires_grad_()
    if version == "triton":
        output, *_ = op.attention(**arguments, softmax=case.softmax)
    else:
        attention_scale, query_scale = arguments.pop("attention_scale"), arguments.pop("query_scale")
        attention_scale = attention_scale if query_scale is None else query_scale
        rule = {} if case.softmax else {"attention_scale": attention_scale}
        output = (naive.softmax_attention if case.softmax else naive.hstu_attention)(**arguments, **rule)
    return [output.detach(), *torch.autograd.grad(output, [arguments[name] for name in wanted], grad)]


def check(case: Case, dtype: torch.dtype, inputs: dict[str, Any] | None = None) -> None:
    """`inputs`: in place of the case's own."""
    inputs = inputs or case.inputs(dtype)
    present = [True] * 4 + [case.bias in ("position", "both"), case.bias in ("time", "both")]
    names = [name for name, there in zip(NAMES, present, strict=True) if there]
    exact = run("naive", case, inputs, torch.float64)
    with TF32() if ON_GPU else contextlib.nullcontext():
        low = run("naive", case, inputs, dtype)
    terms = _score_gradient_terms(inputs) if case.softmax else 0.0
    assert_no_worse(run("triton", case, inputs, dtype), low, exact, names, tables=3 if case.softmax else 2, terms=terms)


def _score_gradient_terms(inputs: dict[str, Any]) -> float:
    """A bound of |grad . v| alpha |k|, of which softmax's dq has two for every key that take each other away."""
    if not inputs["q"].numel():
        return 0.0
    factors = inputs["grad"].norm(dim=-1).max() * inputs["v"].norm(dim=-1).max() * inputs["k"].abs().max()
    return float(factors.detach()) * inputs["alpha"]


CASES = {
    "no bias": Case(bias="none"),
    "position": Case(bias="position"),
    "time": Case(bias="time"),
    "both": Case(),
    "equal times": Case(times="equal"),
    "times reversed": Case(times="reversed"),
    "times at random": Case(times="random"),
    "times beyond 32 bits": Case(times="far"),
    "own length": Case(attention_scale=None),
    "window": Case(window=17),
    "prefix": Case(prefix=9),
    "window and prefix": Case(window=17, prefix=9),
    "targets": Case(targets=(13, 0, 1, 9)),
    "all targets": Case(lengths=(33, 5), targets=(33, 5), attention_scale=None),
    "targets, window, prefix": Case(targets=(13, 0, 1, 9), window=17, prefix=9),
    "both ways": Case(causal=False),
    "both ways, window": Case(causal=False, window=5, attention_scale=None),
    "both ways, targets": Case(causal=False, targets=(13, 0, 1, 39)),
    "both ways, targets, window, prefix": Case(causal=False, targets=(13, 0, 1, 9), window=17, prefix=9),
    "window and groups without an end": Case(window=2**31 - 1, targets=(13, 0, 1, 39), group=2**31 - 1),
    "both ways, window and groups without an end": Case(
        causal=False, window=2**40, targets=(13, 0, 1, 39), group=2**31 - 1
    ),
    "more targets than 32 bits count": Case(targets=(2**32, 0, 2**32 + 3, 9)),
    "window, newest": Case(window=5, full=20, targets=(3, 0, 0, 9)),
    "window, sinks": Case(window=5, sinks=9),
    "window, sinks, newest, prefix, groups": Case(window=5, sinks=9, full=4, prefix=3, targets=(13, 0, 1, 35), group=4),
    "both ways, window, sinks, newest, groups": Case(
        causal=False, window=5, sinks=9, full=4, targets=(13, 0, 1, 35), group=4, attention_scale=None
    ),
    "groups": Case(targets=(13, 0, 1, 50), group=7),
    "keys": Case(keys=(70, 3, 0, 33), times="random"),
    "keys, appended": Case(lengths=(3, 0, 5), keys=(70, 30, 5), bias="position"),
    "keys, all masks": Case(
        keys=(60, 3, 1, 75), window=9, sinks=5, full=6, prefix=4, targets=(13, 1, 1, 21), group=4, scale_by_query=True
    ),
    "keys, both ways, targets": Case(keys=(60, 3, 1, 55), causal=False, targets=(13, 1, 1, 21)),
    "a scale by query": Case(scale_by_query=True),
    "softmax, keys": Case(softmax=True, keys=(70, 3, 0, 33)),
    "softmax, both ways, targets": Case(softmax=True, causal=False, targets=(13, 0, 1, 39)),
    "softmax, window, sinks, groups": Case(softmax=True, window=5, sinks=9, targets=(13, 0, 1, 35), group=4),
    "softmax": Case(softmax=True),
    "softmax, targets, window, prefix": Case(softmax=True, targets=(13, 0, 1, 9), window=17, prefix=9),
    "empty batch": Case(lengths=(0, 0)),
    "one token": Case(lengths=(1,)),
    "wide heads": Case(lengths=(37,), heads=1, dqk=72, dv=50),
    "far from the diagonal": Case(lengths=(330, 150), heads=1, dqk=8, dv=8),
    "far, semi-local": Case(lengths=(400, 150), heads=1, dqk=8, dv=8, window=150, sinks=70),
    "far, targets, prefix": Case(lengths=(330, 150), heads=1, dqk=8, dv=8, targets=(20, 149), prefix=5),
    "far, both ways, newest, softmax": Case(
        lengths=(330, 150), heads=1, dqk=8, dv=8, causal=False, window=100, full=130, softmax=True
    ),
    "far, keys": Case(lengths=(30, 200), keys=(330, 150), heads=1, dqk=8, dv=8, window=190, sinks=70),
    "far, times beyond 32 bits": Case(lengths=(300,), heads=1, dqk=8, dv=8, times="far"),
    "far, times at random": Case(lengths=(270,), heads=1, dqk=8, dv=8, times="random"),
    "far, times decades apart": Case(lengths=(300,), heads=1, dqk=8, dv=8, times="decades apart"),
    "unknown times": Case(times="unknown"),
    "unknown times, prefix": Case(times="unknown", prefix=9),
    "more targets than tokens": Case(targets=(50, 3, 1, 9), window=17, prefix=9, attention_scale=None),
    "ML-1M's heads": Case(lengths=(45, 3), heads=2, dqk=25, dv=25),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and not ON_GPU and case not in (CASES["both"], CASES["softmax"], CASES["targets"]):
        pytest.skip("interpreted, float16 is tried on three cases: seconds each")
    check(case, dtype)


@st.composite
def cases(draw: st.DrawFn, softmax: bool, bias: str) -> Case:
    longest = 300 if ON_GPU else 40
    lengths = tuple(draw(st.lists(st.integers(0, longest), min_size=1, max_size=3)))
    keys = tuple(draw(st.integers(0, longest)) for _ in lengths) if draw(st.booleans()) else None
    targets = tuple(draw(st.integers(0, n)) for n in keys or lengths) if draw(st.booleans()) else None
    window = draw(st.sampled_from([0, 1, 30]))
    # Where all times are equal, softmax's time gradient is a sum that cancels to nothing but rounding.
    times = ["sorted", "reversed", "random", "far", *([] if softmax else ["equal"])]
    return Case(
        lengths=lengths,
        heads=draw(st.integers(1, 3)),
        dqk=draw(st.integers(8, 256 if ON_GPU else 40)),
        dv=draw(st.integers(8, 256 if ON_GPU else 40)),
        bias=bias,
        times=draw(st.sampled_from(times)),
        softmax=softmax,
        attention_scale=draw(st.sampled_from([None, 211.0])),
        window=window,
        prefix=draw(st.sampled_from([0, 1, 20])),
        targets=targets,
        full=draw(st.sampled_from([0, 1, 20])) if window else 0,
        sinks=draw(st.sampled_from([0, 1, 20])) if window else 0,
        causal=draw(st.booleans()),
        group=draw(st.sampled_from([1, 3, 20])) if targets else 1,
        keys=keys,
        scale_by_query=draw(st.booleans()) and not softmax,
    )


@pytest.mark.parametrize("bias", ["none", "position", "time", "both"])
@pytest.mark.parametrize("softmax", [False, True], ids=["silu", "softmax"])
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
def test_random_shapes(softmax: bool, bias: str, data: st.DataObject) -> None:
    check(data.draw(cases(softmax, bias)), data.draw(st.sampled_from(TYPES)))


@pytest.mark.gpu  # the interpreter has no TF32
@pytest.mark.parametrize("window", [1, 30])
def test_softmax_score_gradients_in_tf32_cancel_within_a_query(window: int) -> None:
    """They sum to zero, so a table's gradient holds what products of one precision leave; of two, six times that."""
    case = Case(lengths=(113, 232, 204), heads=3, dqk=247, dv=182, bias="position", softmax=True, window=window)
    check(case, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 25, 32, 50, 64, 128, 256])
@pytest.mark.parametrize("bias", ["none", "both"])
def test_every_shape_class(dim: int, bias: str, dtype: torch.dtype) -> None:
    """Each class of the configuration table, rows that fill no block, through tensor descriptors where they apply."""
    check(Case(lengths=(211, 130, 1, 0, 64), dqk=dim, dv=dim, bias=bias), dtype)
    check(Case(lengths=(700, 333), dqk=dim, dv=dim, bias=bias, targets=(5, 0), window=300), dtype)


MASKED = Case(lengths=(700, 333, 0, 1, 64), dqk=64, dv=64)
TARGETS = (37, 120, 0, 1, 0)
KEYS = (450, 700, 5, 0, 64)
MASKS = {
    "window": replace(MASKED, window=100),
    "prefix": replace(MASKED, prefix=70),
    "window, prefix": replace(MASKED, window=100, prefix=70),
    "targets": replace(MASKED, targets=TARGETS),
    "window, newest": replace(MASKED, window=200, full=290),
    "semi-local": replace(MASKED, window=300, sinks=150),
    "semi-local, targets": replace(MASKED, window=100, sinks=70, targets=TARGETS, attention_scale=None),
    "groups": replace(MASKED, targets=TARGETS, group=16),
    "all": replace(MASKED, window=100, sinks=70, full=90, prefix=9, targets=TARGETS, group=16),
    "both ways": replace(MASKED, causal=False),
    "both ways, window": replace(MASKED, causal=False, window=300),
    "both ways, all": replace(
        MASKED, causal=False, window=100, sinks=70, full=90, prefix=9, targets=TARGETS, group=16, attention_scale=None
    ),
    "keys": replace(MASKED, keys=KEYS, times="random"),
    "keys, all": replace(
        MASKED, keys=KEYS, window=100, sinks=70, full=90, prefix=9, targets=TARGETS, group=16, scale_by_query=True
    ),
    "keys, both ways, targets": replace(MASKED, keys=KEYS, causal=False, targets=TARGETS),
    "a scale by query": replace(MASKED, scale_by_query=True),
    "softmax, semi-local": replace(MASKED, softmax=True, window=300, sinks=150),
    "softmax, keys": replace(MASKED, softmax=True, keys=KEYS),
    "softmax, both ways, groups": replace(MASKED, softmax=True, causal=False, targets=TARGETS, group=16),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_masks_over_several_tiles(case: Case, dtype: torch.dtype) -> None:
    """Values and all gradients, those of both biases included; through tensor descriptors where they apply."""
    check(case, dtype)


@pytest.mark.parametrize("n", [300, 320])
@pytest.mark.parametrize("options", [{"causal": False}, {"causal": False, "max_attn_len": 200}, {"max_attn_len": 200}])
def test_softmax_of_scores_far_below_zero(options: dict[str, Any], n: int) -> None:
    """A key beyond the row has the score 0 there: its weight would be infinite, and 0 times it no number."""
    torch.manual_seed(0)
    q, k = (1 + 0.01 * torch.randn(n, 1, 16) for _ in range(2))
    v, grad = (torch.randn(n, 1, 16, device=DEVICE) for _ in range(2))
    offsets = torch.tensor([0, n], device=DEVICE)

    def gradients(attend: Any, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (q, -30 * k, v)]
        return torch.autograd.grad(attend(*leaves, offsets, n), leaves, grad.to(dtype))

    def ours(*given: Any) -> torch.Tensor:
        window, causal = options.get("max_attn_len", 0), options.get("causal", True)
        return op.attention(*given, 0.25, *[None] * 5, window, 0, None, True, causal=causal)[0]

    def twin(*given: Any) -> torch.Tensor:
        return naive.softmax_attention(*given, alpha=0.25, **options)

    with TF32() if ON_GPU else contextlib.nullcontext():
        low = gradients(twin)
    # A score of -120, and lse, have 16 bits behind the point: weights are off by 2^-16, or 64 times four roundings.
    terms = 64 * _score_gradient_terms({"q": q, "k": 30 * k, "v": v, "grad": grad, "alpha": 0.25})
    assert_no_worse(gradients(ours), low, gradients(twin, torch.float64), ("dq", "dk", "dv"), terms=terms)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["added dq", "separate dq"])
@pytest.mark.parametrize("softmax", [False, True], ids=["silu", "softmax"])
@pytest.mark.parametrize("signs", [(1, -1), (-1, 0), (0, 1), (-1, 1)], ids=str)
def test_the_band_hides_scores_of_40_960(
    signs: tuple[int, int], softmax: bool, deterministic: bool, dtype: torch.dtype
) -> None:
    """A row's first keys have scores of about the one sign times 40,960; its last ones, which most queries do not see,
    of the other."""
    dim = 64 if ON_GPU else 16  # there with a row that goes to Hopper's backward kernel
    case = Case(lengths=(300, 1, 40) if ON_GPU else (40, 1, 20), heads=1, dqk=dim, dv=dim, softmax=softmax)
    inputs = case.inputs(dtype) | {"alpha": 1.0}
    # Multiples of 1/4, so that every score is exact in float32.
    for name in ("q", "k", "position_bias", "time_bias"):
        inputs[name] = inputs[name].clamp(-1, 1).mul(2).round() / (2 if name in ("q", "k") else 4)
    inputs["q"][..., 0] = 1024.0
    for start, end in inputs["offsets"].unfold(0, 2, 1).tolist():
        sign = torch.where(torch.arange(end - start) < (end - start) // 2, *signs)
        inputs["k"][start:end, :, 0] = 40.0 * sign[:, None].to(DEVICE)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        if softmax:  # whose lse, in float32, has eight bits behind the point, so that weights are off by 2^-9
            found, exact = run("triton", case, inputs, dtype), run("naive", case, inputs, torch.float64)
            terms = _score_gradient_terms(inputs)
            for name, ours, expected in zip(NAMES, found, exact, strict=True):
                allowed = 2**-7 * expected.abs().max() + 2**-9 * (0.0 if name in ("output", "dv") else terms)
                assert (ours - expected).abs().max() <= allowed, name
        else:
            check(case, dtype, inputs)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["all", "both ways", "keys, all"])
def test_masks_without_a_bias(name: str) -> None:
    """Rows of which the launch parameters are others."""
    check(replace(MASKS[name], bias="none"), torch.bfloat16)


class OnGPU(torch.Tensor):
    is_cuda = True


def test_hoppers_backward_kernel_takes_the_causal_mask_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    given = Case(lengths=(300, 20), dqk=64, dv=64, bias="none").inputs(torch.bfloat16)
    grad = given.pop("grad").bfloat16().as_subclass(OnGPU)
    given |= {name: given[name].bfloat16().as_subclass(OnGPU) for name in ("q", "k", "v")}
    assert op.hopper_fits(op.Inputs(**given, softmax=False), grad)
    for option in (
        {"max_attn_len": 5},
        {"max_attn_len": 5, "num_sink_tokens": 1},
        {"contextual_seq_len": 1},
        {"causal": False},
        {"num_targets": torch.zeros(2, dtype=torch.int64)},
        {"key_offsets": given["offsets"]},
        {"query_scale": torch.ones(320)},
        {"softmax": True},
    ):
        assert not op.hopper_fits(op.Inputs(**{"softmax": False} | given | option), grad), option


def test_the_tiles_between_two_intervals_are_not_read() -> None:
    """Keys that are not finite there would spoil every product that they enter, however the mask decides."""
    n, bad = (900, slice(150, 300)) if ON_GPU else (300, slice(70, 90))
    case = Case(lengths=(n,), dqk=16, dv=16, window=20, sinks=10)
    inputs = case.inputs(torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=True)  # adds dq tile by tile of queries
    try:
        clean = run("triton", case, inputs, torch.float32)
        inputs["k"][bad] = inputs["v"][bad] = torch.nan
        spoilt = run("triton", case, inputs, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    far = slice(bad.stop + 20 + 2 * 128, None) if ON_GPU else slice(bad.stop + 20 + 128, None)
    for one, other in zip(clean[:2], spoilt[:2], strict=True):
        assert torch.equal(one[far], other[far])
        assert not other[bad].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("dqk", "dv"), [(64, 32), (128, 16), (32, 16), (16, 32), (64, 16)])
def test_values_narrower_than_queries(dqk: int, dv: int, dtype: torch.dtype) -> None:
    """Tiles of full width, which ptxas 12.8 reads beyond shared memory where they are narrower than Q's."""
    for bias in ("none", "both"):
        check(Case(lengths=(700, 333), dqk=dqk, dv=dv, bias=bias), dtype)


@pytest.mark.parametrize(
    ("dqk", "dv", "width"), [(64, 32, 64), (64, 16, 64), (32, 16, 32), (128, 32, 64), (16, 32, 32)]
)
def test_tiles_of_values_are_as_wide_as_products_take_them(dqk: int, dv: int, width: int) -> None:
    assert value_block(dqk, dv) == width


@pytest.fixture
def hopper_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What went to Hopper's own backward kernel, call by call."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    calls: list[Any] = []
    original = op.hopper_backward

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(op, "hopper_backward", counted)
    return calls


HOPPER = Case(lengths=(700, 333), heads=3, dqk=64, dv=64, bias="none")
TIMES = ["equal", "far", "random", "reversed", "decades apart", "unknown"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        HOPPER,
        replace(HOPPER, lengths=(300,), heads=1),
        replace(HOPPER, lengths=(257, 0, 1, 63, 64, 65, 127, 128, 129, 0, 191, 192, 193)),
        replace(HOPPER, dqk=32, dv=32, attention_scale=None),
        replace(HOPPER, dqk=32, dv=64),
        replace(HOPPER, dqk=64, dv=32, attention_scale=None),
        replace(HOPPER, lengths=(4_000, 5), heads=1),
        replace(HOPPER, bias="position"),
        replace(HOPPER, bias="position", lengths=(257, 0, 1, 63, 64, 65, 127, 128, 129, 0, 191, 192, 193)),
        replace(HOPPER, bias="position", dqk=32, dv=64, attention_scale=None),
        replace(HOPPER, bias="position", lengths=(4_000, 5), heads=1),
        replace(HOPPER, bias="time"),
        replace(HOPPER, bias="both"),
        replace(HOPPER, bias="both", lengths=(257, 0, 1, 63, 64, 65, 127, 128, 129, 0, 191, 192, 193)),
        replace(HOPPER, bias="both", dqk=32, dv=64, attention_scale=None),
        replace(HOPPER, bias="both", lengths=(4_000, 5), heads=1),
        *(replace(HOPPER, bias="both", times=times) for times in TIMES),
    ],
    ids=[
        "even",
        "one head",
        "edges",
        "d 32, by length",
        "d 32 and 64",
        "d 64 and 32",
        "long",
        "positions",
        "positions, edges",
        "positions, d 32 and 64, by length",
        "positions, long",
        "times",
        "both",
        "both, edges",
        "both, d 32 and 64, by length",
        "both, long",
        *TIMES,
    ],
)
def test_hoppers_backward_kernel(case: Case, hopper_calls: list[Any]) -> None:
    check(case, torch.bfloat16)
    assert len(hopper_calls) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bias", ["none", "position", "both"])
def test_hoppers_backward_kernel_keeps_what_is_not_finite_in_its_row(
    bias: str, value: float, hopper_calls: list[Any]
) -> None:
    """The second row's: rows before and after it get what they get without it."""
    case = replace(HOPPER, lengths=(300, 77, 301), bias=bias)
    inputs = case.inputs(torch.bfloat16)
    clean = run("triton", case, inputs, torch.bfloat16)
    for name in ("q", "k", "v", "grad"):
        inputs[name][300:377] = value
    dirty = run("triton", case, inputs, torch.bfloat16)
    assert len(hopper_calls) == 2
    for name, one, other in zip(NAMES[1:4], clean[1:4], dirty[1:4], strict=True):
        for rows in (slice(0, 300), slice(377, None)):
            # dq is a sum in no fixed order.
            torch.testing.assert_close(
                one[rows], other[rows], rtol=2**-7, atol=2**-12 * one.abs().max().item(), msg=name
            )
        assert not other[300:377].isfinite().all(), name


@pytest.mark.gpu
def test_hoppers_backward_kernel_leaves_a_gradient_without_strides_to_the_others(hopper_calls: list[Any]) -> None:
    """As that of `output.sum(0)` has none, which the copy engine does not take."""
    inputs = HOPPER.inputs(torch.bfloat16)
    grad = inputs.pop("grad").bfloat16()[:1]
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].bfloat16()
    call = op.Inputs(**inputs, softmax=False)
    arguments = [getattr(call, field.name) for field in fields(call)]
    outputs = op.attention(*arguments)
    rows = grad.expand(len(inputs["q"]), -1, -1)
    found = op.gradients(rows, outputs, arguments, False)
    assert not hopper_calls
    expected = op.gradients(rows.contiguous(), outputs, arguments, False)
    assert len(hopper_calls) == 1
    for one, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-8 * other.abs().max().item())


@pytest.mark.parametrize(
    "name",
    [
        "both",
        "targets, window, prefix",
        "window, sinks, newest, prefix, groups",
        "both ways, window, sinks, newest, groups",
        "keys, all masks",
        "softmax, both ways, targets",
    ],
)
def test_deterministic_mode_is_right_and_equal_to_the_bit(name: str) -> None:
    case = replace(CASES[name], dqk=16, dv=16, lengths=(60, 0, 1, 70) if not ON_GPU else (900, 0, 1, 700))
    if case.keys and ON_GPU:
        case = replace(case, keys=(700, 3, 1, 900))
    dtype = torch.float16
    inputs = case.inputs(dtype)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (run("triton", case, inputs, dtype) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    tables, terms = (3, _score_gradient_terms(inputs)) if case.softmax else (2, 0.0)
    low, exact = run("naive", case, inputs, dtype), run("naive", case, inputs, torch.float64)
    assert_no_worse(first, low, exact, NAMES, tables=tables, terms=terms)


def test_added_query_gradients_equal_the_separate_kernels() -> None:
    """Both ways to dq, whichever the table prefers for a shape."""
    case = Case(lengths=(50, 3))
    inputs = case.inputs(torch.float32)
    grad = inputs.pop("grad").float()
    for name in ("q", "k", "v", "position_bias", "time_bias"):
        inputs[name] = inputs[name].float()
    call = op.Inputs(**inputs, softmax=False)
    bias, gradient = op.BiasTables(call), op.Gradient(grad, grad.new_empty(0), None)
    added = torch.zeros_like(inputs["q"])
    op.backward_kv(call, bias, call.configuration("bwd_dkdv"), gradient, added)
    alone, _ = op.backward_q(call, bias, call.configuration("bwd_dq"), gradient)
    torch.testing.assert_close(added, alone, rtol=1e-2 if ON_GPU else 1e-5, atol=1e-3 if ON_GPU else 1e-6)


@pytest.mark.parametrize("tile", [(64, 16), (32, 32)])
@pytest.mark.parametrize("case", [Case(dqk=16, dv=16), Case(targets=(13, 0, 1, 9), window=17, prefix=30)])
def test_bias_gradients_do_not_depend_on_the_tiles(
    case: Case, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def configuration(call: Any, kernel: str, original: Any = op.Inputs.configuration) -> dict[str, int]:
        config = original(call, kernel)
        return config | ({"block_m": tile[0], "block_n": tile[1]} if kernel == "bias_gradient" else {})

    monkeypatch.setattr(op.Inputs, "configuration", configuration)
    check(case, torch.float32)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 30}, {"group": 4}, {"group": 99, "window": 10, "sinks": 20, "scale_by_query": True}],
    ids=["none", "window", "groups", "window, sinks, one group, scales"],
)
@pytest.mark.parametrize("bias", ["none", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16, torch.float16] if ON_GPU else [])], ids=str)
def test_cached_attention_equals_targets_behind_the_history(
    dtype: torch.dtype, bias: str, options: dict[str, Any], softmax: bool
) -> None:
    options = options | {"scale_by_query": options.get("scale_by_query", False) and not softmax}
    case = Case(
        lengths=(70, 3, 34), targets=(6, 3, 33), bias=bias, softmax=softmax, attention_scale=None, **options
    )  # fmt: skip
    inputs = case.inputs(dtype)
    sequence_id, position = naive.jagged.naive.sequence_and_position(inputs["offsets"], len(inputs["q"]))
    new = position >= (inputs["offsets"].diff() - inputs["num_targets"])[sequence_id]
    # All candidates of a sequence ask at one time, and stand at one.
    asked, stands = (inputs[name][inputs["offsets"][1:] - 1] for name in ("query_time", "key_time"))
    inputs["query_time"] = torch.where(new, asked[sequence_id], inputs["query_time"])
    inputs["key_time"] = torch.where(new, stands[sequence_id], inputs["key_time"])
    output = run("triton", case, inputs, dtype)[0]

    def part(name: str, which: torch.Tensor) -> torch.Tensor:
        return inputs[name].to(dtype)[which]

    cached_lengths = inputs["offsets"].diff() - inputs["num_targets"]
    tables = {name: None if inputs[name] is None else inputs[name].to(dtype) for name in ("position_bias", "time_bias")}
    times = {"query_time": asked, "key_time": stands, "cached_time": inputs["key_time"][~new]}
    scale = inputs["query_scale"]
    by_query = None if scale is None else scale[new]
    in_kernel = {"times": list(times.values()), "attention_scale": None, "query_scale": by_query}
    in_torch = times | {"attention_scale": by_query}
    for version, others in ((cached.cached_attention, in_kernel), (naive.cached_attention, in_torch)):
        arguments = {
            "q": part("q", new),
            "k": part("k", new),
            "v": part("v", new),
            "offsets": naive.jagged.offsets_from_lengths(inputs["num_targets"]),
            "cached_k": part("k", ~new),
            "cached_v": part("v", ~new),
            "cached_offsets": naive.jagged.offsets_from_lengths(cached_lengths),
            "max_len": 33,
            "max_cached_len": 64,
            "alpha": inputs["alpha"],
            "softmax": softmax,
            **tables,
            **others,
            "max_attn_len": case.window,
            "num_sink_tokens": case.sinks,
            "target_group_size": case.group,
        }
        tolerance = {torch.float32: 3e-3 if ON_GPU else 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(version(**arguments), output[new], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"target_group_size": 3}, {"max_attn_len": 90}, {"max_attn_len": 70, "num_sink_tokens": 40}],
    ids=["none", "groups", "window", "window, sinks"],
)
def test_keys_shared_by_programs_give_the_same_output(
    options: dict[str, int], softmax: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of them, also more than there are tiles of keys; with rows behind the last offset, which are not
    read."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, 5, 7, 7], device=DEVICE)
    cached_offsets = torch.tensor([0, 300, 300, 331], device=DEVICE)
    q, k, v, cached_k, cached_v = (torch.randn(n, 2, 16, device=DEVICE) for n in (9, 9, 9, 340, 340))
    for tensor, used in ((q, 7), (k, 7), (v, 7), (cached_k, 331), (cached_v, 331)):
        tensor[used:] = torch.nan
    p, w = torch.randn(2 * 320 - 1, device=DEVICE), torch.randn(naive.TIME_BUCKETS, device=DEVICE)
    times = [torch.randint(2**31, (n,), device=DEVICE) for n in (3, 3, 340)]
    shape = (offsets, cached_k, cached_v, cached_offsets, 5, 310)
    expected = naive.cached_attention(
        q, k, v, *shape, alpha=0.3, attention_scale=7.0, softmax=softmax, position_bias=p, time_bias=w,
        query_time=times[0], key_time=times[1], cached_time=times[2], **options,
    )  # fmt: skip
    for splits in (1, 2, 3, 16):
        monkeypatch.setattr(cached, "num_splits", lambda *_, splits=splits: splits)
        found = [
            cached.cached_attention(q, k, v, *shape, 0.3, 7.0, softmax, p, w, times, **{"max_attn_len": 0} | options)
            for _ in range(2)
        ]
        assert torch.equal(found[0][:7], found[1][:7])
        tolerance = 3e-3 if ON_GPU else 1e-5
        torch.testing.assert_close(found[0][:7], expected[:7], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("window", [(0, 0), (70, 0), (40, 30)], ids=["causal", "window", "window, sinks"])
@pytest.mark.parametrize("bias", ["both", "position", "time", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if ON_GPU else [])], ids=str)
def test_appended_tokens_attend_as_their_sequences_last(
    dtype: torch.dtype, bias: str, window: tuple[int, int], softmax: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keys shared by programs and not, the bias in one part and in several; rows behind the last offset are not
    read."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, 70, 71, 71, 74], device=DEVICE)
    key_offsets = torch.tensor([0, 250, 251, 260, 300], device=DEVICE)
    q, k, v = (torch.randn(n, 2, 16, device=DEVICE).to(dtype) for n in (80, 310, 310))
    for tensor, used in ((q, 74), (k, 300), (v, 300)):
        tensor[used:] = torch.nan
    p = torch.randn(2 * 260 - 1, device=DEVICE) if bias in ("both", "position") else None
    w = torch.randn(naive.TIME_BUCKETS, device=DEVICE) if bias in ("both", "time") else None
    times = [torch.randint(2**31, (n,), device=DEVICE) for n in (80, 310)]
    expected = naive.appended_attention(
        q, k, v, offsets, key_offsets, 72, 256, alpha=0.3, attention_scale=None, softmax=softmax, position_bias=p,
        time_bias=w, query_time=times[0], key_time=times[1], max_attn_len=window[0], num_sink_tokens=window[1],
    )  # fmt: skip
    for splits, pairs in ((1, 2**24), (3, 2**24), (9, 2**24), (2, 256 * 33)):
        monkeypatch.setattr(appended, "num_splits", lambda *_, splits=splits: splits)
        monkeypatch.setattr(appended, "MOST_PAIRS", pairs)
        found = appended.appended_attention(
            q, k, v, offsets, key_offsets, 72, 256, 0.3, None, softmax, p, w, *times, *window
        )
        tolerance = (3e-3 if ON_GPU else 1e-5) if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found[:74], expected[:74], rtol=tolerance, atol=tolerance)


def test_programs_share_keys_where_there_would_be_few() -> None:
    config, device = {"block_m": 64, "block_n": 64, "num_warps": 4}, torch.device("cpu")

    def splits(tokens: int, sequences: int, keys: int) -> int:
        return cached.num_splits(tokens, sequences, 8, keys, config, device)

    assert splits(64, 1, 8192) == 32  # each has four tiles of keys
    assert splits(2048, 1, 8192) == 2  # 16 warps a multiprocessor
    assert splits(64, 1, 256) == 1
    assert splits(100, 100, 8192) == 1  # each sequence has a tile
    assert splits(1, 1, 10**6) == 64


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with others between them."""
    return torch.stack([tensor, torch.full_like(tensor, 10**6)], -1)[..., 0]


def test_offsets_times_and_targets_may_be_strided() -> None:
    case = Case(lengths=(20, 0, 9), targets=(2, 2, 2), window=5)
    inputs = case.inputs(torch.float32)
    names = ("offsets", "query_time", "key_time", "position_bias", "time_bias")
    apart = inputs | {name: strided(inputs[name]) for name in names}
    apart["num_targets"] = torch.full((1,), 2, device=DEVICE).expand(3)
    found, expected = (run("triton", case, given, torch.float32) for given in (apart, inputs))
    for ours, same in zip(found, expected, strict=True):  # on a GPU the order of additions is not fixed
        torch.testing.assert_close(ours, same, rtol=1e-4, atol=1e-4)


def test_a_cache_may_be_strided() -> None:
    lengths = torch.tensor([3, 1], device=DEVICE)
    offsets, cached_offsets = (naive.jagged.offsets_from_lengths(part) for part in (lengths, 5 * lengths))
    q, k, v, cached_k, cached_v = (torch.randn(n, 2, 16, device=DEVICE) for n in (4, 4, 4, 20, 20))
    times = [torch.arange(n, device=DEVICE) ** 3 for n in (2, 2, 20)]
    tables = [torch.randn(n, device=DEVICE) for n in (31, naive.TIME_BUCKETS)]

    def attend(form: Any) -> torch.Tensor:
        return cached.cached_attention(
            q, k, v, form(offsets), cached_k, cached_v, form(cached_offsets), 3, 15, 0.3, None, False,
            *map(form, tables), list(map(form, times)), 0,
        )  # fmt: skip

    assert torch.equal(attend(strided), attend(torch.clone))


def test_heads_far_apart_are_copied() -> None:
    def far(stride: int) -> torch.Tensor:
        return torch.empty_strided((2, 3, 4), (4, stride, 1), device="meta")

    assert op.token_rows(far(2**30 - 1)).stride(1) == 2**30 - 1
    assert op.token_rows(far(2**30)).is_contiguous()


@pytest.mark.parametrize("name", ["both", "targets, window, prefix", "softmax"])
def test_sequences_in_two_dimensions_of_a_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beyond 65,535 of them: here three a layer, in three layers, of which the last two programs have none."""
    monkeypatch.setattr(inputs_module, "MOST_SEQUENCES", 3)
    assert inputs_module.launch_grid(5, 7) == (5, 3, 3)
    case = replace(CASES[name], lengths=(20, 0, 1, 33, 2, 9, 17))
    check(replace(case, targets=(7, 0, 1, 9, 2, 1, 0)) if case.targets else case, torch.float32)


@pytest.mark.parametrize("sequences", [0, 1, 65_535, 65_536, 131_071, 10**6])
def test_a_grid_holds_all_sequences(sequences: int) -> None:
    programs, rows, layers = inputs_module.launch_grid(7, sequences)
    assert programs == 7
    assert max(rows, layers) <= 65_535
    assert sequences <= rows * layers < sequences + max(layers, 1)
    offsets = inputs_module.launch_offsets(torch.arange(sequences + 1))
    assert len(offsets) == rows * layers + 1 or not sequences
    assert torch.equal(offsets[: sequences + 1], torch.arange(sequences + 1))
    assert (offsets[sequences:] == sequences).all()


def test_no_sequences() -> None:
    nothing = torch.zeros(0, 2, 16, device=DEVICE, requires_grad=True)
    offsets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    output, *_ = op.attention(
        nothing, nothing, nothing, offsets, 5, 1.0, 1.0, None, None, None, None, 0, 0, None, False
    )
    assert output.shape == (0, 2, 16)
    assert torch.autograd.grad(output.sum(), nothing)[0].shape == (0, 2, 16)
    candidates = nothing.detach()
    found = cached.cached_attention(
        candidates, candidates, candidates, offsets, candidates, candidates, offsets, 0, 0, 1.0, 1.0, False,
        None, None, [], 0,
    )  # fmt: skip
    assert found.shape == (0, 2, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("masks", [False, True], ids=["causal", "masks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_sequences_than_one_dimension_holds(dtype: torch.dtype, masks: bool) -> None:
    """65,537 rows, of which five have tokens: at both ends and in both layers; against those alone."""
    rows, few = 65_537, (40, 300, 9, 0, 70)
    case = Case(lengths=few, heads=2, dqk=16, dv=16, targets=(3, 2, 1, 0, 4) if masks else None, window=30 * masks)
    inputs = case.inputs(dtype)
    lengths, targets = torch.zeros(2, rows, dtype=torch.int64)
    places = torch.tensor([0, 32_768, 65_533, 65_535, 65_536])
    lengths[places] = torch.tensor(few)
    many = inputs | {"offsets": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(DEVICE)}
    if masks:
        targets[places] = torch.tensor(case.targets)
        many["num_targets"] = targets.to(DEVICE)
    found, expected = (run("triton", case, given, dtype) for given in (many, inputs))
    for name, ours, same in zip(NAMES, found, expected, strict=True):  # the order of additions is not fixed
        torch.testing.assert_close(ours, same, rtol=2e-2, atol=2e-2, msg=lambda text, name=name: f"{name}: {text}")


def test_an_attention_scale_of_zero_is_one() -> None:
    inputs = Case(lengths=(1,), bias="none", attention_scale=0.0).inputs(torch.float32)
    del inputs["grad"]
    call = op.Inputs(**inputs, softmax=False)
    arguments = launch._arguments(call, op.BiasTables(call), call.configuration("forward"), True, output=call.v)
    assert arguments["attention_scale"] == 0.0
    assert not arguments["FLAGS"].BY_LENGTH


@pytest.mark.parametrize(("dim", "described"), [(32, True), (25, False)])
def test_tokens_go_through_descriptors_where_the_table_says_so(dim: int, described: bool) -> None:
    inputs = Case(lengths=(5, 3), bias="none", dqk=dim, dv=dim).inputs(torch.float32)
    grad = inputs.pop("grad")
    call = op.Inputs(**inputs, softmax=False)
    for wanted in (0, 1):
        config = call.configuration("bwd_dkdv") | {"descriptor": wanted}
        arguments = launch._arguments(call, op.BiasTables(call), config, True, grad=op.token_rows(grad))
        assert arguments["FLAGS"].DESCRIPTOR is (bool(wanted) and described)


def test_score_tiles_of_one_warp_above_the_other_are_read_as_tensor_cores_hold_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Hopper; of 16 rows a warp, and not in float32 without TF32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(launch, "has_mma_layout", lambda _: True)
    monkeypatch.setattr(launch, "tf32_allowed", lambda: False)
    config = {"block_m": 64, "block_n": 32, "num_warps": 4}
    for dtype, expected in ((torch.bfloat16, [True, False]), (torch.float32, [False, False])):
        call: Any = SimpleNamespace(q=SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda"))
        assert [launch._mma_layout(call, config, rows_are_queries) for rows_are_queries in (True, False)] == expected


@pytest.mark.parametrize("rows_are_queries", [True, False])
@pytest.mark.parametrize("columns", [32, 64])
def test_diagonals_of_the_spread_table_are_the_biases(columns: int, rows_are_queries: bool) -> None:
    """Read as the assembly is to read them, without it."""
    tile = mma_layout.Tile(torch.device(DEVICE), torch.float32, 32, columns, 2, rows_are_queries)
    assert mma_layout.wrong_elements(tile, inline_asm=False) == 0


def test_a_layout_is_tried_once_and_done_without_where_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def wrong_elements(tile: Any, inline_asm: bool) -> int:
        tried.append(tile)
        return tile.rows - 64

    monkeypatch.setattr(mma_layout, "wrong_elements", wrong_elements)
    monkeypatch.setattr(mma_layout, "_tried", {})
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    good, bad = (mma_layout.Tile(torch.device(DEVICE), torch.float16, rows, 64, 4, True) for rows in (64, 128))
    with pytest.warns(UserWarning, match="not tried before a CUDA graph was captured"):
        assert not mma_layout.has_mma_layout(good)
    capturing = False
    assert mma_layout.has_mma_layout(good)
    with pytest.warns(UserWarning, match="128 x 64 tiles.* 64 elements are elsewhere"):
        assert not mma_layout.has_mma_layout(bad)
    assert mma_layout.has_mma_layout(good)
    assert not mma_layout.has_mma_layout(bad)
    assert tried == [good, bad]


@pytest.mark.gpu
@pytest.mark.parametrize("rows_are_queries", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_layout_of_hoppers_tensor_cores(dtype: torch.dtype, rows_are_queries: bool) -> None:
    """It is there in the tiles that the configuration table has; where there are too few rows a trial sees that."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    device = torch.device("cuda", torch.cuda.current_device())
    for rows, columns, warps in ((64, 64, 4), (64, 32, 4), (128, 64, 4), (128, 64, 8), (32, 32, 2)):
        tile = mma_layout.Tile(device, dtype, rows, columns, warps, rows_are_queries)
        assert mma_layout.wrong_elements(tile, inline_asm=True) == 0, tile
    other = mma_layout.Tile(device, dtype, 32, 64, 4, rows_are_queries)
    assert mma_layout.wrong_elements(other, inline_asm=True) > 0


def test_buckets_equal_the_exact_ones() -> None:
    """Whole seconds below 2^14, and either side of every later edge, as far as float32 tells them apart."""
    edges = naive.bucket_starts(torch.device("cpu"))
    edges = edges[edges < 2**62].double()[:: 1 if ON_GPU else 6]
    seconds = torch.cat(
        [
            torch.arange(2**14 if ON_GPU else 40),
            (edges * (1 - 1e-5)).long(),
            (edges * (1 + 1e-5)).long(),
            torch.tensor([2**62 - 1, 2**62, 2**62 + 5]),
        ]
    )
    expected = naive.time_bucket(seconds)
    zeros = torch.zeros(len(seconds), 1, 16, device=DEVICE)
    # Every row is one token that sees itself: with V = 1 its output is silu(w[bucket]).
    table = torch.arange(naive.TIME_BUCKETS, dtype=torch.float32, device=DEVICE)
    for sign in (1, -1):
        output, *_ = op.attention(
            zeros, zeros, zeros + 1, torch.arange(len(seconds) + 1, device=DEVICE), 1, 1.0, 1.0, None, table,
            sign * seconds.to(DEVICE), torch.zeros_like(seconds).to(DEVICE), 0, 0, None, False,
        )  # fmt: skip
        wanted = torch.nn.functional.silu(expected.float()).to(DEVICE)
        torch.testing.assert_close(output[:, 0, 0], wanted, rtol=1e-3, atol=1e-5)

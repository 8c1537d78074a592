"""Attention over rows of at most 256 tokens in its own kernels: values and all gradients, on a GPU or interpreted."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from test_attention_triton import CASES, DEVICE, NAMES, ON_GPU, Case, check, run
from tolerance import assert_no_worse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.hstu_attention.mask import Mask

short = pytest.importorskip("kernels.hstu_attention.short", exc_type=ImportError)
op = pytest.importorskip("kernels.hstu_attention.op", exc_type=ImportError)
prepare = pytest.importorskip("kernels.hstu_attention.prepare", exc_type=ImportError)
inputs_module = pytest.importorskip("kernels.hstu_attention.inputs", exc_type=ImportError)

# The interpreter's bfloat16 product is wrong.
TYPES = [torch.float16, *([torch.bfloat16] if ON_GPU else [])]
SMALL = Case(lengths=(40, 0, 1, 70))
#: Calls that differ from it in what an argument of `attention` has these kernels refuse.
MASKS = {
    "max_attn_len": replace(SMALL, window=5),
    "contextual_seq_len": replace(SMALL, prefix=5),
    "min_full_attn_seq_len": replace(SMALL, full=5),
    "num_sink_tokens": replace(SMALL, sinks=5),
    "causal": replace(SMALL, causal=False),
    "target_group_size": replace(SMALL, group=2),
    "num_targets": replace(SMALL, targets=(3, 0, 1, 9)),
    "key_offsets": replace(SMALL, keys=SMALL.lengths),
    "query_scale": replace(SMALL, scale_by_query=True),
    "softmax": replace(SMALL, softmax=True),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that went to these kernels."""
    seen: list[str] = []

    def spied(name: str) -> Any:
        original = getattr(short, name)

        def spy(*args: Any) -> Any:
            seen.append(name)
            return original(*args)

        return spy

    for name in ("forward", "backward"):
        monkeypatch.setattr(short, name, spied(name))
    return seen


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bias", ["none", "position", "time", "both"])
@pytest.mark.parametrize(
    "lengths", [(0, 1, 2, 15, 16, 17, 0), (63, 64, 65), (127, 128, 129), (255, 256)], ids=lambda n: f"to {max(n)}"
)
def test_rows_at_the_edges_of_tiles(
    lengths: tuple[int, ...], bias: str, dtype: torch.dtype, launched: list[str]
) -> None:
    check(Case(lengths=lengths, bias=bias, dqk=9, dv=12), dtype)
    assert launched == ["forward", "backward"]


@pytest.mark.parametrize("times", ["equal", "reversed", "random", "far", "decades apart", "unknown"])
def test_times(times: str, launched: list[str]) -> None:
    check(replace(SMALL, times=times), TYPES[-1])
    assert launched == ["forward", "backward"]


@pytest.mark.parametrize(
    "case",
    [
        replace(SMALL, attention_scale=None),
        replace(SMALL, heads=1, dqk=64, dv=33),
        replace(SMALL, heads=3, dqk=8, dv=57),
        Case(lengths=(1,)),
        *([Case(lengths=(211, 0, 130, 64), heads=h, dqk=d, dv=d) for h, d in ((2, 25), (8, 32), (1, 64))] * ON_GPU),
    ],
    ids=str,
)
def test_heads_and_scales(case: Case, launched: list[str]) -> None:
    check(case, TYPES[-1])
    assert launched == ["forward", "backward"]


def test_no_tokens_and_no_rows() -> None:
    nothing = torch.zeros(0, 2, 16, dtype=torch.float16, device=DEVICE, requires_grad=True)
    table = torch.ones(129, device=DEVICE, requires_grad=True)
    times = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for rows in (0, 3):
        offsets = torch.zeros(rows + 1, dtype=torch.int64, device=DEVICE)
        output, *_ = op.attention(
            nothing, nothing, nothing, offsets, 5, 1.0, 1.0, None, table, times, times, 0, 0, None, False
        )
        dq, dw = torch.autograd.grad(output.sum(), (nothing, table))
        assert output.shape == dq.shape == (0, 2, 16)
        assert torch.equal(dw, torch.zeros_like(table))


@pytest.mark.parametrize("blocks", [(64, 32), (32, 32), (128, 64), (16, 64)], ids=str)
def test_results_do_not_depend_on_the_tiles(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    original = op.Inputs.configuration
    tiles = {"block_m": blocks[0], "block_n": blocks[1]}
    monkeypatch.setattr(op.Inputs, "configuration", lambda *given: original(*given) | tiles)
    check(Case(lengths=(150, 3), heads=1), TYPES[-1])


def test_a_program_of_the_sums_may_have_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short, "_SUM_PROGRAMS", 2)
    check(Case(lengths=(9, 0, 20, 3, 17), heads=1), TYPES[-1])


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nothing has written yet is NaN, or the largest whole number."""
    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        made = original(self, *size, **options)
        return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.mark.parametrize("entries", [2 * 400 - 1, 2 * 400], ids=["odd", "even"])
def test_tables_longer_than_rows_have_zeros_there(entries: int, unwritten: None) -> None:
    inputs = SMALL.inputs(TYPES[-1])
    inputs["position_bias"] = torch.randn(entries, dtype=torch.float64, device=DEVICE).to(TYPES[-1]).double()
    found = run("triton", SMALL, inputs, TYPES[-1])
    assert_no_worse(
        found, run("naive", SMALL, inputs, TYPES[-1]), run("naive", SMALL, inputs, torch.float64), NAMES
    )  # fmt: skip
    assert (found[4][400:] == 0).all()
    assert (found[4][: 400 - 70] == 0).all()


@pytest.mark.parametrize("bias", ["none", "position", "time", "both"])
def test_memory_that_nothing_has_written_is_not_read(bias: str, unwritten: None) -> None:
    check(Case(lengths=(40, 0, 150), heads=1, bias=bias), TYPES[-1])


@pytest.mark.parametrize("far", [False, True], ids=["views", "far apart"])
def test_strided_tokens(far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q, K and V as views of one product; and tokens too far apart for 32 bits."""
    inputs = SMALL.inputs(TYPES[-1])
    expected = run("triton", SMALL, inputs, TYPES[-1])
    if far:
        monkeypatch.setattr(short, "SHORT", 2**26)
        assert short._near(torch.empty_strided((3, 2, 4), (16, 4, 1))).stride(0) == 8
    original = op.attention

    def with_views(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: Any) -> Any:
        mixed = torch.cat([tensor.flatten(1) for tensor in (v, q, k, v)], 1)
        views = mixed.split([tensor[0].numel() for tensor in (v, q, k, v)], 1)
        return original(
            *(view.unflatten(1, t.shape[1:]) for view, t in zip(views[1:], (q, k, v), strict=True)), **others
        )

    monkeypatch.setattr(op, "attention", with_views)
    found = run("triton", SMALL, inputs, TYPES[-1])
    for name, ours, same in zip(NAMES, found, expected, strict=True):  # the order of additions is not fixed
        torch.testing.assert_close(ours, same, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("bias", ["none", "both"])
def test_not_finite_values_stay_in_their_row(bias: str, launched: list[str]) -> None:
    """NaN in the first token of a row and infinity in its last; rows before and behind it fill no tile."""
    case = Case(lengths=(20, 9, 70), bias=bias)
    inputs = case.inputs(TYPES[-1])
    spoilt = dict(inputs)
    for name in ("q", "k", "v", "grad"):
        spoilt[name] = inputs[name].clone()
        spoilt[name][20], spoilt[name][28] = torch.nan, torch.inf
    others = torch.ones(99, dtype=torch.bool, device=DEVICE)
    others[20:29] = False
    clean, found = (run("triton", case, given, TYPES[-1])[:4] for given in (inputs, spoilt))
    assert launched == ["forward", "backward"] * 2
    for ours, same in zip(found, clean, strict=True):
        assert torch.equal(ours[others], same[others])
        assert ours[~others].isnan().any()


def test_deterministic_mode_takes_the_other_kernels_backward(launched: list[str]) -> None:
    inputs = SMALL.inputs(TYPES[-1])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (run("triton", SMALL, inputs, TYPES[-1]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched == ["forward"] * 2
    assert all(map(torch.equal, first, second))
    assert_no_worse(
        first, run("naive", SMALL, inputs, TYPES[-1]), run("naive", SMALL, inputs, torch.float64), NAMES
    )  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(257,), heads=1, dqk=8, dv=8),
        replace(SMALL, dqk=65),
        replace(SMALL, dv=65),
    ],
    ids=["longer row", "wide q", "wide v"],
)
def test_other_calls_go_elsewhere(case: Case, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class ElsewhereError(Exception):
        pass

    def elsewhere(*_: Any) -> None:
        raise ElsewhereError

    monkeypatch.setattr(op, "forward", elsewhere)
    with pytest.raises(ElsewhereError):
        run("triton", case, case.inputs(torch.float16), torch.float16)
    assert not launched


def test_float32_goes_elsewhere(launched: list[str]) -> None:
    check(CASES["both"], torch.float32)
    assert not launched


class Recorder:
    """Stands for a kernel: writes down that it was launched."""

    def __init__(self, name: str, launches: list[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **__: self.launches.append(self.name)


class Operations(TorchDispatchMode):
    """Within: torch's operations, but for new tensors not filled, and other views."""

    FREE = ("new_empty", "empty", "detach", "view")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", ["none", "position", "time", "both"])
def test_nothing_is_launched_but_the_kernels(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cast, no zeros, no copy: Q, K and V may be views of one product, the tables are float32."""
    case = Case(lengths=(211, 100), heads=2, dqk=25, dv=25, bias=bias)
    inputs = case.inputs(torch.bfloat16)
    grad = inputs.pop("grad").bfloat16()
    mixed = torch.cat([inputs[name].bfloat16() for name in ("q", "k", "v")], 2)
    inputs |= dict(zip(("q", "k", "v"), mixed.split(25, 2), strict=True))
    inputs |= {name: None if x is None else x.float() for name, x in inputs.items() if name.endswith("_bias")}
    prepare.bucket_edges(inputs["q"].device)  # made once a device
    launches: list[str] = []
    for module, name in (
        (prepare, "band"),
        *((short, f"short_{one}") for one in ("forward", "backward", "sums", "tables")),
    ):
        monkeypatch.setattr(module, f"{name}_kernel", Recorder(name, launches))
    with Operations() as operations:
        call = op.Inputs(**inputs, softmax=False)
        _, handed = short.forward(call)
        short.backward(op.Inputs(**inputs, softmax=False), handed, grad, (inputs["position_bias"], inputs["time_bias"]))
    assert not operations.seen
    plain = ["short_forward", "short_backward"]
    assert launches == (plain if bias == "none" else ["band", *plain, "short_sums", "short_tables"])


def test_offsets_are_not_copied_where_no_program_is_left_over() -> None:
    for rows in (0, 1, 128, 65_535, 65_536):
        offsets = torch.arange(rows + 1)
        assert inputs_module.launch_offsets(offsets) is offsets
    assert len(inputs_module.launch_offsets(torch.arange(65_537 + 1))) == 2 * 32_769 + 1


def told_and_returned(inputs: dict[str, Any]) -> list[list[Any]]:
    """Types, shapes and strides of what both operations return: as tracers are told, and in truth."""
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}

    def described(inputs: dict[str, Any]) -> list[Any]:
        arguments = [inputs[field.name] for field in fields(op.Inputs)]
        outputs = op.attention(*arguments)
        tensors = [*outputs, *op.gradients(torch.ones_like(outputs[0]), outputs, arguments, False)]
        return [(one.shape, one.dtype, one.stride()) for one in tensors]

    with mode:
        told = described(fake)
    return [told, described(inputs)]


@pytest.mark.parametrize("bias", ["none", "position", "time", "both"])
def test_shapes_told_to_tracers_are_those_returned(bias: str) -> None:
    """Of both operations, in number, type and strides; Q, K and V are views."""
    inputs = SMALL.inputs(torch.float16) | {"softmax": False}
    for name in ("q", "k", "v", "position_bias", "time_bias"):
        inputs[name] = inputs[name].half()
        if inputs[name].ndim == 3:
            inputs[name] = torch.cat([inputs[name]] * 2, 1)[:, : SMALL.heads]
    if bias not in ("position", "both"):
        inputs["position_bias"] = None
    if bias not in ("time", "both"):
        inputs["time_bias"] = None
    told, returned = told_and_returned(inputs)
    assert told == returned


@pytest.mark.parametrize("name", [*MASKS])
def test_every_mask_goes_elsewhere(name: str, launched: list[str]) -> None:
    """In both passes, and in what tracers are told; but for the mask, these kernels would take the call."""
    inputs = MASKS[name].inputs(torch.float16) | {"softmax": name == "softmax"}
    inputs |= {one: inputs[one].half() for one in ("q", "k", "v", "position_bias", "time_bias")}
    told, returned = told_and_returned(inputs)
    assert not launched
    assert told == returned
    assert short.fits(inputs["q"], inputs["v"], inputs["max_len"], False, False)


def test_no_mask_is_left_out_above() -> None:
    """`Inputs`' fields that say who sees whom, and what a score becomes."""
    plain = SMALL.inputs(torch.float16)
    tensors = {name for name, value in plain.items() if value is None and name != "attention_scale"}
    assert set(MASKS) == {*Mask._fields, *tensors, "softmax"}


@pytest.mark.gpu
@pytest.mark.parametrize("bias", ["none", "both"])
def test_more_than_65535_rows(bias: str) -> None:
    """65,537 rows of which five have tokens; against those alone."""
    few = (40, 256, 9, 0, 70)
    case = Case(lengths=few, dqk=25, dv=25, bias=bias)
    inputs = case.inputs(torch.bfloat16)
    lengths = torch.zeros(65_537, dtype=torch.int64)
    lengths[torch.tensor([0, 32_768, 65_533, 65_535, 65_536])] = torch.tensor(few)
    many = inputs | {"offsets": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(DEVICE)}
    found, expected = (run("triton", case, given, torch.bfloat16) for given in (many, inputs))
    for ours, same in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, same, rtol=2e-2, atol=2e-2)

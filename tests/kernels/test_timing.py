"""What times a call sees whether it wrote its outputs."""

from collections.abc import Callable, Iterator

import pytest
import torch

from kernels.tools.timing import Unwritten, gradients, timed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    """On a CPU, whose allocator may hand out other memory than the poisoned one, torch fills new tensors with NaN."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")  # fills them, as torch.utils.deterministic says
    yield
    torch.use_deterministic_algorithms(False)


def half(x: torch.Tensor) -> torch.Tensor:
    """x, of whose rows a half is written."""
    result = torch.empty_like(x)
    result[: len(x) // 2] = x[: len(x) // 2]
    return result


@pytest.mark.usefixtures("new_memory_is_nan")
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (torch.empty_like, r"output 0 of \(64, 256\)"),  # with NaN in it, or what other inputs left there too
        (half, r"output 0 of \(64, 256\) is not finite: not all of it was written"),
        (torch.zeros_like, r"output 0 of \(64, 256\) is the same for other inputs"),
        (lambda x: (2 * x, [None, 7, torch.zeros_like(x)]), r"output 1 of \(64, 256\) is the same for other inputs"),
        (lambda x: x / 0, "is not finite"),
    ],
)
def test_a_call_that_does_not_write_its_outputs_is_caught(
    call: Callable[..., object], said: str, captured: bool
) -> None:
    x = torch.randn(64, 256, device=DEVICE)
    with pytest.raises(Unwritten, match=said):
        timed(lambda: call(x), [x], DEVICE, captured)


@pytest.mark.parametrize("captured", [True, False])
def test_a_call_that_writes_is_timed_and_its_inputs_stay(captured: bool) -> None:
    wide = torch.randn(64, 512, device=DEVICE)
    x, weight = wide[:, 256:], torch.randn(256, device=DEVICE, requires_grad=True)
    kept = wide.clone(), weight.detach().clone()
    calls = []

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return x * weight, torch.empty(0, device=DEVICE)

    timing = timed(call, [x, weight, 3, None], DEVICE, captured)
    assert timing.ms > 0
    assert timing.captured == (captured if DEVICE == "cuda" else None)
    assert len(calls) == 3 if DEVICE == "cuda" and captured else len(calls) >= 5
    assert torch.equal(wide, kept[0])
    assert torch.equal(weight, kept[1])
    (2 * x * weight).sum().backward()  # autograd does not see that they were others for a while


def test_both_passes_of_a_function_are_one_call() -> None:
    x, y = torch.randn(2, 8, device=DEVICE, dtype=torch.float64)
    both, inputs = gradients(torch.mul, x, y)
    dx, dy = both()
    assert torch.equal(dx, inputs[-1] * y)
    assert torch.equal(dy, inputs[-1] * x)
    assert timed(both, inputs, DEVICE).ms > 0


@pytest.mark.gpu
def test_a_backward_pass_alone_is_captured_where_its_forward_pass_was() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.randn(64, 256, device="cuda", requires_grad=True)
        output, grad = torch.sin(x), torch.randn(64, 256, device="cuda")
        timing = timed(lambda: torch.autograd.grad(output, x, grad, retain_graph=True), [x, grad], "cuda")
    assert timing.captured

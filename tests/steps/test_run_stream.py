"""What a run's stream leaves behind where a CUDA graph cannot be captured, and its random numbers."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from steps.training.stream import RunStream


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """What a RunStream on CUDA calls, on a CPU. Returns the pools in which a capture failed, and none can begin."""
    pools, failed = iter(range(1, 99)), set()

    class Anything:
        def __init__(self, *_: Any) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    @contextmanager
    def graph(_: Any, pool: int, **how: Any) -> Iterator[None]:
        if pool in failed:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        try:
            yield
        except RuntimeError:
            failed.add(pool)
            raise

    for name, stands in (("Stream", Anything), ("CUDAGraph", Anything), ("graph", graph)):
        monkeypatch.setattr(torch.cuda, name, stands)
    monkeypatch.setattr(torch.cuda, "current_stream", Anything)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "default_generators", [Anything()])
    monkeypatch.setattr("steps.training.stream.torch.Generator", Anything)
    return failed


def test_after_a_capture_that_failed_others_have_another_pool(cuda: set[int]) -> None:
    """torch takes the pool of a failed capture for one in capture (2.11), or for one of no graph (later)."""
    stream = RunStream(torch.device("cuda:0"))

    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert stream.capture(lambda: 1)[1] == 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted"):
            stream.capture(fails, uses_random=False)
        assert stream.capture(lambda: 2)[1] == 2
    assert cuda == {1, 2}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_its_seed_is_that_of_torch_without_a_stack_trace(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws() -> list[torch.Tensor]:
        return [torch.randn(9), torch.randn(9, device=device), torch.randperm(9)]

    stream = RunStream(torch.device(device))
    with stream.active():
        torch.manual_seed(2**41 + 7)
        expected = draws()
        monkeypatch.setattr(traceback, "format_stack", lambda *_: pytest.fail("a stack trace was formatted"))
        stream.seed(2**41 + 7)
        assert all(map(torch.equal, draws(), expected))
        stream.seed(2**41 + 8)
        assert not any(map(torch.equal, draws(), expected))

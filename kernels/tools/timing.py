"""Time a call on a device, and see that it writes what it returns.

A kernel that writes nothing is the fastest of all. So outputs are filled with NaN before a series of calls; after it
they must be finite, and with other inputs they must be others.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
_ON_CPU = 3  # calls, of which the median counts
_FEWEST, _MOST, _MILLISECONDS = 20, 200, 40.0  # calls on CUDA: as many as take so long together, within these


class Unwritten(RuntimeError):
    """A call returned what it had not written."""


class Timing(NamedTuple):
    """Median milliseconds of a call; and whether they are of a CUDA graph, or None on a CPU."""

    ms: float
    captured: bool | None


def timed(call: Call, inputs: Iterable[Any], device: str, captured: bool = True) -> Timing:
    """Median device time of a call with a cold L2 cache: of replays of a CUDA graph, so that launches cost nothing, or,
    where it cannot be captured or is not to be, of the call itself. On a CPU the median time of a few calls.

    Args:
        call: returns its outputs, tensors in any nesting of tuples and lists; None and integers are passed over.
        inputs: what the outputs depend on, each of them on one at least; its floating-point tensors are changed in
            place for one call, and changed back.
        device: cpu or cuda. A backward pass alone can be captured only on the stream that its forward pass was on: the
            current one, and not the default.
        captured: whether to try a CUDA graph.

    Raises Unwritten if an output is not finite after the series, or is the same for other inputs.
    """
    run, in_graph = call, None
    if device != "cpu":
        for _ in range(2):
            call()  # compiles, and takes what memory it keeps
        run, in_graph = _graph_of(call) if captured else (call, False)
    ms, outputs = _series(run, device)
    values = [tensor.clone() for tensor in _tensors(outputs)]
    for number, value in enumerate(values):
        if not torch.isfinite(value).all():
            raise Unwritten(f"output {number} of {tuple(value.shape)} is not finite: not all of it was written")
    del outputs
    _roll(inputs, 1)
    others = _tensors(run())
    for number, (value, other) in enumerate(zip(values, others, strict=True)):
        if torch.equal(value, other):
            raise Unwritten(f"output {number} of {tuple(value.shape)} is the same for other inputs")
    _roll(inputs, -1)
    return Timing(ms, in_graph)


def peak_of(call: Call, device: str, prepare: Callable[[], None] = lambda: None) -> int | None:
    """Bytes allocated at the peak of a call, beyond what was there before; None on a CPU, which does not say.

    Args:
        prepare: is called before each of the two calls, of which the second counts.
    """
    if device == "cpu":
        return None
    prepare()
    call()
    prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gradients(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> tuple[Call, list[torch.Tensor]]:
    """Forward and backward of a function of tensors, through autograd, as a call that returns the gradients; and what
    they depend on."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    grad = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad), [*inputs, grad]


def poison(outputs: list[torch.Tensor]) -> None:
    """Fill with NaN these tensors, and the free memory that the next ones of their sizes are put into."""
    spare = [torch.empty_like(tensor) for tensor in outputs for _ in range(2)]
    for tensor in (*outputs, *spare):
        tensor.data.fill_(torch.nan)


def _graph_of(call: Call) -> tuple[Call, bool]:
    """The call as a replay of a CUDA graph, which writes to the same outputs each time; or as it is."""
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # The default stream cannot be captured: there the graph has one of its own.
        with torch.cuda.graph(graph, stream=None if stream == torch.cuda.default_stream() else stream):
            outputs = call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, False

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay, True


def _series(run: Call, device: str) -> tuple[float, Any]:
    """The median of a series of calls, its outputs poisoned before; and what the last one returned."""
    if device == "cpu":
        poison(_tensors(run()))
        times = []
        for _ in range(_ON_CPU):
            start = time.perf_counter()
            outputs = run()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times), outputs
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device)
    one = statistics.median(_events(run, flush, 3)[0])
    poison(_tensors(run()))
    times, outputs = _events(run, flush, min(max(_FEWEST, int(_MILLISECONDS / one)), _MOST))
    return statistics.median(times), outputs


def _events(run: Call, flush: torch.Tensor, count: int) -> tuple[list[float], Any]:
    """Milliseconds of each call from event to event, and what the last one returned.

    Clearing the cache also keeps calls apart: in unbroken replays of long kernels the GPU lowers its clock.
    """
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    outputs = None
    for start, end in events:
        flush.zero_()
        start.record()
        outputs = run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events], outputs


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return list(_flat(outputs))


def _flat(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        if outputs.is_floating_point() and outputs.numel():
            yield outputs
    elif isinstance(outputs, tuple | list):
        for one in outputs:
            yield from _flat(one)


def _roll(inputs: Iterable[Any], places: int) -> None:
    """Move every element of the inputs by so many places, without telling autograd."""
    for tensor in _flat(list(inputs)):
        tensor.data.copy_(tensor.data.reshape(-1).roll(places).view(tensor.shape))

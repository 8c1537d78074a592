"""Calls that come again and again with the same shapes: as CUDA graphs, which cost the host one launch."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

#: Keys that are remembered, though no graph is kept for them.
_MOST_SEEN = 4096


@dataclass(frozen=True)
class _Graph:
    """A captured call: a replay reads `inputs` and writes `output`."""

    graph: Any
    inputs: list[torch.Tensor]
    output: Any


class Repeated:
    """Calls of functions of tensors on one CUDA device. What is called a second time is captured, and replayed from
    then on: a call that comes once costs nothing more.

    A call's key must say all that a graph holds fast: the function, the shapes of its inputs, every number that Python
    sees, and every tensor besides the inputs. Only `most` graphs are kept: the least recently used goes.
    """

    def __init__(self, device: torch.device, most: int = 16) -> None:
        self._device, self._most = device, most
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._pool: Any = None

    def seen(self, key: Hashable) -> bool:
        """Whether this was asked of the key before."""
        known = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return known

    def run(self, key: Hashable, work: Callable[..., Any], inputs: list[torch.Tensor], *, capture: bool = True) -> Any:
        """work(*inputs). What it returns is overwritten by the next call: read or copy it before.

        To capture waits for the device, all other calls do not. With `capture` False no graph is made, nor replayed.
        """
        held = self._graphs.get(key)
        if not capture or (held is None and key not in self._seen):
            # Copies, as a graph has: kernels are compiled for addresses like theirs, which cannot be done in a capture.
            output = work(*(tensor.clone() for tensor in inputs))
            self.seen(key)  # not before: work that failed may have compiled nothing
            return output
        self.seen(key)
        if held is None:
            if len(self._graphs) >= self._most:
                self._graphs.popitem(last=False)
            try:
                held = _Graph(*self._captured(work, [tensor.clone() for tensor in inputs]))
            except RuntimeError:
                self._pool = None  # nor into one in which a capture failed
                raise
            self._graphs[key] = held
        else:
            self._graphs.move_to_end(key)
            for mine, tensor in zip(held.inputs, inputs, strict=True):
                mine.copy_(tensor, non_blocking=True)
        held.graph.replay()
        return held.output

    def forget(self) -> None:
        """Keep no graph: the tensors that they read, besides their inputs, are others now."""
        self._graphs.clear()
        self._pool = None  # a pool cannot be captured into once all its graphs are gone

    def _captured(self, work: Callable[..., Any], inputs: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor], Any]:
        """A graph of work(*inputs), these inputs, and its output. Graphs never run at the same time, nor is an output
        read after the next call, so all share one pool of memory."""
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = work(*inputs)
        return graph, inputs, output

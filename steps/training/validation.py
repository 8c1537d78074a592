"""The metrics of a model after an epoch."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from steps.models import Model
from steps.training.stream import RunStream


class Evaluation(Protocol):
    """How a task is evaluated: metrics on the device, and their names."""

    def __call__(self, model: Any) -> torch.Tensor:
        """The result of an evaluation, on the device."""
        ...

    def named(self, result: torch.Tensor) -> dict[str, float]:
        """The metrics by name."""
        ...


class Validation:
    """Evaluates a model as often as it is asked: on validation where the protocol has one, else on test, which then
    selects no epoch.

    The targets are the same every time. On CUDA, with a `stream`, the second evaluation is therefore captured as a CUDA
    graph, which all later ones replay: launched from Python, a small model's evaluation takes 30 to 80 ms, as long as
    the training of half an epoch. Replayed it is hundreds of small kernels still, which do not fill the GPU: between
    `queue` and `line` other runs queue theirs.
    """

    def __init__(self, model: Model, evaluation: Evaluation, part: str) -> None:
        self.model, self.evaluation, self.part = model, evaluation, part
        self._calls, self._start = 0, 0.0
        self._replay: Callable[[], torch.Tensor] | None = None
        self._result: torch.Tensor

    def queue(self, stream: RunStream | None = None) -> None:
        """Queue an evaluation on the device. stream: the run's, if a graph may be captured."""
        self._start = time.perf_counter()
        if stream and self._calls == 1:
            self._replay = self._capture(stream)
        self._calls += 1
        self._result = self._replay() if self._replay else self.evaluation(self.model)

    def line(self) -> dict[str, Any]:
        """`<part>/<metric>` for every metric, and `<part>/seconds` since `queue`, of the evaluation queued last. Waits
        for it.

        Raises StepError if a score is not finite.
        """
        values = self.evaluation.named(self._result)
        line: dict[str, Any] = {f"{self.part}/{name}": value for name, value in values.items()}
        return line | {f"{self.part}/seconds": round(time.perf_counter() - self._start, 3)}

    def _capture(self, stream: RunStream) -> Callable[[], torch.Tensor] | None:
        try:
            graph, result = stream.capture(lambda: self.evaluation(self.model), pooled=False, uses_random=False)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"evaluating {type(self.model).__name__} without a CUDA graph: {reason}", flush=True)
            return None

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

"""The metrics of a model after an epoch: on validation where the protocol has one, else on test, which then selects no
epoch."""

import time
from collections.abc import Callable
from typing import Any

import torch

from steps.data.sequences import Sequences
from steps.data.split import Split
from steps.evaluation.metrics import metric_values, named
from steps.evaluation.ranks import Ranker, Rules, require_finite
from steps.models import Model
from steps.training.stream import RunStream


class Validation:
    """Evaluates a model on all targets of the split's `eval_part`, exactly, whenever it is called.

    The targets are the same every time. On CUDA, with a `stream`, the second call therefore captures the evaluation as
    a CUDA graph, and all later calls replay it: launched from Python, a small model's evaluation takes 30 to 80 ms, as
    long as the training of half an epoch, and other runs on the GPU have to wait meanwhile.
    """

    def __init__(self, model: Model, config: dict[str, Any], sequences: Sequences, split: Split) -> None:
        self.model = model
        self.part = split.eval_part
        training, rules = config["training"], [Rules.of(config)]
        self._ranker = Ranker(sequences, split.held_out[self.part], rules, training["max_len"], training["batch"])
        self._calls = 0
        self._replay: Callable[[], torch.Tensor] | None = None

    def __call__(self, stream: RunStream | None = None) -> dict[str, Any]:
        """`<part>/<metric>` for every metric, and `<part>/seconds`. stream: the run's, if a graph may be captured.

        Raises StepError if a score is not finite.
        """
        start = time.perf_counter()
        if stream and self._calls == 1:
            self._replay = self._capture(stream)
        self._calls += 1
        finite, *values = (self._replay or self._evaluate)().tolist()  # the one wait for the device
        require_finite(bool(finite))
        line: dict[str, Any] = {f"{self.part}/{name}": value for name, value in named(values).items()}
        return line | {f"{self.part}/seconds": round(time.perf_counter() - start, 3)}

    @torch.inference_mode()
    def _evaluate(self) -> torch.Tensor:
        """Whether every score was finite, and the metrics: float64 on the device."""
        finite, (ranking,) = self._ranker.rank(self.model)
        return torch.cat([finite.double()[None], metric_values(ranking.ranks)])

    def _capture(self, stream: RunStream) -> Callable[[], torch.Tensor] | None:
        try:
            graph, result = stream.capture(self._evaluate, uses_random=False)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"evaluating {type(self.model).__name__} without a CUDA graph: {reason}", flush=True)
            return None

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

"""The metrics of a model after an epoch: on validation where the protocol has one, else on test, for which it then does
not select."""

import time
from collections.abc import Callable
from typing import Any

import torch

from steps.data.sequences import Sequences
from steps.data.split import Holdout
from steps.evaluation.metrics import metric_values, named
from steps.evaluation.ranks import Ranker, Rules, require_finite
from steps.models import Model
from steps.training.device import Place


class Watch:
    """Asks a model all questions of the watched split, exactly, whenever it is called.

    The questions are the same every time. On CUDA, within a `place`, the second call therefore captures them as a CUDA
    graph, and all later ones replay it: launched from Python, a small model's take 30 to 80 ms, as long as the training
    of half an epoch, in which other runs on the GPU have to wait.
    """

    def __init__(self, model: Model, config: dict[str, Any], sequences: Sequences, holdout: Holdout) -> None:
        self.model = model
        self.split = holdout.watched
        training, rules = config["training"], [Rules.of(config)]
        questions = holdout.questions[self.split]
        self._ranker = Ranker(sequences, questions, rules, training["max_len"], training["batch"])
        self._calls = 0
        self._replay: Callable[[], torch.Tensor] | None = None

    def __call__(self, place: Place | None = None) -> dict[str, Any]:
        """`<split>/<metric>`s and `<split>/seconds`. place: the run's, if a graph may hold the questions.

        Raises StepError if a score is not finite.
        """
        start = time.perf_counter()
        if place and self._calls == 1:
            self._replay = self._captured(place)
        self._calls += 1
        finite, *values = (self._replay or self._queue)().tolist()  # the one wait for the device
        require_finite(bool(finite))
        line: dict[str, Any] = {f"{self.split}/{name}": value for name, value in named(values).items()}
        return line | {f"{self.split}/seconds": round(time.perf_counter() - start, 3)}

    @torch.inference_mode()
    def _queue(self) -> torch.Tensor:
        """Whether every score was finite, and the metrics: float64 on the device."""
        finite, (found,) = self._ranker.ask(self.model)
        return torch.cat([finite.double()[None], metric_values(found.ranks)])

    def _captured(self, place: Place) -> Callable[[], torch.Tensor] | None:
        try:
            graph, result = place.capture(self._queue, draws=False)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"evaluating {type(self.model).__name__} without a CUDA graph: {reason}", flush=True)
            return None

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

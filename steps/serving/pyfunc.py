"""What MLflow loads of a saved model, and calls for each request: its `loader_module`.

Every check of a request is made here, so that whatever is wrong with one is said in one line, with HTTP status 400.
"""

import os
from pathlib import Path
from typing import Any

import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from steps.common.cli import StepError
from steps.serving.forms import answer_of, history_of
from steps.serving.recommender import History, Recommender
from steps.serving.together import Together

#: The params of a request: how many recommendations, and whether items of the history may be among them.
DEFAULTS: dict[str, Any] = {"k": 10, "seen": False}


class BadRequest(MlflowException):
    """What is wrong with a request, in one line.

    MLflow's server would put the whole request in front of the message.
    """

    def __init__(self, message: str) -> None:
        self._line = " ".join(message.split())
        super().__init__(self._line, INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        return self._line

    @message.setter
    def message(self, _: str) -> None:
        pass


class Served:
    """What MLflow calls a model."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender
        self._together = Together(recommender)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """An object with `understood` and `recommendations` for each object with a `history` in `model_input`.

        Raises BadRequest.
        """
        given = DEFAULTS | (params or {})
        catalogue = self._recommender.catalogue
        if not isinstance(model_input, list) or not model_input:
            raise BadRequest('inputs: a list of histories is wanted, such as [{"history": ["a title", "another"]}]')
        top, most = given["k"], len(catalogue)
        if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= most:
            raise BadRequest(f"params.k: {top!r} is no whole number from 1 to {most}, the number of items")
        read: list[tuple[History, dict[str, str]]] = []
        for place, one in enumerate(model_input):
            try:
                read.append(history_of(one, catalogue))
            except StepError as error:
                raise BadRequest(f"inputs[{place}]: {error}") from error
        found = self._together.recommend([history for history, _ in read], top, bool(given["seen"]))
        return [answer_of(understood, scored, catalogue) for (_, understood), scored in zip(read, found, strict=True)]


def _load_pyfunc(data_path: str) -> Served:
    """Called by MLflow. data_path: a folder that `Recommender.save` filled.

    Each request computes on one thread, unless OMP_NUM_THREADS says otherwise: requests at once share the cores.
    """
    recommender = Recommender.load(Path(data_path))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    recommender.catalogue.prepare()
    return Served(recommender)

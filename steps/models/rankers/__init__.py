"""The rankers that generative ranking is compared with, one file each.

They are the published equations, written here: the libraries that have them bring data pipelines and dependencies of
their own, and a GPU machine has torch alone (docs/ranking.md).
"""

from typing import Any

from steps.common.config import TrainingConfig
from steps.common.typed import read
from steps.models.rankers.base import Inputs, Ranker, RankerShape
from steps.models.rankers.dcn import DCNV2, DCNConfig
from steps.models.rankers.deepfm import DeepFM
from steps.models.rankers.din import DIN, DINConfig
from steps.models.rankers.dlrm import DLRM
from steps.models.rankers.logistic import LogisticConfig, LogisticRegression
from steps.models.rankers.mlp import MLPConfig
from steps.models.rankers.sasrec import SASRecRanker, SASRecRankerConfig

__all__ = ["RANKERS", "Inputs", "Ranker", "RankerShape", "build_ranker"]

#: By the `model` of a row in params/models.yaml: the ranker, and the entries that it reads.
RANKERS: dict[str, tuple[type[Ranker], type[Any]]] = {
    "logistic-regression": (LogisticRegression, LogisticConfig),
    "deepfm": (DeepFM, MLPConfig),
    "dcn-v2": (DCNV2, DCNConfig),
    "dlrm": (DLRM, MLPConfig),
    "din": (DIN, DINConfig),
    "sasrec-ranker": (SASRecRanker, SASRecRankerConfig),
}


def build_ranker(settings: dict[str, Any], training: TrainingConfig, shape: RankerShape) -> Ranker:
    """The untrained ranker that the `model` entry of a run's config.json describes, for inputs of a shape."""
    kind, config = RANKERS[settings["model"]]
    return kind(read(config, settings, "model.", others=True), shape, training)

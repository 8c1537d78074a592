"""The rows of the tables: one file a model, under the interface of `base`."""

from typing import Any

from steps.models.base import CountingModel, Model, SequenceModel
from steps.models.hstu import HSTU
from steps.models.popular import MostPopular
from steps.models.sasrec import SASRec

__all__ = ["CountingModel", "Model", "SequenceModel", "build"]


def build(config: dict[str, Any], num_items: int) -> CountingModel | SequenceModel:
    """The untrained model that a run's config.json describes, for items 1..num_items."""
    settings = config["model"]
    match settings["model"]:
        case "popular":
            return MostPopular(num_items)
        case "sasrec":
            return SASRec(settings, config["training"], num_items)
        case "hstu":
            return HSTU(settings, config["training"], num_items)
        case name:
            raise ValueError(f"no model {name!r}")
